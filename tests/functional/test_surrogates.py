import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.functional.policy_gradient import over_tokens
from rlhf_lightning.functional.surrogates import (
    cispo_loss,
    clip_fractions,
    clipped_surrogate_loss,
    geometric_sequence_ratio,
    over_sequence,
    policy_ratio,
    reinforce_loss,
    sequence_mean_token_mean,
    sequence_mean_token_sum,
    sequence_ratio,
    soft_gate_loss,
    token_mean,
    token_ratio,
)

from .worked import Worked, check, each, gradient, normal, property_test, right_padded_mask

OLD, NEW, ADVANTAGES = [[-1, -0.5, -2]], [[-0.7, -0.6, -2.4]], [[1, -0.5, -1]]
LOG_RATIOS, MASK = [[0.1, -0.2, 0.3]], torch.ones(1, 3, dtype=torch.bool)
seeds = st.integers(0, 2**31)


def no_change(t):
    return torch.zeros_like(t(LOG_RATIOS))


def policy_losses(t):
    return clipped_surrogate_loss(token_ratio(t(NEW), t(OLD)), t(ADVANTAGES))


def surrogate(t, clip_high=None):
    ratio = token_ratio(t(LOG_RATIOS), no_change(t))
    return clipped_surrogate_loss(ratio, torch.ones_like(ratio), 0.2, None, clip_high)


def gspo(t):
    ratio = geometric_sequence_ratio(t(LOG_RATIOS), no_change(t), MASK)
    return clipped_surrogate_loss(ratio, torch.ones_like(ratio), 3e-4, clip_high=4e-4)


def cispo(t):
    now, log_ratios = t([[-1, -0.5, -2]]), t([[1, -0.2, 0.3]])
    return cispo_loss(token_ratio(now, now - log_ratios), now, torch.ones_like(now), high=2.0)


def fractions(t, name):
    return clip_fractions(token_ratio(t(NEW), t(OLD)), t(ADVANTAGES))[name].mean()


WORKED = [
    Worked("ratio", lambda t: token_ratio(t(NEW), t(OLD)), [[1.34985881, 0.90483742, 0.67032005]]),
    Worked("token ratio", lambda t: token_ratio(t(LOG_RATIOS), no_change(t)), [[1.10517092, 0.81873075, 1.34985881]]),
    Worked("geometric ratio", lambda t: geometric_sequence_ratio(t(LOG_RATIOS), no_change(t), MASK), [1.06893911]),
    Worked("product ratio", lambda t: sequence_ratio(t(LOG_RATIOS), no_change(t), MASK), [1.22140276]),
    Worked("policy losses", policy_losses, [[-1.2, 0.45241871, 0.8]]),
    Worked("policy loss", lambda t: policy_losses(t).mean(), 0.01747290),
    Worked("clip fraction", lambda t: fractions(t, "clip_fraction"), 0.66666667),
    Worked("clip fraction below", lambda t: fractions(t, "clip_fraction_low"), 0.33333333),
    Worked("clip fraction above", lambda t: fractions(t, "clip_fraction_high"), 0.33333333),
    Worked("dual clip", lambda t: clipped_surrogate_loss(t([4.0]), t([-1.0]), dual_clip=3.0), [3.0]),
    Worked("grpo loss", lambda t: sequence_mean_token_mean(MASK).weighted_sum(surrogate(t)), -1.04130056),
    Worked("dapo loss", lambda t: surrogate(t, clip_high=0.28).mean(), -1.06796722),
    Worked("gspo loss", lambda t: gspo(t).mean(), -1.0004),
    Worked("cispo loss", lambda t: cispo(t).mean(), 1.70302766),
    Worked(
        "soft gate",
        lambda t: soft_gate_loss(t([1.3, 0.6, 1.0]), t([1.0, -1.0, 1.0])),
        [-2.29777007, 1.51054, -2.0],
    ),
]


@each(WORKED)
def test_worked_number(case, dtype):
    check(case, dtype) if case.name != "soft gate" else check_printed(case, dtype)


def check_printed(case, dtype):
    """Check a value that is printed to 6 digits."""
    found = case.compute(lambda x: torch.tensor(x, dtype=dtype)).double()
    torch.testing.assert_close(found, torch.tensor(case.expected).double(), rtol=0, atol=5e-6)


OBJECTIVES = {
    "clip": lambda ratio, lp, a: clipped_surrogate_loss(ratio, a),
    "soft gate": lambda ratio, lp, a: soft_gate_loss(ratio, a),
    "cispo": cispo_loss,
    "cispo, two bounds": lambda ratio, lp, a: cispo_loss(ratio, lp, a, 1.2, 0.8),
    "reinforce": lambda ratio, lp, a: reinforce_loss(lp, a),
}


