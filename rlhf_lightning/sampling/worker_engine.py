"""Sample in worker processes of this machine, which draw the same episodes as `SlotEngine`, while the trainer trains.

A worker loads the policy once, and then gets weights and prompts as files for each job. Its result depends only on the
job. If a worker is killed, a new worker gets the job and returns the same result.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_lightning.errors import SettingError, StateError
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.loading import LoadSettings
from rlhf_lightning.models.lora import LoraSettings
from rlhf_lightning.models.roles import load_policy
from rlhf_lightning.sampling.engines import Completions, SamplingEngine, SamplingRequest, SamplingSettings, spread
from rlhf_lightning.sampling.slot_engine import SlotEngine
from rlhf_lightning.tokenization import Ends

ATTEMPTS = 3
"""Maximum number of workers that try a job before the job fails."""


class WorkerEngine(SamplingEngine):
    """Sample with the `SlotEngine` in worker processes; with ``model.lag`` they sample while the trainer trains.

    Episodes are those of the `SlotEngine`. Their last bits depend on the number of workers and of threads per worker
    (by default the trainer's number): keep both to resume a run bit for bit.

    Args:
        workers: number of processes; prompts are distributed over them by length.
        threads: threads of each worker; null uses the trainer's number.
        device: device of the workers, such as ``cuda:1``; null uses the trainer's device.
    """

    def __init__(self, workers: int = 1, threads: int | None = None, device: str | None = None) -> None:
        for name, value in (("workers", workers), ("threads", threads)):
            if value is not None and value < 1:
                raise SettingError("setting-out-of-range", f"{name} is {value}: it must be at least 1")
        self.count, self.threads, self.device = workers, threads, device
        self.workers: list[_Worker] = []
        self._loading: dict[str, Any] | None = None
        self._files: tempfile.TemporaryDirectory[str] | None = None
        self._versions = 0
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
        self.require_one_model(model, request)
        if not request.prompts:
            nothing = Completions((), (), torch.zeros(0, dtype=torch.bool), ())
            return lambda: nothing
        job = self._job(model, request)
        parts = spread([len(prompt) for prompt in request.prompts], self.count)
        waiting = [worker.submit(job, request, rows) for worker, rows in zip(self.workers, parts, strict=False)]

        def result() -> Completions:
            found = [one() for one in waiting]
            Path(job["weights"]).unlink(missing_ok=True)
            return _assembled(found, parts, request.on_progress)

        return result

    def _job(self, model: CausalLM, request: SamplingRequest) -> dict[str, Any]:
        """Start workers if there are none, and write the trained weights for a job."""
        if self._loading is None:
            raise StateError("worker-not-prepared", "WorkerEngine serves training runs: for commands use SlotEngine")
        parameter = next(model.parameters())
        if self._files is None:
            self._files = tempfile.TemporaryDirectory(prefix="rlhf-workers-")
            folder = Path(self._files.name)
            place = self.device or str(parameter.device)
            self.workers = [_Worker(folder / str(n), {**self._loading, "device": place}) for n in range(self.count)]
        self._versions += 1
        weights = Path(self._files.name) / f"weights-{self._versions}.safetensors"
        own = dict(model.model.named_parameters())
        self._trained |= {name for name, parameter in own.items() if parameter.requires_grad}
        save_file({name: own[name].detach().cpu().contiguous() for name in sorted(self._trained)}, weights)
        kind = parameter.device.type
        return {
            "weights": str(weights),
            "settings": asdict(request.settings),
            "seed": request.seed,
            "ends": list(request.end_ids),
            "threads": self.threads or torch.get_num_threads(),
            "autocast": str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None,
        }


class _Worker:
    """Worker process, started when a job arrives and restarted after it has died."""

    def __init__(self, folder: Path, loading: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.loading = folder, loading
        self.process: subprocess.Popen[bytes] | None = None
        self.pool = ThreadPoolExecutor(max_workers=1)
        self.jobs = 0
        self.lock = threading.Lock()

    def submit(self, job: Mapping[str, Any], request: SamplingRequest, rows: Sequence[int]) -> Callable[[], Any]:
        """Queue a job for some prompts of a request; return a function that waits for its tensors."""
        self.jobs += 1
        given, result = self.folder / f"job-{self.jobs}.safetensors", self.folder / f"result-{self.jobs}.safetensors"
        prompts = [request.prompts[row].cpu() for row in rows]
        chosen = torch.tensor(rows, dtype=torch.long)
        tensors = {
            "ids": torch.cat(prompts),
            "counts": torch.tensor([len(prompt) for prompt in prompts]),
            "episodes": request.episodes.cpu()[chosen].contiguous(),
            "starts": request.first_positions.cpu()[chosen].contiguous(),
        }
        save_file(tensors, given)
        return self.pool.submit(self._run, {**job, "prompts": str(given), "result": str(result)}).result

    def _run(self, job: Mapping[str, Any]) -> dict[str, Tensor]:
        said = ""
        for _ in range(ATTEMPTS):
            if self.process is None or self.process.poll() is not None:
                self._launch()
            answer = self._exchange(job)
            if answer == {"done": True}:
                found = load_file(job["result"])
                for name in ("prompts", "result"):
                    Path(job[name]).unlink(missing_ok=True)
                return found
            if answer is not None:
                raise _failure(answer)
            assert self.process is not None
            said = f"a rollout worker (pid {self.process.pid}) ended with status {self.process.wait()}"
            rank_zero_warn(f"{said}; a new one draws its episodes again.")
        raise StateError("worker-died", f"{said}, {ATTEMPTS} times in a row on one job: see its last lines above")

    def _launch(self) -> None:
        command = [sys.executable, "-m", "rlhf_lightning.sampling.worker_engine"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, process_group=0
        )
        answer = self._exchange(self.loading)
        if answer is not None and answer != {"done": True}:
            self.process.stdin.close()  # type: ignore[union-attr]  # ends the process
            raise _failure(answer)

    def _exchange(self, message: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the worker's response; None if the worker has died."""
        process = self.process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = b""
        return json.loads(line) if line else None


def _failure(answer: Mapping[str, Any]) -> StateError:
    return StateError("worker-failed", f"a rollout worker failed: {answer.get('error')}")


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


# -- the worker -------------------------------------------------------------------------------------------------------


def serve() -> None:
    """Load the policy described in the first line, then sample job after job until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries must not be read as a response
    model: CausalLM | None = None
    for line in sys.stdin:
        message = json.loads(line)
        try:
            if model is None:
                model = _load(message)
            else:
                _sample(model, message)
            answer: dict[str, Any] = {"done": True}
        except Exception as error:  # noqa: BLE001 - the trainer raises it
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def _load(message: Mapping[str, Any]) -> CausalLM:
    settings = {**message["settings"], "self_check": False}
    settings["trust_remote_code"] = tuple(settings["trust_remote_code"])
    lora = None if message["lora"] is None else LoraSettings(**message["lora"])
    model = load_policy(message["init_from"], LoadSettings(**settings), lora)
    return model.to(message["device"])


def _sample(model: CausalLM, job: Mapping[str, Any]) -> None:
    torch.set_num_threads(job["threads"])
    own = dict(model.model.named_parameters())
    with safe_open(job["weights"], "pt") as file, torch.no_grad():
        for name in file.keys():  # noqa: SIM118 - not a mapping
            own[name].copy_(file.get_tensor(name))
    given = load_file(job["prompts"])
    prompts = given["ids"].split(given["counts"].tolist())
    device = next(model.parameters()).device.type
    low = job["autocast"]
    context = nullcontext() if low is None else torch.autocast(device, getattr(torch, low.removeprefix("torch.")))
    asked = SamplingRequest(
        prompts, given["episodes"], SamplingSettings(**job["settings"]), job["seed"], Ends(job["ends"]), None, None,
        starts=given["starts"],
    )  # fmt: skip
    with context:
        drawn = SlotEngine().complete(model, asked)
    assert drawn.entropies is not None
    save_file(
        {
            "ids": torch.cat(drawn.ids), "counts": torch.tensor([len(ids) for ids in drawn.ids]),
            "logprobs": torch.cat(drawn.logprobs), "entropies": torch.cat(drawn.entropies),
            "finished": drawn.finished.cpu(),
        },
        job["result"],
    )  # fmt: skip


if __name__ == "__main__":
    serve()
