"""Arrange ragged sequences as input of a transformer: one interface for padded and packed rows.

A layout holds the token ids to forward and three index vectors that locate each supervised completion token and the
position that predicts it. All later computations (log-probabilities, values, scores) use only these indices, so a
padded layout and a packed layout are interchangeable.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf_lightning.errors import DataError
from rlhf_lightning.micro_batches import cut_micro_batches
from rlhf_lightning.models.packing import PackedRow, tree_width, trees_of
from rlhf_lightning.models.transfer import to_device
from rlhf_lightning.types import NO_LIMITS, MicroBatchLimits, Sequences


class Layout(NamedTuple):
    """Token ids arranged in rows, and the location of each completion token.

    Attributes:
        input_ids: int64, shape (rows, width). Padding cells hold 0 and are never read.
        predictors: flat index into (rows * width) of the position that predicts each supervised token, shape (tokens,).
        targets: id of each supervised token, shape (tokens,).
        cells: flat index into (completions * length) of each supervised token, shape (tokens,).
        last: flat index into (rows * width) of each completion's last token, shape (completions,).
        completion_mask: bool, shape (completions, length), True on supervised tokens.
        positions: position of each cell in its own sequence, int64, shape (rows, width); None if positions count from
            the start of each row.
        packed: attention pattern of a single row that packs all sequences; None for causal attention within each row.
    """

    input_ids: Tensor
    predictors: Tensor
    targets: Tensor
    cells: Tensor
    last: Tensor
    completion_mask: Tensor
    positions: Tensor | None = None
    packed: PackedRow | None = None

    def to(self, device: torch.device) -> Layout:
        """Return the same layout on ``device``."""
        tensors = {name: to_device(part, device) for name, part in self._asdict().items() if isinstance(part, Tensor)}
        return Layout(**tensors, packed=None if self.packed is None else self.packed.to(device))

    def with_end_state(self) -> Layout:
        """Add a slot after each completion for the state after its last token: length grows by one."""
        rows, length = self.completion_mask.shape
        # Counting the mask would be wrong where a completion holds unsupervised tokens.
        ends = (self.completion_mask * torch.arange(1, length + 1, device=self.completion_mask.device)).amax(-1)
        row = self.cells.div(max(length, 1), rounding_mode="floor")
        all_rows = torch.arange(rows, device=ends.device)
        here = torch.ones((), dtype=torch.bool, device=ends.device)
        mask = torch.nn.functional.pad(self.completion_mask, (0, 1)).index_put((all_rows, ends), here)
        return self._replace(
            predictors=torch.cat([self.predictors, self.last]),
            targets=torch.cat([self.targets, torch.zeros_like(self.last)]),
            cells=torch.cat([self.cells + row, all_rows * (length + 1) + ends]),
            completion_mask=mask,
        )

    def scatter(self, values: Tensor) -> Tensor:
        """Place one value (or vector) per supervised token, shape (tokens, ...), on a (completions, length, ...) grid.

        The grid is 0 elsewhere.
        """
        grid = values.new_zeros(self.completion_mask.numel(), *values.shape[1:])
        return grid.index_put((self.cells,), values).view(*self.completion_mask.shape, *values.shape[1:])


def lay_out(sequences: Sequences, pack_rows: bool) -> Layout:
    """Arrange sequences in the cheaper layout; ``pack_rows`` says whether the model supports packed rows."""
    if pack_rows and sequences.completions:
        trees = list(trees_of(sequences))
        cells = len(sequences.completions) * max(sequences.lengths)
        if sum(tree_width(sequences, members) for members in trees) < (1 - FEW_PADS) * cells:
            return packed_layout(sequences, trees)
    return padded_layout(sequences)


FEW_PADS = 1 / 16
"""Share of padding cells below which a padded layout is used: packed attention runs in more and smaller pieces."""


def padded_layout(sequences: Sequences) -> Layout:
    """Give each prompt + completion its own row, padded on the right.

    No attention mask is needed: under causal attention no real token attends to the padding after it. The first token
    of a sequence without a prompt has no predictor and is not supervised.

    Raises:
        DataError: a completion is empty.
    """
    rows = len(sequences.completions)
    if not sequences.completions:
        return free_layout()
    prompts = [sequences.prompts[parent] for parent in sequences.parents]
    starts = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.long)
    counts = torch.tensor([len(completion) for completion in sequences.completions], dtype=torch.long)
    if not bool(counts.all()):
        raise DataError("empty-completion", "a completion is empty; drop such rows before they reach the model")
    width, length = int((starts + counts).max()), int(counts.max())
    input_ids = torch.zeros(rows, width, dtype=torch.long)
    completion_mask = torch.zeros(rows, length, dtype=torch.bool)
    ids = [part for pair in zip(prompts, sequences.completions, strict=True) for part in pair]
    input_ids[torch.arange(width) < (starts + counts).unsqueeze(-1)] = torch.cat(ids).long()
    completion_mask[torch.arange(length) < counts.unsqueeze(-1)] = torch.cat(sequences.supervised)
    completion_mask[:, :1] &= (starts > 0).unsqueeze(-1)
    cells = completion_mask.flatten().nonzero().squeeze(-1)
    rows_of_cells = cells.div(length, rounding_mode="floor")
    positions = rows_of_cells * width + starts[rows_of_cells] + cells % length
    last = torch.arange(rows) * width + starts + counts - 1
    return Layout(input_ids, positions - 1, input_ids.flatten()[positions], cells, last, completion_mask)


def packed_layout(sequences: Sequences, trees: Sequence[Sequence[int]]) -> Layout:
    """Pack trees (a prompt followed by its completions) into one row.

    A completion's tokens attend to the prompt and to earlier tokens of the same completion. Their positions continue
    from the prompt, so each completion is computed as if it were alone. See `models.packing.trees_of`.

    Raises:
        DataError: a completion is empty.
    """
    completions = sequences.completions
    lengths = np.array([len(completion) for completion in completions])
    if not lengths.all():
        raise DataError("empty-completion", "a completion is empty; drop such rows before they reach the model")
    # Python numbers first, then a few arrays: a step of a small model takes only as long as some hundred torch calls.
    pieces: list[Tensor] = []  # prompts and completions in row order
    sizes: list[list[int]] = []  # sizes of the pieces, per tree
    shifts: list[int] = []  # offset of each piece's cells from its positions in its own sequence
    starts, roots = np.zeros_like(lengths), np.zeros_like(lengths)  # a completion's first cell, its prompt's last cell
    cells_taken = 0
    for tree in trees:
        members, prompt = list(tree), sequences.prompts[sequences.parents[tree[0]]]
        pieces += [prompt, *(completions[member] for member in members)]
        sizes.append([len(prompt), *lengths[members].tolist()])
        ends = list(accumulate(sizes[-1], initial=cells_taken))
        shifts += [cells_taken, *(start - len(prompt) for start in ends[1:-1])]
        starts[members], roots[members] = ends[1:-1], ends[1] - 1
        cells_taken = ends[-1]
    input_ids = torch.cat(pieces).long()
    positions = np.arange(cells_taken) - np.repeat(shifts, list(chain.from_iterable(sizes)))

    length = int(lengths.max())
    completion_mask = np.zeros((len(completions), length), dtype=bool)
    completion_mask[np.arange(length) < lengths[:, None]] = torch.cat(sequences.supervised).numpy()
    completion_mask[[len(sequences.prompts[parent]) == 0 for parent in sequences.parents], 0] = False
    cells = np.flatnonzero(completion_mask)
    member, token = np.divmod(cells, length)
    predicted = starts[member] + token
    predictors = np.where(token == 0, roots[member], predicted - 1)
    return Layout(
        input_ids.unsqueeze(0),
        torch.from_numpy(predictors),
        input_ids[torch.from_numpy(predicted)],
        torch.from_numpy(cells),
        torch.from_numpy(starts + lengths - 1),
        torch.from_numpy(completion_mask),
        torch.from_numpy(positions).unsqueeze(0),
        PackedRow(sizes),
    )


def free_layout() -> Layout:
    """Return a layout of one padding cell and no completion, for a rank without rows while other ranks have some."""
    nothing = torch.zeros(0, dtype=torch.long)
    cell = torch.zeros(1, 1, dtype=torch.long)
    return Layout(cell, nothing, nothing, nothing, nothing, torch.zeros(0, 1, dtype=torch.bool))


def select(sequences: Sequences, rows: Sequence[int]) -> Sequences:
    """Return the selected completions, with only the prompts that they need."""
    parents = sorted({sequences.parents[row] for row in rows})
    renumbered = {parent: index for index, parent in enumerate(parents)}
    return Sequences(
        prompts=tuple(sequences.prompts[parent] for parent in parents),
        completions=tuple(sequences.completions[row] for row in rows),
        parents=tuple(renumbered[sequences.parents[row]] for row in rows),
        supervised=tuple(sequences.supervised[row] for row in rows),
    )


def cut_sequences(
    sequences: Sequences,
    rows: Sequence[int] | None = None,
    limits: MicroBatchLimits = NO_LIMITS,
    pack_rows: bool = False,
) -> list[list[int]]:
    """Split completions into micro-batches; completions of a prompt stay together if packing computes it only once.

    Args:
        sequences: prompts and completions.
        rows: indices of the completions to use; None uses all.
        limits: limits of a micro-batch; they may split a prompt's completions.
        pack_rows: whether `lay_out` may pack rows.

    Returns:
        Indices of the completions of each micro-batch, longest first; each completion occurs once.
    """
    rows = list(range(len(sequences.completions))) if rows is None else list(rows)
    lengths = sequences.lengths
    if not pack_rows:
        return [[rows[i] for i in cut] for cut in cut_micro_batches([lengths[row] for row in rows], limits)]
    parts = [part for tree in trees_of(sequences, rows) for part in _parts_of_tree(sequences, tree, limits)]
    widths = [tree_width(sequences, part) for part in parts]
    cuts = cut_micro_batches(widths, limits, packed=True, rows=[len(part) for part in parts])
    return [[row for index in cut for row in parts[index]] for cut in cuts]


def _parts_of_tree(sequences: Sequences, tree: Sequence[int], limits: MicroBatchLimits) -> list[list[int]]:
    """Split the completions of a prompt so that each part, with the prompt, stays within the limits."""
    most, prompt = limits.max_tokens, len(sequences.prompts[sequences.parents[tree[0]]])
    parts: list[list[int]] = [[]]
    for row in tree:
        wide = most is not None and tree_width(sequences, [*parts[-1], row]) > max(most, prompt)
        if parts[-1] and (wide or len(parts[-1]) == limits.micro_batch_size):
            parts.append([])
        parts[-1].append(row)
    return parts
