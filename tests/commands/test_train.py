"""Test runs from the command line: run folder, overlaid configs, resuming, and precedence of settings."""

import json
import logging
import os
import random
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny_run
import torch
import yaml
from lightning.pytorch import Trainer
from tiny_run import BASIC, UPDATES, events_of, rows_of, scalars_of

from rlhf_lightning.cli import main as rlhf
from rlhf_lightning.commands.train import main, run
from rlhf_lightning.data import SFTDataModule
from rlhf_lightning.loading import import_path
from rlhf_lightning.modules import SFTModule
from rlhf_lightning.quiet import silence_libraries


@pytest.fixture
def crash(monkeypatch):
    def at(update):
        monkeypatch.setattr(tiny_run.SlopeModule, "crash_at", update)

    return at


def weight(folder: Path) -> float:
    return json.loads((folder / "model" / "weight.json").read_text())


def test_each_run_gets_its_own_folder(trained):
    first, second = trained, run(["fit", *BASIC]).folder
    assert str(second) == "runs/slope/version_1"
    kept = {path.name for path in first.iterdir() if not path.name.startswith("events")}
    assert kept == {"config.yaml", "manifest.json", "checkpoints", "samples.jsonl", "model", "hparams.yaml"}
    assert weight(first) == weight(second)


def test_training_reaches_the_minimum_of_the_loss():
    cli = run(["fit", *BASIC, "--trainer.max_epochs", "20"])
    assert weight(cli.folder) == pytest.approx(2.0, abs=0.05)
    assert cli.model.updates == 20 * UPDATES


def test_later_configs_override_earlier_ones_and_flags_override_both(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "model: {class_path: tiny_run.SlopeModule, init_args: {slope: 1.0, offset: 0.5, learning_rate: 0.1}}\n"
        "data: {class_path: tiny_run.NumbersDataModule}\ntrainer: {max_epochs: 3}\n"
    )
    (tmp_path / "short.yaml").write_text("model: {init_args: {offset: 0.25}}\ntrainer: {max_epochs: 1}\n")
    (tmp_path / "other.yaml").write_text("model: {class_path: tiny_run.OtherModule}\n")
    cli = run(
        ["fit", "--config", "base.yaml", "-c", "short.yaml", "--config", "other.yaml", "--model.learning_rate", "0.2"]
    )
    model = cli.config.fit.model
    assert model.class_path == "tiny_run.OtherModule"
    assert (model.init_args.slope, model.init_args.offset, model.init_args.learning_rate) == (1.0, 0.25, 0.2)
    assert cli.trainer.max_epochs == 1 and type(cli.model).__name__ == "OtherModule"
    assert str(cli.folder) == "runs/base/version_0"


def test_config_yaml_has_every_setting_and_reproduces_the_run():
    first = run(["fit", *BASIC, "--model.slope", "1.5", "--model.max_grad_norm", "null", "--run_name", "mine"])
    config = yaml.safe_load((first.folder / "config.yaml").read_text())
    assert config["model"]["init_args"]["max_grad_norm"] is None and "max_grad_norm" in config["model"]["init_args"]
    assert (config["run_name"], config["seed_everything"], config["trainer"]["use_distributed_sampler"]) == (
        "mine",
        0,
        False,
    )
    again = run(["fit", "--config", str(first.folder / "config.yaml")])
    assert str(again.folder) == "runs/mine/version_1"
    assert weight(again.folder) == weight(first.folder)
    for command in ("validate", "test", "predict"):
        run([command, "--config", str(first.folder / "config.yaml")])


