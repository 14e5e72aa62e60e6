import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.functional.adaptive_preference import (
    beta_dpo_beta,
    beta_dpo_pair_weights,
    beta_dpo_statistics,
    ld_dpo_token_weights,
    log_collision_probability,
    mixed_reference,
    wpo_weights,
)
from rlhf_lightning.functional.logprobs import token_logprobs
from rlhf_lightning.functional.preference import dpo_loss

from .worked import Worked, check, each, normal, property_test, right_padded_mask

MARGIN = [0.7, -0.6, 0.9]


def wpo_of_two_tokens(t):
    logits = t([[[0.5, 0.3, 0.2], [0.6, 0.3, 0.1]]]).log()
    logprobs = token_logprobs(logits, torch.tensor([[0, 1]]))
    return wpo_weights(logprobs, log_collision_probability(logits), torch.ones(1, 2, dtype=torch.bool))


WORKED = [
    Worked("wpo weight", wpo_of_two_tokens, [0.92634959]),
    Worked("beta-dpo beta", lambda t: beta_dpo_beta(t(MARGIN), t(0.2), 0.1, 0.6), 0.108),
    Worked(
        "beta-dpo loss", lambda t: dpo_loss(t(MARGIN), beta_dpo_beta(t(MARGIN), t(0.2), 0.1, 0.6)).mean(), 0.67595370
    ),
    Worked("tr-dpo soft update", lambda t: mixed_reference(t([1, 2]), t([3, 7]), 0.6), [2.2, 5.0]),
]


@each(WORKED)
def test_worked_number(case, dtype):
    check(case, dtype)


@property_test
@given(seed=st.integers(0, 2**31))
def test_collision_probability_is_the_expected_probability_of_a_sample(seed):
    logits = normal(seed, 2, 5)
    p = logits.softmax(-1)
    torch.testing.assert_close(log_collision_probability(logits).exp(), (p * p).sum(-1))
    torch.testing.assert_close(log_collision_probability(logits, 2.0).exp(), ((logits / 2).softmax(-1) ** 2).sum(-1))


def test_wpo_ignores_padding_and_passes_no_gradient():
    logprobs = torch.tensor([[-1.0, -2.0, float("nan")]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    weights = wpo_weights(logprobs, torch.tensor([[-0.5, -0.5, 7.0]]), mask)
    torch.testing.assert_close(weights, torch.tensor([-1.0]).exp())
    assert not weights.requires_grad


def test_ld_dpo_discounts_what_only_the_longer_completion_has():
    chosen = torch.tensor([[True] * 4, [True, True, False, False], [False] * 4])
    rejected = torch.tensor([[True, True, False, False], [True] * 3 + [False], [True] + [False] * 3])
    chosen_weights, rejected_weights = ld_dpo_token_weights(chosen, rejected, alpha=0.5)
    assert chosen_weights.tolist() == [[1, 1, 0.5, 0.5], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert rejected_weights.tolist() == [[1, 1, 0, 0], [1, 1, 0.5, 0], [0.5, 0, 0, 0]]


@property_test
@given(seed=st.integers(0, 2**31))
def test_ld_dpo_with_alpha_one_is_dpo(seed):
    chosen, rejected = right_padded_mask(seed, 3, 5), right_padded_mask(seed + 1, 3, 5)
    for weights, mask in zip(ld_dpo_token_weights(chosen, rejected, 1.0), (chosen, rejected), strict=True):
        assert torch.equal(weights, mask.float())


def test_beta_dpo_statistics_move_a_tenth_of_the_way_from_zero():
    margin, zero = torch.tensor([1.0, 3.0], dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    mean, std = beta_dpo_statistics(margin, zero, zero)
    torch.testing.assert_close((mean.item(), std.item()), (0.2, 0.1 * 2**0.5))
    mean, std = beta_dpo_statistics(margin, mean, std)
    torch.testing.assert_close((mean.item(), std.item()), (0.38, 0.19 * 2**0.5))


def test_beta_dpo_keeps_typical_pairs_and_never_lets_beta_vanish():
    weights = beta_dpo_pair_weights(torch.tensor([0.2, 1.2, -1.8]), torch.tensor(0.2), torch.tensor(0.5))
    torch.testing.assert_close(weights, torch.tensor([0.0, -2.0, -8.0]).exp())
    assert beta_dpo_beta(torch.tensor([-50.0]), torch.tensor(0.0)).item() == torch.tensor(1e-3).item()
    margin = torch.tensor([0.3], requires_grad=True)
    assert not beta_dpo_beta(margin, torch.tensor(0.0)).requires_grad


def test_mixed_reference_leaves_the_policy_without_gradient():
    policy = torch.tensor([1.0], requires_grad=True)
    assert not mixed_reference(torch.tensor([0.0]), policy).requires_grad
    assert mixed_reference(torch.tensor([0.0]), policy, 1.0).item() == 1.0
