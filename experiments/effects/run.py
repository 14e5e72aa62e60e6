"""Reproduce published effects in the quickstart's world: several arms and seeds per effect, and a page with intervals.

    rlhf quickstart --out runs/quickstart
    python experiments/effects/run.py [length_bias overoptimization ...] [--start runs/quickstart] [--seeds 5]

Every arm is a YAML file and an `rlhf sweep` over seeds, so the same command resumes after a kill and skips finished
runs. Run it from the repository's root. Pages and plots are written next to this file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import losses  # in this folder, as the next three
import rewards
from arms import train
from pages import write_page

EFFECTS = {**losses.EFFECTS, **rewards.EFFECTS}


def main() -> None:
    """Train the unfinished runs, and write the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("effects", nargs="*", default=list(EFFECTS), help=f"effects to run: {', '.join(EFFECTS)}")
    parser.add_argument("--start", default="runs/quickstart", help="folder of a finished quickstart")
    parser.add_argument("--out", default="runs/effects")
    parser.add_argument("--pages", default=str(Path(__file__).resolve().parent), help="folder of the pages")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of all rows and rollouts, for a trial")
    arguments = parser.parse_args()
    for name in arguments.effects:
        arms = train(name, EFFECTS[name], arguments)
        if all(arms.values()):
            print(write_page(name, EFFECTS[name], arms, arguments), flush=True)


if __name__ == "__main__":
    main()
