"""Completions without a score are excluded from training and not counted as wrong."""

import math
from typing import Any

import pytest
import torch
from conftest import refused
from modules.test_critic_free import GROUPED, NAMES, grouped, low_words
from tiny_models import MetricsLog, evaluate, fit, gradients_of_step, prompt_step

from rlhf_lightning import modules
from rlhf_lightning.scoring import FaultTolerant, WeightedSum
from rlhf_lightning.training.collector import select_prompts

EIGHT = len(GROUPED)


def gap(*missing: int) -> Any:
    """Return the usual scores, but None for these rows."""

    def scorer(prompts: Any, completions: list[str], **columns: Any) -> list[float | None]:
        return [None if row in missing else score for row, score in enumerate(low_words(prompts, completions))]

    return scorer


def made(name: str, folder: str, scorer: Any, **settings: Any) -> Any:
    defaults: dict[str, Any] = {"max_new_tokens": 6, "learning_rate": 1e-3, "lr_schedule": "constant"}
    return getattr(modules, name)(init_from=folder, scorer=scorer, **defaults | settings)


def logged(module: Any, **trainer: Any) -> dict[str, float]:
    metrics = MetricsLog()
    fit(module, [grouped(prompt_step(GROUPED))], callbacks=[metrics], **trainer)
    return metrics.rows[-1]


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_score_enters_no_metric_or_gradient(policy_folder: str, name: str) -> None:
    kept: dict[str, Any] = {}
    module = made(name, policy_folder, gap(3), kl_coef=0.0)
    advantages = module.advantages

    def listened(rollout: Any, rewards: Any) -> Any:
        kept["rollout"], kept["advantages"] = rollout, advantages(rollout, rewards)
        return kept["advantages"]

    module.advantages = listened
    row = logged(module)
    # DAPO and others keep the order of the rows, so the missing one is known.
    missing = kept["rollout"].scores.isnan()
    assert missing.tolist() == [index == 3 for index in range(EIGHT)]
    assert not kept["advantages"].advantages[missing].any()
    assert kept["advantages"].advantages.isfinite().all()
    assert row["rollout/score"] == pytest.approx(float(kept["rollout"].scores[~missing].mean()))
    assert row["rollout/score_missing"] == pytest.approx(1 / EIGHT)
    assert row["rollout/score_std"] == pytest.approx(
        float(kept["rollout"].scores[~missing].std(correction=0)), abs=1e-6
    )
    assert all(parameter.isfinite().all() for parameter in module.policy.parameters())


def test_a_lone_sibling_of_a_missing_score_has_gradient_zero(policy_folder: str) -> None:
    """Groups of two: without row 0, row 1 is alone in its group, and the gradient comes only from the other groups."""
    module = made("RLOOModule", policy_folder, gap(*range(EIGHT)), kl_coef=0.0, max_grad_norm=None)
    nothing = gradients_of_step(module, grouped(prompt_step(GROUPED)))
    assert not any(gradient.any() for gradient in nothing.values())

    def flat(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
        scores = low_words(prompts, completions)
        return [scores[1], scores[1], *scores[2:]]

    found, expected = (
        gradients_of_step(
            made("RLOOModule", policy_folder, scorer, kl_coef=0.0, max_grad_norm=None), grouped(prompt_step(GROUPED))
        )
        for scorer in (gap(0), flat)
    )
    assert any(gradient.any() for gradient in found.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rule", [{"missing_eos_penalty": 1.0}, {"missing_eos_score": -1.0}])
def test_missing_eos_rules_do_not_replace_a_missing_score(policy_folder: str, rule: dict[str, float]) -> None:
    row = logged(made("GRPOModule", policy_folder, gap(0, 5), **rule))
    assert row["rollout/score_missing"] == pytest.approx(2 / EIGHT)


def dropped(module: Any, *rows: int) -> dict[str, torch.Tensor]:
    """Return the gradient of a rollout without some of its prompts."""
    step = prompt_step(GROUPED)
    (batch,) = step.micro_batches
    kept = [row for row in range(EIGHT) if row not in rows]
    return gradients_of_step(module, step._replace(micro_batches=(select_prompts(batch, kept),), rows=len(kept)))


def ppo(folder: str, scorer: Any, **settings: Any) -> Any:
    return made("PPOModule", folder, scorer, max_grad_norm=None, ppo_epochs=1, **settings)


@pytest.mark.parametrize("critic", ["separate", "shared"])
@pytest.mark.parametrize("slot", ["end", "after_eos"])
def test_ppo_ignores_a_completion_without_a_score(policy_folder: str, critic: str, slot: str) -> None:
    """Policy, critic and whitening ignore the completion, as if it had not been sampled."""
    settings: dict[str, Any] = {"critic": critic, "reward_slot": slot, "whiten_rewards": True, "entropy_coef": 0.1}
    found = gradients_of_step(ppo(policy_folder, gap(3, 6), **settings), prompt_step(GROUPED))
    expected = dropped(ppo(policy_folder, low_words, **settings), 3, 6)
    assert any(gradient.any() for gradient in found.values()) and found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_ppo_counts_unscored_completions_and_continues_without_any_score(policy_folder: str) -> None:
    module = ppo(policy_folder, FaultTolerant(sometimes, on_fault="drop"), mini_batch_size=3)
    metrics = MetricsLog()
    fit(module, [prompt_step(GROUPED)], [prompt_step(GROUPED)], callbacks=[metrics])
    row = metrics.rows[-1]
    assert row["rollout/score_missing"] == row["rollout/score_failed"] == pytest.approx(2 / EIGHT)
    assert all(math.isfinite(value) for value in row.values())
    module = ppo(policy_folder, gap(*range(EIGHT)), mini_batch_size=3)
    row = logged(module)
    assert row["rollout/score_missing"] == 1 and row["train/grad_norm"] == 0 and row["train/skipped_updates"] == 0
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def sometimes(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    """Fails if completion 2 or 5 of a rollout is in the batch."""
    if len(completions) == EIGHT:
        scores = low_words(prompts, completions)
        return [float("nan") if row in (2, 5) else score for row, score in enumerate(scores)]
    raise RuntimeError("never again")


def test_a_scorer_that_returns_nan_is_refused_everywhere(policy_folder: str) -> None:
    def wrong(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
        return [float("nan"), *low_words(prompts, completions)[1:]]

    with refused("not-finite", "nan for completion 0"):
        fit(made("GRPOModule", policy_folder, wrong), [grouped(prompt_step(GROUPED))])


def test_scorer_metrics_are_logged_with_the_rollout(policy_folder: str) -> None:
    total = WeightedSum({"low": low_words, "some": gap(1)}, weights={"low": 2.0}, missing="skip")
    total(["p"] * 3, ["w1", "w2", "w3"])  # completions outside the rollout enter no rollout metric
    module = made("GRPOModule", policy_folder, total)
    row = logged(module)
    low, some = row["rollout/score_low"], row["rollout/score_some"]
    scores = torch.tensor([2 * low * EIGHT + some * (EIGHT - 1)]) / EIGHT
    assert row["rollout/score"] == pytest.approx(float(scores), rel=1e-5) and low > 0
    found = evaluate(module, [grouped(prompt_step(GROUPED))])
    assert found["val/score_low"] > 0 and found["val/score_missing"] == 0
