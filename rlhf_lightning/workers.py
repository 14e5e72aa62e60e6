"""Processes for user code that may hang or die, each row within a time limit; and forks that share out work."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, Literal, TypeVar

from rlhf_lightning.errors import RlhfError
from rlhf_lightning.working_directory import Carried

START_SECONDS = 120.0
"""Time limit of a process for importing the user's code."""

Outcome = tuple[Literal["done", "failed", "timed_out"], Any]
"""Outcome of a row: its result or what went wrong."""

Start = Callable[[Any], Callable[[Any], Outcome]]
"""Makes what works on a row, in the process."""


class WorkerFailedError(RlhfError, RuntimeError):
    """A process cannot be started."""


def with_retries(
    attempt: Callable[[Sequence[Any]], list[Outcome]], rows: Sequence[Any], retries: int, wait: float
) -> tuple[list[Outcome], list[bool]]:
    """Attempt rows, and those that fail up to ``retries`` times more; return the outcomes, and which took several.

    The wait before a repetition is ``wait`` seconds at first and doubles each time.
    """
    outcomes, repeated = attempt(rows), [False] * len(rows)
    for number in range(retries):
        left = [row for row, (kind, _) in enumerate(outcomes) if kind != "done"]
        if not left:
            break
        time.sleep(wait * 2**number)
        for row, outcome in zip(left, attempt([rows[row] for row in left]), strict=True):
            outcomes[row], repeated[row] = outcome, True
    return outcomes, repeated


class WorkerPool:
    """Works on rows one by one in processes, each row with an enforced time limit.

    A process that exceeds its time is killed with all its children, even in an endless loop or a C extension. Processes
    are fresh interpreters. They start with the first rows and live until the pool is closed.

    Args:
        start: importable function that is called with ``spec`` in each process and returns what works on a row.
        spec: what ``start`` takes; it must be picklable.
        seconds: time limit of one row, without the start of the process.
        workers: number of processes.
    """

    def __init__(self, start: Start, spec: Any, seconds: float, workers: int) -> None:
        self.start, self.spec, self.seconds, self.workers = start, spec, seconds, workers
        self._pool: list[Worker] = []

    def outcomes(self, rows: Sequence[Any]) -> list[Outcome]:
        """Hand the rows to processes as these become free; return the outcome of each row.

        Raises:
            WorkerFailedError: ``spec`` cannot be handed to another process.
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
            self._pool.append(free := Worker(self.start, self.spec))
        return free

    def close(self) -> None:
        """End the processes; the next row starts new ones."""
        for worker in self._pool:
            worker.kill()
        self._pool = []

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # the interpreter may be shutting down
            self.close()


class Worker:
    """A process that works on one row at a time.

    Attributes:
        connection: pipe of its answers.
        row: number of its current row; None when it is free.
        deadline: time limit of the row, on the monotonic clock.
        alive: whether it can be given another row.
    """

    def __init__(self, start: Start, spec: Any) -> None:
        context: Any = multiprocessing.get_context(start_method(start.__module__))
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, start, Carried(spec)), daemon=True)
        try:
            self.process.start()
        except (AttributeError, TypeError, ValueError, OSError) as error:
            raise WorkerFailedError(
                "not-importable",
                f"{spec!r} cannot be handed to another process ({error}); name an importable function or class",
            ) from error
        theirs.close()
        self.row: int | None = None
        self.deadline, self.alive, self._ready, self._seconds = 0.0, True, False, 0.0

    def give(self, row: int, content: Any, seconds: float) -> None:
        """Hand a row over."""
        self.row, self._seconds = row, seconds
        self.deadline = time.monotonic() + (seconds if self._ready else START_SECONDS)
        with contextlib.suppress(OSError):  # a dead process: `outcome` reports it
            self.connection.send(content)

    def outcome(self) -> Outcome | None:
        """Return the row's outcome, or None while it is open. A process that fails to answer is killed."""
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
        """Kill the process and all its children."""
        self.alive, self.row = False, None
        self.connection.close()
        if self.process.pid is not None and hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.join(timeout=5)


