"""Test `rlhf annotate`: sampled or given completions, refusals, and the server from the command line to the export."""

import functools
import json
import socket
import sqlite3
import time
from pathlib import Path

import pytest
import uvicorn
from conftest import refused
from starlette.testclient import TestClient
from tiny_run import rows_of

from rlhf_lightning.cli import main as rlhf
from rlhf_lightning.commands.generate import SamplingArguments
from rlhf_lightning.errors import failure_sentence
from rlhf_lightning.people.annotate import annotate
from rlhf_lightning.people.candidates import given_items, load_policies, sampled_items
from rlhf_lightning.sampling.engines import SamplingSettings
from rlhf_lightning.scoring import LearnedScorer

PROMPTS = [("ab", {"topic": "short"}), ("cde", {}), ([{"role": "user", "content": "hello"}], {})]
SETTINGS = SamplingSettings(max_new_tokens=6, batch_size=4)


def drawn(policies, at_once=2, count=2, skip=lambda prompt: False, settings=SETTINGS):
    batches = sampled_items(policies, PROMPTS, count, settings, 0, at_once, skip)
    return [item for batch in batches for item in batch]


def test_sampled_items_record_prompt_model_and_columns(policy_folder):
    policies = load_policies([policy_folder], SamplingArguments())
    items = drawn(policies)
    assert [item.prompt for item in items] == [prompt for prompt, _ in PROMPTS] and items[0].columns == {
        "topic": "short"
    }
    for item in items:
        first, second = item.candidates
        assert first.completion != second.completion and first.episode != second.episode
        assert (first.model, first.seed, first.sampling["max_new_tokens"]) == (policy_folder, 0, 6)
    assert drawn(policies, at_once=3) == items, "how many prompts are sampled together changes nothing"
    assert [item.prompt for item in drawn(policies, skip=lambda prompt: prompt == "ab")] == ["cde", PROMPTS[2][0]]


def test_two_models_alternate_and_duplicate_answers_are_dropped(policy_folder, plain_folder):
    two = load_policies([policy_folder, plain_folder], SamplingArguments())[:1] * 2
    (item, *_) = drawn([two[0], two[1]._replace(name="other")], count=4)
    assert [one.model for one in item.candidates] == [policy_folder, "other"] * 2
    assert not drawn(two[:1], settings=SamplingSettings(6, temperature=0.0)), "the likeliest answer is one"


def test_given_pairs_are_imported_without_labels(tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "q", "completions": ["x", "y", "z"]},
            {"prompt": "", "chosen": "a", "rejected": "b"}]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = given_items(str(file))
    assert [[one.completion for one in item.candidates] for item in items] == [["a", "b"], ["x", "y", "z"]]
    (tmp_path / "empty.jsonl").write_text("")
    with refused("no-usable-rows", "has nothing to compare (it is empty)"):
        given_items(str(tmp_path / "empty.jsonl"))


@pytest.mark.parametrize("flags", [["--model", "a", "--port", "1", "--model=b"], ["--model", "a", "b", "--port", "1"]])
def test_several_models_can_be_named(flags, monkeypatch):
    named = []

    @functools.wraps(annotate)
    def look(**given):
        named.extend(given["model"])

    monkeypatch.setattr("rlhf_lightning.people.annotate.annotate", look)
    assert rlhf(["annotate", "--store", "feedback.db", *flags]) == 0 and named == ["a", "b"]


def test_annotate_labels_and_exports_end_to_end(policy_folder, monkeypatch, capsys):
    """The server is replaced by a client that labels everything and disconnects."""
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("ab", "cd", "ef")))

    def label_all(server, sockets):
        client = TestClient(server.config.app, base_url="http://localhost:1")
        client.post("/api/enter", json={"name": "ann"})
        told, done = client.get("/api/item").json(), 0
        while told["item"] is not None or told["state"]:
            if told["item"] is not None:
                done += 1
                place = {name: told["item"][name] for name in ("store", "assignment")}
                body = {"key": f"a key of its own {done}", **place}
                client.post("/api/judgements", json={**body, "verdict": "ranking", "ranks": [0, 1], "strength": 4})
            told = client.get("/api/item").json()

    monkeypatch.setattr(uvicorn.Server, "run", label_all)
    flags = ["--store", "feedback.db", "--port", "0", "--max-new-tokens", "6", "--ahead", "2", "--repeats", "0"]
    assert rlhf(["annotate", *flags, "--prompts", "prompts.jsonl", "--model", policy_folder]) == 0
    assert "label at http://127.0.0.1:" in capsys.readouterr().out
    assert rlhf(["annotate", "export", "--store", "feedback.db", "--out", "pairs.jsonl"]) == 0
    assert "3 rows of snapshot 3, fingerprint " in capsys.readouterr().out
    rows = rows_of(Path("pairs.jsonl"))
    assert sorted(row["prompt"] for row in rows) == ["ab", "cd", "ef"]
    assert all((row["preference"], row["margin"], row["models"]) == (1.0, 1.0, [policy_folder] * 2) for row in rows)


