import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused
from tiny_models import (
    EOS,
    FIRST_WORD,
    LastGradients,
    MetricsLog,
    StepData,
    demonstration_step,
    evaluate,
    fit,
    plain_logprobs,
    prompt_step,
    quiet_trainer,
    random_rows,
    save_reward_model,
    sequences,
    weights_of,
    within,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_lightning.models import scalar_head
from rlhf_lightning.models.lora import LoraSettings
from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.scoring.scorer import Judgements
from rlhf_lightning.tokenization.facts import Facts
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.types import Loss, PolicyLogprobs, PromptBatch, Rollout

PROMPTS = [prompt for prompt, _ in random_rows(8, seed=61)]


def low_words(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    """Score by the fraction of words with a number below 60; any two completions of a rollout have different scores."""
    words = [[int(word[1:]) for word in text.split() if word.startswith("w")] for text in completions]
    return [sum(w < 60 for w in many) / max(len(many), 1) for many in words]


def nothing(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    return [0.0] * len(completions)


class KeepingModule(PPOModule):
    """Records its rollouts."""

    def collect(self, *batches: PromptBatch) -> Rollout:
        found = super().collect(*batches)
        self.__dict__.setdefault("kept", []).append(found)
        return found


def ppo(folder: str, scorer: Any = low_words, kind: type[PPOModule] = KeepingModule, **settings: Any) -> Any:
    defaults: dict[str, Any] = {
        "max_new_tokens": 6,
        "learning_rate": 1e-3,
        "lr_schedule": "constant",
        "missing_eos_score": None,
        "ppo_epochs": 1,
    }
    return kind(init_from=folder, scorer=scorer, **defaults | settings)


def rollouts(count: int, size: int = 8) -> list[Any]:
    return [prompt_step(PROMPTS[:size], first_episode=size * index) for index in range(count)]


@pytest.fixture
def many_ends(monkeypatch: pytest.MonkeyPatch) -> tuple[int, ...]:
    """Make a twelfth of all tokens end a completion."""
    ends = (EOS, *range(20, 28))
    monkeypatch.setattr(Facts, "ends", ends)
    return ends


# -- whole updates against plain PyTorch ------------------------------------------------------------------------------


def plain_values(critic: Any, prompt: list[int], completion: list[int]) -> Tensor:
    hidden = critic.model(torch.tensor([prompt + completion])).last_hidden_state[0]
    return critic.score(hidden)[len(prompt) - 1 : -1, 0]


@pytest.mark.parametrize("micro", [1, 3, None])
def test_updates_equal_plain_pytorch_for_any_micro_batches(
    policy_folder: str, reward_folder: str, micro: int | None, many_ends: tuple[int, ...]
) -> None:
    module = ppo(
        policy_folder, critic_init=reward_folder, ppo_epochs=2, temperature=0.7, kl_coef=0.3, value_coef=0.4,
        entropy_coef=0.05, lam=0.9, gamma=0.97, learning_rate=1e-2, adam_eps=1e-3, missing_eos_score=-1.0,
        max_grad_norm=0.5,
    )  # fmt: skip
    logged = MetricsLog()
    fit(module, within(rollouts(2), micro), callbacks=[logged])

    policy, reference = (AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float32) for _ in range(2))
    critic = AutoModelForSequenceClassification.from_pretrained(reward_folder, dtype=torch.float32)
    trained = [*policy.parameters(), *critic.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, eps=1e-3, weight_decay=0.0)
    for rollout, row in zip(module.kept, logged.rows, strict=True):
        pairs = list(zip(PROMPTS, [c.tolist() for c in rollout.sequences.completions], strict=True))
        with torch.no_grad():
            old = [plain_logprobs(policy, *pair, 0.7) for pair in pairs]
            base = [plain_logprobs(reference, *pair, 0.7) for pair in pairs]
            values = [plain_values(critic, *pair) for pair in pairs]
        texts = [" ".join(f"w{i}" for i in c if i >= FIRST_WORD and i not in many_ends) for _, c in pairs]
        scores = [s if c[-1] in many_ends else -1.0 for s, (_, c) in zip(low_words(0, texts), pairs, strict=True)]
        kl = [float((o - b).sum()) for o, b in zip(old, base, strict=True)]
        assert row["rollout/kl"] == pytest.approx(sum(kl) / 8, abs=1e-4)
        assert row["rollout/score"] == pytest.approx(sum(scores) / 8, abs=1e-6)
        assert -1.0 in scores and max(scores) > 0
        advantages, returns = [], []
        for o, b, v, score in zip(old, base, values, scores, strict=True):
            rewards = (-0.3 * (o - b)).tolist()
            rewards[-1] += score
            found, following, value_after = [0.0] * len(rewards), 0.0, 0.0
            for t in reversed(range(len(rewards))):
                delta = rewards[t] + 0.97 * value_after - float(v[t])
                following = found[t] = delta + 0.97 * 0.9 * following
                value_after = float(v[t])
            advantages.append(torch.tensor(found))
            returns.append(torch.tensor(found) + v)
        every = torch.cat(advantages)
        mean, spread = every.mean(), torch.sqrt(every.var(correction=0) + 1e-8)
        for _ in range(2):
            total = torch.zeros(())
            for i, (prompt, completion) in enumerate(pairs):
                logits = policy(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / 0.7
                distribution = torch.distributions.Categorical(logits=logits)
                ratio = (distribution.log_prob(torch.tensor(completion)) - old[i]).exp()
                advantage = (advantages[i] - mean) / spread
                total = total + torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2)).sum()
                total = total - 0.05 * distribution.entropy().sum()
                now = plain_values(critic, prompt, completion)
                near = values[i] + (now - values[i]).clamp(-0.2, 0.2)
                total = total + 0.4 * 0.5 * torch.maximum((now - returns[i]) ** 2, (near - returns[i]) ** 2).sum()
            optimizer.zero_grad()
            (total / len(every)).backward()
            torch.nn.utils.clip_grad_norm_(trained, 0.5)
            optimizer.step()
    assert logged.rows[1]["train/clip_fraction"] > 0.02 and logged.rows[1]["train/value_clip_fraction"] > 0.02
    assert abs(logged.rows[1]["rollout/kl"]) > 0.05
    found = [*module.policy.model.parameters(), *module.critic.model.parameters()]
    for parameter, expected in zip(found, trained, strict=True):
        torch.testing.assert_close(parameter, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("lora", [None, LoraSettings(r=4)])
def test_at_the_first_update_the_ratio_is_1_and_the_kl_0(policy_folder: str, lora: LoraSettings | None) -> None:
    logged = MetricsLog()
    fit(ppo(policy_folder, temperature=0.7, lora=lora), within(rollouts(1), 3), callbacks=[logged])
    first = logged.rows[0]
    assert first["train/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert first["train/approx_kl"] < 1e-10
    assert first["train/clip_fraction"] == 0.0
    assert first["rollout/kl"] == pytest.approx(0.0, abs=1e-6)
    assert first["train/policy_loss"] == pytest.approx(0.0, abs=1e-5)  # minus the mean of whitened advantages


# -- rewards and advantages -------------------------------------------------------------------------------------------


def worked_rollout(values: list[float], more: int = 0) -> Rollout:
    """The hand-computed episode of three tokens, and an episode of one token."""
    mask = torch.tensor([[True, True, True], [True, False, False]])
    rows = len(mask)
    second = [0.5, *([0.25] if more else [])]
    return Rollout(
        sequences=sequences([([7], [8, 9, EOS]), ([7], [8])]),
        completion_mask=mask,
        old_logprobs=torch.tensor([[-1.0, -0.5, -2.0], [-3.0, 0.0, 0.0]]),
        reference_logprobs=torch.tensor([[-1.2, -0.4, -2.05], [-3.0, 0.0, 0.0]]),
        values=torch.tensor([values, [*second, *[0.0] * (len(values) - len(second))]]),
        scores=torch.tensor([1.0, 2.0]),
        finished=torch.tensor([True, False]),
        group=torch.arange(rows),
    )


def unloaded(**settings: Any) -> PPOModule:
    module = PPOModule(init_from="unread", scorer=nothing, kl_coef=0.05, **settings)
    module.trainer = quiet_trainer()
    return module


def test_rewards_and_advantages_by_hand() -> None:
    module, rollout = unloaded(whiten_advantages=False), worked_rollout([0.3, 0.4, 0.6])
    rewards = module.shape_rewards(rollout)
    torch.testing.assert_close(rewards, torch.tensor([[-0.01, 0.005, 0.9975], [2.0, 0.0, 0.0]]))
    advantages, returns = module.advantages(rollout, rewards)[:2]
    torch.testing.assert_close(advantages, torch.tensor([[0.64349375, 0.582625, 0.3975], [1.5, 0.0, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[0.94349375, 0.982625, 0.9975], [2.0, 0.0, 0.0]]))


def test_after_eos_puts_the_score_on_its_own_position() -> None:
    module = unloaded(whiten_advantages=False, reward_slot="after_eos")
    rollout = worked_rollout([0.3, 0.4, 0.6, 0.8], more=1)
    rewards = module.shape_rewards(rollout)
    torch.testing.assert_close(rewards, torch.tensor([[-0.01, 0.005, -0.0025, 1.0], [0.0, 2.0, 0.0, 0.0]]))
    advantages, returns = module.advantages(rollout, rewards)[:2]
    # One advantage per token, and one more value target.
    alone = 0.0 + 0.25 - 0.5 + 0.95 * (2.0 - 0.25)
    torch.testing.assert_close(advantages, torch.tensor([[0.63446875, 0.573125, 0.3875], [alone, 0.0, 0.0]]))
    expected = torch.tensor([[0.93446875, 0.973125, 0.9875, 1.0], [alone + 0.5, 2.0, 0.0, 0.0]])
    torch.testing.assert_close(returns, expected)


def test_whitening_is_over_rollout_tokens_and_keeps_returns() -> None:
    rollout = worked_rollout([0.3, 0.4, 0.6])
    tensors = {name: part for name, part in rollout._asdict().items() if isinstance(part, torch.Tensor)}
    rollout = rollout._replace(**{name: part[:1] for name, part in tensors.items()})
    module = unloaded()
    advantages, returns = module.advantages(rollout, module.shape_rewards(rollout))[:2]
    whitened = torch.tensor([[0.97779841, 0.39593487, -1.37373328]])
    torch.testing.assert_close(advantages, whitened, atol=1e-4, rtol=0)
    torch.testing.assert_close(returns, torch.tensor([[0.94349375, 0.982625, 0.9975]]))
    rewards = unloaded(whiten_rewards=True).shape_rewards(rollout)
    torch.testing.assert_close(rewards, torch.tensor([[-0.39212234, -0.36030522, 1.74492755]]), atol=1e-5, rtol=0)


def test_judgements_are_shaped_before_the_missing_eos_rule(policy_folder: str, many_ends: tuple[int, ...]) -> None:
    class Halved(PPOModule):
        def shape_judgements(self, judged: Judgements) -> Judgements:
            return judged._replace(scores=judged.scores / 2)

    module = ppo(
        policy_folder, lambda prompts, completions, **columns: [5.0] * len(completions), Halved, missing_eos_score=-1.0
    )
    ended: list[Rollout] = []
    module.on_rollout_end = lambda rollout, means: ended.append(rollout)  # type: ignore[method-assign,assignment]
    fit(module, rollouts(1))
    assert set(ended[0].scores[ended[0].finished].tolist()) == {2.5}
    assert set(ended[0].scores[~ended[0].finished].tolist()) == {-1.0}


@pytest.mark.parametrize(
    ("settings", "unfinished"),
    [({}, 5.0), ({"missing_eos_score": -1.0}, -1.0), ({"missing_eos_penalty": 2.0}, 3.0)],
)
def test_unfinished_completions_get_the_missing_eos_score_or_penalty(
    policy_folder: str, many_ends: tuple[int, ...], settings: dict[str, float], unfinished: float
) -> None:
    module = ppo(policy_folder, lambda prompts, completions, **columns: [5.0] * len(completions), **settings)
    fit(module, rollouts(1))
    (rollout,) = module.kept
    ended = torch.tensor([int(ids[-1]) in many_ends for ids in rollout.sequences.completions])
    assert 0 < int(ended.sum()) < 8
    assert torch.equal(rollout.finished, ended)
    assert torch.equal(rollout.scores, torch.where(ended, 5.0, unfinished))


# -- minibatches ------------------------------------------------------------------------------------------------------


class OrderedModule(PPOModule):
    """Trains nothing and records the order of the rows."""

    def learn_minibatch(self, rollout: Rollout, advantages: Any, rows: list[int], *_: Any) -> float:
        self.__dict__.setdefault("order", []).append(rows)
        return 0.0


def order_of(folder: str, steps: list[Any], **settings: Any) -> list[list[int]]:
    module = ppo(folder, kind=OrderedModule, **settings)
    fit(module, steps)
    return module.order


@pytest.mark.parametrize("first_episode", [0, 1000])
def test_the_minibatches_of_an_epoch_are_a_permutation_of_the_episodes(policy_folder: str, first_episode: int) -> None:
    steps = [prompt_step(PROMPTS, first_episode), prompt_step(PROMPTS[:5], first_episode + 8)]
    order = order_of(policy_folder, steps, ppo_epochs=2, mini_batch_size=3)
    assert [len(rows) for rows in order] == [3, 3, 2, 3, 3, 2, 3, 2, 3, 2]
    epochs = [[row for rows in order[a:b] for row in rows] for a, b in ((0, 3), (3, 6), (6, 8), (8, 10))]
    assert [sorted(rows) for rows in epochs] == [list(range(8))] * 2 + [list(range(5))] * 2
    assert len({tuple(rows) for rows in epochs}) == 4
    assert order_of(policy_folder, steps, ppo_epochs=2, mini_batch_size=3) == order
    assert order_of(policy_folder, steps, ppo_epochs=2, mini_batch_size=3, seed=1) != order


@pytest.mark.parametrize(("limit", "updates"), [(1e-5, 2), (1e3, 8), (None, 8)])
def test_early_stop_kl_ends_the_epochs_of_a_rollout(policy_folder: str, limit: float | None, updates: int) -> None:
    module = ppo(policy_folder, ppo_epochs=4, mini_batch_size=4, early_stop_kl=limit, learning_rate=1e-2)
    fit(module, rollouts(1))
    assert module.updates == updates  # only the second minibatch sees a changed policy
    assert module.rollouts == 1 and module.episodes == 8


# -- KL control -------------------------------------------------------------------------------------------------------


def test_the_kl_coefficient_is_adapted_to_its_target(policy_folder: str) -> None:
    module = ppo(policy_folder, kl_coef=0.2, kl_target=0.5, kl_horizon=100, learning_rate=1e-2, ppo_epochs=2)
    logged = MetricsLog()
    fit(module, rollouts(4), callbacks=[logged])
    coefficients = [*logged.column("train/kl_coef"), module.kl_coef]
    kls = logged.column("rollout/kl")
    assert coefficients[0] == pytest.approx(0.2) and kls[0] == pytest.approx(0, abs=1e-6) and kls[-1] > 0.5
    for before, kl, after in zip(coefficients, kls, coefficients[1:], strict=False):
        error = max(-0.2, min(0.2, kl / 0.5 - 1))
        assert after == pytest.approx(before * (1 + error * 8 / 100), rel=1e-5)
    fixed = ppo(policy_folder, kl_coef=0.2)
    fit(fixed, rollouts(2))
    assert fixed.kl_coef == 0.2


# -- what it learns ---------------------------------------------------------------------------------------------------


def test_a_rewarded_token_becomes_frequent(policy_folder: str) -> None:
    def share(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
        return [text.split().count("w50") / 6 for text in completions]

    module = ppo(policy_folder, share, kl_coef=0.0, learning_rate=1e-2, ppo_epochs=4, mini_batch_size=32)
    logged = MetricsLog()
    steps = [prompt_step(PROMPTS * 8, first_episode=64 * index) for index in range(7)]
    fit(module, steps, callbacks=[logged])
    scores = logged.column("rollout/score")
    assert scores[0] < 0.01 and scores[-1] > 0.15


def test_the_sign_of_entropy_coef_raises_or_lowers_entropy(policy_folder: str) -> None:
    found = {}
    for coef in (0.1, -0.1):
        logged = MetricsLog()
        module = ppo(policy_folder, nothing, kl_coef=0.0, entropy_coef=coef, learning_rate=3e-3, ppo_epochs=2)
        fit(module, rollouts(3), callbacks=[logged])
        found[coef] = logged.column("rollout/entropy")
    assert found[0.1][0] == pytest.approx(found[-0.1][0], abs=1e-6)
    assert found[0.1][-1] > found[0.1][0] + 0.1
    assert found[-0.1][-1] < found[-0.1][0] - 0.1


@pytest.mark.parametrize("micro", [None, 2])
def test_the_pretraining_term_is_the_weighted_mean_nll(policy_folder: str, micro: int | None) -> None:
    """Scores and KL are 0 and the critic starts at 0, so that nothing else has a gradient."""
    rows = random_rows(5, seed=70)
    (mixed,) = demonstration_step(rows).micro_batches
    module = ppo(policy_folder, nothing, pretraining_coef=3.0, max_grad_norm=None)
    kept, logged = LastGradients(), MetricsLog()
    fit(module, within([prompt_step(PROMPTS, pretraining=mixed)], micro), callbacks=[kept, logged])
    plain = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float32)
    mean = -torch.cat([plain_logprobs(plain, *row) for row in rows]).mean()
    (3.0 * mean).backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(kept.gradients[f"policy.model.{name}"], parameter.grad, atol=2e-5, rtol=1e-4)
    assert logged.rows[0]["train/pretraining_loss"] == pytest.approx(mean.item(), rel=1e-5)


# -- the critic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slot", ["end", "after_eos"])
@pytest.mark.parametrize("value_clip", [0.2, None])
def test_a_shared_critic_starts_at_zero_and_learns_the_rewards_to_go(
    policy_folder: str, slot: str, value_clip: float | None
) -> None:
    module = ppo(
        policy_folder, critic="shared", lam=1.0, kl_coef=0.0, value_coef=0.5, reward_slot=slot, max_grad_norm=None,
        value_clip=value_clip,
    )  # fmt: skip
    kept, logged = LastGradients(), MetricsLog()
    fit(module, within(rollouts(1), 3), callbacks=[kept, logged])
    (rollout,) = module.kept
    assert module.critic is None
    assert rollout.values is not None and rollout.values.abs().sum() == 0
    tokens = rollout.completion_mask.sum(-1)
    states = tokens + (slot == "after_eos")
    assert rollout.values.shape[1] == int(states.max())
    # With V = 0 every return is the score: the value loss is half its square, its slope in the bias minus the score.
    half_squares = float((states * rollout.scores**2).sum()) / 2
    assert logged.rows[0]["train/value_loss"] == pytest.approx(half_squares / float(states.sum()), rel=1e-4)
    slope = -0.5 * float((states * rollout.scores).sum()) / float(states.sum())
    assert float(kept.gradients["policy.value_head.bias"]) == pytest.approx(slope, rel=1e-4)
    assert logged.rows[0]["rollout/value"] == 0.0
    assert not any(name.startswith("critic") for name in weights_of(module))


def test_a_separate_critic_shares_no_weight_with_the_policy(policy_folder: str) -> None:
    module = ppo(policy_folder, lora=LoraSettings(r=4))
    module.configure_model()
    before = weights_of(module)
    assert {name.split(".")[0] for name in before} == {"policy", "critic"}
    fit(module, rollouts(2))
    after = weights_of(module)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("critic.model.model") for name in moved) and "critic.model.score.weight" in moved
    assert all("lora_" in name for name in moved if name.startswith("policy"))
    assert any(name.startswith("policy") for name in moved)


def test_a_critic_from_the_reward_model_predicts_the_score_at_the_last_state(
    policy_folder: str, tmp_path: Path
) -> None:
    folder = save_reward_model(tmp_path / "reward", score_bias=0.75)
    module = ppo(policy_folder, folder, reward_slot="after_eos")
    logged = MetricsLog()
    fit(module, rollouts(1), callbacks=[logged])
    (rollout,) = module.kept
    assert rollout.values is not None
    last = rollout.completion_mask.sum(-1, keepdim=True)
    torch.testing.assert_close(rollout.values.gather(-1, last).squeeze(-1), rollout.scores, atol=1e-5, rtol=1e-5)
    plain = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        ids = torch.tensor([PROMPTS[0] + rollout.sequences.completions[0].tolist()])
        assert float(rollout.scores[0]) == pytest.approx(plain(ids).logits.item() - 0.75, abs=1e-5)


def test_a_policy_from_scratch_can_use_a_trained_critic(policy_folder: str, reward_folder: str) -> None:
    module = ppo(policy_folder, reward_folder, from_scratch=True, seed=3)
    fit(module, rollouts(1), max_steps=1, max_epochs=-1)
    (rollout,) = module.kept
    assert rollout.reference_logprobs is not None
    assert torch.equal(rollout.old_logprobs, rollout.reference_logprobs)  # the same draw for both
    other = ppo(policy_folder, reward_folder, from_scratch=True, seed=3)
    other.configure_model()
    plain = AutoModelForSequenceClassification.from_pretrained(reward_folder, dtype=torch.float32)
    assert torch.equal(other.critic.model.score.weight, plain.score.weight)


def test_a_policy_from_an_adapter_gets_a_critic_on_the_same_trunk(policy_folder: str, tmp_path: Path) -> None:
    first = ppo(policy_folder, lora=LoraSettings(r=4), learning_rate=5e-2)
    fit(first, rollouts(2))
    folder = str(first.export(tmp_path / "adapter"))
    module = ppo(folder, lora=LoraSettings(r=4))
    logged = MetricsLog()
    fit(module, rollouts(1), callbacks=[logged])
    assert logged.rows[0]["rollout/kl"] == pytest.approx(0.0, abs=1e-6)
    assert logged.rows[0]["rollout/value"] == 0.0


# -- rollouts ---------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_run_for_any_micro_batches(policy_folder: str) -> None:
    found = []
    for slots, limits in ((None, {}), (5, {"micro_batch_size": 3}), (None, {"max_tokens": 40})):
        module = ppo(policy_folder, adam_eps=1e-3, ppo_epochs=2, mini_batch_size=5, sampling_batch_size=slots)
        fit(module, within(rollouts(2), **limits))
        completions = [[ids.tolist() for ids in rollout.sequences.completions] for rollout in module.kept]
        found.append((completions, weights_of(module)))
    for completions, weights in found[1:]:
        assert completions == found[0][0]
        for name, weight in weights.items():
            torch.testing.assert_close(weight, found[0][1][name], atol=2e-5, rtol=0)
    assert found[0][0][0] != found[0][0][1]


def test_the_scorer_sees_prompts_texts_and_columns(policy_folder: str, many_ends: tuple[int, ...]) -> None:
    calls: list[tuple[Any, Any, Any]] = []

    def scorer(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        calls.append((prompts, completions, columns))
        return [0.0] * len(completions)

    module = ppo(policy_folder, scorer)
    texts = [[{"role": "user", "content": f"number {index}"}] for index in range(3)]
    fit(module, [prompt_step(PROMPTS[:3], texts=texts, answer=["a", "b", "c"])])
    ((prompts, completions, columns),) = calls
    assert prompts == texts and columns == {"answer": ["a", "b", "c"]}
    for text, ids in zip(completions, module.kept[0].sequences.completions, strict=True):
        assert text == " ".join(f"w{i}" for i in ids.tolist() if i >= FIRST_WORD and i not in many_ends)


@pytest.mark.parametrize(
    ("returned", "code", "words"),
    [
        ([1.0], "number-of-scores", "1 scores for 8 completions"),
        ([1.0, math.nan] + [0.0] * 6, "not-finite", "nan for completion 1; 1 of 8"),
        ([math.inf] * 8, "not-finite", "inf for completion 0; 8 of 8"),
        (None, "not-numbers", "None"),
    ],
)
def test_invalid_scorer_results_are_refused(policy_folder: str, returned: Any, code: str, words: str) -> None:
    module = ppo(policy_folder, lambda prompts, completions, **columns: returned)
    with refused(code, words):
        fit(module, rollouts(1))


def test_validation_draws_its_own_samples_and_changes_no_state(policy_folder: str) -> None:
    module = ppo(policy_folder)
    step = prompt_step(PROMPTS)
    first = evaluate(module, [step])
    assert evaluate(module, [step]) == first
    held_out = module.kept[0]
    assert (module.updates, module.rollouts, module.episodes) == (0, 0, 0)
    assert first["val/kl"] == pytest.approx(0.0, abs=1e-6)
    assert first["val/score"] == pytest.approx(float(held_out.scores.mean()), abs=1e-6)
    assert first["val/score_std"] == pytest.approx(float(held_out.scores.double().std(correction=0)), abs=1e-5)
    assert first["val/completion_length"] == float(held_out.completion_mask.sum(-1).double().mean())
    fit(module, [step])
    drawn = [[ids.tolist() for ids in rollout.sequences.completions] for rollout in (held_out, module.kept[-1])]
    assert drawn[0] != drawn[1]


def test_counters_and_rollout_metrics_by_hand(policy_folder: str, many_ends: tuple[int, ...]) -> None:
    module = ppo(policy_folder, ppo_epochs=3, mini_batch_size=3)
    logged = MetricsLog()
    fit(module, rollouts(2), callbacks=[logged])
    lengths = [int(rollout.completion_mask.sum()) for rollout in module.kept]
    assert (module.updates, module.rollouts, module.episodes, module.tokens) == (18, 2, 16, sum(lengths))
    for row, rollout, length in zip(logged.rows, module.kept, lengths, strict=True):
        assert row["rollout/completion_length"] == pytest.approx(length / 8)
        assert row["rollout/eos_rate"] == pytest.approx(float(rollout.finished.float().mean()))
        assert row["rollout/score_std"] == pytest.approx(float(rollout.scores.double().std(correction=0)), abs=1e-5)
    assert logged.rows[1]["rollout/reward"] == pytest.approx(
        logged.rows[1]["rollout/score"] - 0.05 * logged.rows[1]["rollout/kl"], abs=1e-5
    )


class ShortAnswersModule(PPOModule):
    """A custom objective: each token has a cost, and the policy loss is plain REINFORCE."""

    def shape_rewards(self, rollout: Rollout) -> Tensor:
        return super().shape_rewards(rollout) - 0.2 * rollout.completion_mask

    def policy_loss(self, logprobs: PolicyLogprobs) -> Loss:
        return Loss(-logprobs.advantages * logprobs.logprobs, {"surprise": -logprobs.logprobs})


def test_a_custom_ppo_objective_trains(policy_folder: str, many_ends: tuple[int, ...]) -> None:
    module = ppo(policy_folder, nothing, kind=ShortAnswersModule, kl_coef=0.0, learning_rate=1e-2, ppo_epochs=2)
    logged = MetricsLog()
    fit(module, [prompt_step(PROMPTS * 4, first_episode=32 * i) for i in range(6)], callbacks=[logged])
    lengths = logged.column("rollout/completion_length")
    assert lengths[-1] < 0.6 * lengths[0]
    assert logged.rows[0]["rollout/reward"] == pytest.approx(-0.2 * lengths[0], abs=1e-4)
    assert logged.rows[0]["train/surprise"] > 1.0


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"temperature": 0.0}, "setting-out-of-range"),
        ({"critic": "none"}, "unknown-critic"),
        ({"critic": "adapter"}, "adapter-critic-without-lora"),
        ({"reward_slot": "start"}, "unknown-reward-slot"),
        ({"missing_eos_score": -1.0, "missing_eos_penalty": 1.0}, "conflicting-settings"),
    ],
)
def test_conflicting_settings_are_refused_at_construction(settings: dict[str, Any], code: str) -> None:
    with refused(code, *settings):
        PPOModule(init_from="unread", scorer=nothing, **settings)


