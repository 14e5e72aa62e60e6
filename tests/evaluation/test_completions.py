"""Test metrics of completions: diversity, pass@k, win rates with planted differences, and a judge in both orders."""

import math

import numpy as np
import pytest
from conftest import refused
from scipy import stats

from rlhf_lightning.evaluation.completions import (
    ask_judge,
    distinct_ngrams,
    score_difference,
    score_verdicts,
    summary,
    win_rates,
)
from rlhf_lightning.evaluation.report import breakable
from rlhf_lightning.scoring.judges import SimulatedJudge


def rows(scores, texts=None, length=3):
    texts = texts or [f"answer {place}" for place in range(len(scores))]
    return [
        {"prompt": "p", "completion": text, "score": score, "length": length, "finished": True, "kl": 0.5}
        for score, text in zip(scores, texts, strict=True)
    ]


def test_distinct_ngrams_by_hand():
    assert distinct_ngrams(["a b a", "a b"], 1) == 2 / 5
    assert distinct_ngrams(["a b a", "a b"], 2) == 2 / 3
    assert math.isnan(distinct_ngrams(["a"], 2))


def test_the_summary_counts_unscored_completions_and_estimates_pass_at_k():
    found = summary(rows([1.0, 0.0, None, 1.0]), samples=2, correct=1.0)
    assert found["score"]["mean"] == pytest.approx(2 / 3) and found["score"]["missing"] == 1
    assert found["pass@1"]["mean"] == 0.5 and found["pass@2"]["mean"] == 1.0
    assert found["kl"]["mean"] == 0.5 and found["prompts"] == 2 and found["unique"] == 1.0


def test_only_a_true_win_rate_difference_is_significant():
    rng, found = np.random.default_rng(0), {0.5: 0, 0.7: 0}
    for rate in found:
        for number in range(100):
            verdicts = (rng.random(100) < rate).astype(float)
            low, high = win_rates(verdicts, rng.normal(size=100), range(100), number, draws=500).ci
            found[rate] += low > 0.5 or high < 0.5
    assert found[0.5] <= stats.binom.ppf(0.9995, 100, 0.07)
    assert found[0.7] >= stats.binom.ppf(0.0005, 100, 0.97)


def test_the_length_controlled_win_rate_removes_length_bias():
    rng = np.random.default_rng(0)
    lengths = rng.normal(2, 1, 2000)
    odds = 2 * np.tanh(lengths / lengths.std())
    found = win_rates((rng.random(2000) < 1 / (1 + np.exp(-odds))).astype(float), lengths, range(2000))
    assert found.rate > 0.75 and found.controlled_ci[0] < 0.5 < found.controlled_ci[1]
    assert found.length_bias == pytest.approx(2, abs=0.5)


def test_verdicts_by_score_are_paired_and_skip_missing_scores():
    better, base = rows([1.0, 2.0, None, 3.0]), rows([0.0, 2.0, 1.0, 4.0])
    verdicts = score_verdicts(better, base)
    assert verdicts[:2] == [1.0, 0.5] and math.isnan(verdicts[2]) and verdicts[3] == 0.0
    assert win_rates(verdicts, [0, 0, 0, 0], [0, 0, 1, 1]).missing == 1
    assert score_difference(better, base, samples=2).mean == 0.0
    with refused("no-verdicts"):
        win_rates([math.nan], [0], [0])


def test_a_position_biased_judge_gives_ties():
    gold = {"good": 1.0, "bad": 0.0, "fair": 0.55, "plain": 0.5}
    ours, base = rows([0] * 3, ["good", "fair", "bad"]), rows([0] * 3, ["bad", "plain", "bad"])
    fair = ask_judge(SimulatedJudge(lambda prompt, text: gold[text]), ours, base)
    assert fair.verdicts == [1.0, 1.0, 0.5] and fair.consistency == 1.0
    assert fair.position_bias == pytest.approx(0.0)
    biased = ask_judge(SimulatedJudge(lambda prompt, text: gold[text], position_bias=3.0), ours, base)
    assert biased.verdicts == [1.0, 0.5, 0.5] and biased.consistency == 0.5 and biased.position_bias > 0.1


def test_line_break_hints_do_not_break_html_escaping():
    assert breakable("runs/a_b.c <i>&amp;") == "runs/<wbr>a_<wbr>b.<wbr>c &lt;i&gt;&amp;amp;"