def test_items_are_ordered_by_reward_model_uncertainty(reward_folder, monkeypatch, capsys):
    """Items are assigned in the order of the reward model's uncertainty."""
    rows = [{"prompt": f"q {n}", "chosen": "yes" * (n + 1), "rejected": "no" * (5 - n)} for n in range(5)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scorer, doubts = LearnedScorer(reward_folder), {}
    for row in rows:
        first, second = scorer([row["prompt"]] * 2, [row["chosen"], row["rejected"]]).tolist()
        doubts[row["prompt"]] = -abs(first - second)
    seen = []

    def look_through(server, sockets):
        client = TestClient(server.config.app, base_url="http://localhost:1")
        client.post("/api/enter", json={"name": "ann"})
        while (item := client.get("/api/item").json()["item"]) is not None:
            seen.append(item["prompt"][0]["text"])
            body = {"key": f"a key of its own {len(seen)}", "store": item["store"], "assignment": item["assignment"]}
            body["verdict"] = "tie"
            client.post("/api/judgements", json=body)

    monkeypatch.setattr(uvicorn.Server, "run", look_through)
    flags = ["--store", "f.db", "--port", "0", "--pairs", "pairs.jsonl", "--repeats", "0"]
    assert rlhf(["annotate", *flags, "--ensemble", reward_folder, "--select", "uncertainty"]) == 0
    assert seen == sorted(doubts, key=lambda prompt: -doubts[prompt])


def test_the_remaining_count_includes_unsampled_prompts(policy_folder, monkeypatch, capsys):
    """Columns of the file that training ignores are named too."""
    rows = [{"prompt": f"p {n}", "chosen": "a", "margin": 1, "topic": "t"} for n in range(5)]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = []

    def look(server, sockets):
        client = TestClient(server.config.app, base_url="http://localhost:1")
        client.post("/api/enter", json={"name": "ann"})
        while client.get("/api/item").json()["item"] is None:
            time.sleep(0.05)
        time.sleep(0.3)  # for the count, which follows the items
        seen.append(client.get("/api/item").json()["progress"]["left"])

    monkeypatch.setattr(uvicorn.Server, "run", look)
    flags = ["--store", "f.db", "--port", "0", "--max-new-tokens", "6", "--ahead", "1", "--repeats", "0"]
    for _ in range(2):  # the second server finds the samples of the first
        assert rlhf(["annotate", *flags, "--prompts", "prompts.jsonl", "--model", policy_folder]) == 0
    assert seen == [5, 5]
    assert "training on the store leaves out chosen, margin" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--store", "labels.sqlite"], "the store labels.sqlite does not end in .db"),
        (["--store", "f.db", "--prompts", "p.jsonl"], "--prompts and --model go together"),
        (["--store", "f.db", "--host", "0.0.0.0"], "name the annotators (annotators ann,bob)"),
        (["--store", "f.db", "--annotators", "ann,<b>"], "invalid annotator name '<b>'"),
        (["--store", "f.db", "--pairs", "absent.jsonl", "--port", "0"], "there is no file absent.jsonl"),
        (["--store", "f.db", "--port", "0", "--repeats", "1"], "repeats is 1"),
        (["--store", "folder.db", "--port", "0"], "folder.db is a folder, not a feedback store"),
        (["--store", "text.db", "--port", "0"], "text.db is not a feedback store: file is not a database"),
    ],
)
def test_invalid_settings_are_refused(flags, sentence, capsys):
    Path("folder.db").mkdir()
    Path("text.db").write_text("no labels, but a text that is long enough to have a header of its own" * 4)
    assert rlhf(["annotate", *flags]) == 1
    assert sentence in capsys.readouterr().err


def test_a_port_in_use_is_refused(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert rlhf(["annotate", "--store", "f.db", "--port", str(taken.getsockname()[1])]) == 1
    assert "name another --port" in capsys.readouterr().err


def test_links_are_printed_for_each_annotator(monkeypatch, capsys):
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: None)
    assert rlhf(["annotate", "--store", "f.db", "--annotators", "ann,bob", "--port", "0"]) == 0
    told = capsys.readouterr().out
    tokens = json.loads(Path("f.db.tokens").read_text())
    assert all(f"/enter?token={tokens[name]}" in told for name in ("ann", "bob", "owner"))


def test_a_missing_pairs_file_leaves_no_store(tmp_path, capsys):
    store = tmp_path / "feedback.db"
    assert rlhf(["annotate", "--store", str(store), "--pairs", str(tmp_path / "absent.jsonl"), "--port", "0"]) == 1
    assert "absent.jsonl" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_read_only_store_is_reported_in_one_sentence():
    sentence = failure_sentence(sqlite3.OperationalError("attempt to write a readonly database"))
    assert sentence is not None and sentence.startswith("the feedback store cannot be read or written (attempt to")


@pytest.mark.parametrize(("content", "code"), [(None, "no-file"), (b"\xff\xfe\x00", "not-text")])
def test_unreadable_instructions_leave_no_store(content: bytes | None, code: str, tmp_path: Path) -> None:
    if content is not None:
        Path("guide.md").write_bytes(content)
    with refused(code, "guide.md", "Markdown file"):
        annotate("feedback.db", instructions="guide.md", port=0)
    assert not Path("feedback.db").exists()
