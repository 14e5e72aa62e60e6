import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.training.returned_loss import as_loss
from rlhf_lightning.types import UnpairedLogprobs

from .pair_losses import unloaded
from .worked import Worked, check, each, gradient, normal, property_test

DESIRABLE_RATIOS, UNDESIRABLE_RATIOS = [0.5, -0.2, 0.4], [-0.2, 0.4, -0.5]
LABELS = torch.tensor([True] * 3 + [False] * 3)


def kto_reference_point(mismatched):
    return unloaded("KTOModule").reference_point(torch.zeros(0), mismatched)


def kto_loss(ratios, labels, reference_point, beta=0.1, **weights):
    """Return the module's loss of one-token completions with these log-ratios."""
    grid, ones = ratios.unsqueeze(-1), torch.ones_like(ratios)
    given = UnpairedLogprobs(grid, torch.zeros_like(grid), grid == grid, labels, ones, reference_point)
    return as_loss(unloaded("KTOModule", beta=beta, **weights).unpaired_loss(given)).values


def losses(t, **weights):
    reference_point = kto_reference_point(t([0.3, -0.1, 0.4]))
    return kto_loss(t(DESIRABLE_RATIOS + UNDESIRABLE_RATIOS), LABELS, reference_point, **weights)


WORKED = [
    Worked("reference point", lambda t: kto_reference_point(t([0.3, -0.1, 0.4])), 0.2),
    Worked("kto", lambda t: losses(t).mean(), 0.49583462),
    Worked("kto desirable", lambda t: losses(t)[:3].mean(), 0.49916647),
    Worked("kto undesirable", lambda t: losses(t)[3:].mean(), 0.49250277),
    Worked("kto at the reference", lambda t: kto_loss(t([0.0] * 6), LABELS, t(0.0), 0.1).mean(), 0.5),
    Worked("kto with weight 1.33", lambda t: losses(t, desirable_weight=1.33).mean(), 0.57819708),
]


@each(WORKED)
def test_worked_number(case, dtype):
    check(case, dtype)


def test_at_the_reference_the_loss_is_half_the_weight():
    found = kto_loss(
        torch.zeros(2), torch.tensor([True, False]), torch.zeros(()), desirable_weight=2.0, undesirable_weight=3.0
    )
    assert found.tolist() == [1.0, 1.5]


def test_the_reference_point_is_never_negative_and_passes_no_gradient():
    assert kto_reference_point(torch.tensor([-0.3, 0.1])).item() == 0
    assert not kto_reference_point(torch.tensor([0.3], requires_grad=True)).requires_grad


@property_test
@given(seed=st.integers(0, 2**31))
def test_desirable_is_pushed_up_undesirable_down_and_the_gradient_saturates(seed):
    ratios = normal(seed, 6)
    (slope,) = gradient(lambda a: kto_loss(a, LABELS, torch.tensor(0.1).double()), ratios)
    assert (slope[:3] < 0).all()
    assert (slope[3:] > 0).all()
    (far,) = gradient(lambda a: kto_loss(a, LABELS, torch.tensor(0.0)), torch.tensor([5e3, -5e3] * 3))
    assert far.abs().max().item() == 0


@property_test
@given(seed=st.integers(0, 2**31))
def test_a_relabelled_row_mirrors_its_loss(seed):
    ratios, z0 = normal(seed, 6), torch.tensor(0.3, dtype=torch.float64)
    torch.testing.assert_close(kto_loss(ratios, LABELS, z0) + kto_loss(ratios, ~LABELS, z0), torch.ones(6).double())
