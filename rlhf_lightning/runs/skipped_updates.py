"""Record the rows of training steps whose loss or gradient was not finite."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from rlhf_lightning.runs.run import run_folder, updates_of


class SkippedUpdates(Callback):
    """Write skipped_updates.jsonl: a row for each training step with updates that were skipped.

    Each has ``update`` (the counter after the step), ``skipped`` (how many of its updates), and ``rows``: numbers of
    the step's rows over all ranks, counted from 0 among those that the data kept. There is no file where nothing was
    skipped.
    """

    def __init__(self) -> None:
        super().__init__()
        self._rows: list[int] | None = None  # of the step that is being taken
        self._before = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask for the folder here, where all ranks do; an exception may reach one rank alone."""
        run_folder(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember what the step is made of."""
        self._rows = list(getattr(batch, "row_ids", ()))
        self._before = skipped_by(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the step down if updates were skipped."""
        self._write(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the step down that ended the run."""
        self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, module: LightningModule) -> None:
        rows, self._rows = self._rows, None
        skipped = skipped_by(module) - self._before
        folder = run_folder(trainer)
        if rows is not None and skipped and folder.writes:
            folder.skipped_updates.append([{"update": updates_of(module), "skipped": skipped, "rows": rows}])


def skipped_by(module: LightningModule) -> int:
    """Return how many updates a module has skipped; 0 for one that does not count them."""
    return int(getattr(module, "skipped_updates", 0))
