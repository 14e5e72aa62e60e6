"""Rows of one file. A row that cannot be read is one `Unreadable`; a file that cannot be read is an error naming it."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhf_lightning.errors import DataError

WRAPPERS = ("data", "rows", "examples", "instances", "train")
"""Names under which a .json file may hold its list of rows."""

COMPRESSED = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\x00", ".zst": b"\x28\xb5\x2f\xfd"}
"""Suffixes of compressed files, and the bytes such a file begins with."""

FORMATS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "tsv",
    ".txt": "txt", ".arrow": "arrow", ".feather": "arrow",
}  # fmt: skip
"""The format of a file by its suffix, in small letters and before that of a compression."""

TURN_COLUMNS = (
    "prompt", "messages", "conversations", "chosen", "rejected", "completion", "completions", "history", "tools",
)  # fmt: skip
"""Columns with nested objects, in which tables hold a null for every key that another row has."""

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


def format_of(file: Path) -> str | None:
    """Return the format of a file by its name, a value of `FORMATS`; None if the name does not say."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in (*COMPRESSED, ".zstd"):
        suffixes.pop()
    return FORMATS.get(suffixes[-1]) if suffixes else None


def read_file(file: Path) -> Iterator[RawRow]:
    """Read the rows of one file: Parquet, Arrow, CSV or TSV with a header, JSON (a list of objects) or one JSON a line.

    The format is that of the suffix, else what the file begins with. A ``.txt`` file is one row with the column
    ``text`` for each paragraph (texts between empty lines). Bytes that are not UTF-8 make a row of JSON unreadable; in
    the other formats they stay in the row as half surrogates, for which it is refused when its text is read.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    readers: dict[str, Callable[[Path, io.BufferedReader], Iterator[RawRow]]] = {
        "jsonl": _jsonl, "json": _json, "parquet": _parquet, "arrow": _arrow, "csv": _csv, "tsv": _csv, "txt": _txt,
    }  # fmt: skip
    if file.exists() and not file.is_file() and not file.is_dir():
        raise DataError("not-a-file", f"{file} is a pipe or a device, which may never end; copy it to a file first")
    try:
        with _opened(file) as stream:
            yield from readers[format_of(file) or _format_of_content(file, stream)](file, stream)
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError("unreadable-file", f"{file} cannot be read: {reason}; check that it is complete") from error


def _opened(file: Path) -> io.BufferedReader:
    with file.open("rb") as stream:
        begins = stream.read(8)
    packed = next((suffix for suffix, magic in COMPRESSED.items() if begins.startswith(magic)), None)
    opened: Any
    if packed is None:
        return file.open("rb")
    if packed == ".zst":
        import pyarrow

        opened = pyarrow.input_stream(str(file), compression="zstd")
    else:
        modules: dict[str, Any] = {".gz": gzip, ".bz2": bz2, ".xz": lzma}
        opened = modules[packed].open(file, "rb")
    return io.BufferedReader(opened)


def _format_of_content(file: Path, stream: io.BufferedReader) -> str:
    begins = stream.peek(64)[:64]
    if begins.startswith(b"PAR1"):
        return "parquet"
    if begins.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return "arrow"
    if begins.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"["):
        return "jsonl"
    raise DataError(
        "unknown-format",
        f"{file} has no known format; give a {', '.join(FORMATS)} file, which may be compressed "
        f"({', '.join(COMPRESSED)})",
    )


def _lines(stream: Iterable[bytes]) -> Iterator[bytes]:
    return (line for line in stream if line.strip())


def _jsonl(file: Path, stream: io.BufferedReader) -> Iterator[RawRow]:
    first = next(_lines(stream), None)
    if first is None:
        return
    row = parse_line(first)
    if row is UNREADABLE and first.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"["):
        content = first + stream.read()
        found = _pretty_printed(file, content)
        yield from map(parse_line, _lines(content.splitlines())) if found is None else found
        return
    yield row
    yield from map(parse_line, _lines(stream))


def _pretty_printed(file: Path, content: bytes) -> list[RawRow] | None:
    """Return rows that are written over several lines; None if the content is not of that kind."""
    try:
        text = content.decode("utf-8-sig").strip()
    except UnicodeError:
        return None
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    rows: list[Any] = []
    place = 0
    while place < len(text):
        try:
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError, _DuplicateKey) as error:
            if not rows:
                return None
            line = text.count("\n", 0, place) + 1
            raise DataError("invalid-json", f"{file} is not valid JSON after line {line}: {error}") from error
        rows += value if isinstance(value, list) else [value]
        while place < len(text) and text[place] in " \t\r\n,":
            place += 1
    return [row if isinstance(row, dict) else UNREADABLE for row in rows]


def _txt(file: Path, stream: io.BufferedReader) -> Iterator[RawRow]:
    text = stream.read().decode("utf-8-sig", errors="surrogateescape").replace("\r\n", "\n")
    for paragraph in text.split("\n\n"):
        if paragraph.strip():
            yield {"text": paragraph.strip("\n")}


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
    if len(made) < len(pairs):  # it is not known which of the two is meant
        raise _DuplicateKey
    return made


def _json(file: Path, stream: io.BufferedReader) -> Iterator[RawRow]:
    content = stream.read().removeprefix(b"\xef\xbb\xbf")
    if not content.strip():
        return
    try:
        whole = _loads(content)
    except (ValueError, RecursionError, _DuplicateKey) as error:
        lines = [line for line in content.splitlines() if line.strip()]
        if isinstance(parse_line(lines[0]), dict):
            yield from map(parse_line, lines)
        elif (found := _pretty_printed(file, content)) is not None:
            yield from found
        else:
            reason = "an object has a key twice" if isinstance(error, _DuplicateKey) else str(error)
            raise DataError("invalid-json", f"{file} is not valid JSON in UTF-8: {reason}") from error
        return
    if isinstance(whole, dict):
        wrapped = next((value for key, value in whole.items() if key in WRAPPERS and isinstance(value, list)), None)
        whole = [whole] if wrapped is None or len(whole) > 1 else wrapped
    yield from (row if isinstance(row, dict) else UNREADABLE for row in (whole if isinstance(whole, list) else [whole]))


def _parquet(file: Path, stream: io.BufferedReader) -> Iterator[RawRow]:
    import pyarrow.parquet

    yield from _table(file, "Parquet", lambda: pyarrow.parquet.ParquetFile(_seekable(stream)).iter_batches(1024))


def _arrow(file: Path, stream: io.BufferedReader) -> Iterator[RawRow]:
    import pyarrow

    def batches() -> Iterable[Any]:
        if not stream.peek(6).startswith(b"ARROW1"):
            return pyarrow.ipc.open_stream(stream)
        reader = pyarrow.ipc.open_file(_seekable(stream))
        return (reader.get_batch(number) for number in range(reader.num_record_batches))

    yield from _table(file, "Arrow", batches)


def _seekable(stream: io.BufferedReader) -> Any:
    return stream if isinstance(stream.raw, io.FileIO) else io.BytesIO(stream.read())


def _table(file: Path, name: str, batches: Callable[[], Iterable[Any]]) -> Iterator[RawRow]:
    import pyarrow

    row = 0
    try:
        for batch in batches():
            try:
                rows: list[RawRow] = batch.to_pylist()
            except (ValueError, OverflowError):  # some value has no Python form: which row's, is found one by one
                rows = [_table_row(batch.slice(place, 1)) for place in range(len(batch))]
            yield from map(without_filled_nulls, rows)
            row += len(rows)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError("unreadable-file", f"{file} cannot be read as {name} after {row:,} rows: {reason}") from error


def _table_row(batch: Any) -> RawRow:
    try:
        return batch.to_pylist()[0]
    except (ValueError, OverflowError):
        return UNREADABLE


def without_filled_nulls(row: RawRow) -> RawRow:
    """Drop the nulls in nested objects of turns, which a table fills in for keys that another row has."""

    def dropped(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: dropped(one) for key, one in value.items() if one is not None or key == "content"}
        return [dropped(one) for one in value] if isinstance(value, list) else value

    if isinstance(row, Unreadable):
        return row
    return {name: dropped(value) if name in TURN_COLUMNS else value for name, value in row.items()}


def _csv(file: Path, stream: io.BufferedReader) -> Iterator[RawRow]:
    csv.field_size_limit(LONGEST_FIELD)
    lines = (line.decode("utf-8", errors="surrogateescape") for line in stream)
    reader = csv.reader(_without_mark(lines), strict=True, delimiter="\t" if format_of(file) == "tsv" else ",")
    header = None
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
            short = len(header) - len(fields)
            yield dict(zip(header, [*fields, *[None] * short], strict=True)) if short >= 0 else UNREADABLE


def _without_mark(lines: Iterator[str]) -> Iterator[str]:
    for number, line in enumerate(lines):
        yield line.removeprefix("\ufeff") if number == 0 else line


def _header(file: Path, fields: list[str]) -> list[str]:
    twice = [name for place, name in enumerate(fields) if name in fields[:place]]
    if twice:
        raise DataError(
            "duplicate-column", f"{file} has the column {twice[0]!r} twice in its header; rename one of them"
        )
    return fields
