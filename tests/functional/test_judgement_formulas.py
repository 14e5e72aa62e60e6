"""Test formulas of constraints, groups of parts, turns, cost and variance models, and routers by worked numbers."""

import math

import pytest
import torch

from rlhf_lightning.functional.logprobs import load_balancing_loss
from rlhf_lightning.functional.policy_gradient import (
    constrained_scores,
    group_means,
    lagrange_multiplier,
    pid_multiplier,
    standardised_in_groups,
    turn_discounts,
    turn_returns,
)
from rlhf_lightning.functional.ranking import cost_sign_loss, thurstone_loss


def test_constrained_score_subtracts_weighted_costs_and_is_rescaled():
    found = constrained_scores(torch.tensor([2.0, 1.0]), [torch.tensor([1.0, 0.0])], [3.0])
    torch.testing.assert_close(found, torch.tensor([(2 - 3) / 4, 1 / 4]))


def test_multipliers_follow_the_excess_within_bounds():
    assert lagrange_multiplier(2.0, 0.5, 0.1) == pytest.approx(2 * math.exp(0.05))
    assert lagrange_multiplier(2.0, 1e9, 1.0, largest=10.0) == pytest.approx(10.0)
    assert lagrange_multiplier(2.0, -1e9, 1.0, largest=10.0) == pytest.approx(0.1)
    assert pid_multiplier(1.0, 0.5, 0.2, 2.0, 0.1, 3.0) == pytest.approx((2 * 0.5 + 1.05 + 3 * 0.2, 1.05))
    assert pid_multiplier(1.0, -2.0, -1.0, 0.0, 1.0, 3.0) == (0.0, 0.0)


def test_missing_values_are_left_out_of_means():
    found = group_means(torch.tensor([1.0, 3.0, torch.nan, torch.nan, 5.0]), torch.tensor([0, 0, 0, 1, 2]))
    torch.testing.assert_close(found, torch.tensor([2.0, 5.0]))


def test_parts_are_standardised_per_group():
    values = torch.tensor([1.0, 3.0, 5.0, 7.0, torch.nan])
    found = standardised_in_groups(values, torch.tensor([0, 0, 1, 1, 1]), epsilon=0.0)
    half = 1 / math.sqrt(2)
    torch.testing.assert_close(found, torch.tensor([-half, half, -half, half, torch.nan]), equal_nan=True)


def test_discounts_apply_at_the_ends_of_turns():
    mask = torch.tensor([[True, True, False, True, False]])
    torch.testing.assert_close(turn_discounts(mask, 0.5, 0.9), torch.tensor([[0.9, 0.45, 0.9, 0.45, 0.9]]))
    returns, turn = turn_returns(torch.tensor([[0.0, 1.0, 0.0, 4.0, 0.0]]), mask, gamma=0.5)
    torch.testing.assert_close(returns, torch.tensor([[1 + 0.5 * 4, 4.0]]))
    assert turn[mask].tolist() == [0, 0, 1]


def test_cost_loss_treats_negative_costs_as_safe():
    found = cost_sign_loss(torch.tensor([0.0, -2.0, -2.0]), torch.tensor([1.0, 1.0, 0.0]))
    torch.testing.assert_close(found, torch.tensor([math.log(2), math.log1p(math.exp(-2)), math.log1p(math.exp(2))]))


def test_preference_probability_of_normal_scores_by_hand():
    zero, log3 = torch.zeros(1), torch.tensor([math.log(3.0)])
    torch.testing.assert_close(thurstone_loss(zero, zero, zero, log3), torch.tensor([math.log(2)]))
    z = 1.0 / math.sqrt(1 + 3)  # the variances add
    expected = -math.log(0.5 * math.erfc(-z / math.sqrt(2)))
    torch.testing.assert_close(thurstone_loss(zero + 1, zero, zero, log3), torch.tensor([expected]))


def test_load_balancing_loss_of_balanced_and_collapsed_routing():
    assert float(load_balancing_loss(torch.eye(4) * 1e-6, 1)) == pytest.approx(1.0, abs=1e-5)
    alone = torch.tensor([[50.0, 0.0], [50.0, 0.0], [0.0, 50.0]])
    assert float(load_balancing_loss(alone, 1, torch.tensor([True, True, False]))) == pytest.approx(2.0)
