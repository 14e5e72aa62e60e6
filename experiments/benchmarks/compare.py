"""Compare our stages with the peer's and with the limit on the same rows: speed, losses and memory.

    python experiments/benchmarks/compare.py --model DIR --data PAIRS.jsonl --conversations PAIRS.jsonl \
        --peer-python PEER/bin/python --peer-script trl_stages.py --limit-script limit.py [--only CASE ...]

Runs the sides of every case in the order A B C A B C; each run is a separate process with a time limit. Records are
stored under ``runs/benchmarks`` and stay valid while code, command and versions of their side are unchanged. An
interrupted call therefore continues where it stopped, and ``results.md`` is written from the stored records.
``--device gpu`` runs other cases, sized for one GPU, and writes ``gpu.md``; the scripts of the peer and the limit must
then use the GPU and bf16.

The peer's script prints ``PEER {json}``, the limit's ``LIMIT {json}`` and ours ``OURS {json}``, with the seconds and
tokens of each step, losses, and peak resident memory.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Import no large packages here: a child process inherits the peak resident memory of its parent.
from cases import LIMIT, PEER, SUITES, Case, peer_only
from folders import written
from results import Runs, page

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OURS = "ours"
OUR_PACKAGES = ("torch", "transformers", "lightning", "peft", "tokenizers")
PEER_PACKAGES = ("trl", "torch", "transformers", "peft", "accelerate")


class Bench:
    """Runs the sides of each case and stores their records.

    Args:
        args: parsed arguments of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.suite = SUITES[args.device]
        self.cases = self.suite.cases
        self.folder: Path = args.runs
        self.folder.mkdir(parents=True, exist_ok=True)
        self.code = code_hash([ROOT / "rlhf_lightning", HERE / "stage.py", HERE / "folders.py"])
        self._versions: dict[tuple[Path | str, ...], dict[str, str]] = {}

    # -- commands -----------------------------------------------------------------------------------------------------

    def model_of(self, case: Case, side: str) -> Path:
        """Return the model folder that a side starts from."""
        if case.model == "small":
            return written("small", self.folder / "folders" / "small")
        if case.model == "scored" and side != LIMIT:  # the limit adds its own head
            return written("scored", self.folder / "folders" / "scored", self.args.model)
        return self.args.model

    def data_of(self, case: Case) -> Path:
        """Return the rows of a case. The peer's PPO accepts conversations only."""
        return self.args.conversations if case.stage == "ppo" and self.args.conversations else self.args.data

    def command(self, name: str, side: str) -> list[str]:
        """Return the command line of one side of a case."""
        case = self.cases[name]
        model = self.model_of(case, side)
        data = model / "prompts.jsonl" if case.model == "small" else self.data_of(case)
        shared = [case.stage, "--model", str(model), "--data", str(data)]
        if side == LIMIT:
            assert case.limit is not None
            kept = flags_named(case.flags, ("--batch", "--max-length", "--steps"))
            return [sys.executable, str(self.args.limit_script), *shared, *kept, *case.limit]
        if side == PEER:
            return [str(self.python_of(case)), str(self.args.peer_script), *shared, *case.flags, *peer_only(case)]
        further = case.ours[side]
        if case.stage == "ppo":
            quantization = dict(zip(further, further[1:], strict=False)).get("--quantization")
            kind = "reward_adapter" if "--lora" in case.flags else "reward"
            place = self.folder / "folders" / "_".join([kind, case.model, quantization or "whole"])
            further = (*further, "--reward", str(written(kind, place.resolve(), model.resolve(), quantization)))
        return [sys.executable, str(HERE / "stage.py"), *shared, *case.flags, *further]

    def python_of(self, case: Case) -> Path:
        """Return the Python interpreter of the peer's environment that supports the stage."""
        return self.args.ppo_python if case.stage == "ppo" and self.args.ppo_python else self.args.peer_python

    def versions(self, python: Path, packages: Sequence[str] = PEER_PACKAGES) -> dict[str, str]:
        """Return the package versions in another environment."""
        key = (python, *packages)
        if key not in self._versions:
            program = (
                "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
            )
            done = subprocess.run([str(python), "-c", program, *packages], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{python} lacks a package of {', '.join(packages)}:\n{done.stderr[-1000:]}")
            self._versions[key] = json.loads(done.stdout)
        return self._versions[key]

    def identity(self, name: str, side: str, command: list[str]) -> str:
        """Return everything that a run's figures depend on. If it changes, older runs of the side are discarded."""
        if side == PEER:
            code = [code_hash([self.args.peer_script]), self.versions(self.python_of(self.cases[name]))]
        elif side == LIMIT:
            code = [code_hash([self.args.limit_script]), our_versions()]
        else:
            code = [self.code, our_versions()]
        settings = [command[1:], self.args.threads, code]
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]

    # -- running ------------------------------------------------------------------------------------------------------

    def run(self, name: str) -> None:
        """Run the sides of a case in turn until each has the requested number of runs."""
        for repeat in range(1, self.args.repeats + 1):
            for side in self.cases[name].sides:
                if len(self.kept(name).get(side, [])) < repeat:
                    self.run_once(name, side)

    def run_once(self, name: str, side: str) -> None:
        """Run one side once and store its record. Failures are stored too, and the next call tries them again."""
        command = self.command(name, side)
        print(f"{time.strftime('%H:%M:%S')} {name}: {side} ...", flush=True)
        began, load = time.time(), os.getloadavg()[0]
        output, failure = self.output_of(command)
        record = None if failure else record_of(output)
        kept = {
            "side": side,
            "identity": self.identity(name, side, command),
            "began": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(began)),
            "wall_seconds": round(time.time() - began, 1),
            "load_before": round(load, 2),
            "record": record,
        }
        if record is None:
            kept["failure"] = failure or "it printed no line of figures"
            log = self.folder / f"{name}_{side}.failed.log"
            log.write_text(output, encoding="utf-8")
            print(f"  {kept['failure']}; what it printed is in {log}", flush=True)
        with (self.folder / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(kept) + "\n")

    def output_of(self, command: list[str]) -> tuple[str, str | None]:
        """Return the output of a command, and the reason if it failed."""
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": str(self.args.threads),
        }
        if Path(command[1]).parent == HERE:
            further = environment.get("PYTHONPATH")
            environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(ROOT), *([further] if further else [])])
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, check=False,
                timeout=self.args.time_limit, errors="replace",
            )  # fmt: skip
        except subprocess.TimeoutExpired as late:
            printed = late.stdout or b""
            text = printed if isinstance(printed, str) else printed.decode(errors="replace")
            return text, f"it took longer than {self.args.time_limit} s"
        return done.stdout, f"exit status {done.returncode}" if done.returncode else None

    # -- stored records -----------------------------------------------------------------------------------------------

    def kept(self, name: str) -> Runs:
        """Return the valid records of a case, oldest first, at most the requested number for each side."""
        file, found = self.folder / f"{name}.jsonl", dict[str, list[dict[str, Any]]]()
        if not file.exists():
            return {}
        current = {side: self.identity(name, side, self.command(name, side)) for side in self.cases[name].sides}
        for line in file.read_text(encoding="utf-8").splitlines():
            kept = json.loads(line)
            if kept["record"] is not None and current.get(kept["side"]) == kept["identity"]:
                found.setdefault(kept["side"], []).append(kept["record"] | {"load": kept["load_before"]})
        return {side: records[: self.args.repeats] for side, records in found.items()}

    def write(self) -> None:
        """Write the page from the stored records."""
        found = {name: self.kept(name) for name in self.cases}
        commands = {
            name: [short(self.command(name, side)) for side in case.sides]
            for name, case in self.cases.items()
            if found[name]
        }
        loads = [record["load"] for runs in found.values() for records in runs.values() for record in records]
        made_with = ["Nothing has run yet."]
        if loads:
            made_with = [f"- ours and the limit: {spelled(our_versions())}"]
            made_with += [f"- the peer: {spelled(self.versions(python))}" for python in self.pythons()]
            made_with += [f"- {machine(self.args.threads)}"]
            made_with += [f"- load of the machine before a run: median {sorted(loads)[len(loads) // 2]:.1f}"]
        self.args.out.write_text(page(self.suite, found, self.args.repeats, made_with, commands), encoding="utf-8")
        print(f"written: {self.args.out}", flush=True)

    def pythons(self) -> Iterator[Path]:
        """Yield the interpreters of the peer's environments."""
        yield self.args.peer_python
        if self.args.ppo_python:
            yield self.args.ppo_python


