import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.functional.preference import dpo_loss
from rlhf_lightning.functional.reference_free import (
    cpo_loss,
    log_odds_ratio,
    orpo_loss,
    reference_free_dpo_loss,
    simpo_loss,
)

from .worked import Worked, check, each, gradient, normal, property_test

CHOSEN, REJECTED = [-10, -13, -7], [-11, -12.6, -7.6]
CHOSEN_LENGTHS, REJECTED_LENGTHS = torch.tensor([5, 6, 4]), torch.tensor([5, 4, 8])


def pairs(t):
    return t(CHOSEN), t(REJECTED)


def pairs_and_lengths(t):
    return t(CHOSEN), t(REJECTED), CHOSEN_LENGTHS, REJECTED_LENGTHS


WORKED = [
    Worked("reference-free", lambda t: reference_free_dpo_loss(*pairs(t), 0.1).mean(), 0.67378031),
    Worked("simpo", lambda t: simpo_loss(*pairs_and_lengths(t), 2.0, 1.0).mean(), 1.34382294),
    Worked("log odds ratio", lambda t: log_odds_ratio(*pairs_and_lengths(t)), [0.22797681, 1.06120523, -1.09808109]),
    Worked("orpo", lambda t: orpo_loss(*pairs_and_lengths(t), 0.1).mean(), 2.04784566),
    Worked("cpo", lambda t: cpo_loss(*pairs(t), CHOSEN_LENGTHS.double().mean().expand(3), 0.1).mean(), 2.67378031),
]


@each(WORKED)
def test_worked_number(case, dtype):
    check(case, dtype)


LOSSES = {
    "reference-free": lambda c, r: reference_free_dpo_loss(c, r),
    "simpo": lambda c, r: simpo_loss(c, r, CHOSEN_LENGTHS, REJECTED_LENGTHS),
    "orpo": lambda c, r: orpo_loss(c, r, CHOSEN_LENGTHS, REJECTED_LENGTHS),
    "cpo": lambda c, r: cpo_loss(c, r, CHOSEN_LENGTHS),
}


@pytest.mark.parametrize("name", LOSSES)
def test_chosen_is_pushed_up_and_rejected_down(name):
    chosen, rejected = torch.tensor(CHOSEN, dtype=torch.float64), torch.tensor(REJECTED, dtype=torch.float64)
    up, down = gradient(LOSSES[name], chosen, rejected)
    assert (up < 0).all()
    assert (down > 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_certain_and_impossible_completions_stay_finite(name):
    chosen, rejected = torch.tensor([0.0, -5e3, 0.0]), torch.tensor([-5e3, 0.0, 0.0])
    assert LOSSES[name](chosen, rejected).isfinite().all()
    assert all(slope.isfinite().all() for slope in gradient(LOSSES[name], chosen, rejected))


@property_test
@given(seed=st.integers(0, 2**31), gamma=st.floats(0, 3))
def test_simpo_is_dpo_on_means_with_a_shifted_margin(seed, gamma):
    chosen, rejected = -normal(seed, 3).abs() * 9, -normal(seed + 1, 3).abs() * 9
    means = chosen / CHOSEN_LENGTHS - rejected / REJECTED_LENGTHS
    found = simpo_loss(chosen, rejected, CHOSEN_LENGTHS, REJECTED_LENGTHS, beta=2.0, gamma=gamma)
    torch.testing.assert_close(found, dpo_loss(means - gamma / 2, 2.0))


def test_values_where_both_sides_are_alike():
    same, lengths = torch.tensor([-6.0], dtype=torch.float64), torch.tensor([4])
    torch.testing.assert_close(simpo_loss(same, same, lengths, lengths).item(), math.log1p(math.e))
    assert log_odds_ratio(same, same, lengths, lengths).item() == 0
    torch.testing.assert_close(orpo_loss(same, same, lengths, lengths).item(), 1.5 + 0.1 * math.log(2))
    torch.testing.assert_close(cpo_loss(same, same, lengths).item(), 1.5 + math.log(2))


def test_log_odds_against_probabilities():
    chosen, rejected = torch.tensor([0.9]).double().log() * 3, torch.tensor([0.2]).double().log() * 2
    found = log_odds_ratio(chosen, rejected, torch.tensor([3]), torch.tensor([2]))
    torch.testing.assert_close(found.item(), math.log((0.9 / 0.1) / (0.2 / 0.8)))
