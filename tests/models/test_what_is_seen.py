"""In every layout of rows, a token is predicted from its prompt and its preceding completion tokens only."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_lightning.models.layout import packed_layout, padded_layout
from rlhf_lightning.models.packing import trees_of
from rlhf_lightning.types import Sequences

IDS = st.lists(st.integers(1, 9), max_size=5)
COMPLETION = st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=5)


def seen(layout, predictor):
    """Return the ids that a cell attends to, in position order."""
    row, place = divmod(predictor, layout.input_ids.shape[1])
    if layout.packed is None:
        return layout.input_ids[row, : place + 1].tolist()
    start = 0
    for block in layout.packed.blocks:
        if place < start + block.width:
            break
        start += block.width
    cells = torch.arange(start, place + 1)
    if block.mask is not None:
        cells = start + block.mask[0, 0, place - start].nonzero().squeeze(-1)
    assert cells.tolist() == by_length(layout.packed.pieces, place)
    order = layout.positions[row, cells].argsort()
    assert layout.positions[row, cells][order].tolist() == list(range(len(cells)))
    return layout.input_ids[row, cells][order].tolist()


def by_length(pieces, place):
    """Return the cells that a cell attends to, as read by variable-length kernels."""
    piece = int((pieces.asking <= place).sum()) - 1
    first, last = pieces.seen[piece : piece + 2].tolist()
    cells = torch.arange(first, last) if pieces.cells is None else pieces.cells[first:last]
    assert last - first <= pieces.longest_seen
    assert pieces.asking[piece + 1] - pieces.asking[piece] <= pieces.longest_asking
    return cells[: len(cells) - (int(pieces.asking[piece + 1]) - 1 - place)].tolist()


@settings(max_examples=150, deadline=None)
@given(
    st.lists(IDS, min_size=1, max_size=3), st.lists(st.tuples(st.integers(0, 2), COMPLETION), min_size=1, max_size=5)
)
def test_every_token_is_predicted_from_exactly_the_tokens_before_it(prompts, completions):
    parents = [parent % len(prompts) for parent, _ in completions]
    sequences = Sequences(
        prompts=tuple(torch.tensor(prompt, dtype=torch.long) for prompt in prompts),
        completions=tuple(torch.tensor([index for index, _ in said]) for _, said in completions),
        parents=tuple(parents),
        supervised=tuple(torch.tensor([flag for _, flag in said]) for _, said in completions),
    )
    trees = list(trees_of(sequences))
    for layout in (padded_layout(sequences), packed_layout(sequences, trees), packed_layout(sequences, trees[::-1])):
        found = {}
        length = layout.completion_mask.shape[1]
        for cell, predictor, target in zip(layout.cells, layout.predictors, layout.targets, strict=True):
            found[divmod(int(cell), length)] = (seen(layout, int(predictor)), int(target))
        wanted = {}
        for number, (_, said) in enumerate(completions):
            ids, prompt = [index for index, _ in said], prompts[parents[number]]
            for offset, (index, flag) in enumerate(said):
                if flag and (prompt or offset):
                    wanted[number, offset] = ([*prompt, *ids[:offset]], index)
        assert found == wanted
