"""Kill rollout workers at random moments of a run with lag 1, and compare it with a run that nothing disturbs.

    python experiments/engines/kills.py [--kills 20] [--out runs/kills]

GRPO of a small policy with random weights samples with a worker process that `WorkerEngine` starts, or with
`rlhf rollout-worker` at two addresses, which this script starts again after a kill. In every second rollout one worker,
drawn at random, gets SIGKILL after a random time of up to 1.2 undisturbed rollouts. In the end the weights and the
scores of all rollouts must be equal bit for bit; the exit status is 1 if they are not. Every finished drill is one file
in the folder, and a second call continues with the next. Writes experiments/engines/kills.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import lightning.pytorch as pl
import torch

from rlhf_lightning.data import PromptDataModule
from rlhf_lightning.evaluation.report import markdown_table, write_markdown
from rlhf_lightning.modules import GRPOModule
from rlhf_lightning.sampling.slot_engine import SlotEngine
from rlhf_lightning.sampling.worker_engine import WorkerEngine
from rlhf_lightning.worlds.assistant import write_world

HERE = Path(__file__).resolve().parent
KINDS = {
    "processes": ("one worker process of the engine", "`SlotEngine` in the trainer's process"),
    "addresses": ("`rlhf rollout-worker` at two addresses", "the same two workers, not killed"),
}
"""Workers that are killed, and the undisturbed run that the disturbed run is compared with."""


def lengths(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    """Score completions by their number of characters, which takes no time."""
    return [float(len(text)) for text in completions]


class Addresses:
    """Two ``rlhf rollout-worker`` processes; a killed one is started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as one, socket.socket() as other:
            for free in (one, other):
                free.bind(("127.0.0.1", 0))
            self.ports = [free.getsockname()[1] for free in (one, other)]
        self.processes = [self._started(number) for number in range(2)]
        for url in self.urls:
            self._wait(f"{url}/health")

    @property
    def urls(self) -> list[str]:
        """Addresses of the workers."""
        return [f"http://127.0.0.1:{port}" for port in self.ports]

    def kill(self, number: int) -> None:
        """Kill a worker, and start it again."""
        self.processes[number].kill()
        self.processes[number].wait()
        self.processes[number] = self._started(number)

    def close(self) -> None:
        """End the workers."""
        for process in self.processes:
            process.kill()
            process.wait()

    def _started(self, number: int) -> subprocess.Popen[bytes]:
        command = ["rollout-worker", str(self.folder), "--port", str(self.ports[number]), "--device", "cpu"]
        return subprocess.Popen([sys.executable, "-m", "rlhf_lightning", *command], stdout=subprocess.DEVNULL)

    @staticmethod
    def _wait(url: str) -> None:
        for _ in range(600):
            try:
                urllib.request.urlopen(url, timeout=5).close()
            except OSError:
                time.sleep(0.5)
            else:
                return
        raise RuntimeError(f"{url} does not answer")


