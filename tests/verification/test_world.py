"""The enumerable world: its exact values, its table behind transformers' interface, and modules trained on it."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import fit, quiet_trainer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_lightning.models.layout import padded_layout
from rlhf_lightning.models.loading import LoadSettings
from rlhf_lightning.models.roles import load_policy
from rlhf_lightning.modules import IterativeDPOModule, OnlineDPOModule, PPOModule, XPOModule
from rlhf_lightning.sampling.engines import SamplingSettings
from rlhf_lightning.sampling.slot_engine import sample
from rlhf_lightning.scoring import LearnedScorer
from rlhf_lightning.training.pairs import tilted
from rlhf_lightning.types import PromptBatch, Step
from rlhf_lightning.verification.world import END, EnumerableWorld


@pytest.fixture(scope="module")
def world() -> EnumerableWorld:
    return EnumerableWorld(prompts=2, tokens=3, max_new_tokens=2)


@pytest.fixture(scope="module")
def folder(world: EnumerableWorld, tmp_path_factory: pytest.TempPathFactory) -> str:
    return world.write(tmp_path_factory.mktemp("enumerable") / "policy")


def test_every_completion_is_enumerated(world: EnumerableWorld) -> None:
    assert world.completions == [(1,), (2, 1), (3, 1), (2, 2), (2, 3), (3, 2), (3, 3)]
    assert len(EnumerableWorld().completions) == 1 + 5 + 25 + 125 + 625
    torch.testing.assert_close(world.problem.reference.sum(-1), torch.ones(2, dtype=torch.float64))
    assert world.problem.lengths.tolist() == [[1, 2, 2, 2, 2, 2, 2]] * 2


def test_probabilities_equal_those_of_the_model(world: EnumerableWorld, folder: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for prompt in range(2):
        for index, completion in enumerate(world.completions):
            ids = torch.tensor([[4 + prompt, *completion]])
            logprobs = torch.log_softmax(model(ids).logits[0].double(), -1)
            total = sum(float(logprobs[t, token]) for t, token in enumerate(completion))
            assert math.exp(total) == pytest.approx(float(world.problem.reference[prompt, index]), rel=1e-5)


def test_padding_and_kv_cache_do_not_change_probabilities(world: EnumerableWorld, folder: str) -> None:
    policy = load_policy(folder, LoadSettings(self_check=False))  # the table has no other sequences
    rows = [(p, i) for p in range(2) for i in range(7)]
    logprobs = policy(padded_layout(world.sequences(rows))).logprobs.sum(-1)
    torch.testing.assert_close(logprobs.exp().double(), world.problem.reference.flatten(), rtol=1e-5, atol=1e-7)
    count = 4000
    prompts = [world.prompt_ids(0), torch.cat([torch.zeros(2, dtype=torch.long), world.prompt_ids(0)])]
    drawn = sample(policy, [prompts[i % 2] for i in range(count)], torch.arange(count), SamplingSettings(2), 0, (END,))
    index = {ids: place for place, ids in enumerate(world.completions)}
    counts = torch.bincount(torch.tensor([index[tuple(ids.tolist())] for ids in drawn.ids]), minlength=7)
    expected = world.problem.reference[0] * count
    assert float(((counts - expected) ** 2 / expected).sum()) < 22.5  # chi-squared, 6 degrees of freedom, p = 0.001


def test_the_optimum_is_the_tilted_reference(world: EnumerableWorld) -> None:
    best = tilted(world.problem, 0.5)
    value = world.expected_reward(best) - 0.5 * world.kl(best)
    partition = (world.problem.reference * torch.exp(world.rewards / 0.5)).sum(-1).log().mean() * 0.5
    assert value == pytest.approx(float(partition))
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        other = torch.softmax(best.log() + 0.1 * torch.randn(2, 7, generator=generator, dtype=torch.float64), -1)
        assert world.expected_reward(other) - 0.5 * world.kl(other) < value
    assert world.kl(world.problem.reference) == 0.0


def test_preference_populations_are_weighted_by_label_probability(world: EnumerableWorld) -> None:
    pairs = world.preferences()
    assert len(pairs.weights) == 2 * 7 * 6
    assert float(pairs.weights.mean()) == pytest.approx(1.0)
    chosen, rejected = pairs.sequences.completions[0], pairs.sequences.completions[len(pairs.weights)]
    assert (chosen.tolist(), rejected.tolist()) == ([1], [2, 1])
    odds = float(pairs.weights[0] / (2 - pairs.weights[0]))
    assert math.log(odds) == pytest.approx(float(world.rewards[0, 0] - world.rewards[0, 1]))
    judged = world.judgements()
    assert float(judged.weights.mean()) == pytest.approx(1.0)
    assert float(world.demonstrations(world.problem.reference).weights.sum()) == pytest.approx(14.0)


def test_the_reward_model_gives_the_scores_of_the_table(world: EnumerableWorld, tmp_path: Path) -> None:
    scorer = LearnedScorer(world.write_reward_model(tmp_path / "reward"))
    rows = [(p, i) for p in range(2) for i in range(7)]
    torch.testing.assert_close(scorer.score_sequences(world.sequences(rows)).double(), world.rewards.flatten())
    text = scorer([f"p{p}" for p, i in rows if i < 3], [world.text_of(world.completions[i]) for p, i in rows if i < 3])
    torch.testing.assert_close(torch.as_tensor(text).double(), world.rewards[:, :3].flatten())
    model: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward", dtype=torch.float32)
    assert float(model(torch.tensor([[4, 2, 1, 0]])).logits) == pytest.approx(float(world.rewards[0, 1]))


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_sampled_ppo_converges_close_to_the_optimum(world: EnumerableWorld, folder: str, critic: Any) -> None:
    """Train the whole of PPO on 64 episodes per rollout: sampling, critic, whitening, clipping."""
    beta = 0.5
    module = PPOModule(
        init_from=folder, scorer=world.score, critic=critic, max_new_tokens=2, kl_coef=beta, learning_rate=2e-2,
        adam_eps=1e-8, missing_eos_score=None, value_coef=0.5, ppo_epochs=2, lam=1.0, mini_batch_size=64,
        self_check=False,
    )  # fmt: skip
    steps = [Step((world.questions(64, 128 * i),), 128, 0) for i in range(60)]
    module.trainer = quiet_trainer()
    fit(module, steps)
    reached = world.probabilities(module.policy.model.model.table.weight.detach())
    distance = 0.5 * (reached - tilted(world.problem, beta)).abs().sum(-1)
    assert float(distance.max()) < 0.05, distance


def paired_questions(world: EnumerableWorld, pairs: int, rollout: int) -> PromptBatch:
    """Return every prompt, ``pairs`` times, each with two samples to compare."""
    batch = world.questions(2 * pairs, 4 * pairs * rollout)
    return batch._replace(group=torch.arange(len(batch.prompts)) // 2)


ONE_ROUND = {"rollouts_per_round": 1000}


@pytest.mark.parametrize(
    ("kind", "settings"), [(OnlineDPOModule, {}), (IterativeDPOModule, ONE_ROUND), (XPOModule, {})]
)
def test_sampled_online_preference_methods_converge_close_to_the_optimum(
    world: EnumerableWorld, folder: str, kind: Any, settings: dict[str, Any]
) -> None:
    """Train on 128 pairs per rollout with soft labels: sampling, pairing, the module's own updates."""
    beta = 0.5
    module = kind(
        init_from=folder, scorer=world.score, max_new_tokens=2, beta=beta, soft_labels=True, temperature=1.0,
        learning_rate=5e-2, self_check=False, **settings,
    )  # fmt: skip
    steps = [Step((paired_questions(world, 64, i),), 256, 0) for i in range(80)]
    fit(module, steps)
    reached = world.probabilities(module.policy.model.model.table.weight.detach())
    distance = 0.5 * (reached - tilted(world.problem, beta)).abs().sum(-1)
    assert float(distance.max()) < 0.05, distance


