"""Test import and export of Argilla and Label Studio records, and their round trip."""

import json
from pathlib import Path

import pytest
from conftest import refused

from rlhf_lightning.cli import main as rlhf
from rlhf_lightning.data.feedback.bridges import read_record, records_of
from rlhf_lightning.data.feedback.database import NO_LIMIT, judgements_of, reading
from rlhf_lightning.data.feedback.records import Answer, Candidate, Item

from .conftest import label, pair, prefer, ranked_item

ARGILLA = {
    "id": "r1", "status": "completed", "_server_id": "a", "vectors": {}, "suggestions": {},
    "metadata": {"topic": "sums"},
    "fields": {"instruction": "What is 2+2?", "response-1": "4", "response-2": "5"},
    "responses": {
        "preference": [
            {"value": "response-1", "user_id": "4f5e-ann"},
            {"value": "response-2", "user_id": "bob", "status": "draft"},
            {"value": "tie", "user_id": "cid"},
            {"value": None, "user_id": "dan", "status": "discarded"},
        ],
        "comment": [{"value": "easy", "user_id": "4f5e-ann"}],
    },
}  # fmt: skip
TASK = {
    "id": 7,
    "data": {"prompt": "What is 2+2?", "answer1": "4", "answer2": "5", "source": "web"},
    "annotations": [
        {"completed_by": {"email": "ann@lab"}, "lead_time": 6.5, "was_cancelled": False,
         "result": [{"type": "pairwise", "from_name": "pw", "to_name": "a,b", "value": {"selected": "left"}}]},
        {"completed_by": 3, "was_cancelled": False,
         "result": [{"type": "choices", "value": {"choices": ["Both bad"]}},
                    {"type": "textarea", "value": {"text": ["hm"]}}]},
        {"completed_by": 4, "was_cancelled": True, "result": []},
    ],
}  # fmt: skip


def test_argilla_records_are_read():
    item, answers = read_record(ARGILLA, "argilla")
    assert item.prompt == "What is 2+2?" and [one.text for one in item.candidates] == ["4", "5"]
    assert item.columns == {"topic": "sums"}
    assert answers == [("4f5e-ann", Answer("ranking", (0, 1))), ("cid", Answer("tie")), ("dan", Answer("skip"))]


def test_argilla_rankings_and_chats_are_read():
    turns = [{"role": "user", "content": "hello"}]
    ranking = [{"value": "b", "rank": 1}, {"value": "a", "rank": 2}, {"value": "c", "rank": 2}]
    record = {"fields": {"chat": turns, "a": "x", "b": "y", "c": "z"},
              "responses": {"rank": [{"value": ranking, "user_id": None}]}}  # fmt: skip
    item, answers = read_record(record, "argilla", completions=["a", "b", "c"])
    assert item.prompt == turns and answers == [("unknown", Answer("ranking", (1, 0, 1)))]


def test_label_studio_tasks_are_read():
    item, answers = read_record(TASK, "label-studio")
    assert item.columns == {"source": "web"} and item.candidates[1].text == "5"
    assert answers == [("ann@lab", Answer("ranking", (0, 1), seconds=6.5)), ("3", Answer("both_bad")),
                       ("4", Answer("skip"))]  # fmt: skip
    ranked = {"data": {"text": "q", "out_1": "a", "out_2": "b", "out_10": "c"}, "annotations": [
        {"completed_by": 1, "result": [{"type": "ranker", "value": {"ranker": {"rank": ["out_10", "out_1", "out_2"]}}}]}
    ]}  # fmt: skip
    item, answers = read_record(ranked, "label-studio", prompt="text")
    assert [one.text for one in item.candidates] == ["a", "b", "c"]
    assert answers == [("1", Answer("ranking", (1, 2, 0)))]


@pytest.mark.parametrize(
    ("record", "code"),
    [
        (5, "not-a-record"), ({"data": {}}, "not-a-record"), ({"fields": []}, "not-a-record"),
        ({"fields": {"prompt": "x"}}, "no-such-field"),
        ({"fields": {"a": "x", "b_1": "y", "b_2": "z"}}, "no-such-field"),
        ({"fields": {"prompt": "", "b_1": "y", "b_2": "z"}}, "unreadable-record"),
        ({"fields": {"prompt": "x", "b_1": 5, "b_2": "z"}}, "unreadable-record"),
        ({"fields": {"prompt": "x", "b_1": "y", "b_2": "z"}, "responses": [1]}, "unreadable-answer"),
        ({"fields": {"prompt": "x", "b_1": "y", "b_2": "z"}, "responses": {"q": [1]}}, "unreadable-answer"),
        ({"fields": {"prompt": "x", "b_1": "y", "b_2": "z"}, "metadata": [1]}, "not-a-record"),
        ({"fields": {"prompt": "x", "b_1": "y", "b_2": "z", "c": json.loads("[" * 600 + "]" * 600)}}, "not-a-record"),
        ({"fields": {"prompt": "x", "b_1": "\ud800", "b_2": "z"}}, "unreadable-record"),
        ({"fields": {"prompt": "x", "b_1": "y", "b_2": "z"}, "metadata": {"\udfff": 1}}, "unreadable-record"),
        ({"fields": {"1" * 200_000 + "x": "y"}}, "no-such-field"),
    ],
)  # fmt: skip
def test_invalid_records_are_refused(record, code):
    with refused(code):
        read_record(record, "argilla")


