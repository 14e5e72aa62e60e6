"""Test the command that starts vLLM, with a script in place of its interpreter."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from rlhf_lightning.commands import serve_vllm as serve_vllm_file
from rlhf_lightning.commands.serve_vllm import serve_vllm
from rlhf_lightning.commands.web_server import listen


def interpreter(folder: Path, script: str) -> str:
    python = folder / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    return str(python)


def test_a_server_is_restarted_until_the_command_is_told_to_stop(tmp_path: Path, policy_folder: str) -> None:
    """The server is killed but not its child process, then ends with status 0, and then runs."""
    log = tmp_path / "children"
    script = f"sleep 600 &\necho $! >> {log}\n"
    script += f"case $(wc -l < {log}) in 1) kill -9 $$;; 2) exit 0;; *) kill -TERM $PPID; wait;; esac"
    python = interpreter(tmp_path, script)
    assert serve_vllm(policy_folder, python=python) == -signal.SIGTERM
    left, limit = [int(pid) for pid in log.read_text().split()], time.monotonic() + 10
    while any(is_running(pid) for pid in left) and time.monotonic() < limit:
        time.sleep(0.01)
    assert len(left) == 3 and not any(is_running(pid) for pid in left)
    log.unlink()
    assert serve_vllm(policy_folder, python=python, restarts=0) == -9 and len(log.read_text().split()) == 1


def test_a_server_that_closes_its_port_is_restarted(
    tmp_path: Path, policy_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vLLM server without its engine process closes its port, and hangs."""
    monkeypatch.setattr(serve_vllm_file, "WATCH_SECONDS", 0.2)
    with closing(listen("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log, server = tmp_path / "starts", tmp_path / "server.py"
    server.write_text(
        "import http.server, time\n"
        "class Handler(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(200)\n"
        "        self.end_headers()\n"
        f"with http.server.HTTPServer(('127.0.0.1', {port}), Handler) as server:\n"
        "    server.handle_request()\n"
        "time.sleep(600)\n"
    )
    python = interpreter(tmp_path, f"echo start >> {log}; exec {sys.executable} {server}")
    assert serve_vllm(policy_folder, python=python, port=port, restarts=1) == -9
    assert log.read_text() == "start\n" * 2


def is_running(pid: int) -> bool:
    """Return whether a process runs; an ended process may stay until its parent asks for it."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_sigterm_ends_the_server_too(tmp_path: Path, policy_folder: str) -> None:
    log = tmp_path / "log"
    python = interpreter(
        tmp_path, f"trap 'echo ended >> {log}; kill $!; exit 0' TERM; echo start >> {log}; sleep 60 & wait"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhf_lightning", "serve-vllm", policy_folder, "--python", python]
    )
    for _ in range(600):
        if log.exists():
            break
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(30) == 0 and log.read_text() == "start\nended\n"


def test_transfers_set_the_flags_of_vllm(tmp_path: Path, policy_folder: str) -> None:
    log = tmp_path / "log"
    python = interpreter(tmp_path, f'echo "$VLLM_ALLOW_INSECURE_SERIALIZATION" "$@" >> {log}; kill -9 $$')
    assert serve_vllm(policy_folder, transfer="nccl", python=python) == -9
    assert serve_vllm(policy_folder, transfer="ipc", sleep=True, python=python) == -9
    nccl, ipc = log.read_text().splitlines()  # a server without a folder is not restarted
    assert nccl.startswith(" -m") and '--weight-transfer-config {"backend": "nccl"}' in nccl and "lora" not in nccl
    assert ipc.startswith("1 -m") and '{"backend": "ipc"} --enable-sleep-mode' in ipc
