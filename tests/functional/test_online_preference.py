import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.functional.logprobs import nash_md_logits
from rlhf_lightning.functional.selection import best_and_worst
from rlhf_lightning.training.returned_loss import as_loss

from .pair_losses import certain_pairs, unloaded
from .worked import gradient, normal, property_test


def test_best_and_worst_of_each_group():
    scores = torch.tensor([0.1, 5.0, 0.9, 5.0, 0.4, float("nan")])
    group = torch.tensor([0, 1, 0, 1, 0, 0])
    chosen, rejected = best_and_worst(scores, group)  # group 1 is tied
    assert (chosen.tolist(), rejected.tolist()) == ([2], [0])


def test_a_group_of_unscored_samples_gives_no_pair():
    chosen, rejected = best_and_worst(torch.tensor([float("nan"), float("nan"), 1.0]), torch.tensor([0, 0, 1]))
    assert len(chosen) == len(rejected) == 0


def xpo(margin, explored, target=1.0):
    """Return XPO's loss with the reference's sample as chosen, whose log-ratio is the margin."""
    module = unloaded("XPOModule", scorer="nothing", max_new_tokens=4, beta=0.1, alpha=1e-3)
    by = torch.ones(1, dtype=torch.bool)
    given = certain_pairs(
        explored, torch.zeros_like(margin), reference_chosen=explored - margin, chosen_by_reference=by,
        rejected_by_reference=~by,
    )  # fmt: skip
    return as_loss(module.preference_loss(given._replace(target=torch.full_like(margin, target)))).values


def test_xpo_adds_its_exploration_bonus_to_dpo():
    margin, explored = torch.zeros(1, dtype=torch.float64), torch.tensor([-30.0], dtype=torch.float64)
    torch.testing.assert_close(xpo(margin, explored).item(), math.log(2) - 0.03)
    (slope,) = gradient(lambda s: xpo(margin, s), explored)
    assert slope.item() == pytest.approx(1e-3, rel=1e-9)
    (pull,) = gradient(lambda m: xpo(m, explored, 0.3), torch.full_like(margin, 5.0))
    torch.testing.assert_close(pull.item(), 0.1 * (1 / (1 + math.exp(-0.5)) - 0.3))


@property_test
@given(seed=st.integers(0, 2**31), mixture=st.floats(0, 1))
def test_nash_md_opponent_is_the_normalised_geometric_mixture(seed, mixture):
    policy, reference = normal(seed, 5), normal(seed + 1, 5)
    mixed = policy.softmax(-1) ** (1 - mixture) * reference.softmax(-1) ** mixture
    found = nash_md_logits(policy, reference, mixture).softmax(-1)
    torch.testing.assert_close(found, mixed / mixed.sum())
