import pytest
import torch
import torch.nn.functional as F
from conftest import refused
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.functional.logprobs import kl_k1
from rlhf_lightning.functional.policy_gradient import (
    adapted_kl_coef,
    approx_kl,
    clipped_value_loss,
    discounted_returns,
    generalized_advantages,
    last_turn_lengths,
    missing_eos_scores,
    rewards_after_end,
    token_rewards,
    value_clip_fraction,
)

from .worked import Worked, check, each, gradient, normal, property_test, right_padded_mask

POLICY, REFERENCE = [[-1, -0.5, -2]], [[-1.2, -0.4, -2.05]]
REWARDS, VALUES = [[-0.01, 0.005, 0.9975]], [[0.3, 0.4, 0.6]]
RETURNS = [[0.94349375, 0.982625, 0.9975]]
OLD, NEW = [[-1, -0.5, -2]], [[-0.7, -0.6, -2.4]]
NEW_VALUES = [[0.6, 0.45, 0.3]]
MASK = torch.ones(1, 3, dtype=torch.bool)


def rewards(t):
    return token_rewards(t([1.0]), kl_k1(t(POLICY), t(REFERENCE)), MASK, 0.05)


def after_end(t):
    rewards, mask = rewards_after_end(t([1.0]), kl_k1(t(POLICY), t(REFERENCE)), MASK, 0.05)
    return generalized_advantages(rewards, t([[0.3, 0.4, 0.6, 0.8]]), mask)


def value_inputs(t):
    return t(NEW_VALUES), t(VALUES), t(RETURNS)


WORKED = [
    Worked("token rewards", rewards, REWARDS),
    Worked(
        "td errors", lambda t: generalized_advantages(rewards(t), t(VALUES), MASK, lam=0.0)[0], [[0.09, 0.205, 0.3975]]
    ),
    Worked(
        "advantages", lambda t: generalized_advantages(rewards(t), t(VALUES), MASK)[0], [[0.64349375, 0.582625, 0.3975]]
    ),
    Worked(
        "advantages, lambda by episode",
        lambda t: generalized_advantages(rewards(t), t(VALUES), MASK, lam=t([0.95]))[0],
        [[0.64349375, 0.582625, 0.3975]],
    ),
    Worked("returns", lambda t: generalized_advantages(rewards(t), t(VALUES), MASK)[1], RETURNS),
    Worked("advantages after end", lambda t: after_end(t)[0], [[0.63446875, 0.573125, 0.3875, 0.2]]),
    Worked("returns after end", lambda t: after_end(t)[1], [[0.93446875, 0.973125, 0.9875, 1.0]]),
    Worked("rewards to go", lambda t: discounted_returns(t(REWARDS), MASK), [[0.9925, 1.0025, 0.9975]]),
    Worked("approximate kl", lambda t: approx_kl(t(NEW), t(OLD)).mean(), 0.04333333),
    Worked("value loss", lambda t: clipped_value_loss(*value_inputs(t)).mean(), 0.16114706),
    Worked("value clip fraction", lambda t: value_clip_fraction(*value_inputs(t)).mean(), 0.33333333),
    Worked("kl coefficient rises", lambda t: adapted_kl_coef(t(0.15), t(9.0), 6, 10_000, 256), 0.150768),
    Worked("kl coefficient falls", lambda t: adapted_kl_coef(t(0.15), t(3.0), 6, 10_000, 256), 0.149232),
]


@each(WORKED)
def test_worked_number(case, dtype):
    check(case, dtype)


# --- rewards ---------------------------------------------------------------------------------------------------------


def test_the_score_is_added_to_the_last_completion_token():
    mask = torch.tensor([[True, True, False], [True, True, True], [True, False, True], [False, False, False]])
    kl = torch.tensor([[0.1, 0.2, float("nan")], [0.1, 0.2, 0.3], [0.1, float("nan"), 0.3], [float("nan")] * 3])
    found = token_rewards(torch.tensor([1.0, 2.0, 3.0, 4.0]), kl, mask, kl_coef=1.0)
    torch.testing.assert_close(
        found, torch.tensor([[-0.1, 0.8, 0.0], [-0.1, -0.2, 1.7], [-0.1, 0.0, 2.7], [0.0, 0.0, 0.0]])
    )


def test_after_eos_the_score_has_its_own_position():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    found, states = rewards_after_end(torch.tensor([1.0, 2.0]), torch.full((2, 3), 0.5), mask, kl_coef=0.2)
    torch.testing.assert_close(found, torch.tensor([[-0.1, -0.1, 1.0, 0.0], [-0.1, -0.1, -0.1, 2.0]]))
    assert states.tolist() == [[True, True, True, False], [True] * 4]


def test_missing_eos_penalty_and_score_apply_to_unfinished_completions():
    scores, finished = torch.tensor([2.0, 2.0]), torch.tensor([True, False])
    assert missing_eos_scores(scores, finished).tolist() == [2, 2]
    assert missing_eos_scores(scores, finished, penalty=1.5).tolist() == [2, 0.5]
    assert missing_eos_scores(scores, finished, replacement=-1.0).tolist() == [2, -1]
    assert missing_eos_scores(scores, finished, penalty=0.0).tolist() == [2, 2]
    with refused("conflicting-settings", "penalty is 1.0 and replacement -1.0: give one of them"):
        missing_eos_scores(scores, finished, 1.0, -1.0)


