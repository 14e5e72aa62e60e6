"""Test properties of every objective over random log-probabilities, masks and micro-batch splits.

Each shipped class is called through its override points on generated inputs, without loading a model.
"""

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import quiet_trainer, sequences
from torch import Tensor

from rlhf_lightning.commands.objectives import objective_classes
from rlhf_lightning.functional.distillation import generalized_jsd
from rlhf_lightning.functional.logprobs import kl_estimate
from rlhf_lightning.functional.policy_gradient import generalized_advantages
from rlhf_lightning.modules import (
    CriticFreeModule,
    DPOModule,
    PlackettLuceModule,
    PPOModule,
    ReMaxModule,
    RewardModule,
    RLOOModule,
    SFTModule,
)
from rlhf_lightning.modules.unpaired import UnpairedModule
from rlhf_lightning.training.returned_loss import as_loss
from rlhf_lightning.types import (
    PolicyLogprobs,
    PreferenceBatch,
    PreferenceLogprobs,
    RankedScores,
    Rollout,
    TokenLogprobs,
    UnpairedLogprobs,
)

from .worked import normal, property_test, right_padded_mask

SHIPPED = objective_classes()
PAIRED = [kind for kind in SHIPPED if issubclass(kind, DPOModule) and kind.batch_type is PreferenceBatch]
UNPAIRED = [kind for kind in SHIPPED if issubclass(kind, UnpairedModule)]
SAMPLED = [kind for kind in SHIPPED if issubclass(kind, (CriticFreeModule, PPOModule))]
paired, unpaired, sampled = (
    pytest.mark.parametrize("kind", kinds, ids=lambda kind: kind.__name__) for kinds in (PAIRED, UNPAIRED, SAMPLED)
)
seeds = st.integers(0, 2**31)
pads = {"left": st.integers(0, 3), "right": st.integers(0, 3)}


@cache
def unloaded(kind: type, **settings: Any) -> Any:
    module = kind(init_from="nowhere", **settings)
    module.trainer = quiet_trainer()
    return module


def changed(parts: Any, change: Any, least: int) -> Any:
    """Return the same tuple with a function applied to every tensor of the given number of dimensions,
    including slots.
    """

    def of(named: Any) -> dict[str, Tensor]:
        return {n: change(p) for n, p in named.items() if isinstance(p, Tensor) and p.dim() >= least}

    return parts._replace(**of(parts._asdict()), extras={**parts.extras, **of(parts.extras)})


def padded(parts: Any, left: int, right: int) -> Any:
    """Return the same tuple with padding positions added to its tensors."""
    return changed(parts, lambda grid: F.pad(grid, (left, right)), 2)


def rows(parts: Any, chosen: slice | Tensor) -> Any:
    """Return some rows of a tuple of tensors."""
    return changed(parts, lambda part: part[chosen], 1)


def grid(seed: int, mask: Tensor) -> Tensor:
    """Return log-probabilities, 0 where the mask is False."""
    return torch.where(mask, -normal(seed, *mask.shape).abs() - 0.05, 0.0)


# -- inputs -----------------------------------------------------------------------------------------------------------


def pairs(seed: int, kind: type, count: int = 4, length: int = 5) -> PreferenceLogprobs:
    masks = [right_padded_mask(seed + side, count, length) for side in (0, 1)]
    policy, reference, collisions = (
        [grid(seed + 10 * n + side, mask) for side, mask in enumerate(masks)] for n in (1, 2, 3)
    )
    target = torch.sigmoid(normal(seed + 40, count)) if getattr(kind, "weighs_rows", True) else torch.ones(count)
    with_reference = getattr(kind, "needs_reference", True)
    return PreferenceLogprobs(
        *policy,
        *(reference if with_reference else (None, None)),
        *masks,
        target.double(),
        torch.zeros(count, dtype=torch.float64),
        torch.ones(count, dtype=torch.float64),
        {"chosen_log_collisions": collisions[0], "rejected_log_collisions": collisions[1]},
    )