@pytest.mark.parametrize("aggregate", [token_mean, sequence_mean_token_mean, sequence_mean_token_sum])
@pytest.mark.parametrize("name", OBJECTIVES)
@property_test
@given(seed=seeds, rows=st.integers(1, 3), length=st.integers(1, 5))
def test_at_ratio_one_every_objective_has_the_policy_gradient(name, aggregate, seed, rows, length):
    mask = right_padded_mask(seed, rows, length)
    logprobs = torch.where(mask, normal(seed, rows, length), 0.0)
    advantages = torch.where(mask, normal(seed + 1, rows, length), 0.0)
    weighted = aggregate(mask)

    def loss(lp):
        return weighted.weighted_sum(OBJECTIVES[name](token_ratio(lp, logprobs), lp, advantages))

    (slope,) = gradient(loss, logprobs)
    torch.testing.assert_close(slope, -advantages * weighted.weights)
    assert slope[~mask].abs().sum().item() == 0


@property_test
@given(seed=seeds)
def test_a_ratio_over_tokens_has_the_gradient_of_the_sequence_ratio(seed):
    mask = right_padded_mask(seed, 3, 4)
    old = torch.where(mask, normal(seed, 3, 4), 0.0)
    now = torch.where(mask, old + 0.3 * normal(seed + 1, 3, 4), 0.0)
    advantages = normal(seed + 2, 3)
    kinds = {
        "sequence": (geometric_sequence_ratio, sequence_mean_token_mean),
        "sequence_product": (sequence_ratio, sequence_mean_token_sum),
    }
    for name, (of_sequence, aggregate) in kinds.items():

        def by_sequence(lp, of_sequence=of_sequence):
            return clipped_surrogate_loss(of_sequence(lp, old, mask), advantages, 0.2).sum()

        def by_token(lp, name=name, aggregate=aggregate):
            losses = clipped_surrogate_loss(policy_ratio(name, lp, old, mask), over_tokens(advantages, mask), 0.2)
            return aggregate(mask).weighted_sum(losses)

        torch.testing.assert_close(gradient(by_token, now), gradient(by_sequence, now))


def test_ratio_levels_by_hand():
    old = torch.tensor([[-1.0, -2.0, 0.0]], dtype=torch.float64)
    now = torch.tensor([[-0.9, -2.2, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False]])
    assert policy_ratio("token", now, old, mask).tolist() == token_ratio(now, old).tolist()
    assert policy_ratio("none", now, old, mask).tolist() == [[1, 1, 1]]
    torch.testing.assert_close(
        policy_ratio("sequence", now, old, mask), torch.tensor([[math.exp(-0.05)] * 2 + [1]], dtype=torch.float64)
    )
    product = over_sequence(sequence_ratio(now, old, mask), now, mask)
    torch.testing.assert_close(product, torch.tensor([[math.exp(-0.1)] * 2 + [1]], dtype=torch.float64))
    torch.testing.assert_close(policy_ratio("sequence_product", now, old, mask), product)
    (slope,) = gradient(lambda lp: policy_ratio("none", lp, old, mask), now)
    assert slope.tolist() == [[1, 1, 1]]


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "slope"),
    [
        (0.5, 1.0, 0.0),  # already much more likely: no gradient
        (0.5, -1.0, math.exp(0.5)),  # became more likely by mistake: full gradient
        (-0.5, 1.0, -math.exp(-0.5)),
        (-0.5, -1.0, 0.0),
        (0.1, 1.0, -math.exp(0.1)),  # inside the clip
    ],
)
def test_clipping_stops_only_updates_beyond_the_bound_in_the_improving_direction(log_ratio, advantage, slope):
    old, advantages = torch.zeros(1, 1, dtype=torch.float64), torch.tensor([[advantage]], dtype=torch.float64)
    now = torch.tensor([[log_ratio]], dtype=torch.float64)
    (found,) = gradient(lambda lp: clipped_surrogate_loss(token_ratio(lp, old), advantages), now)
    torch.testing.assert_close(found.item(), slope)


@property_test
@given(seed=seeds, bounds=st.sampled_from([{}, {"clip_high": 0.5}, {"dual_clip": 1.6}, {"ratio_cap": 1.9}]))
def test_clip_fractions_count_the_tokens_without_gradient(seed, bounds):
    ratio, advantages = (0.6 * normal(seed, 40)).exp(), normal(seed + 1, 40)
    (slope,) = gradient(lambda x: clipped_surrogate_loss(x, advantages, 0.2, **bounds), ratio)
    found = clip_fractions(ratio, advantages, 0.2, **bounds)
    torch.testing.assert_close(found["clip_fraction"], (slope == 0).double())
    low, high = found["clip_fraction_low"].bool(), found["clip_fraction_high"].bool()
    assert not (low & high).any() and (advantages[low] < 0).all() and (advantages[high] > 0).all()
    assert (ratio[low] < 0.8).all() and (ratio[high] > 1 + bounds.get("clip_high", 0.2)).all()
    if not {"dual_clip", "ratio_cap"} & set(bounds):
        assert torch.equal(found["clip_fraction"].bool(), low | high)


