"""Test the command that starts vLLM, with a script in place of its interpreter."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from rlhf_lightning.commands.serve_vllm import serve_vllm


def interpreter(folder: Path, script: str) -> str:
    python = folder / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    return str(python)


def test_a_dead_server_is_restarted(tmp_path: Path, policy_folder: str) -> None:
    log = tmp_path / "starts"
    python = interpreter(tmp_path, f"echo start >> {log}; [ $(wc -l < {log}) -lt 3 ] && kill -9 $$; exit 0")
    assert serve_vllm(policy_folder, python=python) == 0 and log.read_text() == "start\n" * 3
    log.unlink()
    assert serve_vllm(policy_folder, python=python, restarts=0) == -9 and log.read_text() == "start\n"


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
