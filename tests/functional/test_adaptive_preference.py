import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.functional.logprobs import token_logprobs
from rlhf_lightning.modules import BetaDPOModule
from rlhf_lightning.training.returned_loss import as_loss

from .pair_losses import certain_pairs, unloaded
from .worked import Worked, check, each, normal, property_test, right_padded_mask

MARGIN = [0.7, -0.6, 0.9]


def wpo_of_two_tokens(t):
    p = t([[[0.5, 0.3, 0.2], [0.6, 0.3, 0.1]]])
    logprobs = token_logprobs(p.log(), torch.tensor([[0, 1]]))
    collisions, mask = p.square().sum(-1).log(), torch.ones(1, 2, dtype=torch.bool)
    return unloaded("WPOModule").completion_weights(logprobs, collisions, mask)


def beta_dpo(margin, mean=0.0, std=0.0, **settings):
    """Return the loss of one training step of a fresh module with given running values."""
    module = BetaDPOModule(init_from="nowhere", beta=0.1, alpha=0.6, **settings)
    module.margin_mean, module.margin_std = mean, std
    with torch.enable_grad():
        return module, as_loss(module.preference_loss(certain_pairs(margin, torch.zeros_like(margin))))


def followed(t):
    """Return beta and loss with the running mean fixed at 0.2."""
    return beta_dpo(t(MARGIN), 0.2, keep=1.0, momentum=1.0)[1]


WORKED = [
    Worked("wpo weight", wpo_of_two_tokens, [0.92634959]),
    Worked("beta-dpo beta", lambda t: followed(t).metrics["step_beta"][0], 0.108),
    Worked("beta-dpo loss", lambda t: followed(t).values.mean(), 0.67595370),
    Worked("tr-dpo soft update", lambda t: torch.lerp(t([1, 2]), t([3, 7]), 0.6), [2.2, 5.0]),
]


@each(WORKED)
def test_worked_number(case, dtype):
    check(case, dtype)


@property_test
@given(seed=st.integers(0, 2**31))
def test_collision_probability_is_the_expected_probability_of_a_sample(seed):
    logits = normal(seed, 2, 5).requires_grad_()
    found = unloaded("WPOModule").token_statistics(logits, None, torch.zeros(2, dtype=torch.long))["log_collisions"]
    p = logits.detach().softmax(-1)
    torch.testing.assert_close(found.exp(), (p * p).sum(-1))
    assert not found.requires_grad


def ld_dpo_token_weights(chosen, rejected, alpha):
    """Return the weight of each token's log-ratio: the gradient of the reward with respect to it, divided by beta."""
    grids = [torch.zeros(mask.shape, dtype=torch.float64, requires_grad=True) for mask in (chosen, rejected)]
    module, ones = unloaded("LDDPOModule", beta=1.0, alpha=alpha), torch.ones(len(chosen), dtype=torch.float64)
    given = certain_pairs(ones, ones)._replace(
        policy_chosen_logprobs=grids[0], policy_rejected_logprobs=grids[1],
        reference_chosen_logprobs=grids[0].detach(), reference_rejected_logprobs=grids[1].detach(),
        chosen_mask=chosen, rejected_mask=rejected,
    )  # fmt: skip
    return torch.autograd.grad(torch.stack(module.implicit_reward(given)).sum(), grids)


def test_ld_dpo_discounts_only_the_excess_tokens_of_the_longer_completion():
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
        assert torch.equal(weights, mask.double())


def test_beta_dpo_statistics_move_a_tenth_of_the_way_from_zero():
    margin = torch.tensor([1.0, 3.0], dtype=torch.float64)
    module, _ = beta_dpo(margin, keep=1.0)
    torch.testing.assert_close((module.margin_mean, module.margin_std), (0.2, 0.1 * 2**0.5))
    module, _ = beta_dpo(margin, module.margin_mean, module.margin_std, keep=1.0)
    torch.testing.assert_close((module.margin_mean, module.margin_std), (0.38, 0.19 * 2**0.5))


def test_beta_dpo_keeps_typical_pairs_and_never_lets_beta_vanish():
    """The pair at 4 standard deviations has weight e^-8, the others e^0 and e^-2, so it is dropped."""
    margin = torch.tensor([0.2, 1.2, -1.8], dtype=torch.float64)
    left_out = []
    for seed in range(300):
        _, loss = beta_dpo(margin, 0.2, 0.5, keep=0.34, momentum=1.0, seed=seed)
        left_out.append((loss.values == 0).tolist())
    kept = 1 - torch.tensor(left_out).double().mean(0)
    torch.testing.assert_close(kept, torch.tensor([0.0, -2.0, -8.0]).double().softmax(-1), atol=0.06, rtol=0)
    _, loss = beta_dpo(torch.tensor([-50.0, -50.0]), keep=1.0, momentum=1.0)
    assert loss.metrics["step_beta"].tolist() == torch.tensor([1e-3, 1e-3]).tolist()
    _, loss = beta_dpo(torch.tensor([0.3, 0.1], requires_grad=True), keep=1.0)
    assert loss.values.requires_grad and not loss.metrics["step_beta"].requires_grad
