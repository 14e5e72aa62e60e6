"""``rlhf serve-vllm``: start a vLLM server with the settings that `RemoteEngine` needs."""

# No postponed annotations: to resolve them, jsonargparse would import everything under TYPE_CHECKING (slow help).

import contextlib
import json
import os
import shlex
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rlhf_lightning.commands.parsing import run_function
from rlhf_lightning.errors import MissingError, check_range

ON_CPU = ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "16384", "--enforce-eager"]
"""Flags for a CPU; with chunked prefill, a request with a seed crashes the CPU worker."""

WATCH_SECONDS = 5.0
"""Interval and time limit of the health checks of a server, seconds."""

CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def main(argv: Sequence[str]) -> int:
    """Run ``rlhf serve-vllm``."""
    return run_function(serve_vllm, argv, "rlhf serve-vllm", positional=["model"])


def serve_vllm(
    model: str,
    folder: str | None = None,
    transfer: Literal["folder", "nccl", "ipc"] = "folder",
    sleep: bool = False,
    name: str = "policy",
    port: int = 8000,
    host: str = "127.0.0.1",
    python: str = ".venv-vllm/bin/python",
    lora_rank: int = 16,
    versions: int = 2,
    dtype: str = "float32",
    cpu: bool = False,
    threads: int | None = None,
    arguments: str = "",
    restarts: int = 3,
) -> int:
    """Start a vLLM server for the rollouts of a training run.

    A server that ends is restarted; stop this command (Ctrl+C or SIGTERM) to stop the server. The trainer waits for a
    restarted server (RemoteEngine's retries) and registers its adapters again; full weights are read from the folder.
    With another transfer the server is not restarted, because its weights are those of the policy's start then.

    Args:
        model: hub id, folder or .gguf file from which the policy starts.
        folder: folder for full weights, RemoteEngine's shared_folder; the model is written into it, with the LM head as
            a separate tensor. null serves the unchanged backbone for an adapter.
        transfer: RemoteEngine's transfer; "nccl" and "ipc" receive full weights without a folder.
        sleep: allow RemoteEngine's sleep.
        name: name of the model on the server, RemoteEngine's model.
        port: port to listen on.
        host: address to listen on; any address except 127.0.0.1 is open to the network, without a password.
        python: interpreter of the environment with vLLM; `make vllm` creates the default environment.
        lora_rank: largest rank of an adapter.
        versions: adapters that stay loaded: model.lag + 1, plus one during a weight update.
        dtype: precision of the server, in vLLM's notation; the trainer's precision needs the smallest correction.
        cpu: serve on the CPU.
        threads: threads on the CPU; null leaves the choice to vLLM. Use 1 on a machine with other work.
        arguments: further arguments of vLLM, as one text.
        restarts: how often to restart a server that ended.
    """
    if not Path(python).is_file():
        raise MissingError("no-vllm", f"{python} is missing: run `make vllm`, or name another interpreter in --python")
    check_range(min(versions, lora_rank) >= 1, "both must be at least 1", versions=versions, lora_rank=lora_rank)
    from rlhf_lightning.models.resolving import resolve_folder

    served = _written(model, folder) if folder is not None else resolve_folder(model)
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", served, "--served-model-name", name]
    command += ["--host", host, "--port", str(port), "--dtype", dtype, "--logprobs-mode", "processed_logprobs"]
    command += ["--generation-config", "vllm", *(ON_CPU if cpu else [])]
    if transfer != "folder":
        command += ["--weight-transfer-config", json.dumps({"backend": transfer})]
        restarts = 0
    elif folder is None:
        command += ["--enable-lora", "--max-lora-rank", str(lora_rank), "--max-loras", str(versions)]
        command += ["--max-cpu-loras", str(versions + 1)]
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    environment["VLLM_SERVER_DEV_MODE"] = "1"  # enables the routes that reload weights
    if sleep:
        command += ["--enable-sleep-mode"]
    if transfer == "ipc":  # handles of GPU memory are pickles
        environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    if cpu:
        environment |= CPU_ENVIRONMENT | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    environment.pop("PYTHONPATH", None)  # packages of this environment must not hide vLLM's
    command += shlex.split(arguments)
    print(" ".join(shlex.quote(part) for part in command), flush=True)
    reached = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    return _supervised(command, environment, restarts, f"http://{reached}:{port}/health")


def _supervised(command: Sequence[str], environment: Mapping[str, str], restarts: int, health: str) -> int:
    """Run a server, and start it again when it ends, until this process is told to stop; return its last status.

    Engine processes may outlive a killed server, so the server has its own process group, and what remains of it is
    killed.
    """
    stopped, server = False, None

    def stop(number: int, frame: Any) -> None:
        nonlocal stopped
        _signal_group(server, signal.SIGKILL if stopped else number)
        stopped = True

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # as under nohup
            signal.signal(number, stop)
    try:
        status = 0
        for restart in range(restarts + 1):
            if restart:
                print(f"the server ended with status {status}; restart {restart} of {restarts}", flush=True)
            server = subprocess.Popen(command, env=environment, process_group=0)
            status = _ended(server, health)
            _signal_group(server, signal.SIGKILL)
            if stopped:
                break
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status


def _ended(server: "subprocess.Popen[bytes]", health: str) -> int:
    """Wait until a server ends; return its status.

    A vLLM server whose engine process died closes its port, and then waits for requests that nothing answers any more.
    So a server that has been healthy and no longer is gets killed.
    """
    healthy = False
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return server.wait(WATCH_SECONDS)
        try:
            urllib.request.urlopen(health, timeout=WATCH_SECONDS).close()
            healthy = True
        except OSError as error:
            failed = isinstance(error, urllib.error.HTTPError) or isinstance(
                getattr(error, "reason", error), ConnectionRefusedError
            )
            if healthy and failed:  # a busy server is only late
                _signal_group(server, signal.SIGKILL)


def _signal_group(server: "subprocess.Popen[bytes] | None", number: int) -> None:
    """Send a signal to a server and its child processes."""
    if server is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, number)


def _written(model: str, folder: str) -> str:
    """Write the model in the form that a server can reload; return the folder."""
    from rlhf_lightning.models.loading import LoadSettings
    from rlhf_lightning.models.resolving import resolve_folder
    from rlhf_lightning.models.roles import load_policy
    from rlhf_lightning.sampling.hand_over import write_server_folder
    from rlhf_lightning.tokenization import load_tokenizer

    policy = load_policy(model, LoadSettings(self_check=False))
    return str(write_server_folder(policy.model, load_tokenizer(resolve_folder(model)), folder))
