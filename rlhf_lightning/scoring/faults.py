"""Scorers that may fail: they are asked again, and what still has no score ends the run or is left out of it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from rlhf_lightning.errors import RlhfError, SettingError
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.loading import LoadSettings
from rlhf_lightning.sampling.json_server import ServerError
from rlhf_lightning.scoring.learned import LearnedScorer
from rlhf_lightning.scoring.scorer import Measured, MissingColumnError, Scorer, Scores, load_scorer
from rlhf_lightning.scoring.workers import Outcome, Row, WorkerPool, judged, miscounted
from rlhf_lightning.types import Judgement, Prompt, Rollout


class ScorerFailedError(RlhfError, RuntimeError):
    """A completion has no score, however often the scorer was asked."""


class FaultTolerant(Scorer):
    """Another scorer whose faults are retried and then either end the run or cost the completion.

    Faults are an error, a process that dies, an answer that comes too late, another number of scores than completions,
    and a score that is NaN, infinite or no number. A None is no fault: the scorer says that it cannot judge.

    With ``seconds`` each completion is scored by itself in other processes, which are killed when its time is up,
    whatever the function does; it must be importable there. Without, the scorer gets all completions at once in this
    process, and one by one where that fails, so that a bad completion does not cost the others.

    Faults are told apart from wrong answers by metrics, shares of the completions: ``score_failed``,
    ``score_timed_out``, and ``score_retried`` for those that took more than one attempt.

    Args:
        scorer: what `load_scorer` takes, or a Scorer or function (with ``seconds`` one that can be pickled).
        on_fault: "raise" ends the run with the scorer's own message; "drop" gives no score, so that nothing is learned
            from the completion; "zero" scores it 0, where the completion itself is to blame.
        retries: how often completions without a score are tried again.
        wait: before the first repetition, seconds; doubles from one to the next.
        seconds: what one completion may take, without the start of its process; None does not bound it.
        workers: processes side by side, with ``seconds``.
        most_in_a_row: with "drop", faults of so many completions in a row end the run: the scorer is gone, and there is
            nothing to learn from.

    Raises:
        SettingError: a setting is out of range, or the scorer is or has a reward model.
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
        if on_fault not in ("raise", "drop", "zero"):
            raise SettingError("unknown-choice", f"on_fault is {on_fault!r}; choose 'raise', 'drop' or 'zero'")
        if (seconds is not None and seconds <= 0) or workers < 1 or most_in_a_row < 1:
            raise SettingError(
                "setting-out-of-range",
                f"seconds is {seconds}, workers {workers}, most_in_a_row {most_in_a_row}: each must be positive",
            )
        if retries < 0 or wait < 0:
            raise SettingError("setting-out-of-range", f"retries is {retries} and wait {wait}: each must be at least 0")
        self.scorer = load_scorer(scorer)  # what cannot be loaded should fail now
        if _has_model(self.scorer):
            raise SettingError(
                "wraps-reward-model",
                "FaultTolerant cannot wrap a reward model, which does not fail on single completions; "
                "wrap the other scorers",
            )
        self.on_fault, self.retries, self.wait, self.most_in_a_row = on_fault, retries, wait, most_in_a_row
        self._pool = None if seconds is None else WorkerPool(scorer, seconds, workers)
        self._measured = Measured("score_failed", "score_timed_out", "score_retried")
        self._in_a_row = 0
        self._last_fault: Outcome = ("failed", "")

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        """Return one score per completion; of faults what ``on_fault`` says.

        Raises:
            ScorerFailedError: a completion has no score and ``on_fault`` is "raise", or too many in a row have none.
        """
        rows: list[Row] = [
            ([prompt], [text], {name: [values[row]] for name, values in columns.items()})
            for row, (prompt, text) in enumerate(zip(prompts, completions, strict=True))
        ]
        outcomes = self._outcomes(rows)
        self._measured.add("score_failed", [float(kind == "failed") for kind, _ in outcomes])
        self._measured.add("score_timed_out", [float(kind == "timed_out") for kind, _ in outcomes])
        return [self._score(row, *outcome) for row, outcome in enumerate(outcomes)]

    def _score(self, row: int, kind: str, value: Any) -> float | Judgement | None:
        self._in_a_row = 0 if kind == "scored" else self._in_a_row + 1
        if kind == "scored":
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

    def _outcomes(self, rows: Sequence[Row]) -> list[Outcome]:
        """Return what became of each row after all attempts."""
        outcomes, retried = self._attempt(rows), [0.0] * len(rows)
        for attempt in range(self.retries):
            left = [row for row, (kind, _) in enumerate(outcomes) if kind != "scored"]
            if not left:
                break
            time.sleep(self.wait * 2**attempt)
            for row, outcome in zip(left, self._attempt([rows[row] for row in left]), strict=True):
                outcomes[row], retried[row] = outcome, 1.0
        self._measured.add("score_retried", retried)
        return outcomes

    def _attempt(self, rows: Sequence[Row]) -> list[Outcome]:
        """Return what became of each row in one attempt."""
        if self._pool is not None:
            return self._pool.outcomes(rows)
        found = self._together(rows)
        if found is None:  # of the call as a whole: some of the rows may be as good as ever
            return [one for row in rows for one in self._together([row]) or [self._last_fault]]
        return found

    def _together(self, rows: Sequence[Row]) -> list[Outcome] | None:
        """Ask the scorer for all rows at once; return None where that failed and asking for fewer may help."""
        names = rows[0][2] if rows else {}
        columns = {name: [row[2][name][0] for row in rows] for name in names}
        try:
            scores = list(self.scorer([row[0][0] for row in rows], [row[1][0] for row in rows], **columns))
        except MissingColumnError:
            raise
        except ServerError as error:  # it was asked often enough, and is gone for all of them
            return [("failed", str(error))] * len(rows)
        except Exception as error:  # noqa: BLE001 - of a user's function, which may raise anything
            self._last_fault = ("failed", f"{type(error).__name__}: {error}")
            return None
        if len(scores) != len(rows):
            self._last_fault = miscounted(len(scores), len(rows))
            return None
        return [judged(score) for score in scores]

    @property
    def models(self) -> Sequence[nn.Module]:
        """The networks of the scorer."""
        return self.scorer.models

    def load_beside(self, policy: CausalLM | None, settings: LoadSettings) -> None:
        """Load what the scorer needs."""
        self.scorer.load_beside(policy, settings)

    def to(self, device: Any) -> Scorer:
        """Move the scorer."""
        self.scorer = self.scorer.to(device)
        return self

    def take_metrics(self) -> dict[str, Tensor]:
        """Return 1 for each completion with a fault of its kind and 0 for the others, and the scorer's own metrics."""
        return {**self.scorer.take_metrics(), **self._measured.take()}

    def on_rollout_end(self, rollout: Rollout, means: Mapping[str, float]) -> None:
        """Tell the scorer. Processes of their own (``seconds``) keep the state that they started with."""
        self.scorer.on_rollout_end(rollout, means)

    def state_dict(self) -> dict[str, Any]:
        """Return the scorer's state."""
        return self.scorer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the scorer's state."""
        self.scorer.load_state_dict(state)

    def close(self) -> None:
        """End the processes; the next completion starts new ones."""
        if self._pool is not None:
            self._pool.close()


def _has_model(scorer: Scorer) -> bool:
    """Whether a scorer is a reward model or is made of one."""
    return isinstance(scorer, LearnedScorer) or any(map(_has_model, getattr(scorer, "scorers", {}).values()))
