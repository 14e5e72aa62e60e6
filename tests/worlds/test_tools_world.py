"""The tool world: its rows, its rewards, its optimum, and policies that learn to call tools."""

import random
from pathlib import Path
from typing import Any

import pytest
from tiny_models import quiet_trainer

from rlhf_lightning.data import PromptDataModule, SFTDataModule
from rlhf_lightning.modules import GRPOModule, PPOModule, SFTModule
from rlhf_lightning.sampling.conversation import Turns
from rlhf_lightning.tokenization import encode_completion, encode_prompt, end_token_ids
from rlhf_lightning.types import MultiTurn
from rlhf_lightning.worlds import tools as world


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.write_world(tmp_path_factory.mktemp("shop"))


def test_the_best_policy_earns_1_and_demonstrations_little() -> None:
    rng, environment, tokenizer = random.Random(1), world.ShopEnvironment(), world.make_tokenizer()
    earned: list[float] = []
    for number in range(100):
        row = world.request(rng)
        (first, one), (second, two) = row["prices"].items()
        turns = Turns(
            MultiTurn(environment, 4), tokenizer, [environment.reset(row)], {"prices": [row["prices"]]}, [number]
        )
        said = [f'call: price(key="{first}")\ncall: price(key="{second}")', f"call: add(a={one}, b={two})"]
        for text in [*said, row["answer"]]:
            turns.replies([0], [[*tokenizer(text).input_ids, end_token_ids(tokenizer)[1]]], [True])
        (transcript,) = turns.transcripts()
        assert transcript.finished and len(transcript.ends) == 3
        assert [turn["content"] for turn in transcript.messages if turn["role"] == "tool"] == [
            str(one), str(two), row["answer"],
        ]  # fmt: skip
        assert world.gold([""], [transcript.messages[-1]["content"]], answer=[row["answer"]]) == [1.0]
        earned.append(world.gold([""], [world.demonstration(rng, row)[-1]["content"]], answer=[row["answer"]])[0])
    assert 0.1 < sum(earned) / 100 < 0.4


def test_every_text_uses_vocabulary_tokens() -> None:
    rng, tokenizer = random.Random(2), world.make_tokenizer()
    for _ in range(50):
        turns = world.demonstration(rng, world.request(rng))
        ids, learned = encode_completion(tokenizer, turns[1:], [turns[0]])
        assert tokenizer.unk_token_id not in [*ids, *encode_prompt(tokenizer, [turns[0]])]
        assert sum(learned) < len(ids) or len(turns) == 2
        said = world.quizzed(rng)
        assert tokenizer.unk_token_id not in tokenizer("".join(turn["content"] for turn in said)).input_ids


def taught(folder: Path) -> str:
    out = folder / "sft"
    if not out.exists():
        module = SFTModule(init_from=str(folder / "model"), from_scratch=True, learning_rate=4e-3, warmup=0.05, seed=0)
        data = SFTDataModule(str(folder / "demonstrations.jsonl"), batch_size=64)
        quiet_trainer(max_epochs=10, limit_val_batches=0).fit(module, data)
        module.export(out)
    return str(out)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [GRPOModule, PPOModule])
def test_policies_learn_to_call_tools(folder: Path, kind: Any) -> None:
    start = taught(folder)
    settings: dict[str, Any] = {"missing_eos_score": None, "ppo_epochs": 2} if kind is PPOModule else {}
    module = kind(
        init_from=start, scorer="rlhf_lightning.worlds.tools.gold", max_new_tokens=16, kl_coef=0.0, learning_rate=1e-3,
        lr_schedule="constant", mini_batch_size=64, seed=0, **settings,
    )  # fmt: skip
    data = PromptDataModule(
        str(folder / "prompts_train.jsonl"), eval_source=str(folder / "prompts_test.jsonl"), rollouts=40,
        batch_size=128, samples_per_prompt=8 if kind is GRPOModule else 1, max_turns=4,
        environment={"class_path": "rlhf_lightning.worlds.tools.ShopEnvironment"},
    )  # fmt: skip
    (before,) = quiet_trainer().validate(module, data, verbose=False)
    quiet_trainer(limit_val_batches=0).fit(module, data)
    (after,) = quiet_trainer().validate(module, data, verbose=False)
    assert sum(weights.numel() for weights in module.policy.parameters()) < 3e6
    assert before["val/score"] < 0.3 < 0.9 < after["val/score"]
