"""Handle interruptions of runs: SIGTERM, SLURM preemption, and ranks that have died."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer

from rlhf_lightning.compat import cluster_environment, without_signal_handlers

PREEMPTED = 75
"""Exit status of a run that was told to stop and has written a checkpoint (EX_TEMPFAIL: try again)."""


class PreemptedError(SystemExit):
    """The run was told to stop and has written a checkpoint; the exit status is ``status``."""

    def __init__(self, sentence: str, status: int) -> None:
        super().__init__(status)
        self.sentence = sentence

    def __str__(self) -> str:
        return self.sentence


class StopSignal:
    """Record SIGTERM, and under SLURM the signal before the time limit; the run stops at its next safe point.

    Lightning's own handler broadcasts from inside the signal handler, when a rank may be in another collective. It also
    stops without a checkpoint and with exit status 0, which a scheduler reads as success. So Lightning's handlers are
    not installed while this class listens. After the first signal the default handlers are restored, so a second
    SIGTERM or Ctrl-C ends the process immediately.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}  # the caller's handlers
        self._lightnings: contextlib.ExitStack | None = None

    def listen(self, trainer: Trainer) -> None:
        """Record signals until `stop_listening`."""
        self.stop_listening()
        self.received = None
        self._lightnings = contextlib.ExitStack()
        self._lightnings.enter_context(without_signal_handlers(trainer))
        if threading.current_thread() is not threading.main_thread():
            return
        numbers = {signal.SIGTERM, slurm_signal(trainer) or signal.SIGTERM}
        self._before = {number: signal.getsignal(number) for number in (*numbers, signal.SIGINT)}
        for number in numbers:
            signal.signal(number, self._note)

    def stop_listening(self) -> None:
        """Restore the caller's handlers."""
        if self._lightnings is not None:
            self._lightnings.close()
            self._lightnings = None
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for usual in (signal.SIGTERM, signal.SIGINT):
            signal.signal(usual, signal.SIG_DFL)

    def asked(self, trainer: Trainer) -> bool:
        """Whether any rank was told to stop; a collective, so all ranks must call it together."""
        return not trainer.strategy.reduce_boolean_decision(self.received is None, all=True)

    def name(self) -> str:
        """Name of the signal that this rank received."""
        return "told to stop" if self.received is None else signal.Signals(self.received).name


def slurm_signal(trainer: Trainer) -> int | None:
    """Return the signal that SLURM sends before the time limit, if Lightning would requeue the job."""
    environment: Any = cluster_environment(trainer)
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
        return environment.requeue_signal or signal.SIGUSR1
    return None


def requeue(trainer: Trainer, received: int | None) -> None:
    """Requeue the SLURM job if the signal before its time limit stopped it; SLURM ignores the exit status."""
    if received is None or received != slurm_signal(trainer) or not trainer.is_global_zero:
        return
    array, job = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_JOB_ID", "")
    name = job if array is None else f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    if re.fullmatch(r"[0-9_]+", name):
        try:
            subprocess.run(["scontrol", "requeue", name], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"the job {name} was not requeued: {error}", flush=True)


def exit_status(trainer: Trainer) -> int:
    """Return the exit status of this rank; 0 in processes started by the trainer, which otherwise kills the run."""
    started_here = isinstance(cluster_environment(trainer), LightningEnvironment) and trainer.local_rank > 0
    return 0 if started_here else PREEMPTED


SECONDS_TO_END = 5.0
"""Maximum seconds between the moment when a process closes its connections and its end."""


class Member(NamedTuple):
    """Host and process of a rank."""

    host: str
    process: int


class RankWatch(Callback):
    """Exchange the ranks' process ids, so that the error of a failed collective can name the rank that died.

    The rank is added to the exception as a note. Only processes on the same host can be checked.
    """

    def __init__(self) -> None:
        super().__init__()
        self.members: list[Member] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gather the host and process id of every rank."""
        if trainer.world_size > 1 and dist.is_initialized():
            self.members = [Member("", 0)] * trainer.world_size
            dist.all_gather_object(self.members, Member(socket.gethostname(), os.getpid()))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Add the dead ranks to the exception of a failed collective."""
        failed = isinstance(exception, dist.DistError) or any(sign in str(exception) for sign in ("/gloo/", "NCCL"))
        if failed and self.members:
            exception.add_note(self.gone(trainer.global_rank))

    def gone(self, rank: int) -> str:
        """Return a phrase that names the dead ranks, as seen from ``rank``."""
        here = self.members[rank].host
        near = [number for number, member in enumerate(self.members) if member.host == here and number != rank]
        deadline = time.monotonic() + SECONDS_TO_END
        while True:
            dead = [number for number in near if has_ended(self.members[number].process)]
            if dead or not near or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        if dead:
            return ", ".join(f"rank {n} (process {self.members[n].process} on this host) has ended" for n in dead)
        far = [f"{n} on {member.host}" for n, member in enumerate(self.members) if member.host != here]
        if far:
            return f"it runs on another host (rank {', '.join(far)})"
        return f"all {len(self.members)} processes are alive, but one of them hangs"


def has_ended(process: int) -> bool:
    """Whether a process of this host has ended or is a zombie."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except (OSError, IndexError):  # no /proc, or the process has just ended
        return False
