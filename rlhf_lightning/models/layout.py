"""From ragged sequences to what a transformer reads: one interface, whatever the arrangement of rows.

A layout is the token ids to feed and three index vectors that say where each supervised completion token is predicted.
Everything downstream (log-probabilities, values, scores) uses the indices alone, so that a padded layout can be
exchanged for a prompt-sharing one without another line changing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_lightning.types import Sequences


class Layout(NamedTuple):
    """Token ids arranged in rows, and where each completion token is found in them.

    Attributes:
        input_ids: int64, shape (rows, width). Free cells hold 0 and are never looked at.
        predictors: flat index into (rows * width) of the position that predicts each supervised token, shape (tokens,).
        targets: id of each supervised token, shape (tokens,).
        cells: flat index into (completions * length) of each supervised token, shape (tokens,).
        last: flat index into (rows * width) of each completion's last token, shape (completions,).
        completion_mask: bool, shape (completions, length), True on supervised tokens.
        positions: position of each cell in its own sequence, int64, shape (rows, width); None where cells count on from
            the start of their row.
        attention: bool, True where a cell may look at another, shape (rows, 1, width, width); None where each looks at
            all cells before it.
    """

    input_ids: Tensor
    predictors: Tensor
    targets: Tensor
    cells: Tensor
    last: Tensor
    completion_mask: Tensor
    positions: Tensor | None = None
    attention: Tensor | None = None

    def to(self, device: torch.device) -> Layout:
        """Return the same layout on ``device``."""
        moved = {name: part.to(device, non_blocking=True) for name, part in self._asdict().items() if part is not None}
        return Layout(**moved)

    def with_end_state(self) -> Layout:
        """Add a slot after each completion for the state whose input is its last token: length grows by one."""
        rows, length = self.completion_mask.shape
        # Counting the mask would be wrong where a completion holds unsupervised tokens.
        ends = (self.completion_mask * torch.arange(1, length + 1, device=self.completion_mask.device)).amax(-1)
        row = self.cells.div(max(length, 1), rounding_mode="floor")
        all_rows = torch.arange(rows, device=ends.device)
        mask = torch.nn.functional.pad(self.completion_mask, (0, 1)).index_put(
            (all_rows, ends), torch.tensor(True, device=ends.device)
        )
        return self._replace(
            predictors=torch.cat([self.predictors, self.last]),
            targets=torch.cat([self.targets, torch.zeros_like(self.last)]),
            cells=torch.cat([self.cells + row, all_rows * (length + 1) + ends]),
            completion_mask=mask,
        )

    def scatter(self, values: Tensor) -> Tensor:
        """Put one value per supervised token, shape (tokens,), on the (completions, length) grid; 0 elsewhere."""
        grid = values.new_zeros(self.completion_mask.numel())
        return grid.index_put((self.cells,), values).view(self.completion_mask.shape)


def lay_out(sequences: Sequences, share_prompts: bool) -> Layout:
    """Lay sequences out in the arrangement that feeds the model less.

    Args:
        sequences: prompts and completions.
        share_prompts: whether the model can read a prompt once for all its completions, see `shared_layout`.
    """
    if share_prompts and len(sequences.completions) > 1:
        trees = list(_trees(sequences))
        shared = len(trees) * max(_tree_width(sequences, members) for members in trees)
        if shared < len(sequences.completions) * max(sequences.lengths):
            return shared_layout(sequences)
    return padded_layout(sequences)


def padded_layout(sequences: Sequences) -> Layout:
    """Lay each prompt + completion in a row of its own, padded on the right.

    No attention mask is needed: under causal attention no real token sees the free cells behind it. The first token of
    a sequence without a prompt has no predictor and is not supervised.

    Raises:
        ValueError: a completion is empty.
    """
    rows = len(sequences.completions)
    if not sequences.completions:
        return free_layout()
    if any(len(completion) == 0 for completion in sequences.completions):
        raise ValueError("a completion is empty: drop such rows before they reach the model")
    width = max(sequences.lengths, default=1)
    length = max((len(completion) for completion in sequences.completions), default=1)
    input_ids = torch.zeros(rows, width, dtype=torch.long)
    completion_mask = torch.zeros(rows, length, dtype=torch.bool)
    prompts = [sequences.prompts[parent] for parent in sequences.parents]
    starts = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.long)
    counts = torch.tensor([len(completion) for completion in sequences.completions], dtype=torch.long)
    if rows:
        ids = [part for pair in zip(prompts, sequences.completions, strict=True) for part in pair]
        input_ids[torch.arange(width) < (starts + counts).unsqueeze(-1)] = torch.cat(ids).long()
        completion_mask[torch.arange(length) < counts.unsqueeze(-1)] = torch.cat(sequences.supervised)
    completion_mask[:, :1] &= (starts > 0).unsqueeze(-1)
    cells = completion_mask.flatten().nonzero().squeeze(-1)
    rows_of_cells = cells.div(length, rounding_mode="floor")
    positions = rows_of_cells * width + starts[rows_of_cells] + cells % length
    last = torch.arange(rows) * width + starts + counts - 1
    return Layout(input_ids, positions - 1, input_ids.flatten()[positions], cells, last, completion_mask)


def shared_layout(sequences: Sequences) -> Layout:
    """Lay each prompt in a row once, its completions behind it one after the other: a tree of depth two.

    A completion's tokens look at the prompt and at their own completion up to themselves, and their positions count on
    from the prompt, so that each completion is computed as if it stood alone. Equal prompts are one, however the
    sequences name them. Where a row would grow wider than `WIDEST`, whose attention would cost more than it saves, the
    prompt is written again for the rest of its completions.

    Raises:
        ValueError: a completion is empty.
    """
    if any(len(completion) == 0 for completion in sequences.completions):
        raise ValueError("a completion is empty: drop such rows before they reach the model")
    trees = list(_trees(sequences))
    width = max((_tree_width(sequences, members) for members in trees), default=1)
    length = max((len(completion) for completion in sequences.completions), default=1)
    input_ids = torch.zeros(len(trees), width, dtype=torch.long)
    positions = torch.zeros(len(trees), width, dtype=torch.long)
    branch = torch.full((len(trees), width), FREE)  # which completion a cell belongs to
    completion_mask = torch.zeros(len(sequences.completions), length, dtype=torch.bool)
    starts = torch.zeros(len(sequences.completions), dtype=torch.long)  # flat index of each completion's first token
    roots = torch.zeros(len(sequences.completions), dtype=torch.long)  # and of the prompt's last, which predicts it
    for row, members in enumerate(trees):
        prompt = sequences.prompts[sequences.parents[members[0]]]
        stop = len(prompt)
        input_ids[row, :stop], positions[row, :stop] = prompt, torch.arange(stop)
        branch[row, :stop] = PROMPT
        for member in members:
            ids, start = sequences.completions[member], stop
            stop = start + len(ids)
            input_ids[row, start:stop] = ids
            branch[row, start:stop] = member
            positions[row, start:stop] = torch.arange(len(prompt), len(prompt) + len(ids))
            completion_mask[member, : len(ids)] = sequences.supervised[member]
            starts[member], roots[member] = row * width + start, row * width + len(prompt) - 1
            completion_mask[member, 0] &= len(prompt) > 0
    cells = completion_mask.flatten().nonzero().squeeze(-1)
    owner, offset = cells.div(length, rounding_mode="floor"), cells % length
    tokens = starts[owner] + offset
    predictors = torch.where(offset == 0, roots[owner], tokens - 1)
    last = starts + torch.tensor([len(ids) for ids in sequences.completions], dtype=torch.long) - 1
    targets = input_ids.flatten()[tokens]
    return Layout(input_ids, predictors, targets, cells, last, completion_mask, positions, _tree_attention(branch))


PROMPT, FREE = -1, -2
"""What a cell belongs to if not to a completion."""

WIDEST = 2048
"""Cells of a prompt-sharing row beyond which it is split: attention over a row costs its width squared."""


def _tree_attention(branch: Tensor) -> Tensor:
    """Return which cells each cell may look at, bool, shape (rows, 1, width, width); a free one sees itself alone."""
    key, query = branch.unsqueeze(-2), branch.unsqueeze(-1)
    seen = ((key == PROMPT) | (key == query)).tril_() & (query != FREE)
    return (seen | torch.eye(branch.shape[-1], dtype=torch.bool)).unsqueeze(1)


def _trees(sequences: Sequences, rows: Iterable[int] | None = None) -> Iterable[list[int]]:
    """Yield the completions that share a row, in the order of their first; equal prompts are one."""
    trees: dict[bytes, list[list[int]]] = {}
    widths: dict[bytes, int] = {}
    for member in range(len(sequences.completions)) if rows is None else rows:
        prompt, size = sequences.prompts[sequences.parents[member]], len(sequences.completions[member])
        key = prompt.numpy().tobytes()
        if key not in trees or widths[key] + size > WIDEST:
            trees.setdefault(key, []).append([])
            widths[key] = len(prompt)
        trees[key][-1].append(member)
        widths[key] += size
    return (members for split in trees.values() for members in split)


def _tree_width(sequences: Sequences, members: Sequence[int]) -> int:
    """Cells that a prompt and these of its completions take."""
    prompt = sequences.prompts[sequences.parents[members[0]]]
    return len(prompt) + sum(len(sequences.completions[member]) for member in members)


def free_layout() -> Layout:
    """One free cell and no completion: what a rank forwards that has no rows while others have some."""
    nothing = torch.zeros(0, dtype=torch.long)
    cell = torch.zeros(1, 1, dtype=torch.long)
    return Layout(cell, nothing, nothing, nothing, nothing, torch.zeros(0, 1, dtype=torch.bool))


def select(sequences: Sequences, rows: Sequence[int]) -> Sequences:
    """Return the named completions with only the prompts they hang on."""
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
    micro_batch_size: int | None = None,
    max_tokens: int | None = None,
    share_prompts: bool = False,
) -> list[list[int]]:
    """Cut completions into micro-batches; those that share a prompt stay together where it is shared.

    Args:
        sequences: prompts and completions.
        rows: completions to take; None takes all.
        micro_batch_size: most completions of a micro-batch; a prompt's completions may be parted for it.
        max_tokens: most cells of a micro-batch.
        share_prompts: whether `lay_out` may share prompts.

    Returns:
        Completions of each micro-batch, the widest first; together every one once.
    """
    rows = list(range(len(sequences.completions))) if rows is None else list(rows)
    lengths = sequences.lengths
    if not share_prompts:
        return [
            [rows[i] for i in cut] for cut in cut_rows([lengths[row] for row in rows], micro_batch_size, max_tokens)
        ]
    parts: list[list[int]] = []
    for tree in _trees(sequences, rows):
        prompt, part = len(sequences.prompts[sequences.parents[tree[0]]]), list[int]()
        for row in tree:
            wide = max_tokens is not None and _tree_width(sequences, [*part, row]) > max(max_tokens, prompt)
            if part and (wide or len(part) == micro_batch_size):
                parts.append(part)
                part = []
            part.append(row)
        parts.append(part)
    widths = [_tree_width(sequences, part) for part in parts]
    cuts: list[list[int]] = []
    widest = trees = 0
    for index in sorted(range(len(parts)), key=lambda index: (-widths[index], index)):
        size = len(cuts[-1]) + len(parts[index]) if cuts else 0
        many = micro_batch_size is not None and size > micro_batch_size
        if not cuts or many or (max_tokens is not None and (trees + 1) * widest > max_tokens):
            cuts.append([])
            widest, trees = widths[index], 0
        cuts[-1] += parts[index]
        trees += 1
    return cuts


def cut_rows(
    lengths: Sequence[int], micro_batch_size: int | None = None, max_tokens: int | None = None
) -> list[list[int]]:
    """Cut rows into micro-batches of like length, so that little is padded.

    Args:
        lengths: tokens of each row.
        micro_batch_size: most rows of a micro-batch.
        max_tokens: most cells of a micro-batch, rows times the longest row; a longer single row stands alone.

    Returns:
        Row indices of each micro-batch, longest rows first; together every row once.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    cuts: list[list[int]] = []
    for row in order:
        current = cuts[-1] if cuts else None
        full = (
            current is None
            or (micro_batch_size is not None and len(current) >= micro_batch_size)
            or (max_tokens is not None and (len(current) + 1) * lengths[current[0]] > max_tokens)
        )
        if full or current is None:
            cuts.append([row])
        else:
            current.append(row)
    return cuts
