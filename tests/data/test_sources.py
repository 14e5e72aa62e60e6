"""Rows from every kind of source, and every line of them counted."""

import json

import pytest
from conftest import refused

from rlhf_lightning.data.files import UNREADABLE
from rlhf_lightning.data.sources import Source, files_of, parse_sources, read_rows, source_fingerprint

ROWS = [{"prompt": "a", "n": 1}, {"prompt": "ü\u2028b", "n": 2}, {"prompt": "c", "n": 3}]


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read(path, **changes):
    return list(read_rows(Source(str(path), **changes)))


def test_jsonl(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(lines(ROWS) + "\n", encoding="utf-8")
    assert read(file) == ROWS
    assert read(file, rows=2) == ROWS[:2]


def test_lines_that_hold_no_row_are_counted(tmp_path):
    file = tmp_path / "rows.jsonl"
    deep = b"[" * 100_000
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\nnonsense\n"text"\n{"a": "\xff"}\n{"a": \n' + deep + b'\n{"a": 2}')
    assert read(file) == [{"a": 1}, *[UNREADABLE] * 5, {"a": 2}]


@pytest.mark.parametrize("whole", [ROWS, {"data": ROWS}])
def test_json(tmp_path, whole):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(whole), encoding="utf-8")
    assert read(file) == ROWS


def test_json_of_one_row_or_of_lines(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"messages": [1, 2]}), encoding="utf-8")
    assert read(file) == [{"messages": [1, 2]}]
    file.write_text(lines(ROWS), encoding="utf-8")
    assert read(file) == ROWS
    file.write_text("[1, {}]", encoding="utf-8")
    assert read(file) == [UNREADABLE, {}]


def test_csv(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text('prompt,n\n"a, ""b""\nc",1\nx,2,3\n', encoding="utf-8")
    assert read(file) == [{"prompt": 'a, "b"\nc', "n": "1"}, UNREADABLE]


def test_parquet_and_saved_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    data.to_parquet(str(tmp_path / "rows.parquet"))
    data.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"test": data}).save_to_disk(str(tmp_path / "splits"))
    assert read(tmp_path / "rows.parquet") == ROWS
    assert read(tmp_path / "saved") == ROWS
    assert read(tmp_path / "splits", split="test") == ROWS
    with refused("no-such-split", "has no split 'train'", "one of test"):
        read(tmp_path / "splits")


def test_text_files_are_paragraphs(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("one\nline\n\n\n\ntwo\n", encoding="utf-8")
    assert read(file) == [{"text": "one\nline"}, {"text": "two"}]


def test_a_hub_name_is_loaded_by_its_split(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(*arguments, **options):
        asked.append((arguments, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read("owner/set", split="test", name="en") == ROWS
    assert asked == [(("owner/set", "en"), {"split": "test", "streaming": False})]


def test_a_hub_that_does_not_answer_is_named(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load(*arguments, **options):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with refused("no-data", "'owner/set' is not a file here, and the Hub did not provide it: offline"):
        read("owner/set")


def test_globs_and_folders_are_read_in_order(tmp_path):
    for name, row in (("b.jsonl", ROWS[1]), ("a.jsonl", ROWS[0])):
        (tmp_path / name).write_text(lines([row]), encoding="utf-8")
    assert read(tmp_path / "*.jsonl") == read(tmp_path) == ROWS[:2]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.jsonl", "there is no file 'nowhere.jsonl'"),
        ("./folder/x", "there is no file './folder/x'"),
        ("no*.jsonl", "no file matches 'no*.jsonl'"),
        ("empty", "holds no saved dataset and no .jsonl"),
    ],
)
def test_missing_files_are_named(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with refused("no-data", message):
        files_of(Source(path))


def test_sources_as_they_are_written():
    assert parse_sources("a") == (Source("a"),)
    assert parse_sources(["a", {"path": "b", "weight": 0.5, "rows": 3}]) == (Source("a"), Source("b", 0.5, 3))


@pytest.mark.parametrize(
    ("source", "code", "words"),
    [
        ([], "no-source", ["empty list"]),
        ("", "no-source", ["empty text"]),
        (3, "invalid-source", ["a path or a mapping with 'path', not int"]),
        (
            {"file": "a"},
            "invalid-source",
            ["has the keys path, weight, rows, split, name, columns, labels, annotators ", "; found file"],
        ),
        ({"path": "a", "wieght": 2}, "invalid-source", ["found path, wieght"]),
        ({"path": "a", "weight": 0}, "setting-out-of-range", ["weight of a is 0: it must be above 0"]),
        ({"path": "a", "rows": 0}, "setting-out-of-range", ["rows of a is 0: it must be at least 1"]),
    ],
)
def test_wrong_sources_are_refused(source, code, words):
    with refused(code, *words):
        parse_sources(source)


def test_fingerprints_tell_contents_not_names(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    (tmp_path / "b.jsonl").write_text("{}\n")
    first = source_fingerprint(Source(str(tmp_path / "a.jsonl")))
    assert source_fingerprint(Source(str(tmp_path / "b.jsonl"))) == first
    (tmp_path / "b.jsonl").write_text('{"a": 1}\n')
    assert source_fingerprint(Source(str(tmp_path / "b.jsonl"))) != first
