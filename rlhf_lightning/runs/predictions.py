"""Rows of ``predict`` as JSONL."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from rlhf_lightning.runs.atomic_files import AppendedFile, move_into_place
from rlhf_lightning.runs.run import run_folder


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