def test_predictions_include_logprobs(policy_folder: str) -> None:
    module = ppo(policy_folder, temperature=0.7)
    rows = quiet_trainer().predict(module, StepData([], [prompt_step(PROMPTS[:2], texts=["a", "b"])]))
    assert rows is not None and [row["prompt"] for row in rows[0]] == ["a", "b"]
    for row, prompt in zip(rows[0], PROMPTS, strict=False):
        ids = [int(word[1:]) for word in row["completion"].split()]
        if len(ids) == 6:  # only words, so the text determines the ids
            with torch.no_grad():
                expected = float(plain_logprobs(module.policy.model, prompt, ids, 0.7).sum())
            assert row["logprob"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("asked", [True, False])
def test_prompts_are_packed_only_if_every_model_supports_it(
    policy_folder: str, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    """A critic of another architecture than the policy's may need its own layout."""
    module = ppo(policy_folder, pack_rows=asked)
    assert not module.packs_rows  # nothing is loaded, so nothing is known
    module.configure_model()
    assert module.packs_rows == asked
    monkeypatch.setattr(scalar_head, "reads_trees", lambda _: False)
    module = ppo(policy_folder, pack_rows=asked)
    module.configure_model()
    assert not module.packs_rows


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_a_shared_trunk_is_forwarded_for_values_even_with_reused_logprobs(policy_folder: str, critic: Any) -> None:
    found = []
    for reuse in (False, True):
        module = ppo(policy_folder, critic=critic, reuse_behaviour_logprobs=reuse, learning_rate=1e-2, adam_eps=1e-3)
        forwards: list[bool] = []
        outputs = module.policy_outputs
        module.policy_outputs = lambda *args, f=forwards, o=outputs, **kwargs: (
            f.append(torch.is_grad_enabled()) or o(*args, **kwargs)
        )
        fit(module, rollouts(2))
        assert forwards.count(True) == 2
        assert forwards.count(False) == (0 if reuse and critic == "separate" else 2)
        found.append(weights_of(module))
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, rtol=1e-3, atol=1e-4)


class WithoutRowsModule(KeepingModule):
    """Its policy and value losses are NaN; each minibatch belongs to a rank without rows."""

    def policy_loss(self, logprobs: PolicyLogprobs) -> Loss:
        return Loss(logprobs.logprobs * math.nan)

    def value_loss(self, values: Any) -> Loss:
        return Loss(values.values * math.nan)

    def learn_minibatch(self, rollout: Rollout, advantages: Any, rows: list[int], *_: Any) -> float:
        nothing = self._loss_of_nothing(partial(self.token_loss_sum, rollout, advantages), Meter())
        nothing.backward()
        gradients = [weight.grad for weight in self.parameters() if weight.requires_grad]
        self.__dict__["seen"] = (float(nothing.detach()), gradients)
        return 0.0


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_a_rank_without_rows_adds_zero_gradient_even_with_nan_losses(policy_folder: str, critic: str) -> None:
    module = ppo(policy_folder, kind=WithoutRowsModule, critic=critic)
    fit(module, rollouts(1))
    loss, gradients = module.seen
    assert loss == 0 and len(gradients) > 4
    assert all(gradient is not None and not bool(gradient.any()) for gradient in gradients)
