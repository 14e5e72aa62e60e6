"""One epoch's steps of one rank: planned rows, collated when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from rlhf_lightning.data import collation
from rlhf_lightning.data.batching import BatchPlan
from rlhf_lightning.data.row_store import RowStore
from rlhf_lightning.types import NO_LIMITS, MicroBatchLimits, PromptBatch, Step

Collate = Callable[[RowStore, Sequence[int]], Any]


class PlannedSteps:
    """Steps of rows with completions.

    Args:
        plan: the plan, over positions in ``rows``.
        store: the encoded rows.
        rows: row of the store at each position.
        rank: this rank.
        collate: makes a batch of rows of the store.
    """

    def __init__(self, plan: BatchPlan, store: RowStore, rows: np.ndarray, rank: int, collate: Collate) -> None:
        self.plan, self.store, self.rows, self.rank, self.collate = plan, store, rows, rank, collate

    def __len__(self) -> int:
        """Steps of the epoch."""
        return len(self.plan)

    def __getitem__(self, index: int) -> Step[Any]:
        """This rank's share of a step."""
        planned = self.plan.step(index, self.rank)
        batches = (self.collate(self.store, self.rows[list(group)].tolist()) for group in planned.micro_batches)
        row_ids = tuple(self.rows[self.plan.rows_of(index)].tolist())
        return Step(tuple(batches), planned.rows, planned.tokens, row_ids, self.plan.limits)


class PromptSteps:
    """Steps of prompts alone, one micro-batch each unless there are candidates, dealt to the ranks in turn: all samples
    of a prompt to one rank.

    Args:
        store: the encoded rows.
        rows: rows of the store in each step, over all ranks.
        first: number of the first step's first episode.
        rank: this rank.
        ranks: number of ranks.
        samples: samples of each prompt.
        rounds: equal parts that a step is cut into, one micro-batch each; all but the first are candidates.
        limits: bounds of each forward pass over what is sampled.
    """

    def __init__(
        self,
        store: RowStore,
        rows: Sequence[np.ndarray],
        first: int,
        rank: int,
        ranks: int,
        samples: int = 1,
        rounds: int = 1,
        limits: MicroBatchLimits = NO_LIMITS,
    ) -> None:
        self.store, self.rows, self.rank, self.ranks, self.samples = store, rows, rank, ranks, samples
        self.rounds, self.limits = rounds, limits
        self.begins = first + samples * np.cumsum([0, *(len(step) for step in rows)])

    def __len__(self) -> int:
        """Steps of the epoch."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Step[PromptBatch]:
        """This rank's share of a step."""
        rows = self.rows[index]
        batches = []
        for part in np.split(np.arange(len(rows)), self.rounds):
            places = part[self.rank :: self.ranks]
            episodes = torch.from_numpy(self.begins[index] + places * self.samples)
            batches.append(collation.prompts(self.store, rows[places].tolist(), episodes, self.samples))
        return Step(tuple(batches), len(rows) * self.samples // self.rounds, 0, tuple(rows.tolist()), self.limits)
