"""Test logged values, and that TensorBoard reads the same values from both ways of writing."""

import csv
import math
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf_lightning.training.meter import log_scalars

LOGGED = [({"train/loss": 1.5, "train/kl": math.nan}, 1), ({"train/loss": -2.25e-8, "train/kl": math.inf}, 7)]


def read(folder: Path) -> dict[str, list[tuple[int, str]]]:
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, repr(event.value)) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def events_written(folder: Path) -> int:
    return sum(1 for _ in EventAccumulator(str(folder))._generator.Load())


def test_one_tensorboard_event_reads_like_lightnings_separate_events(tmp_path: Path) -> None:
    ours, lightnings = TensorBoardLogger(tmp_path, "ours"), TensorBoardLogger(tmp_path, "lightnings")
    for metrics, step in LOGGED:
        log_scalars([ours], metrics, step)
        lightnings.log_metrics(metrics, step)
    for logger in (ours, lightnings):
        logger.experiment.flush()
    assert read(Path(ours.log_dir)) == read(Path(lightnings.log_dir))
    assert events_written(Path(ours.log_dir)) < events_written(Path(lightnings.log_dir))


def test_prefixed_and_other_loggers_use_lightnings_path(tmp_path: Path) -> None:
    prefixed, table = TensorBoardLogger(tmp_path, "prefixed", prefix="run"), CSVLogger(tmp_path, "table")
    log_scalars([prefixed, table], {"train/loss": 1.5}, 3)
    prefixed.experiment.flush()
    table.save()
    assert read(Path(prefixed.log_dir)) == {"run-train/loss": [(3, "1.5")]}
    with (Path(table.log_dir) / "metrics.csv").open() as file:
        assert list(csv.DictReader(file)) == [{"step": "3", "train/loss": "1.5"}]


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = TensorBoardLogger(tmp_path, "other")
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    log_scalars([logger], {"train/loss": 1.5}, 3)
    assert not Path(logger.log_dir).exists()
