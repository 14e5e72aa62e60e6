"""Scorers that may hang or die: each completion is scored in another process, which is killed when its time is up."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

from torch import Tensor

from rlhf_lightning.scoring.base import Measured, Scorer, Scores
from rlhf_lightning.scoring.learned import LearnedScorer
from rlhf_lightning.scoring.loading import load_scorer
from rlhf_lightning.types import Prompt

START_SECONDS = 120.0
"""What a process may take to import the scorer before it counts as failed."""

Outcome = tuple[Literal["scored", "failed", "timed_out"], Any]


class ScorerFailedError(RuntimeError):
    """A scorer raised an error, died, or took longer than it may."""


class TimeLimit(Scorer):
    """Another scorer, one completion at a time in processes of their own, each call with a limit that is kept.

    A process that is over its time is killed with all that it started, so a loop without end or a C extension that
    never returns cost ``seconds`` and no more. What went wrong is told apart from a wrong answer: the metrics
    ``score_failed`` (the scorer raised an error or its process died) and ``score_timed_out`` are shares of the
    completions. A scorer that returns NaN is refused as everywhere.

    Processes are fresh interpreters that import the scorer anew, never copies of this one, so a function must be
    importable; they start with the first completions and serve until the run ends.

    Args:
        scorer: what `load_scorer` takes, or a Scorer or function that can be pickled.
        seconds: what one completion may take, without the start of the process.
        workers: processes side by side.
        on_failure: "raise" stops the run with the scorer's own message; "drop" gives no score, so that a critic-free
            module learns nothing from the completion; "zero" scores it 0, where the completion itself is to blame.
    """

    def __init__(
        self,
        scorer: Any,
        seconds: float = 5.0,
        workers: int = 2,
        on_failure: Literal["raise", "drop", "zero"] = "raise",
    ) -> None:
        if on_failure not in ("raise", "drop", "zero"):
            raise ValueError(f"on_failure is {on_failure!r}: it must be 'raise', 'drop' or 'zero'")
        if seconds <= 0 or workers < 1:
            raise ValueError(f"seconds is {seconds} and workers {workers}: both must be positive")
        if isinstance(load_scorer(scorer), LearnedScorer):  # what cannot be loaded should fail now
            raise ValueError("a reward model neither hangs nor fails on one completion alone: use it without TimeLimit")
        self.scorer, self.seconds, self.workers, self.on_failure = scorer, seconds, workers, on_failure
        self._measured = Measured("score_failed", "score_timed_out")
        self._pool: list[Worker] = []

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        """Return one score per completion; of failures what ``on_failure`` says.

        Raises:
            ScorerFailedError: a completion could not be scored, and ``on_failure`` is "raise".
        """
        rows = [
            ([prompt], [text], {name: [values[row]] for name, values in columns.items()})
            for row, (prompt, text) in enumerate(zip(prompts, completions, strict=True))
        ]
        outcomes = self._outcomes(rows)
        self._measured.add("score_failed", [float(kind == "failed") for kind, _ in outcomes])
        self._measured.add("score_timed_out", [float(kind == "timed_out") for kind, _ in outcomes])
        return [self._score(row, *outcome) for row, outcome in enumerate(outcomes)]

    def _score(self, row: int, kind: str, value: Any) -> float | None:
        if kind == "scored":
            return value
        if self.on_failure == "raise":
            raise ScorerFailedError(
                f"completion {row} could not be scored: {value}. on_failure: drop goes on without it"
            )
        return 0.0 if self.on_failure == "zero" else None

    def _outcomes(self, rows: Sequence[Any]) -> list[Outcome]:
        """Hand the rows to the processes as these become free; return what became of each row."""
        outcomes: dict[int, Outcome] = {}
        waiting = deque(range(len(rows)))
        while len(outcomes) < len(rows):
            while waiting and (worker := self._free_worker()):
                worker.give(waiting[0], rows[waiting.popleft()], self.seconds)
            busy = [worker for worker in self._pool if worker.row is not None]
            patience = max(min(worker.deadline for worker in busy) - time.monotonic(), 0.0)
            wait([worker.connection for worker in busy], patience)
            for worker in busy:
                row, outcome = worker.row, worker.outcome()
                if outcome is not None and row is not None:
                    outcomes[row] = outcome
            self._pool = [worker for worker in self._pool if worker.alive]
        return [outcomes[row] for row in range(len(rows))]

    def _free_worker(self) -> Worker | None:
        free = next((worker for worker in self._pool if worker.row is None), None)
        if free is None and len(self._pool) < self.workers:
            self._pool.append(free := Worker(self.scorer))
        return free

    def take_metrics(self) -> dict[str, Tensor]:
        """Return 1 for each completion that failed or timed out, and 0 for the others."""
        return self._measured.take()

    def close(self) -> None:
        """End the processes; the next completion starts new ones."""
        for worker in self._pool:
            worker.kill()
        self._pool = []

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # the interpreter may be half gone
            self.close()


class Worker:
    """A process that scores one row at a time.

    Attributes:
        connection: where its answers come from.
        row: number of the row it is at; None when it is free.
        deadline: when its time for the row is up, on the monotonic clock.
        alive: whether it can be given another row.
    """

    def __init__(self, scorer: Any) -> None:
        context: Any = multiprocessing.get_context(start_method())
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, scorer), daemon=True)
        try:
            self.process.start()
        except (AttributeError, TypeError, ValueError, OSError) as error:
            raise ScorerFailedError(
                f"{scorer!r} cannot be handed to another process ({error}); name an importable function or class"
            ) from error
        theirs.close()
        self.row: int | None = None
        self.deadline, self.alive, self._ready, self._seconds = 0.0, True, False, 0.0

    def give(self, row: int, content: Any, seconds: float) -> None:
        """Hand a row over."""
        self.row, self._seconds = row, seconds
        self.deadline = time.monotonic() + (seconds if self._ready else START_SECONDS)
        with contextlib.suppress(OSError):  # it has died: `outcome` says so
            self.connection.send(content)

    def outcome(self) -> Outcome | None:
        """Return what became of the row, None while that is open. A process that failed to answer is killed."""
        try:
            if self.connection.poll():
                found = self.connection.recv()
                if found == "ready":  # its time begins now
                    self._ready, self.deadline = True, time.monotonic() + self._seconds
                    return None
                self.row = None
                return found
        except (EOFError, OSError):
            self.kill()
            return "failed", f"its process ended with exit code {self.process.exitcode}"
        if time.monotonic() < self.deadline:
            return None
        self.kill()
        limit = self._seconds if self._ready else START_SECONDS
        return "timed_out", f"it took longer than {limit:g} s" + ("" if self._ready else " to start")

    def kill(self) -> None:
        """End the process and all that it started, at once."""
        self.alive, self.row = False, None
        self.connection.close()
        if self.process.pid is not None and hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.join(timeout=5)


def start_method() -> str:
    """Return how processes start: from a clean server where there is one, since copies of a process with threads hang.

    The server imports this room once, and a process that replaces a killed one starts in milliseconds.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    return "forkserver"


def serve(connection: Connection, spec: Any) -> None:
    """Score rows until the other side is gone. Runs in a process of its own."""
    if hasattr(os, "setsid"):
        os.setsid()  # a group of its own: what the scorer starts is killed with it
    with contextlib.suppress(EOFError, OSError):
        try:
            scorer = load_scorer(spec)
        except Exception as error:  # noqa: BLE001 - told to the side that waits for it
            connection.recv()
            connection.send(("failed", f"{type(error).__name__}: {error}"))
            return
        connection.send("ready")
        while True:
            connection.send(scored(scorer, *connection.recv()))


def scored(scorer: Scorer, prompts: list[Prompt], completions: list[str], columns: Mapping[str, Any]) -> Outcome:
    """Return the score of one row, or what went wrong."""
    try:
        score = list(scorer(prompts, completions, **columns))
        if len(score) != 1:
            return "failed", f"it returned {len(score)} scores for one completion"
        return "scored", None if score[0] is None else float(score[0])
    except Exception as error:  # noqa: BLE001 - of a user's function, which may raise anything
        return "failed", f"{type(error).__name__}: {error}"
