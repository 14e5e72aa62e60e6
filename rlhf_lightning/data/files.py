"""Read the rows of a file. An unreadable row becomes an `Unreadable`; an unreadable file raises an error naming it."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhf_lightning.data.finding import COMPRESSED, FORMATS, format_of, refuse_device
from rlhf_lightning.errors import DataError, reason_of

WRAPPERS = ("data", "rows", "examples", "instances", "train")
"""Keys under which a .json file may hold its list of rows."""


TURN_COLUMNS = (
    "prompt", "messages", "conversations", "chosen", "rejected", "completion", "completions", "history", "tools",
)  # fmt: skip
"""Columns with nested objects, in which tables fill in a null for every key that occurs in another row."""

LONGEST_ROW = 8 << 20
"""Maximum bytes of a row, unless ``max_row_bytes`` of its source allows more; encoding needs some 60 times the memory.
"""

LARGEST_UNPACKED = 1 << 30
"""Maximum decompressed size in bytes of a compressed file whose format is read as a whole."""

MOST_PACKED = 1000
"""Maximum ratio of a table's decompressed size to its file size, if it decompresses to more than `LARGEST_UNPACKED`."""

BATCH = 64
"""Number of rows of a Parquet file that are decoded at a time."""


class Unreadable:
    """Stands for a line that holds no valid row.

    Args:
        reason: key of `canonical.REASONS`.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason


UNREADABLE = Unreadable("unreadable_line")
DUPLICATE_KEY = Unreadable("duplicate_key")
TOO_LARGE = Unreadable("row_too_large")

RawRow = dict[str, Any] | Unreadable


class _DuplicateKey(Exception):
    """An object has a duplicate key."""


def read_file(file: Path, longest: int = LONGEST_ROW) -> Iterator[RawRow]:
    """Read the rows of a file: Parquet, Arrow, CSV or TSV with a header, JSON (a list of objects) or JSON lines.

    The suffix determines the format, or else the file's first bytes. In a ``.txt`` file each paragraph (text between
    empty lines) is a row with the column ``text``. Bytes that are not UTF-8 make a JSON row unreadable. In the other
    formats they become lone surrogates, and the row is refused when its text is read.

    Args:
        file: the file, possibly compressed.
        longest: maximum bytes of a row; a longer row is an `Unreadable`, but an error in CSV.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    readers: dict[str, Callable[[Path, io.BufferedReader, int], Iterator[RawRow]]] = {
        "jsonl": _jsonl, "json": _json, "parquet": _parquet, "arrow": _arrow, "csv": _csv, "tsv": _csv, "txt": _txt,
    }  # fmt: skip
    refuse_device(file)
    try:
        with _opened(file) as stream:
            yield from readers[format_of(file) or _format_of_content(file, stream)](file, stream, longest)
    except MemoryError as error:
        raise DataError(
            "file-too-large",
            f"{file} does not fit into memory when it is unpacked or parsed; split it, or write it as .jsonl, which is "
            "read row by row",
        ) from error
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
            raise
        raise DataError(
            "unreadable-file", f"{file} cannot be read: {reason_of(error)}; check that it is complete"
        ) from error


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


def _whole(file: Path, stream: io.BufferedReader) -> bytes:
    """Read a whole file. A compressed file may be a decompression bomb, so its decompressed size is limited."""
    if isinstance(stream.raw, io.FileIO):
        return stream.read()
    content = io.BytesIO()
    while chunk := stream.read(1 << 20):
        content.write(chunk)
        if content.tell() > LARGEST_UNPACKED:
            raise DataError(
                "file-too-large",
                f"{file} unpacks to more than {LARGEST_UNPACKED:,} bytes, and its format is read whole; write it as "
                ".jsonl, which is read row by row, or unpack it first",
            )
    return content.getvalue()


def _lines(stream: io.BufferedReader, longest: int) -> Iterator[bytes | None]:
    """Yield the lines that are not blank; yield None for a line that is too long, and skip it without storing it."""
    while line := stream.readline(longest + 2):
        if len(line) > longest and len(line.rstrip(b"\r\n")) > longest:
            while line and not line.endswith(b"\n"):
                line = stream.readline(longest)
            yield None
        elif line.strip():
            yield line


