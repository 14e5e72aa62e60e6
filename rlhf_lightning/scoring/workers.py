"""Processes that score completions one at a time, and are killed when their time is up."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

from rlhf_lightning.errors import RlhfError
from rlhf_lightning.scoring.scorer import Scorer, load_scorer
from rlhf_lightning.types import Judgement, Prompt

START_SECONDS = 120.0
"""What a process may take to import the scorer before it counts as failed."""

Outcome = tuple[Literal["scored", "failed", "timed_out"], Any]
"""What became of a completion, and its score (a number, a `Judgement`, or None) or what went wrong."""

Row = tuple[list[Prompt], list[str], dict[str, list[Any]]]
"""Prompt, completion and further columns of one completion, as a scorer takes them."""


class WorkerFailedError(RlhfError, RuntimeError):
    """A process cannot be started."""


class WorkerPool:
    """Scores completions one by one in processes of their own, each with a limit that is kept.

    A process that is over its time is killed with all that it started, so a loop without end or a C extension that
    never returns cost ``seconds`` and no more. Processes are fresh interpreters that import the scorer anew, never
    copies of this one; they start with the first completions and serve until the pool is closed.

    Args:
        scorer: what `load_scorer` takes, or a Scorer or function that can be pickled.
        seconds: what one completion may take, without the start of the process.
        workers: processes side by side.
    """

    def __init__(self, scorer: Any, seconds: float, workers: int) -> None:
        self.scorer, self.seconds, self.workers = scorer, seconds, workers
        self._pool: list[Worker] = []

    def outcomes(self, rows: Sequence[Row]) -> list[Outcome]:
        """Hand the rows to the processes as these become free; return what became of each row.

        Raises:
            WorkerFailedError: the scorer cannot be handed to another process.
        """
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
            raise WorkerFailedError(
                "not-importable",
                f"{scorer!r} cannot be handed to another process ({error}); name an importable function or class",
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
        scores = list(scorer(prompts, completions, **columns))
        return judged(scores[0]) if len(scores) == 1 else miscounted(len(scores), 1)
    except Exception as error:  # noqa: BLE001 - of a user's function, which may raise anything
        return "failed", f"{type(error).__name__}: {error}"


def judged(score: Any) -> Outcome:
    """Return a score as a number, a `Judgement`, or None where the scorer cannot judge; other values have failed."""
    if score is None:
        return "scored", None
    if isinstance(score, Judgement):
        kind, value = judged(score.score)
        return kind, score._replace(score=value) if kind == "scored" else value
    try:
        value = float(score)
    except (TypeError, ValueError, RuntimeError):
        return "failed", f"it returned {score!r}, which is no number"
    return ("scored", value) if math.isfinite(value) else ("failed", f"it returned {value}")


def miscounted(found: int, asked: int) -> Outcome:
    """Return what went wrong where a scorer returned another number of scores than it was asked for."""
    return "failed", f"it returned {found} scores for {'one completion' if asked == 1 else f'{asked} completions'}"
