"""Rows of one file. A row that cannot be read is one `Unreadable`; a file that cannot be, is an error that names it."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_lightning.errors import DataError

WRAPPERS = ("data", "rows", "examples", "instances", "train")
"""Names under which a .json file may hold its list of rows."""

SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet", ".csv", ".txt")

LONGEST_FIELD = 1 << 30
"""Characters of one CSV field."""


class Unreadable:
    """Stands for a line that holds no row.

    Args:
        reason: why, a key of `canonical.REASONS`.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason


UNREADABLE = Unreadable("unreadable_line")
DUPLICATE_KEY = Unreadable("duplicate_key")

RawRow = dict[str, Any] | Unreadable


class _DuplicateKey(Exception):
    """An object has a key twice."""


def read_file(file: Path) -> Iterator[RawRow]:
    """Rows of one file, by its suffix: Parquet, CSV with a header, JSON (a list of objects), else one JSON a line.

    A ``.txt`` file is one row with the column ``text`` for each paragraph (texts between empty lines). Bytes that are
    not UTF-8 make a row of JSON unreadable; in the other formats they stay in the row as half surrogates, for which
    it is refused when its text is read.

    Raises:
        ValueError: if the file as a whole is not what its suffix says.
    """
    if file.suffix == ".parquet":
        yield from _parquet(file)
    elif file.suffix == ".csv":
        yield from _csv(file)
    elif file.suffix == ".txt":
        for paragraph in file.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n\n"):
            if paragraph.strip():
                yield {"text": paragraph.strip("\n")}
    elif file.suffix == ".json":
        yield from _json(file)
    else:
        with file.open("rb") as stream:
            for line in stream:
                if line.strip():
                    yield parse_line(line)


def parse_line(line: bytes) -> RawRow:
    """The JSON object of a line, or why there is none; ``NaN`` and ``Infinity``, which Python writes, are numbers."""
    try:
        row = _loads(line.removeprefix(b"\xef\xbb\xbf"))
    except _DuplicateKey:
        return DUPLICATE_KEY
    except (ValueError, RecursionError):
        return UNREADABLE
    return row if isinstance(row, dict) else UNREADABLE


def _loads(content: bytes) -> Any:
    return json.loads(content.decode("utf-8"), object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):  # which of the two is meant, nobody knows
        raise _DuplicateKey
    return made


def _json(file: Path) -> Iterator[RawRow]:
    content = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if not content.strip():
        return
    try:
        whole = _loads(content)
    except (ValueError, RecursionError, _DuplicateKey) as error:
        lines = [line for line in content.splitlines() if line.strip()]
        if not isinstance(parse_line(lines[0]), dict):  # neither a list of rows nor a row a line
            reason = "an object has a key twice" if isinstance(error, _DuplicateKey) else str(error)
            raise DataError("invalid-json", f"{file} is not valid JSON in UTF-8: {reason}") from error
        yield from map(parse_line, lines)
        return
    if isinstance(whole, dict):
        wrapped = next((value for key, value in whole.items() if key in WRAPPERS and isinstance(value, list)), None)
        whole = [whole] if wrapped is None or len(whole) > 1 else wrapped
    yield from (row if isinstance(row, dict) else UNREADABLE for row in (whole if isinstance(whole, list) else [whole]))


def _parquet(file: Path) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(1024):
            try:
                rows: list[RawRow] = batch.to_pylist()
            except (ValueError, OverflowError):  # some value has no Python form: which row's, is found one by one
                rows = [_parquet_row(batch.slice(place, 1)) for place in range(len(batch))]
            yield from rows
            row += len(rows)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError("unreadable-file", f"{file} cannot be read as Parquet after {row:,} rows: {reason}") from error


def _parquet_row(batch: Any) -> RawRow:
    try:
        return batch.to_pylist()[0]
    except (ValueError, OverflowError):
        return UNREADABLE


def _csv(file: Path) -> Iterator[RawRow]:
    csv.field_size_limit(LONGEST_FIELD)
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        reader = csv.reader(stream, strict=True)
        header, number = None, 0
        while True:
            begins = reader.line_num + 1
            try:
                fields = next(reader, None)
            except csv.Error as error:
                if "unexpected end of data" in str(error):
                    raise DataError(
                        "unclosed-quote",
                        f"{file}: a quote opens in the row that begins on line {begins} and is never closed, "
                        "so it swallows the rest of the file; close it",
                    ) from error
                fields = [] if header is None else [""] * (len(header) + 1)
            if fields is None:
                return
            if header is None:
                header = _header(file, fields)
            elif fields:
                number += 1
                short = len(header) - len(fields)
                yield dict(zip(header, [*fields, *[None] * short], strict=True)) if short >= 0 else UNREADABLE


def _header(file: Path, fields: list[str]) -> list[str]:
    twice = [name for place, name in enumerate(fields) if name in fields[:place]]
    if twice:
        raise DataError(
            "duplicate-column", f"{file} has the column {twice[0]!r} twice in its header; rename one of them"
        )
    return fields
