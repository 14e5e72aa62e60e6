"""Updates whose loss or gradient is not finite: skipped one by one; so many in a row end the run, which is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rlhf_lightning.errors import StateError

if TYPE_CHECKING:
    from rlhf_lightning.training.module import AlignmentModule


class DivergenceError(StateError):
    """Update after update has a loss or a gradient that is NaN or infinite."""


class Skips:
    """Counts skipped updates in a row, and stops the run at a limit.

    Args:
        most: updates in a row that may be skipped; the last of them stops the run.

    Raises:
        ValueError: ``most`` is below 1.
    """

    def __init__(self, most: int) -> None:
        self.most, self.in_a_row = most, 0

    def check(self, module: AlignmentModule, finite: bool) -> None:
        """Count an update.

        Args:
            module: whose update it was, its counter moved on.
            finite: whether its loss and its gradient were.

        Raises:
            DivergenceError: it is the last in a row that may be skipped.
        """
        self.in_a_row = 0 if finite else self.in_a_row + 1
        if self.in_a_row >= self.most:
            raise DivergenceError("diverged", _sentence(module, self.most))


def _sentence(module: AlignmentModule, count: int) -> str:
    """Say what happened, what is still good and what to do."""
    weights = all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters())
    checkpoint = str(getattr(module.trainer.checkpoint_callback, "last_model_path", "") or "")
    said = f"loss or gradient of {count} updates in a row, the last of them update {module.updates}, is NaN or infinite"
    if not weights:
        said += ", and so are weights: resume from a checkpoint that is older than that"
    elif checkpoint:
        said += f"; nothing was learned from them, and the last good checkpoint is {checkpoint}"
    else:
        said += "; nothing was learned from them, and no checkpoint was written yet"
    return (
        f"{said}. Look at the rows that skipped_updates.jsonl in the run's folder names, lower model.learning_rate, or "
        "raise model.max_skipped_updates"
    )
