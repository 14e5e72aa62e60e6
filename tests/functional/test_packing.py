import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.functional.packing import (
    cumulative_lengths,
    neftune_bound,
    packed_positions,
    positions_from_mask,
)

from .worked import Worked, check, each, property_test

WORKED = [
    Worked("left-padded positions", lambda t: positions_from_mask(t([[1, 1, 1], [0, 1, 1]])), [[0, 1, 2], [0, 0, 1]]),
    Worked("packed positions", lambda t: packed_positions(torch.tensor([3, 2])), [0, 1, 2, 0, 1]),
    Worked("cu_seqlens", lambda t: cumulative_lengths(torch.tensor([3, 2])), [0, 3, 5]),
    Worked(
        "index that must not be supervised", lambda t: (packed_positions(torch.tensor([3, 2])) == 0).nonzero()[1], [3]
    ),
    Worked("NEFTune bound", lambda t: neftune_bound(torch.tensor([4]), 16, 5.0), [0.625]),
]


@each(WORKED)
def test_worked_number(case, dtype):
    check(case, dtype)


@property_test
@given(lengths=st.lists(st.integers(0, 7), max_size=6))
def test_packing_lays_documents_end_to_end(lengths):
    packed = packed_positions(torch.tensor(lengths, dtype=torch.long))
    assert packed.tolist() == [position for length in lengths for position in range(length)]
    boundaries = cumulative_lengths(torch.tensor(lengths, dtype=torch.long))
    assert boundaries.dtype == torch.int32
    assert boundaries.diff().tolist() == lengths
    assert boundaries[0].item() == 0


@property_test
@given(tokens=st.integers(1, 6), left=st.integers(0, 4), right=st.integers(0, 4))
def test_positions_do_not_depend_on_the_side_of_padding(tokens, left, right):
    mask = torch.tensor([False] * left + [True] * tokens + [False] * right)
    assert positions_from_mask(mask)[mask].tolist() == list(range(tokens))
