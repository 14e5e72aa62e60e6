"""Which rank is gone, when a collective says that one is."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

SECONDS_TO_END = 5.0
"""How long a process that has let go of its connections may take until it is gone."""


class Member(NamedTuple):
    """Where a rank runs."""

    host: str
    process: int


class RankWatch(Callback):
    """Tell the ranks' processes to each other, so that a run that breaks off can name the rank that is gone.

    The name is a note on the exception. A process of the same host is looked up; of another host all that is known is
    that none of its ranks was seen to end.
    """

    def __init__(self) -> None:
        super().__init__()
        self.members: list[Member] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gather host and process of every rank."""
        if trainer.world_size > 1 and dist.is_initialized():
            self.members = [Member("", 0)] * trainer.world_size
            dist.all_gather_object(self.members, Member(socket.gethostname(), os.getpid()))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Name the ranks that are gone, if a collective failed."""
        failed = isinstance(exception, dist.DistError) or any(sign in str(exception) for sign in ("/gloo/", "NCCL"))
        if failed and self.members:
            exception.add_note(self.gone(trainer.global_rank))

    def gone(self, rank: int) -> str:
        """Return a phrase on the ranks that are gone.

        Args:
            rank: the one that asks.
        """
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
            return f"it is one on another host (rank {', '.join(far)})"
        return f"all {len(self.members)} processes are there, and one of them hangs"


def has_ended(process: int) -> bool:
    """Whether a process of this host is gone, or dead and not yet waited for."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except (OSError, IndexError):  # no such file system, or gone this very moment
        return False
