"""Constraints: multipliers follow mean costs, and the gradient is that of the constrained objective.

The reference implements the loss over a whole rollout in fp64, from the samples and the critics' values.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import rank_cases
import torch
from conftest import refused
from rank_cases import low_words_at_a_cost, share_of_words
from test_rollout_objectives_of_users import at_end, clipped, critic_loss, gae, loaded, plain_values, step, whitened
from tiny_folders import one_thread, policy_folder
from tiny_models import (
    MetricsLog,
    doubled,
    evaluate,
    fit,
    gradients_of_step,
    plain_logprobs,
    save_reward_model,
    weights_of,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_lightning.modules import GRPOModule, OnlineDPOModule, PPOModule
from rlhf_lightning.scoring import WeightedSum
from rlhf_lightning.training.judgements import Constraint, Multiplier

__all__ = ["one_thread", "policy_folder"]

LAMBDA = 0.6
COST = {"limit": 0.4, "multiplier": LAMBDA, "learning_rate": 0.5}


def module_of(folder: str, kind: Any = PPOModule, **settings: Any) -> Any:
    """Return the module in double precision, so that gradients can be compared exactly."""
    defaults = {"max_new_tokens": 6, "lr_schedule": "constant", "max_grad_norm": None, "scorer": low_words_at_a_cost}
    module = kind(init_from=folder, **{**defaults, "constraints": {"cost": COST}, **settings})
    return doubled(module)


def second_gradients(folder: str, **settings: Any) -> tuple[dict[str, Tensor], Any, dict[str, Tensor]]:
    """Gradients of a rollout's second update, where ratios are not 1; the rollout, and the weights before."""
    limits = {name: settings.pop(name) for name in ("micro_batch_size", "max_tokens") if name in settings}
    module = module_of(folder, ppo_epochs=2, learning_rate=0.05, adam_eps=1.0, missing_eos_score=None, **settings)
    kept, weights = [], {}
    collect, update = module.collect, module.update
    module.collect = lambda *batches: kept.append(collect(*batches)) or kept[-1]

    def updating(*given: Any) -> Any:
        weights.update(weights_of(module))
        return update(*given)

    module.update = updating
    return gradients_of_step(module, step(**limits)), kept[0], weights


@pytest.mark.parametrize("cost_critics", [False, True], ids=["one-critic", "cost-critic"])
def test_the_gradient_equals_that_of_the_constrained_objective(policy_folder: str, cost_critics: bool) -> None:
    found, rollout, weights = second_gradients(policy_folder, cost_critics=cost_critics)
    rows = list(zip(rollout.sequences.prompts, rollout.sequences.completions, strict=True))
    policy = loaded(AutoModelForCausalLM, policy_folder, weights, "policy.model.")
    prefixes = ["critic.model.", *(["cost_critic_0.model."] if cost_critics else [])]
    critics = [
        loaded(AutoModelForSequenceClassification, policy_folder, weights, one, num_labels=1) for one in prefixes
    ]

    def ragged(grid: Tensor) -> list[Tensor]:
        return [row[: len(ids)].double() for row, (_, ids) in zip(grid, rows, strict=True)]

    now, old = [plain_logprobs(policy, *row) for row in rows], ragged(rollout.old_logprobs)
    reference = ragged(rollout.reference_logprobs)
    before = [rollout.values, *([rollout.extras["cost_values_cost"]] if cost_critics else [])]
    low = [share_of_words(text, 0, 60) for text in rollout.texts]
    cost = [share_of_words(text, 30, 90) for text in rollout.texts]
    if cost_critics:
        scores, shares = [low, [-c for c in cost]], [1 / (1 + LAMBDA), LAMBDA / (1 + LAMBDA)]
    else:
        scores, shares = [[(r - LAMBDA * c) / (1 + LAMBDA) for r, c in zip(low, cost, strict=True)]], [1.0]
    mixed, loss = [torch.zeros_like(row) for row in old], torch.zeros((), dtype=torch.float64)
    for critic, grid, given, share in zip(critics, before, scores, shares, strict=True):
        values = ragged(grid)
        pairs = zip(old, reference, values, given, strict=True)
        found_here = [gae(at_end(s, -0.05 * (lp - ref)), v, 0.95) for lp, ref, v, s in pairs]
        mixed = [total + share * one for total, (one, _) in zip(mixed, found_here, strict=True)]
        loss = loss + critic_loss([plain_values(critic, *row) for row in rows], values, [r for _, r in found_here])
    (clipped(now, old, whitened(mixed), 0.2) + loss).backward()
    for prefix, model in zip(["policy.model.", *prefixes], [policy, *critics], strict=True):
        slopes = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        largest = max(float(slope.abs().max()) for slope in slopes.values())
        assert largest > 1e-4
        for name, slope in slopes.items():
            torch.testing.assert_close(found[prefix + name], slope, rtol=1e-5, atol=1e-6 * largest)


