"""Every example row of docs/data.md is read, or dropped for the reason given on the page."""

import json
import re
from pathlib import Path

import pytest

from rlhf_lightning.cli import main
from rlhf_lightning.data.canonical import RowRefused
from rlhf_lightning.data.formats import KINDS, demonstration, kind_of, read_row
from rlhf_lightning.data.tokenizing import encoder_for
from rlhf_lightning.worlds.assistant import write_world

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r'^```(?:json|text) title="(\w+)"\n(.*?)^```', PAGE, re.DOTALL | re.MULTILINE)
ROWS = [(kind, json.loads(line)) for kind, text in BLOCKS if kind in KINDS for line in text.splitlines()]
DROPPED = [json.loads(line) for kind, text in BLOCKS if kind == "dropped" for line in text.splitlines()]


@pytest.mark.parametrize(("kind", "row"), ROWS)
def test_example_rows_are_read(kind, row, tiny_tokenizer):
    assert read_row(row, KINDS[kind].read).prompt is not None or "text" in row
    if kind != "prompt" and "chosen" not in row:
        assert kind_of(row, "the page") == kind
    (outcome,) = encoder_for(kind).outcomes(tiny_tokenizer, [row])
    needs_more = {"tool_calls_left_out", "thought_left_out"}  # these need another template than this tokenizer's
    assert outcome.encoded or outcome.reason in needs_more, outcome.reason


@pytest.mark.parametrize("example", DROPPED)
def test_example_rows_are_dropped(example):
    with pytest.raises(RowRefused) as refusal:
        read_row(example["row"], demonstration)
    assert refusal.value.code == example["reason"]


def test_every_format_has_an_example_row():
    for kind, (_, forms) in KINDS.items():
        if kind != "prompt":
            shown = [row for named, row in ROWS if named == kind]
            assert all(any(set(form) <= set(row) for row in shown) for form in forms if "label" not in form[:2]), kind


def test_the_page_shows_what_rlhf_show_prints(tmp_path, monkeypatch, capsys):
    write_world(tmp_path / "world")
    monkeypatch.chdir(tmp_path)
    ((_, first), *_) = ROWS
    (tmp_path / "rows.jsonl").write_text(json.dumps(first) + "\n", encoding="utf-8")
    assert main(["show", "rows.jsonl", "--tokenizer", "world/model", "--row", "1"]) == 0
    (wanted,) = (text for kind, text in BLOCKS if kind == "show")
    assert capsys.readouterr().out.strip() == wanted.strip()
