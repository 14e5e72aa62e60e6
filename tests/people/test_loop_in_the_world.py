"""Labels of simulated annotators improve the policy: the shipped loop in the assistant world, at full size."""

import json
from pathlib import Path

import pytest

from rlhf_lightning.cli import main as rlhf
from rlhf_lightning.commands import train
from rlhf_lightning.worlds.assistant import write_world

RECIPES = Path(__file__).resolve().parents[2] / "rlhf_lightning" / "recipes"
DEMONSTRATIONS = 10_000


@pytest.fixture
def world(cache):
    """The quickstart's world and its SFT policy."""
    write_world("world", demonstrations=DEMONSTRATIONS, pairs_train=1, pairs_test=1)
    done = train.run(
        ["fit", "--config", str(RECIPES / "assistant" / "sft.yaml"), "--model.init_from", "world/model",
         "--data.source", "world/demonstrations.jsonl", "--run_name", "sft"]
    )  # fmt: skip
    return str(Path(done.folder) / "model")


@pytest.mark.slow
def test_with_300_labels_dpo_and_ppo_raise_the_gold_reward(world):
    for method in ("dpo", "ppo"):
        flags = {
            "name": method, "rounds": 1, "labels": 300, "init_from": world, "prompts": "world/prompts_train.jsonl",
            "eval_prompts": "world/prompts_test.jsonl",
            "reward_config": RECIPES / "labels" / "reward.yaml",
            "policy_config": RECIPES / "labels" / f"{method}.yaml",
        }  # fmt: skip
        config = str(RECIPES / "labels" / "loop.yaml")
        assert rlhf(["loop", "--config", config, *(f"--{name}={value}" for name, value in flags.items())]) == 0
        steps = json.loads((Path("runs/loop") / method / "state.json").read_text())["steps"]
        before, after = steps["start/evaluate"], steps["round_0/evaluate"]
        assert after["labels"] == 300 and after["gold_reward_ci"][0] > before["gold_reward_ci"][1], method
        assert after["win_rate_ci"][0] > 0.5
