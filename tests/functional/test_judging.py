import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.functional.judging import (
    agreement,
    debiased_probability,
    debiased_probability_from_logits,
    label_entropy,
    option_logprobs,
    position_bias,
    preference_probability,
    verdict,
)

from .worked import Worked, check, each, normal, property_test


def first_order(t):
    return preference_probability(t([-1.2]), t([-2.0]))


def swapped_order(t):
    return preference_probability(t([-1.5]), t([-1.0]))


WORKED = [
    Worked("probability", first_order, [0.68997448]),
    Worked("clamped", lambda t: preference_probability(t([-1.2]), t([-2.0]), 0.4, 0.6), [0.6]),
    Worked("swapped order", swapped_order, [0.37754067]),
    Worked("debiased", lambda t: debiased_probability(first_order(t), swapped_order(t)), [0.65621691]),
    Worked("debiased by logits", lambda t: debiased_probability_from_logits(t([0.8]), t([-0.5])), [0.65701046]),
    Worked("verdict", lambda t: verdict(first_order(t), swapped_order(t)), [1.0]),
]


@each(WORKED)
def test_worked_number(case, dtype):
    check(case, dtype)


def test_token_variants_of_an_option_are_summed():
    variants = torch.tensor([[0.1, 0.2, 0.0]]).double().log()
    torch.testing.assert_close(option_logprobs(variants).exp().item(), 0.3)


def test_a_verdict_needs_agreement_of_both_orders():
    probability = torch.tensor([0.9, 0.2, 0.9, 0.1, 0.5, 0.9])
    swapped = torch.tensor([0.3, 0.8, 0.7, 0.4, 0.2, 0.5])
    assert verdict(probability, swapped).tolist() == [1.0, 0.0, 0.5, 0.5, 0.5, 0.5]


@property_test
@given(seed=st.integers(0, 2**31), bias=st.floats(-2, 2))
def test_constant_position_bias_cancels_in_logit_space(seed, bias):
    fair = normal(seed, 5)
    debiased = debiased_probability_from_logits(fair + bias, -fair + bias)
    torch.testing.assert_close(debiased, torch.sigmoid(fair))
    assert position_bias(torch.sigmoid(fair), torch.sigmoid(-fair)).abs().item() < 1e-12
    towards_first = position_bias(torch.sigmoid(fair + bias), torch.sigmoid(-fair + bias)).item()
    assert towards_first * bias >= 0


@property_test
@given(seed=st.integers(0, 2**31))
def test_swapping_completions_gives_the_complement(seed):
    p, swapped = torch.sigmoid(normal(seed, 5)), torch.sigmoid(normal(seed + 1, 5))
    ones = torch.ones_like(p)
    torch.testing.assert_close(debiased_probability(p, swapped) + debiased_probability(swapped, p), ones)
    torch.testing.assert_close(verdict(p, swapped) + verdict(swapped, p), ones)


def test_the_entropy_of_a_label_is_in_nats():
    certain = torch.tensor([0.5, 1.0, 0.0, 0.2]).double()
    expected = [0.6931471805599453, 0.0, 0.0, 0.5004024235381879]
    torch.testing.assert_close(label_entropy(certain).tolist(), expected)


def test_agreement_counts_undecided_labels_as_half():
    judge, people = torch.tensor([0.9, 0.9, 0.5, 0.1]), torch.tensor([1.0, 0.2, 1.0, 0.0])
    assert agreement(judge, people).tolist() == [1.0, 0.0, 0.5, 1.0]


@each([
    Worked("unbiased", lambda t: debiased_probability(t([0.7310585786]), t([0.2689414214])), [0.7310585786]),
    # A bias of 1 turns log-odds of 1 into sigmoid(2) and sigmoid(0) in the two orders.
    Worked("probability average", lambda t: debiased_probability(t([0.8807970780]), t([0.5])), [0.6903985390]),
    Worked("logit average", lambda t: debiased_probability_from_logits(t([2.0]), t([0.0])), [0.7310585786]),
])  # fmt: skip
def test_residual_position_bias_of_each_average_by_hand(case, dtype):
    """The probability average reduces the error of one order from 0.14974 to -0.04066; the logit
    average has no error.
    """
    check(case, dtype)
