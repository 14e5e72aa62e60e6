"""Every logger gives one run folder, and tables reach each logger that supports them."""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import yaml
from conftest import refused
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger
from tiny_loggers import MemoryLogger, TrackedLogger
from tiny_run import BASIC, UPDATES, NumbersDataModule, SlopeModule, events_of, rows_of, scalars_of

from rlhf_lightning.commands.train import run
from rlhf_lightning.runs import ModelExport, RunCheckpoint, RunFolder, RunManifest, RunRecords, SampleTable
from rlhf_lightning.runs.loggers import TrackioLogger, log_table, logger_arguments
from rlhf_lightning.runs.run import run_folder

OWN_FILES = {"config.yaml", "manifest.json", "checkpoints", "samples.jsonl", "model"}


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith("events")}


def csv_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def column(path: Path, name: str) -> list[tuple[int, float]]:
    return [(int(row["step"]), float(row[name])) for row in csv_rows(path) if row.get(name)]


@pytest.mark.parametrize("form", ["flag", "yaml"])
def test_a_csv_logger_writes_into_the_run_folder_by_default(form):
    Path("logger.yaml").write_text("trainer: {logger: {class_path: lightning.pytorch.loggers.CSVLogger}}\n")
    chosen = ["--trainer.logger", "CSVLogger"] if form == "flag" else ["--config", "logger.yaml"]
    cli = run(["fit", *chosen, *BASIC, "--run_name", "mine", "--runs_folder", "kept"])
    assert str(cli.folder) == "kept/mine/version_0" and Path(cli.trainer.log_dir) == cli.folder
    assert names_in(cli.folder) == OWN_FILES | {"metrics.csv", "hparams.yaml"}
    assert {path.name for path in Path().iterdir()} == {"kept", "logger.yaml"}


def test_a_logger_config_starts_a_new_run_in_its_own_folder():
    first = run(["fit", *BASIC, "--trainer.logger", "CSVLogger", "--trainer.logger.flush_logs_every_n_steps", "1"])
    config = yaml.safe_load((first.folder / "config.yaml").read_text())
    assert config["trainer"]["logger"]["init_args"]["save_dir"] is None
    before = (first.folder / "metrics.csv").read_text()
    again = run(["fit", "--config", str(first.folder / "config.yaml")])
    assert again.folder.name == "version_1" and (again.folder / "metrics.csv").is_file()
    assert (first.folder / "metrics.csv").read_text() == before


def test_two_loggers_write_into_one_folder():
    Path("two.yaml").write_text(
        "trainer:\n  logger:\n  - class_path: TensorBoardLogger\n  - class_path: CSVLogger\n"
        "  - class_path: tiny_loggers.MemoryLogger\n    init_args: {colour: blue}\n"
    )
    cli = run(["fit", "--config", "two.yaml", *BASIC])
    assert str(cli.folder) == "runs/two/version_0"
    assert names_in(cli.folder) == OWN_FILES | {"metrics.csv", "hparams.yaml"}
    ((step, loss),) = column(cli.folder / "metrics.csv", "val/loss")
    assert scalars_of(cli.folder, "val/loss")[-1] == (step, pytest.approx(loss))
    memory = cli.trainer.loggers[2]
    assert (memory.directory, memory.colour) == ("runs/two/version_0", "blue")
    assert memory.hyperparams["model.learning_rate"] == 0.1


def test_a_logger_with_its_own_save_dir_leaves_the_run_folder_unchanged():
    chosen = ["--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", "board"]
    first, second = (run(["fit", *BASIC, *chosen]) for _ in range(2))
    assert [str(cli.folder) for cli in (first, second)] == ["runs/slope/version_0", "runs/slope/version_1"]
    assert names_in(first.folder) == names_in(second.folder) == OWN_FILES
    logs = [Path(cli.trainer.logger.log_dir) for cli in (first, second)]
    assert [str(path) for path in logs] == [f"board/lightning_logs/version_{n}" for n in range(2)]
    assert len(scalars_of(logs[0], "train/loss")) == UPDATES


def test_a_user_logger_does_not_change_the_run_folder():
    first, second = (run(["fit", *BASIC, "--trainer.logger", "tiny_loggers.MemoryLogger"]) for _ in range(2))
    assert names_in(first.folder) == names_in(second.folder) == OWN_FILES
    assert first.folder != second.folder and [path.name for path in Path().iterdir()] == ["runs"]
    assert len(rows_of(first.folder / "samples.jsonl")) == len(rows_of(second.folder / "samples.jsonl")) == 8


@pytest.mark.parametrize("chosen", [["--trainer.logger", "CSVLogger"], ["--trainer.logger", "false"],
                                    ["--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", "board",
                                     "--trainer.logger.version", "0"]])  # fmt: skip
