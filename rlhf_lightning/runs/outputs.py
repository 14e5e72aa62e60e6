"""Callbacks that write output files of a run: exported model, predictions, skipped updates."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from rlhf_lightning.atomic_files import AppendedFile, complete_file
from rlhf_lightning.runs.run import (
    EXPORTS_FOLDER,
    MODEL_FOLDER,
    aligned,
    check_period,
    is_rehearsal,
    passes_multiple,
    run_folder,
    updates_of,
)


class ModelExport(Callback):
    """Export ``model/``, the Hugging Face folder that the next stage starts from, when training ends.

    Args:
        enabled: false exports nothing; `rlhf export` can export a checkpoint later.
        every_n_updates: also export ``exports/update_<n>/`` every this many updates.
    """

    def __init__(self, enabled: bool = True, every_n_updates: int | None = None) -> None:
        super().__init__()
        check_period("export.every_n_updates", every_n_updates)
        self.enabled = enabled
        self.every_n_updates = every_n_updates
        self._exported_at = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting updates (after a resume, from the resumed count)."""
        self._exported_at = updates_of(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Export when the period has passed."""
        updates = updates_of(pl_module)
        if self.enabled and passes_multiple(self._exported_at, updates, self.every_n_updates):
            self._exported_at = updates
            self._export(trainer, pl_module, f"{EXPORTS_FOLDER}/update_{updates:06d}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export the final weights."""
        if self.enabled and not is_rehearsal(trainer):
            self._export(trainer, pl_module, MODEL_FOLDER)
            if trainer.is_global_zero:
                print(f"model: {run_folder(trainer).model}")

    def _export(self, trainer: Trainer, module: LightningModule, name: str) -> None:
        if is_rehearsal(trainer):
            return
        folder = run_folder(trainer)
        if trainer.is_global_zero or module.device_mesh is not None:  # all ranks gather sharded weights
            module.export(folder.path / name)  # type: ignore[operator]
            self._complete_card(folder.path / name / "README.md", trainer, module)
        trainer.strategy.barrier("export")

    def _complete_card(self, card: Path, trainer: Trainer, module: LightningModule) -> None:
        """Add objective, paper, updates and final metrics to the model card, if the export wrote one."""
        if not trainer.is_global_zero or not card.is_file():
            return
        paper = getattr(module, "paper", "")
        metrics = {name: trainer.callback_metrics.get(name) for name in aligned(module).headline_metrics}
        objective = f"{type(module).__name__} ({paper})" if paper else type(module).__name__
        lines = [f"- objective: {objective}", f"- updates: {updates_of(module)}"]
        lines += [f"- {name}: {float(value):.4g}" for name, value in metrics.items() if value is not None]
        with card.open("a", encoding="utf-8") as file:
            file.write("\n## Training\n\n" + "\n".join(lines) + "\n")


class PredictionWriter(Callback):
    """Write the rows that ``predict_step`` returns to one JSONL file, which is created only when complete.

    Each rank writes a part; the parts are joined in the order of ranks.

    Args:
        path: the file; null means predictions.jsonl in the run folder.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__()
        self.given = path
        self.path: Path | None = None
        self.rows = 0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the file and delete an earlier part of this rank."""
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
        """Append the rows of a batch."""
        rows: Sequence[dict[str, Any]] = outputs or ()
        AppendedFile(self._part(trainer.global_rank)).append(rows)
        self.rows += len(rows)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join the parts and rename the file into place."""
        assert self.path is not None
        trainer.strategy.barrier("predictions")
        if not trainer.is_global_zero:
            return
        with complete_file(self.path) as whole, whole.open("wb") as file:
            for rank in range(trainer.world_size):
                part = self._part(rank)
                if part.is_file():
                    with part.open("rb") as rows:
                        shutil.copyfileobj(rows, file)
                    part.unlink()
        print(f"predictions: {self.path}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Delete this rank's part."""
        if self.path is not None:
            self._part(trainer.global_rank).unlink(missing_ok=True)

    def _part(self, rank: int) -> Path:
        assert self.path is not None
        return self.path.with_name(f".{self.path.name}.rank{rank}.partial")


class SkippedUpdates(Callback):
    """Write skipped_updates.jsonl: one row for each training step in which non-finite updates were skipped.

    A row has ``update`` (the counter after the step), ``skipped`` (number of skipped updates), and ``rows``: the
    indices of the step's rows over all ranks, counted from 0 among the rows that the data kept.
    """

    def __init__(self) -> None:
        super().__init__()
        self._rows: list[int] | None = None  # of the current step
        self._before = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the run folder now, while all ranks are together; an exception may occur on one rank only."""
        run_folder(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember the rows of the step."""
        self._rows = list(batch.row_ids)
        self._before = aligned(pl_module).skipped_updates

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the step if updates were skipped."""
        self._write(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Record the step that ended the run."""
        self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, module: LightningModule) -> None:
        rows, self._rows = self._rows, None
        skipped = aligned(module).skipped_updates - self._before
        folder = run_folder(trainer)
        if rows is not None and skipped and folder.writes:
            folder.skipped_updates.append([{"update": updates_of(module), "skipped": skipped, "rows": rows}])
