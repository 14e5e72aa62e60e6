"""``rlhf audit``: find problems in a data set before training."""

# No postponed annotations: to resolve them, jsonargparse would import everything under TYPE_CHECKING (slow help).

import json as writer
import shutil
import textwrap
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf_lightning.atomic_files import refuse_special, write_text
from rlhf_lightning.commands.parsing import run_function
from rlhf_lightning.errors import DataError, SettingError, check_range

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_lightning.data.audit import Audit
    from rlhf_lightning.data.files import RawRow

SHOWN = 10
"""Row numbers printed for each finding."""
FIRST = 100
"""Rows whose columns determine the kind."""


def main(argv: Sequence[str]) -> int:
    """Run ``rlhf audit``."""
    return run_function(audit, argv, "rlhf audit", positional=["data"])


def audit(
    data: str,
    eval: str | None = None,
    kind: Literal["sft", "preference", "unpaired", "process", "prompt"] | None = None,
    tokenizer: str | None = None,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    chat_template: str | None = None,
    template_args: dict[str, Any] | None = None,
    as_chat: bool = False,
    columns: dict[str, str] | None = None,
    split: str = "train",
    rows: int | None = None,
    similar: float | None = None,
    overlap: int | None = None,
    json: str | None = None,
    strict: bool = False,
) -> int:
    """Check a data set for problems before training.

    Finds rows that training would drop, duplicates, overlap with the evaluation data, contradictory labels, labels that
    the length predicts, truncation, turns out of order and damaged text. Prints counts and row numbers (from 1, in the
    order of the data), never texts. Memory use does not depend on the length of texts.

    Args:
        data: .jsonl, .json, .parquet, .csv or .txt file, glob, folder written by save_to_disk, or Hub name.
        eval: evaluation data in the same formats; checked too, and searched for rows of the training data.
        kind: type of the rows; by default derived from their columns.
        tokenizer: folder or Hub name of a tokenizer or model, for lengths in tokens and its control tokens.
        max_length: longest prompt and completion in tokens, as in training; needs a tokenizer.
        max_prompt_length: longest prompt in tokens, as in training; needs a tokenizer.
        chat_template: chat template to use instead of the tokenizer's own.
        template_args: variables of the chat template, as in '{enable_thinking: false}'.
        as_chat: read plain text as a user turn and an assistant turn.
        columns: new names of columns, as in --columns '{question: prompt, answer: completion}'.
        split: split of a Hub dataset or of a folder with several.
        rows: read only the first rows.
        similar: also find near duplicates, with at least this share of common groups of 5 words, such as 0.8 (MinHash).
        overlap: also find sequences of this many words, such as 13, that are in both --eval and the training data.
        json: file for all findings, with the numbers of all rows.
        strict: exit with status 1 if anything was found.
    """
    if tokenizer is None and (max_length or max_prompt_length or chat_template):
        raise SettingError("missing-setting", "max_length, max_prompt_length and chat_template need a --tokenizer")
    check_range(similar is None or 0 < similar <= 1, "it must lie in (0, 1]", similar=similar)
    check_range(overlap is None or overlap >= 1, "it must be at least 1", overlap=overlap)
    if json is not None:
        refuse_special(Path(json))
    if overlap is not None and eval is None:
        raise SettingError("missing-setting", "overlap compares with evaluation data: name it with --eval")
    settings = {
        "columns": columns, "as_chat": as_chat, "max_length": max_length, "max_prompt_length": max_prompt_length,
        "tokenizer": None if tokenizer is None else load(tokenizer, chat_template, template_args),
        "similar": similar, "overlap": overlap,
    }  # fmt: skip
    train = audited(data, split, rows, kind, settings)
    reports = [summary(train, data)]
    if eval is not None:
        reports.append(summary(audited(eval, split, rows, kind, settings, train), eval))
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    print("\n\n".join(page(report, width) for report in reports))
    if json is not None:
        write_text(Path(json), writer.dumps(reports, indent=2) + "\n")
    found = sum(len(report["findings"]) for report in reports)
    return 1 if strict and found else 0