def test_the_teacher_folder_matches_its_table(tmp_path):
    world = EnumerableWorld(prompts=2, tokens=4, max_new_tokens=3, seed=1)
    torch.testing.assert_close(world.problem.teacher, tilted(world.problem, 1.0))
    assert world.expected_reward(world.problem.teacher) > world.expected_reward(world.problem.reference)
    model = load_policy(world.write_teacher(tmp_path / "teacher"))
    rows = [(prompt, index) for prompt in range(2) for index in range(len(world.completions))]
    with torch.no_grad():
        logprobs = model(padded_layout(world.sequences(rows))).logprobs.sum(-1)
    torch.testing.assert_close(logprobs.exp().view(2, -1).double(), world.problem.teacher, atol=1e-5, rtol=0)


def test_the_last_step_label_equals_the_reward():
    world = EnumerableWorld(prompts=2, tokens=3, max_new_tokens=2, seed=1)
    batch = world.judged_steps()
    last = torch.stack([labels[-1] for labels in batch.labels])
    torch.testing.assert_close(torch.logit(last), world.rewards.flatten())
    row = world.completions.index((2, 3))  # its first step is shared with all completions that begin with 2
    alike = [i for i, ids in enumerate(world.completions) if ids[0] == 2]
    torch.testing.assert_close(torch.logit(batch.labels[row][0]), world.rewards[0, alike].mean())
    assert [len(labels) for labels in batch.labels] == [int(flags.sum()) for flags in batch.sequences.supervised]
