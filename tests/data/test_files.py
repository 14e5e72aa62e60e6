"""An unreadable row is counted; an unreadable file is an error that names the file and the place."""

import bz2
import gzip
import json
import lzma
import os
import tracemalloc

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
from conftest import refused

from rlhf_lightning.data import files
from rlhf_lightning.data.files import DUPLICATE_KEY, LONGEST_ROW, TOO_LARGE, UNREADABLE, parse_line, read_file
from rlhf_lightning.data.sources import Source, read_rows


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
def test_json_lines_are_read(line, row):
    assert parse_line(line) == row


def test_a_truncated_json_file_is_refused(tmp_path):
    with refused("invalid-json", "rows.json is not valid JSON in UTF-8: ", "line 1 column"):
        list(read_file(written(tmp_path, "rows.json", '[{"a": 1}, {"a":')))
    with refused("invalid-json", "an object has a duplicate key"):
        list(read_file(written(tmp_path, "rows.json", '[{"a": 1, "a": 2}]')))
    assert list(read_file(written(tmp_path, "rows.json", ""))) == []


def test_malformed_csv_rows_are_skipped_and_unclosed_quotes_refused(tmp_path):
    content = 'prompt,n\na,1\n"b"x,2\n\nc\nd,3,4\n'
    wanted = [{"prompt": "a", "n": "1"}, UNREADABLE, {"prompt": "c", "n": None}, UNREADABLE]
    assert list(read_file(written(tmp_path, "rows.csv", content))) == wanted
    with refused("unclosed-quote", "rows.csv: a quote opens in the row ", " line 3 and is never closed"):
        list(read_file(written(tmp_path, "rows.csv", 'prompt,n\na,1\n"b,2\nc,3\n')))
    with refused("duplicate-column", "has the column 'n' twice in its header"):
        list(read_file(written(tmp_path, "rows.csv", "n,n\na,1\n")))


def test_csv_accepts_carriage_return_line_ends(tmp_path):
    rows = [{"a": "1", "b": "x\r2"}, {"a": "3", "b": "y"}]
    for end in ("\r", "\r\n", "\n"):
        content = end.join(["a,b", '1,"x\r2"', "3,y", ""])
        assert list(read_file(written(tmp_path, "rows.csv", content.encode()))) == rows


def test_only_invalid_utf8_bytes_become_surrogates(tmp_path):
    assert list(read_file(written(tmp_path, "rows.csv", b"\xef\xbb\xbfprompt\na\xff\n"))) == [{"prompt": "a\udcff"}]
    assert list(read_file(written(tmp_path, "t.txt", b"\xef\xbb\xbfa\xff\n\nb"))) == [
        {"text": "a\udcff"},
        {"text": "b"},
    ]


def test_only_undecodable_parquet_rows_are_lost(tmp_path):
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
        ("", gzip.compress),  # the first bytes of a file identify its format too
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


def test_uppercase_suffixes_and_all_arrow_formats_are_read(tmp_path):
    table = pyarrow.table({"a": [1, 2]})
    pyarrow.parquet.write_table(table, tmp_path / "part-0")  # without a suffix
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
def test_pretty_printed_json_rows_are_read(tmp_path, name):
    pretty = "\n".join(json.dumps(row, indent=2) for row in ROWS)
    assert list(read_file(written(tmp_path, name, pretty))) == ROWS
    assert list(read_file(written(tmp_path, name, json.dumps(ROWS, indent=2)))) == ROWS
    with refused("invalid-json", name, "after line 7"):
        list(read_file(written(tmp_path, name, pretty + '\n{"a": \n')))


