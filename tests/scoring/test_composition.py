"""Sums and ensembles by value, the metrics of each part, and their YAML form."""

import math

import pytest
import torch
from conftest import refused

from rlhf_lightning.scoring import Ensemble, Scorer, SpanScorer, WeightedSum, load_scorer
from rlhf_lightning.types import Judgement

TEXTS = ["one", "two words", "now three words"]


def length(prompts, completions, **columns):
    return [float(len(text.split())) for text in completions]


def constant(prompts, completions, **columns):
    return torch.full((len(completions),), 2.0)


def odd_lengths_only(prompts, completions, **columns):
    return [value if value % 2 else None for value in length(prompts, completions)]


def score(scorer, texts=TEXTS):
    return [judgement.score for judgement in judge(scorer, texts)]


def judge(scorer, texts=TEXTS):
    return list(scorer(["p"] * len(texts), texts))


def parts_of(scorer, texts=TEXTS):
    found = judge(scorer, texts)
    return {name: [judgement.parts[name] for judgement in found] for name in found[0].parts}


def taken(scorer):
    return {name: values.tolist() for name, values in scorer.take_metrics().items()}


def test_weighted_sum_reports_raw_scores_of_its_parts():
    total = WeightedSum({"length": length, "constant": constant}, weights={"length": -0.5})
    assert score(total) == [1.5, 1.0, 0.5]
    assert parts_of(total) == {"length": [1.0, 2.0, 3.0], "constant": [2.0, 2.0, 2.0]}
    assert taken(total) == {}


def test_token_rewards_and_feedback_of_members_are_joined():
    def steps(prompts, completions, **columns):
        return [Judgement(1.0, {"cost": 5.0}, [1.0, 2.0], "short") for _ in completions]

    def last(prompts, completions, **columns):
        return [Judgement(0.5, token_rewards=[0.0, 0.0, 4.0]) for _ in completions]

    (found,) = judge(WeightedSum({"steps": steps, "last": last}, weights={"steps": 2.0}), ["x"])
    assert found == Judgement(2.5, {"steps": 1.0, "steps/cost": 5.0, "last": 0.5}, [2.0, 4.0, 4.0], "steps: short")
    (mean,) = judge(Ensemble({"steps": steps, "last": last}, penalty=0.0), ["x"])
    assert mean.score == 0.75 and mean.token_rewards == [0.5, 1.0, 2.0]


def test_span_scorer_rewards_matches_at_their_spans():
    scorer = SpanScorer({r"\bplease\b": 1.0, "^NO": -2.0, "x*": 5.0})
    assert judge(scorer, ["please, please", "so\nNO please", "none"]) == [
        Judgement(2.0, span_rewards=[(0, 6, 1.0), (8, 14, 1.0)]),
        Judgement(-1.0, span_rewards=[(6, 12, 1.0), (3, 5, -2.0)]),
        Judgement(0.0, span_rewards=[]),
    ]
    total = WeightedSum({"polite": scorer, "length": length}, weights={"polite": 0.5})
    (found,) = judge(total, ["please stop"])
    assert found.score == 2.5 and found.span_rewards == [(0, 6, 0.5)]
    for wrong in ({"(": 1.0}, {"a": math.inf}, {}, {"a": "b"}):
        with refused("wrong-pattern", "patterns"):
            SpanScorer(wrong)


@pytest.mark.parametrize("spans", [[(2, 1, 1.0)], [(0, 3, math.nan)], [(0, 3)], [("a", 3, 1.0)], [(-1, 3, 1.0)], [3]])
def test_invalid_spans_are_refused(spans):
    def scorer(prompts, completions, **columns):
        return [Judgement(1.0, span_rewards=spans) for _ in completions]

    with refused("span-reward", "start < end"):
        judge(WeightedSum({"spans": scorer}))


def test_members_get_the_means_of_their_own_parts():
    class Told(Scorer):
        def __call__(self, prompts, completions, **columns):
            return [Judgement(1.0, {"cost": 2.0}) for _ in completions]

        def on_rollout_end(self, rollout, means):
            self.means = means

    inner = Told()
    outer = WeightedSum({"outer": WeightedSum({"safe": inner}), "length": length})
    means = {"score": 9.0, "score_outer": 1.0, "score_outer/safe": 1.5, "score_outer/safe/cost": 2.0}
    outer.on_rollout_end(None, means)
    assert inner.means["score"] == 1.5 and inner.means["score_cost"] == 2.0


def test_a_missing_part_drops_or_skips_the_score():
    parts = {"length": length, "odd": odd_lengths_only}
    dropping, skipping = WeightedSum(parts), WeightedSum(parts, missing="skip")
    assert score(dropping) == [2.0, None, 6.0]
    assert score(skipping) == [2.0, 2.0, 6.0]
    assert score(WeightedSum({"odd": odd_lengths_only}, missing="skip")) == [1.0, None, 3.0]
    odd = parts_of(dropping)["odd"]
    assert odd[::2] == [1.0, 3.0] and math.isnan(odd[1])


def test_nested_sums_name_their_parts_by_path():
    inner = WeightedSum({"length": length, "odd": odd_lengths_only}, missing="skip")
    outer = WeightedSum({"inner": inner, "constant": constant}, weights={"inner": 10.0})
    assert score(outer) == [22.0, 22.0, 62.0]
    assert set(parts_of(outer)) == {"inner", "inner/length", "inner/odd", "constant"}


