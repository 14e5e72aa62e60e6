"""A row that cannot be read is counted; a file that cannot be is an error that names it, and the place."""

import bz2
import gzip
import json
import lzma

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
from conftest import refused

from rlhf_lightning.data.files import DUPLICATE_KEY, UNREADABLE, parse_line, read_file


def written(tmp_path, name, content):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


@pytest.mark.parametrize(
    ("line", "row"),
    [
        (b'{"a": 1, "a": 2}', DUPLICATE_KEY),
        (b'{"m": [{"role": "user", "role": "assistant"}]}', DUPLICATE_KEY),
        (b'{"a": "\xff"}', UNREADABLE),
        (b'{"a": "\x00"}', UNREADABLE),
        (b'{"a": 1' + b"0" * 5000 + b"}", UNREADABLE),
        (b"[" * 100_000, UNREADABLE),
        (b"NaN", UNREADABLE),
        (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
        (b'{"a": Infinity, "b": "\\u0000"}', {"a": float("inf"), "b": "\x00"}),
        (b'{"a": "\\ud800"}', {"a": "\ud800"}),
    ],
)
def test_lines_of_json(line, row):
    assert parse_line(line) == row


def test_a_json_file_that_is_cut_off_is_an_error(tmp_path):
    with refused("invalid-json", "rows.json is not valid JSON in UTF-8: ", "line 1 column"):
        list(read_file(written(tmp_path, "rows.json", '[{"a": 1}, {"a":')))
    with refused("invalid-json", "an object has a key twice"):
        list(read_file(written(tmp_path, "rows.json", '[{"a": 1, "a": 2}]')))
    assert list(read_file(written(tmp_path, "rows.json", ""))) == []


def test_csv_loses_no_row_in_a_quote(tmp_path):
    content = 'prompt,n\na,1\n"b"x,2\n\nc\nd,3,4\n'
    wanted = [{"prompt": "a", "n": "1"}, UNREADABLE, {"prompt": "c", "n": None}, UNREADABLE]
    assert list(read_file(written(tmp_path, "rows.csv", content))) == wanted
    with refused("unclosed-quote", "rows.csv: a quote opens in the row ", " line 3 and is never closed"):
        list(read_file(written(tmp_path, "rows.csv", 'prompt,n\na,1\n"b,2\nc,3\n')))
    with refused("duplicate-column", "has the column 'n' twice in its header"):
        list(read_file(written(tmp_path, "rows.csv", "n,n\na,1\n")))


def test_broken_utf8_is_kept_apart_from_what_it_is_not(tmp_path):
    assert list(read_file(written(tmp_path, "rows.csv", b"\xef\xbb\xbfprompt\na\xff\n"))) == [{"prompt": "a\udcff"}]
    assert list(read_file(written(tmp_path, "t.txt", b"\xef\xbb\xbfa\xff\n\nb"))) == [
        {"text": "a\udcff"},
        {"text": "b"},
    ]


def test_parquet_loses_the_broken_rows_alone(tmp_path):
    texts = pyarrow.array([b"a", b"\xff", b"c"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "rows.parquet")
    assert list(read_file(tmp_path / "rows.parquet")) == [{"text": "a"}, UNREADABLE, {"text": "c"}]
    with refused("unreadable-file", "broken.parquet cannot be read as Parquet after 0 rows"):
        list(read_file(written(tmp_path, "broken.parquet", "hello")))


LINES = '{"a": 1}\n{"a": "\u00fc"}\n'.encode()
ROWS = [{"a": 1}, {"a": "\u00fc"}]


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [
        (".gz", gzip.compress),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
        (".zst", lambda content: pyarrow.compress(content, codec="zstd", asbytes=True)),
        (".ZST", lambda content: pyarrow.compress(content, codec="zstd", asbytes=True)),
        ("", gzip.compress),  # what a file begins with says it, too
    ],
)
def test_compressed_files_are_read(tmp_path, suffix, pack):
    assert list(read_file(written(tmp_path, f"rows.jsonl{suffix}", pack(LINES)))) == ROWS
    table = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"a": [1, 2]}), table)
    packed = pack(table.getvalue().to_pybytes())
    assert list(read_file(written(tmp_path, f"rows.parquet{suffix}", packed))) == [{"a": 1}, {"a": 2}]
    cut = pack(LINES * 100)
    with refused("unreadable-file", "rows.jsonl", "check that it is complete"):
        list(read_file(written(tmp_path, f"rows.jsonl{suffix}", cut[: len(cut) // 2])))


def test_suffixes_in_capitals_and_tables_of_every_kind(tmp_path):
    table = pyarrow.table({"a": [1, 2]})
    pyarrow.parquet.write_table(table, tmp_path / "part-0")  # no suffix
    pyarrow.feather.write_feather(table, tmp_path / "rows.feather")
    with pyarrow.ipc.new_stream(tmp_path / "rows.arrow", table.schema) as writer:
        writer.write_table(table)
    with pyarrow.ipc.new_file(tmp_path / "file.ARROW", table.schema) as writer:
        writer.write_table(table)
    for name in ("part-0", "rows.feather", "rows.arrow", "file.ARROW"):
        assert list(read_file(tmp_path / name)) == [{"a": 1}, {"a": 2}], name
    assert list(read_file(written(tmp_path, "rows.JSONL", LINES))) == ROWS
    assert list(read_file(written(tmp_path, "rows.TSV", "a\tb\n1\t2, 3\n"))) == [{"a": "1", "b": "2, 3"}]
    assert list(read_file(written(tmp_path, "no_suffix", LINES))) == ROWS
    for name in ("rows.xlsx", "rows.bin"):
        with refused("unknown-format", name, "has no known format", ".jsonl"):
            list(read_file(written(tmp_path, name, b"PK\x03\x04")))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_rows_over_several_lines_are_read(tmp_path, name):
    pretty = "\n".join(json.dumps(row, indent=2) for row in ROWS)
    assert list(read_file(written(tmp_path, name, pretty))) == ROWS
    assert list(read_file(written(tmp_path, name, json.dumps(ROWS, indent=2)))) == ROWS
    with refused("invalid-json", name, "after line 7"):
        list(read_file(written(tmp_path, name, pretty + '\n{"a": \n')))


def test_nulls_that_a_table_fills_in_are_no_arguments(tmp_path):
    calls = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"y": 2}}]
    rows = [{"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]} for call in calls]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert list(read_file(tmp_path / "rows.parquet")) == rows