def flags_named(flags: tuple[str, ...], names: tuple[str, ...]) -> list[str]:
    """Return the named flags with their values."""
    return [part for flag, value in zip(flags, flags[1:], strict=False) if flag in names for part in (flag, value)]


def record_of(output: str) -> dict[str, Any] | None:
    """Return the figures that a script printed, or None if there are none."""
    for line in output.splitlines():
        head, _, figures = line.partition(" ")
        if head in ("OURS", "PEER", "LIMIT") and figures.startswith("{"):
            return json.loads(figures)
    return None


def code_hash(paths: list[Path]) -> str:
    """Hash files, and the Python files in folders."""
    digest = hashlib.sha256()
    for path in paths:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def our_versions() -> dict[str, str]:
    """Return the package versions of this environment."""
    return {name: version(name) for name in OUR_PACKAGES}


def spelled(versions: dict[str, str]) -> str:
    """Format versions as text."""
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def short(command: list[str]) -> str:
    """Return a command line without the paths of this machine."""
    return " ".join(["python", *(Path(part).name if part.startswith("/") else part for part in command[1:])])


def machine(threads: int) -> str:
    """Describe the machine: processor, threads, memory, operating system."""
    cpu, memory = platform.processor() or platform.machine(), ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), cpu)
        kilobytes = int(Path("/proc/meminfo").read_text().split()[1])
        memory = f", {kilobytes / 1e6:.0f} GB of memory"
    return f"{cpu}, {os.cpu_count()} processors, {threads} threads a run{memory}, Python {platform.python_version()}"