def load(
    tokenizer: str, chat_template: str | None, template_args: dict[str, Any] | None = None
) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a folder, Hub name or .gguf file."""
    from rlhf_lightning.models.resolving import resolve_folder
    from rlhf_lightning.tokenization import load_tokenizer

    return load_tokenizer(resolve_folder(tokenizer), chat_template, template_args=template_args)


def audited(
    data: str, split: str, most: int | None, kind: str | None, settings: dict[str, Any], train: "Audit | None" = None
) -> "Audit":
    """Audit one source, and compare it with the training data if given.

    Raises:
        DataError: the source is empty, or its columns are unknown.
    """
    from rlhf_lightning.data.audit import Audit

    kind, rows = peek(data, split, most, kind, settings["columns"])
    found = Audit(kind, **settings)
    if train is None:
        deque(found.add(rows), maxlen=0)
    else:
        found.compare(rows, train)
    return found


def peek(
    data: str, split: str, most: int | None, kind: str | None, columns: dict[str, str] | None
) -> "tuple[str, Iterator[RawRow]]":
    """Return the kind of a source's rows, derived from the columns of the first rows, and the rows."""
    from rlhf_lightning.data.files import Unreadable
    from rlhf_lightning.data.formats import kind_of
    from rlhf_lightning.data.sources import Source, read_rows
    from rlhf_lightning.data.tokenizing import encoder_for

    rows: Iterator[RawRow] = read_rows(Source(data, rows=most, split=split))
    first = list(islice(rows, FIRST))
    names = [name for row in first if not isinstance(row, Unreadable) for name in row]
    if not first:
        raise DataError("no-rows", f"{data} has no rows")
    if not names:
        raise DataError(
            "no-usable-rows",
            f"{data}: none of its first {len(first)} rows can be read; each row must be a JSON object in UTF-8",
        )
    renames = columns or {}
    kind = kind or kind_of([renames.get(name, name) for name in names], data)
    encoder_for(kind, columns=renames).check_names(names, data)
    return kind, chain(first, rows)


def summary(audit: "Audit", source: str) -> dict[str, Any]:
    """Return all findings of an audit as plain values, with the numbers of the rows."""
    shortcut = audit.length_shortcut()
    return {
        "source": source,
        "kind": audit.kind,
        "read": audit.read,
        "usable": audit.usable,
        "distinct_prompts": len(audit.prompts),
        "unit": "characters" if audit.tokenizer is None else "tokens",
        "lengths": dict(zip(("median", "95%", "longest"), audit.quantiles(), strict=False)),
        "unknown_tokens": audit.unknown_tokens / max(audit.tokens, 1),
        "unused": dict(audit.unused),
        "length_shortcut": None if shortcut is None else vars(shortcut),
        "findings": [
            {"check": one.check, "meaning": one.meaning, "count": len(one.rows), "rows": one.rows, "first": one.first}
            for one in audit.findings()
        ],
    }


def page(report: dict[str, Any], width: int) -> str:
    """Return a report as text, at most ``width`` columns wide."""
    read = report["read"]
    head = f"{report['source']}: {report['kind']} data, {read:,} rows, {report['usable']:,} of them usable"
    lines = [*textwrap.wrap(head, width, subsequent_indent="  ")]
    facts = [f"{report['distinct_prompts']:,} distinct prompts"] if report["distinct_prompts"] else []
    if report["lengths"]:
        sizes = ", ".join(f"{name} {size:,}" for name, size in report["lengths"].items())
        facts.append(f"{report['unit']} of prompt and completion: {sizes}")
    if (shortcut := report["length_shortcut"]) is not None:
        facts.append(
            f"picking the longer completion is right in {100 * shortcut['accuracy']:.1f} % "
            f"(95 % interval {100 * shortcut['low']:.1f} to {100 * shortcut['high']:.1f}) of {shortcut['rows']:,} rows"
        )
    if report["unknown_tokens"]:
        facts.append(f"unknown to the tokenizer: {100 * report['unknown_tokens']:.3g} % of all tokens")
    if report["unused"]:
        facts.append("not used: " + ", ".join(f"{name} ({count:,} rows)" for name, count in report["unused"].items()))
    for fact in facts:
        lines += textwrap.wrap(fact, width, initial_indent="  ", subsequent_indent="    ")
    if not report["findings"]:
        return "\n".join([*lines, "", "  nothing found"])
    lines += ["", f"  {'rows':>8} {'share':>7}  finding"]
    for one in report["findings"]:
        lines += _finding(one, read, width)
    return "\n".join(lines)


def _finding(one: dict[str, Any], read: int, width: int) -> list[str]:
    counted = f"  {one['count']:>8,} {100 * one['count'] / read:>6.1f}%  " if one["rows"] else f"  {'all':>8} {'':>7}  "
    indent = " " * len(counted)
    numbers = ", ".join(map(str, one["rows"][:SHOWN])) + (" ..." if len(one["rows"]) > SHOWN else "")
    text = f"{one['check']}: {one['meaning']}" + (f" [{numbers}]" if numbers else "")
    return textwrap.wrap(text, width, initial_indent=counted, subsequent_indent=indent)
