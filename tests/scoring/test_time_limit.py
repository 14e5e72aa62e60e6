"""A scorer that hangs, dies or raises costs one completion, and is told apart from a wrong answer."""

import sys
import time
from pathlib import Path

import pytest

HERE = str(Path(__file__).resolve().parent)
if HERE not in sys.path:
    sys.path.insert(0, HERE)

import hanging_scores  # noqa: E402

from rlhf_lightning.scoring import TimeLimit, WeightedSum, checked_scores  # noqa: E402
from rlhf_lightning.scoring.time_limit import ScorerFailedError  # noqa: E402


@pytest.fixture(scope="module")
def limited():
    scorer = TimeLimit("hanging_scores.by_text", seconds=1.0, workers=2, on_failure="drop")
    yield scorer
    scorer.close()


def score(scorer, texts, **columns):
    return scorer(["p"] * len(texts), texts, **columns)


def taken(scorer):
    return {name: values.tolist() for name, values in scorer.take_metrics().items()}


def test_what_goes_wrong_is_dropped_and_counted_by_kind(limited):
    assert score(limited, ["ok"]) == [2.0]  # the processes are up
    limited.take_metrics()
    started = time.monotonic()
    found = score(limited, ["hang", "four", "die", "raise", "none", "hang", "x"])
    assert found == [None, 4.0, None, None, None, None, 1.0]
    assert time.monotonic() - started < 30
    assert taken(limited) == {
        "score_failed": [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0],
        "score_timed_out": [1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0],
    }


def test_metrics_have_the_same_names_when_nothing_was_scored(limited):
    limited.take_metrics()
    assert taken(limited) == {"score_failed": [], "score_timed_out": []}


def test_columns_come_along_row_by_row(limited):
    assert score(limited, ["a", "bc", "def"], bonus=[10.0, 20.0, 30.0]) == [11.0, 22.0, 33.0]


def test_what_the_scorer_started_dies_with_it(limited, tmp_path):
    path = str(tmp_path / "written")
    assert score(limited, ["child"], path=[path]) == [None]
    time.sleep(2.5)
    assert not hanging_scores.exists(path)


def test_nan_is_an_error_whatever_happens_to_failures(limited):
    with pytest.raises(ValueError, match="TimeLimit returned nan for completion 1"):
        checked_scores(score(limited, ["a", "nan"]), 2, "TimeLimit", allow_missing=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [("raise", "completion 0 could not be scored: RuntimeError: no such thing"), ("die", "exit code 3")],
)
def test_raise_stops_with_the_scorers_own_message(limited, monkeypatch, text, message):
    monkeypatch.setattr(limited, "on_failure", "raise")
    with pytest.raises(ScorerFailedError, match=message):
        score(limited, [text])


def test_zero_blames_the_completion_and_still_counts_it(limited, monkeypatch):
    monkeypatch.setattr(limited, "on_failure", "zero")
    limited.take_metrics()
    assert score(limited, ["hang", "ab"]) == [0.0, 2.0]
    assert taken(limited)["score_timed_out"] == [1.0, 0.0]


def test_failures_of_a_part_are_failures_of_the_sum(limited):
    limited.take_metrics()
    total = WeightedSum({"limited": limited, "length": lambda prompts, completions, **c: [1.0] * len(completions)})
    assert score(total, ["raise", "ab"]) == [None, 3.0]
    assert taken(total)["score_failed"] == [1.0, 0.0]


def test_as_many_scores_as_completions():
    scorer = TimeLimit("hanging_scores.two_scores", workers=1)
    with pytest.raises(ScorerFailedError, match="it returned 2 scores for one completion"):
        score(scorer, ["a"])
    scorer.close()


def test_what_no_process_can_be_given_is_refused():
    with pytest.raises(ScorerFailedError, match="cannot be handed to another process"):
        score(TimeLimit(lambda prompts, completions, **columns: [1.0]), ["a"])


def test_settings_that_are_wrong():
    with pytest.raises(ValueError, match="on_failure is 'ignore'"):
        TimeLimit("hanging_scores.by_text", on_failure="ignore")
    with pytest.raises(ValueError, match="both must be positive"):
        TimeLimit("hanging_scores.by_text", seconds=0)
    with pytest.raises(ValueError, match="neither a reward model's folder nor an importable function"):
        TimeLimit("hanging_scores.by_txt")
