"""Run user code that may hang or crash in processes with a time limit per row or on threads; share work among forks."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from itertools import islice
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from typing import Any, Generic, Literal, TypeVar

from rlhf_lightning.errors import RlhfError
from rlhf_lightning.working_directory import Carried

START_SECONDS = 120.0
"""Time limit in seconds for a process to import the user's code."""

Outcome = tuple[Literal["done", "failed", "timed_out"], Any]
"""Outcome of a row: its result, or a description of what went wrong."""

Start = Callable[[Any], Callable[[Any], Outcome]]
"""Called in the worker process with ``spec``; returns the function that processes a row."""


class WorkerFailedError(RlhfError, RuntimeError):
    """A worker process cannot be started."""


def with_retries(
    attempt: Callable[[Sequence[Any]], list[Outcome]], rows: Sequence[Any], retries: int, wait: float
) -> tuple[list[Outcome], list[bool]]:
    """Attempt all rows, and failed rows up to ``retries`` times more; return the outcomes and which rows were retried.

    The wait before a retry is ``wait`` seconds at first and doubles each time.
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
    """Process rows one by one in worker processes, with an enforced time limit per row.

    A process that exceeds its time is killed with all its children, even in an endless loop or a C extension. Processes
    are fresh interpreters. They start with the first rows and live until the pool is closed.

    Args:
        start: importable function; it is called with ``spec`` in each process and returns the function for a row.
        spec: argument of ``start``; it must be picklable.
        seconds: time limit of one row, not counting the start of the process.
        workers: number of processes.
    """

    def __init__(self, start: Start, spec: Any, seconds: float, workers: int) -> None:
        self.start, self.spec, self.seconds, self.workers = start, spec, seconds, workers
        self._pool: list[Worker] = []
        weakref.finalize(self, _kill_all, self._pool)  # also when this process ends

    def outcomes(self, rows: Sequence[Any]) -> list[Outcome]:
        """Send the rows to processes as these become free; return the outcome of each row.

        Raises:
            WorkerFailedError: ``spec`` cannot be sent to another process, or this process ends.
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
            self._pool[:] = [worker for worker in self._pool if worker.alive]
        return [outcomes[row] for row in range(len(rows))]

    def _free_worker(self) -> Worker | None:
        free = next((worker for worker in self._pool if worker.row is None), None)
        if free is None and len(self._pool) < self.workers:
            if not threading.main_thread().is_alive():  # an abandoned call on a daemon thread
                raise WorkerFailedError("process-ends", "this process ends, so it starts no worker process")
            self._pool.append(free := Worker(self.start, self.spec))
        return free

    def close(self) -> None:
        """Kill the processes; the next call starts new ones."""
        _kill_all(self._pool)


def _kill_all(pool: list[Worker]) -> None:
    for worker in pool:
        worker.kill()
    pool.clear()


class Worker:
    """A worker process that handles one row at a time.

    Attributes:
        connection: pipe to the process.
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
        """Send a row to the process."""
        self.row, self._seconds = row, seconds
        self.deadline = time.monotonic() + (seconds if self._ready else START_SECONDS)
        with contextlib.suppress(OSError):  # a dead process: `outcome` reports it
            self.connection.send(content)

    def outcome(self) -> Outcome | None:
        """Return the row's outcome, or None while it is pending. A process that fails or times out is killed."""
        try:
            if self.connection.poll():
                found = self.connection.recv()
                if found == "ready":  # the row's time limit starts now
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
    """Return "forkserver" if available, else "spawn": forking a process with threads can hang.

    The fork server imports ``module`` once, so that a replacement for a killed process starts in milliseconds.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    multiprocessing.get_context("forkserver").set_forkserver_preload([module])
    return "forkserver"


def serve(connection: Connection, start: Start, spec: Any) -> None:
    """Process rows until the other side closes the connection; runs in the worker process."""
    if hasattr(os, "setsid"):
        os.setsid()  # a new process group, so that user code's child processes are killed too
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


class Threads:
    """Run calls on daemon threads, in the order in which they were submitted.

    Unlike a ``ThreadPoolExecutor``, it lets a process end while a call hangs.

    Args:
        count: number of threads; they start with the first call, and end after the object is deleted.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] | None = None

    def submit(self, call: Callable[[], Result]) -> Future[Result]:
        """Queue a call; return the future of its result."""
        if self._calls is None:
            self._calls = SimpleQueue()
            for _ in range(self.count):
                threading.Thread(target=_run_calls, args=(self._calls,), daemon=True).start()
                weakref.finalize(self, self._calls.put, None)
        future = Future[Result]()
        self._calls.put((future, call))
        return future


def _run_calls(calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]) -> None:
    while (queued := calls.get()) is not None:
        future, call = queued
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001 - raised where the result is read
                future.set_exception(error)
        del queued, future, call  # they may hold the last reference to this object's owner


ALONE = 4
"""Number of parts processed before any fork: so few parts take less time than forking."""
MOST_FORKS = 8
"""Maximum number of forks: beyond it, the parent process that distributes the parts is the bottleneck."""


def in_forks(work: Callable[[Part], Result], parts: Iterable[Part], forks: int | None = None) -> Iterator[Result]:
    """Yield ``work(part)`` of each part in order, computed in forks of this process, which inherit its imports.

    Parts and results are pickled, ``work`` is not. A part that fails in a fork is repeated in this process, so that its
    error is raised here. On systems other than Linux forks are unsafe, and all parts are processed here.

    Args:
        work: a function that depends on the part alone.
        parts: the inputs; at most one per fork is read ahead.
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
    """A fork that processes one part at a time; it ends when this process ends.

    Args:
        work: the function to apply.
        part: the first part.
    """

    def __init__(self, work: Callable[[Part], Result], part: Part) -> None:
        self.work = work
        self.connection, theirs = multiprocessing.Pipe()
        context: Any = multiprocessing.get_context("fork")
        self.process = context.Process(target=self._serve, args=(theirs,), daemon=True)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a fork never sees Ctrl-C: the parent does
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self.give(part)

    def _serve(self, connection: Connection) -> None:
        """Process parts until the other side closes the connection."""
        self.connection.close()
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tokenizers' threads do not survive a fork
        gc.freeze()
        with contextlib.suppress(EOFError, OSError):
            while True:
                part = connection.recv()
                try:
                    connection.send((True, self.work(part)))
                except Exception:  # noqa: BLE001 - the parent process repeats the part and raises
                    connection.send((False, None))

    def give(self, part: Part) -> None:
        """Send a part to the fork."""
        self.part, self.given = part, False
        with contextlib.suppress(Exception):  # a dead process or an unpicklable part: `result` does the work
            self.connection.send(part)
            self.given = True

    def result(self) -> Result:
        """Return the result of the current part."""
        with contextlib.suppress(EOFError, OSError):
            answer: tuple[bool, Any] = self.connection.recv() if self.given else (False, None)
            if answer[0]:
                return answer[1]
        return self.work(self.part)

    def end(self) -> None:
        """Kill the process."""
        self.connection.close()
        self.process.kill()
        self.process.join()
