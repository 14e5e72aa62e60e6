"""Measure a weak judge's accuracy against the gold reward: unaided, with critiques, and with a debate.

    python experiments/oversight/critique.py --judge SmolLM2.gguf [--writer MODEL] [--pairs 100]

Pairs are answers in the assistant world with gold rewards that differ by at least 0.2. The writer of critiques is the
judge's own model by default. Answers are stored in --out, so the same command resumes with the next arm. Writes the
page in this folder.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_lightning.evaluation.completions import QUESTION
from rlhf_lightning.evaluation.report import interval, markdown_table, p_value, write_json, write_markdown
from rlhf_lightning.evaluation.reward_models import KnownPair, accuracy, compared, judge_margins, length_margins
from rlhf_lightning.models.resolving import resolve_folder
from rlhf_lightning.scoring.judges import CritiqueJudge, LocalJudge
from rlhf_lightning.worlds.assistant import AssistantWorld, gold_of_conversation

HERE = Path(__file__).resolve().parent
ARMS: dict[str, int | None] = {"alone": None, "critiques": 0, "debate, 1 round": 1}
"""Rounds of debate by arm; 0 means critiques, None means the unaided judge."""
GAP = 0.2


def known_pairs(count: int) -> list[KnownPair]:
    """Return pairs of answers to the same request; the chosen answer has the higher gold reward."""
    found: list[KnownPair] = []
    for row in AssistantWorld(0).pairs(20 * count, "test"):
        sides = [(gold_of_conversation(row["prompt"], row[name][-1]["content"]), row[name][-1]["content"])
                 for name in ("chosen", "rejected")]  # fmt: skip
        (low, worse), (high, better) = sorted(sides)
        if high - low >= GAP:
            found.append(KnownPair(len(found), row["prompt"], better, worse, "all", False, float("nan")))
        if len(found) == count:
            break
    return found


def main() -> None:
    """Query the judge in every arm, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", required=True)
    parser.add_argument("--writer", default=None)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("runs/critique"))
    parser.add_argument("--page", type=Path, default=HERE / "critique.md")
    arguments = parser.parse_args()
    pairs = known_pairs(arguments.pairs)
    judge, writer = resolve_folder(arguments.judge), resolve_folder(arguments.writer or arguments.judge)
    margins: dict[str, np.ndarray] = {}
    for arm, rounds in ARMS.items():
        kept = arguments.out / f"{len(pairs)}_{arm.replace(' ', '_')}.json"
        if not kept.is_file():
            asked: Any = LocalJudge(judge) if rounds is None else CritiqueJudge(judge, writer, rounds=rounds)
            ask = partial(judge_margins, asked, question=QUESTION)
            found = [value for start in range(0, len(pairs), 10) for value in ask(pairs[start : start + 10]).tolist()]
            write_json(kept, {"margins": found})
        margins[arm] = np.array(json.loads(kept.read_text())["margins"], dtype=float)
        print(arm, accuracy(margins[arm], range(len(pairs))), flush=True)
    margins["longer answer"] = length_margins(pairs)
    rows = []
    for arm, found in margins.items():
        own, test = accuracy(found, range(len(pairs))), compared(margins["alone"], found, range(len(pairs)))
        against = [test["difference"], interval(test["ci"]), p_value(test["p"])] if arm != "alone" else ["", "", ""]
        rows.append([arm, own["accuracy"], interval(own["ci"]), own["missing"], *against])
    header = ["judge", "accuracy", "95 % interval", "no answer", "minus alone", "95 % interval", "p"]
    write_markdown(arguments.page, (
        "# A weak judge with critiques and debate\n\n"
        "`python experiments/oversight/critique.py` writes this page: how often a small language model names the "
        f"answer with the higher gold reward, on {len(pairs)} pairs of the assistant world whose gold rewards differ "
        f"by {GAP} or more. The judge is {Path(arguments.judge).stem}, the writer "
        f"{Path(arguments.writer or arguments.judge).stem}. Each pair is shown in both orders. Intervals are Wilson's "
        "and the bootstrap's, p is McNemar's test.\n\n"
        f"{markdown_table(header, rows)}\n"
    ))  # fmt: skip


if __name__ == "__main__":
    main()
