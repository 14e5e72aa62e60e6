"""Test the run with a calculator, shortened and with a tiny model; `make real-tools` trains SmolLM2."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parents[1] / "experiments" / "smollm2"
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

import tools  # noqa: E402


def problem(number: int) -> dict[str, Any]:
    text = f"Ann has {number} figs and gets 2. How many has she?"
    return {"prompt": text, "answer": str(number + 2), "equation": f"( {number}.0 + 2.0 )"}


@pytest.fixture
def model(tmp_path: Path) -> str:
    tokenizer = make_tiny_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_the_shortened_run_measures_every_stage_once(tmp_path: Path, model: str) -> None:
    for name, count in zip(tools.FILES, (tools.SET_ASIDE + 20, 8), strict=True):
        (tmp_path / name).write_text("".join(json.dumps(problem(number)) + "\n" for number in range(count)))
    out, page = tmp_path / "out", tmp_path / "tools.md"
    argv = ["--model", model, "--data", str(tmp_path), "--out", str(out), "--smoke", "--page", str(page)]
    assert tools.main(argv) == 0
    report = json.loads((out / "report.json").read_text())
    for stage in ("before", "sft", "grpo"):
        for name, count in (("svamp_test", 4), ("set aside", 8)):
            found = report[f"{stage}, {name}"]
            assert [len(found[part]) for part in ("right", "calls", "wrong")] == [count] * 3
    assert report["GRPO"]["rollouts"] == 2 == len(report["GRPO"]["curve"]) and report["SFT"]["traces"] == 16
    said = page.read_text()
    assert said.count("| after GRPO |") == 2 and "A shortened run" in said
    assert tools.main(argv) == 0 and page.read_text() == said, "finished stages are kept"


def test_a_trace_calls_the_calculator_with_the_equation() -> None:
    assert [tools.expression(text) for text in ("( 51.0 - 44.0 )", "( ( 2.0 + 3.0 ) * 4.5 )")] == [
        "51 - 44", "(2 + 3) * 4.5",
    ]  # fmt: skip
    system, asked, *said = tools.trace(problem(7))["messages"]
    assert system["role"] == "system" and "calculator" in system["content"] and asked["role"] == "user"
    assert [turn["content"] for turn in said] == ['call: calculator(expression="7 + 2")', "9", "The answer is 9."]


def test_without_the_data_the_run_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tools.main(["--model", "none", "--data", str(tmp_path)]) == 0
    assert "skipped: this needs svamp_train.jsonl" in capsys.readouterr().out
