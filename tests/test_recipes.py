"""Every recipe trains unedited on real rows through `rlhf fit`: weights move, and metrics and a model are written."""

import json
import math
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import make_tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from rlhf_lightning.commands.objectives import objective_classes
from rlhf_lightning.commands.train import run
from rlhf_lightning.recipes import FOLDER
from rlhf_lightning.types import Judgement

NOT_HERE = {"grpo_instructions", "grpo_maths", "sft", "reward", "dpo", "ppo", "dpo_classic", "ppo_classic"}
"""Recipes that test_real.py runs."""

CONFIGS = sorted(path for path in FOLDER.glob("*.yaml") if path.stem not in NOT_HERE)
ROWS = {
    "SFTDataModule": "sft_instruct_train.jsonl",
    "PreferenceDataModule": "truthfulqa_pref.jsonl",
    "UnpairedDataModule": "unpaired_tulu_human.jsonl",
    "PromptDataModule": "svamp_train.jsonl",
    "ProcessDataModule": "gsm8k_solution_pref.jsonl",
}
"""Files with real rows of each kind."""


SCORER = "test_recipes.vowels"


def vowels(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    """Score by vowels, so that random text earns part of the score."""
    return [sum(letter in "aeiou" for letter in text) / (1 + len(text)) for text in completions]


def judged(prompts: Any, completions: list[str], **columns: Any) -> list[Judgement]:
    """Return the same score with feedback and with the parts that recipes weight and constrain."""
    scores = vowels(prompts, completions)
    return [Judgement(s, {"helpful": s, "short": -s, "cost": s - 0.2}, feedback="More vowels.") for s in scores]


def config_of(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def rows_for(datamodule: str, file: Path, folder: Path, columns: Sequence[str] = ()) -> Path:
    """Return rows for the DataModule: the file's rows with additional columns, or its solutions split into steps.

    All steps of a right solution are right; the last step of a wrong solution is wrong.
    """
    if columns:
        numbers = {name: place % 2 for place, name in enumerate(columns)}
        lines = [json.dumps(json.loads(line) | numbers) for line in file.read_text(encoding="utf-8").splitlines()[:80]]
        written = folder / "columns.jsonl"
        written.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return written
    if datamodule != "ProcessDataModule":
        return file
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines()[:40]:
        pair = json.loads(line)
        for side, right in (("chosen", True), ("rejected", False)):
            steps = [step for step in pair[side][0]["content"].splitlines() if step.strip()]
            labels = [True] * (len(steps) - 1) + [right]
            rows.append({"prompt": pair["prompt"][-1]["content"], "completions": steps, "labels": labels})
    written = folder / "steps.jsonl"
    written.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return written


def test_every_objective_has_a_yaml() -> None:
    named = {config_of(path)["model"]["class_path"].split(".")[-1] for path in CONFIGS}
    stages = {"SFTModule", "RewardModule", "DPOModule", "PPOModule"}  # their recipes are in NOT_HERE
    assert {kind.__name__ for kind in objective_classes()} - stages - named == set()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return folders of a byte-level policy with two layers, a teacher, and a reward model."""
    tokenizer, found = make_tiny_tokenizer(), {}
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_labels=1, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, initializer_range=0.2,
    )  # fmt: skip
    kinds = {"policy": AutoModelForCausalLM, "teacher": AutoModelForCausalLM}
    kinds["reward"] = AutoModelForSequenceClassification
    for seed, (name, kind) in enumerate(kinds.items()):
        torch.manual_seed(seed)
        folder = tmp_path_factory.mktemp("byte_level") / name
        kind.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        found[name] = str(folder)
    return found


METRICS = Path(__file__).resolve().parents[1] / "docs" / "metrics.yaml"


def undescribed(tags: Iterable[str]) -> set[str]:
    """Return the tags that are missing from the page of metrics."""
    groups = yaml.safe_load(METRICS.read_text(encoding="utf-8"))
    known = [tag for group in groups.values() for tag in group if tag not in ("about", "val/*")]
    named = {tag: [tag, tag.replace("val/", "rollout/"), tag.replace("val/", "train/")] for tag in tags}
    return {tag for tag, names in named.items() if not any(fnmatch(name, one) for name in names for one in known)}


@pytest.mark.real
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_recipe_trains_on_real_rows(
    path: Path, folders: dict[str, str], shared_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = config_of(path)
    arguments, datamodule = config["model"]["init_args"], config["data"]["class_path"].split(".")[-1]
    kinds = {kind.__name__: kind for kind in objective_classes()}
    columns = kinds[config["model"]["class_path"].split(".")[-1]].data_columns
    flags: dict[str, Any] = {
        "model.init_from": folders["policy"],
        "model.warmup": 0,
        "model.learning_rate": 1e-2,
        "data.source": rows_for(datamodule, shared_data(ROWS[datamodule]), tmp_path, columns),
        "data.rows": 40,
        "data.eval_rows": 8,
        "data.max_length": 256,
        "data.batch_size": 8,
        "trainer.accelerator": "cpu",
        "samples.prompts": 2,
    }
    if "scorer" in arguments:
        flags["model.scorer"] = (
            "test_recipes.judged" if {"parts", "constraints", "context"} & set(arguments) else SCORER
        )
    if "columns" in config["data"]["init_args"]:
        flags["data.columns"] = "null"  # the file's column names are already right
    if "teacher" in arguments:
        flags["model.teacher"] = folders["teacher"]
    if datamodule == "PromptDataModule":
        flags |= {"data.rollouts": 2, "model.max_new_tokens": 8, "data.max_prompt_length": 200}
        if "samples_per_prompt" in config["data"]["init_args"]:
            flags["data.samples_per_prompt"] = min(4, config["data"]["init_args"]["samples_per_prompt"])
    parts = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    done = run(["fit", "--config", str(path), *parts])
    module: Any = done.model
    assert module.updates >= 2
    logged = {name: float(value) for name, value in done.trainer.callback_metrics.items()}
    assert all(math.isfinite(value) for value in logged.values()), logged
    assert undescribed(logged) == set()
    assert any(name.startswith("val/") for name in logged) and "train/loss" in logged
    moved = [p for name, p in module.named_parameters() if p.requires_grad and "lora_B" in name]
    assert moved and all(bool(p.abs().max() > 0) for p in moved)  # an adapter's B starts at 0
    assert (done.folder / "model" / "adapter_config.json").is_file()
