"""Test the recipe of Constitutional AI: all stages in small, and the full claim (slow)."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.types import Prompt

FOLDER = Path(__file__).resolve().parents[1] / "experiments" / "constitution"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Return the modules of the recipe, imported as its script imports them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(FOLDER))
    found = {}
    for name in ("page", "smollm2", "run"):
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        found[name] = module
    return found


def test_all_stages_run_at_small_size(recipe: Any, tmp_path: Path) -> None:
    run = recipe["run"]
    small = ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "1", "--samples.prompts", "2"]
    brief = ["--data.rows", "16", "--data.batch_size", "8"]
    world = {"demonstrations": 24, "risky": 16, "dialogues": 24, "pairs_train": 16, "pairs_test": 4}
    flags = {
        "sft": [*small, "--data.batch_size", "8", "--data.eval_rows", "4"],
        "sl_cai": [*small, *brief, "--data.eval_rows", "4"],
        "reward": [*small, *brief],
        "ppo": [*small, "--data.rollouts", "1", "--data.batch_size", "4", "--model.mini_batch_size", "4",
                "--model.max_new_tokens", "4", "--model.on_violation", "warn"],
    }  # fmt: skip
    sizes = run.Sizes(world=world, risky=6, repeats=2, rounds=1, samples=1, flags=flags)
    original = run._prompts
    run._prompts = lambda path: original(path)[:6]
    found = run.hazards(tmp_path / "out", 0, sizes)
    assert set(found["policies"]) == {"sft", "sl_cai", "rl_cai"}
    assert found["policies"]["sft"]["harmlessness_gain"] == {"mean": 0.0, "ci": [0.0, 0.0]}
    assert found["revisions"]["prompts"] == 12 and found["judge"]["pairs"] == 12
    assert found["judge"]["constitution"] == found["revisions"]["constitution"]
    label = json.loads((tmp_path / "out" / "labels.jsonl").read_text().splitlines()[0])
    assert label["judge"] == "simulated" and len(label["principles"]) == 2 and 0.5 <= label["preference"] <= 1
    text = recipe["page"].page(found, None)
    assert "| helpful SFT |" in text and "| RL-CAI " in text and "SmolLM2 has not been run." in text


def test_the_real_model_stage_runs_with_a_small_model(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Use a small model instead of the real model; check the requests and the page's text."""
    from conftest import make_tiny_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16384, pad_token_id=0, eos_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = tmp_path / "data"
    data.mkdir()
    pairs = [{"prompt": f"question {n}", "chosen": "a good answer", "rejected": "bad"} for n in range(3)]
    (data / "pandalm_pref_standard.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    asked: list[Prompt] = [[{"role": "user", "content": f"question {n}"}] for n in range(3)]
    rows = [{"prompt": one, "source": ("oasst_lottery", "hh")[n % 2]} for n, one in enumerate(asked)]
    (data / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = recipe["smollm2"].smollm2(str(tmp_path / "model"), data, tmp_path / "out", tokens=4)
    assert (report["pairs"], report["prompts"], report["longer"]) == (3, 2, 1.0)
    assert report["judge"]["pairs"] == 3 and report["revisions"]["prompts"] == 2
    text = recipe["page"].page(None, report)
    assert "The hazard world has not been run." in text and "3 pairs of pandalm" in text


@pytest.mark.slow
def test_harmlessness_rises_and_helpfulness_does_not_fall(recipe: Any, tmp_path: Path) -> None:
    found = recipe["run"].hazards(tmp_path / "out", 0, recipe["run"].Sizes())
    assert all(recipe["page"].holds(found["policies"]).values()), found["policies"]
    assert found["policies"]["rl_cai"]["harmlessness"]["mean"] > 0.9
    assert found["judge"]["position_bias"] > 0.05 and found["judge"]["parse_fail"] == 0