@pytest.mark.parametrize(
    "value",
    [[{"value": [1], "rank": 1}], [{"value": {}, "rank": 1}, {"value": "b_2", "rank": 2}],
     [{"value": "b_1", "rank": float("nan")}, {"value": "b_2", "rank": 2}], [{"value": "b_1"}, {"value": "b_2"}],
     [{"value": "b_1", "rank": "1"}, {"value": "b_2", "rank": 2}], {"a": 1}, 7, True, [None], [[]], "<script>"],
)  # fmt: skip
def test_malformed_answers_are_skipped(value):
    fields = {"prompt": "x", "b_1": "y", "b_2": "z"}
    assert (
        read_record({"fields": fields, "responses": {"q": [{"value": value, "user_id": {}}]}}, "argilla").answers == []
    )
    result = [{"value": {"ranker": {"r": value}}}, {"value": {"choices": value}}, {"value": value}, 7]
    assert read_record({"data": fields, "annotations": [{"result": result}]}, "label-studio").answers == []


def test_arbitrarily_large_ranks_are_ordered():
    fields, ranks = {"prompt": "x", "b_1": "y", "b_2": "z"}, {"b_1": 10**400, "b_2": -(10**400)}
    value = [{"value": name, "rank": rank} for name, rank in ranks.items()]
    read = read_record({"fields": fields, "responses": {"q": [{"value": value, "user_id": "ann"}]}}, "argilla")
    assert read.answers == [("ann", Answer("ranking", (1, 0)))]


@pytest.mark.parametrize("tool", ["argilla", "label-studio"])
def test_a_store_survives_export_and_import(make_store, tool, tmp_path):
    chat = Item([{"role": "user", "content": "hello"}], (Candidate("a"), Candidate("b")))
    store = make_store([pair(0), pair(1), ranked_item(2), chat], annotators=2)
    for name, place in (("ann", 0), ("bob", 1)):
        for _ in range(2):
            label(store, name, prefer(place))
        label(store, name, lambda asked: Answer("ranking", tuple(place // 2 for place in range(len(asked.shown)))))
        label(store, name, Answer("tie" if name == "ann" else "skip"))
    with reading(store.path) as connection:
        judged, records = judgements_of(connection), records_of(connection, tool, NO_LIMIT)
    other = make_store(0, name="other.db")
    for record in json.loads(json.dumps(records)):
        one = read_record(record, tool)
        assert other.take_over(*one) == len(one.answers) and other.take_over(*one) == 0
    with reading(other.path) as connection:
        back = judgements_of(connection)
        again = records_of(connection, tool, NO_LIMIT)

    def told(many):
        """Return judgements with the index of their item among judged items, because store numbers have gaps."""
        places = {number: place for place, number in enumerate(sorted({one.item for one in many}))}
        return sorted((one.annotator, places[one.item], one.verdict, one.ranks) for one in many)

    assert told(back) == told(judged)
    if tool == "argilla":
        assert [one["fields"] for one in again] == [one["fields"] for one in records]


def test_import_and_export_commands_convert_records(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("records.json").write_text(json.dumps([ARGILLA, {"fields": {}}, ARGILLA]))
    command = ["annotate", "import", "--store", "f.db", "--records", "records.json", "--tool", "argilla"]
    assert rlhf(command) == 0
    said = capsys.readouterr().out
    assert "2 items, 3 of 6 judgements are new" in said and "left out 1 records" in said
    assert rlhf(command) == 0 and "0 of 6" in capsys.readouterr().out
    export = ["annotate", "export", "--store", "f.db", "--kind", "label-studio"]
    assert rlhf([*export, "--out", "tasks.json"]) == 0
    (task,) = json.loads(Path("tasks.json").read_text())
    assert task["data"] == {"topic": "sums", "prompt": "What is 2+2?", "completion_1": "4", "completion_2": "5"}
    assert rlhf([*export, "--out", "tasks.jsonl"]) == 1
    assert rlhf(["annotate", "export", "--store", "f.db", "--out", "pairs.jsonl"]) == 0
    (row,) = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    assert row["chosen"] == "4" and row["preference"] == 0.75
    Path("records.json").write_text("{")
    assert rlhf(command) == 1
