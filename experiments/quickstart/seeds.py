"""Run the quickstart on several seeds and write a table with one row per seed.

python experiments/quickstart/seeds.py --seeds 0 1 2 3 4 5 [--out runs/seeds] [--table experiments/quickstart/seeds.md]

Seeds with an existing report are skipped.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

from rlhf_lightning.evaluation.report import interval, markdown_table, write_markdown


def main() -> None:
    """Run the missing seeds, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5])
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--table", type=Path, default=Path("experiments/quickstart/seeds.md"))
    arguments = parser.parse_args()
    reports = []
    for seed in arguments.seeds:
        path = arguments.out / f"seed_{seed}" / "report.json"
        if not path.is_file():
            command = [sys.executable, "-m", "rlhf_lightning", "quickstart", "--seed", str(seed)]
            subprocess.run([*command, "--out", str(path.parent)], check=True)
        reports.append(json.loads(path.read_text()))
    write_markdown(arguments.table, page(reports))
    print(f"wrote {arguments.table}")


def page(reports: list[dict]) -> str:
    """Return the page: the figures of each seed, and whether they meet each bound."""
    header = [
        "seed",
        "s",
        "Bayes",
        "reward model",
        "of the way",
        "sft",
        "dpo",
        "ppo",
        "best of 4",
        "best of 16",
        "holds",
    ]
    rows = []
    for report in reports:
        world, accuracy = report["world"], report["reward_model"]["accuracy"]
        reached = (accuracy - 0.5) / (world["bayes_accuracy"] - 0.5)
        parts = [report[name] for name in ("sft", "dpo", "ppo")]
        policies = [f"{part['gold_reward']:.3f} {interval(part['gold_reward_ci'])}" for part in parts]
        rows.append(
            [
                report["seed"],
                f"{report['seconds']:.0f}",
                world["bayes_accuracy"],
                accuracy,
                reached,
                *policies,
                world["best_of_4_gold"],
                world["best_of_16_gold"],
                "yes" if holds(report) else "NO",
            ]
        )
    machine = f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}, Python {platform.python_version()}"
    return (
        "# The quickstart on several seeds\n\n"
        "`python experiments/quickstart/seeds.py`; every seed that was run is shown. Policies: mean gold reward on "
        "held-out prompts with its 95 % interval. `of the way`: (accuracy - 0.5) / (Bayes accuracy - 0.5). `holds`: "
        "dpo and ppo each 0.25 above sft with disjoint intervals, ppo at least 0.75 and above best of 4 of sft by the "
        "same reward model, the reward model 0.8 of the way, 480 seconds.\n\n"
        f"Machine: {machine}.\n\n{markdown_table(header, rows)}\n"
    )


def holds(report: dict) -> bool:
    """Return whether a report meets every bound of the quickstart."""
    sft, world = report["sft"], report["world"]
    better = all(
        report[name]["gold_reward"] >= sft["gold_reward"] + 0.25
        and report[name]["gold_reward_ci"][0] > sft["gold_reward_ci"][1]
        for name in ("dpo", "ppo")
    )
    ppo = report["ppo"]["gold_reward"]
    learned = report["reward_model"]["accuracy"] - 0.5 >= 0.8 * (world["bayes_accuracy"] - 0.5)
    return better and ppo >= 0.75 and ppo > world["best_of_4_gold"] and learned and report["seconds"] <= 480


if __name__ == "__main__":
    main()
