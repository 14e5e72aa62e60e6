"""Kill what samples the rollouts at random moments of a run with lag 1, and compare with a run that nothing disturbs.

    python experiments/engines/kills.py [--kills 20] [--out runs/kills] [--vllm_python .venv-vllm/bin/python]

GRPO of a small policy with random weights samples with a worker process that `WorkerEngine` starts, with ``rlhf
rollout-worker`` at two addresses, which this script starts again after a kill, or with an adapter on a vLLM server that
``rlhf serve-vllm`` starts again. In every second rollout one of them, drawn at random, gets SIGKILL at a random moment.
No episode may be missing, and every rollout must have the log-probabilities of the weights that the lag prescribes.
With workers, the final weights and all completions must be equal bit for bit; the exit status is 1 if they are not.
Every finished part is one file in the folder, and a second call continues with the next. Writes
experiments/engines/kills.md. Without the interpreter with vLLM its row is left as it was measured before.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

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
from rlhf_lightning.sampling.slot_engine import SlotEngine
from rlhf_lightning.sampling.worker_engine import WorkerEngine

HERE = Path(__file__).resolve().parent
MOMENTS = ("sampling", "weight update", "starting", "idle")


class Sampler(NamedTuple):
    """What samples the rollouts of a drill.

    Attributes:
        engine: makes the engine of a run.
        reference: makes the engine of the run that nothing disturbs.
        kill: kills one of them, given the engine, its number, and a random number in [0, 1).
        answers: whether one of them answers now.
        busy: kinds of the open requests to each of them.
    """

    engine: Callable[[], Any]
    reference: Callable[[], Any]
    kill: Callable[[Any, int, float], None]
    answers: Callable[[int], bool]
    busy: list[list[str]]


class Kills(pl.Callback):
    """Kills in every second rollout.

    Args:
        sampler: what samples.
        plan: for each rollout with kills, the seconds from its start to each kill.
        chance: source of random numbers.
    """

    def __init__(self, sampler: Sampler, plan: list[list[float]], chance: random.Random) -> None:
        self.sampler, self.plan, self.chance = sampler, list(plan), chance
        self.moments = Counter[str]()
        self.timers: list[threading.Timer] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Start the timers of a rollout's kills."""
        if batch_idx == 1:
            for worker, busy in zip(getattr(module.engine, "workers", ()), self.sampler.busy, strict=False):
                worker.sample = partial(_busy, worker.sample, busy)
        if self.plan and batch_idx > 1 and batch_idx % 2:
            for delay in self.plan.pop(0):
                self.timers.append(threading.Timer(delay, self._strike, [module.engine]))
                self.timers[-1].start()

    def on_train_end(self, trainer: Any, module: Any) -> None:
        """Wait for the last kill."""
        for timer in self.timers:
            timer.join()

    def _strike(self, engine: Any) -> None:
        number = self.chance.randrange(len(self.sampler.busy))
        kinds = list(self.sampler.busy[number])
        moment = ("weight update" if "weight update" in kinds else kinds[0]) if kinds else "idle"
        self.moments[moment if self.sampler.answers(number) else "starting"] += 1
        self.sampler.kill(engine, number, self.chance.random())


def _busy(sample: Callable[[Any], None], busy: list[str], job: Any) -> None:
    busy.append("sampling")
    try:
        sample(job)
    finally:
        busy.remove("sampling")


# -- what is killed ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def processes(out: Path, python: str) -> Iterator[Sampler]:
    """Yield a worker process of the engine; the reference samples in the trainer's process."""

    def kill(engine: Any, number: int, which: float) -> None:
        wait_for(lambda: engine.workers[0].process.poll() is None)  # a new one is started
        engine.workers[0].process.kill()

    yield Sampler(WorkerEngine, SlotEngine, kill, lambda number: True, [[]])


@contextlib.contextmanager
def addresses(out: Path, python: str) -> Iterator[Sampler]:
    """Yield two workers at addresses."""
    folder = out / "shared"
    workers = [Service(["rollout-worker", str(folder), "--device", "cpu"], out / "workers.log") for _ in range(2)]

    def kill(engine: Any, number: int, which: float) -> None:
        workers[number].kill()
        workers[number].start()

    def engine() -> WorkerEngine:
        for worker in workers:
            wait_for(partial(answers, worker.url))
        return WorkerEngine(addresses=[worker.url for worker in workers], shared_folder=str(folder))

    try:
        yield Sampler(engine, engine, kill, lambda number: answers(workers[number].url), [[], []])
    finally:
        for worker in workers:
            worker.stop()


@contextlib.contextmanager
def servers(out: Path, python: str) -> Iterator[Sampler]:
    """Yield a vLLM server; a kill hits the process that answers or the one that computes."""
    server, busy = Service(vllm_command(out / "world" / "policy", python), out / "vllm.log"), list[str]()

    def kill(engine: Any, number: int, which: float) -> None:
        wait_for(lambda: bool(server.descendants()))
        found = server.descendants()
        with contextlib.suppress(ProcessLookupError):
            os.kill(found[0] if which < 0.5 else found[-1], 9)

    def engine() -> RemoteEngine:
        wait_for(partial(answers, server.url), 1200)
        made = RemoteEngine(server.url, "policy", str(out / "adapters"), timeout=300.0, retries=30)
        watch(made.servers[0], busy)
        return made

    try:
        yield Sampler(engine, engine, kill, lambda number: answers(server.url), [busy])
    finally:
        server.stop()


class Kind(NamedTuple):
    """A kind of samplers.

    Attributes:
        start: starts them for the time of a context.
        title: what they are.
        reference: what the disturbed run is compared with.
        parts: number of runs that the kills are distributed over.
        exact: whether the disturbed run must be bit-identical.
    """

    start: Any
    title: str
    reference: str
    parts: int
    exact: bool


