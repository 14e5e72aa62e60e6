"""Measure this package's speed over time. `make bench` runs the cases below; `make bench-compare REV` compares with a
commit.

    python experiments/benchmarks/bench.py [--only CASE ...] [--model SMOLLM2] [--seconds 900]
    python experiments/benchmarks/bench.py --compare REV

Each run is a separate process. Cases are interleaved, so that a drift in machine speed affects all of them. No run
starts after ``--seconds``. Each case writes one JSON file to ``history``: machine, versions, commit, a hash of the
package's content, the system load before each run, and the figures of each run. bench.md is generated from the latest
records.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, NamedTuple

# Import no large packages here: a child process inherits the peak resident memory of its parent.
from compare import ROOT, code_hash, machine, our_versions

HERE = Path(__file__).resolve().parent
HISTORY = HERE / "history"
RLHF = ["-m", "rlhf_lightning"]
TINY_STAGE = ["--model", "{small}", "--data", "{small}/prompts.jsonl"]
CHARACTERS = 400


class Case(NamedTuple):
    """A command to measure, and bounds for its figures.

    Attributes:
        command: arguments of Python; the placeholders {small}, {model}, {rows} and {folder} are filled in. A script of
            this folder is given by its name.
        goals: upper bound of each figure (lower bound if its name ends with ``per_second``).
        status: expected exit status.
        real: whether the case needs the real model.
    """

    command: list[str]
    goals: dict[str, float] = {}
    status: int = 0
    real: bool = False


def measuring(name: str) -> list[str]:
    """Return the command that runs a measuring function of this file."""
    return ["bench.py", "--measure", name, "--model", "{model}", "--rows", "{rows}"]


def stage(name: str, *flags: str) -> list[str]:
    """Return the command that runs a few steps of the small model."""
    return ["stage.py", name, *TINY_STAGE, "--batch", "16", "--steps", "6", "--rows", "128", *flags]


CASES = {
    "help": Case([*RLHF, "--help"], {"seconds": 1.0}),
    "fit_help": Case([*RLHF, "fit", "--help"], {"seconds": 1.0}),
    "misspelt_flag": Case([*RLHF, "fit", "--model", "SFTModule", "--model.lerning_rate", "1"], {"seconds": 2.0}, 2),
    "first_update": Case(
        [*RLHF, "fit", "--model", "SFTModule", "--model.init_from", "{small}", "--data", "SFTDataModule",
         "--data.source", "{small}/rows.jsonl", "--trainer.max_steps", "1", "--trainer.accelerator", "cpu",
         "--runs_folder", "{folder}/runs"],
        {"to_first_update": 8.0},
    ),
    "data": Case(measuring("data"), {"seconds_per_100k": 25.0, "cached": 2.0}, real=True),
    "audit": Case(measuring("audit"), {"seconds_per_100k": 15.0}, real=True),
    "rollouts": Case(["rollouts.py", "--model", "{model}", "--turns", "1", "--cap", "48"], real=True),
    "overhead": Case(["overhead.py", "--turns", "1"]),
    "ppo_small": Case(stage("ppo", "--completion", "32", "--epochs", "2", "--critic", "shared")),
    "grpo_small": Case(stage("grpo", "--completion", "32", "--group", "4")),
    "sft_full": Case(["stage.py", "sft", "--model", "{model}", "--data", "{folder}/pairs.jsonl", "--batch", "4",
                      "--steps", "4", "--rows", "16", "--max-tokens", "768"], real=True),
    "sft_lora": Case(["stage.py", "sft", "--model", "{model}", "--data", "{folder}/pairs.jsonl", "--batch", "4",
                      "--steps", "4", "--rows", "16", "--max-tokens", "768", "--lora"], real=True),
}  # fmt: skip


# -- measured in a separate process -----------------------------------------------------------------------------------


def texts(rows: int) -> Iterator[dict[str, str]]:
    """Yield rows of documentation text: a prompt of 100 characters, and the following text as completion."""
    words = " ".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / "docs").rglob("*.md"))).split()
    place = 0
    for row in range(rows):
        text = f"{row} "
        while len(text) < CHARACTERS:
            text += words[place % len(words)] + " "
            place += 1
        yield {"prompt": text[:100], "completion": text[100:CHARACTERS]}


def write_rows(file: Path, rows: Any) -> Path:
    """Write rows as JSON lines."""
    with file.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)
    return file


def measure_data(model: str, rows: int, folder: Path) -> dict[str, float]:
    """Time tokenization for SFT up to the first update, and a second start that reads the cache."""
    from rlhf_lightning.data import SFTDataModule
    from rlhf_lightning.tokenization import load_tokenizer

    file, tokenizer, seconds = write_rows(folder / "rows.jsonl", texts(rows)), load_tokenizer(model), []
    for _ in range(2):
        began = time.perf_counter()
        data = SFTDataModule(str(file), cache_dir=str(folder / "cache"))
        data.tokenizer = tokenizer
        data.prepare_data()
        data.setup("fit")
        next(iter(data.train_dataloader()))
        seconds.append(time.perf_counter() - began)
    return {"seconds_per_100k": seconds[0] * 1e5 / rows, "cached": seconds[1]}


def measure_audit(model: str, rows: int, folder: Path) -> dict[str, float]:
    """Time an audit of rows with a tokenizer."""
    from rlhf_lightning.commands.audit import audit

    file, few = write_rows(folder / "rows.jsonl", texts(rows)), write_rows(folder / "few.jsonl", texts(10))
    audit(str(few), tokenizer=model, max_length=1024)  # imports, whose time must not be multiplied with the rows
    began = time.perf_counter()
    audit(str(file), tokenizer=model, max_length=1024)
    return {"seconds_per_100k": (time.perf_counter() - began) * 1e5 / rows}


MEASURED = {"data": measure_data, "audit": measure_audit}


# -- runs -------------------------------------------------------------------------------------------------------------


def figures_of(output: str, seconds: float, to_first_update: float | None) -> dict[str, float]:
    """Return the figures of a run from its line of JSON; without such a line, return its seconds."""
    if to_first_update is not None:
        return {"to_first_update": to_first_update, "seconds": seconds}
    for line in output.splitlines():
        head, _, rest = line.partition(" ")
        text = rest if head in ("OURS", "OVERHEAD", "FIGURES") else line
        if text.startswith("{"):
            read = json.loads(text)
            shown = ("tokens_per_second", "seconds_warm", "peak_rss_gb", "share_lost", "ratio_wall", "ratio_cpu")
            slots = (read.get("tokens_per_second_wall_cpu") or {}).get("slots")
            found = {"tokens_per_second": median(turn[0] for turn in slots)} if slots else {}
            return found | {name: read[name] for name in (shown if head != "FIGURES" else read) if read.get(name)}
    return {"seconds": seconds}


def run(case: Case, values: dict[str, str], threads: int) -> dict[str, float] | str:
    """Run a case once; return its figures, or the reason why it failed."""
    command = [part.format(**values) for part in case.command]
    if command[0].endswith(".py"):
        command[0] = str(HERE / command[0])
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    began, first, lines = time.perf_counter(), None, []
    with subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        cwd=values["folder"], errors="replace",
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if first is None and line.startswith("training 1/1"):
                first = time.perf_counter() - began
    seconds = time.perf_counter() - began
    if process.returncode != case.status:
        return f"exit status {process.returncode}: {''.join(lines)[-500:]}"
    return figures_of("".join(lines), seconds, first)


def commit() -> dict[str, Any]:
    """Return the commit hash, and whether the package differs from that commit."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "rlhf_lightning"))}