def test_asymmetric_clip_dual_clip_and_ratio_bound_by_hand():
    ratio, ones = torch.tensor([1.5, 0.5]), torch.ones(2)
    assert clipped_surrogate_loss(ratio, ones, 0.2, clip_high=0.28).tolist() == pytest.approx([-1.28, -0.5])
    assert clipped_surrogate_loss(ratio, -ones, 0.2, clip_high=0.28).tolist() == pytest.approx([1.5, 0.8])
    far = torch.tensor([10.0, 10.0])
    assert clipped_surrogate_loss(far, -ones, ratio_cap=4.0).tolist() == [4.0, 4.0]
    assert clipped_surrogate_loss(far, -2 * ones, dual_clip=3.0).tolist() == [6.0, 6.0]
    assert clipped_surrogate_loss(far, ones, dual_clip=3.0).tolist() == pytest.approx([-1.2, -1.2])


def test_extreme_ratios_give_finite_losses_and_gradients():
    old, now = torch.tensor([[-1.0, -5e3]]), torch.tensor([[-5e3, -1.0]])
    advantages = torch.tensor([[1.0, -1.0]])
    for name, objective in OBJECTIVES.items():
        losses = objective(token_ratio(now, old), now, advantages)
        (slope,) = gradient(lambda lp, o=objective: o(token_ratio(lp, old), lp, advantages), now)
        assert losses.isfinite().all() and slope.isfinite().all(), name


def test_the_soft_gate_decays_beyond_the_clip_range():
    ratio, ones = torch.tensor([1.0, 3.0, 9.0], dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    (good,) = gradient(lambda x: soft_gate_loss(x, ones), ratio)
    (bad,) = gradient(lambda x: soft_gate_loss(x, -ones), ratio)
    assert good[0] == -1 and good[0] < good[1] < good[2] < 0
    assert (bad[1:] < -good[1:]).all()  # the larger temperature decays faster


def test_cispo_keeps_the_gradient_of_bounded_tokens():
    now, old, ones = torch.tensor([[-1.0, -1.0, -3.0]]), torch.tensor([[-4.0, -1.0, -1.0]]), torch.ones(1, 3)
    (slope,) = gradient(lambda lp: cispo_loss(token_ratio(lp, old), lp, ones, high=5.0), now)
    torch.testing.assert_close(slope, torch.tensor([[-5.0, -1.0, -math.exp(-2)]]))
    (slope,) = gradient(lambda lp: cispo_loss(token_ratio(lp, old), lp, ones, high=5.0, low=0.8), now)
    torch.testing.assert_close(slope, torch.tensor([[-5.0, -1.0, -0.8]]))
    (slope,) = gradient(lambda lp: cispo_loss(token_ratio(lp, old), lp, ones, high=None), now)
    torch.testing.assert_close(slope, torch.tensor([[-math.exp(3), -1.0, -math.exp(-2)]]))
    (clipped,) = gradient(lambda lp: clipped_surrogate_loss(token_ratio(lp, old), ones), now)
    assert clipped[0, :2].tolist() == [0.0, -1.0]


def test_reinforce_gradient_is_minus_the_advantage():
    advantages = torch.tensor([[2.0, -3.0]])
    (slope,) = gradient(lambda lp: reinforce_loss(lp, advantages), torch.tensor([[-1.0, -2.0]]))
    assert slope.tolist() == [[-2.0, 3.0]]


@pytest.mark.parametrize("name", ["token", "sequence", "sequence_product", "none"])
def test_an_empty_row_gives_finite_losses_and_gradients(name):
    mask = torch.tensor([[True, True], [False, False]])
    old = torch.tensor([[-1.0, -2.0], [0.0, 0.0]])
    advantages = torch.tensor([[0.5, 0.5], [0.0, 0.0]])
    for objective in OBJECTIVES.values():

        def loss(lp, objective=objective):
            return objective(policy_ratio(name, lp, old, mask), lp, advantages)

        (slope,) = gradient(loss, old + 0.1 * mask)
        assert loss(old).isfinite().all() and slope.isfinite().all()
        assert slope[1].abs().sum().item() == 0
