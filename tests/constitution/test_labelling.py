"""Test labels from a judge's answers: worked numbers, debiasing of a judge with known bias, failures, metrics."""

import math
import random

import pytest
import torch
from conftest import refused

from rlhf_lightning.constitution.labelling import LabelSettings, drawn_principles, label_pairs
from rlhf_lightning.constitution.labels import describe
from rlhf_lightning.constitution.principles import ComparingPrinciple, Constitution
from rlhf_lightning.functional.ranking import bradley_terry_loss
from rlhf_lightning.scoring.judges import SimulatedJudge
from rlhf_lightning.scoring.judges.judge import Judge, JudgeAnswer, Pair, Question, no_answer

RULES = Constitution("test", 1, "en", comparing=tuple(ComparingPrinciple(name, f"{name}?") for name in "abcd"))


class Scripted:
    """A judge that answers from a table keyed by (first completion, principle)."""

    name = "scripted"

    def __init__(self, table: dict) -> None:
        self.table = table
        self.asked: list[Question] = []

    def __call__(self, questions):
        self.asked += questions
        return [
            self.table[q.first] if q.first in self.table else self.table[q.first, q.principle.id] for q in questions
        ]


# Worked comparison: l_A, l_B = -1.2, -2.0 with x first, and -1.5, -1.0 with y first.
WORKED = {"x": JudgeAnswer(-1.2, -2.0), "y": JudgeAnswer(-1.5, -1.0)}
PAIR = Pair("p", "x", "y", 1.0, {"source": "test"})


def labelled(table, pair=PAIR, **settings):
    return label_pairs(Scripted(table), RULES, [pair], LabelSettings(**settings)).pairs[0]


def close(found, expected):
    assert found == pytest.approx(expected, abs=1e-8)


def test_preference_and_verdict_by_hand():
    one = labelled(WORKED)
    close(one.preference, 0.65621691)
    assert one.verdict == 1.0
    close(labelled(WORKED, average="logit").preference, 0.65701046)
    (comparison,) = one.comparisons
    close([comparison.probability, comparison.swapped_probability], [0.68997448, 0.37754067])


def test_probabilities_are_clamped_only_after_reasoning():
    (comparison,) = labelled(WORKED, reasoning=True).comparisons
    close([comparison.probability, comparison.swapped_probability], [0.6, 0.4])
    close(labelled(WORKED, reasoning=True).preference, 0.6)
    sure = {"x": JudgeAnswer(0.0, -math.inf), "y": JudgeAnswer(-math.inf, 0.0)}
    close(labelled(sure, reasoning=True).preference, 0.6)
    close(labelled(sure).preference, 1.0)


def test_bradley_terry_loss_on_a_clamped_label_by_hand():
    scores = torch.tensor([0.5]).double(), torch.tensor([0.0]).double()
    close(float(bradley_terry_loss(*scores, target=torch.tensor([0.6]).double())), 0.67407698)


def test_an_output_row_puts_the_preferred_completion_in_chosen():
    row = labelled(WORKED).row("scripted", "print")
    assert (row["prompt"], row["chosen"], row["rejected"], row["source"]) == ("p", "x", "y", "test")
    assert (row["judge"], row["constitution"], row["tie"]) == ("scripted", "print", False)
    assert row["human_preference"] == 1.0 and "reasoning" not in row
    close(row["probabilities"] + row["swapped_probabilities"], [0.68997448, 0.62245933])
    turned = labelled(WORKED, Pair("p", "y", "x", 1.0)).row("scripted", "print")
    assert (turned["chosen"], turned["human_preference"]) == ("x", 0.0)
    close(turned["preference"], 0.65621691)
    close(turned["probabilities"] + turned["swapped_probabilities"], [0.62245933, 0.68997448])


def test_contradicting_orders_are_a_tie_even_at_certainty():
    both_first = {"x": JudgeAnswer(0.0, -math.inf), "y": JudgeAnswer(0.0, -math.inf)}
    for average in ("probability", "logit"):
        one = labelled(both_first, average=average)
        assert (one.preference, one.verdict) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (no_answer("too_long"), "too_long"),
        (JudgeAnswer(-math.inf, -math.inf), "other_words"),
        (JudgeAnswer(-6.0, -6.0), "other_words"),
        (JudgeAnswer(math.nan, -1.0), "not_a_number"),
    ],
)
def test_an_unparsable_answer_gives_no_label_and_is_counted(answer, reason):
    found = label_pairs(Scripted({"x": WORKED["x"], "y": answer}), RULES, [PAIR])
    assert found.pairs[0].preference is None and found.pairs[0].verdict is None
    assert found.metrics["parse_fail"] == 0.5 and found.metrics["parse_failures"] == {reason: 1}
    assert found.metrics["labelled"] == 0 and found.metrics["agreement"] is None and found.metrics["entropy"] is None
    with refused("no-labels", "has no label"):
        found.pairs[0].row("scripted", "print")
    assert dict(describe(found.metrics))[f"no answer: {reason}"] == "1 of 2 questions"


