"""Test `rlhf plan`: its inputs and output, and that real runs use the estimated memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_models import tiny_config, tiny_tokenizer
from transformers import AutoModelForCausalLM

from rlhf_lightning import cli
from rlhf_lightning.planning.estimate import Rates
from rlhf_lightning.planning.plan import placeholders
from rlhf_lightning.planning.setup_from_config import reward_models

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "rlhf_lightning" / "recipes"
HARDWARE = RECIPES / "hardware"
SMALL = {"vocab_size": 16384, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
DPO = ["--model", "DPOModule", "--data", "PreferenceDataModule"]


def planned(*flags, status=0):
    """Run the command; return what it wrote as JSON."""
    assert cli.main(["plan", *flags, "--json", "plan.json"]) == status
    return json.loads(Path("plan.json").read_text())


def test_a_small_run_is_planned_from_its_folder(policy_folder, capsys):
    sizes = ["--data.batch_size", "4", "--data.max_length", "64", "--plan.prompt_length", "24"]
    found = planned(*DPO, "--model.init_from", policy_folder, *sizes)
    weights = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(policy_folder).parameters())
    assert [(role["name"], role["parameters"], role["trained"]) for role in found["roles"]] == [
        ("policy", weights, weights),
        ("reference", weights, 0),
    ]
    assert found["micro_batch"] == {"rows": 4, "width": 24 + 2 * 40, "tokens": 320, "masked": True, "passes": 1}
    assert (found["tokens_per_step"], found["fits"], found["remedies"]) == (4 * 2 * 64, None, [])
    assert found["peak_bytes"] == max(sum(parts.values()) for parts in found["bytes"].values())
    shown = capsys.readouterr().out
    assert "DPOModule: all weights, 32-true, 1 CPU process" in shown
    assert f"{'reference':<16}{weights:>17,}{0:>17,}" in shown
    assert f"peak: {found['peak_bytes'] / 1e9:.2f} GB a rank, {found['peak_moment']}" in shown


def test_the_speed_estimate_uses_measured_machine_rates(policy_folder, capsys, monkeypatch):
    slow = Rates(1e9, 1e12)
    monkeypatch.setattr("rlhf_lightning.planning.plan.measured_rates", lambda setup, batch: slow)
    base = [*DPO, "--model.init_from", policy_folder, "--data.batch_size", "4", "--speed", "true"]
    found = planned(*base)
    bound = found["tokens_per_step"] / (sum(found["flops_per_step"].values()) / 1e9)
    assert 0.9 * bound < found["most_tokens_per_second"] < bound  # copies cost next to nothing at 1 TB/s
    assert "tokens/s on devices like this one (products 1 GFLOP/s" in capsys.readouterr().out
    monkeypatch.setattr("rlhf_lightning.planning.plan.measured_rates", lambda setup, batch: Rates(1e30, 1e9))
    assert 0 < planned(*base)["most_tokens_per_second"] < 1e9


def test_rate_measurement_respects_its_time_limit(policy_folder):
    from rlhf_lightning.planning.estimate import measured_rates
    from rlhf_lightning.planning.setup import Machine, MicroBatch, Rows, Setup

    config = json.dumps(tiny_config().to_dict())
    rates = measured_rates(Setup(config, Rows(4, 1, 8, 8), Machine()), MicroBatch(4, 16, 64, False, 1), seconds=0.2)
    assert 1e6 < rates.products < 1e14 and 1e8 < rates.traffic < 1e13
    gpu = Setup(config, Rows(4, 1, 8, 8), Machine(gpu=True))
    assert torch.cuda.is_available() or measured_rates(gpu, MicroBatch(4, 16, 64, False, 1)) is None


def test_flags_of_fit_change_the_plan(policy_folder):
    base = [*DPO, "--model.init_from", policy_folder, "--data.batch_size", "8"]
    full = planned(*base)
    lora = planned(*base, "--model.lora.r", "4", "--data.max-tokens", "2100")
    assert lora["roles"][0]["trained"] < full["roles"][0]["trained"] and len(lora["roles"]) == 1
    assert full["micro_batch"]["passes"] == 1 and lora["micro_batch"]["passes"] == 8
    two = planned(*base, "--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp")
    assert two["machine"]["data_ranks"] == 2 and "gradient buckets" in two["bytes"]["update"]


def test_recipes_and_hardware_overlays_are_planned_without_model_or_data():
    found = planned("--config", str(RECIPES / "ppo.yaml"), "--config", str(HARDWARE / "fsdp.yaml"))
    assert found["machine"]["strategy"] == "sharded" and found["machine"]["data_ranks"] == 8
    assert [role["name"] for role in found["roles"]] == ["policy", "reward model"]
    assert found["roles"][1]["parameters"] == 134_515_584
    assert list(found["bytes"])[:2] == ["sampling", "statistics"]


@pytest.mark.parametrize(
    ("experiment", "roles"),
    [
        ("kto", ["policy"]),
        ("gkd", ["policy", "teacher"]),
        ("tr_dpo", ["policy", "reference"]),
        ("online_dpo", ["policy", "reward model"]),
        ("on_policy_distillation", ["policy", "teacher", "reward model"]),
        ("process_reward", ["reward model"]),
        ("dapo", ["policy", "reward model"]),
    ],
)
def test_each_family_counts_the_models_that_it_loads(experiment, roles):
    found = planned("--config", str(RECIPES / f"{experiment}.yaml"))
    assert [role["name"] for role in found["roles"]] == roles


@pytest.mark.parametrize(
    ("scorer", "expected"),
    [
        (
            {"class_path": "WeightedSum", "init_args": {"scorers": ["a/model", "my.score"], "weights": [1, 2]}},
            ["a/model"],
        ),
        ({"class_path": "LearnedScorer", "init_args": {"folder": "runs/reward/model"}}, ["runs/reward/model"]),
        ("my_scores.brevity", []),
        (len, []),
        (None, []),
    ],
)
def test_reward_models_inside_composed_scorers_are_counted(scorer, expected):
    assert reward_models(scorer) == expected


def test_an_8b_qlora_run_is_planned_on_one_gpu():
    base = ["--config", str(RECIPES / "sft.yaml"), "--plan.config", "Llama-3.1-8B"]
    found = planned(*base, "--config", str(HARDWARE / "qlora_single_gpu.yaml"), "--memory", "80")
    assert found["fits"] and found["roles"][0]["parameters"] == 8_030_261_248 + found["roles"][0]["trained"]
    assert found["roles"][0]["bytes"] < 6.1e9


def test_a_plan_that_does_not_fit_exits_1_with_suggestions(capsys):
    flags = ["--config", str(RECIPES / "sft.yaml"), "--plan.config", "Llama-3.1-8B"]
    found = planned(*flags, "--config", str(HARDWARE / "single_gpu.yaml"), "--memory", "80", status=1)
    assert not found["fits"] and all(one["peak_bytes"] <= 80e9 for one in found["remedies"])
    shown = capsys.readouterr().out
    assert "does not fit 80 GB" in shown and "enough:" in shown
    for one in found["remedies"]:
        assert all(flag in shown for flag in one["flags"])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--model.lr", "1"], "rlhf plan: --model.lr is not an argument of DPOModule; use --model.learning_rate"),
        (["--memori", "3"], "rlhf plan: there is no setting --memori; the nearest is --memory"),
        (
            ["--trainer.gradient_clip_val", "1"],
            "rlhf plan: there is no setting --trainer.gradient_clip_val; use --model.max_grad_norm",
        ),
        (["--trainer.precision", "16-mixed"], "rlhf plan: trainer.precision=16-mixed would clip gradients"),
        (["--trainer.strategy", "fsdp"], "rlhf plan: the strategy fsdp (FSDP1) fails"),
        (["--data", "SFTDataModule"], "rlhf plan: DPOModule takes PreferenceBatch, but SFTDataModule yields"),
        (["--plan.prompt_lenth", "3"], "rlhf plan: there is no setting --plan.prompt_lenth"),
    ],
)
def test_wrong_flags_are_refused_as_in_fit(flags, sentence, capsys):
    try:
        status = cli.main(["plan", *DPO, "--plan.config", "SmolLM2-135M", *flags])  # answered from the index
    except SystemExit as answered:
        status = answered.code
    assert status == 2
    assert capsys.readouterr().err.startswith(sentence)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--model.quantization", "nf4"], "quantization=nf4 keeps the weights frozen, so there is nothing to train"),
        (["--model.dtype", "bfloat16"], "every weight is trained in bf16"),
        (
            ["--config", str(HARDWARE / "fsdp.yaml"), "--trainer.devices", "4"],
            "data_parallel_size=8 x tensor_parallel_size=1, but there are 4 ranks",
        ),
        (["--trainer.devices", "9", "--data.batch_size", "8"], "9 ranks cannot share 8 rows a step"),
        (["--plan.config", "missing/model"], "the sizes of missing/model are unknown"),
    ],
)
def test_configs_that_fit_refuses_are_refused(flags, sentence, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cpu = ["--trainer.accelerator", "cpu"]
    assert cli.main(["plan", *DPO, "--plan.config", "SmolLM2-135M", *cpu, *flags]) == 1
    assert sentence in capsys.readouterr().err


def test_defaults_fill_only_missing_settings(tmp_path):
    assert placeholders(DPO) == ["--model.init_from", "model", "--data.source", "rows.jsonl"]
    assert placeholders(["--model", "PPOModule", "--data.source=x"]) == [
        "--model.init_from", "model", "--model.scorer", "model",
    ]  # fmt: skip
    config = tmp_path / "run.yaml"
    run = {"class_path": "PPOModule", "init_args": {"init_from": "a", "scorer": "b"}}
    config.write_text(yaml.safe_dump({"model": run, "data": {"init_args": {"source": "c"}}}))
    assert placeholders(["--config", str(config)]) == []
    assert placeholders(["--help"]) == []


def test_help_describes_the_plan(capsys):
    assert cli.main(["plan", "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: rlhf plan [flags of rlhf fit ...]")
    assert "--memory" in shown and "--plan.prompt_length" in shown and "Estimate memory and compute" in shown


# -- what a run takes -------------------------------------------------------------------------------------------------

PROMPT = COMPLETION = 64
STAGES = {
    "sft": ["--model", "SFTModule", "--data", "SFTDataModule", "--data.batch_size", "16"],
    "reward": ["--model", "RewardModule", "--data", "PreferenceDataModule", "--data.batch_size", "8"],
    "dpo": ["--model", "DPOModule", "--data", "PreferenceDataModule", "--data.batch_size", "8"]
    + ["--model.lora.r", "16"],
    "ppo": ["--model", "PPOModule", "--data", "PromptDataModule", "--data.batch_size", "16", "--model.ppo_epochs", "1"]
    + ["--model.max_new_tokens", str(COMPLETION), "--model.scorer", "letters.score", "--data.rollouts", "2"],
}

MEASURE = """
import contextlib, json, os, resource, sys
from rlhf_lightning.commands import train
from rlhf_lightning.planning import plan