def test_ensemble_score_is_mean_minus_scaled_deviation():
    def members(*values):
        return [lambda p, c, value=value, **columns: [value] * len(c) for value in values]

    pessimist = Ensemble(members(1.0, 2.0, 6.0), penalty=0.5)  # mean 3, deviation sqrt(14 / 3)
    assert score(pessimist, ["x"]) == [pytest.approx(3 - 0.5 * math.sqrt(14 / 3))]
    assert taken(pessimist) == {"score/std": [pytest.approx(math.sqrt(14 / 3))]}
    assert parts_of(pessimist, ["x"]) == {"0": [1.0], "1": [2.0], "2": [6.0]}
    assert score(Ensemble(members(1.0, 2.0, 6.0), penalty=0.0), ["x"]) == [3.0]
    assert score(Ensemble(members(0.3, 0.3)), ["x"]) == [pytest.approx(0.3)]
    assert score(Ensemble({"a": length, "b": odd_lengths_only}), ["x", "x y"]) == [1.0, None]


def test_scorers_load_from_yaml_specs():
    spec = {
        "class_path": "WeightedSum",
        "init_args": {
            "scorers": {
                "short": {"class_path": "LengthPenalty", "init_args": {"coef": 1.0}},
                "members": {
                    "class_path": "rlhf_lightning.scoring.composition.Ensemble",
                    "init_args": {"scorers": [{"class_path": "RepetitionPenalty", "init_args": {"n": 1}}] * 2},
                },
            },
            "weights": {"members": 4.0},
        },
    }
    assert score(load_scorer(spec), ["a a", "a b c"]) == [-4.0, -3.0]


class Movable(Scorer):
    device = None

    def __call__(self, prompts, completions, **columns):
        return [0.0] * len(completions)

    def to(self, device):
        self.device = device
        return self


def test_to_moves_all_members():
    inner = Movable()
    total = WeightedSum({"a": WeightedSum({"b": inner})})
    assert total.to(torch.device("meta")) is total and inner.device == torch.device("meta")


@pytest.mark.parametrize(
    ("make", "code", "message"),
    [
        (lambda: WeightedSum({}), "no-scorers", "WeightedSum needs at least one scorer"),
        (
            lambda: WeightedSum({"a": length}, weights={"b": 1.0}),
            "unknown-scorer",
            "weights names b, but the scorers are a",
        ),
        (lambda: WeightedSum({"a": length}, missing="zero"), "unknown-choice", "missing is 'zero'"),
        (lambda: Ensemble([length]), "invalid-ensemble", "needs at least two members"),
        (lambda: score(WeightedSum({"a": lambda p, c, **k: [math.nan] * 3})), "not-finite", "scorer 'a' returned nan"),
        (
            lambda: score(WeightedSum({"a": lambda p, c, **k: [1.0]})),
            "number-of-scores",
            "scorer 'a' returned 1 scores for 3",
        ),
    ],
)
def test_invalid_arguments_are_refused(make, code, message):
    with refused(code, message):
        make()


@pytest.mark.parametrize(
    ("spec", "code", "words"),
    [
        ({"class_path": "WeightedSum"}, "wrong-arguments", ["WeightedSum", "missing a required argument: 'scorers'"]),
        ({"class_path": "LengthPenalty", "init_args": {"cof": 1}}, "wrong-arguments", ["'cof'", "it takes"]),
        ({"class": "LengthPenalty"}, "wrong-arguments", ["a scorer is written {class_path"]),
        ({"class_path": "math.sqrt", "init_args": {"a": 1}}, "wrong-arguments", ["is not a class", "['a']"]),
        ("WeightedSums", "unknown-name", ["did you mean WeightedSum?"]),
    ],
)
def test_invalid_scorer_specs_are_refused(spec, code, words):
    with refused(code, *words):
        load_scorer(spec)


def zero(prompts, completions, **columns):
    return [0.0] * len(completions)


def one(prompts, completions, **columns):
    return [1.0] * len(completions)


def test_a_list_of_scorers_is_named_by_index():
    total = WeightedSum([zero, one], weights=[5.0, 2.0])
    (judged,) = total(["p"], ["c"])
    assert judged.score == 2.0 and judged.parts == {"0": 0.0, "1": 1.0}
    assert WeightedSum([zero, one], weights={"1": 3})(["p"], ["c"])[0].score == 3.0


@pytest.mark.parametrize(
    ("scorers", "weights", "code"),
    [
        ("my_scores.brevity", None, "wrong-arguments"),
        (7, None, "wrong-arguments"),
        (None, None, "wrong-arguments"),
        ([], None, "no-scorers"),
        ({}, None, "no-scorers"),
        ([zero], "high", "wrong-arguments"),
        ([zero], 2.0, "wrong-arguments"),
        ([zero], [1.0, 2.0], "unknown-scorer"),
        ([zero], ["high"], "not-a-number"),
        ([zero], [None], "not-a-number"),
        ([zero], [True], "not-a-number"),
        ([zero], [[1.0]], "not-a-number"),
        ([zero], [math.nan], "not-a-number"),
        ([zero], [math.inf], "not-a-number"),
        ({"a": zero}, {"b": 1.0}, "unknown-scorer"),
        ([7], None, "wrong-kind"),
    ],
)
def test_invalid_weighted_sums_are_refused(scorers, weights, code):
    with refused(code):
        WeightedSum(scorers, weights)