class Disturbance(pl.Callback):
    """Records the scores of rollouts, and kills workers.

    Args:
        kill: kills the worker with a number; None disturbs nothing.
        kills: number of kills.
        seconds: duration of an undisturbed rollout.
        workers: number of workers.
    """

    def __init__(
        self, kill: Callable[[int], None] | None = None, kills: int = 0, seconds: float = 0.0, workers: int = 1
    ) -> None:
        self.kill, self.left, self.seconds, self.count = kill, kills, seconds, workers
        self.chance, self.moments = random.Random(0), Counter[str]()
        self.scores: list[float] = []
        self.busy: set[int] = set()
        self.timers: list[threading.Timer] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Watch the workers from the second rollout on, and kill one in every second rollout after it."""
        if batch_idx == 1:
            for number, worker in enumerate(getattr(module.engine, "workers", ())):
                worker.sample = self._watched(number, worker.sample)
        if self.kill is not None and self.left and batch_idx > 1 and batch_idx % 2:
            self.left -= 1
            delay = self.chance.uniform(0, 1.2 * self.seconds)
            self.timers.append(threading.Timer(delay, self._strike, [self.chance.randrange(self.count)]))
            self.timers[-1].start()

    def on_train_end(self, trainer: Any, module: Any) -> None:
        """Wait for the last kill."""
        for timer in self.timers:
            timer.join()

    def on_rollout_end(self, trainer: Any, module: Any, rollout: Any, means: Any) -> None:
        """Record the score."""
        self.scores.append(means["score"])

    def _watched(self, number: int, sample: Callable[[Any], None]) -> Callable[[Any], None]:
        def watched(job: Any) -> None:
            self.busy.add(number)
            try:
                sample(job)
            finally:
                self.busy.discard(number)

        return watched

    def _strike(self, number: int) -> None:
        assert self.kill is not None
        self.moments["with a job" if number in self.busy else "idle"] += 1
        self.kill(number)


def run(world: Path, engine: Any, rollouts: int, disturbance: Disturbance) -> tuple[str, float]:
    """Train; return a digest of the weights and scores, and the seconds of a rollout."""
    pl.seed_everything(0, verbose=False)
    module = GRPOModule(
        init_from=str(world / "model"), from_scratch=True, scorer=lengths, engine=engine, lag=1, max_new_tokens=48,
        kl_coef=0.0, sampler_correction="sequence_truncate", learning_rate=1e-4,
    )  # fmt: skip
    data = PromptDataModule(
        str(world / "prompts_train.jsonl"), batch_size=64, samples_per_prompt=8, rollouts=rollouts,
        cache_dir=str(world / "cache"),
    )  # fmt: skip
    began = time.perf_counter()
    pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[disturbance],
    ).fit(module, data)  # fmt: skip
    seconds = (time.perf_counter() - began) / rollouts
    digest = hashlib.sha256(json.dumps(disturbance.scores).encode())
    for name, weight in sorted(module.policy.state_dict().items()):
        digest.update(name.encode() + weight.contiguous().numpy().tobytes())
    return digest.hexdigest(), seconds


def drilled(kind: str, kills: int, world: Path) -> dict[str, Any]:
    """Run a drill; return what was seen."""
    rollouts, began = 2 * kills + 4, time.perf_counter()
    if kind == "processes":
        engine = WorkerEngine()

        def kill(number: int) -> None:
            while (process := engine.workers[0].process).poll() is not None:  # a new one is started
                time.sleep(0.01)
            process.kill()

        whole, seconds = run(world, SlotEngine(), rollouts, Disturbance())
        disturbance = Disturbance(kill, kills, seconds)
        disturbed, _ = run(world, engine, rollouts, disturbance)
    else:
        shared = Addresses(world / "shared")
        try:
            given = {"addresses": shared.urls, "shared_folder": str(shared.folder)}
            whole, seconds = run(world, WorkerEngine(**given), rollouts, Disturbance())
            disturbance = Disturbance(shared.kill, kills, seconds, workers=2)
            disturbed, _ = run(world, WorkerEngine(**given), rollouts, disturbance)
        finally:
            shared.close()
    return {
        "kind": kind, "kills": sum(disturbance.moments.values()), "moments": disturbance.moments, "rollouts": rollouts,
        "equal": whole == disturbed, "seconds": round(time.perf_counter() - began),
    }  # fmt: skip


def main() -> int:
    """Run the missing drills and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs of each kind of workers (default 20)")
    parser.add_argument("--out", type=Path, default=Path("runs/kills"))
    parser.add_argument("--page", type=Path, default=HERE / "kills.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    found = []
    with tempfile.TemporaryDirectory() as world:
        write_world(world, demonstrations=8, pairs_train=16, pairs_test=4)
        for kind in KINDS:
            file = arguments.out / f"{kind}.json"
            if not file.exists():
                file.write_text(json.dumps(drilled(kind, arguments.kills, Path(world))) + "\n")
            found.append(json.loads(file.read_text()))
            print(found[-1], flush=True)
    rows = [
        [
            *KINDS[one["kind"]], one["rollouts"], one["kills"], one["moments"].get("with a job", 0),
            one["moments"].get("idle", 0), "yes" if one["equal"] else "no",
        ]
        for one in found
    ]  # fmt: skip
    header = ["workers", "compared with", "rollouts", "SIGKILLs", "with a job", "idle", "bit-equal"]
    write_markdown(arguments.page, (
        "# Killed rollout workers\n\n"
        "`python experiments/engines/kills.py` writes this page: GRPO with lag 1, 64 completions of up to 48 tokens, "
        "one thread in each worker. In every second rollout a worker gets SIGKILL at a random moment. Compared are the "
        "weights after the run, and the scores of all rollouts.\n\n"
        f"{markdown_table(header, rows)}\n\nSee also: [engines](../../docs/engines.md).\n"
    ))  # fmt: skip
    return int(not all(one["equal"] and one["kills"] == arguments.kills for one in found))


if __name__ == "__main__":
    sys.exit(main())
