"""Cut the network between a trainer and what samples its rollouts, and compare with a run whose network is not cut.

    python experiments/engines/cut_link.py [--out runs/cut_link] [--vllm_python .venv-vllm/bin/python]

Trainer and sampler run in two network namespaces, which need Linux, root and iproute2, joined by a pair of virtual
devices. The sampler is ``rlhf rollout-worker``, or a vLLM server with an adapter or with full weights. The sampler's
device is set down during a rollout and during a weight update, and up again after a while. So packets vanish, and no
connection is closed. The run must wait and go on; with the worker it must end bit-identical. The exit status is 1 if a
run does not. Every finished run is one file in the folder, and a second call continues with the next. Writes
experiments/engines/cut_link.md.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
# The server's own processes talk to each other over the loopback device, and the worker asks for a key.
os.environ |= {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "WORKER_KEY": "key-of-this-drill"}

import lightning.pytorch as pl
from lagged_run import (
    Service,
    answers,
    compared,
    read_result,
    run,
    vllm_command,
    wait_for,
    watch,
    write_policy,
    write_result,
)

from rlhf_lightning.evaluation.report import markdown_table, write_markdown
from rlhf_lightning.sampling.remote_engine import RemoteEngine
from rlhf_lightning.sampling.worker_engine import WorkerEngine

HERE = Path(__file__).resolve().parent
KINDS = {
    "worker": "`rlhf rollout-worker`", "adapter": "vLLM, adapter", "weights": "vLLM, full weights",
}  # fmt: skip


class Link:
    """Two network namespaces joined by a pair of virtual devices."""

    def __init__(self) -> None:
        self.names = [f"rlhf{os.getpid()}{side}" for side in "ab"]
        self.ends = [f"cl{os.getpid()}{side}" for side in "ab"]
        self.hosts = ["10.213.8.1", "10.213.8.2"]

    def __enter__(self) -> Link:
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", self.ends[0], "type", "veth", "peer", "name", self.ends[1])
        for name, end, host in zip(self.names, self.ends, self.hosts, strict=True):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"{host}/24", "dev", end)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", end, "up")
        return self

    def __exit__(self, *error: object) -> None:
        for name in self.names:
            ip("netns", "del", name)

    def inside(self, side: int) -> tuple[str, ...]:
        """Return the beginning of a command that runs in one of the namespaces."""
        return ("ip", "netns", "exec", self.names[side])

    @property
    def end(self) -> tuple[str, str]:
        """Namespace and name of the device that is set down."""
        return self.names[1], self.ends[1]


def ip(*arguments: str) -> None:
    """Run iproute2."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Cuts(pl.Callback):
    """Cuts the link in every second rollout after a request of a kind has begun.

    Args:
        end: namespace and name of the device.
        plan: kind of the request, and seconds until the link is restored.
        spans: longest time from the begin of a request of a kind to the cut, seconds.
    """

    def __init__(self, end: tuple[str, str], plan: list[tuple[str, float]], spans: dict[str, float]) -> None:
        self.end, self.plan, self.spans = end, list(plan), spans
        self.next: tuple[str, float] | None = None
        self.chance, self.cuts, self.lock = random.Random(0), list[dict[str, Any]](), threading.Lock()
        self.timers: list[threading.Timer] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Choose what to cut in this rollout."""
        if batch_idx > 1 and batch_idx % 2 and self.plan:
            self.next = self.plan.pop(0)

    def before(self, kind: str) -> None:
        """Cut soon after a request of the chosen kind begins."""
        with self.lock:
            if self.next is None or self.next[0] != kind:
                return
            cut = {"kind": kind, "seconds": self.next[1]}
            self.next = None
        self.timers.append(threading.Timer(self.chance.uniform(0, self.spans[kind]), self._cut, [cut]))
        self.timers[-1].start()

    def on_train_end(self, trainer: Any, module: Any) -> None:
        """Wait for the last cut."""
        for timer in self.timers:
            timer.join()

    def _cut(self, cut: dict[str, Any]) -> None:
        name, device = self.end
        ip("-n", name, "link", "set", device, "down")
        time.sleep(cut["seconds"])
        ip("-n", name, "link", "set", device, "up")
        self.cuts.append({**cut, "restored": time.monotonic()})


# -- the two sides ----------------------------------------------------------------------------------------------------


def command_of(kind: str, out: Path, python: str) -> list[str]:
    """Return the command of the sampler."""
    if kind == "worker":
        return ["rollout-worker", str(out / "shared"), "--device", "cpu", "--api_key", "WORKER_KEY"]
    folder = ["--folder", str(out / "served")] if kind == "weights" else []
    return vllm_command(out / "world" / "policy", python, *folder)


def train(arguments: argparse.Namespace) -> None:
    """Run one training run in this namespace and write what was seen; ``--end`` names the device to cut."""
    kind, url, file = arguments.inside
    out = arguments.out
    plan = [(moment, seconds) for seconds in arguments.seconds for moment in ("sampling", "weight update")]
    if kind == "worker":
        plan = [(moment, seconds) for moment, seconds in plan if moment == "sampling"]  # weights are files
        engine: Any = WorkerEngine(addresses=[url], shared_folder=str(out / "shared"), api_key="WORKER_KEY")
    else:
        folder = out / ("served" if kind == "weights" else "adapters")
        engine = RemoteEngine(url, "policy", str(folder), retries=10)
    rollouts, callbacks = 2 * len(plan) + 4, list[Any]()
    if arguments.end is not None:
        whole = read_result(out / f"{kind}-whole.json")
        callbacks.append(Cuts(tuple(arguments.end), plan, {"sampling": whole["seconds"], "weight update": 0.05}))
    watch(engine.servers[0], [], callbacks[0].before if callbacks else lambda kind: None)
    wait_for(partial(answers, url))
    found = run(out / "world", engine, rollouts, lora=kind == "adapter", callbacks=callbacks)
    write_result(Path(file), found | {"cuts": callbacks[0].cuts if callbacks else [], "rollouts": rollouts})


def measured(kind: str, arguments: argparse.Namespace) -> None:
    """Run the missing runs of a kind, with its sampler in the second namespace."""
    out, whole, cut = arguments.out, *(arguments.out / f"{kind}-{run}.json" for run in ("whole", "cut"))
    with Link() as link:
        command = command_of(kind, out, arguments.vllm_python)
        service = Service(command, out / f"{kind}.log", link.hosts[1], link.inside(1))
        try:
            for file, further in ((whole, []), (cut, ["--end", *link.end])):
                if not file.exists():
                    own = [sys.executable, __file__, "--inside", kind, service.url, str(file), "--out", str(out)]
                    lengths = ["--seconds", *map(str, arguments.seconds)]
                    subprocess.run([*link.inside(0), *own, *lengths, *further], check=True)
        finally:
            service.stop()


def main() -> int:
    """Run the missing runs and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="*", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--seconds", nargs="*", type=float, default=[15.0, 100.0], help="durations of the cuts")
    parser.add_argument("--out", type=Path, default=Path("runs/cut_link"))
    parser.add_argument("--vllm_python", default=".venv-vllm/bin/python")
    parser.add_argument("--page", type=Path, default=HERE / "cut_link.md")
    parser.add_argument("--inside", nargs=3, metavar=("KIND", "URL", "FILE"), help=argparse.SUPPRESS)
    parser.add_argument("--end", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.out = arguments.out.absolute()
    if arguments.inside:
        train(arguments)
        return 0
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or shutil.which("ip") is None:
        raise SystemExit("network namespaces need Linux, root and iproute2")
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_policy(arguments.out / "world")
    failed, rows = False, []
    for kind, title in KINDS.items():
        file = arguments.out / f"{kind}-cut.json"
        if kind in arguments.kinds and not file.exists():
            measured(kind, arguments)
        if file.exists():
            found, whole = read_result(file), read_result(arguments.out / f"{kind}-whole.json")
            result = compared(found, whole, found["rollouts"])
            failed |= result.lost != 0 or found["gap"] >= found["other_gap"] / 10
            failed |= not found["cuts"] or (kind == "worker" and not result.bits)
            for number, cut in enumerate(found["cuts"]):
                after = min(end for end in found["ends"] if end > cut["restored"]) - cut["restored"]
                same = f"{100 * result.equal:.1f} %", "yes" if result.bits else "no"
                shown = (title, result.lost, *same) if number == 0 else ("",) * 4
                rows.append([shown[0], cut["kind"], f"{cut['seconds']:g}", f"{after:.1f}", *shown[1:]])
    write_page(rows, arguments.page)
    return int(failed)


def write_page(rows: list[list[Any]], page: Path) -> None:
    """Write the table."""
    header = [
        "sampler", "cut during", "for, s", "rollout finished after, s", "episodes lost", "equal completions",
        "bit-equal",
    ]  # fmt: skip
    write_markdown(page, (
        "# A network that is cut\n\n"
        "`python experiments/engines/cut_link.py` writes this page: GRPO with lag 1, 64 completions of up to 48 "
        "tokens, the trainer in one network namespace and the sampler in another, one thread in each process. At a "
        "random moment of a rollout or of a weight update, the sampler's network device is set down for some seconds: "
        "packets vanish, and no connection is closed. The run waits; the fourth column is the time from the moment "
        "that the device is up again to the end of the rollout. Completions and weights are compared with those of a "
        "run whose network is not cut.\n\n"
        f"{markdown_table(header, rows)}\n\n"
        "A connection whose other host is silent for 60 s is given up, and the request is repeated. Shorter cuts are "
        "repaired by TCP itself.\n\n"
        "See also: [killed workers and servers](kills.md), and [engines](../../docs/engines.md).\n"
    ))  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