def parsed() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder that all sides start from")
    parser.add_argument("--data", type=Path, required=True, help="JSONL with prompt, chosen and rejected")
    parser.add_argument("--conversations", type=Path, default=None, help="the same for PPO, whose prompts are messages")
    parser.add_argument("--peer-python", type=Path, required=True, help="Python of the peer's environment")
    parser.add_argument("--ppo-python", type=Path, default=None, help="the same for PPO, where it is another")
    parser.add_argument("--peer-script", type=Path, required=True, help="the peer's stages as one script")
    parser.add_argument("--limit-script", type=Path, required=True, help="bare PyTorch on as many tokens")
    parser.add_argument("--device", choices=list(SUITES), default="cpu", help="what trains, and with it the cases")
    parser.add_argument("--only", nargs="+", default=None, metavar="CASE", help="of the cases (default: all)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side")
    parser.add_argument("--time-limit", type=int, default=1800, help="seconds that a run may take")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of each run")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmarks"), help="where runs are kept")
    parser.add_argument("--out", type=Path, default=None, help="the page (default: in this script's folder)")
    parser.add_argument("--write-only", action="store_true", help="run nothing, write the page from what is kept")
    args = parser.parse_args()
    suite = SUITES[args.device]
    args.out, args.only = args.out or HERE / suite.out, args.only or list(suite.cases)
    if unknown := [name for name in args.only if name not in suite.cases]:
        parser.error(f"there is no case {', '.join(unknown)}: there are {', '.join(suite.cases)}")
    for name in ("model", "data", "conversations", "peer_python", "ppo_python", "peer_script", "limit_script"):
        path = getattr(args, name)
        if path is not None and not path.exists():
            parser.error(f"there is no {path}")
        # not resolved: the Python of a virtual environment is a symbolic link to the system's Python
        if path is not None:
            setattr(args, name, path.absolute())
    args.runs = args.runs.absolute()
    return args


def main() -> None:
    """Run the missing runs, case by case, and rewrite the page after each case."""
    args = parsed()
    bench = Bench(args)
    if not args.write_only:
        for name in args.only:
            bench.run(name)
            bench.write()
    bench.write()


if __name__ == "__main__":
    main()
