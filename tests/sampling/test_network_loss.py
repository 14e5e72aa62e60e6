"""What samples is killed or unreachable for a while: the run waits, continues, and ends bit-identical.

The drills of experiments/engines in small, and the time after which a silent connection is given up.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "experiments" / "engines"
NEEDS_ROOT = pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.geteuid() != 0 or shutil.which("ip") is None,
    reason="network namespaces need Linux, root and iproute2",
)
SERVER = """
import socket, time
listener = socket.create_server(("0.0.0.0", 8000))
print("listening", flush=True)
connection, _ = listener.accept()
print(len(connection.recv(1 << 16)), flush=True)
time.sleep(600)
"""
CLIENT = """
from rlhf_lightning.sampling import json_server
json_server.LOST_AFTER |= {"TCP_KEEPIDLE": 1, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 2, "TCP_USER_TIMEOUT": 3000}
json_server.JSONServer("http://10.213.8.2:8000", timeout=300, retries=0).post("/sample", {})
"""


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return the module with the namespaces."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    monkeypatch.setattr(os, "environ", os.environ.copy())
    import cut_link

    return cut_link


@pytest.mark.drill
@NEEDS_ROOT
def test_a_connection_to_a_host_that_vanished_is_given_up(scripts: Any, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with scripts.Link() as link:
        python = [sys.executable, "-c"]
        server = subprocess.Popen([*link.inside(1), *python, SERVER], stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None and server.stdout.readline() == "listening\n"
        client = subprocess.Popen(
            [*link.inside(0), *python, CLIENT], stderr=subprocess.PIPE, text=True, env=environment
        )
        try:
            assert int(server.stdout.readline()) > 0
            name, device = link.end
            scripts.ip("-n", name, "link", "set", device, "down")
            began = time.monotonic()
            said = client.communicate(timeout=60)[1]
            assert "gave no answer in 1 attempts" in said and time.monotonic() - began < 30
        finally:
            for process in (client, server):
                process.kill()
                process.communicate()


@pytest.mark.drill
@NEEDS_ROOT
def test_a_run_whose_link_to_the_worker_is_cut_ends_bit_identically(tmp_path: Path) -> None:
    drill("cut_link.py", tmp_path, "--kinds", "worker", "--seconds", "5")
    assert "| `rlhf rollout-worker` | sampling" in (tmp_path / "page.md").read_text()


@pytest.mark.drill
def test_a_run_whose_workers_are_killed_ends_bit_identically(tmp_path: Path) -> None:
    drill("kills.py", tmp_path, "--kinds", "processes", "addresses", "--kills", "2")
    assert (tmp_path / "page.md").read_text().count("| yes") == 2


def drill(script: str, folder: Path, *flags: str) -> None:
    """Run a drill in a folder; it must succeed."""
    command = [sys.executable, str(FOLDER / script), "--out", str(folder), "--page", str(folder / "page.md"), *flags]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
