import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.training.returned_loss import as_loss

from .pair_losses import certain_pairs, dpo_loss, loss_of, of_margin, unloaded
from .worked import Worked, check, each, gradient, normal, property_test

POLICY_CHOSEN, POLICY_REJECTED = [-10, -13, -7], [-11, -12.6, -7.6]
REFERENCE_CHOSEN, REFERENCE_REJECTED = [-10.5, -12.8, -7.4], [-10.8, -13, -7.1]
CHOSEN_LENGTHS, REJECTED_LENGTHS = torch.tensor([5, 6, 4]), torch.tensor([5, 4, 8])
BETA = 0.1


def log_ratios(t):
    return t(POLICY_CHOSEN) - t(REFERENCE_CHOSEN), t(POLICY_REJECTED) - t(REFERENCE_REJECTED)


def margin(t):
    chosen, rejected = log_ratios(t)
    return chosen - rejected


def margins(t):
    return t(POLICY_CHOSEN) - t(POLICY_REJECTED), t(REFERENCE_CHOSEN) - t(REFERENCE_REJECTED)


def lengths():
    return CHOSEN_LENGTHS, REJECTED_LENGTHS


def mean_length():
    return CHOSEN_LENGTHS.double().mean().expand(3)


AVERAGED = {"chosen_lengths": torch.full((4,), 3), "rejected_lengths": torch.full((4,), 2)}


def sums(name, **settings):
    """Return the loss of chosen and rejected log-ratios at beta 0.1."""
    return loss_of(name, beta=BETA, **settings)


def averages(name):
    """Return the same loss for completions of 3 and 2 tokens."""
    return lambda c, r: sums(name)(c, r, **AVERAGED)


def smoothed(chosen, rejected):
    """Return cDPO's loss with a tenth of wrong labels."""
    module, pairs = unloaded("ConservativeDPOModule", beta=BETA), certain_pairs(chosen, rejected)
    return as_loss(module.preference_loss(pairs._replace(target=module.smoothed(pairs.target)))).values


def aot_of_margins(policy_margin, reference_margin, beta=BETA):
    nothing = torch.zeros_like(policy_margin)
    return loss_of("AOTModule", beta=beta)(policy_margin, nothing, reference_chosen=reference_margin)


def bco(chosen, rejected, delta=None):
    """Return BCO's loss with a given shift instead of the step's mean."""
    shift = torch.zeros_like(chosen) if delta is None else delta.expand(len(chosen))
    return unloaded("BCOPairModule", beta=BETA).pair_loss(certain_pairs(chosen, rejected, delta=shift))


def rpo(margin, sequence_logprobs, mean_length, alpha=1.0):
    """Return RPO's loss with the reference chosen to give the margin."""
    of_pairs = loss_of("RPOModule", beta=BETA, alpha=alpha)
    return of_pairs(
        sequence_logprobs, torch.zeros_like(margin), mean_length, reference_chosen=sequence_logprobs - margin
    )


OF_LOG_RATIOS = {
    # name: (loss of chosen and rejected log-ratios at beta 0.1, its value at policy = reference)
    "dpo": (sums("DPOModule"), math.log(2)),
    "cdpo": (smoothed, math.log(2)),
    "robust": (sums("RobustDPOModule"), math.log(2)),
    "ipo": (sums("IPOModule", average=False), 1 / (4 * BETA**2)),
    "ipo averaged": (averages("IPOModule"), 1 / (4 * BETA**2)),
    "length-normalised": (averages("LengthNormalizedDPOModule"), math.log(2)),
    "hinge": (sums("HingeModule"), 1.0),
    "exo": (sums("EXOModule"), 2.76123071),
    "nca": (sums("NCAModule"), 2 * math.log(2)),
    "bco": (bco, 2 * math.log(2)),
    "sppo": (sums("SPPOModule"), 1 / (2 * BETA**2)),
    "aot": (lambda c, r: aot_of_margins(c - r, torch.zeros_like(c)), math.log(2)),
    "aot unpaired": (sums("UnpairedAOTModule"), math.log(2)),
    "apo zero": (sums("APOZeroModule"), 1.0),
    "apo down": (sums("APODownModule"), 1.0),
    "discopop": (sums("DiscoPOPModule"), 0.84657359),
    "forward kl": (sums("ForwardKLDPOModule"), math.log(2)),
    "jensen-shannon": (sums("JensenShannonDPOModule"), math.log(2)),
    "alpha": (sums("AlphaDPOModule"), math.log(2)),
}


