"""Probe the commands with attacks and faults, each in a forked process with time and memory limits.

    python experiments/reliability/probes.py [--part ci] [--front NAME ...] [--only TEXT] [--resume] [--out FILE.json]

A probe holds if the command ends within its limits, prints one sentence with an error code, and runs no planted code. A
traceback, or status 0 for unusable input, breaks the probe. Probes of processes send signals at counted moments; probes
of pages and servers send requests and answers. The table counts held and broken probes of each front; every broken
probe is printed. The exit status is 1 if any probe broke. Outcomes are appended to FILE.jsonl, and ``--resume`` runs
only the probes that have not held there. ``--part ci`` is a fixed sample over all fronts, of at most three minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from probe_files import file_probes
from probe_fronts import number_probes, page_probes, process_probes, server_probes
from probe_tools import (
    environment_probes,
    label_probes,
    project_probes,
    report_probes,
    row_probes,
    serve_probes,
)
from probing import Probe, build_world, run_probe

RESULTS = Path(__file__).parent / "results"
FRONTS: dict[str, Callable[[], Iterator[Probe]]] = {
    "page": lambda: chain(page_probes(), report_probes()),
    "files": lambda: chain(
        file_probes(), label_probes(), row_probes(), (one for one in project_probes() if one.front == "files")
    ),
    "processes": process_probes,
    "servers": lambda: chain(server_probes(), serve_probes()),
    "numbers": lambda: chain(
        number_probes(), environment_probes(), (one for one in project_probes() if one.front == "numbers")
    ),
}
IN_CI = {"page": 40, "files": 40, "processes": 8, "servers": 15, "numbers": 12}
"""Number of probes per front that ``--part ci`` runs, evenly spread over its list."""


def spread(probes: Sequence[Probe], count: int) -> list[Probe]:
    """Return ``count`` probes of the list, always the same ones."""
    return [probes[place * len(probes) // count] for place in range(min(count, len(probes)))]


def held_in(journal: Path) -> dict[str, dict[str, Any]]:
    """Return the newest outcome of each probe in a journal, by front and name."""
    lines = journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []
    return {f"{record['front']}: {record['probe']}": record for record in map(json.loads, lines)}


def table_of(outcomes: Sequence[dict[str, Any]], fronts: Sequence[str]) -> dict[str, dict[str, int]]:
    """Count held and broken probes of each front."""
    broke = {front: [one["broke"] is not None for one in outcomes if one["front"] == front] for front in fronts}
    return {front: {"held": found.count(False), "broke": found.count(True)} for front, found in broke.items()}


def main() -> int:
    """Run the probes, print the table and the failed probes, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("all", "ci"), default="all")
    parser.add_argument("--front", nargs="*", default=list(FRONTS), choices=list(FRONTS))
    parser.add_argument("--only", default="", help="run the probes whose name contains this text")
    parser.add_argument("--every", type=int, default=1, help="run each n-th probe only: a quick look")
    parser.add_argument("--resume", action="store_true", help="skip the probes that held in the journal")
    parser.add_argument("--out", type=Path, default=RESULTS / "probes_all.json")
    parser.add_argument("--note", default="", help="a sentence for the page, on the machine and the code")
    parser.add_argument("--verbose", action="store_true", help="print what broken probes said")
    given = parser.parse_args()
    out = given.out.resolve()
    journal = out.with_suffix(".jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)
    if not given.resume:
        journal.unlink(missing_ok=True)
    known = held_in(journal)
    world, here, began = Path(tempfile.mkdtemp(prefix="world")), Path.cwd(), time.monotonic()
    try:
        build_world(world)
        every = {front: list(FRONTS[front]()) for front in given.front}
        total = sum(map(len, every.values()))
        chosen = [
            probe
            for front, probes in every.items()
            for probe in (spread(probes, IN_CI[front]) if given.part == "ci" else probes)
            if given.only in probe.name
        ][:: given.every]
        random.Random(0).shuffle(chosen)  # an interrupted run then samples all fronts
        chosen.sort(key=lambda probe: f"{probe.front}: {probe.name}" not in known)  # broken probes come first
        seconds = {front: 0.0 for front in FRONTS}
        for probe in chosen:
            key = f"{probe.front}: {probe.name}"
            if key in known and known[key]["broke"] is None:
                continue
            start = time.monotonic()
            outcome = run_probe(probe, world)
            seconds[probe.front] += time.monotonic() - start
            known[key] = {"front": probe.front, "probe": probe.name, "broke": outcome.broke}
            with journal.open("a", encoding="utf-8") as file:
                file.write(json.dumps(known[key]) + "\n")
            if outcome.broke is not None:
                print(f"BROKE {key}: {outcome.broke}", flush=True)
                if given.verbose:
                    print("    " + "\n    ".join(outcome.said.strip().splitlines()[-6:]), flush=True)
    finally:
        os.chdir(here)
        shutil.rmtree(world, ignore_errors=True)
        shutil.rmtree(Path(tempfile.gettempdir()) / f"calls{os.getpid()}", ignore_errors=True)
    found = list(known.values())
    table = table_of(found, given.front)
    for front, count in table.items():
        print(f"{front:<12}{count['held']:>5} held {count['broke']:>5} broke   {seconds[front]:>5.0f} s")
    used = sum(os.times()[:4])
    print(f"{len(found)} of {total} probes, {time.monotonic() - began:.0f} s, processor time {used:.0f} s")
    broken = [one for one in found if one["broke"] is not None]
    record = {"total": total, "note": given.note, "fronts": table, "broken": broken}
    out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