def judged(seed: int, count: int = 4, length: int = 5) -> UnpairedLogprobs:
    mask = right_padded_mask(seed, count, length)
    desirable = torch.arange(count) % 2 == 0
    point = normal(seed + 3, 1)[0].abs()
    return UnpairedLogprobs(
        grid(seed + 1, mask), grid(seed + 2, mask), mask, desirable, torch.ones(count, dtype=torch.float64), point
    )


def rollout(seed: int, least: int = 1, groups: int = 2, samples: int = 3, length: int = 5) -> Rollout:
    mask = right_padded_mask(seed, groups * samples, length, least)
    old = grid(seed + 1, mask)
    lengths = mask.sum(-1).clamp_min(1).tolist()
    return Rollout(
        sequences=sequences([([1], [2] * n) for n in lengths]),
        completion_mask=mask,
        old_logprobs=old,
        reference_logprobs=grid(seed + 2, mask),
        values=torch.where(mask, normal(seed + 3, *mask.shape), 0.0),
        scores=normal(seed + 4, groups * samples),
        finished=torch.ones(groups * samples, dtype=torch.bool),
        group=torch.arange(groups).repeat_interleave(samples),
        behaviour_logprobs=old,
        episodes=torch.arange(groups * samples),
        baseline_scores=normal(seed + 5, groups).repeat_interleave(samples),
    )


def of_pairs(kind: type, logprobs: PreferenceLogprobs) -> Tensor:
    with torch.set_grad_enabled(logprobs.policy_chosen_logprobs.requires_grad):
        return as_loss(unloaded(kind).preference_loss(logprobs)).values


def sampler(kind: type, **settings: Any) -> Any:
    return unloaded(kind, scorer="nothing", max_new_tokens=5, **settings)


def update(module: Any, drawn: Rollout, moved: float = 0.0) -> PolicyLogprobs:
    """Return the loss inputs of a rollout whose policy moved by the given amount on every token."""
    found = module.advantages(drawn, module.shape_rewards(drawn))
    now = torch.where(drawn.completion_mask, drawn.old_logprobs + moved, 0.0)
    return PolicyLogprobs(
        now, drawn.old_logprobs, drawn.reference_logprobs, None, found.advantages, drawn.completion_mask, now.detach()
    )


def token_gradient(module: Any, logprobs: PolicyLogprobs, aggregated: bool = True) -> Tensor:
    """Return the gradient of a step's loss with respect to each token's log-probability, aggregated or summed."""
    leaf = logprobs.logprobs.clone().requires_grad_()
    losses = as_loss(module.policy_loss(logprobs._replace(logprobs=leaf))).values
    weights = logprobs.completion_mask.double()
    if aggregated:
        weights = module.aggregation(logprobs.completion_mask).weights
    return torch.autograd.grad((torch.where(logprobs.completion_mask, losses, 0.0) * weights).sum(), leaf)[0]


# -- 1: padding -------------------------------------------------------------------------------------------------------


@paired
@property_test
@given(seed=seeds, **pads)
def test_padding_does_not_change_preference_losses(kind: type, seed: int, left: int, right: int):
    given = pairs(seed, kind)
    torch.testing.assert_close(of_pairs(kind, padded(given, left, right)), of_pairs(kind, given))


@unpaired
@property_test
@given(seed=seeds, **pads)
def test_padding_does_not_change_unpaired_losses(kind: type, seed: int, left: int, right: int):
    given, module = judged(seed), unloaded(kind)
    found, expected = (as_loss(module.unpaired_loss(g)).values for g in (padded(given, left, right), given))
    torch.testing.assert_close(found, expected)


