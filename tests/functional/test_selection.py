import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.functional.selection import soft_best_of_n

from .worked import Worked, check, each, normal, property_test

PROXY = [0.1, 0.4, 0.35, 0.8]

WORKED = [
    Worked("soft best-of-n", lambda t: soft_best_of_n(t(PROXY), 0.5), [0.11728774, 0.21371220, 0.19337480, 0.47562525]),
]


@each(WORKED)
def test_worked_number(case, dtype):
    check(case, dtype)


@property_test
@given(seed=st.integers(0, 2**31))
def test_soft_best_of_n_interpolates_uniform_and_best(seed):
    scores = normal(seed, 2, 5)
    torch.testing.assert_close(soft_best_of_n(scores, 1e9), torch.full_like(scores, 0.2))
    assert torch.equal(soft_best_of_n(scores, 1e-3).argmax(-1), scores.argmax(-1))
    torch.testing.assert_close(soft_best_of_n(scores, 1e-9).max(-1).values, torch.ones(2, dtype=scores.dtype))