def at_reference(loss):
    return lambda t: loss(t([0.0] * 4), t([0.0] * 4)).mean()


WORKED = [
    Worked("log-ratios of chosen", lambda t: log_ratios(t)[0], [0.5, -0.2, 0.4]),
    Worked("log-ratios of rejected", lambda t: log_ratios(t)[1], [-0.2, 0.4, -0.5]),
    Worked("margins", margin, [0.7, -0.6, 0.9]),
    Worked("rewards of chosen", lambda t: BETA * log_ratios(t)[0].mean(), 0.02333333),
    Worked("rewards of rejected", lambda t: BETA * log_ratios(t)[1].mean(), -0.01),
    Worked("reward margin", lambda t: BETA * margin(t).mean(), 0.03333333),
    Worked("reward accuracy", lambda t: (margin(t) > 0).double().mean(), 0.66666667),
    Worked("dpo", lambda t: sums("DPOModule")(*log_ratios(t)).mean(), 0.67717200),
    Worked("cdpo", lambda t: smoothed(*log_ratios(t)).mean(), 0.68050534),
    Worked("robust", lambda t: sums("RobustDPOModule", flip_rate=0.1)(*log_ratios(t)).mean(), 0.67300534),
    Worked("ipo averaged", lambda t: sums("IPOModule")(*log_ratios(t), *lengths()).mean(), 24.45737245),
    Worked("ipo with sums", lambda t: sums("IPOModule", average=False)(*log_ratios(t)).mean(), 22.22),
    Worked("hinge", lambda t: sums("HingeModule")(*log_ratios(t)).mean(), 0.96666667),
    Worked("exo", lambda t: sums("EXOModule", epsilon=1e-3)(*log_ratios(t)).mean(), 2.70440658),
    Worked("nca", lambda t: sums("NCAModule")(*log_ratios(t)).mean(), 1.37833600),
    Worked("bco without shift", lambda t: bco(*log_ratios(t)).mean(), 1.37000266),
    Worked(
        "bco with the mean implicit reward",
        lambda t: sums("BCOPairModule")(*log_ratios(t)).mean(),
        1.36999155,
    ),
    Worked("mean implicit reward", lambda t: BETA * torch.cat(log_ratios(t)).mean(), 0.00666667),
    Worked("sppo", lambda t: sums("SPPOModule")(*log_ratios(t)).mean(), 46.96666667),
    Worked("aot", lambda t: aot_of_margins(*margins(t)).mean(), 0.67675547),
    Worked("aot unpaired", lambda t: sums("UnpairedAOTModule")(*log_ratios(t)).mean(), 0.67667216),
    Worked("apo zero", lambda t: sums("APOZeroModule")(*log_ratios(t)).mean(), 0.99166840),
    Worked("apo down", lambda t: sums("APODownModule")(*log_ratios(t)).mean(), 0.99750468),
    Worked("discopop", lambda t: sums("DiscoPOPModule", temperature=0.05)(*log_ratios(t)).mean(), 0.85217624),
    Worked(
        "length-normalised", lambda t: sums("LengthNormalizedDPOModule")(*log_ratios(t), *lengths()).mean(), 0.69035431
    ),
    Worked(
        "length-normalised, beta 5",
        lambda t: loss_of("LengthNormalizedDPOModule")(*log_ratios(t), *lengths()).mean(),
        0.61715494,
    ),
    Worked("forward kl", lambda t: sums("ForwardKLDPOModule")(*log_ratios(t)).mean(), 0.67646007),
    Worked("jensen-shannon", lambda t: sums("JensenShannonDPOModule")(*log_ratios(t)).mean(), 0.68498004),
    Worked("alpha 0.5", lambda t: sums("AlphaDPOModule", alpha=0.5)(*log_ratios(t)).mean(), 0.67698129),
    Worked("rpo per sequence", lambda t: rpo(margin(t), t(POLICY_CHOSEN), CHOSEN_LENGTHS).mean(), 2.64939422),
    Worked("rpo per token", lambda t: rpo(margin(t), t(POLICY_CHOSEN), mean_length()).mean(), 2.67717200),
    *(
        Worked(f"{name} at the reference", at_reference(loss), expected)
        for name, (loss, expected) in OF_LOG_RATIOS.items()
    ),
]