def test_critics_start_from_the_reward_model_and_from_minus_the_cost_model(policy_folder: str, tmp_path: Path) -> None:
    folders = {name: save_reward_model(tmp_path / name, seed=seed) for name, seed in (("helpful", 3), ("cost", 4))}
    scorer = WeightedSum(folders, weights={"cost": 0.0})
    module = PPOModule(init_from=policy_folder, scorer=scorer, constraints={"cost": COST}, cost_critics=True)
    module.configure_model()
    for critic, name, sign in ((module.critic, "helpful", 1.0), (module.cost_critic_0, "cost", -1.0)):
        model = AutoModelForSequenceClassification.from_pretrained(folders[name])
        assert torch.equal(critic.model.score.weight, sign * model.score.weight) and bool(model.score.weight.any())
        trunk, expected = critic.model.state_dict(), model.state_dict()
        assert all(torch.equal(trunk[part], expected[part]) for part in expected if "layers.0" in part)


def test_micro_batches_do_not_change_the_gradient(policy_folder: str) -> None:
    whole = second_gradients(policy_folder, cost_critics=True)[0]
    cut = second_gradients(policy_folder, cost_critics=True, micro_batch_size=2)[0]
    for name, gradient in whole.items():
        torch.testing.assert_close(cut[name], gradient, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("kind", [PPOModule, GRPOModule, OnlineDPOModule])
def test_the_multiplier_follows_the_mean_cost_of_training_rollouts(policy_folder: str, kind: Any) -> None:
    logged = MetricsLog()
    module = module_of(policy_folder, kind, learning_rate=1e-3, missing_eos_score=None)
    fit(module, [step(8 * i) for i in range(3)], evaluation=[step(8 * 9)], callbacks=[logged])
    costs, used = logged.column("rollout/score_cost"), logged.column("train/multiplier_cost")
    expected = [LAMBDA]
    for cost in costs:
        expected.append(expected[-1] * math.exp(0.5 * (cost - 0.4)))
    assert [*used, module.score_rule.multipliers["cost"].value] == pytest.approx(expected, rel=1e-6)
    objective, scores = logged.column("rollout/score_objective"), logged.column("rollout/score")
    mixed = [(r - m * c) / (1 + m) for r, c, m in zip(objective, costs, used, strict=True)]
    assert scores == pytest.approx(mixed, abs=1e-6)
    before = module.score_rule.state_dict()
    evaluate(module, [step(8 * 9)])
    module.answer(["w20"], module.sampling)
    assert module.score_rule.state_dict() == before


@pytest.mark.parametrize(
    "settings",
    [{"constraints": {"cost": COST}}, {"constraints": {"cost": COST}, "cost_critics": True},
     {"constraints": {"cost": COST | {"method": "pid", "proportional": 0.3, "derivative": 0.2}}}],
    ids=["lagrangian", "cost-critic", "pid"],
)  # fmt: skip
def test_a_resumed_run_is_bit_identical(policy_folder: str, tmp_path: Path, settings: dict[str, Any]) -> None:
    settings = {"scorer": low_words_at_a_cost, "missing_eos_score": None, **settings}
    found = rank_cases.resume("PPOModule", policy_folder, str(tmp_path / "half.ckpt"), "auto", **settings)
    assert found["whole_multiplier"] == found["resumed_multiplier"]
    assert found["whole_multiplier"]["cost"]["value"] != LAMBDA
    for weight, value in found["whole"].items():
        assert torch.equal(found["resumed"][weight], value), weight


def test_pid_multiplier_by_hand() -> None:
    one = Multiplier(Constraint(1.0, "pid", multiplier=0.5, learning_rate=0.1, proportional=2.0, derivative=3.0))
    one.move(1.4)  # I = .5 + .04, P = .8, no rise known
    assert one.value == pytest.approx(1.34)
    one.move(1.5)  # I = .54 + .05, P = 1, D = 3 * .1
    assert one.value == pytest.approx(1.89)
    one.move(0.2)  # I = .59 - .08, P = -1.6, the cost fell
    assert one.value == 0.0 and one.integral == pytest.approx(0.51)
    one.move(math.nan)
    assert one.integral == pytest.approx(0.51)


def test_lagrangian_multipliers_are_bounded() -> None:
    one = Multiplier(Constraint(0.0, learning_rate=1.0, max_multiplier=4.0))
    one.move(1e9)
    assert one.value == pytest.approx(4.0)
    one.move(-1e9)
    assert one.value == pytest.approx(0.25)


def test_the_cost_limit_holds_and_scores_rise(policy_folder: str) -> None:
    """Words below 60 are rewarded, and words from 30 to 89 have a cost, so words below 30 earn reward without cost."""
    logged = MetricsLog()
    constraint = {"limit": 0.2, "learning_rate": 0.5}
    settings = {"learning_rate": 6e-3, "max_new_tokens": 4, "max_grad_norm": 1.0, "kl_coef": 0.0, "ppo_epochs": 2}
    module = module_of(policy_folder, GRPOModule, constraints={"cost": constraint}, **settings)
    fit(module, [step(8 * i) for i in range(60)], callbacks=[logged])
    costs, objective = logged.column("rollout/score_cost"), logged.column("rollout/score_objective")
    assert sum(costs[:5]) / 5 > 0.4 and sum(costs[-10:]) / 10 < 0.25
    assert sum(objective[-10:]) / 10 > sum(objective[:5]) / 5 + 0.1


def test_invalid_settings_are_refused(policy_folder: str) -> None:
    def made(kind: Any = PPOModule, **settings: Any) -> Any:
        return kind(init_from=policy_folder, scorer=low_words_at_a_cost, **settings)

    with refused("unknown-name", "did you mean limit"):
        made(constraints={"cost": {"limt": 1.0}})
    with refused("wrong-arguments", "has no limit"):
        made(constraints={"cost": {"method": "pid"}})
    with refused("unknown-choice", "lagrangian"):
        made(constraints={"cost": {"limit": 1.0, "method": "dual"}})
    with refused("gains-without-pid", "method pid"):
        made(constraints={"cost": {"limit": 1.0, "derivative": 1.0}})
    with refused("multiplier-of-zero", "never change 0"):
        made(constraints={"cost": {"limit": 1.0, "multiplier": 0.0}})
    with refused("not-a-number", "limit"):
        made(constraints={"cost": {"limit": "low"}})
    with refused("setting-out-of-range", "max_multiplier"):
        made(constraints={"cost": {"limit": 1.0, "max_multiplier": -1.0}})
    with refused("cost-critics", "constraints"):
        made(cost_critics=True)
    with refused("cost-critics", "separate"):
        made(cost_critics=True, critic="shared", constraints={"cost": 1.0})
    with refused("whitened-costs", "whiten_rewards"):
        made(cost_critics=True, whiten_rewards=True, constraints={"cost": 1.0})
    with refused("weighed-cost", "keep one"):
        made(constraints={"cost": 1.0}, parts={"weights": {"cost": 1.0}})
    with refused("nothing-normalized", "sum_then_group"):
        made(OnlineDPOModule, parts={"normalize": "batch"})
    with refused("unknown-part", "harm"):
        fit(made(GRPOModule, constraints={"harm": 1.0}), [step()])
