import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused

from rlhf_lightning.scoring import LearnedScorer, Scorer, checked_scores, load_scorer
from rlhf_lightning.scoring.scorer import BadScoresError, checked_judgements
from rlhf_lightning.types import Judgement

SOURCE = '''
"""Scores of one's own."""

def brevity(prompts, completions, weight=None, **columns):
    return [-float(len(text.split())) * (weight[i] if weight else 1.0) for i, text in enumerate(completions)]

class Constant:
    def __call__(self, prompts, completions, **columns):
        return [0.5] * len(completions)

class Needy:
    def __init__(self, threshold):
        self.threshold = threshold

    def __call__(self, prompts, completions, **columns):
        return [self.threshold] * len(completions)

class Silent:
    pass

PI = 3.14
'''


@pytest.fixture(autouse=True)
def own_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_scores.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_function_loads_by_import_path() -> None:
    scorer = load_scorer("own_scores.brevity")
    assert scorer(["p", "p"], ["one two", "three"]) == [-2.0, -1.0]
    assert scorer(["p", "p"], ["one two", "three"], weight=[10.0, 2.0]) == [-20.0, -2.0]


def test_a_class_loads_by_import_path_without_arguments() -> None:
    assert load_scorer("own_scores.Constant")(["p"], ["c"]) == [0.5]


def test_functions_and_scorer_objects_are_accepted() -> None:
    class Longest(Scorer):
        def __call__(self, prompts: Any, completions: Any, **columns: Any) -> list[float]:
            return [float(len(text)) for text in completions]

    own = Longest()
    assert load_scorer(own) is own
    assert own.to(torch.device("cpu")) is own
    plain = load_scorer(lambda prompts, completions, **columns: [float(len(prompts[0]))])
    assert isinstance(plain, Scorer) and plain(["abc"], ["d"]) == [3.0]


@pytest.mark.parametrize(
    ("spec", "code", "words"),
    [
        ("own_scores.kindness", "not-importable", "own_scores has no kindness"),
        ("no_such_module.score", "not-importable", "No module named"),
        ("brevity", "unknown-name", "there is no scorer 'brevity'"),
        ("own_scores.PI", "wrong-kind", "scorer 'own_scores.PI' is a float"),
        ("own_scores.Needy", "wrong-arguments", "'threshold'"),
        ("own_scores.Silent", "wrong-kind", "'own_scores.Silent' is a class; it must be a function, or a class whose"),
    ],
)
def test_invalid_import_paths_are_refused(spec: str, code: str, words: str) -> None:
    with refused(code, words):
        load_scorer(spec)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with refused("no-model", f"there is no model folder {tmp_path}/runs/reward/model"):
        load_scorer(f"{tmp_path}/runs/reward/model")


def test_a_model_folder_becomes_a_learned_scorer(reward_folder: str) -> None:
    assert isinstance(load_scorer(reward_folder), LearnedScorer)


def test_a_scorer_class_must_define_call() -> None:
    with refused("undefined-method", "Half must define '__call__'"):
        type("Half", (Scorer,), {})()(["p"], ["c"])


@pytest.mark.parametrize(
    "scores",
    [[1, 2.5, -3], (1.0, 2.5, -3.0), torch.tensor([[1.0], [2.5], [-3.0]]), torch.tensor([1.0, 2.5, -3.0]).double()],
)
def test_scores_are_fp32_on_the_cpu(scores: Any) -> None:
    found = checked_scores(scores, 3, "scorer")
    assert found.dtype == torch.float32 and found.tolist() == [1.0, 2.5, -3.0]


def test_scores_carry_no_gradient() -> None:
    assert not checked_scores(torch.ones(2, requires_grad=True) * 2, 2, "scorer").requires_grad


@pytest.mark.parametrize(
    ("scores", "code", "message"),
    [
        ([1.0, 2.0], "number-of-scores", "scorer 'x' returned 2 scores for 3 completions; it must return one for each"),
        ([], "number-of-scores", "scorer 'x' returned 0 scores for 3 completions"),
        (torch.zeros(3, 2), "number-of-scores", "scorer 'x' returned 6 scores for 3 completions"),
        ([0.0, 1.0, math.nan], "not-finite", "scorer 'x' returned nan for completion 2; 1 of 3 are not finite"),
        ([-math.inf, 1.0, math.nan], "not-finite", "scorer 'x' returned -inf for completion 0; 2 of 3 are not finite"),
        (None, "not-numbers", "scorer 'x' must return one number for each completion: it returned None"),
        (["good", "bad", "good"], "not-numbers", "scorer 'x' must return one number for each completion"),
    ],
)
def test_invalid_scores_are_refused(scores: Any, code: str, message: str) -> None:
    with refused(code, message):
        checked_scores(scores, 3, "scorer 'x'")


@pytest.mark.parametrize("part", ["", "a\x1b[2J", "\u202eb", "line\nbreak", "x" * 101, 7, None])
def test_part_names_must_be_printable_and_short(part):
    with refused("part-name", "printable characters"):
        checked_judgements([Judgement(1.0, {part: 1.0, "good": 2.0})], 1, "x")


def test_extreme_scores_warn():
    for scores in ([1e30, 1.0], [-1e30, 1.0], torch.tensor([1e7, 0.0])):
        with pytest.warns(UserWarning, match="returned scores beyond 1e\\+06"):
            checked_scores(scores, 2, "x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checked_scores([1e5, None], 2, "x")


@pytest.mark.parametrize(
    "scores", [{0: 1.0}, {1.0, 2.0}, "12", [[1.0, 2.0]], [10**400, 1.0], [1 + 2j, 1.0], [b"1", 1.0]]
)
def test_scores_that_are_not_numbers_are_refused(scores):
    with pytest.raises(BadScoresError, match="x "):
        checked_scores(scores, 2, "x")
