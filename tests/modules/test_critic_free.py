"""Test the critic-free family: worked advantages and losses, gradients for every split, sampling in several rounds."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from conftest import refused
from tiny_models import (
    MetricsLog,
    assert_same,
    fit,
    gradients_of_step,
    plain_logprobs,
    prompt_step,
    quiet_trainer,
    random_rows,
    weights_of,
    within,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_lightning import modules, tokenization
from rlhf_lightning.modules import CriticFreeModule
from rlhf_lightning.tokenization.facts import Facts
from rlhf_lightning.training.invariants import Invariants
from rlhf_lightning.training.returned_loss import as_loss
from rlhf_lightning.types import Advantages, Aggregation, PolicyLogprobs, PromptBatch, Rollout, Sequences, Step

PROMPTS = [prompt for prompt, _ in random_rows(4, seed=81)]
GROUPED = [prompt for prompt in PROMPTS for _ in range(2)]
NAMES = [
    "CISPOModule", "CriticFreeModule", "DAPOModule", "DrGRPOModule", "GRPOModule", "GSPOModule", "LitePPOModule",
    "RLOOModule", "ReMaxModule", "ReinforcePlusPlusBaselineModule", "ReinforcePlusPlusModule",
]  # fmt: skip


def low_words(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    words = [[int(word[1:]) for word in text.split() if word.startswith("w")] for text in completions]
    return [sum(w < 60 for w in many) / max(len(many), 1) for many in words]


def module_of(name: str, folder: str = "nowhere", **settings: Any) -> CriticFreeModule:
    defaults: dict[str, Any] = {"max_new_tokens": 6, "learning_rate": 1e-3, "lr_schedule": "constant"}
    module = getattr(modules, name)(init_from=folder, scorer=low_words, **defaults | settings)
    module.trainer = quiet_trainer()
    return module


def grouped(step: Step[PromptBatch], size: int = 2) -> Step[PromptBatch]:
    batch = step.micro_batches[0]
    group = torch.arange(len(batch.prompts)) // size
    return step._replace(micro_batches=(batch._replace(group=group),))


def rollout_of(scores: list[float], group: list[int], length: int = 3, greedy: float | None = None) -> Rollout:
    rows = len(scores)
    mask = torch.ones(rows, length, dtype=torch.bool)
    grid = torch.full((rows, length), -1.0, dtype=torch.float64)
    ids = tuple(torch.arange(length) for _ in scores)
    sequences = Sequences(tuple(torch.ones(1, dtype=torch.long) for _ in scores), ids, tuple(range(rows)), ids)
    return Rollout(
        sequences, mask, grid, grid, None, torch.tensor(scores, dtype=torch.float64), mask[:, 0], torch.tensor(group),
        episodes=torch.arange(rows),
        baseline_scores=None if greedy is None else torch.full((rows,), greedy, dtype=torch.float64),
    )  # fmt: skip


def advantages(name: str, rollout: Rollout, **settings: Any) -> Tensor:
    module = module_of(name, **settings)
    return module.advantages(rollout, module.shape_rewards(rollout)).advantages


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("GRPOModule", {}, [1.30530975, -0.78318585, 0.26106195, -0.78318585]),
        ("DrGRPOModule", {}, [0.625, -0.375, 0.125, -0.375]),
        ("RLOOModule", {}, [0.83333333, -0.5, 0.16666667, -0.5]),
        ("ReMaxModule", {"greedy": 0.4}, [0.6, -0.4, 0.1, -0.4]),
    ],
)
def test_advantages_by_hand(name: str, settings: dict[str, Any], expected: list[float]) -> None:
    found = advantages(name, rollout_of([1, 0, 0.5, 0], [0, 0, 0, 0], **settings))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64)[:, None].expand(4, 3))


def test_the_baseline_variant_is_whitened_over_all_groups() -> None:
    found = advantages("ReinforcePlusPlusBaselineModule", rollout_of([1, 0, 0.5, 0, 1, 1, 0, 1], [0] * 4 + [1] * 4))
    expected = [1.47441952, -0.88465171, 0.29488390, -0.88465171, 0.58976781, 0.58976781, -1.76930342, 0.58976781]
    torch.testing.assert_close(found[:, 0], torch.tensor(expected, dtype=torch.float64))


def test_lite_ppo_divides_by_the_batch_standard_deviation() -> None:
    scores = torch.tensor([1, 0, 0.5, 0, 1, 1, 0, 1], dtype=torch.float64)
    found = advantages("LitePPOModule", rollout_of(scores.tolist(), [0] * 4 + [1] * 4))
    centred = scores - torch.tensor([0.375] * 4 + [0.75] * 4)
    torch.testing.assert_close(found[:, 0], centred / (scores.std() + 1e-4))


def test_reinforce_plus_plus_uses_rewards_to_go() -> None:
    reference = torch.tensor([[-1.2, -0.4, -2.05]], dtype=torch.float64)
    old = torch.tensor([[-1.0, -0.5, -2.0]], dtype=torch.float64)
    rollout = rollout_of([1.0], [0])._replace(old_logprobs=old, reference_logprobs=reference)
    module = module_of("ReinforcePlusPlusModule", kl_coef=0.05)
    to_go = torch.tensor([0.9925, 1.0025, 0.9975], dtype=torch.float64)
    expected = (to_go - to_go.mean()) / (to_go.var(unbiased=False) + 1e-8).sqrt()
    torch.testing.assert_close(module.advantages(rollout, module.shape_rewards(rollout)).advantages[0], expected)


def test_unscored_completions_have_advantage_zero() -> None:
    for name in ("GRPOModule", "DrGRPOModule", "RLOOModule", "LitePPOModule", "ReinforcePlusPlusBaselineModule"):
        found = advantages(name, rollout_of([1.0, math.nan, 0.0, 0.5], [0, 0, 0, 0]))
        without = advantages(name, rollout_of([1.0, 0.0, 0.5], [0, 0, 0]))
        assert float(found[1].abs().max()) == 0.0
        torch.testing.assert_close(found[[0, 2, 3]], without)


RATIOS = torch.tensor([[0.1, -0.2, 0.3]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [("GRPOModule", {"kl_coef": 0.0}, -1.04130056), ("DAPOModule", {}, -1.06796722), ("GSPOModule", {}, -1.0004)],
)
def test_losses_by_hand(name: str, settings: dict[str, Any], expected: float) -> None:
    old = torch.full_like(RATIOS, -1.0)
    mask = torch.ones_like(RATIOS, dtype=torch.bool)
    logprobs = PolicyLogprobs(old + RATIOS, old, None, None, torch.ones_like(RATIOS), mask)
    module = module_of(name, **settings)
    weights, count = module.aggregation(mask)
    loss = (as_loss(module.policy_loss(logprobs)).values * weights).sum() / count
    assert float(loss) == pytest.approx(expected, abs=1e-7)


def test_cispo_loss_by_hand() -> None:
    now = torch.tensor([[-1.0, -0.5, -2.0]], dtype=torch.float64)
    ratios = torch.tensor([[1.0, -0.2, 0.3]], dtype=torch.float64)
    mask = torch.ones_like(now, dtype=torch.bool)
    logprobs = PolicyLogprobs(now, now - ratios, None, None, torch.ones_like(now), mask)
    values = as_loss(module_of("CISPOModule", cispo_high=2.0).policy_loss(logprobs)).values
    assert float(values.mean()) == pytest.approx(1.70302766, abs=5e-9)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("CriticFreeModule", 7 / 3), ("DAPOModule", 7 / 3), ("GRPOModule", 2.0), ("RLOOModule", 7.0)],
)
def test_aggregations_by_hand(name: str, expected: float) -> None:
    values = torch.tensor([[1.0, 1, 0, 0], [3, 3, 3, 3]])
    mask = values > 0
    weights, count = module_of(name).aggregation(mask)
    assert float((values * weights).sum() / count) == pytest.approx(expected)


def test_dr_grpo_divides_by_a_constant() -> None:
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    weights, count = module_of("DrGRPOModule", max_new_tokens=8).aggregation(mask)
    assert float((torch.tensor([[1.0, 1, 0, 0], [3, 3, 3, 3]]) * weights).sum() / count) == pytest.approx(0.875)


# -- whole steps ------------------------------------------------------------------------------------------------------


def gradients(name: str, folder: str, micro: int | None = None, most: int | None = None, **settings: Any) -> Any:
    (step,) = within([grouped(prompt_step(GROUPED))], micro, most)
    return gradients_of_step(module_of(name, folder, max_grad_norm=None, **settings), step)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_do_not_depend_on_micro_batches(policy_folder: str, name: str) -> None:
    whole = gradients(name, policy_folder)
    assert max(float(g.abs().max()) for g in whole.values()) > 1e-6
    assert_same(gradients(name, policy_folder, micro=1), whole, rtol=1e-4, atol=1e-6)
    assert_same(gradients(name, policy_folder, most=30), whole, rtol=1e-4, atol=1e-6)


def test_the_first_gradient_equals_plain_pytorch(policy_folder: str) -> None:
    """RLOO's: the mean over completions of -A * log-probability, from unpadded sequences."""
    module = module_of("RLOOModule", policy_folder, max_grad_norm=None, kl_coef=0.0)
    kept: list[Rollout] = []
    collect = module.collect
    module.collect = lambda *batches: kept.append(found := collect(*batches)) or found  # type: ignore
    found = gradients_of_step(module, grouped(prompt_step(GROUPED)))
    rollout, plain = kept[0], AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float32)
    loss = torch.zeros(())
    for row, score in enumerate(rollout.scores.tolist()):
        sibling = float(rollout.scores[row ^ 1])
        prompt, ids = rollout.sequences.prompts[row], rollout.sequences.completions[row]
        loss = loss - (score - sibling) * plain_logprobs(plain, prompt, ids).sum() / len(GROUPED)
    loss.backward()
    expected = {f"policy.model.{n}": p.grad for n, p in plain.named_parameters() if p.grad is not None}
    assert_same(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_scores_rise_only_if_scores_are_not_shuffled(policy_folder: str, name: str) -> None:
    def last_scores(scorer: Any) -> float:
        logged = MetricsLog()
        settings: dict[str, Any] = {"learning_rate": 6e-3, "kl_coef": 0.0, "clip": 0.2, "max_new_tokens": 4}
        module = getattr(modules, name)(init_from=policy_folder, scorer=scorer, lr_schedule="constant", **settings)
        prompts = [p for p in PROMPTS for _ in range(8)]
        steps = [grouped(prompt_step(prompts, first_episode=32 * i), 8) for i in range(14)]
        fit(module, steps, callbacks=[logged])
        return sum(row["rollout/score"] for row in logged.rows[-3:])

    gold: list[float] = []

    def shuffled(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
        true = low_words(prompts, completions)
        gold.append(sum(true) / len(true))
        order = torch.randperm(len(true), generator=torch.Generator().manual_seed(len(gold))).tolist()
        return [true[i] for i in order]

    rising = last_scores(low_words) / 3
    last_scores(shuffled)
    # ReMax also scores greedy completions, so it makes more calls; the last three rollouts cover both counts.
    control = sum(gold[-3:]) / 3
    assert rising > 0.65, rising
    assert control < rising - 0.1, (control, rising)


def test_a_group_of_one_is_refused(policy_folder: str) -> None:
    with refused("group-of-one"):
        fit(module_of("GRPOModule", policy_folder), [prompt_step(PROMPTS)])
    fit(module_of("ReinforcePlusPlusModule", policy_folder), [prompt_step(PROMPTS)])


def test_without_a_kl_penalty_no_reference_is_loaded(policy_folder: str) -> None:
    module = module_of("DrGRPOModule", policy_folder)
    fit(module, [grouped(prompt_step(GROUPED))])
    assert module.reference is None and module.frozen_models() == ()
    held = module_of("DrGRPOModule", policy_folder, kl_coef=0.1)
    fit(held, [grouped(prompt_step(GROUPED))])
    assert held.reference is not None


def candidates(rounds: int, first: int = 0) -> Step[PromptBatch]:
    parts = [grouped(prompt_step(GROUPED, first_episode=first + 8 * i)).micro_batches[0] for i in range(rounds)]
    return Step(tuple(parts), len(GROUPED), 0)


def scored_after(failures: int) -> Any:
    """Give equal scores to all completions of the first calls, so that every group is tied."""
    calls: list[int] = []

    def scorer(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
        calls.append(len(completions))
        if len(calls) <= failures:
            return [1.0] * len(completions)
        return [float(i) for i in range(len(completions))]

    return scorer, calls


@pytest.mark.parametrize(("failures", "rounds"), [(0, 1), (1, 2), (2, 3), (5, 3)])
def test_dynamic_sampling_continues_until_scores_differ_within_groups(
    policy_folder: str, failures: int, rounds: int
) -> None:
    scorer, calls = scored_after(failures)
    module, logged = modules.DAPOModule(init_from=policy_folder, scorer=scorer, max_new_tokens=4), MetricsLog()
    fit(module, [candidates(3)], callbacks=[logged])
    assert len(calls) == rounds
    assert logged.rows[0]["rollout/sampling_rounds"] == rounds
    assert logged.rows[0]["rollout/frac_score_zero_std"] == (1.0 if failures > 2 else 0.0)
    assert module.episodes == len(GROUPED)


def test_dynamic_sampling_keeps_groups_in_episode_order(policy_folder: str) -> None:
    def scorer(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
        return [float(i) if i // 2 % 2 else 0.0 for i in range(len(completions))]  # every other group differs

    module = modules.DAPOModule(init_from=policy_folder, scorer=scorer, max_new_tokens=4)
    kept: list[Rollout] = []
    module.on_rollout_end = lambda rollout, means: kept.append(rollout)  # type: ignore[method-assign,assignment]
    fit(module, [candidates(3)])
    assert kept[0].episodes is not None
    assert kept[0].episodes.tolist() == [2, 3, 6, 7, 10, 11, 14, 15]
    assert kept[0].group.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    dropped = kept[0].left_out
    assert dropped is not None and dropped.scores.tolist() == [0.0] * 8


def test_overlong_completions_are_penalised_or_masked(policy_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Facts, "ends", tuple(range(20, 70)))
    logged = MetricsLog()

    def zero(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
        return [0.0] * len(completions)

    module = modules.DAPOModule(
        init_from=policy_folder, scorer=zero, max_new_tokens=4, overlong_buffer=2, mask_truncated=True
    )
    kept: list[Any] = []
    advantages_of = module.advantages

    def keeping(rollout: Rollout, rewards: Tensor) -> Advantages:
        kept.append((rollout, found := advantages_of(rollout, rewards)))
        return found

    module.advantages = keeping  # type: ignore[method-assign]
    fit(module, [candidates(1)], callbacks=[logged])
    rollout, found = kept[0]
    lengths = rollout.completion_mask.sum(-1)
    expected = torch.where(lengths <= 2, 0.0, torch.where(lengths == 3, -0.5, -1.0))
    torch.testing.assert_close(rollout.scores, expected)
    assert bool((found.learned.any(-1) == rollout.finished).all())
    assert 0 < int(rollout.finished.sum()) < len(GROUPED)


def test_remax_uses_the_greedy_completion_as_baseline(policy_folder: str) -> None:
    module = module_of("ReMaxModule", policy_folder)
    kept: list[Rollout] = []
    collect = module.collect
    module.collect = lambda *batches: kept.append(found := collect(*batches)) or found  # type: ignore
    fit(module, [grouped(prompt_step(GROUPED))])
    plain = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float32)
    baselines = []
    for prompt in PROMPTS:
        ids = list(map(int, prompt))
        for _ in range(6):
            ids.append(int(plain(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 3:
                break
        text = tokenization.completion_text(module.tokenizer, ids[len(prompt) :])
        baselines += low_words(None, [text]) * 2
    assert kept[0].baseline_scores is not None
    torch.testing.assert_close(kept[0].baseline_scores, torch.tensor(baselines))


# -- what must hold ---------------------------------------------------------------------------------------------------


def test_invariants_are_logged_as_metrics(policy_folder: str) -> None:
    logged = MetricsLog()
    fit(module_of("GRPOModule", policy_folder), [grouped(prompt_step(GROUPED))], callbacks=[logged])
    row = logged.rows[0]
    for name, bound in (("ratio", 1e-4), ("sampler", 1e-3), ("mask", 0), ("score_slot", 1e-5), ("first_kl", 1e-4)):
        assert 0 <= row[f"train/invariant/{name}" if f"train/invariant/{name}" in row else f"invariant/{name}"] <= bound


class LateScoreModule(modules.RLOOModule):
    """Adds the score one token too early."""

    def shape_rewards(self, rollout: Rollout) -> Tensor:
        return super().shape_rewards(rollout).roll(-1, dims=1)


class WarmerModule(modules.RLOOModule):
    """Uses a different temperature in training forward passes."""

    def policy_outputs(self, layout: Any, temperature: float = 1.0, **asked: Any) -> Any:
        return super().policy_outputs(layout, 1.0 if torch.is_grad_enabled() is False else 0.7, **asked)


class WarmSamplerModule(modules.RLOOModule):
    """Uses a different temperature for all statistics than for sampling."""

    def policy_outputs(self, layout: Any, temperature: float = 1.0, **asked: Any) -> Any:
        return super().policy_outputs(layout, 0.7, **asked)


@pytest.mark.parametrize(
    ("kind", "name"), [(LateScoreModule, "score_slot"), (WarmerModule, "ratio"), (WarmSamplerModule, "sampler")]
)
def test_a_violated_invariant_raises_or_warns(policy_folder: str, kind: Any, name: str) -> None:
    settings: dict[str, Any] = {"init_from": policy_folder, "scorer": low_words, "max_new_tokens": 6, "kl_coef": 0.0}
    with refused(f"invariant-{name}"):
        fit(kind(**settings), [grouped(prompt_step(GROUPED))])
    with pytest.warns(UserWarning, match=f"invariant {name}"):
        fit(kind(**settings, on_violation="warn"), [grouped(prompt_step(GROUPED))])


def test_another_reference_or_mask_violates_an_invariant() -> None:
    rollout = rollout_of([1.0, 0.0], [0, 0])
    checks = Invariants()
    checks.check_first_kl(rollout)
    with refused("invariant-first_kl"):
        checks.check_first_kl(rollout._replace(reference_logprobs=rollout.old_logprobs - 0.1))
    checks.check_lengths(rollout)
    mask = rollout.completion_mask.clone()
    mask[0, 2] = False
    with refused("invariant-mask"):
        checks.check_lengths(rollout._replace(completion_mask=mask))
    with refused("unknown-choice", "on_violation is 'ignore'"):
        Invariants("ignore")  # type: ignore[arg-type]


def test_a_custom_aggregation_is_used(policy_folder: str) -> None:
    class LongestFirstModule(modules.DrGRPOModule):
        def aggregation(self, learned: Tensor) -> Aggregation:
            return Aggregation(learned.float() * 2, learned.sum())

    twice = gradients_of_step(
        LongestFirstModule(init_from=policy_folder, scorer=low_words, max_new_tokens=6, max_grad_norm=None),
        grouped(prompt_step(GROUPED)),
    )
    once = gradients("CriticFreeModule", policy_folder, kl_coef=0.0)
    assert_same(twice, {name: 2 * g for name, g in once.items()}, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["GRPOModule", "RLOOModule", "OnlineDPOModule"])
def test_reusing_sampling_logprobs_saves_a_policy_forward(policy_folder: str, name: str) -> None:
    """The same rollouts, losses and weights up to rounding, with one forward pass less per rollout."""
    found = []
    for reuse in (False, True):
        module = getattr(modules, name)(
            init_from=policy_folder, scorer=low_words, max_new_tokens=6, learning_rate=1e-2, adam_eps=1e-3,
            lr_schedule="constant", reuse_behaviour_logprobs=reuse, ppo_epochs=2,
        )  # fmt: skip
        forwards: list[int] = []
        logged = MetricsLog()
        module.policy_outputs = partial(counting, forwards, module.policy_outputs)
        fit(module, [grouped(prompt_step(GROUPED, first_episode=8 * i)) for i in range(2)], callbacks=[logged])
        found.append((weights_of(module), logged.rows, sum(forwards)))
    (weights, rows, forwards_all), (spared_weights, spared_rows, forwards_spared) = found
    assert forwards_all - forwards_spared == 2
    assert_same(spared_weights, weights, rtol=1e-3, atol=1e-4)
    for row, spared in zip(rows, spared_rows, strict=True):
        assert row.keys() == spared.keys()
        for metric in ("rollout/score", "rollout/entropy", "rollout/kl", "train/loss"):
            if metric in row:
                assert spared[metric] == pytest.approx(row[metric], rel=1e-3, abs=1e-5), metric


def counting(calls: list[int], function: Any, *args: Any, **kwargs: Any) -> Any:
    calls.append(1)
    return function(*args, **kwargs)


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "code", "word"),
    [
        (
            "GRPOModule",
            {"kl_coef": -0.1},
            "setting-out-of-range",
            "kl_coef of GRPOModule is -0.1: it must lie in [0, inf)",
        ),
        ("GRPOModule", {"clip": 0.0}, "setting-out-of-range", "clip of GRPOModule is 0.0: it must lie in (0, inf)"),
        ("GRPOModule", {"dual_clip": 1.0}, "setting-out-of-range", "in (1, inf)"),
        ("ReinforcePlusPlusModule", {"gamma": 1.1}, "setting-out-of-range", "in [0, 1]"),
        ("PPOModule", {"lam": -0.1}, "setting-out-of-range", "lam"),
        ("PPOModule", {"gamma": 2.0}, "setting-out-of-range", "gamma"),
        ("PPOModule", {"value_clip": 0.0}, "setting-out-of-range", "value_clip"),
        ("PPOModule", {"kl_coef": float("nan")}, "setting-out-of-range", "kl_coef"),
        ("GRPOModule", {"kl_estimator": "k1"}, "kl-without-gradient", "kl_times_ratio"),
        ("RLOOModule", {"kl_times_ratio": True}, "kl-ratio-in-reward", "kl_place loss"),
        ("GRPOModule", {"ratio": "none"}, "ratio-without-objective", "reinforce"),
        ("ReMaxModule", {"ratio": "token"}, "ratio-without-objective", "cispo"),
        ("DAPOModule", {"objective": "soft_gate"}, "bound-without-clip", "clip_high"),
        ("GRPOModule", {"dual_clip": 3.0, "ratio_cap": 4.0}, "two-bounds", "one to null"),
        ("DAPOModule", {"ratio_cap": 1.25}, "ratio-cap-below-clip", "1.28"),
        ("CISPOModule", {"cispo_low": 6.0}, "cispo-bounds", "cispo_high"),
        ("GRPOModule", {"sampler_correction": "token_mask", "sampler_low": 3.0}, "sampler-bounds", "sampler_high"),
        ("GRPOModule", {"sampler_normalise": True}, "nothing-to-normalise", "sampler_correction"),
        ("GRPOModule", {"overlong_buffer": 7}, "overlong-buffer", "max_new_tokens"),
        ("ReinforcePlusPlusModule", {"baseline": "group_mean"}, "baseline-of-reward-to-go", "whiten_advantages"),
        ("GRPOModule", {"gamma": 0.9}, "discount-without-tokens", "reward_to_go"),
    ],
)
def test_conflicting_settings_are_refused(name: str, settings: dict[str, Any], code: str, word: str) -> None:
    with refused(code, word):
        module_of(name, **settings)


def moved_logprobs(advantage: float) -> PolicyLogprobs:
    """Log-ratios of -1, -0.25, 0, 0.25, 1 and a masked 5, all with one advantage."""
    moved = torch.tensor([[-1.0, -0.25, 0.0, 0.25, 1.0, 5.0]], dtype=torch.float64)
    mask = torch.arange(6).unsqueeze(0) < 5
    old = torch.full_like(moved, -2.0)
    return PolicyLogprobs(old + moved, old, old, None, torch.full_like(moved, advantage), mask, old - 1.0)


@pytest.mark.parametrize(
    ("name", "settings", "good", "bad"),
    [
        ("GRPOModule", {}, 0.4, 0.4),
        ("DAPOModule", {}, 0.4, 0.4),  # e^0.25 = 1.284 is above 1.28
        ("DAPOModule", {"clip_high": 0.5}, 0.2, 0.4),
        ("GRPOModule", {"dual_clip": 2.5}, 0.4, 0.6),
        ("GRPOModule", {"ratio_cap": 2.0}, 0.4, 0.6),
        ("PPOModule", {"clip": 2.0}, 0.0, 0.0),
    ],
)
def test_an_objective_reports_its_own_clip_fractions(
    name: str, settings: dict[str, Any], good: float, bad: float
) -> None:
    module = module_of(name, **{"kl_coef": 0.0, **settings})
    for advantage, expected in ((1.0, good), (-1.0, bad)):
        given = moved_logprobs(advantage)
        metrics = as_loss(module.policy_loss(given)).metrics
        assert float(metrics["clip_fraction"][given.completion_mask].mean()) == pytest.approx(expected)
        side = metrics["clip_fraction_high" if advantage > 0 else "clip_fraction_low"]
        other = metrics["clip_fraction_low" if advantage > 0 else "clip_fraction_high"]
        assert float(other.sum()) == 0 and float(side[given.completion_mask].mean()) <= expected


def test_only_an_objective_that_clips_reports_a_clip_fraction() -> None:
    for name, settings in (
        ("CISPOModule", {}), ("ReMaxModule", {}), ("GRPOModule", {"objective": "soft_gate"}),
    ):  # fmt: skip
        metrics = as_loss(module_of(name, kl_coef=0.0, **settings).policy_loss(moved_logprobs(1.0))).metrics
        assert not [metric for metric in metrics if "clip" in metric]
    # All tokens of a GSPO completion have the same ratio, here 1, which is not clipped.
    metrics = as_loss(module_of("GSPOModule").policy_loss(moved_logprobs(1.0))).metrics
    assert float(metrics["clip_fraction"].sum()) == 0


@pytest.mark.parametrize("name", ["GRPOModule", "PPOModule"])
def test_sampler_correction_weights_the_objective_but_not_the_kl(name: str) -> None:
    settings: dict[str, Any] = {"kl_coef": 0.3, "kl_place": "loss", "kl_estimator": "k2"}
    given = moved_logprobs(1.0)
    plain, corrected = (
        as_loss(module_of(name, **settings, **further).policy_loss(given))
        for further in ({}, {"sampler_correction": "token_truncate", "sampler_high": 2.0})
    )
    kl = 0.3 * (given.logprobs - given.old_logprobs) ** 2 / 2
    torch.testing.assert_close(corrected.values - kl, 2.0 * (plain.values - kl))  # e^1 is truncated to 2
    assert corrected.metrics["sampler_weight"].unique().tolist() == [2.0]


def test_the_kl_loss_times_the_ratio_has_a_gradient_through_both() -> None:
    old, reference = torch.tensor([[-1.0]], dtype=torch.float64), torch.tensor([[-1.2]], dtype=torch.float64)
    mask, zero = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.float64)

    def slope(now: float, **settings: Any) -> tuple[float, float]:
        leaf = torch.tensor([[now]], dtype=torch.float64, requires_grad=True)
        kl = module_of("GRPOModule", **settings).kl_loss(PolicyLogprobs(leaf, old, reference, None, zero, mask))
        assert kl is not None
        (found,) = torch.autograd.grad(kl.sum(), leaf)
        return float(kl), float(found)

    ratio, k3, k3_slope = math.exp(0.1), math.exp(-0.3) - 1 + 0.3, 1 - math.exp(-0.3)
    assert slope(-0.9) == pytest.approx((0.04081822, k3_slope), abs=5e-9)
    assert slope(-0.9, kl_times_ratio=True) == pytest.approx((0.04511111, ratio * (k3 + k3_slope)), abs=5e-9)
    d = 0.3
    assert slope(-0.9, kl_times_ratio=True, kl_estimator="k1") == pytest.approx((ratio * d, ratio * (d + 1)))
    assert slope(-0.9, kl_estimator="k2", kl_clamp=0.2) == pytest.approx((0.02, 0.0))


@pytest.mark.parametrize(
    ("name", "settings", "reached"),
    [
        ("GRPOModule", {}, False),
        ("GRPOModule", {"advantage_scale": "none", "kl_place": "reward", "kl_estimator": "k1"}, False),
        (
            "GRPOModule",
            {
                "advantage_scale": "none", "kl_place": "reward", "kl_estimator": "k1", "aggregation": "token_mean",
                "objective": "soft_gate",
            },
            True,
        ),
        ("DrGRPOModule", {"kl_coef": 0.1}, True),
        ("DrGRPOModule", {}, False),
        ("DrGRPOModule", {"kl_coef": 0.1, "kl_place": "loss", "kl_estimator": "k2"}, False),
        ("RLOOModule", {"advantage_scale": "batch"}, True),
        ("RLOOModule", {"aggregation": "sequence_mean_token_mean"}, False),
        ("RLOOModule", {"mask_truncated": True}, False),
        ("RLOOModule", {"entropy_coef": 0.1}, False),
        ("RLOOModule", {"temperature": 0.7}, False),
        ("ReinforcePlusPlusModule", {}, True),
        ("ReinforcePlusPlusModule", {"gamma": 0.9}, False),
        ("PPOModule", {}, True),
        ("PPOModule", {"whiten_rewards": True}, False),
        ("PPOModule", {"aggregation": "sequence_mean_token_mean"}, False),
    ],
)  # fmt: skip
def test_reaches_kl_optimum_depends_on_settings(name: str, settings: dict[str, Any], reached: bool) -> None:
    assert module_of(name, **settings).reaches_kl_optimum() == reached


def test_masked_tokens_enter_no_metric(policy_folder: str) -> None:
    """Every completion is truncated and masked, so no token is left to average over."""
    logged = MetricsLog()
    module = module_of("GRPOModule", policy_folder, mask_truncated=True, max_new_tokens=1, kl_coef=0.0)
    fit(module, [grouped(prompt_step(GROUPED))], callbacks=[logged])
    if logged.rows[0]["rollout/eos_rate"] == 0:
        assert not {"train/policy_loss", "train/clip_fraction"} & set(logged.rows[0])
