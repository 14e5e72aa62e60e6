"""``rlhf sweep``: train a grid of settings over seeds, as a resumable folder of runs."""

# No postponed annotations: to resolve them, jsonargparse would import everything under TYPE_CHECKING (slow help).

import hashlib
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_lightning.commands.parsing import run_function
from rlhf_lightning.errors import SettingError, check_range
from rlhf_lightning.loading import read_record, read_yaml

SWEEP_FILE, SCRIPT_FILE, LOG_FILE = "sweep.json", "sweep.sbatch", "fit.log"
MOST_PREEMPTIONS = 20
"""Maximum number of times in a row that a run is resumed after exit status 75."""
MOST_RUNS = 10_000
USAGE_ERROR = 2
"""Exit status of a run whose settings are refused."""
HINT = "--help` lists the options"
OWNED = ("seed_everything", "run_name", "runs_folder", "resume", "ckpt_path")
"""Settings that the sweep sets for each run."""


class PlannedRun(NamedTuple):
    """A run of the sweep."""

    name: str  # its run_name, ARM/seed_N
    settings: dict[str, str]  # the varied settings, as on the command line
    seed: int


def main(argv: Sequence[str]) -> int:
    """Run ``rlhf sweep``."""
    return run_function(sweep, argv, "rlhf sweep", positional=["config"])


def sweep(
    config: str,
    over: Sequence[str] = (),
    set: Sequence[str] = (),
    seeds: int = 1,
    random: int | None = None,
    out: str | None = None,
    jobs: int = 1,
    slurm: bool = False,
    sbatch: Sequence[str] = (),
    task: int | None = None,
) -> int:
    """Train every combination of settings with every seed, each in its own run folder.

    The same command resumes a killed sweep: finished runs are kept, interrupted runs continue from their last
    checkpoint, failed runs start again. A run that exits with status 75 (preempted) is resumed at once. On SIGTERM or
    Ctrl-C the runs write checkpoints, and the sweep exits with status 75. Failed runs are counted and listed, and the
    exit status is 1. If the settings of the first run are refused (exit status 2), no further run starts. All arms use
    the same seeds, so that `rlhf compare` can test them in pairs. Seeds or values may be added to a sweep later.

    Args:
        config: YAML file of `rlhf fit`, or recipe:NAME.
        over: settings to vary, as in model.beta=.05,.1,.2; each combination is an arm. If a value contains commas, give
            a YAML list. With --random also ranges: model.beta=0..1, or model.learning_rate=log:1e-5..1e-3.
        set: settings of all runs, as in trainer.max_steps=100.
        seeds: number of runs of each arm, with seeds 0, 1, ...
        random: draw this many arms at random instead of all combinations.
        out: folder of the sweep; null means runs/sweep_CONFIG.
        jobs: number of runs at a time.
        slurm: write a SLURM array job with one task for each run, and submit it if sbatch is installed.
        sbatch: options of the array job, as in partition=gpu gpus=1 time=4:00:00.
        task: train only the run with this number (used by the array job).
    """
    from rlhf_lightning.recipes import resolve_recipe

    for name, value in (("seeds", seeds), ("jobs", jobs), ("random", random)):
        check_range(value is None or value >= 1, "it must be at least 1", **{name: value})
    path = resolve_recipe(config)
    folder = Path(out or f"runs/sweep_{Path(path).stem}")
    fixed = dict(_assignment(text) for text in set)
    runs = planned_runs([_assignment(text) for text in over], seeds, random)
    folder.mkdir(parents=True, exist_ok=True)
    record(folder, config, Path(path), fixed, runs)
    if task is not None:
        check_range(0 <= task < len(runs), f"the sweep has runs 0 to {len(runs) - 1}", task=task)
        command = fit_command(folder, path, fixed, runs[task])
        if command is None:
            print(f"{runs[task].name}: nothing to do, {state_of(folder, runs[task])[0]}")
            return 0
        os.execv(command[0], command)
    if slurm:
        chosen: list[str] = []
        for name, values in (("--over", over), ("--set", set)):
            chosen += [name, *values] if values else []
        chosen += ["--seeds", str(seeds), "--out", str(folder), *(["--random", str(random)] if random else [])]
        return submit(folder, ["sweep", config, *chosen], len(runs), sbatch)
    return Sweep(folder, path, fixed, runs, jobs).run()