KINDS = {
    "processes": Kind(processes, "one worker process of the engine", "`SlotEngine` in the trainer's process", 1, True),
    "addresses": Kind(addresses, "`rlhf rollout-worker` at two addresses", "the same two workers, not killed", 1, True),
    "servers": Kind(servers, "a vLLM server with an adapter", "the same server, not killed", 4, False),
}

# -- drills -----------------------------------------------------------------------------------------------------------


def planned(name: str, kills: int, seconds: float, chance: random.Random) -> list[list[float]]:
    """Return when to kill: at random moments of up to 1.2 undisturbed rollouts.

    A server's weight updates are short and at the start of a rollout: every second kill falls into the first fifth. One
    kill in four is followed by another one while the server starts again or compiles.
    """
    span = 1.2 * seconds
    if name != "servers":
        return [[chance.uniform(0, span)] for _ in range(kills)]
    plan: list[list[float]] = []
    while kills:
        plan.append([chance.uniform(0, span if len(plan) % 2 else span / 6)])
        if len(plan) % 4 == 3 and kills > 1:
            plan[-1].append(plan[-1][0] + chance.uniform(2, 40))
        kills -= len(plan[-1])
    return plan


def drilled(name: str, kills: int, part: int, out: Path, python: str) -> dict[str, Any]:
    """Run one part of a drill, after the undisturbed run if it is missing; return what was seen."""
    lora, world, chance = name == "servers", out / "world", random.Random(f"{name} {part}")
    with KINDS[name].start(out, python) as sampler:
        began, rollouts = time.perf_counter(), 2 * kills + 4
        file = out / f"{name}-whole-{rollouts}.json"
        if not file.exists():
            write_result(file, run(world, sampler.reference(), rollouts, lora))
        whole = read_result(file)
        plan = planned(name, kills, whole["seconds"], chance)
        strikes = Kills(sampler, plan, chance)
        found = run(world, sampler.engine(), rollouts, lora, [strikes])
    result = compared(found, whole, rollouts)
    return {
        "kills": sum(strikes.moments.values()), "moments": strikes.moments, "rollouts": rollouts, "gap": found["gap"],
        "other_gap": found["other_gap"],
        "seconds": round(time.perf_counter() - began), **result._asdict(),
    }  # fmt: skip


def main() -> int:
    """Run the missing parts and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs of each kind (default 20)")
    parser.add_argument("--kinds", nargs="*", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--out", type=Path, default=Path("runs/kills"))
    parser.add_argument("--vllm_python", default=".venv-vllm/bin/python")
    parser.add_argument("--page", type=Path, default=HERE / "kills.md")
    arguments = parser.parse_args()
    out = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    write_policy(out / "world")
    failed, rows = False, []
    for name, kind in KINDS.items():
        parts = []
        for part in range(kind.parts):
            file = out / f"{name}-{part}.json"
            if name in arguments.kinds and not file.exists():
                share = len(range(part, arguments.kills, kind.parts))
                write_result(file, drilled(name, share, part, out, arguments.vllm_python))
                print(name, file.read_text(), flush=True)
            parts += [read_result(file)] if file.exists() else []
        if parts:
            rows.append(row_of(kind, parts))
            whole = all(one["lost"] == 0 and (one["bits"] or not kind.exact) for one in parts)
            prescribed = all(one["gap"] < one["other_gap"] / 10 for one in parts)
            failed |= not (whole and prescribed) or sum(one["kills"] for one in parts) != arguments.kills
    write_page(rows, arguments.page)
    return int(failed)


def row_of(kind: Kind, parts: list[dict[str, Any]]) -> list[Any]:
    """Return a row of the page."""
    moments = sum((Counter(one["moments"]) for one in parts), Counter[str]())
    rollouts = sum(one["rollouts"] for one in parts)
    equal = sum(one["equal"] * one["rollouts"] for one in parts) / rollouts
    return [
        kind.title, kind.reference, rollouts, sum(moments.values()), *(moments[moment] for moment in MOMENTS),
        sum(one["lost"] for one in parts), f"{max(one['gap'] for one in parts):.0e}",
        f"{min(one['other_gap'] for one in parts):.0e}", f"{100 * equal:.1f} %",
        "yes" if all(one["bits"] for one in parts) else "no",
    ]  # fmt: skip


def write_page(rows: list[list[Any]], page: Path) -> None:
    """Write the table."""
    header = [
        "killed", "compared with", "rollouts", "SIGKILLs", *MOMENTS, "episodes lost", "prescribed weights",
        "next weights", "equal completions", "bit-equal",
    ]  # fmt: skip
    write_markdown(page, (
        "# Killed workers and servers\n\n"
        "`python experiments/engines/kills.py` writes this page: GRPO with lag 1, 64 completions of up to 48 tokens, "
        "one thread in each process. In every second rollout, what samples it gets SIGKILL at a random moment. *idle*: "
        "no request was open; *starting*: it did not answer yet after an earlier kill. *Prescribed "
        "weights*: largest difference, in nats, between the log-probabilities that the episodes were sampled with and "
        "those of the weights that the lag prescribes. *Next weights*: the same for the next version of the weights, "
        "smallest of all rollouts. *Bit-equal*: the completions of all rollouts and the weights after the run.\n\n"
        f"{markdown_table(header, rows)}\n\n"
        "The server's kills hit the process that answers requests or the process that computes, drawn at "
        "random. `rlhf serve-vllm` starts the server again; the trainer registers its adapters again and repeats the "
        "requests with the same seeds.\n\n"
        "See also: [a network that is cut](cut_link.md), and [engines](../../docs/engines.md).\n"
    ))  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
