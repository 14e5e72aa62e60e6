"""Measure what data costs before training: encoding, a start from the cache, an audit, and the memory of a stream.

    python experiments/benchmarks/data_speed.py --tokenizer FOLDER [--text GLOB] [--rows 100000] [--stream 2e9]

Each row has a question and an answer, 400 characters together, of sentences in random order. Every case runs in a
process of its own. Seconds count from the loaded tokenizer; CPU seconds include those of forks. Memory is resident
memory beyond that of the process before the case.
"""

import argparse
import glob
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CHARACTERS = 400
STREAMED = 20_000
"""Number of rows between two measurements of a stream's memory."""
SECONDS = 60
"""Time after which a stream ends, if the file has not been read before."""


def write_rows(file: Path, text: str, rows: int, size: float = 0) -> None:
    """Write a number of rows, then repeat them until the file has ``size`` bytes."""
    lot, lines = random.Random(0), list[str]()
    sentences = sorted({part for part in re.split(r"(?<=[.!?])\s+|\n{2,}", text) if len(part) > 8})
    for _ in range(rows):
        words = ""
        while len(words) <= CHARACTERS:
            words += lot.choice(sentences) + " "
        cut = lot.randint(60, 200)
        contents = words[:cut].strip(), words[cut:CHARACTERS].strip()
        turns = [{"role": role, "content": said} for role, said in zip(("user", "assistant"), contents, strict=True)]
        lines.append(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
    with file.open("w", encoding="utf-8") as stream:
        stream.writelines(lines)
        while stream.tell() < size:
            stream.writelines(lines)


def resident() -> float:
    """Return the resident memory, MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def data_module(file: str, tokenizer: Any, cache: str, **settings: Any) -> Any:
    """Return the DataModule of the rows, ready for training."""
    from rlhf_lightning.data import SFTDataModule

    data = SFTDataModule(file, cache_dir=cache, **settings)
    data.tokenizer = tokenizer
    data.prepare_data()
    data.setup("fit")
    return data


def audit(file: str, tokenizer: Any, cache: str) -> None:
    """Audit the rows as `rlhf audit` does."""
    from rlhf_lightning.commands.audit import audited

    audited(file, "train", None, "sft", {"columns": None, "tokenizer": tokenizer, "max_length": 1024})


def stream(file: str, tokenizer: Any, cache: str) -> dict[str, Any]:
    """Take rows from a stream, a file or `SECONDS` long; return the resident memory after every `STREAMED` rows."""
    data = data_module(file, tokenizer, cache, streaming=True, steps_per_epoch=1)
    before, found, began = resident(), list[float](), time.perf_counter()
    while data.stream.sources[0].cursor[0] == 0 and time.perf_counter() - began < SECONDS:
        for _ in range(STREAMED // 1000):
            data.stream.take(1000)
        found.append(round(resident() - before))
    return {"bytes": Path(file).stat().st_size, "rows": STREAMED * len(found), "MB": found}


CASES: dict[str, Callable[[str, Any, str], Any]] = {
    "encode": data_module, "start again": data_module, "audit": audit, "stream": stream
}  # fmt: skip


def measured(case: str, file: str, folder: str, cache: str) -> dict[str, Any]:
    """Return the seconds, the CPU seconds and the memory of one case."""
    from rlhf_lightning.tokenization import load_tokenizer

    tokenizer = load_tokenizer(folder)
    before, began, used = resident(), time.perf_counter(), cpu_seconds()
    further = CASES[case](file, tokenizer, cache)
    seconds, cpu = time.perf_counter() - began, cpu_seconds() - used
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3 - before
    found = {"seconds": round(seconds, 4), "cpu_seconds": round(cpu, 4), "peak_MB": round(memory)}
    return found | (further if isinstance(further, dict) else {})


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of its children that ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def main() -> None:
    """Measure one case, or write the rows and measure every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder of a model or a tokenizer")
    parser.add_argument("--text", default=str(ROOT / "docs" / "**" / "*.md"), help="files whose sentences are used")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--stream", type=float, default=2e9, help="bytes of the streamed file")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--case", nargs=3, default=None, help="measure this case, file and cache alone")
    args = parser.parse_args()
    if args.case is not None:
        case, file, cache = args.case
        print("CASE " + json.dumps({"case": case, **measured(case, file, args.tokenizer, cache)}), flush=True)
        return
    text = "\n\n".join(Path(name).read_text(encoding="utf-8") for name in sorted(glob.glob(args.text, recursive=True)))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with tempfile.TemporaryDirectory() as name:
        rows, long = Path(name) / "rows.jsonl", Path(name) / "long.jsonl"
        write_rows(rows, text, args.rows)
        for case in args.only:
            if case == "stream":
                write_rows(long, text, args.rows, args.stream)
            given = [case, str(long if case == "stream" else rows), name]
            command = [sys.executable, __file__, "--tokenizer", args.tokenizer, "--case", *given]
            subprocess.run(command, env=environment, check=True)


if __name__ == "__main__":
    main()
