"""Run a command as forked ranks, so that imports are shared, and inject faults.

This process must have no Python threads and no process group when it forks. Each run has one process per rank, with the
environment variables of torchrun. If a rank dies, the others are killed, as torchrun would do.
"""

import contextlib
import gc
import importlib
import mmap
import os
import random
import resource
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loops import _EvaluationLoop

from rlhf_lightning import cli
from rlhf_lightning import commands as _commands  # noqa: F401  first: it defers bitsandbytes, which takes long
from rlhf_lightning.runs import RunCheckpoint
from rlhf_lightning.training.module import AlignmentModule
from rlhf_lightning.training.rollout import RolloutModule

PHASES = ("starting", "between", "rollout", "update", "validation", "saving")
TIMEOUT = 1800.0
"""Timeout in seconds after which a run counts as hanging."""

FAREWELL = 120.0
"""Seconds in which the other ranks must end after a rank has died."""

PIPE_BYTES = 1 << 20


class Watch:
    """Current phase of a process, in memory shared with its parent.

    Counts for each phase how often it was entered, and its longest duration in seconds.
    """

    LAYOUT = struct.Struct(f"i{len(PHASES)}i{len(PHASES)}d")

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, self.LAYOUT.size)
        self._write(0, [0] * len(PHASES), [0.0] * len(PHASES))

    def _read(self) -> tuple[int, list[int], list[float]]:
        current, *rest = self.LAYOUT.unpack(self._memory[:])
        return current, rest[: len(PHASES)], rest[len(PHASES) :]

    def _write(self, current: int, counts: Sequence[int], seconds: Sequence[float]) -> None:
        self._memory[:] = self.LAYOUT.pack(current, *counts, *seconds)

    @property
    def phase(self) -> str:
        """Current phase of the process."""
        return PHASES[self._read()[0]]

    def entered(self, phase: str) -> int:
        """Return how often a phase was entered."""
        return self._read()[1][PHASES.index(phase)]

    def longest(self, phase: str) -> float:
        """Return the longest duration of a phase."""
        return self._read()[2][PHASES.index(phase)]

    def watched(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function so that its calls are recorded as a phase."""
        index = PHASES.index(phase)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            before, counts, seconds = self._read()
            counts[index] += 1
            self._write(index, counts, seconds)
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                _, counts, seconds = self._read()
                seconds[index] = max(seconds[index], time.perf_counter() - began)
                self._write(max(before, 1), counts, seconds)

        return wrapped


class Ranks:
    """The processes of one command.

    Args:
        argv: arguments of ``rlhf``.
        folder: working directory.
        count: number of ranks.
        disk_full_at: index of the save before which the disk of rank 0 becomes full; None for never.
        imported: file for the names of all modules that rank 0 has imported at its end; see `import_early`.
    """

    def __init__(
        self, argv: Sequence[str], folder: Path, count: int = 1, disk_full_at: int | None = None,
        imported: Path | None = None,
    ) -> None:  # fmt: skip
        self.watch = Watch()
        self._disk_full_at, self._imported = disk_full_at, imported
        self._output, pipe = os.pipe()
        if sys.platform == "linux":
            import fcntl

            fcntl.fcntl(self._output, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        port = _free_port()
        self.statuses: dict[int, int] = {}
        self.processes: list[int] = []
        for rank in range(count):
            sys.stdout.flush()
            process = os.fork()
            if process == 0:
                self._be(rank, count, port, list(argv), folder, pipe)
            self.processes.append(process)
        os.close(pipe)

    def _be(self, rank: int, count: int, port: int, argv: list[str], folder: Path, pipe: int) -> None:
        """Run the command as one rank, and end the process."""
        status = 70
        try:
            os.dup2(pipe, 1)
            os.dup2(pipe, 2)
            sys.stdout, sys.stderr = (os.fdopen(os.dup(pipe), "w", buffering=1) for _ in range(2))
            os.chdir(folder)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            torch.set_num_threads(1)
            os.environ |= {"RLHF_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
            if count > 1:
                os.environ |= {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": str(count),
                    "LOCAL_WORLD_SIZE": str(count), "TORCHELASTIC_RUN_ID": "drill", "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
                }  # fmt: skip
            rank_zero_only.rank = rank  # it was read from the environment at import
            if rank == 0:
                self._observe()
            status = cli.main(argv)
            if rank == 0 and self._imported is not None:
                self._imported.write_text("\n".join(list(sys.modules)))
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            sys.stdout.flush()
            os._exit(status)

    def _observe(self) -> None:
        """Record the phases of the training stack. The only other change is the full disk."""
        watch, save = self.watch, RunCheckpoint.save

        def saving(callback: RunCheckpoint, *args: Any, **kwargs: Any) -> None:
            if self._disk_full_at is not None and watch.entered("saving") >= self._disk_full_at:
                resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))
            save(callback, *args, **kwargs)

        RunCheckpoint.save = watch.watched("saving", saving)  # type: ignore[method-assign]
        AlignmentModule.update = watch.watched("update", AlignmentModule.update)  # type: ignore[method-assign]
        RolloutModule.collect = watch.watched("rollout", RolloutModule.collect)  # type: ignore[method-assign]
        _EvaluationLoop.run = watch.watched("validation", _EvaluationLoop.run)  # type: ignore[method-assign]

    # -- faults ----------------------------------------------------------------------------------------------

    def wait(self) -> tuple[int, str]:
        """Wait until all ranks have ended; return the first non-zero exit status, rank 0 first, and the output."""
        end = time.monotonic() + TIMEOUT
        while self.alive():
            if any(status != 0 for status in self.statuses.values()):
                end = min(end, time.monotonic() + FAREWELL)
            if time.monotonic() > end:
                self.kill()
            time.sleep(0.002)
        said = b""
        while part := os.read(self._output, PIPE_BYTES):
            said += part
        os.close(self._output)
        statuses = [self.statuses[process] for process in self.processes]
        return next((status for status in statuses if status != 0), 0), said.decode(errors="replace")

    def alive(self) -> list[int]:
        """Return the processes that are still running."""
        for process in self.processes:
            if process not in self.statuses:
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    self.statuses[process] = os.waitstatus_to_exitcode(status)
        return [process for process in self.processes if process not in self.statuses]

    def reach(self, phase: str, times: int) -> bool:
        """Wait until a phase was entered ``times`` times; return False if the run ends first."""
        end = time.monotonic() + TIMEOUT
        while self.watch.entered(phase) < times and time.monotonic() < end:
            if len(self.alive()) < len(self.processes):
                return self.watch.entered(phase) >= times
            time.sleep(0.0003)
        return self.watch.entered(phase) >= times

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to all ranks, in random order."""
        for process in random.sample(self.alive(), len(self.alive())):
            os.kill(process, number)


def import_early(imported: Path) -> None:
    """Import what a run imported late, in the same order, so that later forks share it."""
    for name in imported.read_text().splitlines():
        if name not in sys.modules:
            with contextlib.suppress(Exception):  # names without a file, such as torch.ops.aten
                importlib.import_module(name)
    gc.collect()
    gc.freeze()  # keeps the collector from writing to shared pages in a fork


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