def child(work):
    # Imported once; a forked process counts its peak anew.
    reader, writer = os.pipe()
    if os.fork() == 0:
        with contextlib.redirect_stdout(sys.stderr):
            work()
        os.write(writer, str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024).encode())
        os._exit(0)
    os.close(writer)
    os.wait()
    return int(os.read(reader, 99))

sys.path.insert(0, os.getcwd())
fit = ["--trainer.max_steps", "2", "--trainer.enable_checkpointing", "false", "--export.enabled", "false"]
fit += ["--samples.prompts", "0"]
found = {}
for name, flags in json.loads(sys.argv[1]).items():
    rollouts = ["--trainer.max_steps", "-1"] if name == "ppo" else []
    measured = child(lambda: train.main(["fit", *flags, *fit, *rollouts]))
    lengths = ["--plan.prompt_length", "64", "--plan.completion_length", "64"]
    child(lambda: plan.main([*flags, *lengths, "--json", "plan.json"]))
    found[name] = (measured, json.load(open("plan.json")))
print(json.dumps(found))
"""


def test_measured_memory_is_within_20_percent_of_the_plan(tmp_path):
    """Run all four stages on twelve million weights; most of the memory is activations and optimizer moments."""
    AutoModelForCausalLM.from_config(tiny_config(**SMALL)).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    words = [" ".join(f"w{6 + (row + place) % 100}" for place in range(PROMPT - 1)) for row in range(40)]
    rows = [{"prompt": a, "completion": a, "chosen": a, "rejected": b} for a, b in zip(words, words[1:], strict=False)]
    names = {"sft": ("prompt", "completion"), "reward": ("prompt", "chosen", "rejected"), "ppo": ("prompt",)}
    commands = {}
    for name, flags in STAGES.items():
        kept = names.get(name, names["reward"])
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps({key: row[key] for key in kept}) + "\n" for row in rows))
        longest = ["--data.max_length", "128", "--trainer.accelerator", "cpu"]
        commands[name] = [*flags, "--model.init_from", "model", "--data.source", file.name, *longest]
    (tmp_path / "letters.py").write_text(
        "def score(prompts, completions, **columns):\n    return [0.0] * len(prompts)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RLHF_CACHE": str(tmp_path / "cache")}
    answer = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(commands)],
        capture_output=True, text=True, env=environment, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr[-2000:]
    found = json.loads(answer.stdout.splitlines()[-1])
    assert set(found) == set(STAGES)
    for name, (measured, plan) in found.items():
        assert plan["peak_bytes"] == pytest.approx(measured, rel=0.2), name
        assert plan["bytes"][plan["peak_moment"]]["process"] < 0.7 * measured, name
