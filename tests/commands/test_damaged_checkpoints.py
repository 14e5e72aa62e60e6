"""Resuming or exporting a damaged checkpoint or manifest ends with a one-sentence error."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused
from safetensors.torch import load, save_file
from tiny_run import BASIC, UPDATES

from rlhf_lightning.cli import main as rlhf
from rlhf_lightning.commands.train import run
from rlhf_lightning.runs.checkpoint_files import damage, last_checkpoint
from rlhf_lightning.runs.checkpoint_metadata import read_checkpoint

RUN = Path("runs/slope/version_0")
LAST = RUN / "checkpoints" / "last.ckpt"
RESUME = ["fit", "--resume", str(RUN), "--trainer.max_epochs", "2"]


def tamper(change: Callable[[dict[str, Any]], Any]) -> None:
    state = change(torch.load(LAST, weights_only=True))
    for file in LAST.parent.glob("*.ckpt"):
        file.unlink()
    torch.save(state, LAST)


def without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda state: {name: value for name, value in state.items() if name != key}


def with_value(key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda state: {**state, key: value}


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    **{f"without {key}": without(key) for key in (
        "state_dict", "optimizer_states", "pytorch-lightning_version", "loops", "callbacks", "progress", "random",
        "hyper_parameters", "started_from", "trained",
    )},
    "state_dict a list": with_value("state_dict", [1]),
    "state_dict of numbers": with_value("state_dict", {"line.weight": 1.0}),
    "state_dict of another shape": with_value("state_dict", {"line.weight": torch.ones(3, 3)}),
    "state_dict empty": with_value("state_dict", {}),
    "optimizer a text": with_value("optimizer_states", ["x"]),
    "optimizer without groups": with_value("optimizer_states", [{"state": {}, "param_groups": []}]),
    "moments of another shape": lambda state: {**state, "optimizer_states": [{
        **state["optimizer_states"][0],
        "state": {key: {name: torch.ones(1) for name in one} for key, one in
                  state["optimizer_states"][0]["state"].items()},
    }]},
    "a callback's state is a text": lambda state: {**state, "callbacks": dict.fromkeys(state["callbacks"], "x")},
    "loops a text": with_value("loops", "x"),
    "loops without parts": with_value("loops", {"fit_loop": {}}),
    "trainable a text": with_value("trainable", "x"),
    "trainable empty": with_value("trainable", []),
    "trainable of other names": with_value("trainable", ["x"]),
    "progress negative": lambda state: {**state, "progress": dict.fromkeys(state["progress"], -5)},
    **{f"asked is {name}": with_value("asked", value) for name, value in {
        "empty": {}, "a text": "x",
        "without a rate": {"optimizer": "x", "groups": [{}], "scheduler": None, "schedule": {}},
    }.items()},
    "random empty": with_value("random", []),
    "a list": lambda state: [state],
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_resuming_a_tampered_checkpoint_is_refused_in_one_sentence(name: str, trained: Path, capsys: Any) -> None:
    tamper(CHANGES[name])
    before = sorted(RUN.rglob("*"))
    capsys.readouterr()
    try:
        status = rlhf(RESUME)
    except SystemExit as end:  # raised by the parser
        status = end.code  # type: ignore[assignment]
    said = capsys.readouterr().err
    assert status in (1, 2) and said.startswith("rlhf") and "checkpoint" in said and "Traceback" not in said, said
    assert {path.name for path in before} <= {path.name for path in RUN.rglob("*")}


@pytest.mark.parametrize("name", CHANGES)
def test_a_tampered_checkpoint_is_exported_or_refused_in_one_sentence(name: str, trained: Path, capsys: Any) -> None:
    tamper(CHANGES[name])
    capsys.readouterr()
    status = rlhf(["export", str(RUN), "--out", "exported", "--import", "tiny_run"])
    said = capsys.readouterr().err
    assert status == 0 or (status == 1 and said.startswith("rlhf: ") and said.count("\n") == 1), said
    assert status or "state_dict" not in name


@pytest.mark.parametrize("content", ["", "{", "[]", "7", '{"sessions": 7}', "\x00" * 40])
def test_a_damaged_manifest_is_renamed_and_the_run_resumes(content: str, trained: Path, capsys: Any) -> None:
    (RUN / "manifest.json").write_text(content)
    assert run(RESUME).model.updates == 2 * UPDATES
    aside = next(RUN.glob("damaged.*.manifest.json"))
    assert aside.read_text() == content and f"it is renamed to {aside.name}" in capsys.readouterr().out
    assert json.loads((RUN / "manifest.json").read_text())["sessions"][-1]["status"] == "finished"


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize("content", [b"", b"[]", b"[" * 50_000, b"a: " + b"{a: " * 5_000, b"\xff\xfea", BOMB.encode()])
def test_a_damaged_run_config_is_refused_in_one_sentence(content: bytes, trained: Path, capsys: Any) -> None:
    (RUN / "config.yaml").write_bytes(content)
    assert rlhf(RESUME) == 1
    said = capsys.readouterr().err
    assert said.startswith("rlhf: ") and "config" in said and said.count("\n") == 1


def test_a_folder_named_last_ckpt_is_renamed_on_resume(trained: Path, capsys: Any) -> None:
    LAST.unlink()
    LAST.mkdir()
    (LAST / "notes").write_text("mine")
    assert damage(LAST) == "it is a folder without a checkpoint"
    assert last_checkpoint(RUN).name == f"update_{UPDATES:06d}.ckpt"
    assert run(RESUME).model.updates == 2 * UPDATES
    assert LAST.is_file()
    assert [path.read_text() for path in LAST.parent.glob("last.ckpt.*/notes")] == ["mine"]
    assert "it is renamed to last.ckpt." in capsys.readouterr().out


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/urandom", "pipe"])
def test_a_device_or_pipe_as_checkpoint_is_refused(target: str, trained: Path) -> None:
    for file in LAST.parent.glob("*.ckpt"):
        file.unlink()
    if target == "pipe":
        os.mkfifo(LAST)
    else:
        LAST.symlink_to(target)
    assert damage(LAST) == "it is a pipe or a device"
    with refused("unreadable-checkpoint", "a pipe, a device or a folder"):
        read_checkpoint(LAST)
    with refused("no-checkpoint", "it is a pipe or a device"):
        last_checkpoint(RUN)


def test_a_run_whose_folder_is_deleted_fails_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    from rlhf_lightning.runs import ModelExport

    def deletes(self: Any, trainer: Any, *_: Any) -> None:
        if trainer.lightning_module.updates == 3:
            Path(RUN).rename("gone")  # rename first: the event writer's thread may add a file while a tree is removed
            shutil.rmtree("gone", ignore_errors=True)

    monkeypatch.setattr(ModelExport, "on_train_batch_end", deletes)
    with refused("run-folder-deleted", "was deleted, moved or replaced while the run was training"):
        run(["fit", *BASIC])


@pytest.mark.parametrize("part", ["model", "data"])
def test_resuming_with_another_seed_is_refused(part: str, trained: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as end:
        rlhf([*RESUME, f"--{part}.seed", "7"])
    assert end.value.code == 2
    assert f"{part}.seed is 7, and the run that is resumed was started with 0" in capsys.readouterr().err


def test_seed_everything_has_no_effect_on_resume_and_warns(trained: Path, capsys: Any) -> None:
    assert run([*RESUME, "--seed_everything", "7"]).model.updates == 2 * UPDATES
    assert "seed_everything 7 has no effect on a resumed run" in capsys.readouterr().out


REWARD = {"class_path": "LearnedScorer", "init_args": {"folder": "reward"}}


@pytest.mark.parametrize(
    "scorer",
    [
        "reward",
        {"class_path": "WeightedSum", "init_args": {"scorers": {"a": REWARD, "b": REWARD}}},
        {"class_path": "NoisyTruth", "init_args": {"truth": REWARD}},
        {"class_path": "ProcessScorer", "init_args": {"folder": "reward", "separator": ";"}},
    ],
)
def test_resuming_with_changed_reward_model_weights_is_refused(
    scorer: Any, policy_folder: str, reward_folder: str, capsys: Any
) -> None:
    shutil.copytree(reward_folder, "reward")
    Path("rows.jsonl").write_text('{"prompt": "a question"}\n' * 4)
    config = {
        "model": {"class_path": "GRPOModule", "init_args": {
            "init_from": policy_folder, "scorer": scorer, "max_new_tokens": 3}},
        "data": {"class_path": "PromptDataModule", "init_args": {
            "source": "rows.jsonl", "samples_per_prompt": 2, "batch_size": 4, "rollouts": 1}},
        "run_name": "rl", "samples": {"prompts": 0},
    }  # fmt: skip
    Path("grpo.yaml").write_text(json.dumps(config))
    assert rlhf(["fit", "--config", "grpo.yaml"]) == 0
    resume = ["fit", "--resume", "runs/rl/version_0", "--data.rollouts", "2"]
    weights = Path("reward/model.safetensors")
    before = weights.read_bytes()
    save_file({name: value + 1e-3 for name, value in load(before).items()}, weights, {"format": "pt"})
    capsys.readouterr()
    assert rlhf(resume) == 1 and "scores of another reward model" in capsys.readouterr().err
    weights.write_bytes(before)
    assert rlhf(resume) == 0
