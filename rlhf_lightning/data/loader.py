"""The loader: yield the planned steps of an epoch, and resume at the next step.

It is not a `torch.utils.data.DataLoader`, so that Lightning cannot inject a sampler: the plan already distributes the
rows over the ranks. Lightning calls ``set_epoch`` of the loader's ``sampler``. The ``state_dict`` has three values and
resumes on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from rlhf_lightning.data import collation
from rlhf_lightning.data.batching import BatchPlan
from rlhf_lightning.data.row_store import RowStore
from rlhf_lightning.errors import StateError
from rlhf_lightning.types import NO_LIMITS, MicroBatchLimits, MultiTurn, PromptBatch, Step

Collate = Callable[[RowStore, Sequence[int]], Any]


class PlannedSteps:
    """Steps of rows with completions.

    Args:
        plan: the plan, over positions in ``rows``.
        store: the encoded rows.
        rows: index into the store for each position.
        rank: this rank.
        collate: function that collates rows of the store into a batch.
    """

    def __init__(self, plan: BatchPlan, store: RowStore, rows: np.ndarray, rank: int, collate: Collate) -> None:
        self.plan, self.store, self.rows, self.rank, self.collate = plan, store, rows, rank, collate

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> Step[Any]:
        planned = self.plan.step(index, self.rank)
        batches = (self.collate(self.store, self.rows[list(group)].tolist()) for group in planned.micro_batches)
        row_ids = tuple(self.rows[self.plan.rows_of(index)].tolist())
        return Step(tuple(batches), planned.rows, planned.tokens, row_ids, self.plan.limits)


class PromptSteps:
    """Steps of prompts, with one micro-batch each unless there are candidate rounds.

    Prompts are dealt to the ranks in turn; all samples of a prompt belong to one rank.

    Args:
        store: the encoded rows.
        rows: rows of the store in each step, over all ranks.
        first: number of the first step's first episode.
        rank: this rank.
        ranks: number of ranks.
        samples: samples per prompt.
        rounds: number of equal parts of a step, one micro-batch each; parts after the first are candidates.
        limits: limits of each forward pass over the sampled completions.
        choose: returns the rows of a step when it is built, given its index and number of rows; None keeps ``rows``.
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
        choose: Callable[[int, int], np.ndarray | None] | None = None,
    ) -> None:
        self.choose = choose
        self.store, self.rows, self.rank, self.ranks, self.samples = store, rows, rank, ranks, samples
        self.rounds, self.limits = rounds, limits
        self.begins = first + samples * np.cumsum([0, *(len(step) for step in rows)])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Step[PromptBatch]:
        rows = self.rows[index]
        chosen = None if self.choose is None else self.choose(index, len(rows))
        rows = rows if chosen is None else chosen
        batches = []
        for part in np.split(np.arange(len(rows)), self.rounds):
            places = part[self.rank :: self.ranks]
            episodes = torch.from_numpy(self.begins[index] + places * self.samples)
            batches.append(collation.prompts(self.store, rows[places].tolist(), episodes, self.samples))
        return Step(tuple(batches), len(rows) * self.samples // self.rounds, 0, tuple(rows.tolist()), self.limits)


class EpochSteps(Protocol):
    """The steps of one epoch of one rank."""

    def __len__(self) -> int:
        """Return the number of steps of the epoch."""

    def __getitem__(self, index: int) -> Step[Any]:
        """Return the step ``index``."""


class EpochSampler:
    """Position of a loader: the epoch, and the number of its steps that were yielded."""

    def __init__(self) -> None:
        self.epoch = 0
        self.position = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; the Trainer calls this at the start of each epoch."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0


class StepLoader:
    """Yields one `types.Step` for each optimizer step.

    Args:
        steps: function that returns the steps of an epoch.
        length: number of steps of every epoch.
        fingerprint: hash of everything that determines the order of rows; a state with another hash is refused.
        num_workers: processes that build steps ahead; 0 builds them on demand.

    Attributes:
        multi_turn: environment to add to each batch of prompts; added here, because worker processes should not have
            it.
    """

    def __init__(self, steps: Callable[[int], EpochSteps], length: int, fingerprint: str, num_workers: int = 0) -> None:
        self.steps = steps
        self.multi_turn: MultiTurn | None = None
        self.length = length
        self.fingerprint = fingerprint
        self.num_workers = num_workers
        self.sampler = EpochSampler()
        self.batch_sampler = None  # Lightning first checks this attribute for a sampler
        self._resumed = False

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Step[Any]]:
        """Yield the epoch's steps, from the beginning or from the position of a loaded state."""
        sampler = self.sampler
        start = sampler.position if self._resumed and sampler.position < self.length else 0
        self._resumed = False
        sampler.position = start
        for index, step in enumerate(self.steps_from(sampler.epoch, start), start):
            sampler.position = index + 1  # set when yielded, because workers build ahead
            yield step if self.multi_turn is None else conversing_step(step, self.multi_turn)

    def steps_from(self, epoch: int, start: int) -> Iterator[Step[Any]]:
        """Yield the steps of an epoch, beginning with step ``start``."""
        steps = self.steps(epoch)
        if self.num_workers == 0:
            return (steps[index] for index in range(start, self.length))
        loader = DataLoader(
            cast(Dataset[Any], steps), sampler=range(start, self.length), batch_size=None, collate_fn=_unchanged,
            num_workers=self.num_workers, generator=torch.Generator(),
        )  # fmt: skip  # its own generator: seeding workers must not advance the global one
        return iter(loader)

    def state_dict(self) -> dict[str, Any]:
        """Return the position: the epoch, the number of its steps that were yielded, and the fingerprint."""
        return {"epoch": self.sampler.epoch, "step": self.sampler.position, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state.

        Raises:
            StateError: the state belongs to other data or another order.
        """
        if state["fingerprint"] != self.fingerprint:
            raise StateError(
                "other-data",
                "the checkpoint was written with other data, another tokenizer or other data settings "
                "(source, rows, batch_size, seed, lengths ...), so its position cannot be used here; "
                "resume with the same data, or start a new run from its exported model (model.init_from)",
            )
        self.sampler.epoch, self.sampler.position = state["epoch"], state["step"]
        self._resumed = True


def conversing_step(step: Step[PromptBatch], multi_turn: MultiTurn) -> Step[PromptBatch]:
    """Return a step whose prompts begin conversations with the environment."""
    return step._replace(micro_batches=tuple(one._replace(multi_turn=multi_turn) for one in step.micro_batches))


def _unchanged(step: Any) -> Any:
    return step
