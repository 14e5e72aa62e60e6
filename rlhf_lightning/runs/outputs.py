"""Callbacks that write files of a run: the exported model, predictions, skipped updates."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from rlhf_lightning.errors import SettingError
from rlhf_lightning.runs.atomic_files import AppendedFile, move_into_place
from rlhf_lightning.runs.run import EXPORTS_FOLDER, MODEL_FOLDER, aligned, is_rehearsal, run_folder, updates_of


class ModelExport(Callback):
    """Write ``model/`` when training ends, and on the way ``exports/update_<n>/`` where asked for.

    Args:
        enabled: false leaves the weights in the checkpoints alone; `rlhf export` turns those into a folder later.
        every_n_updates: also export once this many further updates are done; for curves over a run.
    """

    def __init__(self, enabled: bool = True, every_n_updates: int | None = None) -> None:
        super().__init__()
        if every_n_updates is not None and every_n_updates < 1:
            raise SettingError(
                "setting-out-of-range", f"export.every_n_updates is {every_n_updates}: give a positive number, or null"
            )
        self.enabled = enabled
        self.every_n_updates = every_n_updates
        self._exported_at = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from where training starts."""
        self._exported_at = updates_of(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Export when a multiple of the period was reached or passed."""
        updates, period = updates_of(pl_module), self.every_n_updates
        if self.enabled and period is not None and updates // period > self._exported_at // period:
            self._exported_at = updates
            self._export(trainer, pl_module, f"{EXPORTS_FOLDER}/update_{updates:06d}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export the final weights."""
        if self.enabled and not is_rehearsal(trainer):
            self._export(trainer, pl_module, MODEL_FOLDER)
            if trainer.is_global_zero:
                print(f"model: {run_folder(trainer).model}")

    def _export(self, trainer: Trainer, module: LightningModule, name: str) -> None:
        """Write one folder; the module's export puts it in place whole."""
        if is_rehearsal(trainer):
            return
        folder = run_folder(trainer)
        if trainer.is_global_zero or module.device_mesh is not None:  # all ranks gather sharded weights
            module.export(folder.path / name)  # type: ignore[operator]
        trainer.strategy.barrier("export")


class PredictionWriter(Callback):
    """Write the rows that ``predict_step`` returns, as they come, to one JSONL file.

    The file appears under its name when all rows are in it. Several ranks write parts, joined in the ranks' order.

    Args:
        path: the file; null takes predictions.jsonl in the run's folder.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__()
        self.given = path
        self.path: Path | None = None
        self.rows = 0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the file and begin this rank's part anew."""
        self.path = Path(self.given) if self.given else run_folder(trainer).predictions
        self.rows = 0
        self._part(trainer.global_rank).unlink(missing_ok=True)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Append the rows of a step."""
        rows: Sequence[dict[str, Any]] = outputs or ()
        AppendedFile(self._part(trainer.global_rank)).append(rows)
        self.rows += len(rows)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join the parts and put the file in place."""
        assert self.path is not None
        trainer.strategy.barrier("predictions")
        if not trainer.is_global_zero:
            return
        whole = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        whole.parent.mkdir(parents=True, exist_ok=True)
        with whole.open("wb") as file:
            for rank in range(trainer.world_size):
                part = self._part(rank)
                if part.is_file():
                    with part.open("rb") as rows:
                        shutil.copyfileobj(rows, file)
                    part.unlink()
        move_into_place(whole, self.path)
        print(f"predictions: {self.path}")

    def _part(self, rank: int) -> Path:
        assert self.path is not None
        return self.path.with_name(f".{self.path.name}.rank{rank}.partial")


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
        self._rows = list(batch.row_ids)
        self._before = aligned(pl_module).skipped_updates

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
        skipped = aligned(module).skipped_updates - self._before
        folder = run_folder(trainer)
        if rows is not None and skipped and folder.writes:
            folder.skipped_updates.append([{"update": updates_of(module), "skipped": skipped, "rows": rows}])
