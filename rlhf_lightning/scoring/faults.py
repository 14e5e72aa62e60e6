"""Handle scorers that may fail: retry, with a time limit also in processes that can be killed.

Completions that still have no score end the run or are dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from rlhf_lightning.errors import RlhfError, SettingError, check_choice, check_range
from rlhf_lightning.sampling.json_server import ServerError
from rlhf_lightning.scoring.composition import ScorerGroup
from rlhf_lightning.scoring.learned import LearnedScorer, load_scorer
from rlhf_lightning.scoring.scorer import Measured, MissingColumnError, Scorer, Scores
from rlhf_lightning.types import Judgement, Prompt, Rollout
from rlhf_lightning.workers import Outcome, WorkerPool, with_retries

Row = tuple[list[Prompt], list[str], dict[str, list[Any]]]
"""Prompt, completion and columns of one completion, in the form of a scorer's arguments."""


class ScorerFailedError(RlhfError, RuntimeError):
    """A completion still has no score after all attempts."""


class FaultTolerant(ScorerGroup):
    """Wrap a scorer and retry its faults; after the last attempt the run ends or the completion has no score.

    A fault is an exception, a process that dies, a timeout, a wrong number of scores, or a score that is NaN, infinite
    or not a number. None is not a fault: the scorer says that it cannot judge the completion.

    With ``seconds`` each completion is scored alone in another process, which is killed at the time limit; the scorer
    must be importable there. Without ``seconds`` the scorer gets all completions at once in this process. If that
    fails, it gets them one by one, so that one bad completion does not affect the others.

    Metrics, as shares of the completions: ``score_failed``, ``score_timed_out``, and ``score_retried`` for more than
    one attempt.

    Args:
        scorer: a spec for `load_scorer`, a Scorer or a function; with ``seconds`` it must be picklable.
        on_fault: action after the last attempt. "raise" ends the run with the scorer's own message; "drop" gives no
            score, so that the completion is not trained on; "zero" scores it 0, for faults caused by the completion.
        retries: further attempts for completions without a score.
        wait: wait before the first retry, seconds; doubles each time.
        seconds: time limit of one completion, without the start of its process; null sets none.
        workers: number of processes, with ``seconds``.
        most_in_a_row: with "drop", number of consecutive faults that ends the run, since the scorer has failed.

    Raises:
        SettingError: a setting is out of range, or the scorer is or contains a reward model.
    """

    def __init__(
        self,
        scorer: Any,
        on_fault: Literal["raise", "drop", "zero"] = "raise",
        retries: int = 0,
        wait: float = 1.0,
        seconds: float | None = None,
        workers: int = 2,
        most_in_a_row: int = 256,
    ) -> None:
        check_choice(("raise", "drop", "zero"), on_fault=on_fault)
        given = {"seconds": seconds, "workers": workers, "most_in_a_row": most_in_a_row}
        check_range(all(value is None or value > 0 for value in given.values()), "each must be positive", **given)
        check_range(min(retries, wait) >= 0, "each must be at least 0", retries=retries, wait=wait)
        super().__init__({"scorer": scorer})  # with seconds too, so that a scorer that cannot be loaded fails now
        if _has_model(self):
            raise SettingError(
                "wraps-reward-model",
                "FaultTolerant cannot wrap a reward model, which does not fail on single completions; "
                "wrap the other scorers",
            )
        self.on_fault, self.retries, self.wait, self.most_in_a_row = on_fault, retries, wait, most_in_a_row
        self._pool = None if seconds is None else WorkerPool(row_scorer, scorer, seconds, workers)
        self.measured = Measured("score_failed", "score_timed_out", "score_retried")
        self._in_a_row = 0
        self._last_fault: Outcome = ("failed", "")

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        rows: list[Row] = [
            ([prompt], [text], {name: [values[row]] for name, values in columns.items()})
            for row, (prompt, text) in enumerate(zip(prompts, completions, strict=True))
        ]
        outcomes, repeated = with_retries(self._attempt, rows, self.retries, self.wait)
        self.measured.add("score_retried", [float(one) for one in repeated])
        self.measured.add("score_failed", [float(kind == "failed") for kind, _ in outcomes])
        self.measured.add("score_timed_out", [float(kind == "timed_out") for kind, _ in outcomes])
        return [self._score(row, *outcome) for row, outcome in enumerate(outcomes)]

    def _score(self, row: int, kind: str, value: Any) -> float | Judgement | None:
        self._in_a_row = 0 if kind == "done" else self._in_a_row + 1
        if kind == "done":
            return value
        if self.on_fault == "raise":
            raise ScorerFailedError(
                "completion-not-scored",
                f"completion {row} could not be scored: {value}; on_fault: drop continues without it",
            )
        if self.on_fault == "drop" and self._in_a_row >= self.most_in_a_row:
            raise ScorerFailedError(
                "scorer-keeps-failing",
                f"{self._in_a_row} completions in a row could not be scored, the last because: {value}; "
                "repair the scorer, and resume the run",
            )
        return 0.0 if self.on_fault == "zero" else None

    def _attempt(self, rows: Sequence[Row]) -> list[Outcome]:
        if self._pool is not None:
            return self._pool.outcomes(rows)
        found = self._together(rows)
        if found is None:
            return [one for row in rows for one in self._together([row]) or [self._last_fault]]
        return found

    def _together(self, rows: Sequence[Row]) -> list[Outcome] | None:
        """Call the scorer for all rows at once; return None if that failed and fewer rows may succeed."""
        names = rows[0][2] if rows else {}
        columns = {name: [row[2][name][0] for row in rows] for name in names}
        try:
            scores = list(self.scorers["scorer"]([row[0][0] for row in rows], [row[1][0] for row in rows], **columns))
        except MissingColumnError:
            raise
        except ServerError as error:  # its own retries are over, so it fails for all rows
            return [("failed", str(error))] * len(rows)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's function may raise anything
            self._last_fault = ("failed", f"{type(error).__name__}: {error}")
            return None
        if len(scores) != len(rows):
            self._last_fault = miscounted(len(scores), len(rows))
            return None
        return [judged(score) for score in scores]

    def on_rollout_end(self, rollout: Rollout, means: Mapping[str, float]) -> None:
        """Notify the scorer. With ``seconds`` the processes keep the state that they started with."""
        self.scorers["scorer"].on_rollout_end(rollout, means)

    def close(self) -> None:
        """End the processes; the next completion starts new ones."""
        if self._pool is not None:
            self._pool.close()


