"""Runs with the real W&B (offline) and MLflow."""

import json
from pathlib import Path

import pytest
import tiny_run
from tiny_run import BASIC, UPDATES, rows_of, scalars_of

from rlhf_lightning.commands.train import run

SETTINGS = ["--trainer.max_epochs", "2", "--checkpoint.every_n_updates", "3", "--samples.every_n_updates", "4"]
RATE = "model.learning_rate"


def cut_and_resumed(monkeypatch, *logger, between=lambda: None):
    """Return a run that dies after 14 of 16 updates and is resumed after the 12th with another learning rate."""
    board = ["--trainer.logger", "TensorBoardLogger"]
    monkeypatch.setattr(tiny_run.SlopeModule, "crash_at", 14)
    with pytest.raises(RuntimeError, match="machine"):
        run(["fit", *BASIC, *SETTINGS, "--run_name", "cut", *(logger or board)])
    monkeypatch.setattr(tiny_run.SlopeModule, "crash_at", None)
    between()
    return run(["fit", "--resume", "runs/cut", f"--{RATE}", "0.05"])


@pytest.fixture
def expected(monkeypatch):
    """The losses by update, from TensorBoard."""
    return scalars_of(cut_and_resumed(monkeypatch).folder, "train/loss")


def test_mlflow_shows_a_resumed_run_as_one_run(expected, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # so that it is restored: the logger sets it for the process
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    cli = cut_and_resumed(monkeypatch, "--trainer.logger", "MLFlowLogger")
    client = mlflow.MlflowClient("sqlite:///runs/mlflow.db")
    (one,) = client.search_runs([client.get_experiment_by_name("lightning_logs").experiment_id])
    assert (one.info.run_name, one.info.status) == ("cut/version_1", "FINISHED")
    history = [
        (point.step, pytest.approx(point.value)) for point in client.get_metric_history(one.info.run_id, "train/loss")
    ]
    assert len(history) == 2 * UPDATES + 2 and dict(history) == dict(expected), "updates 13 and 14 occur twice"
    assert one.data.params[RATE] == "0.1" and one.data.tags[RATE] == "0.05"
    tables = [entry.path for entry in client.list_artifacts(one.info.run_id, "samples")]
    assert tables == [f"samples/update_{update:06d}.json" for update in range(0, 17, 4)]
    shown = json.loads(Path(client.download_artifacts(one.info.run_id, tables[-1])).read_text())
    last = [list(row.values()) for row in rows_of(cli.folder / "samples.jsonl") if row["update"] == 16]
    assert len(shown["data"]) == len(last) > 0
    assert {path.name for path in Path().iterdir()} == {"runs"}


def test_wandb_gets_metrics_settings_and_tables_of_a_resumed_run(expected, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    chosen = ["--trainer.logger", "WandbLogger", "--trainer.logger.offline", "true"]
    cli = cut_and_resumed(monkeypatch, *chosen, between=wandb.finish)
    wandb.finish()
    folder = cli.folder / "wandb"
    number = json.loads((cli.folder / "manifest.json").read_text())["tracked_runs"]["WandbLogger"]
    assert [path.name.rpartition("-")[2] for path in folder.glob("offline-run-*")] == [number] * 2
    tables = [json.loads(path.read_text()) for path in folder.rglob("samples_*.table.json")]
    assert tables and all(table["columns"][:2] == ["update", "prompt"] for table in tables)
    assert {row[0] for table in tables for row in table["data"]} == set(range(0, 17, 4))
    assert {path.name for path in Path().iterdir()} == {"runs"}
