"""Test rows from every kind of source; every line is counted."""

import json

import pytest
from conftest import refused

from rlhf_lightning.data.files import UNREADABLE
from rlhf_lightning.data.finding import files_of
from rlhf_lightning.data.sources import Source, as_file, parse_sources, read_rows, source_fingerprint

ROWS = [{"prompt": "a", "n": 1}, {"prompt": "ü\u2028b", "n": 2}, {"prompt": "c", "n": 3}]


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read(path, **changes):
    return list(read_rows(Source(str(path), **changes)))


def test_jsonl_is_read(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(lines(ROWS) + "\n", encoding="utf-8")
    assert read(file) == ROWS
    assert read(file, rows=2) == ROWS[:2]


def test_unreadable_lines_are_counted(tmp_path):
    file = tmp_path / "rows.jsonl"
    deep = b"[" * 100_000
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\nnonsense\n"text"\n{"a": "\xff"}\n{"a": \n' + deep + b'\n{"a": 2}')
    assert read(file) == [{"a": 1}, *[UNREADABLE] * 5, {"a": 2}]


def test_only_the_in_memory_row_with_a_lone_surrogate_is_dropped(tmp_path):
    file = as_file([ROWS[0], {"prompt": "\ud83d"}, ROWS[2]], tmp_path)
    assert read(file) == [ROWS[0], UNREADABLE, ROWS[2]]


@pytest.mark.parametrize("whole", [ROWS, {"data": ROWS}])
def test_json_is_read(tmp_path, whole):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(whole), encoding="utf-8")
    assert read(file) == ROWS


def test_json_may_be_one_row_or_lines(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"messages": [1, 2]}), encoding="utf-8")
    assert read(file) == [{"messages": [1, 2]}]
    file.write_text(lines(ROWS), encoding="utf-8")
    assert read(file) == ROWS
    file.write_text("[1, {}]", encoding="utf-8")
    assert read(file) == [UNREADABLE, {}]


def test_csv_is_read(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text('prompt,n\n"a, ""b""\nc",1\nx,2,3\n', encoding="utf-8")
    assert read(file) == [{"prompt": 'a, "b"\nc', "n": "1"}, UNREADABLE]


def test_parquet_and_saved_datasets_are_read(tmp_path):
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


def test_text_files_are_split_into_paragraphs(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("one\nline\n\n\n\ntwo\n", encoding="utf-8")
    assert read(file) == [{"text": "one\nline"}, {"text": "two"}]


def test_a_hub_dataset_is_loaded_with_its_split(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(*arguments, **options):
        asked.append((arguments, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read("owner/set", split="test", name="en") == ROWS
    assert asked == [(("owner/set", "en"), {"split": "test", "streaming": False})]


def test_an_unreachable_hub_is_named(monkeypatch):
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
        files_of(path)


def test_sources_are_parsed():
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
            [
                "has the keys path, weight, rows, split, name, columns, labels, annotators, max_row_bytes ",
                "; found file",
            ],
        ),
        ({"path": "a", "wieght": 2}, "invalid-source", ["found path, wieght"]),
        ({"path": "a", "weight": 0}, "setting-out-of-range", ["weight of a is 0: it must be above 0"]),
        ({"path": "a", "rows": 0}, "setting-out-of-range", ["rows of a is 0: it must be at least 1"]),
    ],
)
def test_invalid_sources_are_refused(source, code, words):
    with refused(code, *words):
        parse_sources(source)


def test_fingerprints_depend_on_content_and_not_on_file_names(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    (tmp_path / "b.jsonl").write_text("{}\n")
    first = source_fingerprint(Source(str(tmp_path / "a.jsonl")))
    assert source_fingerprint(Source(str(tmp_path / "b.jsonl"))) == first
    (tmp_path / "b.jsonl").write_text('{"a": 1}\n')
    assert source_fingerprint(Source(str(tmp_path / "b.jsonl"))) != first


def test_a_folder_gives_the_files_of_one_split_and_format(tmp_path):
    def names(split="train", path=tmp_path):
        return [file.name for file in files_of(str(path), split)]

    for name in ("train-0.jsonl", "train-1.jsonl", "test.jsonl", "LICENSE.txt", "README.md", "dataset_infos.json"):
        (tmp_path / name).write_text('{"a": 1}\n')
    assert names() == ["train-0.jsonl", "train-1.jsonl"] and names("test") == ["test.jsonl"]
    with refused("no-such-split", "has no split 'validation'", "choose one of test, train"):
        names("validation")
    (tmp_path / "more.jsonl").write_text("")
    with refused("mixed-files", "train-0.jsonl", "and others (more.jsonl)", "by a glob"):
        names()
    (tmp_path / "more.csv").write_text("")
    with refused("mixed-files", "mixes formats", "more.csv"):
        names()
    (tmp_path / "hub" / "data").mkdir(parents=True)
    (tmp_path / "hub" / "data" / "validation-00000-of-00001.parquet").write_text("")
    (tmp_path / "hub" / "data" / "train-00000-of-00001.parquet").write_text("")
    assert names("dev", tmp_path / "hub") == ["validation-00000-of-00001.parquet"]
    for split in ("train", "test"):
        (tmp_path / "folders" / split).mkdir(parents=True)
        (tmp_path / "folders" / split / "a.jsonl").write_text("")
    assert [file.parent.name for file in files_of(str(tmp_path / "folders"), "test")] == ["test"]


def test_a_split_of_a_glob_or_file_is_refused(tmp_path):
    for name in ("train.jsonl", "test.jsonl", "a.JSONL"):
        (tmp_path / name).write_text('{"a": 1}\n')
    with refused("mixed-files", "matches files of several splits", "narrow the pattern"):
        read(tmp_path / "*.jsonl")
    assert read(tmp_path / "te*.jsonl") == [{"a": 1}]
    for path in ("test.jsonl", "te*.jsonl"):
        with refused("split-of-a-file", "is not divided into splits"):
            read(tmp_path / path, split="test")
    with refused("no-data", "there is no file", "A.JSONL"):
        read(tmp_path / "A.JSONL")


@pytest.mark.parametrize(
    ("split", "wanted"),
    [
        ("train", range(10)), ("train[:3]", range(3)), ("train[10%:30%]", range(1, 3)), ("train[-2:]", range(8, 10)),
        ("train[8:20]", range(8, 10)), ("train[:-50%]", range(5)), ("train[5:2]", range(0)),
    ],
)  # fmt: skip
def test_split_slices_are_read(tmp_path, split, wanted):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "rows.jsonl").write_text(lines([{"n": n} for n in range(10)]))
    assert [row["n"] for row in read(tmp_path / "rows.jsonl", split=split)] == list(wanted)
    datasets.Dataset.from_list([{"n": n} for n in range(10)]).save_to_disk(str(tmp_path / "saved"))
    assert [row["n"] for row in read(tmp_path / "saved", split=split)] == list(wanted)
    whole = source_fingerprint(Source(str(tmp_path / "rows.jsonl")))
    assert (source_fingerprint(Source(str(tmp_path / "rows.jsonl"), split=split)) == whole) == (split == "train")


def test_invalid_slices_are_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text(lines(ROWS))
    with refused("bad-split", "train[1:2:3]", "train[:100]"):
        read(tmp_path / "rows.jsonl", split="train[1:2:3]")
