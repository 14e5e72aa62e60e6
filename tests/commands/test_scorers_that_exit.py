"""User code that calls sys.exit never makes a command succeed."""

import json
from pathlib import Path

import pytest
from conftest import refused

from rlhf_lightning.cli import main as rlhf
from rlhf_lightning.scoring import FaultTolerant, WeightedSum, load_scorer
from rlhf_lightning.scoring.scorer import ask_scorer

EXITS = {
    "call": "def score(prompts, completions, **columns):\n    sys.exit({code})\n",
    "builtin": "def score(prompts, completions, **columns):\n    exit({code})\n",
    "raise": "def score(prompts, completions, **columns):\n    raise SystemExit({code})\n",
    "generator": "def score(prompts, completions, **columns):\n    yield 1.0\n    sys.exit({code})\n",
    "import": "def score(prompts, completions, **columns):\n    return [0.0]\nsys.exit({code})\n",
    "constructor": "class score:\n    def __init__(self):\n        sys.exit({code})\n"
    "    def __call__(self, p, c, **k):\n        return [0.0] * len(c)\n",
    "end of a rollout": "from rlhf_lightning.scoring import Scorer\nclass score(Scorer):\n"
    "    def __call__(self, p, c, **k):\n        return [float(len(t)) for t in c]\n"
    "    def on_rollout_end(self, rollout, means):\n        sys.exit({code})\n",
    "metrics": "from rlhf_lightning.scoring import Scorer\nclass score(Scorer):\n"
    "    def __call__(self, p, c, **k):\n        return [float(len(t)) for t in c]\n"
    "    def take_metrics(self):\n        sys.exit({code})\n",
}


@pytest.mark.parametrize("code", ["", "0"])
@pytest.mark.parametrize("place", EXITS)
def test_a_scorer_that_calls_exit_fails_the_run(
    place: str, code: str, policy_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(f"exiting{len(place)}{len(code)}.py").write_text("import sys\n" + EXITS[place].format(code=code))
    Path("rows.jsonl").write_text('{"prompt": "a question"}\n' * 4)
    config = {
        "model": {"class_path": "GRPOModule", "init_args": {
            "init_from": policy_folder, "scorer": f"exiting{len(place)}{len(code)}.score", "max_new_tokens": 3}},
        "data": {"class_path": "PromptDataModule", "init_args": {
            "source": "rows.jsonl", "samples_per_prompt": 2, "batch_size": 4, "rollouts": 1}},
    }  # fmt: skip
    Path("grpo.yaml").write_text(json.dumps(config))
    assert rlhf(["fit", "--config", "grpo.yaml"]) in (1, 2)
    assert "sys.exit(" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "best-of-n"])
def test_a_command_whose_scorer_calls_exit_fails(
    command: str, policy_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("leaving.py").write_text("import sys\n" + EXITS["call"].format(code=0))
    Path("rows.jsonl").write_text('{"prompt": "a question"}\n')
    flags = ["--model", policy_folder, "--prompts", "rows.jsonl", "--out", "out.jsonl", "--scorer", "leaving.score"]
    assert rlhf([command, *flags, "--max_new_tokens", "3"]) in (1, 2)
    assert "called sys.exit(0)" in capsys.readouterr().err


def exits(prompts, completions, **columns):
    raise SystemExit


def test_a_scorer_that_calls_exit_is_an_error_also_when_nested() -> None:
    for scorer in (load_scorer(exits), WeightedSum({"a": exits})):
        with refused("scorer-exits", "called sys.exit()"):
            ask_scorer(scorer, ["p"], ["c"], {}, "x")
    tolerant = FaultTolerant(exits, on_fault="drop")
    assert tolerant(["p", "q"], ["c", "d"]) == [None, None]
    assert tolerant.take_metrics()["score_failed"].tolist() == [1.0, 1.0]


def test_parser_exits_are_not_caught(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        rlhf(["generate", "--help"])
    assert left.value.code in (0, None)
