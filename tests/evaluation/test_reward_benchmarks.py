"""Test the scores of RewardBench and RewardBench 2 by numbers worked by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import refused

from rlhf_lightning.commands.evaluate_reward import main
from rlhf_lightning.commands.known_rewards import read_pairs
from rlhf_lightning.evaluation import reward_models as room
from rlhf_lightning.evaluation.reward_benchmarks import SECTIONS, list_scores, rewardbench, weighted_mean


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def test_a_section_weights_subsets_by_pairs_and_math_by_the_pairs_of_code():
    chat = dict(zip(SECTIONS["Chat"], zip((0.95, 0.8, 0.9, 1, 0.9), (100, 95, 95, 28, 40), strict=True), strict=True))
    known = {**chat, "math-prm": (0.5, 447), "hep-go": (1, 164), "hep-js": (0.8, 164)}
    parts = {name: {"accuracy": a, "pairs": count, "ci": [a - 0.1, a + 0.1]} for name, (a, count) in known.items()}
    found = rewardbench(parts)
    assert found["Chat"]["accuracy"] == pytest.approx(0.89525140)
    assert found["Reasoning"]["accuracy"] == pytest.approx((0.5 * 328 + 164 + 0.8 * 164) / 656)
    assert list(found) == ["Chat", "Reasoning", "average"]
    assert found["average"]["accuracy"] == pytest.approx((found["Chat"]["accuracy"] + 0.7) / 2)
    low, high = weighted_mean([{"accuracy": 0.5, "ci": [0.3, 0.7]}, {"accuracy": 0.7, "ci": [0.4, 1.0]}], [3, 2])["ci"]
    assert (low, high) == pytest.approx((0.58 - (0.12**2 + 0.12**2) ** 0.5, 0.58 + (0.12**2 + 0.12**2) ** 0.5))
    assert rewardbench({**parts, "mine": parts["hep-go"]}) == {} == rewardbench({})


def rows_of_ties():
    """Two complete prompts, and one without its reference; scores are lengths."""
    for number, right, wrong in (("1", (9, 8), (6, 2)), ("2", (9, 4), (5, 1)), ("3", (9, 8), (6,))):
        yield {"id": f"tied:{number}", "prompt": f"name some {number}", "subset": "Ties",
               "chosen": ["a" * n for n in right], "rejected": ["b" * n for n in wrong]}  # fmt: skip
    for number, right, wrong in (("1", 7, 6), ("2", 4, 3)):
        yield {"id": f"ref:{number}", "prompt": f"name one {number}", "subset": "Ties", "chosen": ["c" * right],
               "rejected": ["d" * wrong]}  # fmt: skip


def test_ties_lists_and_their_mean_are_those_of_rewardbench_2(monkeypatch, tmp_path, capsys):
    """Prompt 1: m_tied 2, m_ref 1, s 1, so .3 + .3 + .2 + 0 + .01 tanh(0). Prompt 2: m_tied -1, m_ref 1, s 5.

    List 1 is right, in list 2 the best completion shares the highest score with one other, list 3 is wrong.
    """
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("ties_lengths.py").write_text(
        "def length(prompts, completions, **c):\n    return [len(t) for t in completions]\n"
    )
    wrong = ["f", "ff", "g" * 4]
    lists = [{"id": str(n), "prompt": f"ask {n}", "subset": subset, "chosen": ["e" * size], "rejected": wrong}
             for n, (subset, size) in enumerate([("Math", 5), ("Math", 4), ("Focus", 3)])]  # fmt: skip
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows_of_ties(), *lists]))
    assert main(["ties_lengths.length", "--pairs", "rows.jsonl", "--subset", "subset"]) == 0
    report = json.loads(Path("reward_evaluation/report.json").read_text())
    model = report["models"]["ties_lengths.length"]
    second = 0.3 + 0.01 * np.tanh(-1 / 5 - 1)
    assert model["ties"]["accuracy"] == pytest.approx((0.8 + second) / 2)
    assert {name: model["ties"][name] for name in ("tied", "reference", "margin", "margin_of_both")} == {
        "tied": 0.5, "reference": 1, "margin": 0.5, "margin_of_both": 0}  # fmt: skip
    assert (model["ties"]["prompts"], model["ties"]["missing"]) == (2, 1), "prompt 3 has no reference"
    assert {name: one["accuracy"] for name, one in model["list_subsets"].items()} == {"Math": 0.75, "Focus": 0}
    assert model["lists"]["accuracy"] == 0.5 and model["lists"]["lists"] == 3
    assert model["average"]["accuracy"] == pytest.approx((0.75 + (0.8 + second) / 2) / 3)
    assert report["baselines"]["longer completion"]["average"] == model["average"], "a model that scores only length"
    assert (
        report["baselines"]["bag of words"]["ties"] is None and report["baselines"]["bag of words"]["average"] is None
    )
    said = capsys.readouterr().out
    assert "mean of subsets" in said and "margin_of_both" in said and "baseline: bag of words" in said
    with refused("unknown-column"):
        main(["ties_lengths.length", "--pairs", "rows.jsonl", "--subset", "kind"])


def test_a_missing_margin_leaves_a_list_or_a_prompt_out_and_equal_scores_are_finite():
    """With all scores equal, each list counts 1 / 4 and no condition of the ties holds."""
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [
        *rows_of_ties(), {"prompt": "p", "chosen": ["a"], "rejected": ["b", "c", "d"]}]))  # fmt: skip
    pairs, lists = read_pairs("rows.jsonl")
    decided, tied = ([pair for pair in pairs if pair.tied is flag] for flag in (False, True))
    found = list_scores(np.zeros(len(decided)), np.zeros(len(tied)), decided, tied, lists)
    assert found["lists"]["accuracy"] == 0.25 == found["lists"]["chance"] and found["ties"]["accuracy"] == 0
    gaps = room.length_margins(decided)
    gaps[[pair.prompt in ("name one 2", "p") for pair in decided]] = np.nan
    found = list_scores(gaps, room.length_margins(tied), decided, tied, lists)
    assert found["lists"] is None and (found["ties"]["prompts"], found["ties"]["missing"]) == (1, 2)
    ties = room.length_margins(tied) * np.nan
    assert list_scores(gaps, ties, decided, tied, lists)["ties"] is None