def _size(value: Any) -> int:
    """Return the approximate number of bytes of a value as JSON."""
    if isinstance(value, dict):
        return sum(len(key) + _size(one) for key, one in value.items())
    return sum(map(_size, value)) if isinstance(value, list) else len(value) if isinstance(value, str | bytes) else 8


def _bounded(rows: Iterable[RawRow], longest: int) -> Iterator[RawRow]:
    return (TOO_LARGE if isinstance(row, dict) and _size(row) > longest else row for row in rows)


def _jsonl(file: Path, stream: io.BufferedReader, longest: int) -> Iterator[RawRow]:
    lines = _lines(stream, longest)
    first = next(lines, b"")
    if first == b"":
        return
    row = TOO_LARGE if first is None else parse_line(first)
    if first and row is UNREADABLE and first.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"["):
        content = first + _whole(file, stream)
        found = _pretty_printed(file, content)
        parsed = (parse_line(line) for line in content.splitlines() if line.strip())
        yield from _bounded(parsed if found is None else found, longest)
        return
    yield row
    yield from (TOO_LARGE if line is None else parse_line(line) for line in lines)


def _pretty_printed(file: Path, content: bytes) -> list[RawRow] | None:
    """Return rows of JSON that spans several lines; None if the content is not of that kind."""
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


def _txt(file: Path, stream: io.BufferedReader, longest: int) -> Iterator[RawRow]:
    text = _whole(file, stream).decode("utf-8-sig", errors="surrogateescape").replace("\r\n", "\n")
    for paragraph in text.split("\n\n"):
        if paragraph.strip():
            yield {"text": paragraph.strip("\n")} if len(paragraph) <= longest else TOO_LARGE


def parse_line(line: bytes) -> RawRow:
    """Return the JSON object of a line, or why it is unreadable; Python's ``NaN`` and ``Infinity`` are accepted."""
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
    if len(made) < len(pairs):  # it is ambiguous which value is meant
        raise _DuplicateKey
    return made


def _json(file: Path, stream: io.BufferedReader, longest: int) -> Iterator[RawRow]:
    content = _whole(file, stream).removeprefix(b"\xef\xbb\xbf")
    rows = _rows_of_json(file, content)
    yield from rows if len(content) <= longest else _bounded(rows, longest)


def _rows_of_json(file: Path, content: bytes) -> Iterator[RawRow]:
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
            reason = "an object has a duplicate key" if isinstance(error, _DuplicateKey) else str(error)
            raise DataError("invalid-json", f"{file} is not valid JSON in UTF-8: {reason}") from error
        return
    if isinstance(whole, dict):
        wrapped = next((value for key, value in whole.items() if key in WRAPPERS and isinstance(value, list)), None)
        whole = [whole] if wrapped is None or len(whole) > 1 else wrapped
    yield from (row if isinstance(row, dict) else UNREADABLE for row in (whole if isinstance(whole, list) else [whole]))


def _parquet(file: Path, stream: io.BufferedReader, longest: int) -> Iterator[RawRow]:
    import pyarrow.parquet

    def batches() -> Iterable[Any]:
        source = _seekable(file, stream)
        schema = pyarrow.parquet.ParquetFile(source).schema
        columns = [schema.column(place) for place in range(len(schema))]
        # The file stores repeated texts once. Read as dictionaries, they take no more memory either.
        texts = [column.path for column in columns if column.logical_type.type == "STRING"]
        source.seek(0)
        return pyarrow.parquet.ParquetFile(source, read_dictionary=texts).iter_batches(BATCH)

    yield from _table(file, "Parquet", batches, longest)


def _arrow(file: Path, stream: io.BufferedReader, longest: int) -> Iterator[RawRow]:
    import pyarrow

    def batches() -> Iterable[Any]:
        if not stream.peek(6).startswith(b"ARROW1"):
            return pyarrow.ipc.open_stream(stream)
        reader = pyarrow.ipc.open_file(_seekable(file, stream))
        return (reader.get_batch(number) for number in range(reader.num_record_batches))

    yield from _table(file, "Arrow", batches, longest)


def _seekable(file: Path, stream: io.BufferedReader) -> Any:
    return stream if isinstance(stream.raw, io.FileIO) else io.BytesIO(_whole(file, stream))


