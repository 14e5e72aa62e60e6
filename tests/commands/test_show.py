"""Test ``rlhf show``: how every token of a row is used."""

import json

import pytest
from conftest import make_tiny_tokenizer

from rlhf_lightning.cli import main

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "y\u00fc"}]


@pytest.fixture
def folder(tmp_path):
    make_tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def run(capsys, *arguments):
    status = main(["show", *arguments])
    told = capsys.readouterr()
    return status, told.out, told.err


def test_each_token_is_shown_with_its_state(write_rows, folder, capsys):
    status, told, _ = run(capsys, write_rows([{"messages": MESSAGES, "id": 3}]), "--tokenizer", folder)
    assert status == 0
    assert "row 1: sft data; not used: column 'id'" in told
    lines = [line.split(maxsplit=1) for line in told.splitlines() if line.startswith("    ")]
    assert lines[:2] == [["control", "'<|user|>'"], ["seen", repr("\nhi")]]
    assert lines[-2:] == [["learned", "'y\u00fc'"], ["learned", "control '<|end|>'"]]
    assert "1 rows read, 1 kept; not used: column 'id'" in told


def test_truncated_and_dropped_rows_are_shown(write_rows, folder, capsys):
    rows = [{"prompt": "abcdef", "chosen": "stuvwxyz", "rejected": "x"}, {"prompt": "", "chosen": "a", "rejected": "b"}]
    source = write_rows(rows)
    _, told, _ = run(capsys, source, "--tokenizer", folder, "--max_length", "8", "--row", "1")
    assert "prompt, 4 tokens" in told and "chosen, 4 tokens, 4 in the loss" in told and "row 2" not in told
    assert "cut             'a'" in told and "cut             'wxyz<eos>'" in told
    _, told, _ = run(capsys, source, "--tokenizer", folder, "--row", "2")
    assert "row 2: dropped, empty_prompt: the prompt is empty" in told and "row 1" not in told
    status, _, error = run(capsys, source, "--tokenizer", folder, "--row", "9")
    assert status == 1 and "fewer than 9 rows" in error


def test_colours_appear_on_a_terminal_and_in_html(write_rows, folder, capsys, tmp_path, monkeypatch):
    hostile = [{"role": "user", "content": "<b>\x1b[31m</b>"}, MESSAGES[1]]
    source = write_rows([{"messages": hostile}])
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    _, told, _ = run(capsys, source, "--tokenizer", folder)
    assert "\x1b[32my\x1b[0m\x1b[32m\u00fc\x1b[0m" in told and "\\x1b[31m" in told
    _, told, _ = run(capsys, source, "--tokenizer", folder, "--html", str(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text()
    assert told.strip() == f"wrote {tmp_path / 'page.html'}"
    assert "<b>" not in page and "&lt;" in page and '<span class="learned control" title="5">' in page


def test_every_data_format_is_shown(write_rows, folder, capsys):
    pair = {"prompt": MESSAGES[:1], "completions": ["a", "b", "c"], "ranks": [0, 1, 1]}
    _, told, _ = run(capsys, write_rows([pair]), "--tokenizer", folder)
    assert told.count("rank 1, 2 tokens") == 2 and "rank 0" in told
    _, told, _ = run(capsys, write_rows([{"prompt": "p", "completion": "c", "label": 0}]), "--tokenizer", folder)
    assert "undesirable, 2 tokens" in told
    weighted = [MESSAGES[0], {**MESSAGES[1], "weight": 0.5}, *MESSAGES]
    _, told, _ = run(capsys, write_rows([{"messages": weighted}]), "--tokenizer", folder)
    assert "2 rows, one for each trained turn" in told and "tokens, weight 0.5" in told
    _, told, _ = run(capsys, write_rows([{"prompt": "p"}]), "--tokenizer", folder, "--kind", "prompt")
    assert "prompt data" in told and json.dumps("completion") not in told