def test_logs_of_a_resumed_run_join_without_gap_or_overlap(chosen, monkeypatch):
    settings = ["--trainer.max_epochs", "2", "--checkpoint.every_n_updates", "3", "--samples.every_n_updates", "2"]
    whole = run(["fit", *BASIC, *settings, *chosen, "--run_name", "whole"])
    theirs = column(whole.folder / "metrics.csv", "train/loss") if "CSVLogger" in chosen else None
    if "board" in chosen:
        theirs = scalars_of(Path("board/lightning_logs/version_0"), "train/loss")
        Path("board").rename("board_of_whole")
    monkeypatch.setattr(tiny_run.SlopeModule, "crash_at", UPDATES + 6)
    with pytest.raises(RuntimeError, match="machine"):
        run(["fit", *BASIC, *settings, *chosen, "--run_name", "cut"])
    monkeypatch.setattr(tiny_run.SlopeModule, "crash_at", None)
    resumed = run(["fit", "--resume", "runs/cut"])
    assert rows_of(resumed.folder / "samples.jsonl") == rows_of(whole.folder / "samples.jsonl")
    if "CSVLogger" in chosen:
        mine = resumed.folder / "metrics.csv"
        assert column(mine, "train/loss") == theirs and len(theirs) == 2 * UPDATES
        assert column(mine, "val/loss") == column(whole.folder / "metrics.csv", "val/loss")
    if "board" in chosen:
        assert scalars_of(Path("board/lightning_logs/version_0"), "train/loss") == theirs


@pytest.mark.parametrize("manifest", [None, '{"sessions": [], "tracked_runs": ["?"]}'])
def test_a_resumed_run_continues_the_run_of_its_tracker(manifest, monkeypatch):
    chosen = ["--trainer.logger", "tiny_loggers.TrackedLogger", "--run_name", "cut"]
    monkeypatch.setattr(TrackedLogger, "started", 0)
    monkeypatch.setattr(tiny_run.SlopeModule, "crash_at", UPDATES - 2)
    with pytest.raises(RuntimeError, match="machine"):
        run(["fit", *BASIC, "--checkpoint.every_n_updates", "3", *chosen])
    monkeypatch.setattr(tiny_run.SlopeModule, "crash_at", None)
    if manifest is not None:
        Path("runs/cut/version_0/manifest.json").write_text(manifest)
    resumed, other = run(["fit", "--resume", "runs/cut"]), run(["fit", *BASIC, *chosen])
    first = "run-1" if manifest is None else "run-2"
    assert resumed.trainer.logger.run_id == first and other.trainer.logger.run_id != first
    stored = json.loads((resumed.folder / "manifest.json").read_text())
    assert stored["tracked_runs"] == {"TrackedLogger": first}


def test_loggers_step_by_updates_and_log_other_axes_as_columns():
    Path("two.yaml").write_text(
        "trainer: {logger: [{class_path: TensorBoardLogger}, {class_path: CSVLogger},"
        " {class_path: tiny_loggers.MemoryLogger}]}\n"
    )
    cli = run(["fit", "--config", "two.yaml", *BASIC, "--model", "tiny_run.RolloutModule"])
    steps = [int(row["step"]) for row in csv_rows(cli.folder / "metrics.csv")]
    expected = [3 * n for n in range(1, UPDATES + 1)]
    assert steps == sorted(steps) and sorted(set(steps)) == expected
    assert column(cli.folder / "metrics.csv", "progress/tokens") == [(3 * n, 2.0 * n) for n in range(1, UPDATES + 1)]
    memory = cli.trainer.loggers[2]
    assert memory.steps == sorted(memory.steps)
    assert not [name for name in memory.names if name.startswith(("vs_", "loss/"))]
    assert [step for step, _ in scalars_of(cli.folder, "vs_tokens/train/loss")] == [
        2 * n for n in range(1, UPDATES + 1)
    ]


# -- tables -----------------------------------------------------------------------------------------------------------


def test_samples_are_logged_as_table_or_text():
    Path("two.yaml").write_text(
        "trainer: {logger: [{class_path: tiny_loggers.TableLogger}, {class_path: tiny_loggers.TextLogger},"
        " {class_path: tiny_loggers.MemoryLogger}, {class_path: TensorBoardLogger}]}\n"
    )
    cli = run(["fit", "--config", "two.yaml", *BASIC, "--samples.prompts", "1"])
    table, text, _, _ = cli.trainer.loggers
    assert [entry[3] for entry in table.tables] == [entry[2] for entry in text.texts] == [0, UPDATES]
    name, columns, data, _ = table.tables[0]
    assert name == "samples" and columns == ["update", "prompt", "completion", "score", "finished", "length"]
    assert data == [[0, "prompt <0>\nsecond | line", "prompt <0>\nsecond | line | 0.000", None, True, 3]]
    assert text.texts[0][1].startswith("| prompt | completion |")
    assert len(events_of(cli.folder).Tensors("samples/text_summary")) == 2