@property_test
@given(seed=seeds, **pads)
def test_padding_does_not_change_token_losses(seed: int, left: int, right: int):
    mask = right_padded_mask(seed, 4, 5)
    given = TokenLogprobs(grid(seed, mask), mask, torch.ones(4, dtype=torch.float64))
    found = unloaded(SFTModule).token_loss(padded(given, left, right))
    torch.testing.assert_close(found[:, left : left + 5], unloaded(SFTModule).token_loss(given))
    assert found.abs().sum().item() == pytest.approx(found[:, left : left + 5].abs().sum().item())


@sampled
@property_test
@given(seed=seeds, **pads)
def test_padding_does_not_change_rewards_advantages_or_gradients(kind: type, seed: int, left: int, right: int):
    module, drawn = sampler(kind), rollout(seed)
    wide, inside = padded(drawn, left, right), slice(left, left + 5)
    torch.testing.assert_close(module.shape_rewards(wide)[:, inside], module.shape_rewards(drawn))
    found, expected = update(module, wide, 0.1), update(module, drawn, 0.1)
    torch.testing.assert_close(found.advantages[:, inside], expected.advantages)
    slopes = token_gradient(module, found)
    torch.testing.assert_close(slopes[:, inside], token_gradient(module, expected))
    assert slopes[~wide.completion_mask].abs().sum().item() == 0


# -- 2: micro-batch splits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in PAIRED if not kind.batch_coupled], ids=lambda kind: kind.__name__)
@property_test
@given(seed=seeds, cut=st.integers(1, 3))
def test_micro_batches_do_not_change_the_gradient_of_a_step(kind: type, seed: int, cut: int):
    given = pairs(seed, kind)

    def slopes(*parts: slice) -> tuple[Tensor, ...]:
        leaves = [given.policy_chosen_logprobs.clone(), given.policy_rejected_logprobs.clone()]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        whole = given._replace(policy_chosen_logprobs=leaves[0], policy_rejected_logprobs=leaves[1])
        return torch.autograd.grad(sum(of_pairs(kind, rows(whole, part)).sum() for part in parts), leaves)

    torch.testing.assert_close(slopes(slice(0, cut), slice(cut, None)), slopes(slice(None)))


@sampled
@property_test
@given(seed=seeds, cut=st.integers(1, 5))
def test_micro_batches_do_not_change_the_gradient_of_a_minibatch(kind: type, seed: int, cut: int):
    """Advantages are those of the whole rollout; token weights and the divisor add up over any split."""
    module, drawn = sampler(kind), rollout(seed)
    given = update(module, drawn, 0.1)
    parts = [rows(given, slice(0, cut)), rows(given, slice(cut, None))]
    torch.testing.assert_close(torch.cat([token_gradient(module, p) for p in parts]), token_gradient(module, given))
    divisors = [float(module.aggregation(p.completion_mask).divisor) for p in (*parts, given)]
    assert divisors[0] + divisors[1] == divisors[2]


# -- 3: policy = reference --------------------------------------------------------------------------------------------


@paired
@property_test
@given(seed=seeds)
def test_at_the_reference_margins_are_zero_and_losses_match_their_declared_value(kind: type, seed: int):
    given = pairs(seed, kind)
    given = given._replace(
        reference_chosen_logprobs=given.policy_chosen_logprobs,
        reference_rejected_logprobs=given.policy_rejected_logprobs,
    )
    assert given.margin.abs().max().item() == 0
    expected = unloaded(kind).value_at_reference
    if expected is not None and kind.needs_reference:
        torch.testing.assert_close(of_pairs(kind, given), torch.full((4,), expected, dtype=torch.float64))


