"""Fuzz the data path: 10,000 unchecked rows go from file to model, and every row is accounted for.

    python experiments/reliability/fuzz.py --rows 10000 --seed 0 [--tokenizer DIR] [--out FILE.json]

Rows of each format and kind are read, encoded, stored, collated and laid out. This is done with small tokenizers of
three families, and with your own if given. Every row must be accounted for: rows read = rows kept + rows dropped with a
reason. For every kept row, control tokens and supervision must equal those of the same turns with harmless contents.
The last line lists what was lost; the exit status is 1 if anything was.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hostile_rows import FORMATS, Hostile
from small_tokenizers import TOKENIZERS

from rlhf_lightning.data import collation
from rlhf_lightning.data.canonical import CanonicalRow, Report, RowRefused
from rlhf_lightning.data.formats import KINDS, read_row
from rlhf_lightning.data.row_store import RowStore
from rlhf_lightning.data.sources import Source, read_rows
from rlhf_lightning.data.streaming import RowStream
from rlhf_lightning.data.tokenizing import Encoder
from rlhf_lightning.models.layout import lay_out
from rlhf_lightning.tokenization import Encoded, encode_rendered, load_tokenizer, render_completion, render_prompt
from rlhf_lightning.tokenization.facts import facts_of
from rlhf_lightning.types import Message

COLLATE = {
    "sft": collation.demonstrations,
    "preference": collation.groups,
    "unpaired": collation.unpaired,
    "process": collation.judged_steps,
}
MAX_LENGTH = 256


def encoder_of(kind: str) -> Encoder:
    """Return the encoder for rows of a kind."""
    return Encoder(*KINDS[kind], max_length=MAX_LENGTH, separator="\n" if kind == "process" else None)


def went_through(path: Path, kind: str, tokenizer: Any) -> tuple[Report, RowStore]:
    """Read, encode, store, collate and lay out a file's rows."""
    report = Report()
    rows = encoder_of(kind).rows(tokenizer, read_rows(Source(str(path))), report, path.name)
    RowStore.build(rows, report).save(path.with_suffix(".store"))
    store = RowStore.load(path.with_suffix(".store"))
    assert store is not None, "what was stored cannot be loaded"
    for start in range(0, len(store), 16):
        places = list(range(start, min(start + 16, len(store))))
        for place in places:
            store.record(place)
        if kind in COLLATE:
            batch = COLLATE[kind](store, places)
            for share in (False, True):
                lay_out(batch.sequences, share)
    return report, store


def harmless(part: Any) -> Any:
    """Return the same turns with harmless contents."""
    return "a" if isinstance(part, str) else [{**turn, "content": "a"} for turn in part]


def skeleton(tokenizer: Any, prompt: str | list[Message], completions: list[Any]) -> list[list[tuple[int, bool]]]:
    """Return control tokens and their supervision, in order, for a prompt and its completions."""
    texts = [render_prompt(tokenizer, prompt), *(render_completion(tokenizer, said, prompt) for said in completions)]
    guarded = facts_of(tokenizer).guarded_ids

    def control(one: Encoded) -> list[tuple[int, bool]]:
        return [(index, flag) for index, flag in zip(one.ids, one.supervised, strict=True) if index in guarded]

    return [control(one) for one in encode_rendered(tokenizer, texts)]


def speaks_for_another(tokenizer: Any, row: CanonicalRow) -> bool:
    """Return whether roles or supervision depend on the contents of a row."""
    prompt = row.prompt or ""
    found = skeleton(tokenizer, prompt, row.completions)
    return found != skeleton(tokenizer, harmless(prompt), [harmless(said) for said in row.completions])


def accepted(path: Path, kind: str) -> Iterator[CanonicalRow]:
    """Yield the valid rows of a file."""
    for raw in read_rows(Source(str(path))):
        try:
            yield read_row(raw, KINDS[kind].read)
        except RowRefused:
            continue


def streamed(path: Path, kind: str, tokenizer: Any) -> bool:
    """Return whether an interrupted stream of the file resumes with the same rows."""

    def stream() -> RowStream:
        return RowStream(tokenizer, encoder_of(kind), (Source(str(path)),), seed=1, block=32)

    whole = stream()
    whole.take(20)
    state = whole.state_dict()
    resumed = stream()
    resumed.load_state_dict(json.loads(json.dumps(state)))
    return [row.completions for row in whole.take(20)] == [row.completions for row in resumed.take(20)]


def fuzz(rows: int, seed: int, tokenizers: dict[str, Any], folder: Path, long: float = 0.0005) -> dict[str, Any]:
    """Process rows of every format and kind; return counts, reasons of dropped rows, and errors."""
    hostile = Hostile(seed, long)
    cases = [(name, kind) for name, (_, kinds) in FORMATS.items() for kind in kinds]
    counts: dict[str, Counter[str]] = {}
    reasons: Counter[str] = Counter()
    wrong: list[str] = []
    for number, (name, kind) in enumerate(cases):
        share = rows // len(cases) + (number < rows % len(cases))
        content, written = FORMATS[name][0](hostile, kind, share)
        path = folder / f"{kind}.{name}"
        path.write_bytes(content)
        label, tokenizer = list(tokenizers.items())[number % len(tokenizers)]
        try:
            report, _ = went_through(path, kind, tokenizer)
            dropped = sum(report.dropped.values())
            lost = max(written - report.read, report.read - report.kept - dropped, key=abs)
            count = {"written": written, "kept": report.kept, "dropped": dropped, "lost": abs(lost)}
            reasons.update(report.dropped)
            usable = accepted(path, kind) if kind != "process" else iter(())
            forged = sum(speaks_for_another(tokenizer, row) for row in usable)
            if forged:
                wrong.append(f"{path.name} with {label}: in {forged} rows a content speaks for another")
            if name == "jsonl" and not streamed(path, kind, tokenizer):
                wrong.append(f"{path.name} with {label}: a resumed stream gives other rows")
        except Exception as error:  # any error is a finding of this drill
            count = {"written": written, "lost": written}
            wrong.append(f"{path.name} with {label}: {type(error).__name__}: {str(error)[:300]}")
        counts.setdefault(name, Counter()).update(count)
    return {"counts": {name: dict(count) for name, count in counts.items()}, "reasons": dict(reasons), "wrong": wrong}


def main() -> int:
    """Run the fuzz test."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", help="folder of one more tokenizer")
    parser.add_argument("--out", type=Path, help="file for the counts")
    args = parser.parse_args()
    tokenizers = {name: make() for name, make in TOKENIZERS.items()}
    if args.tokenizer:
        tokenizers["given"] = load_tokenizer(args.tokenizer)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = fuzz(args.rows, args.seed, tokenizers, Path(folder))
    found |= {"rows": args.rows, "seed": args.seed, "seconds": round(time.perf_counter() - begin, 1)}
    for name, count in found["counts"].items():
        print(f"{name:<8}" + "".join(f"{count.get(part, 0):>8,} {part}" for part in ("written", "kept", "dropped")))
    for reason, count in sorted(found["reasons"].items(), key=lambda item: -item[1]):
        print(f"{count:>8,} {reason}")
    for line in found["wrong"]:
        print(line)
    if args.out:
        args.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    lost = sum(count["lost"] for count in found["counts"].values())
    print(f"lost: {lost} of {args.rows:,} rows; wrong: {len(found['wrong'])}; {found['seconds']} s")
    return 1 if lost or found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
