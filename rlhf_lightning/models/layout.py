"""From ragged sequences to what a transformer reads: one interface, whatever the arrangement of rows.

A layout is the token ids to feed and three index vectors that say where each supervised completion token is predicted.
Everything downstream (log-probabilities, values, scores) uses the indices alone, so that a padded layout can be
exchanged for a packed or a prompt-sharing one without another line changing.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """

    input_ids: Tensor
    predictors: Tensor
    targets: Tensor
    cells: Tensor
    last: Tensor
    completion_mask: Tensor

    def to(self, device: torch.device) -> Layout:
        """Return the same layout on ``device``."""
        return Layout(*(part.to(device, non_blocking=True) for part in self))

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