@sampled
@property_test
@given(seed=seeds)
def test_at_the_reference_kl_is_zero_and_ratios_are_one(kind: type, seed: int):
    drawn = rollout(seed)
    drawn = drawn._replace(reference_logprobs=drawn.old_logprobs)
    for estimator in ("k1", "k2", "k3"):
        assert kl_estimate(drawn.old_logprobs, drawn.reference_logprobs, estimator).abs().max().item() == 0
    tight, loose = (sampler(kind, kl_coef=coefficient) for coefficient in (0.5, 0.25))
    given = update(tight, drawn)
    torch.testing.assert_close(tight.shape_rewards(drawn), loose.shape_rewards(drawn))
    torch.testing.assert_close(token_gradient(tight, given), token_gradient(loose, given))
    if isinstance(tight, CriticFreeModule):
        assert torch.equal(
            tight.ratio(given)[given.completion_mask], torch.ones_like(given.logprobs[given.completion_mask])
        )


# -- 4: ratio 1 -------------------------------------------------------------------------------------------------------


@sampled
@property_test
@given(seed=seeds)
def test_at_ratio_one_every_objective_has_reinforces_gradient(kind: type, seed: int):
    module, drawn = sampler(kind, kl_coef=0.0), rollout(seed)
    if isinstance(module, CriticFreeModule):
        assert module.kl_loss(update(module, drawn)) is None
    given = update(module, drawn)._replace(advantages=torch.where(drawn.completion_mask, normal(seed + 7, 6, 5), 0.0))
    torch.testing.assert_close(token_gradient(module, given, aggregated=False), -given.advantages)


# -- 5: exchanging the completions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in PAIRED if kind.weighs_rows], ids=lambda kind: kind.__name__)
@property_test
@given(seed=seeds)
def test_swapping_completions_with_opposite_label_keeps_the_loss(kind: type, seed: int):
    given = pairs(seed, kind)
    torch.testing.assert_close(given.swapped().margin, -given.margin)
    torch.testing.assert_close(of_pairs(kind, given.swapped()), of_pairs(kind, given))


@pytest.mark.parametrize("kind", [RewardModule, PlackettLuceModule])
@property_test
@given(seed=seeds)
def test_swapping_scores_changes_the_pair_loss_by_their_difference(kind: type, seed: int):
    scores, group, ranks = normal(seed, 6), torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 1] * 3)
    ones, zeros = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    module = unloaded(kind)
    kept, swapped = (
        as_loss(module.ranking_loss(RankedScores(scores, group, order, ones, zeros, ones))).values
        for order in (ranks, 1 - ranks)
    )
    torch.testing.assert_close(kept - swapped, scores[1::2] - scores[::2])


# -- 6: baselines -----------------------------------------------------------------------------------------------------

CENTRED = ("CriticFreeModule", "GRPOModule", "DrGRPOModule", "DAPOModule", "LitePPOModule", "GSPOModule", "CISPOModule")


@pytest.mark.parametrize(
    "kind", [k for k in SAMPLED if k.__name__ in (*CENTRED, "RLOOModule")], ids=lambda k: k.__name__
)
@property_test
@given(seed=seeds, samples=st.integers(2, 5))
def test_group_advantages_sum_to_zero(kind: type, seed: int, samples: int):
    module, drawn = sampler(kind), rollout(seed, samples=samples)
    rewards = module.shape_rewards(drawn).sum(-1)
    advantages = module.episode_advantages(rewards, drawn).view(2, samples)
    torch.testing.assert_close(advantages.sum(-1), torch.zeros(2, dtype=torch.float64), atol=1e-9, rtol=0)
    assert advantages.abs().max().item() > 0


@property_test
@given(seed=seeds, samples=st.integers(2, 5))
def test_leave_one_out_scales_advantages_by_g_over_g_minus_one(seed: int, samples: int):
    drawn = rollout(seed, samples=samples)
    plain, left_out = sampler(CriticFreeModule, kl_coef=0.1), sampler(RLOOModule, kl_coef=0.1)
    rewards = plain.shape_rewards(drawn).sum(-1)
    expected = samples / (samples - 1) * plain.episode_advantages(rewards, drawn)
    torch.testing.assert_close(left_out.episode_advantages(rewards, drawn), expected)


