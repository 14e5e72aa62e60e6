import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.functional.selection import best_of_n, soft_best_of_n, weighted_best_of_n

from .worked import Worked, check, each, normal, property_test

PROXY = [0.1, 0.4, 0.35, 0.8]

WORKED = [
    Worked("soft best-of-n", lambda t: soft_best_of_n(t(PROXY), 0.5), [0.11728774, 0.21371220, 0.19337480, 0.47562525]),
    Worked("best-of-n", lambda t: best_of_n(t(PROXY)), 3),
]


@each(WORKED)
def test_worked_number(case, dtype):
    check(case, dtype)


NAN = float("nan")


def test_missing_samples_are_never_chosen():
    scores = torch.tensor([[NAN, -3.0, -5.0], [1.0, 1.0, NAN]])
    assert best_of_n(scores).tolist() == [1, 0]
    assert soft_best_of_n(scores, 1.0)[0, 0].item() == 0


@property_test
@given(seed=st.integers(0, 2**31))
def test_soft_best_of_n_interpolates_uniform_and_best(seed):
    scores = normal(seed, 2, 5)
    torch.testing.assert_close(soft_best_of_n(scores, 1e9), torch.full_like(scores, 0.2))
    assert torch.equal(soft_best_of_n(scores, 1e-3).argmax(-1), best_of_n(scores))
    torch.testing.assert_close(soft_best_of_n(scores, 1e-9).max(-1).values, torch.ones(2, dtype=scores.dtype))


def test_votes_are_weighted_and_equal_weights_give_the_majority():
    answers = torch.tensor([7, 3, 7, 3, 3, -1])
    assert answers[weighted_best_of_n(answers, torch.ones(6))].item() == 3
    assert weighted_best_of_n(answers, torch.tensor([2.0, 0.1, 2.0, 0.1, 0.1, 50.0])).item() == 0
    assert answers[weighted_best_of_n(answers, torch.tensor([1.0, 1.0, NAN, 1.0, NAN, 1.0]))].item() == 3
