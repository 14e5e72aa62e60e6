"""Test `rlhf critique`: its demonstrations train unchanged, a killed run gives the same rows, counts,
one-line errors.
"""

import json
from pathlib import Path

import pytest
from tiny_run import rows_of

from rlhf_lightning.cli import main as rlhf
from rlhf_lightning.constitution.principles import load_constitution
from rlhf_lightning.data import SFTDataModule
from rlhf_lightning.scoring.judges import LocalWriter
from rlhf_lightning.tokenization import load_tokenizer

CONSTITUTION = {
    "name": "own", "version": 2, "language": "en",
    "revising": [{"id": name, "critique": f"Bad {name}?", "revision": f"Mend {name}."} for name in "xy"],
}  # fmt: skip
PROMPTS = [{"prompt": [{"role": "user", "content": f"question {number}"}]} for number in range(5)]


@pytest.fixture
def given(policy_folder):
    Path("own.yaml").write_text(json.dumps(CONSTITUTION))
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return ["critique", "--model", policy_folder, "--prompts", "prompts.jsonl", "--constitution", "own.yaml",
            "--max-new-tokens", "8", "--rounds", "3", "--keep-unfinished"]  # fmt: skip


def test_critique_writes_revised_demonstrations(given, policy_folder, cache, capsys):
    assert rlhf([*given, "--out", "out/revised.jsonl"]) == 0
    rows, report = rows_of(Path("out/revised.jsonl")), json.loads(Path("out/revised.report.json").read_text())
    assert rows and report["rows"] == len(rows) == sum(one["kept"] for one in report["rounds"])
    rules = load_constitution("own.yaml")
    names = {"prompt", "completion", "principle", "round", "parent", "critique", "model", "constitution"}
    for row in rows:
        assert set(row) == names and row["prompt"] in [one["prompt"] for one in PROMPTS]
        assert row["model"] == policy_folder and row["constitution"] == rules.fingerprint
        assert row["principle"] in "xy" and row["round"] in (1, 2, 3) and row["critique"]
        assert row["completion"].split() != row["parent"].split() and row["completion"].strip()
    by_place = {(json.dumps(row["prompt"]), row["round"]): row for row in rows}
    for (prompt, turn), row in by_place.items():
        if (prompt, turn - 1) in by_place:
            assert row["parent"] == by_place[prompt, turn - 1]["completion"]
    assert report["constitution"] == rules.fingerprint and report["constitution_name"] == "own v2"
    assert report["prompts"] == 5 and report["sampling"]["max_new_tokens"] == 8
    told = capsys.readouterr().out
    assert f"{len(rows):,} rows by own v2" in told and "| round | revisions | kept |" in told
    data = SFTDataModule("out/revised.jsonl")
    data.tokenizer = load_tokenizer(policy_folder)
    data.prepare_data()
    data.setup("fit")
    assert data.report.read == data.report.kept == len(rows)


def test_mix_last_keeps_one_row_and_without_critique_writes_none(given):
    assert rlhf([*given, "--out", "last.jsonl", "--mix", "last", "--without-critique"]) == 0
    rows, report = rows_of(Path("last.jsonl")), json.loads(Path("last.report.json").read_text())
    assert len(rows) == report["revised_prompts"] <= 5 and report["critique"] is False
    assert all(row["critique"] is None for row in rows)
    assert len({json.dumps(row["prompt"]) for row in rows}) == len(rows)


def test_a_killed_run_resumes_where_it_stopped(given, monkeypatch, capsys):
    flags = [*given, "--batch-size", "1"]
    monkeypatch.setattr("rlhf_lightning.commands.generate.CHUNKS_AT_ONCE", 2)
    assert rlhf([*flags, "--out", "whole.jsonl"]) == 0
    calls, call = [], LocalWriter.__call__

    def killed(self, prompts, episodes):
        calls.append(len(prompts))
        if len(calls) == 10:
            raise RuntimeError("killed")
        return call(self, prompts, episodes)

    monkeypatch.setattr(LocalWriter, "__call__", killed)
    with pytest.raises(RuntimeError, match="killed"):
        rlhf([*flags, "--out", "parts.jsonl"])
    assert not Path("parts.jsonl").exists()
    assert rlhf([*flags, "--out", "parts.jsonl", "--temperature", "0.5"]) == 1
    assert "belongs to an interrupted run with another sampling" in capsys.readouterr().err
    assert rlhf([*flags, "--out", "parts.jsonl"]) == 0
    assert "parts.jsonl.partial: resuming after 2 of 5 prompts" in capsys.readouterr().out
    assert Path("parts.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert sorted(path.name for path in Path().glob("parts*")) == ["parts.jsonl", "parts.report.json"]


def test_rows_are_equal_for_equal_seeds_only(given):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert rlhf([*given, "--out", f"{name}.jsonl", "--seed", str(seed), "--rounds", "1"]) == 0
    read = [Path(f"{name}.jsonl").read_bytes() for name in "abc"]
    assert read[0] == read[1] != read[2]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--rounds", "0"], "rounds is 0: it must be between 1 and 31"),
        (["--batch-size", "0"], "batch_size is 0"),
        (["--server-model", "big"], "server_model and api_key apply only to a server"),
        (["--model", "http://127.0.0.1:1"], "a server needs server_model"),
        (["--constitution", "no.yaml"], "there is no constitution 'no.yaml'"),
        (["--prompts", "no.jsonl"], "there is no file no.jsonl"),
        (["--max-new-tokens", "512"], "max_new_tokens is 512: lower it"),
    ],
)
def test_invalid_settings_are_refused(given, flags, sentence, capsys):
    assert rlhf([*given, "--out", "revised.jsonl", *flags]) == 1
    assert sentence in capsys.readouterr().err and not Path("revised.jsonl").exists()