def test_print_config_output_is_a_valid_config(capsys):
    with pytest.raises(SystemExit) as exit_status:
        main(["fit", *BASIC, "--model.offset", "0.75", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert exit_status.value.code == 0
    assert printed["model"]["init_args"]["offset"] == 0.75 and printed["trainer"]["max_epochs"] == 1
    assert not Path("runs").exists()


def test_an_objective_in_the_working_directory_is_imported(tmp_path):
    (tmp_path / "twice_objective.py").write_text(
        "import tiny_run\n\n\n"
        "class TwiceModule(tiny_run.SlopeModule):\n"
        '    """Counts each loss twice.\n\n    Args:\n        times: how often.\n    """\n\n'
        "    def __init__(self, times: float = 2.0, **kwargs):\n"
        "        super().__init__(**kwargs)\n        self.times = times\n\n"
        "    def loss_sum(self, batch, meter):\n        return self.times * super().loss_sum(batch, meter)\n"
    )
    arguments = ["--model", "twice_objective.TwiceModule", "--model.times", "3", "--data", "tiny_run.NumbersDataModule"]
    assert rlhf(["fit", *arguments]) == 0
    config = yaml.safe_load(Path("runs/twice/version_0/config.yaml").read_text())
    assert config["model"]["init_args"]["times"] == 3.0


def test_short_class_names_work(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--model", "SFTModule", "--model.init_from", "x", "--data", "SFTDataModule", "--data.source", "y",
              "--print_config"])  # fmt: skip
    printed = yaml.safe_load(capsys.readouterr().out)
    assert import_path(printed["model"]["class_path"]) is SFTModule
    assert import_path(printed["data"]["class_path"]) is SFTDataModule


@pytest.mark.parametrize("every", [3, 4, 5])
def test_a_killed_run_resumes_bit_identically(every, crash):
    """Killed in the second epoch between checkpoints; samples and curves continue without gap or overlap."""
    settings = [
        "--trainer.max_epochs",
        "3",
        "--checkpoint.every_n_updates",
        str(every),
        "--samples.every_n_updates",
        "2",
    ]
    whole = run(["fit", *BASIC, *settings, "--run_name", "whole"])
    crash(UPDATES + 6)
    with pytest.raises(RuntimeError, match="machine"):
        main(["fit", *BASIC, *settings, "--run_name", "cut"])
    crash(None)
    resumed = run(["fit", "--resume", "runs/cut"])
    assert str(resumed.folder) == "runs/cut/version_0" and resumed.model.updates == 3 * UPDATES
    assert weight(resumed.folder) == weight(whole.folder)
    for tag in ("train/loss", "val/loss", "progress/tokens", "train/learning_rate"):
        assert scalars_of(resumed.folder, tag) == scalars_of(whole.folder, tag)
    assert rows_of(resumed.folder / "samples.jsonl") == rows_of(whole.folder / "samples.jsonl")
    mine, theirs = (
        torch.load(cli.folder / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"][0]["state"][0]
        for cli in (resumed, whole)
    )
    assert torch.equal(mine["exp_avg"], theirs["exp_avg"]) and torch.equal(mine["exp_avg_sq"], theirs["exp_avg_sq"])


def test_a_finished_run_resumes_for_more_epochs():
    settings = ["--model.lr_schedule", "constant"]
    whole = run(["fit", *BASIC, *settings, "--trainer.max_epochs", "2", "--run_name", "whole"])
    run(["fit", *BASIC, *settings, "--run_name", "short"])
    longer = run(["fit", "--resume", "runs/short/version_0", "--trainer.max_epochs", "2"])
    assert weight(longer.folder) == weight(whole.folder)
    assert [path.name for path in Path("runs/short").iterdir()] == ["version_0"]
    manifest = json.loads((longer.folder / "manifest.json").read_text())
    assert [session["updates"] for session in manifest["sessions"]] == [UPDATES, 2 * UPDATES]
    kept = yaml.safe_load((longer.folder / "config.1.yaml").read_text())
    now = yaml.safe_load((longer.folder / "config.yaml").read_text())
    assert (kept["trainer"]["max_epochs"], now["trainer"]["max_epochs"]) == (1, 2)


def test_resuming_without_a_checkpoint_is_refused(capsys):
    assert rlhf(["fit", "--resume", "runs/nothing"]) == 1
    assert "no run found at runs/nothing" in capsys.readouterr().err
    run(["fit", *BASIC, "--trainer.enable_checkpointing", "false", "--run_name", "bare"])
    before = (Path("runs/bare/version_0/samples.jsonl")).read_text()
    assert rlhf(["fit", "--resume", "runs/bare"]) == 1
    assert "runs/bare/version_0 has no checkpoint to resume from" in capsys.readouterr().err
    assert Path("runs/bare/version_0/samples.jsonl").read_text() == before
    assert [path.name for path in Path("runs/bare").iterdir()] == ["version_0"]


def test_the_config_of_a_resumed_run_starts_a_new_run(trained):
    before = (trained / "config.yaml").read_text()
    run(["fit", "--resume", "runs/slope"])
    assert (trained / "config.yaml").read_text() == before and not (trained / "config.1.yaml").exists()
    assert yaml.safe_load(before)["ckpt_path"] is None
    anew = run(["fit", "--config", str(trained / "config.yaml")])
    assert str(anew.folder) == "runs/slope/version_1" and weight(anew.folder) == weight(trained)


def test_resume_takes_the_latest_training_run_not_a_later_evaluation(trained):
    config = "runs/slope/version_0/config.yaml"
    evaluated = run(["test", "--config", config, "--ckpt_path", "runs/slope/version_0/checkpoints/last.ckpt"])
    assert str(evaluated.folder) == "runs/slope/version_0/test/version_0"
    assert str(run(["fit", "--resume", "slope", "--trainer.max_epochs", "2"]).folder) == "runs/slope/version_0"


def test_ckpt_path_resumes_in_its_run_folder_unless_run_name_is_given(trained):
    checkpoint = "runs/slope/version_0/checkpoints/last.ckpt"
    forked = run(["fit", *BASIC, "--ckpt_path", checkpoint, "--run_name", "fork", "--trainer.max_epochs", "2"])
    assert str(forked.folder) == "runs/fork/version_0" and forked.model.updates == 2 * UPDATES
    assert yaml.safe_load((forked.folder / "config.yaml").read_text())["ckpt_path"] == checkpoint
    assert str(run(["fit", "--config", str(forked.folder / "config.yaml")]).folder) == "runs/fork/version_1"
    assert (
        str(run(["fit", *BASIC, "--ckpt_path", checkpoint, "--trainer.max_epochs", "2"]).folder)
        == "runs/slope/version_0"
    )


def test_flags_override_the_checkpoint_and_the_checkpoint_overrides_defaults(capsys, tmp_path):
    run(["fit", *BASIC, "--model.slope", "0.5", "--model.offset", "0.25"])
    checkpoint = "runs/slope/version_0/checkpoints/last.ckpt"
    config = tmp_path / "given.yaml"
    config.write_text(
        "model: {class_path: tiny_run.SlopeModule, init_args: {offset: 0.125}}\n"
        "data: {class_path: tiny_run.NumbersDataModule}\n"
    )
    capsys.readouterr()
    cli = run(["test", "--config", "given.yaml", "--ckpt_path", checkpoint, "--model.learning_rate", "0.7"])
    given = cli.config.test.model.init_args
    assert (given.learning_rate, given.offset, given.slope) == (0.7, 0.125, 0.5)
    assert (cli.model.learning_rate, cli.model.offset, cli.model.slope) == (0.7, 0.125, 0.5)
    told = capsys.readouterr().out
    assert "model.learning_rate is 0.7 as given; the checkpoint was trained with 0.1" in told
    assert "model.offset is 0.125 as given; the checkpoint was trained with 0.25" in told


def test_a_checkpoint_of_another_class_is_refused(trained, capsys):
    checkpoint = "runs/slope/version_0/checkpoints/last.ckpt"
    other = ["--model", "tiny_run.OtherModule", "--data", "tiny_run.NumbersDataModule"]
    with pytest.raises(SystemExit) as exit_status:
        main(["test", *other, "--ckpt_path", checkpoint])
    assert exit_status.value.code == 2
    assert "was written by tiny_run.SlopeModule, but the model is tiny_run.OtherModule" in capsys.readouterr().err


def test_a_checkpoint_that_would_run_code_is_refused(capsys, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    torch.save({"hyper_parameters": {"slope": Bomb()}}, "bomb.ckpt")
    assert rlhf(["test", *BASIC, "--ckpt_path", "bomb.ckpt"]) == 1
    assert "cannot be read as a checkpoint of plain tensors and settings" in capsys.readouterr().err
    assert not (tmp_path / "exploded").exists()


def test_validate_test_and_predict_agree_on_the_same_weights(trained):
    config, checkpoint = str(trained / "config.yaml"), str(trained / "checkpoints" / "last.ckpt")
    last = scalars_of(trained, "val/loss")[-1][1]
    given = ["--config", config, "--ckpt_path", checkpoint]
    validated, tested = run(["validate", *given]), run(["test", *given])
    assert float(validated.trainer.callback_metrics["val/loss"]) == pytest.approx(last)
    assert float(tested.trainer.callback_metrics["test/loss"]) == pytest.approx(last)
    predicted = run(["predict", *given])
    rows, learned = rows_of(predicted.folder / "predictions.jsonl"), weight(trained)
    assert len(rows) == 2 * UPDATES
    assert all(row["y"] == pytest.approx(learned * row["x"]) for row in rows)
    run(["predict", *given, "--predictions.path", "elsewhere/rows.jsonl"])
    assert rows_of(Path("elsewhere/rows.jsonl")) == rows
    losses = [(row["y"] - 2 * row["x"]) ** 2 / 2 for row in rows]
    assert sum(losses) / len(losses) == pytest.approx(last)


def test_a_run_that_fails_before_training_leaves_no_folder(capsys):
    assert rlhf(["fit", *BASIC, "--data.count", "0"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "rlhf: numbers has no rows: nothing to train on"
    assert not Path("runs/slope").exists()


def test_run_names_stay_inside_the_runs_folder(capsys):
    for name in ("../outside", "/tmp/outside", "a/../../b", "a b", ".hidden", ""):
        if name:
            assert rlhf(["fit", *BASIC, "--run_name", name]) == 1
            assert f"run_name is {name!r}" in capsys.readouterr().err
    assert str(run(["fit", *BASIC, "--run_name", "study/slope-0.1", "--runs_folder", "kept"]).folder) == (
        "kept/study/slope-0.1/version_0"
    )


def test_fast_dev_run_writes_no_file():
    run(["fit", *BASIC, "--trainer.fast_dev_run", "true"])
    assert not Path("runs").exists() and list(Path().iterdir()) == []


def test_without_a_logger_the_run_folder_is_still_written():
    folder = run(["fit", *BASIC, "--trainer.logger", "false"]).folder
    assert (folder / "config.yaml").is_file() and (folder / "checkpoints" / "last.ckpt").is_file()
    assert rows_of(folder / "samples.jsonl")


def next_random_numbers():
    return random.random(), float(np.random.rand()), float(torch.rand(1))


def test_a_run_restores_the_callers_random_state(monkeypatch, crash):
    monkeypatch.delenv("PL_GLOBAL_SEED")

    def seed():
        random.seed(5), np.random.seed(5), torch.manual_seed(5)

    seed()
    expected = next_random_numbers()
    seed()
    run(["fit", *BASIC, "--seed_everything", "7"])
    assert next_random_numbers() == expected and "PL_GLOBAL_SEED" not in os.environ
    seed()
    run(["fit", "--resume", "runs/slope", "--trainer.max_epochs", "2"])
    assert next_random_numbers() == expected
    crash(0)
    seed()
    with pytest.raises(RuntimeError, match="machine"):
        run(["fit", *BASIC])
    assert next_random_numbers() == expected


def test_a_resuming_plain_trainer_restores_the_callers_random_state(trained):
    trainer = Trainer(
        max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu",
    )  # fmt: skip
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = next_random_numbers()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    module = tiny_run.SlopeModule(learning_rate=0.1)
    data = tiny_run.NumbersDataModule()
    trainer.fit(module, datamodule=data, ckpt_path="runs/slope/version_0/checkpoints/last.ckpt", weights_only=True)
    assert module.updates == 2 * UPDATES
    assert next_random_numbers()[:2] == expected[:2]  # torch's random numbers initialised the module's weight


def test_a_run_prints_only_its_own_lines_and_has_the_required_trainer_settings(capsys, recwarn):
    trainer = run(["fit", *BASIC]).trainer
    told = capsys.readouterr()
    assert re.sub(r"\d[\d,]*(\.\d+)?", "#", told.out).splitlines() == [
        "run: runs/slope/version_#",
        "SlopeModule: # parameters, # trainable",
        "training #/# (# %)  update #  loss #  tokens/s #  elapsed #:#  left #:#",
        "validation at update #: val/loss #  val/slope #",
        "model: runs/slope/version_#/model",
    ]
    assert "Tip" not in told.err and "GPU available" not in told.err
    assert events_of(Path("runs/slope/version_0")).Tags()["scalars"]
    assert trainer._accelerator_connector.use_distributed_sampler is False
    assert trainer.max_epochs == 1 and trainer.log_every_n_steps == 1
    assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()


def test_only_known_library_noise_is_silenced(monkeypatch):
    silence_libraries()
    silence_libraries()
    lightning, fabric = (logging.getLogger(f"lightning.{room}.utilities.{name}") for room, name in
                         (("pytorch", "rank_zero"), ("fabric", "seed")))  # fmt: skip

    def passes(logger, text):
        return bool(logger.filter(logging.LogRecord("x", logging.INFO, "f", 1, text, None, None)))

    assert not passes(lightning, "💡 Tip: For seamless cloud logging")
    assert not passes(lightning, "GPU available: False, used: False") and not passes(fabric, "[rank: 1] Seed set to 0")
    assert passes(lightning, "rows.jsonl: 12 rows read, 10 kept, dropped: 2 empty_prompt")
    assert len([f for f in lightning.filters if type(f).__name__ == "_Silence"]) == 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        silence_libraries()
        warnings.warn("The 'train_dataloader' does not have many workers which may be a bottleneck.", stacklevel=1)
        warnings.warn("Total length of `list` across ranks is zero. Please make sure", stacklevel=1)
        warnings.warn("Your loss is NaN", stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["Your loss is NaN"]
