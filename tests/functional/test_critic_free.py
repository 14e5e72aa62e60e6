import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.functional.logprobs import masked_whiten
from rlhf_lightning.functional.policy_gradient import (
    greedy_advantages,
    group_deviation,
    group_mean_advantages,
    informative_groups,
    leave_one_out_advantages,
    over_tokens,
    overlong_penalty,
)

from .worked import Worked, check, each, normal, property_test

SCORES, GROUP = [1, 0, 0.5, 0], torch.zeros(4, dtype=torch.long)
TWO_GROUPS, GROUPS = [1, 0, 0.5, 0, 1, 1, 0, 1], torch.tensor([0] * 4 + [1] * 4)
EQUAL_LENGTHS = torch.ones(8, 3, dtype=torch.bool)


def standardised(scores, group, epsilon=1e-4, unbiased=True):
    return group_mean_advantages(scores, group) / (group_deviation(scores, group, unbiased) + epsilon)


def whitened(advantages):
    return masked_whiten(over_tokens(advantages, EQUAL_LENGTHS), EQUAL_LENGTHS)[:, 0]


WORKED = [
    Worked("grpo", lambda t: standardised(t(SCORES), GROUP), [1.30530975, -0.78318585, 0.26106195, -0.78318585]),
    Worked("dr. grpo", lambda t: group_mean_advantages(t(SCORES), GROUP), [0.625, -0.375, 0.125, -0.375]),
    Worked("rloo", lambda t: leave_one_out_advantages(t(SCORES), GROUP), [0.83333333, -0.5, 0.16666667, -0.5]),
    Worked("remax", lambda t: greedy_advantages(t(SCORES), t([0.4] * 4)), [0.6, -0.4, 0.1, -0.4]),
    Worked(
        "global whitening",
        lambda t: whitened(t(TWO_GROUPS))[:4],
        [0.94387979, -1.21355972, -0.13483997, -1.21355972],
    ),
    Worked(
        "reinforce++ baseline",
        lambda t: whitened(group_mean_advantages(t(TWO_GROUPS), GROUPS)),
        [1.47441952, -0.88465171, 0.29488390, -0.88465171, 0.58976781, 0.58976781, -1.76930342, 0.58976781],
    ),
    Worked("overlong", lambda t: overlong_penalty(t([79, 80, 90, 100, 130]), 100, 20), [0.0, 0.0, -0.5, -1.0, -1.0]),
]


@each(WORKED)
def test_worked_number(case, dtype):
    check(case, dtype)


seeds = st.integers(0, 2**31)
CENTRED = {"grpo": standardised, "dr. grpo": group_mean_advantages, "rloo": leave_one_out_advantages}
centred = pytest.mark.parametrize("name", CENTRED)


@centred
@property_test
@given(seed=seeds, size=st.integers(2, 5))
def test_group_advantages_sum_to_zero_and_ignore_a_constant(name, seed, size):
    scores, group = normal(seed, 3 * size), torch.arange(3).repeat(size)
    advantages = CENTRED[name](scores, group)
    sums = torch.zeros(3, dtype=torch.float64).index_add(0, group, advantages)
    torch.testing.assert_close(sums, torch.zeros_like(sums), atol=1e-9, rtol=0)
    torch.testing.assert_close(CENTRED[name](scores + 7, group), advantages)


@centred
def test_equal_scores_give_exactly_zero(name):
    scores = torch.tensor([0.1, 0.1, 0.1, 5.0, 6.0])
    assert CENTRED[name](scores, torch.tensor([0, 0, 0, 1, 1]))[:3].tolist() == [0, 0, 0]


@centred
def test_an_unscored_sample_has_advantage_zero_and_does_not_enter_the_baseline(name):
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    scores = torch.tensor([1.0, float("nan"), 0.0, 2.0, 2.5, float("nan")], dtype=torch.float64)
    found, kept = CENTRED[name](scores, group), ~scores.isnan()
    torch.testing.assert_close(found[kept], CENTRED[name](scores[kept], group[kept]))
    assert found[~kept].tolist() == [0, 0]
    nothing = CENTRED[name](torch.full((3,), float("nan")), torch.zeros(3, dtype=torch.long))
    assert nothing.tolist() == [0, 0, 0]


@centred
def test_a_group_of_one_has_advantage_zero(name):
    assert CENTRED[name](torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0, 1, 1]))[0].item() == 0


@property_test
@given(seed=seeds, size=st.integers(2, 6))
def test_leave_one_out_is_score_minus_the_mean_of_the_others(seed, size):
    scores, group = normal(seed, size), torch.zeros(size, dtype=torch.long)
    by_hand = torch.stack([scores[i] - torch.cat([scores[:i], scores[i + 1 :]]).mean() for i in range(size)])
    found = leave_one_out_advantages(scores, group)
    torch.testing.assert_close(found, by_hand)
    torch.testing.assert_close(found, size / (size - 1) * group_mean_advantages(scores, group))


def test_group_standard_deviations_by_hand():
    scores, group = torch.tensor([0.0, 2.0, 10.0, 14.0], dtype=torch.float64), torch.tensor([0, 0, 1, 1])
    torch.testing.assert_close(group_deviation(scores, group), torch.tensor([2, 2, 8, 8]).double().sqrt())
    torch.testing.assert_close(group_deviation(scores, group, unbiased=False), torch.tensor([1, 1, 2, 2]).double())
    torch.testing.assert_close(
        standardised(scores, group, epsilon=0.0), torch.tensor([-1, 1, -1, 1]).double() / math.sqrt(2)
    )


def test_only_groups_whose_scores_differ_are_informative():
    scores = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, float("nan"), float("nan"), float("nan")])
    group = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    assert informative_groups(scores, group).tolist() == [True, False, False, False]
