"""Prompts to answer, for on-policy training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rlhf_lightning.data import collation, formats
from rlhf_lightning.data.base import AlignmentDataModule, PromptSteps
from rlhf_lightning.data.batching import shuffled
from rlhf_lightning.data.encoding import Encoder
from rlhf_lightning.data.loader import EpochSteps, StepLoader
from rlhf_lightning.data.store import RowStore
from rlhf_lightning.types import PromptBatch


class PromptDataModule(AlignmentDataModule):
    """Prompts: ``prompt``, or what demonstrations and preferences have before the completion. Further columns
    (``answer`` ...) go to the scorer.

    One step is one rollout: ``batch_size`` episodes, which are ``batch_size / samples_per_prompt`` prompts. Prompts are
    taken in turn from one pass after the other, each shuffled anew, so that every rollout is full. Episodes are numbered
    through the whole run, alike for any number of ranks.

    Args:
        source: where the prompts come from; see `AlignmentDataModule` for this and all other arguments. ``batch_size``
            counts episodes; prompts have at most ``max_prompt_length`` (else ``max_length``) tokens.
        rollouts: rollouts of an epoch; None takes as many as one pass over the prompts needs.
        samples_per_prompt: completions to sample for each prompt (the size of a group).
    """

    batch_types = (PromptBatch,)

    def __init__(
        self,
        source: str | list[str | dict[str, Any]],
        rollouts: int | None = None,
        samples_per_prompt: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(source, **kwargs)
        if rollouts is not None and rollouts < 1:
            raise ValueError(f"rollouts must be at least 1, or null for one pass; found {rollouts}.")
        if samples_per_prompt < 1 or self.batch_size % samples_per_prompt:
            raise ValueError(
                f"batch_size {self.batch_size} counts episodes, and must be a multiple of samples_per_prompt "
                f"{samples_per_prompt}."
            )
        self.rollouts = rollouts
        self.samples_per_prompt = samples_per_prompt

    @property
    def prompts_per_rollout(self) -> int:
        """Prompts of a rollout over all ranks."""
        return self.batch_size // self.samples_per_prompt

    def encoder(self) -> Encoder:
        """Reads prompts."""
        limit = self.max_prompt_length or self.max_length
        return Encoder(formats.prompt, formats.PROMPT_FORMS, self.columns, None, limit, self.as_chat)

    def collate(self, store: RowStore, rows: Sequence[int]) -> PromptBatch:
        """Prompts numbered from 0."""
        return collation.prompts(store, rows, torch.arange(len(rows)))

    def train_dataloader(self) -> StepLoader:
        """One rollout's prompts a step."""
        ranks = self.ranks[1]
        if self.prompts_per_rollout % ranks:
            raise ValueError(
                f"A rollout has {self.prompts_per_rollout} prompts (batch_size {self.batch_size} / samples_per_prompt "
                f"{self.samples_per_prompt}), which {ranks} ranks cannot share evenly: choose a multiple of {ranks}."
            )
        rows = len(self.epoch_rows(0))
        length = self.rollouts or -(-rows // self.prompts_per_rollout)
        return StepLoader(lambda epoch: self._rollouts(epoch, length), length, self.fingerprint, self.num_workers)

    def _rollouts(self, epoch: int, length: int) -> EpochSteps:
        size = self.prompts_per_rollout
        first = epoch * length * size
        taken = self._endless(first, first + length * size)
        steps = [taken[start : start + size] for start in range(0, len(taken), size)]
        return PromptSteps(self.store, steps, epoch * length * self.batch_size, *self.ranks, self.samples_per_prompt)

    def _endless(self, start: int, stop: int) -> np.ndarray:
        """Rows at the places ``start .. stop - 1`` of the endless sequence of passes over the prompts."""
        size = len(self.epoch_rows(0))
        passes = []
        for number in range(start // size, -(-stop // size)):
            rows = self.epoch_rows(number)
            passes.append(rows[shuffled(size, self.seed, number)] if self.shuffle else rows)
        offset = start - start // size * size
        return np.concatenate(passes)[offset : offset + stop - start]

    def val_dataloader(self) -> StepLoader | list[StepLoader]:
        """Prompts of the held-out rows in their order, one sample each; none without such rows."""
        return self._prompts_in_order(self.eval_store, self.held_out) if len(self.held_out) else []

    def test_dataloader(self) -> StepLoader | list[StepLoader]:
        """The same steps as for validation."""
        return self.val_dataloader()
