"""Test micro-batches: every row once, within the limits, as few and as even as possible."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_lightning.micro_batches import cells_of, cut_micro_batches
from rlhf_lightning.types import MicroBatchLimits

COSTS = st.lists(st.integers(1, 40), max_size=30)
LIMITS = st.builds(MicroBatchLimits, st.none() | st.integers(1, 8), st.none() | st.integers(1, 120))


@given(COSTS, LIMITS, st.booleans())
@settings(max_examples=150, deadline=None)
def test_micro_batches_contain_every_row_once_within_both_limits(
    costs: list[int], limits: MicroBatchLimits, packed: bool
) -> None:
    cuts = cut_micro_batches(costs, limits, packed=packed)
    assert sorted(row for cut in cuts for row in cut) == list(range(len(costs)))
    for cut in cuts:
        assert limits.micro_batch_size is None or len(cut) <= limits.micro_batch_size
        cells = cells_of([costs[row] for row in cut], packed)
        assert limits.max_tokens is None or cells <= limits.max_tokens or len(cut) == 1
    flat = [costs[row] for cut in cuts for row in cut]
    assert flat == sorted(flat, reverse=True)
    if limits == MicroBatchLimits():
        assert len(cuts) == min(len(costs), 1)


@given(COSTS, st.integers(1, 120), st.booleans())
@settings(max_examples=100, deadline=None)
def test_the_number_of_micro_batches_is_at_most_that_of_greedy_filling(
    costs: list[int], most: int, packed: bool
) -> None:
    filled: list[list[int]] = []
    for cost in sorted(costs, reverse=True):
        if not filled or cells_of([*filled[-1], cost], packed) > most:
            filled.append([])
        filled[-1].append(cost)
    cuts = cut_micro_batches(costs, MicroBatchLimits(max_tokens=most), packed=packed)
    assert len(cuts) == len(filled)
    if cuts:  # and the largest micro-batch has no more positions
        largest = max(cells_of([costs[row] for row in cut], packed) for cut in cuts)
        assert largest <= max(cells_of(part, packed) for part in filled)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (
            MicroBatchLimits(max_tokens=16),
            [[1], [4], [2, 3, 0]],
        ),  # 12 positions; filling in order needs 16
        (MicroBatchLimits(max_tokens=5), [[1], [4], [2], [3], [0]]),
        (MicroBatchLimits(micro_batch_size=2), [[1], [4, 2], [3, 0]]),
    ],
)
def test_micro_batches_by_hand(limits: MicroBatchLimits, expected: list[list[int]]) -> None:
    assert cut_micro_batches([3, 9, 4, 4, 8], limits) == expected


def test_units_of_several_rows_count_every_row() -> None:
    limits = MicroBatchLimits(micro_batch_size=3)
    assert cut_micro_batches([9, 8, 7], limits, packed=True, rows=[2, 2, 1]) == [[0], [1, 2]]


def test_the_number_of_micro_batches_is_a_multiple() -> None:
    assert cut_micro_batches([5, 1, 1], MicroBatchLimits(), multiple_of=2) == [[0], [1, 2]]
    assert cut_micro_batches([5], MicroBatchLimits(), multiple_of=2) == [[0], []]
