"""Keep groups of gloo ranks running between tests, because importing the stack takes longer than the test cases.

One process imports everything and forks the ranks of a group on first use. Each rank then runs functions of
`rank_cases` by name. Run as a script, this file is that process.
"""

import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from datetime import timedelta
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any

TIMEOUT = 180.0
"""Seconds after which a case is treated as hanging."""


class RankPool:
    """The groups of ranks, started on first use."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._groups: dict[int, list[Connection]] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._listener: Listener | None = None

    def run(self, ranks: int, case: str, **settings: Any) -> list[Any]:
        """Run a case on every rank of a group; return the results in rank order."""
        if ranks not in self._groups:
            self._start(ranks)
        try:
            return self._run(self._groups[ranks], case, settings)
        except BaseException:  # the other ranks of the group may block in a collective
            self.close()
            raise

    def lose(self, ranks: int, case: str, rank: int, **settings: Any) -> list[Any]:
        """Run a case in which a rank is killed; return the results of the others. The pool is closed afterwards."""
        if ranks not in self._groups:
            self._start(ranks)
        try:
            return self._run(self._groups[ranks], case, {"rank": rank, **settings}, lost=rank)
        finally:
            self.close()

    def _run(self, group: list[Connection], case: str, settings: dict[str, Any], lost: int | None = None) -> list[Any]:
        for connection in group:
            connection.send_bytes(pickle.dumps((case, settings)))
        answers: dict[Connection, Any] = {}
        asked = [connection for rank, connection in enumerate(group) if rank != lost]
        while len(answers) < len(asked):
            ready: Any = wait([connection for connection in asked if connection not in answers], TIMEOUT)
            missing = [group.index(connection) for connection in asked if connection not in answers]
            if not ready:
                raise TimeoutError(f"{case}: ranks {missing} of {len(group)} are waiting for ever")
            for connection in ready:
                failure, answers[connection] = pickle.loads(connection.recv_bytes())
                if failure is not None:
                    raise AssertionError(f"{case} on rank {group.index(connection)} of {len(group)}:\n{failure}")
        return [answers[connection] for connection in asked]

    def _start(self, ranks: int) -> None:
        if self._process is None:
            self._folder = tempfile.TemporaryDirectory()
            address = str(Path(self._folder.name) / "pool")
            self._listener = Listener(address, "AF_UNIX", backlog=64)
            self._listener._listener._socket.settimeout(TIMEOUT)  # type: ignore[attr-defined]  # accept() has no other
            root = Path(__file__).resolve().parents[1]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(root), str(root / "tests")))}
            if sys.platform == "linux":  # independent of the machine's network
                environment["GLOO_SOCKET_IFNAME"] = "lo"
            quiet = subprocess.DEVNULL  # error messages of a rank are sent over its connection
            self._process = subprocess.Popen(
                [sys.executable, __file__, address],
                env=environment, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, text=True,
            )  # fmt: skip
        assert self._process.stdin is not None and self._listener is not None
        self._process.stdin.write(f"{ranks}\n")
        self._process.stdin.flush()
        found = {}
        for _ in range(ranks):
            connection = self._listener.accept()
            found[connection.recv()] = connection
        self._groups[ranks] = [found[rank] for rank in range(ranks)]

    def close(self) -> None:
        """Stop the ranks."""
        for connection in (connection for group in self._groups.values() for connection in group):
            connection.close()
        self._groups.clear()
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        if self._folder is not None:
            self._folder.cleanup()


def serve(address: str, ranks: int, rank: int) -> None:
    """Serve as one rank until the pool closes."""
    import rank_cases
    import torch

    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks), "TORCHELASTIC_RUN_ID": "tests", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1",
    }  # fmt: skip
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", f"file://{address}.{ranks}", rank=rank, world_size=ranks, timeout=timedelta(seconds=TIMEOUT)
    )
    connection = Client(address, "AF_UNIX")
    connection.send(rank)
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
    """Import everything once, and fork the ranks of each requested group."""
    import ctypes
    import signal

    import rank_cases  # noqa: F401

    for line in sys.stdin:
        for rank in range(int(line)):
            if os.fork() == 0:
                ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # a rank that hangs in a collective ends with its parent
                serve(address, int(line), rank)
                os._exit(0)


if __name__ == "__main__":
    fork_ranks(sys.argv[1])