@property_test
@given(seed=seeds, shift=st.floats(-5, 5))
def test_a_greedy_baseline_is_subtracted_once(seed: int, shift: float):
    drawn, module = rollout(seed), sampler(ReMaxModule)
    rewards = module.shape_rewards(drawn).sum(-1)
    higher = drawn._replace(baseline_scores=drawn.baseline_scores + shift)
    torch.testing.assert_close(
        module.episode_advantages(rewards, higher), module.episode_advantages(rewards, drawn) - shift
    )


# -- 7: generalised advantages ----------------------------------------------------------------------------------------


@property_test
@given(seed=seeds)
def test_gae_lambda_one_gives_rewards_to_go_and_zero_gives_td_errors(seed: int):
    drawn = rollout(seed)
    module = sampler(PPOModule, whiten_advantages=False, lam=1.0)
    rewards, mask = module.shape_rewards(drawn), drawn.completion_mask
    other = drawn._replace(values=torch.where(mask, normal(seed + 9, *mask.shape), 0.0))
    to_go = torch.where(mask, rewards.flip(-1).cumsum(-1).flip(-1), 0.0)
    for one in (drawn, other):
        found = module.advantages(one, rewards)
        torch.testing.assert_close(found.returns, to_go)
        torch.testing.assert_close(found.advantages, to_go - one.values)
    errors, _ = generalized_advantages(rewards, drawn.values, mask, 1.0, 0.0)
    one_step = sampler(PPOModule, whiten_advantages=False, lam=0.0).advantages(drawn, rewards).advantages
    following = F.pad(drawn.values[:, 1:], (0, 1))
    torch.testing.assert_close(one_step, torch.where(mask, rewards + following - drawn.values, 0.0))
    torch.testing.assert_close(one_step, errors)


# -- 8: limits --------------------------------------------------------------------------------------------------------


@property_test
@given(seed=seeds, groups=st.integers(1, 4))
def test_plackett_luce_of_two_equals_bradley_terry(seed: int, groups: int):
    ones, zeros = torch.ones(groups, dtype=torch.float64), torch.zeros(groups, dtype=torch.float64)
    given = RankedScores(
        normal(seed, 2 * groups), torch.arange(groups).repeat_interleave(2), torch.tensor([0, 1]).repeat(groups),
        ones, zeros, ones,
    )  # fmt: skip
    luce, terry = (as_loss(unloaded(kind).ranking_loss(given)).values for kind in (PlackettLuceModule, RewardModule))
    torch.testing.assert_close(luce, terry)


@property_test
@given(seed=seeds)
def test_jensen_shannon_at_one_half_is_symmetric(seed: int):
    student, teacher = normal(seed, 3, 5), normal(seed + 1, 3, 5)
    torch.testing.assert_close(generalized_jsd(student, teacher, 0.5), generalized_jsd(teacher, student, 0.5))


@sampled
@property_test
@given(seed=seeds, moved=st.sampled_from([0.0, 0.3, -0.3, 50.0, -50.0]))
def test_a_row_without_tokens_leaves_everything_finite(kind: type, seed: int, moved: float):
    module, drawn = sampler(kind), rollout(seed)
    alive = (torch.arange(6) != seed % 6).unsqueeze(-1)
    mask = drawn.completion_mask & alive
    grids = ("old_logprobs", "reference_logprobs", "values", "behaviour_logprobs")
    emptied = {name: torch.where(mask, getattr(drawn, name), 0.0) for name in grids}
    drawn = drawn._replace(completion_mask=mask, **emptied)
    given = update(module, drawn, moved)
    slopes, weights = token_gradient(module, given), module.aggregation(mask).weights
    for found in (module.shape_rewards(drawn), given.advantages, slopes, weights):
        assert found.isfinite().all()
    assert slopes[seed % 6].abs().sum().item() == 0
    assert weights[seed % 6].abs().sum().item() == 0
