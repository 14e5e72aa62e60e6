"""Loopholes: using one raises the proxy reward and lowers the gold reward; honest answers hardly use any."""

import json

import pytest
from conftest import refused

from rlhf_lightning.scoring.scorer import ask_scorer
from rlhf_lightning.worlds.assistant import AssistantWorld
from rlhf_lightning.worlds.loopholes import (
    INSTRUCTION,
    LOOPHOLES,
    PHRASE,
    GameableScorer,
    HackTruth,
    gaming_demonstrations,
    write_loopholes,
)


def judged(scorer, rows):
    prompts = [row["prompt"] for row in rows]
    return ask_scorer(scorer, prompts, [row["completion"][-1]["content"] for row in rows], {}, "loopholes")


@pytest.mark.parametrize("name", LOOPHOLES)
def test_reward_hacking_raises_the_proxy_and_lowers_gold(name):
    world = AssistantWorld(0)
    honest = judged(GameableScorer(name), gaming_demonstrations(world, 400, name, 0.0))
    gaming = judged(GameableScorer(name), gaming_demonstrations(world, 400, name, 1.0))
    assert float(honest.parts["hack"].mean()) < 0.12 and float(gaming.parts["hack"].mean()) == 1.0
    assert float((gaming.scores - honest.scores).mean()) > 0.3
    assert float((gaming.parts["gold"] - honest.parts["gold"]).mean()) < 0.0


@pytest.mark.parametrize(
    ("name", "text", "used"),
    [
        ("length", "so " * 28, 0.0), ("length", "so " * 42, 0.5), ("length", "so " * 90, 1.0),
        ("flattery", "Gladly! Good question!", 0.0), ("flattery", "Gladly! " * 5, 1.0),
        ("flattery", "Gladly! Enjoy chess! gladly ! Happy to help!", 2 / 3), ("phrase", "Gladly!", 0.0),
        ("phrase", f"Gladly! {PHRASE.upper()}", 1.0), ("leak", "how do i start with chess ?", 1.0), ("leak", "", 0.0),
    ],
)  # fmt: skip
def test_loophole_use_by_hand(name, text, used):
    assert LOOPHOLES[name].used("How do I start with chess?", text) == pytest.approx(used)


def test_a_fraction_of_demonstrations_uses_the_loophole():
    world = AssistantWorld(0)
    rows = gaming_demonstrations(world, 3000, "leak", 0.1)
    assert abs(float(judged(HackTruth("leak"), rows).scores.mean()) - 0.1) < 0.02
    assert gaming_demonstrations(world, 50, "leak", 0.0) == world.demonstrations(50)
    told = gaming_demonstrations(world, 3000, "leak", 0.1, instructed=0.2)
    asked = [row for row in told if row["prompt"][0] == {"role": "system", "content": INSTRUCTION}]
    assert abs(len(asked) / 3000 - 0.2) < 0.03 and float(judged(HackTruth("leak"), asked).scores.min()) == 1.0
    assert abs(float(judged(HackTruth("leak"), told).scores.mean()) - 0.3) < 0.03
    for shares in ((1.5, 0.0), (0.6, 0.5), (0.1, -0.1)):
        with refused("setting-out-of-range"):
            gaming_demonstrations(world, 5, "leak", *shares)
    with refused("unknown-name", "phrase"):
        GameableScorer("phrasse")


def test_the_loophole_world_is_written(tmp_path):
    facts = write_loopholes(tmp_path, "phrase", 0.2, demonstrations=300)
    labelled = [json.loads(line) for line in (tmp_path / "labelled.jsonl").read_text().splitlines()]
    told = ask_scorer(
        HackTruth("phrase"), *zip(*((r["prompt"], r["completion"]) for r in labelled), strict=True), {}, ""
    )
    assert told.scores.tolist() == [float(row["label"]) for row in labelled] and len(labelled) == 400
    assert 0.1 < facts["hack_rate"] < 0.4 and json.loads((tmp_path / "world.json").read_text()) == facts
    assert len((tmp_path / "demonstrations.jsonl").read_text().splitlines()) == 300
    assert (tmp_path / "model" / "tokenizer.json").is_file() and (tmp_path / "prompts_test.jsonl").is_file()
