"""Measure the annotation page and the labelling loop: from labels to a better policy, concurrent annotators, server
kills.

    rlhf quickstart --out runs/quickstart
    python experiments/feedback/results.py [--only loop load kills]

Finished parts are skipped; the page shows the finished parts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from load import Work, run  # in this folder

from rlhf_lightning.evaluation.report import interval, markdown_table, write_json, write_markdown
from rlhf_lightning.people.loop import main as loop

HERE = Path(__file__).resolve().parent
METHODS = {"dpo": "recipe:labels/dpo", "ppo": "recipe:labels/ppo"}
LABELS = 300


def main() -> None:
    """Run the missing parts, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--start", type=Path, default=Path("runs/quickstart"), help="folder of a finished quickstart")
    parser.add_argument("--out", type=Path, default=Path("runs/feedback"))
    parser.add_argument("--page", type=Path, default=HERE / "results.md")
    arguments = parser.parse_args()
    found = {}
    for name, (measure, _) in PARTS.items():
        file = arguments.out / f"{name}.json"
        if name in arguments.only and not file.is_file():
            write_json(file, measure(arguments))
        if file.is_file():
            found[name] = json.loads(file.read_text())
    machine = f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}, Python {platform.python_version()}"
    parts = ["# Feedback: measurements", f"`python experiments/feedback/results.py`. Machine: {machine}."]
    write_markdown(arguments.page, "\n\n".join([*parts, *(PARTS[name][1](found[name]) for name in found)]) + "\n")
    print(f"wrote {arguments.page}")


def measure_loop(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one round of each method on the same number of labels."""
    world, found = arguments.start / "world", {}
    for method, config in METHODS.items():
        flags = {
            "name": f"{method}_{LABELS}", "runs_folder": arguments.out, "rounds": 1, "labels": LABELS,
            "init_from": arguments.start / "sft" / "version_0" / "model", "prompts": world / "prompts_train.jsonl",
            "eval_prompts": world / "prompts_test.jsonl", "reward_config": "recipe:labels/reward",
            "policy_config": config,
        }  # fmt: skip
        loop(["--config", "recipe:labels/loop", *(f"--{name}={value}" for name, value in flags.items())])
        found[method] = json.loads((arguments.out / f"{method}_{LABELS}" / "state.json").read_text())["steps"]
    return found


def loop_section(found: dict[str, Any]) -> str:
    """Return the section on the loop: from the first label to a better policy."""
    start = next(iter(found.values()))["start/evaluate"]
    rows: list[list[Any]] = [["sft", 0, start["gold_reward"], interval(start["gold_reward_ci"]), "", "", ""]]
    for method, steps in found.items():
        end, label = steps["round_0/evaluate"], steps["round_0/label"]
        first, last = (datetime.fromisoformat(time) for time in (label["first"], end["ended"]))
        disjoint = end["gold_reward_ci"][0] > start["gold_reward_ci"][1]
        wins = f"{end['win_rate']:.3f} {interval(end['win_rate_ci'])}"
        minutes = (last - first).total_seconds() / 60
        rows.append(
            [method, end["labels"], end["gold_reward"], interval(end["gold_reward_ci"]), wins,
             "yes" if disjoint else "NO", f"{minutes:.1f}"]
        )  # fmt: skip
    header = ["policy", "labels", "gold reward", "95 % interval", "win rate against sft", "disjoint", "minutes"]
    return (
        "## From labels to a better policy\n\n"
        "`rlhf loop --config recipe:labels/loop` in the assistant world, one round: pairs of the SFT "
        "policy are labelled by four simulated annotators over the page's HTTP routes, with Bradley-Terry noise in the "
        "gold reward; one of them does not read. DPO learns from the labels, PPO from a reward model trained on them. "
        "Gold reward is of held-out prompts; `disjoint`: the interval is above that of sft; `minutes`: from the first "
        "label to the evaluated policy; no annotator's time for reading is in it.\n\n" + markdown_table(header, rows)
    )


def measure_load(arguments: argparse.Namespace, kills: int = 0) -> dict[str, Any]:
    """Run all annotators concurrently on a server that is not killed."""
    with tempfile.TemporaryDirectory() as folder:
        return run(Path(folder), Work(), kills)


def measure_kills(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all annotators concurrently on a server that is killed repeatedly."""
    return measure_load(arguments, kills=5)


COUNTS = {
    "labels": "labels", "annotators": "annotators", "kills": "kills of the server", "lost": "confirmed and lost",
    "doubled": "doubled", "per_second": "labels a second", "p50": "p50, ms", "p95": "p95, ms", "p99": "p99, ms",
    "longest": "longest, ms",
}  # fmt: skip


def load_section(found: dict[str, Any]) -> str:
    """Return the section on concurrent annotators."""
    return (
        "## Annotators at once\n\n"
        "`load.py`: a server and annotators who never pause, each a process of its own on this machine, and a store on "
        "its disk. Every judgement is sent twice under its key. Times are from sending a judgement to its receipt, "
        "which comes when the judgement is on the disk, with the next item.\n\n" + counts_table(found)
    )


def kills_section(found: dict[str, Any]) -> str:
    """Return the section on server kills."""
    return (
        "## A server that is killed\n\n"
        "The same while the server is killed (SIGKILL) and started again; annotators send again what got no answer. "
        f"Kept without having been confirmed: {found['unconfirmed']}.\n\n" + counts_table(found)
    )


def counts_table(found: dict[str, Any]) -> str:
    """Return a table with a column of names and a column of numbers."""
    return markdown_table(["", ""], [[name, f"{found[key]:,}"] for key, name in COUNTS.items()])


PARTS: dict[str, tuple[Callable[[argparse.Namespace], dict[str, Any]], Callable[[dict[str, Any]], str]]] = {
    "load": (measure_load, load_section),
    "kills": (measure_kills, kills_section),
    "loop": (measure_loop, loop_section),
}
"""Each part: the function that measures it, and the function that shows it."""

if __name__ == "__main__":
    main()