def test_mismatched_row_counts_are_refused():
    with refused("shape-mismatch", "scores (1,), rows_of_mask (2,)"):
        token_rewards(torch.ones(1), torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), 0.1)


@pytest.mark.parametrize(("kl", "expected"), [(6.0, 0.15), (7.2, 0.150768), (1e6, 0.150768), (4.8, 0.149232)])
def test_the_kl_controller_clips_its_error_at_0_2(kl, expected):
    torch.testing.assert_close(float(adapted_kl_coef(0.15, kl, 6, 10_000, 256)), expected, rtol=1e-6, atol=0)


# --- advantages ------------------------------------------------------------------------------------------------------

seeds = st.integers(0, 2**31)


def masked(seed, rows, length, mask):
    return torch.where(mask, normal(seed, rows, length), 0.0)


@property_test
@given(seed=seeds, rows=st.integers(1, 4), length=st.integers(1, 6))
def test_gae_lambda_one_ignores_the_critic_and_zero_is_one_step(seed, rows, length):
    mask = right_padded_mask(seed, rows, length)
    rewards, values = masked(seed, rows, length, mask), masked(seed + 1, rows, length, mask)
    to_go = rewards.flip(-1).cumsum(-1).flip(-1)
    advantages, returns = generalized_advantages(rewards, values, mask, gamma=1.0, lam=1.0)
    torch.testing.assert_close(returns, torch.where(mask, to_go, 0.0))
    torch.testing.assert_close(advantages, torch.where(mask, to_go - values, 0.0))
    torch.testing.assert_close(discounted_returns(rewards, mask), returns)
    one_step, _ = generalized_advantages(rewards, values, mask, gamma=0.9, lam=0.0)
    following = F.pad(values[:, 1:], (0, 1))
    torch.testing.assert_close(one_step, torch.where(mask, rewards + 0.9 * following - values, 0.0))


@property_test
@given(seed=seeds, rows=st.integers(1, 4), length=st.integers(1, 6), pads=st.integers(1, 3))
def test_padding_values_do_not_change_advantages(seed, rows, length, pads):
    mask = right_padded_mask(seed, rows, length)
    rewards, values = normal(seed, rows, length), normal(seed + 1, rows, length)
    expected = generalized_advantages(rewards, values, mask, 0.9, 0.8)
    wide = [F.pad(x, (0, pads), value=float("nan")) for x in (rewards, values)]
    found = generalized_advantages(*wide, F.pad(mask, (0, pads)), 0.9, 0.8)
    for wide_result, result in zip(found, expected, strict=True):
        torch.testing.assert_close(wide_result, F.pad(result, (0, pads)))


@property_test
@given(seed=seeds, hole=st.integers(0, 4))
def test_masked_tokens_inside_a_row_are_skipped(seed, hole):
    rewards, values = normal(seed, 2, 5), normal(seed + 1, 2, 5)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[:, hole] = False
    kept = [t for t in range(5) if t != hole]
    found = generalized_advantages(rewards, values, mask, 0.9, 0.8)
    expected = generalized_advantages(rewards[:, kept], values[:, kept], mask[:, kept], 0.9, 0.8)
    for with_hole, without in zip(found, expected, strict=True):
        torch.testing.assert_close(with_hole[:, kept], without)
        assert with_hole[:, hole].abs().max().item() == 0


@property_test
@given(seed=seeds)
def test_generalized_advantages_are_discounted_sums_of_td_errors(seed):
    gamma, lam, length = 0.9, 0.7, 5
    rewards, values = normal(seed, 1, length), normal(seed + 1, 1, length)
    mask = torch.ones(1, length, dtype=torch.bool)
    delta = rewards + gamma * F.pad(values[:, 1:], (0, 1)) - values
    powers = torch.tensor([[(gamma * lam) ** (s - t) if s >= t else 0.0 for s in range(length)] for t in range(length)])
    found, _ = generalized_advantages(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(found[0], powers.double() @ delta[0])


# --- losses ----------------------------------------------------------------------------------------------------------


def test_before_any_update_ratios_are_one_and_kl_is_zero():
    logprobs = normal(0, 2, 3)
    assert approx_kl(logprobs, logprobs).sum().item() == 0


def test_the_last_turn_is_the_last_run_of_the_mask():
    masks = [[1, 1, 0, 0, 1, 0, 1, 1], [1, 0, 1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0], [0] * 8]
    assert last_turn_lengths(torch.tensor(masks, dtype=torch.bool)).tolist() == [2, 1, 3, 0]


def test_clipped_value_loss_takes_the_maximum():
    values, old, returns = torch.tensor([[1.0]]), torch.tensor([[0.0]]), torch.tensor([[2.0]])
    torch.testing.assert_close(clipped_value_loss(values, old, returns, clip=0.2).item(), 0.5 * 1.8**2)
    torch.testing.assert_close(clipped_value_loss(values, old, returns, clip=None).item(), 0.5)
    (slope,) = gradient(lambda v: clipped_value_loss(v, old, returns, clip=0.2), values)
    assert slope.item() == 0  # already moved far enough towards the return in this rollout
    (slope,) = gradient(lambda v: clipped_value_loss(v, old, returns, clip=0.2), -values)
    assert slope.item() == -3  # moved in the wrong direction: full gradient
