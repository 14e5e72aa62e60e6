"""Every config of a user's objective trains unedited through `rlhf fit`, and `rlhf verify` accepts every class."""

import json
import math
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import make_tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from rlhf_lightning.commands.train import run
from rlhf_lightning.training.module import AlignmentModule
from rlhf_lightning.verification.contract import Verification, verify

USERS = Path(__file__).resolve().parents[1] / "experiments" / "objectives_of_users"
CONFIGS = sorted(USERS.glob("*.yaml"))


@pytest.fixture(autouse=True)
def users_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(USERS)])


def class_of(file: str) -> Any:
    """Return the objective in a user's file; None if the file has a scorer or a DataModule."""
    kinds = [kind for kind in vars(__import__(file)).values() if isinstance(kind, type) and kind.__module__ == file]
    return next((kind for kind in kinds if issubclass(kind, AlignmentModule)), None)


@cache
def verified(file: str) -> Verification:
    return verify(class_of(file))


def objectives() -> list[str]:
    sys.path.append(str(USERS))
    try:
        return [path.stem for path in CONFIGS if class_of(path.stem) is not None]
    finally:
        sys.path.remove(str(USERS))


# -- rlhf verify ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", objectives())
def test_verify_accepts_every_objective(file: str) -> None:
    found = verified(file)
    assert found.held, [check for check in found.checks if not (check.held or check.meant)]


def verdict(found: Verification) -> str:
    """Return the README's verdict on a class."""
    meant = sorted(check.name for check in found.checks if check.meant and check.name != "target")
    text = f"meant: {', '.join(meant)}" if meant else "every check holds"
    target = next(check for check in found.checks if check.name == "target")
    return f"{text}; {'target reached' if target.held else 'no target'}"


def own_lines(file: str) -> int:
    lines = "".join((USERS / f"{file}.py").read_text().split('"""')[::2]).splitlines()
    return sum(bool(line.strip()) and not line.startswith(("import ", "from ")) for line in lines)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_readme_table_matches_the_files(path: Path) -> None:
    rows = re.findall(rf"^\| .*\[{path.stem}\.py\].*$", (USERS / "README.md").read_text(), re.M)
    assert len(rows) == 1, f"{path.stem}.py has one row in the table"
    _, lines, test, said = (cell.strip() for cell in rows[0].strip("| ").split(" | "))
    assert int(lines) == own_lines(path.stem)
    file, name = re.fullmatch(r"\[(\w+)\]\(../../tests/(test_\w+\.py)\)", test).groups()[::-1]
    assert f"def {name}" in (USERS.parents[1] / "tests" / file).read_text()
    if class_of(path.stem) is not None:
        assert said == verdict(verified(path.stem))


# -- rlhf fit ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return folders of a byte-level policy with two layers and of a reward model."""
    tokenizer, found = make_tiny_tokenizer(), {}
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_labels=1, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, initializer_range=0.2,
    )  # fmt: skip
    for name, kind in {"policy": AutoModelForCausalLM, "reward": AutoModelForSequenceClassification}.items():
        torch.manual_seed(3)
        folder = tmp_path_factory.mktemp("byte_level") / name
        kind.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        found[name] = str(folder)
    return found


def vowels(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    """Score by vowels, so that random text earns part of the score."""
    return [sum(letter in "aeiou" for letter in text) / (1 + len(text)) for text in completions]


def rows_of(datamodule: str) -> list[dict[str, Any]]:
    """Return rows with every column that any of the configs needs."""
    ratings = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    shared = {"weight_helpful": 0.8, "weight_short": 0.2, "rubric": "It is short.", **dict.fromkeys(ratings, 1.0)}
    rows = []
    for number in range(40):
        answer = str(number * number)
        row: dict[str, Any] = {"prompt": f"What is {number} times {number}?", **shared}
        if datamodule == "PreferenceDataModule":
            row |= {"chosen": answer, "rejected": "I know not."}
        elif datamodule == "SFTDataModule":
            row |= {"completion": answer}
        else:
            row |= {"question": row.pop("prompt"), "answer": f"#### {answer}"}
        rows.append(row)
    return rows


def overlay(config: dict[str, Any], folders: dict[str, str], folder: Path) -> dict[str, Any]:
    """Return overrides that make a config small: tiny models, few rows, short completions."""
    model, data = config["model"], config["data"]
    prompts = "samples_per_prompt" in data["init_args"]
    rows = folder / "rows.jsonl"
    kind = "PromptDataModule" if prompts else data["class_path"]
    rows.write_text("".join(json.dumps(row) + "\n" for row in rows_of(kind)))
    small: dict[str, Any] = {"init_from": folders["policy"], "learning_rate": 1e-2}
    given: dict[str, Any] = {"source": str(rows), "rows": 40, "eval_rows": 8, "batch_size": 8, "columns": None}
    if prompts:
        small["max_new_tokens"] = 8
        given |= {"columns": {"question": "prompt"}, "rollouts": 2, "max_prompt_length": 200}
        given |= {"samples_per_prompt": min(4, data["init_args"]["samples_per_prompt"])}
        scorer = model["init_args"]["scorer"]
        if isinstance(scorer, str):
            small["scorer"] = f"{__name__}.vowels"
        elif "scorers" in scorer.get("init_args", {}):
            arguments = scorer["init_args"]
            ways = dict(zip(arguments["scorers"], (folders["reward"], f"{__name__}.vowels"), strict=True))
            small["scorer"] = {**scorer, "init_args": {**arguments, "scorers": ways}}
        elif "judge" in scorer.get("init_args", {}):
            small["scorer"] = {**scorer, "init_args": {"judge": folders["policy"]}}
    else:
        given["max_length"] = 256
    paths = {name: config[name]["class_path"] for name in ("model", "data")}
    return {
        "model": {"class_path": paths["model"], "init_args": small},
        "data": {"class_path": paths["data"], "init_args": given},
        "trainer": {"accelerator": "cpu", "max_epochs": 1},
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_user_config_trains(
    path: Path, folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load(path.read_text())
    small = tmp_path / "small.yaml"
    small.write_text(yaml.safe_dump(overlay(config, folders, tmp_path)))
    limits = ["--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1", "--samples.prompts", "1"]
    done = run(["fit", "--config", str(path), "--config", str(small), *limits])
    module: Any = done.model
    assert module.updates >= 2
    logged = {name: float(value) for name, value in done.trainer.callback_metrics.items()}
    assert "train/loss" in logged and math.isfinite(logged["train/loss"])
    assert (done.folder / "model").is_dir()
