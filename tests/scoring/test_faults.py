"""A scorer that hangs, dies, raises or returns nonsense loses one completion, which does not count as wrong."""

import math
import sys
import time
from pathlib import Path

import pytest
from conftest import refused

HERE = str(Path(__file__).resolve().parent)
if HERE not in sys.path:
    sys.path.insert(0, HERE)

import hanging_scores  # noqa: E402

from rlhf_lightning.scoring import FaultTolerant, WeightedSum, checked_scores  # noqa: E402


@pytest.fixture(scope="module")
def limited():
    scorer = FaultTolerant("hanging_scores.by_text", seconds=1.0, workers=2, on_fault="drop")
    yield scorer
    scorer.close()


def score(scorer, texts, **columns):
    return scorer(["p"] * len(texts), texts, **columns)


def taken(scorer):
    return {name: values.tolist() for name, values in scorer.take_metrics().items()}


def test_failed_scores_are_dropped_and_counted_by_kind(limited):
    assert score(limited, ["ok"]) == [2.0]  # the worker processes are running
    limited.take_metrics()
    started = time.monotonic()
    found = score(limited, ["hang", "four", "die", "raise", "none", "hang", "x", "nan"])
    assert found == [None, 4.0, None, None, None, None, 1.0, None]
    assert time.monotonic() - started < 30
    assert taken(limited) == {
        "score_failed": [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0],
        "score_timed_out": [1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0],
        "score_retried": [0.0] * 8,
    }


def test_metrics_have_the_same_names_when_nothing_was_scored(limited):
    limited.take_metrics()
    assert taken(limited) == {"score_failed": [], "score_timed_out": [], "score_retried": []}


def test_columns_are_passed_row_by_row(limited):
    assert score(limited, ["a", "bc", "def"], bonus=[10.0, 20.0, 30.0]) == [11.0, 22.0, 33.0]


def test_child_processes_of_a_killed_scorer_are_killed(limited, tmp_path):
    path = str(tmp_path / "written")
    assert score(limited, ["child"], path=[path]) == [None]
    time.sleep(2.5)
    assert not hanging_scores.exists(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise", "completion 0 could not be scored: RuntimeError: no such thing"),
        ("die", "exit code 3"),
        ("nan", "it returned nan"),
        ("hang", "it took longer than 1 s"),
    ],
)
def test_on_fault_raise_reports_the_scorers_own_message(limited, monkeypatch, text, message):
    monkeypatch.setattr(limited, "on_fault", "raise")
    with refused("completion-not-scored", message):
        score(limited, [text])


def test_on_fault_zero_scores_0_and_counts_the_failure(limited, monkeypatch):
    monkeypatch.setattr(limited, "on_fault", "zero")
    limited.take_metrics()
    assert score(limited, ["hang", "ab"]) == [0.0, 2.0]
    assert taken(limited)["score_timed_out"] == [1.0, 0.0]


def test_failures_of_a_part_fail_the_sum(limited):
    limited.take_metrics()
    total = WeightedSum({"limited": limited, "length": lambda prompts, completions, **c: [1.0] * len(completions)})
    assert [one.score for one in score(total, ["raise", "ab"])] == [None, 3.0]
    assert taken(total)["score_failed"] == [1.0, 0.0]


def test_a_scorer_that_cannot_be_pickled_is_refused():
    with refused("not-importable", "cannot be handed to another process"):
        score(FaultTolerant(lambda prompts, completions, **columns: [1.0], seconds=1.0), ["a"])


# -- in this process --------------------------------------------------------------------------------------------------


class Calls:
    """Runs the test scorer in this process and records its requests."""

    def __init__(self, fails=0):
        self.asked, self.fails = [], fails

    def __call__(self, prompts, completions, **columns):
        self.asked.append(list(completions))
        if len(self.asked) <= self.fails:
            raise ConnectionError("not yet")
        return hanging_scores.by_text(prompts, completions, **columns)


def test_a_failing_completion_does_not_affect_the_others():
    calls = Calls()
    scorer = FaultTolerant(calls, on_fault="drop")
    assert score(scorer, ["ab", "raise", "nan", "none", "c"]) == [2.0, None, None, None, 1.0]
    assert calls.asked == [["ab", "raise", "nan", "none", "c"], ["ab"], ["raise"], ["nan"], ["none"], ["c"]]
    assert taken(scorer)["score_failed"] == [0.0, 1.0, 1.0, 0.0, 0.0]


def test_a_temporarily_failing_scorer_is_retried():
    calls = Calls(fails=4)  # the whole batch, each completion alone, and the whole batch again
    scorer = FaultTolerant(calls, retries=2, wait=0.01)
    assert score(scorer, ["ab", "c"]) == [2.0, 1.0]
    assert calls.asked == [["ab", "c"], ["ab"], ["c"], ["ab", "c"], ["ab"], ["c"]]
    assert taken(scorer) == {"score_failed": [0.0] * 2, "score_timed_out": [0.0] * 2, "score_retried": [1.0] * 2}


def test_retries_are_bounded():
    calls = Calls(fails=99)
    with refused("completion-not-scored", "completion 0 could not be scored: ConnectionError: not yet"):
        score(FaultTolerant(calls, retries=3, wait=0.001), ["a"])
    assert len(calls.asked) == 2 * 4


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0, 2.0], "it returned 2 scores for one completion"),
        ([], "it returned 0 scores for one completion"),
        (None, "TypeError: 'NoneType' object is not iterable"),
        ([math.inf], "it returned inf"),
        (["good"], "it returned 'good', which is not a number"),
    ],
)
def test_invalid_scores_are_refused_or_dropped(returned, message):
    with refused("completion-not-scored", message):
        score(FaultTolerant(lambda prompts, completions, **columns: returned), ["a"])
    assert score(FaultTolerant(lambda prompts, completions, **columns: returned, on_fault="drop"), ["a"]) == [None]
    with pytest.raises(ValueError, match="the scorer"):
        checked_scores(returned, 1, "the scorer")


def test_a_permanently_failing_scorer_stops_the_run():
    scorer = FaultTolerant(Calls(fails=10**6), on_fault="drop", most_in_a_row=5)
    assert score(scorer, ["a"] * 4) == [None] * 4
    with refused("scorer-keeps-failing", "5 completions in a row could not be scored, the last because: Conn"):
        score(scorer, ["a"])
    scorer = FaultTolerant(Calls(), on_fault="drop", most_in_a_row=2)
    assert score(scorer, ["raise", "a", "raise", "a"]) == [None, 1.0, None, 1.0]


def test_a_missing_data_column_is_an_error_and_not_a_fault():
    scorer = FaultTolerant("MathAnswerScorer", on_fault="drop")
    with refused("missing-data-column", "needs the data column"):
        score(scorer, ["a"])


def test_invalid_settings_are_refused(reward_folder):
    with refused("unknown-choice", "on_fault is 'ignore'"):
        FaultTolerant("hanging_scores.by_text", on_fault="ignore")
    with refused("setting-out-of-range", "seconds is 0"):
        FaultTolerant("hanging_scores.by_text", seconds=0)
    with refused("setting-out-of-range", "retries is -1", "at least 0"):
        FaultTolerant("hanging_scores.by_text", retries=-1)
    with refused("not-importable", "did you mean hanging_scores.by_text?"):
        FaultTolerant("hanging_scores.by_txt")
    sum_of_models = WeightedSum({"learned": reward_folder, "other": "hanging_scores.by_text"})
    for scorer in (reward_folder, sum_of_models):
        with refused("wraps-reward-model", "wrap the other scorers"):
            FaultTolerant(scorer)