@each(WORKED)
def test_worked_number(case, dtype):
    check(case, dtype)


def test_ipo_with_sums_is_the_papers_equation():
    found = sums("IPOModule", average=False)(*log_ratios(lambda x: torch.tensor(x, dtype=torch.float64))).mean()
    by_hand = ((0.7 - 5) ** 2 + (-0.6 - 5) ** 2 + (0.9 - 5) ** 2) / 3
    torch.testing.assert_close(found.item(), by_hand)


of_log_ratios = pytest.mark.parametrize("name", OF_LOG_RATIOS)


@of_log_ratios
def test_chosen_is_pushed_up_and_rejected_down(name):
    loss, _ = OF_LOG_RATIOS[name]
    chosen, rejected = torch.tensor([0.5, -0.2, 0.1, 0.3]), torch.tensor([-0.4, 0.3, 0.2, 0.0])
    up, down = gradient(loss, chosen.double(), rejected.double())
    if name == "discopop":  # not monotone: near 0 it pushes the margin down
        assert torch.equal(down < 0, chosen - rejected < 0.5)
        return
    assert (down > 0).all()
    if name == "apo down":  # chosen goes down with rejected, or up if rejected is still ahead
        assert torch.equal(up > 0, (rejected - chosen).abs() > chosen.abs())
    else:
        assert (up < 0).all()


@of_log_ratios
def test_extreme_log_ratios_give_finite_losses(name):
    loss, _ = OF_LOG_RATIOS[name]
    chosen, rejected = torch.tensor([3e3, -3e3, 3e3, -3e3]), torch.tensor([-3e3, 3e3, 3e3, -3e3])
    assert loss(chosen, rejected).isfinite().all()
    assert all(slope.isfinite().all() for slope in gradient(loss, chosen, rejected))


@of_log_ratios
def test_losses_are_independent_per_pair_unless_coupled(name):
    loss, _ = OF_LOG_RATIOS[name]
    chosen, rejected = normal(0, 4), normal(1, 4)
    whole = loss(chosen, rejected)
    order = torch.tensor([2, 0, 3, 1])
    if name.startswith("aot"):
        torch.testing.assert_close(loss(chosen[order], rejected[order]), whole)  # sorting removes the order
    else:
        torch.testing.assert_close(loss(chosen[order], rejected[order]), whole[order])


@property_test
@given(seed=st.integers(0, 2**31), flip_rate=st.floats(0, 0.45))
def test_robust_dpo_is_unbiased_under_label_flips(seed, flip_rate):
    clean = 5 * normal(seed, 6)
    robust = of_margin("RobustDPOModule", beta=BETA, flip_rate=flip_rate)
    kept, flipped = robust(clean), robust(-clean)
    torch.testing.assert_close((1 - flip_rate) * kept + flip_rate * flipped, dpo_loss(clean, BETA))