def _assignment(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign or not re.fullmatch(r"[\w.]+", name):
        raise SettingError("bad-assignment", f"{text!r} is not SETTING=VALUE, as in model.beta=.05,.1")
    if name in OWNED:
        raise SettingError("bad-assignment", f"the sweep sets {name} itself; remove {text!r} (seeds: --seeds N)")
    return name, value


def planned_runs(over: Sequence[tuple[str, str]], seeds: int, draws: int | None = None) -> list[PlannedRun]:
    """Return the runs of all arms, ordered by seed, so that an unfinished sweep has runs of every arm.

    Args:
        over: settings with the text of their values.
        seeds: number of runs of each arm.
        draws: number of random arms; None takes all combinations.
    """
    names = [name for name, _ in over]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise SettingError(
            "bad-assignment", f"{', '.join(sorted(repeated))} is varied twice: give its values in one --over"
        )
    ranges = {name: _range(value) for name, value in over}
    if draws is None and (open_ones := [name for name, found in ranges.items() if found]):
        raise SettingError(
            "range-without-random", f"{', '.join(open_ones)} is a range: give the number of --random arms"
        )
    choices = {name: [] if ranges[name] else _values(name, value) for name, value in over}
    if draws is None:
        _check_count(math.prod(map(len, choices.values())) * seeds)
        arms = [dict(zip(names, values, strict=True)) for values in itertools.product(*choices.values())]
    else:
        _check_count(draws * seeds)
        lot = random.Random("arms")
        finite = math.inf if any(ranges.values()) else math.prod(map(len, choices.values()))
        drawn: dict[tuple[str, ...], None] = {}
        vain = 0
        while len(drawn) < min(draws, finite):
            arm = tuple(_drawn(found, lot) if found else lot.choice(choices[name]) for name, found in ranges.items())
            vain = vain + 1 if arm in drawn else 0
            drawn[arm] = None
            if vain > 100_000:
                many = f"the ranges contain only {len(drawn)} values of four digits"
                raise SettingError("range-too-narrow", f"{many}: ask for fewer than {draws} --random arms")
        arms = [dict(zip(names, arm, strict=True)) for arm in drawn]
    labels = [arm_name(arm) for arm in arms]
    if repeated := {label for label in labels if labels.count(label) > 1}:
        raise SettingError("ambiguous-arms", f"several arms would be called {', '.join(sorted(repeated))}: merge them")
    return [
        PlannedRun(f"{label}/seed_{seed}", arm, seed)
        for seed in range(seeds)
        for label, arm in zip(labels, arms, strict=True)
    ]


def _check_count(runs: int) -> None:
    if runs > MOST_RUNS:
        most = f"the sweep would have {runs:,} runs; the maximum is {MOST_RUNS:,}"
        raise SettingError("too-many-runs", f"{most}: ask for fewer")


def arm_name(arm: dict[str, str]) -> str:
    """Return an arm's name: the last part of each setting with its value, in characters allowed in file names."""
    parts = [f"{name.rpartition('.')[2]}={value}" for name, value in arm.items()]
    text = re.sub(r"[^\w.\-=+]+", "_", "+".join(parts)).strip("_") or "arm"
    return text if len(text) <= 120 else f"{text[:100]}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _values(name: str, text: str) -> list[str]:
    if text.startswith("["):
        found = read_yaml(text)
        values = [item if isinstance(item, str) else json.dumps(item) for item in found]
    else:
        values = text.split(",")
    if not values or not all(value.strip() for value in values):
        raise SettingError("bad-assignment", f"{name}={text} has an empty value: write null for none")
    return list(dict.fromkeys(value.strip() for value in values))


def _range(text: str) -> tuple[float, float, bool] | None:
    """Return lower end, upper end and whether the range is logarithmic; None if the text is not a range."""
    match = re.fullmatch(r"(log:)?([-+.\deE]+?)\.\.([-+.\deE]+)", text)
    if match is None:
        return None
    try:
        low, high = float(match[2]), float(match[3])
    except ValueError:
        return None
    if not low < high or not math.isfinite(high - low) or (match[1] and low <= 0):
        raise SettingError("bad-assignment", f"{text} is an empty or infinite range, or a logarithmic one with 0")
    return low, high, bool(match[1])


def _drawn(bounds: tuple[float, float, bool], lot: random.Random) -> str:
    low, high, logarithmic = bounds
    value = math.exp(lot.uniform(math.log(low), math.log(high))) if logarithmic else lot.uniform(low, high)
    return f"{value:.4g}"


def record(folder: Path, config: str, path: Path, fixed: dict[str, str], runs: Sequence[PlannedRun]) -> None:
    """Write sweep.json."""
    from rlhf_lightning.evaluation.report import write_json

    base = {"config": config, "config_text": path.read_text(encoding="utf-8"), "set": fixed}
    target = folder / SWEEP_FILE
    if target.is_file():
        earlier = read_record(target)
        if changed := [name for name in base if earlier.get(name) != base[name]]:
            raise SettingError(
                "sweep-changed",
                f"{folder} holds a sweep with another {' and '.join(changed)}: restore it, or give another --out",
            )
        runs = list(
            {**{run["name"]: PlannedRun(**run) for run in earlier["runs"]}, **{r.name: r for r in runs}}.values()
        )
    if not target.is_file() or len(runs) != len(earlier["runs"]):
        write_json(target, {**base, "runs": [run._asdict() for run in runs]})


def state_of(folder: Path, run: PlannedRun) -> tuple[str, Path | None]:
    """Return a run's state (new, finished, running, interrupted) and its folder, if it has one."""
    from rlhf_lightning.errors import MissingError, StateError
    from rlhf_lightning.runs.checkpoint_files import last_checkpoint
    from rlhf_lightning.runs.run import acquire_lock, find_run, release_lock, status_of

    try:
        found = find_run(str(folder / run.name), str(folder))
    except MissingError:
        return "new", None
    try:
        release_lock(acquire_lock(found))
    except StateError:
        return "running", found
    if status_of(found) == "finished":
        return "finished", found
    try:
        last_checkpoint(found)
    except MissingError:
        return "new", found
    return "interrupted", found


def fit_command(folder: Path, config: str, fixed: dict[str, str], run: PlannedRun) -> list[str] | None:
    """Return the command that starts or resumes a run; None if it is finished or already running."""
    state, found = state_of(folder, run)
    if state in ("finished", "running"):
        return None
    command = [sys.executable, "-m", "rlhf_lightning", "fit"]
    if state == "interrupted":
        return [*command, "--resume", str(found)]
    settings = {**fixed, **run.settings, "seed_everything": str(run.seed)}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    return [*command, "--config", config, *flags, f"--runs_folder={folder}", f"--run_name={run.name}"]


class Sweep:
    """Trains the runs of a sweep on this machine, several at a time; the arguments are those of `sweep`."""

    def __init__(self, folder: Path, config: str, fixed: dict[str, str], runs: Sequence[PlannedRun], jobs: int) -> None:
        self.folder, self.config, self.fixed, self.runs, self.jobs = folder, config, fixed, runs, jobs
        self.stopping = self.refused = False
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.started = 0
        self.lock = threading.Lock()

    def run(self) -> int:
        """Train, print the summary, and return the exit status."""
        numbers = [signal.SIGTERM, signal.SIGINT]
        hangup = getattr(signal, "SIGHUP", None)  # Windows has none, and nohup ignores it
        if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:
            numbers.append(hangup)
        before = {number: signal.signal(number, self.stop) for number in numbers}
        try:
            with ThreadPoolExecutor(self.jobs) as pool:
                results = dict(zip((run.name for run in self.runs), pool.map(self.train, self.runs), strict=True))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return self.summarise(results)

    def stop(self, number: int, frame: Any) -> None:
        """Tell the running processes to write a checkpoint and end; start no further runs."""
        self.stopping = True
        for process in list(self.processes.values()):
            process.terminate()

    def train(self, run: PlannedRun) -> str:
        """Train a run to its end and return its state, or the reason of its failure."""
        for _ in range(MOST_PREEMPTIONS):
            if self.stopping or self.refused:
                state = state_of(self.folder, run)[0]
                return "not started" if state == "new" else state
            command = fit_command(self.folder, self.config, self.fixed, run)
            if command is None:
                return state_of(self.folder, run)[0]
            status, seconds = self.execute(run, command)
            if status == 0:
                print(f"finished {run.name} in {seconds:.0f} s", flush=True)
                return "finished"
            if status != 75:
                if self.stopping:
                    return "interrupted"
                reason = f"exit status {status}: {last_line(self.log(run))}"
                print(f"FAILED   {run.name}, {reason}", flush=True)
                self.refused = self.refused or (status == USAGE_ERROR and self.started <= self.jobs)
                return reason
        return "interrupted" if self.stopping else f"preempted {MOST_PREEMPTIONS} times"

    def log(self, run: PlannedRun) -> Path:
        """Return the log file of a run's output."""
        return self.folder / run.name / LOG_FILE

    def execute(self, run: PlannedRun, command: Sequence[str]) -> tuple[int, float]:
        """Run a command and write its output to the run's log; return exit status and seconds."""
        log = self.log(run)
        log.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        with log.open("ab") as output:
            # A separate process group: Ctrl-C reaches only the sweep, which then stops the runs with SIGTERM.
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, process_group=0)
            with self.lock:
                self.processes[run.name] = process
                self.started += 1
                verb = "resuming" if "--resume" in command else "training"
                print(f"{verb} {run.name}", flush=True)
            if self.stopping:
                process.terminate()
            status = process.wait()
        del self.processes[run.name]
        return status, time.monotonic() - began

    def summarise(self, results: dict[str, str]) -> int:
        """Print the counts and the failed runs; return the exit status."""
        unfinished = [name for name, state in results.items() if state in ("interrupted", "running", "not started")]
        failed = {name: why for name, why in results.items() if why != "finished" and name not in unfinished}
        done = len(results) - len(failed) - len(unfinished)
        print(f"\n{self.folder}: {done} of {len(results)} runs finished, {len(failed)} failed, {len(unfinished)} open")
        for name, why in failed.items():
            print(f"  failed: {name}, {why} (log: {self.folder / name / LOG_FILE})")
        for name in unfinished:
            print(f"  {'runs in another process' if results[name] == 'running' else results[name]}: {name}")
        if self.refused:
            print("the settings of the first run are refused, so no further run was started: correct them")
            if all(state_of(self.folder, run)[0] == "new" for run in self.runs):
                (self.folder / SWEEP_FILE).unlink()  # nothing was trained, so the corrected sweep may take the folder
        elif failed or unfinished:
            print("the same command continues the sweep")
        names = dict.fromkeys(name for run in self.runs for name in run.settings)
        by = f" --by {' '.join(names)}" if names else ""
        print(f"compare the runs: rlhf compare {self.folder}{by}")
        return 1 if failed else 75 if unfinished else 0


