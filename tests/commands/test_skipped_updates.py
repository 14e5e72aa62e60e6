"""A NaN or infinite loss or gradient skips one update; several consecutive skips end the run."""

import json
from pathlib import Path

import pytest
import torch
from tiny_run import UPDATES, rows_of, scalars_of

from rlhf_lightning.cli import main as rlhf
from rlhf_lightning.commands.train import run

POISONED = [
    "--model", "tiny_run.PoisonedModule", "--data", "tiny_run.NumbersDataModule", "--model.learning_rate", "0.1",
    "--model.lr_schedule", "constant", "--samples.prompts", "0",
]  # fmt: skip


def optimizer_of(folder: Path, update: int) -> dict[str, torch.Tensor]:
    path = folder / "checkpoints" / f"update_{update:06d}.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    return {**checkpoint["optimizer_states"][0]["state"][0], "weight": checkpoint["state_dict"]["line.weight"]}


@pytest.mark.parametrize("masked", ["false", "true"])  # with true, only the loss is NaN and the gradient is valid
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_nonfinite_update_changes_neither_weights_nor_optimizer_state(value, masked):
    settings = [
        "--model.poison",
        "[3]",
        "--model.value",
        value,
        "--model.masked",
        masked,
        "--model.weight_decay",
        "0.1",
    ]
    cli = run(["fit", *POISONED, *settings, "--checkpoint.every_n_updates", "1", "--checkpoint.keep_last", "null"])
    assert (cli.model.updates, cli.model.skipped_updates) == (UPDATES, 1)
    before, after, next_one = (optimizer_of(cli.folder, update) for update in (3, 4, 5))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(after["weight"], next_one["weight"]) and float(next_one["step"]) == 4
    assert [v for _, v in scalars_of(cli.folder, "train/skipped_updates")] == [0.0] * 3 + [1.0] * 5
    (row,) = rows_of(cli.folder / "skipped_updates.jsonl")
    assert row == {"update": 4, "skipped": 1, "rows": [6, 7]}


@pytest.mark.parametrize("masked", ["false", "true"])
def test_consecutive_nonfinite_updates_stop_the_run_and_name_the_last_good_checkpoint(masked, capsys):
    settings = ["--model.poison", "[0, 4, 5, 6]", "--model.masked", masked, "--checkpoint.every_n_updates", "2"]
    assert rlhf(["fit", *POISONED, *settings]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("rlhf: non-finite loss or gradient in 3 consecutive updates (last: 7)")
    assert "the last good checkpoint is runs/poisoned/version_0/checkpoints/update_000006.ckpt" in said
    folder = Path("runs/poisoned/version_0")
    assert [row["rows"] for row in rows_of(folder / "skipped_updates.jsonl")] == [[0, 1], [8, 9], [10, 11], [12, 13]]
    session = json.loads((folder / "manifest.json").read_text())["sessions"][0]
    assert session["status"].startswith("DivergenceError") and session["updates"] == 7
    # The named checkpoint is good: the run continues from it.
    resumed = run(["fit", "--resume", "runs/poisoned", "--model.poison", "[]"])
    assert resumed.model.updates == UPDATES and resumed.model.skipped_updates == 3


def test_max_skipped_updates_sets_the_limit():
    poison = ["--model.poison", "[1, 2, 3, 5, 6, 7]"]
    assert run(["fit", *POISONED, *poison, "--model.max_skipped_updates", "4"]).model.skipped_updates == 6
    assert rlhf(["fit", *POISONED, *poison, "--model.max_skipped_updates", "0"]) == 1


def test_updates_of_one_rollout_are_counted_singly():
    rows = ["--model", "tiny_run.PoisonedRollouts", "--data", "tiny_run.NumbersDataModule", "--model.poison", "[1, 2]"]
    cli = run(["fit", *rows])
    (row,) = rows_of(cli.folder / "skipped_updates.jsonl")
    assert row == {"update": 3, "skipped": 2, "rows": [0, 1]}


def test_without_skipped_updates_no_log_of_them_is_written():
    folder = run(["fit", *POISONED, "--model.poison", "[]"]).folder
    assert not (folder / "skipped_updates.jsonl").exists()
