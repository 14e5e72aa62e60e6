"""Sample in worker processes, which draw the same episodes as `SlotEngine`, while the trainer trains.

The engine starts workers on this machine, or uses workers that were started with ``rlhf rollout-worker`` on any host.
Weights and prompts reach a worker as files. A result depends only on its job. If a worker is lost, another worker gets
the job and returns the same result.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_lightning.errors import SettingError, StateError, check_range
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.loading import LoadSettings
from rlhf_lightning.models.lora import LoraSettings
from rlhf_lightning.models.resolving import fingerprint
from rlhf_lightning.sampling.engines import Completions, SamplingEngine, SamplingRequest, spread
from rlhf_lightning.sampling.json_server import JSONServer, ServerError
from rlhf_lightning.workers import Threads

ATTEMPTS = 3
"""Maximum number of processes on this machine that try a job before the job fails."""

ANSWER_SECONDS = 60.0
"""Time limit of a request to an address, seconds; a worker that still samples answers within a few seconds."""

ABSENT_SECONDS = 10.0
"""Time after which an address that did not answer is asked again, seconds."""


class WorkerEngine(SamplingEngine):
    """Sample with the `SlotEngine` in worker processes; with ``model.lag`` they sample while the trainer trains.

    Episodes are those of the `SlotEngine`. Their last bits depend on the number of workers and of threads per worker
    (by default the trainer's number): keep both to resume a run bit for bit. It does not matter which worker samples.

    Args:
        workers: number of processes that the engine starts; prompts are distributed over them by length.
        threads: threads of each worker; null uses the trainer's number.
        device: device of these processes, such as ``cuda:1``; null uses the trainer's device.
        addresses: addresses of workers started with ``rlhf rollout-worker``, such as ``http://host:8100``, instead of
            processes that the engine starts.
        shared_folder: folder of these workers, which trainer and workers access under the same path.
        timeout: longest time that the trainer waits for a rollout, seconds.
        api_key: name of the environment variable with the workers' API key; null sends none.

    Raises:
        SettingError: a number is out of range, an address is invalid, or settings of the two kinds of workers are
            combined.
    """

    def __init__(
        self,
        workers: int = 1,
        threads: int | None = None,
        device: str | None = None,
        addresses: list[str] | None = None,
        shared_folder: str | None = None,
        timeout: float = 1800.0,
        api_key: str | None = None,
    ) -> None:
        valid = workers >= 1 and (threads is None or threads >= 1)
        check_range(valid, "each must be at least 1", workers=workers, threads=threads)
        check_range(timeout > 0, "it must be positive", timeout=timeout)
        if addresses is not None and (workers, device) != (1, None):
            raise SettingError(
                "workers-and-addresses",
                f"workers is {workers} and device {device}, but with addresses the engine starts no process: leave "
                "both out; --device of rlhf rollout-worker sets a worker's device",
            )
        if (addresses is None) != (shared_folder is None) or addresses == []:
            raise SettingError(
                "no-shared-folder",
                f"addresses is {addresses} and shared_folder {shared_folder}: give the addresses of workers, and the "
                "folder that they were started with, or leave out both",
            )
        self.threads, self.device, self.shared_folder, self.timeout = threads, device, shared_folder, timeout
        self.servers = [JSONServer(url, ANSWER_SECONDS, retries=2, api_key=api_key) for url in addresses or ()]
        self.count = len(self.servers) or workers
        self.workers: list[_Process | _Address] = []
        self._idle: SimpleQueue[_Process | _Address]  # created with the workers, since settings are copied before
        self._pool, self._written, self._ended = Threads(self.count), 0, False
        self._loading: dict[str, Any] | None = None
        self._files: tempfile.TemporaryDirectory[str] | None = None
        self._trained: set[str] = set()  # weights that were trainable at any time

    def prepare(self, init_from: str, settings: LoadSettings, lora: LoraSettings | None, versions: int) -> None:
        self._loading = {
            "init_from": init_from,
            "settings": asdict(settings),
            "lora": None if lora is None else asdict(lora),
        }

    def complete(self, model: CausalLM, request: SamplingRequest) -> Completions:
        return self.start(model, request)()

    def start(self, model: CausalLM, request: SamplingRequest) -> Callable[[], Completions]:
        """Write the current weights, and let the workers sample while the caller trains.

        The returned function raises `StateError`: ``workers-late``, ``worker-died`` or ``worker-failed``.
        """
        self.require_one_model(model, request)
        if not request.prompts:
            nothing = Completions((), (), torch.zeros(0, dtype=torch.bool), ())
            return lambda: nothing
        folder = self._opened(model)
        job = self._job(model, request, folder)
        parts = spread([len(prompt) for prompt in request.prompts], self.count)
        jobs = [{**job, **_files_of(request, rows, folder, self._number())} for rows in parts]
        waiting = [self._pool.submit(partial(self._run, one)) for one in jobs]

        def result() -> Completions:
            end = time.monotonic() + self.timeout
            try:
                found = [one.result(max(end - time.monotonic(), 0.0)) for one in waiting]
            except TimeoutError:
                raise self._late() from None
            Path(job["weights"]).unlink(missing_ok=True)
            return _assembled(found, parts, request.on_progress)

        return result

    def _opened(self, model: CausalLM) -> Path:
        """Return the folder of this engine's files; the first call creates the folder and the workers."""
        if self._loading is None:
            raise StateError("worker-not-prepared", "WorkerEngine serves training runs: for commands use SlotEngine")
        if self._files is None:
            if self.shared_folder is not None:
                Path(self.shared_folder).mkdir(parents=True, exist_ok=True)
            self._files = tempfile.TemporaryDirectory(prefix="rlhf-workers-", dir=self.shared_folder)
            own = self.device or str(next(model.parameters()).device)
            # Equal on all ranks that use the same addresses, so that their workers load the policy once.
            self._loading |= {"device": None if self.servers else own, "fingerprint": fingerprint(model.source)}
            processes = [] if self.servers else [_Process(self._files.name) for _ in range(self.count)]
            self._idle = SimpleQueue()
            self.workers = [*map(_Address, self.servers), *processes]
            for worker in self.workers:
                self._idle.put(worker)
        return Path(self._files.name).absolute()

    def _job(self, model: CausalLM, request: SamplingRequest, folder: Path) -> dict[str, Any]:
        """Write the trained weights; return what all parts of a request have in common."""
        own = dict(model.model.named_parameters())
        self._trained |= {name for name, parameter in own.items() if parameter.requires_grad}
        weights = folder / f"weights-{self._number()}.safetensors"
        save_file({name: own[name].detach().cpu().contiguous() for name in sorted(self._trained)}, weights)
        kind = next(model.parameters()).device.type
        return {
            "loading": self._loading,
            "weights": str(weights),
            "settings": asdict(request.settings),
            "seed": request.seed,
            "ends": list(request.end_ids),
            "threads": self.threads or torch.get_num_threads(),
            "autocast": str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None,
        }

    def _number(self) -> int:
        self._written += 1
        return self._written

    def _run(self, job: Mapping[str, Any]) -> dict[str, Tensor]:
        """Give a job to idle workers until one returns its result; an address that is silent rests meanwhile."""
        while not self._ended:
            worker, rest = self._idle.get(), 0.0
            try:
                worker.sample(job)
                break
            except ServerError as error:
                if error.code != "server-silent":
                    raise
                worker.trouble, rest = str(error), ABSENT_SECONDS
                rank_zero_warn(f"{error}; the next free worker draws its episodes.")
            finally:
                timer = threading.Timer(rest, self._idle.put, [worker])
                timer.daemon = True
                timer.start()
        else:
            raise StateError("workers-late", "the run has ended")
        found = load_file(job["result"])
        for name in ("prompts", "result"):
            Path(job[name]).unlink(missing_ok=True)
        return found

    def _late(self) -> StateError:
        self._ended = True
        for worker in self.workers:
            worker.close()
        said = "; ".join(worker.trouble for worker in self.workers if worker.trouble) or "they are still sampling"
        return StateError(
            "workers-late",
            f"the rollout workers returned no episodes within {self.timeout:g} s ({said}): start workers that do not "
            "answer again (rlhf rollout-worker), or raise the engine's timeout, and resume the run",
        )


class _Address:
    """Worker started with ``rlhf rollout-worker``. It answers a job that it still samples with ``{"done": false}``."""

    def __init__(self, server: JSONServer) -> None:
        self.server, self.trouble = server, ""

    def sample(self, job: Mapping[str, Any]) -> None:
        answer = {"done": False}
        while answer == {"done": False}:
            answer = self.server.post("/sample", job)
        self.trouble = ""
        _check(answer, self.server.url)

    def close(self) -> None:
        """Leave the worker to its other trainers."""


class _Process:
    """Worker process on this machine, started when a job arrives and restarted after it has died."""

    def __init__(self, folder: str) -> None:
        self.folder, self.trouble, self.closed = folder, "", False
        self.process: subprocess.Popen[bytes] | None = None

    def sample(self, job: Mapping[str, Any]) -> None:
        said = ""
        for _ in range(ATTEMPTS):
            if self.process is None or self.process.poll() is not None:
                self.process = self._launched()
            answer = self._exchange(self.process, job)
            if answer is not None:
                _check(answer, f"pid {self.process.pid}")
                return
            said = f"a rollout worker (pid {self.process.pid}) ended with status {self.process.wait()}"
            if self.closed:
                break
            rank_zero_warn(f"{said}; a new one draws its episodes again.")
        raise StateError("worker-died", f"{said}, {ATTEMPTS} times in a row on one job: see its last lines above")

    def _launched(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "rlhf_lightning.sampling.worker_process", self.folder]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, process_group=0
        )

    def _exchange(self, process: subprocess.Popen[bytes], message: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the worker's response; None if the worker has died."""
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = b""
        return json.loads(line) if line else None

    def close(self) -> None:
        """Kill the process, which may hang."""
        self.closed = True
        if self.process is not None:
            self.process.kill()


def _check(answer: Any, worker: str) -> None:
    if answer != {"done": True}:
        said = answer.get("error") if isinstance(answer, dict) else answer
        raise StateError("worker-failed", f"a rollout worker ({worker}) failed: {str(said)[:2000]}")


def _files_of(request: SamplingRequest, rows: Sequence[int], folder: Path, number: int) -> dict[str, str]:
    """Write some prompts of a request; return the names of the files of prompts and of the result."""
    prompts, chosen = [request.prompts[row].cpu() for row in rows], torch.tensor(rows, dtype=torch.long)
    tensors = {
        "ids": torch.cat(prompts),
        "counts": torch.tensor([len(prompt) for prompt in prompts]),
        "episodes": request.episodes.cpu()[chosen].contiguous(),
        "starts": request.first_positions.cpu()[chosen].contiguous(),
    }
    names = {name: str(folder / f"{name}-{number}.safetensors") for name in ("prompts", "result")}
    save_file(tensors, names["prompts"])
    return names


def _assembled(
    found: Sequence[Mapping[str, Tensor]], parts: Sequence[Sequence[int]], on_progress: Callable[[int], None] | None
) -> Completions:
    """Join the workers' results in the order of the prompts."""
    rows: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
    for tensors, part in zip(found, parts, strict=True):
        counts = tensors["counts"].tolist()
        cut = [tensors[name].split(counts) for name in ("ids", "logprobs", "entropies")]
        rows |= {row: (cut[0][n], cut[1][n], cut[2][n], tensors["finished"][n]) for n, row in enumerate(part)}
    if on_progress is not None:
        on_progress(len(rows))
    ordered = [rows[row] for row in range(len(rows))]
    ids, logprobs, entropies, finished = (tuple(row[n] for row in ordered) for n in range(4))
    return Completions(ids, logprobs, torch.stack(finished), entropies)