def _has_model(scorer: Scorer) -> bool:
    """Return whether a scorer is a reward model or contains one."""
    return isinstance(scorer, LearnedScorer) or any(map(_has_model, getattr(scorer, "scorers", {}).values()))


def row_scorer(spec: Any) -> Callable[[Row], Outcome]:
    """Return a function that scores one row, for use in a worker process."""
    scorer = load_scorer(spec)
    return lambda row: scored(scorer, *row)


def scored(scorer: Scorer, prompts: list[Prompt], completions: list[str], columns: Mapping[str, Any]) -> Outcome:
    """Return the outcome of scoring one row."""
    try:
        scores = list(scorer(prompts, completions, **columns))
        return judged(scores[0]) if len(scores) == 1 else miscounted(len(scores), 1)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's function may raise anything
        return "failed", f"{type(error).__name__}: {error}"


def judged(score: Any) -> Outcome:
    """Return a score as outcome: a number, a `Judgement` or None is "done", any other value is "failed"."""
    if score is None:
        return "done", None
    if isinstance(score, Judgement):
        kind, value = judged(score.score)
        return kind, score._replace(score=value) if kind == "done" else value
    try:
        value = float(score)
    except (TypeError, ValueError, RuntimeError):
        return "failed", f"it returned {score!r}, which is not a number"
    return ("done", value) if math.isfinite(value) else ("failed", f"it returned {value}")


def miscounted(found: int, asked: int) -> Outcome:
    """Return the outcome of a wrong number of scores."""
    return "failed", f"it returned {found} scores for {'one completion' if asked == 1 else f'{asked} completions'}"