def start_method(module: str) -> str:
    """Return "forkserver" where it exists, since forks of a process with threads hang, else "spawn".

    The server imports ``module`` once, so a process that replaces a killed one starts in milliseconds.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    multiprocessing.get_context("forkserver").set_forkserver_preload([module])
    return "forkserver"


def serve(connection: Connection, start: Start, spec: Any) -> None:
    """Work on rows until the other side closes the connection; runs in its own process."""
    if hasattr(os, "setsid"):
        os.setsid()  # a group of its own: what user code starts is killed with it
    with contextlib.suppress(EOFError, OSError):
        try:
            work = start(spec)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - reported to the other side
            connection.recv()
            connection.send(("failed", f"{type(error).__name__}: {error}"))
            return
        connection.send("ready")
        while True:
            connection.send(work(connection.recv()))


Part = TypeVar("Part")
Result = TypeVar("Result")

ALONE = 4
"""Parts worked on before any process is forked: so many take less time than the forks."""
MOST_FORKS = 8
"""Forks beyond which this process, which hands out the parts, is what limits the speed."""


def in_forks(work: Callable[[Part], Result], parts: Iterable[Part], forks: int | None = None) -> Iterator[Result]:
    """Yield ``work(part)`` of each part in order, computed in forks of this process, which need not import anything.

    Parts and results are pickled, ``work`` is not. A part that fails in a fork is worked on here, so that its error is
    raised here. Where a fork is unsafe (not on Linux) all parts are worked on here.

    Args:
        work: a function of the part alone.
        parts: at most one per fork is read ahead.
        forks: number of processes; by default the cores that this process may use, up to `MOST_FORKS`.
    """
    if forks is None:
        forks = min(len(os.sched_getaffinity(0)), MOST_FORKS) if sys.platform == "linux" else 1
    parts = iter(parts)
    yield from map(work, islice(parts, None if forks < 2 else ALONE))
    pool: list[Fork[Part, Result]] = []
    try:
        for number, part in enumerate(parts):
            if len(pool) < forks:
                pool.append(Fork(work, part))
                continue
            worker = pool[number % forks]
            result = worker.result()
            worker.give(part)
            yield result
        oldest = 0 if len(pool) < forks else (number + 1) % forks
        yield from (worker.result() for worker in (*pool[oldest:], *pool[:oldest]))
    finally:
        for worker in pool:
            worker.end()


class Fork(Generic[Part, Result]):
    """A fork that works on one part at a time; it ends when this process ends.

    Args:
        work: what it does.
        part: its first part.
    """

    def __init__(self, work: Callable[[Part], Result], part: Part) -> None:
        self.work = work
        self.connection, theirs = multiprocessing.Pipe()
        context: Any = multiprocessing.get_context("fork")
        self.process = context.Process(target=self._serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.give(part)

    def _serve(self, connection: Connection) -> None:
        """Work until the other side closes the connection."""
        self.connection.close()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's to answer
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # their threads did not survive the fork
        gc.freeze()
        with contextlib.suppress(EOFError, OSError):
            while True:
                part = connection.recv()
                try:
                    connection.send((True, self.work(part)))
                except Exception:  # noqa: BLE001 - raised by the first process, which tries again
                    connection.send((False, None))

    def give(self, part: Part) -> None:
        """Hand a part over."""
        self.part, self.given = part, False
        with contextlib.suppress(Exception):  # a dead process, or a part that cannot be pickled: `result` does the work
            self.connection.send(part)
            self.given = True

    def result(self) -> Result:
        """Return the result of the part."""
        with contextlib.suppress(EOFError, OSError):
            answer: tuple[bool, Any] = self.connection.recv() if self.given else (False, None)
            if answer[0]:
                return answer[1]
        return self.work(self.part)

    def end(self) -> None:
        """End the process."""
        self.connection.close()
        self.process.kill()
        self.process.join()
