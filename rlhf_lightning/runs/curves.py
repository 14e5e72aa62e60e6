"""TensorBoard curves of a run that is resumed join without gap or overlap."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from rlhf_lightning.runs.run import run_folder, sync, writes_files

EVENTS = "events.out.tfevents.*"


class RunCurves(Callback):
    """Keep in each checkpoint how long the event files were, and cut them back to that when it is resumed from.

    TensorBoard's own ``purge_step`` knows one x-axis; here are three (updates, episodes, tokens), and it would leave
    what was logged at the checkpoint's own step after it was written.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder: Path | None = None
        self.lengths: dict[str, int] | None = None  # of a checkpoint that is resumed from

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder."""
        folder = run_folder(trainer)
        self.folder = folder if writes_files(trainer) and _loggers(trainer) else None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cut off what the checkpoint does not know of."""
        if self.folder is None or self.lengths is None:
            return
        lengths, self.lengths = self.lengths, None
        if not any((self.folder / name).is_file() for name in lengths):
            return  # the checkpoint is another run's
        ours = {Path(_writer(logger)._file_name).name for logger in _loggers(trainer)}
        for file in self.folder.glob(EVENTS):
            if file.name in lengths:
                if file.stat().st_size > lengths[file.name]:
                    os.truncate(file, lengths[file.name])
            elif file.name not in ours:
                file.unlink()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write out all that was logged, and keep the length of each event file."""
        if self.folder is None:
            return
        for logger in _loggers(trainer):
            logger.experiment.flush()
        files = sorted(self.folder.glob(EVENTS))
        for file in files:
            sync(file)
        checkpoint["event_files"] = {file.name: file.stat().st_size for file in files}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember the lengths until training starts."""
        self.lengths = checkpoint.get("event_files")


def wait_for_a_later_name(folder: Path) -> None:
    """Wait, a second at most, until a new event file is read after those in the folder: TensorBoard reads them in the
    order of their names, which begin with the second they were made in.
    """
    made = [int(part) for file in folder.glob(EVENTS) if (part := file.name.split(".")[3]).isdecimal()]
    while made and int(time.time()) <= max(made) <= int(time.time()) + 1:
        time.sleep(0.02)


def _loggers(trainer: Trainer) -> list[TensorBoardLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def _writer(logger: TensorBoardLogger) -> Any:
    return logger.experiment._get_file_writer().event_writer