def _table(file: Path, name: str, batches: Callable[[], Iterable[Any]], longest: int) -> Iterator[RawRow]:
    import pyarrow

    row = unpacked = 0
    packed = file.stat().st_size
    try:
        for batch in batches():
            size = sum(map(_unpacked_bytes, batch.columns))
            unpacked += size
            if unpacked > max(LARGEST_UNPACKED, MOST_PACKED * packed):
                raise DataError(
                    "file-too-large",
                    f"{file} has {packed:,} bytes, and after {row:,} rows it has unpacked to more than {MOST_PACKED:,} "
                    "times as many: it repeats a few values; write it without the repetitions",
                )
            yield from map(without_filled_nulls, _rows_of_batch(batch, longest, size))
            row += len(batch)
    except MemoryError:
        raise
    except (pyarrow.ArrowException, OSError) as error:
        sentence = f"{file} cannot be read as {name} after {row:,} rows: {reason_of(error)}"
        raise DataError("unreadable-file", sentence) from error


def _rows_of_batch(batch: Any, longest: int, size: int) -> Iterator[RawRow]:
    if size <= longest:
        try:
            yield from batch.to_pylist()
            return
        except (ValueError, OverflowError):  # a value has no Python form; the loop below finds its row
            pass
    for place in range(len(batch)):
        one = batch.slice(place, 1)
        try:
            yield TOO_LARGE if sum(map(_unpacked_bytes, one.columns)) > longest else one.to_pylist()[0]
        except (ValueError, OverflowError):
            yield UNREADABLE


def _unpacked_bytes(array: Any) -> int:
    """Return the bytes of a column's values, counting a repeated text each time although a table may store it once."""
    import pyarrow
    import pyarrow.compute

    if isinstance(array, pyarrow.DictionaryArray):
        kind = array.type.value_type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            return array.nbytes
        return pyarrow.compute.sum(pyarrow.compute.binary_length(array.dictionary).take(array.indices)).as_py() or 0
    if pyarrow.types.is_struct(array.type):
        return sum(map(_unpacked_bytes, array.flatten()))
    if pyarrow.types.is_list(array.type) or pyarrow.types.is_large_list(array.type):
        return _unpacked_bytes(array.flatten())
    return array.nbytes


def without_filled_nulls(row: RawRow) -> RawRow:
    """Drop nulls from the nested objects of turns: a table fills in every key that any row has."""

    def dropped(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: dropped(one) for key, one in value.items() if one is not None or key == "content"}
        return [dropped(one) for one in value] if isinstance(value, list) else value

    if isinstance(row, Unreadable):
        return row
    return {name: dropped(value) if name in TURN_COLUMNS else value for name, value in row.items()}


def _csv(file: Path, stream: io.BufferedReader, longest: int) -> Iterator[RawRow]:
    csv.field_size_limit(longest)
    lines = _csv_lines(file, stream, longest)
    reader = csv.reader(lines, strict=True, delimiter="\t" if format_of(file) == "tsv" else ",")
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
                    "so the rest of the file belongs to that row; close it",
                ) from error
            if "field larger than field limit" in str(error):
                raise _csv_row_too_large(file, begins, longest) from error
            fields = [] if header is None else [""] * (len(header) + 1)
        if fields is None:
            return
        if header is None:
            header = _header(file, fields)
        elif fields:
            short = len(header) - len(fields)
            yield dict(zip(header, [*fields, *[None] * short], strict=True)) if short >= 0 else UNREADABLE


def _csv_lines(file: Path, stream: io.BufferedReader, longest: int) -> Iterator[str]:
    number, returns = 0, False
    while line := stream.readline(longest + 2):
        number += 1
        if len(line) > longest + 1:
            raise _csv_row_too_large(file, number, longest)
        text = line.decode("utf-8", errors="surrogateescape")
        if number == 1:
            text = text.removeprefix("\ufeff")
            returns = "\r" in text.partition('"')[0].rstrip("\r\n")
        yield from re.split(r"(?<=\r)(?!\n)", text) if returns else (text,)


def _csv_row_too_large(file: Path, line: int, longest: int) -> DataError:
    return DataError(
        "row-too-large",
        f"{file}: the row on line {line} has more than {longest:,} bytes; close the quote if one is open there, or "
        "raise max_row_bytes of the source",
    )


def _header(file: Path, fields: list[str]) -> list[str]:
    twice = [name for place, name in enumerate(fields) if name in fields[:place]]
    if twice:
        raise DataError(
            "duplicate-column", f"{file} has the column {twice[0]!r} twice in its header; rename one of them"
        )
    return fields
