"""Truncate the log files of a resumed run to its checkpoint, so that curves have no gap or overlap."""

from __future__ import annotations

import csv
import time
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from rlhf_lightning.atomic_files import AppendedFile, sync
from rlhf_lightning.compat import event_file
from rlhf_lightning.runs.run import SAMPLES_FILE, SKIPPED_FILE, RunFolder, run_folder

EVENTS = "events.out.tfevents.*"
METRICS_FILE = "metrics.csv"


class RunRecords(Callback):
    """Store the lengths of the log files in each checkpoint, and truncate them on resume.

    The files are TensorBoard's event files, metrics.csv of CSV loggers, samples.jsonl and skipped_updates.jsonl.
    TensorBoard's ``purge_step`` supports one x-axis, but there are three (updates, episodes, tokens).
    """

    def __init__(self) -> None:
        super().__init__()
        self.lengths: dict[str, int] | None = None  # from the checkpoint

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the lengths until training starts."""
        self.lengths = checkpoint.get("records")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Truncate the files, if the checkpoint belongs to this run."""
        folder, lengths, self.lengths = run_folder(trainer), self.lengths, None
        if lengths is None or not folder.writes:
            return
        files = _appended_files(trainer, folder) | _csv_files(trainer, folder)
        if not any(name in files and files[name].is_file() for name in lengths):
            return
        current = {Path(event_file(logger)).name for logger in _tensorboard_loggers(trainer)}
        for name, path in files.items():
            if path.name == METRICS_FILE:
                _cut_back_rows(path, lengths.get(name, 0))
            elif path.name not in current:
                AppendedFile(path).cut_back(lengths.get(name, 0))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Flush the loggers and store the length of each file."""
        folder = run_folder(trainer)
        if not folder.writes:
            return
        for logger in _tensorboard_loggers(trainer):
            logger.experiment.flush()
        files = {name: path for name, path in _appended_files(trainer, folder).items() if path.is_file()}
        for path in files.values():
            sync(path)
        lengths = {name: AppendedFile(path).length for name, path in files.items()}
        for csv_logger in _csv_loggers(trainer):
            csv_logger.save()
        lengths |= {name: len(_read_rows(path)[1]) for name, path in _csv_files(trainer, folder).items()}
        checkpoint["records"] = lengths


def keep_earlier_rows(trainer: Trainer) -> None:
    """Open the CSV loggers before the trainer runs, and keep the rows of an earlier session.

    Lightning's CSVLogger deletes an existing metrics.csv, and warns about other files in its folder.
    """
    for logger in _csv_loggers(trainer):
        path = Path(logger.log_dir) / METRICS_FILE
        aside = path.with_name(f".{METRICS_FILE}.earlier")
        if path.is_file():
            path.replace(aside)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty")
            writer: Any = logger.experiment
        if aside.is_file():  # moved by this session, or by one that was killed between the two moves
            aside.replace(path)
            writer.metrics_keys = _read_rows(path)[0]


def wait_for_a_later_name(folder: Path) -> None:
    """Wait up to a second until a new event file sorts after those in the folder.

    TensorBoard reads event files in the order of their names, which start with the creation time in seconds.
    """
    made = [int(part) for file in folder.glob(EVENTS) if (part := file.name.split(".")[3]).isdecimal()]
    while made and int(time.time()) <= max(made) <= int(time.time()) + 1:
        time.sleep(0.02)


def _appended_files(trainer: Trainer, folder: RunFolder) -> dict[str, Path]:
    """Return the append-only files by name (event file names are unique)."""
    events = [file for logger in _tensorboard_loggers(trainer) for file in Path(logger.log_dir).glob(EVENTS)]
    return {path.name: path for path in (folder.path / SAMPLES_FILE, folder.path / SKIPPED_FILE, *events)}


def _csv_files(trainer: Trainer, folder: RunFolder) -> dict[str, Path]:
    paths = [Path(logger.log_dir) / METRICS_FILE for logger in _csv_loggers(trainer)]
    return {f"{METRICS_FILE} {number}": path for number, path in enumerate(paths)}


def _tensorboard_loggers(trainer: Trainer) -> list[TensorBoardLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def _csv_loggers(trainer: Trainer) -> list[CSVLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, CSVLogger)]


def _read_rows(path: Path) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of a CSV file; both are empty if the file does not exist."""
    if not path.is_file():
        return [], []
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    return header, rows


def _cut_back_rows(path: Path, count: int) -> None:
    header, rows = _read_rows(path)
    if len(rows) > count:
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows[:count]])