def test_a_principle_without_an_answer_is_left_out_of_the_mean():
    settings = LabelSettings(principles=4)
    table = {(side, name): WORKED[side] for side in "xy" for name in "abcd"} | {("y", "b"): no_answer("empty")}
    one = label_pairs(Scripted(table), RULES, [PAIR], settings).pairs[0]
    close(one.preference, 0.65621691)
    assert sorted(one.row("s", "f")["principles"]) == ["a", "c", "d"]


def test_preferences_are_averaged_over_principles():
    table = {("x", name): JudgeAnswer(-value, -1.0) for name, value in zip("abcd", (0.5, 1.0, 2.0, 3.0), strict=True)}
    table |= {("y", name): JudgeAnswer(-1.0, -1.0) for name in "abcd"}
    odds = torch.tensor([0.5, 0.0, -1.0, -2.0]).double()
    close(labelled(table, principles=4).preference, float((odds.sigmoid() + 0.5).mean() / 2))
    close(labelled(table, principles=4, average="logit").preference, float((odds.mean() / 2).sigmoid()))


def test_principles_are_drawn_per_pair_number_and_seed():
    settings = LabelSettings(principles=2, seed=5)
    drawn = [tuple(one.id for one in drawn_principles(RULES, settings, number)) for number in range(400)]
    assert all(len(set(one)) == 2 for one in drawn)
    assert all(abs(sum(name in one for one in drawn) / 400 - 0.5) < 0.1 for name in "abcd")
    pairs = [Pair(f"p{number}", "x", "y") for number in range(6)]
    whole, parts = Scripted(WORKED), Scripted(WORKED)
    label_pairs(whole, RULES, pairs, settings)
    label_pairs(parts, RULES, pairs[:2], settings)
    label_pairs(parts, RULES, pairs[2:], settings, start=2)
    assert [q.principle for q in whole.asked] == [q.principle for q in parts.asked]
    with refused("too-few-principles", "has 4 principles to compare by", "principles is 5"):
        label_pairs(whole, RULES, pairs, LabelSettings(principles=5))


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"principles": 0}, "setting-out-of-range"),
        ({"average": "median"}, "unknown-choice"),
        ({"least_mass": 1.0}, "setting-out-of-range"),
    ],
)
def test_settings_out_of_range_are_refused(settings, code):
    ((name, value),) = settings.items()
    with refused(code, f"{name} is {value!r}"):
        LabelSettings(**settings)


def test_a_judge_with_too_few_answers_is_refused():
    class Lazy:
        name = "lazy"

        def __call__(self, questions):
            return [JudgeAnswer(-1.0, -1.0)]

    assert isinstance(Lazy(), Judge)
    with refused("wrong-number", "judge lazy gave 1 answers to 2 questions"):
        label_pairs(Lazy(), RULES, [PAIR])


# -- a judge whose preference and bias are known ----------------------------------------------------------------------


def gold(prompt, completion):
    """Return the number that is written in a completion."""
    return float(completion)


def known_pairs(count: int) -> list[Pair]:
    """Return pairs of numbers with log-odds (their difference) spread over [-3, 3], labelled by people according to
    them.
    """
    rng = random.Random(0)
    pairs = []
    for number in range(count):
        first, second = rng.uniform(0, 3), rng.uniform(0, 3)
        people = float(rng.random() < 1 / (1 + math.exp(second - first)))
        pairs.append(Pair(f"prompt {number}", repr(first), repr(second), people))
    return pairs


def truth(pairs: list[Pair]) -> torch.Tensor:
    return torch.tensor([float(one.first) - float(one.second) for one in pairs], dtype=torch.float64).sigmoid()


