"""Render the page of all drills. Each drill writes JSON files; each section renders one kind of file."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
Records = Sequence[dict[str, Any]]


def kills(records: Records) -> list[str]:
    """Return the section on killed and resumed runs."""
    columns = ("rollout", "update", "validation", "saving", "between", "starting")
    lines = [
        "## Runs cut short",
        "",
        "`drill.py`: each row is one run that was left alone, and others that were cut short and resumed until all of",
        "this had hit them. Checkpoint (weights, optimizer, random states, counters), exported model, TensorBoard",
        "curves and samples were then compared bit for bit. Columns: SIGKILL by what the run was doing; SIGTERM; a",
        "disk that was full when a checkpoint was due; the newest checkpoint cut short or altered before the run was",
        "resumed.",
        "",
        f"| stage | strategy | weights | {' | '.join(columns)} | SIGTERM | disk full | torn | lost |",
        f"|---|---|---|{'---|' * len(columns)}---|---|---|---|",
    ]
    total = [0] * (len(columns) + 3)
    for record in records:
        counts = record["counts"]
        cells = [counts.get(f"killed: {column}", 0) for column in columns]
        cells += [counts.get(name, 0) for name in ("terminated", "disk full", "torn")]
        total = [before + now for before, now in zip(total, cells, strict=True)]
        lost = "nothing" if not record["lost"] else f"{len(record['lost'])} differences"
        kind = "LoRA" if record["lora"] else "all"
        lines.append(f"| {record['module']} | {record['strategy']} | {kind} | {' | '.join(map(str, cells))} | {lost} |")
    lost = sum(len(record["lost"]) for record in records)
    lines.append(f"| **total** | | | {' | '.join(map(str, total))} | {lost or 'nothing'} |")
    return lines


def faults(records: Records) -> list[str]:
    """Return the section on faults in the training loop."""
    lines = ["## Faults in the loop", "", "`faults.py`: each is injected into a tiny run of its own.", ""]
    for record in records:
        lines += ["| fault | held | what was seen |", "|---|---|---|"]
        for fault in record["faults"]:
            held = "yes" if fault["held"] else "**no**"
            lines.append(f"| {fault['fault']} | {held} | {str(fault['seen']).replace('|', '/')} |")
        lines += ["", f"{record['held']} of {record['injected']} held."]
    return lines


def fuzz(records: Records) -> list[str]:
    """Return the section on unchecked rows."""
    lines = [
        "## Unchecked rows",
        "",
        "`fuzz.py`: of every row read it is known what became of it, and control tokens and supervision of every row",
        "kept are those of the same turns with harmless contents.",
        "",
        "| format | rows written | kept | dropped with a reason | lost |",
        "|---|---|---|---|---|",
    ]
    for record in records:
        for name, count in record["counts"].items():
            cells = " | ".join(f"{count.get(part, 0):,}" for part in ("written", "kept", "dropped", "lost"))
            lines.append(f"| {name} | {cells} |")
        lines += ["", f"{record['rows']:,} rows, seed {record['seed']}; wrong: {len(record['wrong'])}."]
    return lines


def probes(records: Records) -> list[str]:
    """Return the section on attacks and faults against the commands."""
    lines = [
        "## Attacks and faults",
        "",
        "`probes.py`: each probe is one damaged file, hostile request or answer, odd number or signal, in a process of",
        "its own with a limit of time and memory. It holds if the command ends with one sentence that has a code, and",
        "never with status 0 where the input is unusable.",
    ]
    for record in records:
        ran = sum(count["held"] + count["broke"] for count in record["fronts"].values())
        lines += ["", f"{ran:,} of {record['total']:,} probes. {record['note']}".strip(), ""]
        lines += ["| front | held | broke |", "|---|---|---|"]
        lines += [f"| {name} | {count['held']} | {count['broke']} |" for name, count in record["fronts"].items()]
        held, broke = (sum(count[part] for count in record["fronts"].values()) for part in ("held", "broke"))
        lines.append(f"| **total** | {held} | {broke} |")
        lines += ["", *(f"- broke: {one['front']}, {one['probe']}: {one['broke']}" for one in record["broken"])]
    return lines


SECTIONS: dict[str, Callable[[Records], list[str]]] = {
    "probes": probes, "kills": kills, "faults": faults, "fuzz": fuzz,
}  # fmt: skip
"""Section by prefix of the file name, for example ``kills_ppo_ddp_full.json``."""


def render(results: Path, page: Path) -> None:
    """Write the page of all results in the folder."""
    lines = ["# Reliability", "", "Written by `page.py` from the drills' results; nothing here is mocked.", ""]
    for name, section in SECTIONS.items():
        records = [json.loads(file.read_text()) for file in sorted(results.glob(f"{name}_*.json"))]
        if records:
            lines += [*section(records), ""]
    page.write_text("\n".join(lines))


if __name__ == "__main__":
    render(HERE / "results", HERE / "results.md")
    sys.exit(0)