def bench(args: argparse.Namespace) -> None:
    """Run the cases in turn and write a record of each."""
    began, runs = time.monotonic(), {name: [] for name in args.only}
    identity = {
        **commit(), "package": code_hash([ROOT / "rlhf_lightning"]), "versions": our_versions(),
        "machine": machine(args.threads), "threads": args.threads,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        values = {"folder": name, "model": str(args.model), "rows": str(args.rows), "small": f"{name}/small"}
        from folders import written

        written("small", folder / "small")
        write_rows(folder / "small" / "rows.jsonl", texts(64))
        pairs = ({"prompt": one["prompt"], "chosen": one["completion"]} for one in texts(64))
        write_rows(folder / "pairs.jsonl", pairs)
        for turn in range(args.repeats):
            for case in args.only:
                if CASES[case].real and args.model is None:
                    continue
                if time.monotonic() - began > args.seconds:
                    print(f"{args.seconds} s are over: {case} has {len(runs[case])} runs", flush=True)
                    continue
                load = os.getloadavg()[0]
                found = run(CASES[case], values, args.threads)
                print(f"{case}, run {turn + 1}: {found}", flush=True)
                if isinstance(found, dict):
                    runs[case].append({**found, "load": round(load, 1)})
    HISTORY.mkdir(exist_ok=True)
    stamp = time.strftime("%Y%m%dT%H%M%S")
    for case, found in runs.items():
        if found:
            record = {"case": case, "time": stamp, **identity, "runs": found}
            file = HISTORY / f"{case}_{stamp}_{identity['package'][:8]}.json"
            file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (HERE / "bench.md").write_text(page(), encoding="utf-8")


# -- stored records ---------------------------------------------------------------------------------------------------


def history() -> list[dict[str, Any]]:
    """Return all records, oldest first."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in HISTORY.glob("*.json")]
    return sorted(found, key=lambda record: record["time"])


def interval(before: list[float], after: list[float]) -> tuple[float, float, float]:
    """Return the ratio of two geometric means with its 95 % interval (Welch's t on logarithms); unbounded for a single
    run.
    """
    old, new = [math.log(max(value, 1e-9)) for value in before], [math.log(max(value, 1e-9)) for value in after]
    ratio = mean(new) - mean(old)
    if min(len(old), len(new)) < 2:
        return math.exp(ratio), 0.0, math.inf
    parts = [stdev(side) ** 2 / len(side) for side in (old, new)]
    error = math.sqrt(sum(parts))
    if not error:
        return math.exp(ratio), math.exp(ratio), math.exp(ratio)
    degrees = sum(parts) ** 2 / sum(p**2 / (len(s) - 1) for p, s in zip(parts, (old, new), strict=True))
    wide = student(degrees) * error
    return math.exp(ratio), math.exp(ratio - wide), math.exp(ratio + wide)


def student(degrees: float) -> float:
    """Return the 97.5 % quantile of Student's t. From 3 degrees of freedom on it is the Cornish-Fisher expansion; the
    error is at most 2 % above one degree of freedom.
    """
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571}
    low = max(math.floor(degrees), 1)
    if low < 5:
        share = degrees - low if degrees > low else 0.0
        return table[low] + share * (table[low + 1] - table[low])
    z = 1.95996
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def compared(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[str]:
    """Return a table that compares the runs of two versions of the package, case by case."""
    lines = ["| case | figure | before | after | ratio | 95 % interval | |", "|---|---|---|---|---|---|---|"]
    for case in CASES:
        old, new = (
            [run for record in side if record["case"] == case for run in record["runs"]] for side in (before, after)
        )
        for name in new[0] if old and new else ():
            if name == "load" or name not in old[0]:
                continue
            values = [[run[name] for run in side if name in run] for side in (old, new)]
            ratio, low, high = interval(*values)
            verdict = "changed" if low > 1 or high < 1 else ""
            lines.append(
                f"| {case} | {name} | {median(values[0]):.3g} ({len(values[0])}) | {median(values[1]):.3g} "
                f"({len(values[1])}) | {ratio:.2f} | {low:.2f} to {high:.2f} | {verdict} |"
            )
    return lines


def compare(rev: str) -> None:
    """Print a comparison of a revision with the current package, from stored records."""
    done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", rev], capture_output=True, text=True, check=False)
    full, now = done.stdout.strip() or rev, code_hash([ROOT / "rlhf_lightning"])
    records = history()
    packages = {record["package"] for record in records if record["commit"] == full and not record["changed"]}
    before = [record for record in records if record["package"] in packages or record["package"].startswith(rev)]
    after = [record for record in records if record["package"] == now]
    for side, what in ((before, rev), (after, "the current package")):
        if not side:
            raise SystemExit(f"no record of {what} is in {HISTORY}: run `make bench` there")
    if len({record["machine"] for record in (*before, *after)}) > 1:
        print("The records are of several machines: a ratio compares these too.\n")
    print("\n".join(compared(before, after)))


def page() -> str:
    """Return bench.md, which shows the latest record of each case."""
    latest = {record["case"]: record for record in history()}
    lines = ["# Our own speed", "", "The latest record of each case in `history`; medians of runs that took turns.", ""]
    lines += ["| case | figure | median | runs | asked for | load | package |", "|---|---|---|---|---|---|---|"]
    for case in (name for name in CASES if name in latest):
        record = latest[case]
        load = f"{median(run['load'] for run in record['runs']):.1f}"
        for name in (name for name in record["runs"][0] if name != "load"):
            value, goal = median(run[name] for run in record["runs"] if name in run), CASES[case].goals.get(name)
            asked = "" if goal is None else f"<= {goal:g}: {'met' if value <= goal else 'NOT met'}"
            cells = [case, name, f"{value:.3g}", str(len(record["runs"])), asked, load, record["package"][:8]]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *sorted({f"- {record['machine']}; {record['versions']}" for record in latest.values()}), ""]
    missing = [name for name in CASES if name not in latest]
    return "\n".join([*lines, f"Missing: {', '.join(missing) or 'nothing'}.", ""])


def main() -> None:
    """Run the cases, measure one case, or compare with a revision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--model", default=None, help="SmolLM2's folder or .gguf file; without it small models alone")
    parser.add_argument("--rows", type=int, default=20_000, help="rows of the cases on data")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=840, help="no run begins later")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--compare", default=None, metavar="REV", help="commit, or hash of a package's content")
    parser.add_argument("--measure", choices=list(MEASURED), default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compare is not None:
        compare(args.compare)
    elif args.measure is not None:
        with tempfile.TemporaryDirectory() as folder:
            figures = MEASURED[args.measure](args.model, args.rows, Path(folder))
        print("FIGURES " + json.dumps({name: round(value, 3) for name, value in figures.items()}))
    else:
        bench(args)


if __name__ == "__main__":
    main()