def last_line(log: Path) -> str:
    """Return the last non-empty line of a log that is not the hint at --help, which follows the reason."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    return next((line.strip()[:300] for line in reversed(lines) if line.strip() and HINT not in line), "no output")


def submit(folder: Path, arguments: Sequence[str], count: int, sbatch: Sequence[str]) -> int:
    """Write a SLURM array job of ``count`` tasks; submit it if sbatch is installed. Return the exit status."""
    options = {
        "job-name": folder.name, "array": f"0-{count - 1}", "output": f"{folder.absolute()}/slurm_%A_%a.log",
        "requeue": "", "open-mode": "append", "signal": "USR1@120", **dict(_option(text) for text in sbatch),
    }  # fmt: skip
    lines = [f"#SBATCH --{name}{f'={value}' if value else ''}" for name, value in options.items()]
    command = shlex.join([sys.executable, "-m", "rlhf_lightning", *arguments])
    script = folder / SCRIPT_FILE
    # srun makes the run a job step, and job steps get the signal before the time limit. The run then requeues its task.
    body = [f"cd {shlex.quote(os.getcwd())}", f'srun {command} --task "$SLURM_ARRAY_TASK_ID"']
    script.write_text("\n".join(["#!/bin/bash", *lines, *body]) + "\n", encoding="utf-8")
    if shutil.which("sbatch") is None:
        print(f"{script}: array job of {count} runs; sbatch is not installed here, so submit it with: sbatch {script}")
        return 0
    return subprocess.run(["sbatch", str(script)], check=False).returncode


def _option(text: str) -> tuple[str, str]:
    name, _, value = text.lstrip("-").partition("=")
    return name, value
