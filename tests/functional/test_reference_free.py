import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from .pair_losses import certain_pairs, dpo_loss, loss_of, unloaded
from .worked import Worked, check, each, gradient, normal, property_test


def log_odds_ratio(*given):
    """Return the difference of ORPO's implicit rewards."""
    return unloaded("ORPOModule").reward_margin(certain_pairs(*given))


CHOSEN, REJECTED = [-10, -13, -7], [-11, -12.6, -7.6]
CHOSEN_LENGTHS, REJECTED_LENGTHS = torch.tensor([5, 6, 4]), torch.tensor([5, 4, 8])


def pairs(t):
    return t(CHOSEN), t(REJECTED)


def pairs_and_lengths(t):
    return t(CHOSEN), t(REJECTED), CHOSEN_LENGTHS, REJECTED_LENGTHS


WORKED = [
    Worked("reference-free", lambda t: loss_of("ReferenceFreeDPOModule", beta=0.1)(*pairs(t)).mean(), 0.67378031),
    Worked("simpo", lambda t: loss_of("SimPOModule", beta=2.0, gamma=1.0)(*pairs_and_lengths(t)).mean(), 1.34382294),
    Worked("log odds ratio", lambda t: log_odds_ratio(*pairs_and_lengths(t)), [0.22797681, 1.06120523, -1.09808109]),
    Worked("orpo", lambda t: loss_of("ORPOModule", weight=0.1)(*pairs_and_lengths(t)).mean(), 2.04784566),
    Worked(
        "cpo",
        lambda t: loss_of("CPOModule", beta=0.1)(*pairs(t), CHOSEN_LENGTHS.double().mean().expand(3)).mean(),
        2.67378031,
    ),
]


@each(WORKED)
def test_worked_number(case, dtype):
    check(case, dtype)


LOSSES = {
    "reference-free": loss_of("ReferenceFreeDPOModule"),
    "simpo": lambda c, r: loss_of("SimPOModule")(c, r, CHOSEN_LENGTHS, REJECTED_LENGTHS),
    "orpo": lambda c, r: loss_of("ORPOModule")(c, r, CHOSEN_LENGTHS, REJECTED_LENGTHS),
    "cpo": lambda c, r: loss_of("CPOModule")(c, r, CHOSEN_LENGTHS),
}


@pytest.mark.parametrize("name", LOSSES)
def test_chosen_is_pushed_up_and_rejected_down(name):
    chosen, rejected = torch.tensor(CHOSEN, dtype=torch.float64), torch.tensor(REJECTED, dtype=torch.float64)
    up, down = gradient(LOSSES[name], chosen, rejected)
    assert (up < 0).all()
    assert (down > 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_completions_of_probability_0_and_1_give_finite_losses(name):
    chosen, rejected = torch.tensor([0.0, -5e3, 0.0]), torch.tensor([-5e3, 0.0, 0.0])
    assert LOSSES[name](chosen, rejected).isfinite().all()
    assert all(slope.isfinite().all() for slope in gradient(LOSSES[name], chosen, rejected))


@property_test
@given(seed=st.integers(0, 2**31), gamma=st.floats(0, 3))
def test_simpo_is_dpo_on_means_with_a_shifted_margin(seed, gamma):
    chosen, rejected = -normal(seed, 3).abs() * 9, -normal(seed + 1, 3).abs() * 9
    means = chosen / CHOSEN_LENGTHS - rejected / REJECTED_LENGTHS
    found = loss_of("SimPOModule", beta=2.0, gamma=gamma)(chosen, rejected, CHOSEN_LENGTHS, REJECTED_LENGTHS)
    torch.testing.assert_close(found, dpo_loss(means - gamma / 2, 2.0))


def test_loss_values_for_equal_sides():
    same, lengths = torch.tensor([-6.0], dtype=torch.float64), torch.tensor([4])
    torch.testing.assert_close(loss_of("SimPOModule")(same, same, lengths, lengths).item(), math.log1p(math.e))
    assert log_odds_ratio(same, same, lengths, lengths).item() == 0
    torch.testing.assert_close(loss_of("ORPOModule")(same, same, lengths, lengths).item(), 1.5 + 0.1 * math.log(2))
    torch.testing.assert_close(loss_of("CPOModule")(same, same, lengths).item(), 1.5 + math.log(2))


def test_log_odds_equal_those_computed_from_probabilities():
    chosen, rejected = torch.tensor([0.9]).double().log() * 3, torch.tensor([0.2]).double().log() * 2
    found = log_odds_ratio(chosen, rejected, torch.tensor([3]), torch.tensor([2]))
    torch.testing.assert_close(found.item(), math.log((0.9 / 0.1) / (0.2 / 0.8)))