def test_null_arguments_filled_in_by_arrow_are_removed(tmp_path):
    calls = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"y": 2}}]
    rows = [{"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]} for call in calls]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert list(read_file(tmp_path / "rows.parquet")) == rows


LONG = 1000
"""Bytes of a row in the tests of the size limit."""


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "pretty.jsonl", "rows.jsonl.gz", "rows.json.xz"])
def test_oversized_rows_are_counted_and_skipped(tmp_path, name):
    rows = [{"a": "x"}, {"a": "y" * LONG}, {"a": ["z" * (LONG // 2)] * 2}, {"a": "v" * (LONG - 20)}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    whole = json.dumps(rows, indent=1)
    content = {"rows.jsonl": lines, "rows.jsonl.gz": lines, "pretty.jsonl": whole}.get(name, whole).encode()
    content = (
        gzip.compress(content) if name.endswith("gz") else lzma.compress(content) if name.endswith("xz") else content
    )
    found = list(read_file(written(tmp_path, name, content), LONG))
    assert found == [rows[0], TOO_LARGE, TOO_LARGE, rows[3]]
    assert list(read_file(tmp_path / name)) == rows


def test_a_huge_line_is_not_kept_in_memory(tmp_path):
    file = tmp_path / "rows.jsonl.gz"
    with gzip.open(file, "wb", compresslevel=1) as stream:
        stream.write(b'{"a": "')
        for _ in range(100):
            stream.write(b"w" * (1 << 20))
        stream.write(b'"}\n{"a": "x"}\n')
    tracemalloc.start()
    assert list(read_file(file)) == [TOO_LARGE, {"a": "x"}]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * LONGEST_ROW


@pytest.mark.parametrize("dictionary", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_dictionary_encoded_tables_are_decoded_row_by_row(tmp_path, nested, dictionary):
    texts = ["short", "w" * LONG, "short", None, "v" * (LONG // 2)] * 60
    column = [[{"role": "user", "content": text}] for text in texts] if nested else texts
    table = pyarrow.table({"prompt": column, "n": list(range(300))})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", use_dictionary=dictionary)
    found = list(read_file(tmp_path / "rows.parquet", LONG))
    assert [row is TOO_LARGE for row in found] == [text == "w" * LONG for text in texts]
    whole = list(read_file(tmp_path / "rows.parquet"))
    assert [row["n"] for row in whole] == list(range(300))
    assert found[0] == whole[0] and found[3] == whole[3] and found[4] == whole[4]


def test_a_parquet_decompression_bomb_takes_little_memory(tmp_path):
    text = "w" * (1 << 20)
    repeated = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 4000, pyarrow.int32()), [text])
    file = tmp_path / "bomb.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": repeated}), file, compression="zstd")
    assert file.stat().st_size < 100_000
    before = pyarrow.total_allocated_bytes()
    count = 0
    with refused("file-too-large", "bomb.parquet has", "unpacked to more than 1,000 times as many"):
        for row in read_file(file):
            assert len(row["prompt"]) == 1 << 20
            count += 1
            assert pyarrow.total_allocated_bytes() - before < 64 << 20
    assert 900 < count <= 1024


def test_compressed_files_have_a_decompressed_size_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGEST_UNPACKED", 5_000_000)
    for name in ("rows.json", "rows.txt", "rows.parquet"):
        file = written(tmp_path, f"{name}.gz", gzip.compress(b"[" + b" " * 6_000_000 + b"]"))
        with refused("file-too-large", f"{name}.gz unpacks to more than 5,000,000 bytes", ".jsonl"):
            list(read_file(file))


def test_a_memory_error_names_the_file(tmp_path, monkeypatch):
    def exhausted(*_):
        raise MemoryError

    monkeypatch.setattr(files, "_loads", exhausted)
    with refused("file-too-large", "rows.json does not fit into memory", "split it"):
        list(read_file(written(tmp_path, "rows.json", "[1]")))


def test_an_oversized_csv_row_is_refused_with_its_line(tmp_path):
    for content in ("a,n\nx,1\n" + "y" * LONG + ",2\n", "a,n\nx,1\n" + '"' + "y\n" * LONG):
        with refused("row-too-large", "rows.csv: the row on line 3", "max_row_bytes"):
            list(read_file(written(tmp_path, "rows.csv", content), LONG))


def test_pipes_and_devices_are_refused_and_skipped_in_globs(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").symlink_to("/dev/zero")
    for name in ("a.jsonl", "b.jsonl"):
        with refused("not-a-file", name):
            list(read_rows(Source(str(tmp_path / name))))
        with refused("not-a-file", name):
            next(read_file(tmp_path / name))
    written(tmp_path, "c.jsonl", '{"text": "x"}\n')
    for source in (tmp_path, tmp_path / "*.jsonl"):
        assert list(read_rows(Source(str(source)))) == [{"text": "x"}]
