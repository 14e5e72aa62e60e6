"""Stages that learn from fixed data: one training step is one optimizer step over given sequences."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from rlhf_lightning.modules.base import AlignmentModule
from rlhf_lightning.modules.meter import Meter
from rlhf_lightning.types import Step


class OfflineModule(AlignmentModule):
    """Base of the stages on fixed data. A family implements ``loss_sum``; the loop is here."""

    counts_tokens: ClassVar[bool] = False
    """Whether the loss is a mean over tokens (SFT) rather than over rows."""

    def loss_sum(self, batch: Any, meter: Meter) -> Tensor:
        """Return the sum of a micro-batch's losses, with gradient, and add its metrics to ``meter``."""
        raise AttributeError(f"{type(self).__name__} must define 'loss_sum'")

    def training_step(self, step: Step[Any], batch_idx: int) -> None:
        """Take one optimizer step over all micro-batches of ``step``."""
        meter = Meter()
        losses = [partial(self.loss_sum, batch, meter) for batch in step.micro_batches]
        norm = self.update(losses, self.loss_count(step))
        self.episodes += step.rows
        self.tokens += step.tokens
        self.log_training(meter, grad_norm=norm)

    def loss_count(self, step: Step[Any]) -> int:
        """Return what the sum of losses is divided by: tokens or rows of the step over all ranks."""
        return step.tokens if self.counts_tokens else step.rows

    def validation_step(self, step: Step[Any], batch_idx: int) -> None:
        """Add the metrics of held-out rows."""
        for batch in step.micro_batches:
            self.loss_sum(batch, self._evaluation)

    def test_step(self, step: Step[Any], batch_idx: int) -> None:
        """Add the metrics of test rows."""
        self.validation_step(step, batch_idx)
