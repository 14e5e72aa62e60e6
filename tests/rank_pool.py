"""Groups of gloo ranks that stay warm: importing the stack takes longer than all that tests have them do.

One process imports everything and forks the ranks of every group; each rank then runs functions of `rank_cases` by
name, as often as a test asks. Run as a script it is that process.
"""

import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any

TIMEOUT = 120.0
"""Seconds after which a case counts as hanging."""

SIZES = (2, 4)
"""Ranks of each group."""


class RankPool:
    """The groups, started on first use."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._ranks: dict[tuple[int, int], Connection] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, ranks: int, case: str, **settings: Any) -> list[Any]:
        """Run a case on every rank of a group; return what each returned, rank after rank."""
        if self._process is None:
            self._start()
        mine = [self._ranks[ranks, rank] for rank in range(ranks)]
        for connection in mine:
            connection.send_bytes(pickle.dumps((case, settings)))
        answers: dict[Any, Any] = {}
        while len(answers) < ranks:
            ready = wait([connection for connection in mine if connection not in answers], TIMEOUT)
            if not ready:
                self.close()
                missing = [rank for rank, connection in enumerate(mine) if connection not in answers]
                raise TimeoutError(f"{case}: ranks {missing} of {ranks} are waiting for ever")
            for connection in ready:
                failure, answer = pickle.loads(connection.recv_bytes())
                if failure is not None:  # the others wait for this one in a collective
                    rank = mine.index(connection)
                    self.close()
                    raise AssertionError(f"{case} on rank {rank} of {ranks}:\n{failure}")
                answers[connection] = answer
        return [answers[connection] for connection in mine]

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        address = str(Path(self._folder.name) / "pool")
        with Listener(address, "AF_UNIX", backlog=sum(SIZES)) as listener:
            root = Path(__file__).resolve().parents[1]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(root), str(root / "tests")))}
            output = subprocess.DEVNULL  # what a rank has to say of a failure comes back over its connection
            self._process = subprocess.Popen(
                [sys.executable, __file__, address], env=environment, stdout=output, stderr=output
            )
            for _ in range(sum(SIZES)):
                connection = listener.accept()
                self._ranks[connection.recv()] = connection

    def close(self) -> None:
        """Stop the ranks."""
        if self._process is not None:
            for connection in self._ranks.values():
                connection.close()
            self._process.kill()
            self._process.wait()
            self._ranks.clear()
            self._process = None
        if self._folder is not None:
            self._folder.cleanup()


def serve(address: str, ranks: int, rank: int) -> None:
    """Be one rank until the pool goes."""
    import rank_cases
    import torch

    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks), "TORCHELASTIC_RUN_ID": "tests", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1",
    }  # fmt: skip
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{address}.{ranks}", rank=rank, world_size=ranks)
    connection = Client(address, "AF_UNIX")
    connection.send((ranks, rank))
    while True:
        try:
            case, settings = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            answer = (None, getattr(rank_cases, case)(**settings))
        except BaseException:
            answer = (traceback.format_exc(), None)
        connection.send_bytes(pickle.dumps(answer))


def fork_ranks(address: str) -> None:
    """Import everything once, and become the ranks of every group."""
    import ctypes
    import signal

    import rank_cases  # noqa: F401

    for ranks in SIZES:
        for rank in range(ranks):
            if os.fork() == 0:
                ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # a rank that hangs in a collective goes with its parent
                serve(address, ranks, rank)
                os._exit(0)
    for _ in range(sum(SIZES)):
        os.wait()


if __name__ == "__main__":
    fork_ranks(sys.argv[1])