@property_test
@given(seed=st.integers(0, 2**31), p=st.floats(0.01, 0.99))
def test_the_minimum_is_where_the_implied_probability_equals_the_soft_label(seed, p):
    best = torch.tensor([math.log(p / (1 - p)) / BETA], dtype=torch.float64)
    target = torch.tensor([p], dtype=torch.float64)

    def soft(margin, p):
        pairs = certain_pairs(margin, torch.zeros_like(margin))._replace(target=p)
        return as_loss(unloaded("DPOModule", beta=BETA).preference_loss(pairs)).values

    (slope,) = gradient(lambda m: soft(m, target), best)
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-12, rtol=0)
    margins = normal(seed, 1)
    torch.testing.assert_close(soft(margins, target), dpo_loss(margins, BETA, target))
    torch.testing.assert_close(soft(margins, target), soft(-margins, 1 - target))


def test_dpo_gradient_is_beta_times_the_probability_of_error():
    (slope,) = gradient(of_margin("DPOModule", beta=0.3), torch.tensor([2.0], dtype=torch.float64))
    torch.testing.assert_close(slope.item(), -0.3 / (1 + math.exp(0.6)))


@property_test
@given(seed=st.integers(0, 2**31))
def test_alpha_divergence_limits_are_dpo_and_forward_kl(seed):
    chosen, rejected = normal(seed, 5), normal(seed + 1, 5)
    reverse = sums("AlphaDPOModule", alpha=1e-9)(chosen, rejected)
    torch.testing.assert_close(reverse, dpo_loss(chosen - rejected, BETA))
    by_hand = dpo_loss((-rejected).exp() - (-chosen).exp(), BETA)
    torch.testing.assert_close(sums("ForwardKLDPOModule")(chosen, rejected), by_hand)
    torch.testing.assert_close(sums("AlphaDPOModule", alpha=1.0)(chosen, rejected), by_hand)


def test_regression_losses_have_their_minimum_at_the_target_margin():
    target = torch.tensor([1 / (2 * BETA)], dtype=torch.float64)
    assert sums("IPOModule", average=False)(target, torch.zeros_like(target)).item() == 0
    assert sums("SPPOModule")(target, -target).item() == 0
    assert of_margin("HingeModule", beta=BETA)(torch.tensor([10.0, 25.0])).tolist() == [0, 0]
    satisfied = torch.tensor([math.log(0.999 / 0.001) / BETA], dtype=torch.float64)
    exo = of_margin("EXOModule", beta=BETA, epsilon=1e-3)
    torch.testing.assert_close(exo(satisfied).item(), 0.0, atol=1e-12, rtol=0)
    (slope,) = gradient(exo, satisfied)
    torch.testing.assert_close(slope.item(), 0.0, atol=1e-12, rtol=0)


def test_aot_compares_quantiles():
    policy, reference = torch.tensor([3.0, 1.0]), torch.tensor([0.0, 2.0])
    torch.testing.assert_close(aot_of_margins(policy, reference, 1.0), dpo_loss(torch.tensor([1.0, 1.0]), 1.0))


def test_discopop_interpolates_logistic_and_exponential_losses():
    discopop = of_margin("DiscoPOPModule", beta=0.1)
    torch.testing.assert_close(discopop(torch.tensor([-40.0])), dpo_loss(torch.tensor([-40.0]), 0.1))
    torch.testing.assert_close(discopop(torch.tensor([40.0])), torch.tensor([math.exp(-4)]))


def test_rpo_adds_only_the_likelihood_of_chosen():
    margins, logprobs, lengths = torch.tensor([0.4]), torch.tensor([-6.0]), torch.tensor([4])
    torch.testing.assert_close(rpo(margins, logprobs, lengths, 0.5) - dpo_loss(margins, BETA), torch.tensor([0.75]))
    (slope,) = gradient(lambda s: rpo(margins, s, lengths, 0.5), logprobs)
    assert slope.item() == pytest.approx(-0.125, rel=1e-6)


def test_wpo_ignores_padding_and_passes_no_gradient():
    logprobs = torch.tensor([[-1.0, -2.0, float("nan")]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    weights = unloaded("WPOModule").completion_weights(logprobs, torch.tensor([[-0.5, -0.5, 7.0]]), mask)
    torch.testing.assert_close(weights, torch.tensor([-1.0]).exp())
    assert not weights.requires_grad
