"""Check that killed and resumed runs produce the same bits as uninterrupted runs.

    python experiments/reliability/drill.py --module ppo --kills 20 --strategy fsdp2 --lora
    python experiments/reliability/drill.py --module all --resume

One run is uninterrupted. Further runs are interrupted and resumed until the planned number of faults has hit. Faults
are SIGKILL during a rollout, an update, a validation or a checkpoint write; SIGTERM; a disk that is full when a
checkpoint is due; and files that are truncated or altered afterwards, as after a power loss. At the end, checkpoint
(weights, optimizer, random states, counters), exported model, TensorBoard curves and samples.jsonl must be equal bit
for bit. The last line lists what was lost; the exit status is 1 if anything was. ``--resume`` skips drills with a
result in the folder; the page is rewritten after each drill.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from itertools import cycle
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).resolve().parent))

from differences import differences
from page import render
from ranks import Ranks, import_early
from world import RANKS, STAGES, STRATEGIES, command, make_world

from rlhf_lightning.runs.interruptions import PREEMPTED

HERE = Path(__file__).resolve().parent


class Drill:
    """Drill of one stage under one strategy.

    Args:
        name: name of the stage.
        strategy: distributed strategy, which sets the number of processes.
        lora: train an adapter.
        folder: folder of the runs.
        world: folder of rows and models.
        seed: seed of the faults.
    """

    def __init__(self, name: str, strategy: str, lora: bool, folder: Path, world: Path, seed: int = 0) -> None:
        self.name, self.strategy, self.lora = name, strategy, lora
        self.folder, self.count = folder, RANKS[strategy]
        self.argv = command(name, world, strategy, lora)
        self.chance = random.Random(f"{seed}/{name}/{strategy}/{lora}")
        self.phases = cycle(STAGES[name].phases)
        self.counts = Counter[str]()
        self.lost: list[str] = []
        self.runs = 0
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, kills: int, further: bool = True) -> dict[str, Any]:
        """Interrupt runs until ``kills`` of them were killed; return counts by fault and phase, and losses.

        Args:
            kills: number of kills.
            further: also terminate runs, fill disks and damage checkpoints.
        """
        began = time.perf_counter()
        whole = self.whole()
        planned = ["kill"] * kills
        if further:
            for blow, every in (("terminate", 5), ("disk full", 10), ("tear", 5)):
                planned += [blow] * -(-kills // every)
        self.chance.shuffle(planned)
        while planned and not self.lost:
            planned = self.one_run(whole, planned)
        return {
            "module": self.name, "strategy": self.strategy, "lora": self.lora, "runs": self.runs, "counts": self.counts,
            "lost": self.lost, "seconds": round(time.perf_counter() - began, 1),
        }  # fmt: skip

    def whole(self, name: str = "whole") -> Path:
        """Run once without faults; return the run's folder."""
        imported = self.folder / "imported"
        ranks = Ranks([*self.argv, "--run_name", name], self.folder, self.count, imported=imported)
        status, said = ranks.wait()
        if status != 0:
            raise RuntimeError(f"the run that was left alone ended with {status}:\n{said}")
        import_early(imported)
        self.durations = {phase: ranks.watch.longest(phase) for phase in ("saving", "rollout", "update", "validation")}
        return self.folder / "runs" / name / "version_0"

    def one_run(self, whole: Path, planned: list[str]) -> list[str]:
        """Apply planned faults to one run until it finishes; return the remaining plan."""
        self.runs += 1
        name = f"cut_{self.runs}"
        run = self.folder / "runs" / name / "version_0"
        shutil.rmtree(self.folder / "cache", ignore_errors=True)
        while not self.lost:
            checkpoints = list((run / "checkpoints").glob("update_*.ckpt"))
            if not checkpoints:  # nothing to resume from yet
                shutil.rmtree(run.parent, ignore_errors=True)
            argv = ["fit", "--resume", f"runs/{name}"] if checkpoints else [*self.argv, "--run_name", name]
            # A checkpoint is damaged only if there is an earlier one; until then the run is killed instead.
            blow = next((b for b in planned if b != "tear" or len(checkpoints) > 1), None)
            torn = self.tear(run) if blow == "tear" else None
            ended = self.attempt(argv, "kill" if torn or (planned and blow is None) else blow, torn)
            if blow is not None and (torn or not ended):
                planned.remove(blow)
            if ended and not self.lost:
                self.lost += [f"{name}: {line}" for line in differences(whole, run)[:5]]
                shutil.rmtree(run.parent)
                return planned
        return []

    def attempt(self, argv: list[str], blow: str | None, torn: str | None = None) -> bool:
        """Start or resume a run and inject a fault; return whether the run finished.

        Args:
            argv: the command.
            blow: the fault to inject; None for none.
            torn: damage of the newest checkpoint; None for none.
        """
        ranks = Ranks(argv, self.folder, self.count, self.chance.randint(1, 2) if blow == "disk full" else None)
        hit = ""
        if blow in ("kill", "terminate"):
            phase = next(self.phases) if blow == "kill" else "update"
            if ranks.reach(phase, self.chance.randint(1, 3)):
                time.sleep(self.chance.random() * 1.2 * self.durations[phase])
                hit = ranks.watch.phase
                ranks.kill(signal.SIGKILL if blow == "kill" else signal.SIGTERM)
        status, said = ranks.wait()
        if torn is not None:
            self.count_if("torn", "damaged in" in said, f"{torn} was not noticed: {said}")
        last = (said.strip().splitlines() or [""])[-1]
        if status == 0:
            return True
        if blow == "kill":
            self.count_if(f"killed: {hit}", status == -signal.SIGKILL, said)
        elif blow == "terminate":
            self.count_if("terminated", status == PREEMPTED, f"status {status} after SIGTERM: {said}")
        else:
            plain = "could not be written" in last or "disk is full" in last
            told = blow is not None and status == 1 and plain and "Traceback" not in said
            self.count_if("disk full", told, f"status {status} after {blow}: {said}")
        return False

    def count_if(self, name: str, holds: bool, otherwise: str) -> None:
        """Count a survived fault, or record what was lost."""
        if holds:
            self.counts[name] += 1
        else:
            self.lost.append(otherwise[-3000:])

    def tear(self, run: Path) -> str:
        """Truncate the newest checkpoint or alter 64 bytes of it; describe the damage."""
        target = (run / "checkpoints" / "last.ckpt").resolve()
        if target.is_dir():
            target = self.chance.choice(sorted(path for path in target.iterdir() if path.stat().st_size > 100))
        size = target.stat().st_size
        if self.chance.random() < 0.5:
            os.truncate(target, self.chance.randrange(size))
            return f"{target.name} cut short"
        # Alter the middle, in the largest part of the file: gaps between the parts of a zip file hold no data.
        place = self.chance.randrange(size // 4, size // 2)
        with target.open("r+b") as file:
            file.seek(place)
            bits = file.read(64)
            file.seek(place)
            file.write(bytes(bit ^ 0xFF for bit in bits))
        return f"{target.name} altered"


def main() -> int:
    """Run the requested drills."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--module", choices=[*STAGES, "all"], required=True, help="the stage; all writes results.md")
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs of each stage (default 20)")
    parser.add_argument(
        "--strategy", choices=STRATEGIES, default=None, help="default single; every one with --module all"
    )
    parser.add_argument("--lora", action="store_true", help="train an adapter; all does both")
    parser.add_argument("--seed", type=int, default=0, help="seed of the faults")
    parser.add_argument("--resume", action="store_true", help="leave out the drills that have a result")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the drills' JSON files")
    parser.add_argument("--page", type=Path, default=HERE / "results.md", help="the page that all of them make")
    arguments = parser.parse_args()
    everything = arguments.module == "all"
    names = list(STAGES) if everything else [arguments.module]
    strategies = list(STRATEGIES) if everything and not arguments.strategy else [arguments.strategy or "single"]
    drills = {
        f"{name}_{strategy}_{'lora' if lora else 'full'}": (name, strategy, lora)
        for strategy in strategies
        for name in names
        for lora in ((False, True) if everything else (arguments.lora,))
    }
    arguments.results.mkdir(parents=True, exist_ok=True)
    files = {name: arguments.results / f"kills_{name}.json" for name in drills}
    if not arguments.resume:
        for file in files.values():
            file.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder) / "world")
        for name, drill in drills.items():
            if files[name].exists():
                continue
            record = Drill(*drill, Path(folder) / name, world, arguments.seed).run(arguments.kills)
            shutil.rmtree(Path(folder) / name)
            files[name].write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
            print(name, dict(record["counts"]), f"{record['seconds']:.0f} s", *record["lost"], flush=True)
            if everything:
                render(arguments.results, arguments.page)
    lost = [line for file in files.values() for line in json.loads(file.read_text())["lost"]]
    print(f"lost: {'; '.join(lost) if lost else 'nothing'}")
    return int(bool(lost))


if __name__ == "__main__":
    sys.exit(main())
