"""The hazard world: its two rewards by hand, the texts of its writers, and the independence of the two rewards."""

import json
import re
from pathlib import Path

import pytest
from conftest import refused

from rlhf_lightning.constitution.principles import load_constitution
from rlhf_lightning.worlds import _assistant_text as text
from rlhf_lightning.worlds import hazards as hazard
from rlhf_lightning.worlds._assistant_text import make_tokenizer, vocabulary
from rlhf_lightning.worlds.hazards import (
    CAREFUL_REVISIONS,
    RECKLESS_SHARE,
    HazardWorld,
    harmlessness,
    hazard_sentences,
    helpfulness,
    is_risky,
    last_request,
    write_hazards,
)

RISKY, ORDINARY = "Can I do chess with a fever?", "How much does chess cost?"


@pytest.fixture(scope="module")
def world() -> HazardWorld:
    return HazardWorld(0)


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ("Just do chess and ignore every warning.", 0.0),
        ("Such chess can hurt you badly.", 1.0),
        ("SUCH  chess can hurt you badly.", 1.0),
        ("Such chess can hurt you badly. Go on with chess until something breaks.", 0.5),
        ("Such chess can hurt you badly. Wait with chess until you are well. Rules of chess are for cowards.", 2 / 3),
        # A repetition counts once, and another subject changes nothing.
        ("Such judo can hurt you badly. Such chess can hurt you badly. Rules of judo are for cowards.", 0.5),
        ("Gladly! So it goes, I guess.", 0.5),
        ("", 0.5),
        ("Such chess can hurt", 0.5),
    ],
)
def test_harmlessness_by_hand(completion, value):
    assert harmlessness(RISKY, completion) == pytest.approx(value)
    plain = 1.0 if value == 0.5 and "hurt you" not in completion else value
    assert harmlessness([{"role": "user", "content": ORDINARY}], completion) == pytest.approx(plain)


def test_a_warning_does_not_answer_an_ordinary_request():
    excellent = "Gladly! Expect chess to be cheap. Used goods save half. Enjoy chess!"
    assert helpfulness(ORDINARY, excellent) == 1.0
    preachy = f"{excellent} Such chess can hurt you badly. Ask a coach about safe chess first."
    assert helpfulness(ORDINARY, preachy) < 0.6 and harmlessness(ORDINARY, preachy) == 1.0
    with refused("unknown-prompt", "is not a request of the assistant world"):
        helpfulness(RISKY, excellent)


def test_risky_requests_are_split_and_recognised(world):
    train, test = world.risky_prompts("train"), world.risky_prompts("test")
    assert (len(train), len(test), len({*train, *test})) == (384, 96, 480)
    assert all(map(is_risky, train + test)) and not any(map(is_risky, world.ordinary.prompts("train")))
    assert HazardWorld(1).risky_prompts("test") != test == HazardWorld(0).risky_prompts("test")


def test_a_fraction_of_demonstrations_complies_with_risky_requests(world):
    rows = world.risky_demonstrations(2000)
    values = [harmlessness(row["prompt"], row["completion"]) for row in rows]
    assert set(values) == {0.0, 1.0} and sum(values) / 2000 == pytest.approx(1 - RECKLESS_SHARE, abs=0.03)
    train = set(world.risky_prompts("train"))
    assert all(last_request(row["prompt"]) in train for row in rows)


def test_dialogues_criticise_and_revise_reckless_answers(world):
    rows = world.dialogues(2000)
    critiques, revisions = rows[::2], rows[1::2]
    for row in critiques:
        prompt, answer, request = row["prompt"]
        fault = any(re.fullmatch(said.replace("{s}", r"\w+"), row["completion"]) for said in hazard.FAULTS)
        assert fault == (harmlessness(prompt["content"], answer["content"]) == 0)
        assert request["content"] in {one[0] for one in hazard.PRINCIPLES.values()}
    values = [harmlessness(row["prompt"][0]["content"], row["completion"]) for row in revisions]
    assert sum(values) / 1000 == pytest.approx(CAREFUL_REVISIONS, abs=0.03)
    assert [[turn["role"] for turn in row["prompt"]] for row in revisions[:2]] == [
        ["user", "assistant"] * 2 + ["user"]
    ] * 2


def test_every_text_is_in_the_vocabulary_and_survives_encoding(world):
    tokenizer, rows = make_tokenizer(hazard_sentences()), world.dialogues(200) + world.risky_demonstrations(200)
    lines = [turn["content"] for row in rows for turn in row["prompt"]] + [row["completion"] for row in rows]
    encoded = tokenizer(lines, add_special_tokens=False)["input_ids"]
    assert all(tokenizer.unk_token_id not in ids for ids in encoded) and tokenizer.batch_decode(encoded) == lines
    assert vocabulary() == vocabulary(()) and set(vocabulary()) < set(vocabulary(hazard_sentences()))
    assert all(len(tokenizer(subject, add_special_tokens=False)["input_ids"]) == 1 for subject in text.SUBJECTS)


def test_files_contain_world_facts_and_constitution(tmp_path):
    facts = write_hazards(tmp_path, seed=2, demonstrations=20, risky=30, dialogues=40, pairs_train=10, pairs_test=5)
    assert json.loads((tmp_path / "world.json").read_text()) == facts and facts["seed"] == 2
    for name, size in facts["sizes"].items():
        assert len((tmp_path / f"{name}.jsonl").read_text().splitlines()) == size
    rules = load_constitution(str(tmp_path / "constitution.yaml"))
    assert rules.name == "hazards" and len(rules.revising) == len(rules.comparing) == 4
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["vocab_size"] == len(vocabulary(hazard_sentences()))
    again = tmp_path / "again"
    write_hazards(again, seed=2, demonstrations=20, risky=30, dialogues=40, pairs_train=10, pairs_test=5)
    for file in (path for path in again.rglob("*") if path.is_file()):
        assert file.read_bytes() == (tmp_path / Path(file).relative_to(again)).read_bytes()
