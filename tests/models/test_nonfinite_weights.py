"""NaN or infinite weights are reported by name before anything is sampled, scored or validated with them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused
from safetensors.torch import load_file, save_file
from tiny_models import save_policy, save_reward_model, tiny_tokenizer

from rlhf_lightning.cli import main as rlhf
from rlhf_lightning.models.loading import LoadSettings
from rlhf_lightning.models.lora import LoraSettings
from rlhf_lightning.models.roles import load_policy, load_reference
from rlhf_lightning.scoring import LearnedScorer

VALUES = {"nan": float("nan"), "inf": float("inf"), "minus inf": -float("inf")}
NAMES = ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]


def spoil(folder: str, name: str, value: float, dtype: torch.dtype = torch.float32) -> str:
    file = Path(folder) / ("adapter_model.safetensors" if name.startswith("base_model") else "model.safetensors")
    weights = {key: weight.to(dtype) for key, weight in load_file(file).items()}
    weights[name].view(-1)[-1] = value
    save_file(weights, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name", NAMES)
def test_nonfinite_policies_and_reward_models_are_refused(name: str, value: str, tmp_path: Path) -> None:
    policy = spoil(save_policy(tmp_path / "policy"), name, VALUES[value])
    for load in (load_policy, load_reference):
        with refused("non-finite-weights", policy, name):
            load(policy)
    with refused("non-finite-weights", "embed_tokens" if "embed" in name else name):
        load_policy(policy, LoadSettings(dtype="bfloat16"))
    reward = spoil(save_reward_model(tmp_path / "reward"), name, VALUES[value])
    with refused("non-finite-weights", reward, name):
        LearnedScorer(reward)(["w20"], ["w21"])


def test_nonfinite_adapters_are_refused_for_merging_and_continuing(tmp_path: Path) -> None:
    backbone = save_policy(tmp_path / "policy")
    folder = str(tmp_path / "adapter")
    load_policy(backbone, lora=LoraSettings(r=2)).model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    name = next(iter(load_file(Path(folder) / "adapter_model.safetensors")))
    spoil(folder, name, float("nan"))
    for settings in (None, LoraSettings(r=2)):
        with refused("non-finite-weights", folder):
            load_policy(folder, lora=settings)


def test_large_finite_weights_are_accepted(tmp_path: Path) -> None:
    """Their sum overflows, although no weight is infinite."""
    folder = save_policy(tmp_path / "policy")
    file = tmp_path / "policy" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"].fill_(2e38)
    save_file(weights, file, metadata={"format": "pt"})
    load_policy(folder)


@pytest.mark.parametrize("command", ["chat", "generate", "best-of-n", "validate", "predict"])
def test_commands_refuse_nonfinite_weights(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"prompt": "w20", "completion": "w21"}\n' * 4)
    policy = spoil(save_policy(tmp_path / "policy"), NAMES[1], float("inf"))
    sampled = ["--model", policy, "--prompts", "rows.jsonl", "--out", "out.jsonl", "--max_new_tokens", "3"]
    given = {
        "chat": ["chat", policy],
        "generate": ["generate", *sampled],
        "best-of-n": ["best-of-n", *sampled, "--scorer", "RepetitionPenalty"],
    }
    if command not in given:
        Path("sft.yaml").write_text(json.dumps(config(policy)))
    assert rlhf(given.get(command, [command, "--config", "sft.yaml"])) != 0
    assert "NaN or infinite weights" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_checkpoints_with_nonfinite_weights_are_refused(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"prompt": "w20", "completion": "w21"}\n' * 4)
    Path("sft.yaml").write_text(json.dumps(config(save_policy(tmp_path / "policy"))))
    assert rlhf(["fit", "--config", "sft.yaml"]) == 0
    (path,) = Path("runs").rglob("last.ckpt")
    checkpoint: Any = torch.load(path, weights_only=True)
    key = next(key for key in checkpoint["state_dict"] if key.endswith(NAMES[1]))
    checkpoint["state_dict"][key].view(-1)[0] = float("nan")
    torch.save(checkpoint, path)
    capsys.readouterr()
    assert rlhf([command, "--config", "sft.yaml", "--ckpt_path", str(path)]) == 1
    assert "NaN or infinite weights" in capsys.readouterr().err


def config(policy: str) -> dict[str, Any]:
    trainer = {"max_epochs": 1, "accelerator": "cpu", "logger": False}
    return {
        "model": {"class_path": "SFTModule", "init_args": {"init_from": policy}},
        "data": {"class_path": "SFTDataModule", "init_args": {
            "source": "rows.jsonl", "eval_source": "rows.jsonl", "batch_size": 2}},
        "trainer": trainer,
    }  # fmt: skip