@pytest.mark.parametrize(
    ("bias", "average", "worst"),
    # Least upper bounds of |p - truth| over log-odds in [-3, 3] by the formula, rounded up.
    [(0.5, "logit", 1e-9), (2.0, "logit", 1e-9), (0.5, "probability", 0.012), (0.6, "probability", 0.017),
     (1.0, "probability", 0.045), (2.0, "probability", 0.151)],
)  # fmt: skip
def test_both_orders_cancel_position_bias(bias, average, worst):
    """A single order is off by up to tanh(bias / 4). The logit average is exact. The probability average is within 0.02
    of the truth for a bias up to 0.6, and worse for a larger bias.
    """
    pairs = known_pairs(2000)
    found = label_pairs(SimulatedJudge(gold, 1.0, bias), RULES, pairs, LabelSettings(average=average))
    debiased = torch.tensor([one.preference for one in found.pairs], dtype=torch.float64)
    one_order = torch.tensor([one.comparisons[0].probability for one in found.pairs], dtype=torch.float64)
    off, off_in_one = (debiased - truth(pairs)).abs(), (one_order - truth(pairs)).abs()
    assert float(off.max()) <= worst
    assert float(off_in_one.max()) == pytest.approx(math.tanh(bias / 4), abs=2e-3)
    assert abs(float(debiased.mean() - truth(pairs).mean())) < 0.02, "what is left pulls towards a half on both sides"
    assert found.metrics["position_bias"] > 0.08


def test_labels_of_a_noisy_biased_judge_are_unbiased():
    """The judge's own noise adds no bias to the mean over pairs with the same gap."""
    pairs = [Pair(f"prompt {number}", "1.5", "0.5", 1.0) for number in range(4000)]
    judge = SimulatedJudge(gold, 1.0, position_bias=0.8, noise=1.0)
    found = label_pairs(judge, RULES, pairs, LabelSettings(average="logit"))
    right = found.metrics["agreement"]
    assert right["mean"] == pytest.approx(0.8413, abs=0.02), "the noise is below the gap, of 1, in Phi(1) of the pairs"
    assert right["ci"][0] < 0.8413 < right["ci"][1] and right["prompts"] == 4000
    odds = torch.logit(torch.tensor([one.preference for one in found.pairs], dtype=torch.float64))
    assert float(odds.mean()) == pytest.approx(1.0, abs=0.05) and float(odds.std()) == pytest.approx(1.0, abs=0.05)


def test_metrics_of_a_judge_that_only_sees_the_position():
    pairs = known_pairs(200)
    found = label_pairs(SimulatedJudge(lambda prompt, completion: 0.0, position_bias=3.0), RULES, pairs).metrics
    assert (found["consistency"], found["tie_rate"], found["parse_fail"]) == (0.0, 1.0, 0.0)
    assert found["position_bias"] == pytest.approx(1 / (1 + math.exp(-3)) - 0.5)
    assert found["entropy"] == pytest.approx(math.log(2))
    assert found["agreement"]["mean"] == 0.5 and found["letter_mass"] == pytest.approx(1.0)
    fair = label_pairs(SimulatedJudge(lambda prompt, completion: 0.0), RULES, pairs).metrics
    assert (fair["consistency"], fair["tie_rate"]) == (1.0, 1.0), "a tie in both orders contradicts nothing"
    known = label_pairs(SimulatedJudge(gold, 1.0), RULES, pairs).metrics
    assert known["consistency"] == 1.0 and abs(known["position_bias"]) < 1e-12
    assert known["by_principle"].keys() == set("abcd") and sum(known["by_principle"].values()) == 200


def test_agreement_intervals_resample_prompts():
    separate = known_pairs(400)
    together = [one._replace(prompt=f"prompt {number // 20}") for number, one in enumerate(separate)]
    for one in together[:200]:
        assert one.preference in (0.0, 1.0)
    judge = SimulatedJudge(gold, 1.0)
    widths = []
    for pairs in (separate, together):
        found = label_pairs(judge, RULES, pairs).metrics["agreement"]
        widths.append(found["ci"][1] - found["ci"][0])
        assert found["pairs"] == 400
    assert found["prompts"] == 20 and widths[0] == pytest.approx(0.08, abs=0.03)
    ties = [one._replace(preference=0.5) for one in separate]
    assert label_pairs(judge, RULES, ties).metrics["agreement"] is None


def test_noise_of_the_simulated_judge_belongs_to_the_pair_and_not_to_the_order():
    judge = SimulatedJudge(gold, 1.0, noise=1.0, seed=3)
    question = Question("p", "1.0", "2.0", RULES.comparing[0], [], RULES.wording)
    swapped = question._replace(first="2.0", second="1.0")
    assert judge.log_odds(question) == pytest.approx(-judge.log_odds(swapped))
    assert judge.log_odds(question) != judge.log_odds(question._replace(principle=RULES.comparing[1]))
    with refused("not-importable", "gold_reward 'nowhere.gold'"):
        SimulatedJudge("nowhere.gold")
