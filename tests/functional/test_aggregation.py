from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.functional.surrogates import (
    aggregate,
    constant_length,
    sequence_mean_token_mean,
    sequence_mean_token_sum,
    token_mean,
)
from rlhf_lightning.types import Aggregation

from .worked import Worked, check, each, gradient, normal, property_test, right_padded_mask

TOKEN_LOSSES = [[1, 1, 99, 99], [3, 3, 3, 3]]
TOKEN_MASK = torch.tensor([[True, True, False, False], [True] * 4])
ACCUMULATED = ([[1, 3, 0, 0, 0, 0]], [[0.5] * 6])
ACCUMULATED_MASKS = (torch.arange(6).unsqueeze(0) < 2, torch.arange(6).unsqueeze(0) < 6)
AGGREGATIONS = {
    "token_mean": token_mean,
    "sequence_mean_token_mean": sequence_mean_token_mean,
    "sequence_mean_token_sum": sequence_mean_token_sum,
    "constant": partial(constant_length, max_length=8),
}
aggregations = pytest.mark.parametrize("name", AGGREGATIONS)


def loss_of(name, losses, mask):
    weighted = AGGREGATIONS[name](mask)
    return weighted.weighted_sum(losses) / weighted.divisor.clamp(min=1)


def accumulated(t):
    parts = [(token_mean(mask), t(losses)) for losses, mask in zip(ACCUMULATED, ACCUMULATED_MASKS, strict=True)]
    count = sum(part.divisor for part, _ in parts)
    return torch.stack([part.weighted_sum(losses) / count for part, losses in parts])


def mean_of_means(t):
    parts = zip(ACCUMULATED, ACCUMULATED_MASKS, strict=True)
    return torch.stack([loss_of("token_mean", t(losses), mask) for losses, mask in parts]).mean()


WORKED = [
    Worked("token mean", lambda t: loss_of("token_mean", t(TOKEN_LOSSES), TOKEN_MASK), 2.33333333),
    Worked(
        "sequence mean of token means", lambda t: loss_of("sequence_mean_token_mean", t(TOKEN_LOSSES), TOKEN_MASK), 2.0
    ),
    Worked(
        "sequence mean of token sums", lambda t: loss_of("sequence_mean_token_sum", t(TOKEN_LOSSES), TOKEN_MASK), 7.0
    ),
    Worked("constant length", lambda t: loss_of("constant", t(TOKEN_LOSSES), TOKEN_MASK), 0.875),
    Worked("token mean over an accumulated step", lambda t: accumulated(t).sum(), 0.875),
    Worked("its mean of micro-batch means, which is another number", mean_of_means, 1.25),
    Worked("its two micro-batches as two accumulated losses", lambda t: 2 * accumulated(t), [1.0, 0.75]),
]


@each(WORKED)
def test_worked_number(case, dtype):
    check(case, dtype)


@aggregations
def test_the_name_selects_the_function(name):
    found, expected = aggregate(name, TOKEN_MASK, 8), AGGREGATIONS[name](TOKEN_MASK)
    assert isinstance(found, Aggregation)
    torch.testing.assert_close(found.weights, expected.weights)
    assert float(found.divisor) == float(expected.divisor)


@aggregations
@property_test
@given(seed=st.integers(0, 2**31), rows=st.integers(2, 5), length=st.integers(1, 5), pads=st.integers(0, 3))
def test_padding_and_micro_batches_change_neither_value_nor_gradient(name, seed, rows, length, pads):
    mask, losses = right_padded_mask(seed, rows, length), normal(seed, rows, length)
    whole = loss_of(name, losses, mask)
    padded = loss_of(name, F.pad(losses, (0, pads), value=float("nan")), F.pad(mask, (0, pads)))
    torch.testing.assert_close(padded, whole)
    cut = seed % (rows - 1) + 1

    def in_two(losses):
        parts = [AGGREGATIONS[name](mask[:cut]), AGGREGATIONS[name](mask[cut:])]
        total = parts[0].weighted_sum(losses[:cut]) + parts[1].weighted_sum(losses[cut:])
        return total / (parts[0].divisor + parts[1].divisor)

    torch.testing.assert_close(in_two(losses), whole)
    (slope,) = gradient(lambda x: loss_of(name, x, mask), losses)
    torch.testing.assert_close(gradient(in_two, losses), (slope,))
    assert slope[~mask].abs().sum().item() == 0


@aggregations
def test_fully_masked_rows_have_weight_zero_and_fully_masked_batches_loss_zero(name):
    mask = torch.tensor([[True, True], [False, False]])
    losses = torch.tensor([[1.0, 3.0], [float("nan"), float("nan")]])
    expected = {"token_mean": 2.0, "sequence_mean_token_mean": 2.0, "sequence_mean_token_sum": 4.0, "constant": 4 / 16}
    assert loss_of(name, losses, mask).item() == expected[name]
    assert loss_of(name, losses, torch.zeros_like(mask)).item() == 0
