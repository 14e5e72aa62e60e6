import pytest
import torch
import torch.nn.functional as F
from conftest import refused
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.functional.ranking import aggregated_steps, first_errors, step_loss

from .worked import Worked, check, each, gradient, normal, property_test

ROW, POSITION = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 1, 2, 0, 1, 0])

WORKED = [
    # log(1 + e^-0.8), log(1 + e^-0.2), and 0.7 of the first with 0.3 of log(1 + e^0.8)
    Worked("steps", lambda t: step_loss(t([0.8, -0.2, 0.8]), t([1, 0, 0.7])), [0.37110067, 0.59813887, 0.61110067]),
    Worked("score 0", lambda t: step_loss(t([0, 0]), t([1, 0.3])), [0.69314718, 0.69314718]),
    # log-probabilities of 1/2, 1/4 and 1/2; of 1/2 and 3/4; of 1/5
    *(
        Worked(
            how, lambda t, how=how: aggregated_steps(t([0.5, 0.25, 0.5, 0.5, 0.75, 0.2]).log(), ROW, 3, how).exp(), x
        )
        for how, x in (("min", [0.25, 0.5, 0.2]), ("product", [0.0625, 0.375, 0.2]), ("last", [0.5, 0.75, 0.2]))
    ),
]


@each(WORKED)
def test_worked_number(case, dtype):
    check(case, dtype)


@property_test
@given(seed=st.integers(0, 2**31))
def test_the_gradient_is_probability_minus_label(seed):
    scores, labels = normal(seed, 6), torch.rand(6, generator=torch.Generator().manual_seed(seed)).double()
    (slope,) = gradient(lambda s: step_loss(s, labels).sum(), scores)
    torch.testing.assert_close(slope, scores.sigmoid() - labels)
    parity = F.binary_cross_entropy_with_logits(scores, labels, reduction="none")
    torch.testing.assert_close(step_loss(scores, labels), parity)


def test_huge_scores_give_finite_losses():
    found = step_loss(torch.tensor([1e4, -1e4]), torch.tensor([1.0, 1.0]))
    assert found.tolist() == [0.0, 1e4]


@pytest.mark.parametrize(
    ("right", "first"),
    [([1, 0, 0, 1, 1, 0], [1, -1, 0]), ([1, 1, 1, 0, 1, 1], [-1, 0, -1]), ([0, 1, 0, 1, 0, 1], [0, 1, -1])],
)
def test_first_error_of_each_completion_by_hand(right, first):
    assert first_errors(torch.tensor(right).bool(), ROW, POSITION, 3).tolist() == first


def test_a_completion_without_labelled_steps_has_no_error():
    assert first_errors(torch.zeros(6).bool(), ROW, POSITION, 4).tolist() == [0, 0, 0, -1]


def test_an_unknown_aggregate_is_refused():
    with refused("unknown-choice", "'mean'", "'min', 'product' or 'last'"):
        aggregated_steps(torch.zeros(6), ROW, 3, "mean")