class Client:
    """The table methods of MLflow's client."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def log_table(self, run_id: str, data: dict[str, list[Any]], artifact_file: str) -> None:
        self.calls.append((run_id, data, artifact_file))


def test_mlflow_gets_one_table_per_step():
    logger = MemoryLogger("x")
    logger.experiment, logger.run_id = Client(), "run"
    assert log_table(logger, "samples", [{"update": 3, "score": None}], "| text |", 3)
    assert logger.experiment.calls == [("run", {"update": [3], "score": [None]}, "samples/update_000003.json")]


def test_a_logger_without_tables_or_text_gets_no_samples():
    assert not log_table(MemoryLogger("x"), "samples", [{"update": 3}], "| text |", 3)


# -- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        (CSVLogger, {"save_dir": None, "name": None, "version": None, "prefix": "p"},
         {"save_dir": "r", "name": "dpo", "version": "version_2", "prefix": "p"}),
        (TensorBoardLogger, {"save_dir": "x", "name": None, "version": None}, {"save_dir": "x"}),
        (TensorBoardLogger, {"save_dir": None, "name": "n", "version": None},
         {"save_dir": "r/dpo/version_2", "name": "n"}),
        (MemoryLogger, {"save_dir": None, "name": None, "version": None},
         {"save_dir": "r/dpo/version_2", "name": "dpo/version_2"}),
        (MLFlowLogger, {"save_dir": None, "run_name": None, "tracking_uri": None},
         {"run_name": "dpo/version_2", "tracking_uri": "sqlite:///r/mlflow.db"}),
        (MLFlowLogger, {"save_dir": None, "run_name": "mine", "tracking_uri": "http://x", "artifact_location": None},
         {"run_name": "mine", "tracking_uri": "http://x"}),
        (MLFlowLogger, {"save_dir": "x", "run_name": None, "tracking_uri": None},
         {"save_dir": "x", "run_name": "dpo/version_2"}),
    ],
)  # fmt: skip
def test_missing_logger_arguments_come_from_the_run_folder(kind, given, expected):
    assert logger_arguments(kind, given, Path("r/dpo/version_2"), Path("r")) == expected


# -- without the command line -----------------------------------------------------------------------------------------


def fitted(**settings: Any) -> Trainer:
    callbacks = [RunManifest([]), RunRecords(), SampleTable(), ModelExport(), RunCheckpoint()]
    trainer = Trainer(
        max_epochs=1, callbacks=callbacks, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        num_sanity_val_steps=0, log_every_n_steps=1, **settings,
    )  # fmt: skip
    trainer.fit(SlopeModule(learning_rate=0.1), datamodule=NumbersDataModule())
    return trainer


@pytest.mark.parametrize("logger", [False, MemoryLogger("elsewhere")])
def test_each_run_of_a_plain_trainer_gets_its_own_folder(logger):
    folders = [run_folder(fitted(logger=logger)) for _ in range(2)]
    assert [folder.path for folder in folders] == [Path.cwd() / f"runs/slope/version_{n}" for n in range(2)]
    assert all(names_in(folder.path) == OWN_FILES - {"config.yaml"} for folder in folders)
    assert [path.name for path in Path().iterdir()] == ["runs"]


def test_a_plain_trainer_uses_its_tensorboard_folder_as_run_folder():
    trainer = fitted(logger=TensorBoardLogger("board"))
    assert run_folder(trainer).path == Path("board/lightning_logs/version_0")
    assert OWN_FILES - {"config.yaml"} <= names_in(run_folder(trainer).path)


def test_an_attached_run_folder_overrides_the_logger():
    trainer = Trainer(
        max_epochs=1, callbacks=[ModelExport()], logger=CSVLogger("logs"), enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", enable_checkpointing=False,
    )  # fmt: skip
    folder = RunFolder("mine").attach(trainer)
    trainer.fit(SlopeModule(learning_rate=0.1), datamodule=NumbersDataModule())
    assert run_folder(trainer) is folder and folder.model.is_dir() and not Path("runs").exists()


def test_fast_dev_run_of_a_plain_trainer_writes_no_file():
    fitted(logger=False, fast_dev_run=True)
    assert list(Path().iterdir()) == []


def test_sample_table_settings_are_checked():
    with refused("setting-out-of-range", "samples.prompts", "-1"):
        SampleTable(prompts=-1)


def test_trackio_gets_metrics_settings_and_tables_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))  # read when trackio is imported
    sqlite = pytest.importorskip("trackio.sqlite_storage")
    for first in (0, 2):  # the second begins where a resumed run would
        logger = TrackioLogger("rlhf", "dpo/version_0")
        logger.log_hyperparams({"model.beta": 0.1})
        for step in (first, first + 1):
            logger.log_metrics({"val/score": 0.5 * step}, step)
        assert log_table(logger, "samples", [{"prompt": "p", "completion": "c"}], "| p |", first)
        logger.finalize("success")
    rows = [row for row in sqlite.SQLiteStorage.get_logs("rlhf", "dpo/version_0") if "val/score" in row]
    assert [(row["step"], row["val/score"]) for row in rows] == [(0, 0.0), (1, 0.5), (2, 1.0), (3, 1.5)]
    assert sqlite.SQLiteStorage.get_run_config("rlhf", "dpo/version_0")["model.beta"] == 0.1


def test_trackio_without_its_package_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with refused("not-installed", "rlhf-lightning[trackio]"):
        TrackioLogger()
