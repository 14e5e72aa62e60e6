"""The one owner of batching: which rows make an optimizer step, and how each rank cuts its share into micro-batches.

`BatchPlan` is pure arithmetic on row lengths: every rank computes the same plan, so nothing has to be communicated. The
rows of a step depend on (seed, epoch, batch_size) alone. Within the step they are sorted by length and cut so that
little padding is paid for, and dealt to the ranks so that each gets the same number of micro-batches and about the same
work. How a step is cut therefore never changes which rows it averages over, and one integer, the step, is a resume
cursor that holds for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class PlannedStep(NamedTuple):
    """One rank's share of an optimizer step.

    Attributes:
        micro_batches: row indices of each micro-batch; as many on every rank. Empty only where the step has fewer rows
            than ranks need micro-batches.
        rows: rows of the step over all ranks.
        tokens: supervised tokens of the step over all ranks.
    """

    micro_batches: tuple[tuple[int, ...], ...]
    rows: int
    tokens: int


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of ``range(count)`` that depends on (seed, epoch) alone, on every machine and NumPy version."""
    key = np.array([seed % 2**64, epoch % 2**64], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable")


class BatchPlan:
    """The optimizer steps of one epoch.

    Args:
        lengths: cost of a row in tokens: for one sequence its length, for a pair twice the longer of its two, or prompt
            and both completions where these share it.
        tokens: supervised tokens of each row.
        batch_size: rows of an optimizer step over all ranks.
        micro_batch_size: most rows of a micro-batch.
        max_tokens: most tokens of a micro-batch, pads included (rows times the longest) unless rows are packed; a row
            longer than that alone makes a micro-batch of its own.
        ranks: number of data-parallel ranks.
        seed: seed of the order.
        epoch: number of the epoch; each has an order of its own.
        shuffle: whether rows are shuffled; otherwise steps take them as they come.
        drop_last: whether a last step with fewer than ``batch_size`` rows is left out.
        packed: whether the model reads rows laid end to end, see `models.layout.packed_layout`, so that none is padded.

    Raises:
        ValueError: if a size is not positive, or there is no row.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        tokens: Sequence[int] | np.ndarray,
        *,
        batch_size: int,
        micro_batch_size: int | None = None,
        max_tokens: int | None = None,
        ranks: int = 1,
        seed: int = 0,
        epoch: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        packed: bool = False,
    ) -> None:
        for name, size in (("batch_size", batch_size), ("ranks", ranks)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, not {size}.")
        for name, limit in (("micro_batch_size", micro_batch_size), ("max_tokens", max_tokens)):
            if limit is not None and limit < 1:
                raise ValueError(f"{name} must be at least 1 or None, not {limit}.")
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.tokens = np.asarray(tokens, dtype=np.int64)
        if self.lengths.shape != self.tokens.shape or self.lengths.ndim != 1:
            raise ValueError(f"{len(self.lengths)} lengths for {len(self.tokens)} token counts: one of each a row.")
        count = len(self.lengths)
        if count == 0:
            raise ValueError("A plan needs at least one row.")
        if drop_last and count < batch_size:
            raise ValueError(f"{count} rows are fewer than batch_size {batch_size}, and drop_last leaves out the rest.")
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.max_tokens = max_tokens
        self.ranks = ranks
        self.packed = packed
        self.steps = count // batch_size if drop_last else -(-count // batch_size)
        self.order = shuffled(count, seed, epoch) if shuffle else np.arange(count)

    def __len__(self) -> int:
        """Optimizer steps of the epoch."""
        return self.steps

    def rows_of(self, step: int) -> np.ndarray:
        """Indices of the rows of a step, over all ranks."""
        if not 0 <= step < self.steps:
            raise IndexError(f"Step {step} of an epoch of {self.steps}.")
        return self.order[step * self.batch_size : (step + 1) * self.batch_size]

    def step(self, index: int, rank: int) -> PlannedStep:
        """One rank's share of the step ``index``."""
        rows = self.rows_of(index)
        by_length = rows[np.argsort(-self.lengths[rows], kind="stable")]
        cuts = self._cut(self.lengths[by_length].tolist())
        groups = [tuple(by_length[start:stop].tolist()) for start, stop in cuts]
        costs = [self._cells(self.lengths[list(group)].tolist()) for group in groups]
        mine = _dealt(costs, self.ranks)[rank]
        return PlannedStep(tuple(groups[i] for i in mine), len(rows), int(self.tokens[rows].sum()))

    def _cells(self, lengths: list[int]) -> int:
        """Cells that a micro-batch takes, by its lengths in falling order."""
        if self.packed or not lengths:
            return sum(lengths)
        return len(lengths) * lengths[0]

    def _cut(self, lengths: list[int]) -> list[tuple[int, int]]:
        """Cut lengths in falling order into micro-batches, as few as the limits allow and a multiple of the ranks."""
        limit = self.max_tokens or sum(lengths) + lengths[0] * len(lengths)
        wanted = self.ranks * -(-len(self._filled(lengths, limit)) // self.ranks)
        if wanted == 1:
            return [(0, len(lengths))]
        low, high = min(lengths[0], limit), limit  # a row longer than the limit stands alone, and widens no other
        while low < high:  # the smallest token limit that needs no more micro-batches
            middle = (low + high) // 2
            if len(self._filled(lengths, middle)) <= wanted:
                high = middle
            else:
                low = middle + 1
        cuts = self._filled(lengths, low)
        while len(cuts) < wanted:
            sizes = [(stop - start > 1, self._cells(lengths[start:stop])) for start, stop in cuts]
            largest = sizes.index(max(sizes))
            start, stop = cuts[largest]
            middle = (start + stop) // 2 if stop - start > 1 else stop
            cuts[largest : largest + 1] = [(start, middle), (middle, stop)]
        return cuts

    def _filled(self, lengths: list[int], limit: int) -> list[tuple[int, int]]:
        """Fill micro-batches one after the other, longest rows first: the fewest that the limits allow."""
        most = self.micro_batch_size or len(lengths)
        cuts, start = [], 0
        while start < len(lengths):
            stop = start + 1
            cells = lengths[start]
            while stop < len(lengths) and stop - start < most:
                cells = cells + lengths[stop] if self.packed else (stop - start + 1) * lengths[start]
                if cells > limit:
                    break
                stop += 1
            cuts.append((start, stop))
            start = stop
        return cuts


def _dealt(costs: list[int], ranks: int) -> list[list[int]]:
    """Deal micro-batches to ranks, as many to each: by falling cost, the costliest of a round to the least loaded."""
    falling = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    hands: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for first in range(0, len(falling), ranks):
        hungry = sorted(range(ranks), key=lambda r: (loads[r], r))
        for rank, index in zip(hungry, falling[first : first + ranks], strict=True):
            hands[rank].append(index)
            loads[rank] += costs[index]
    return hands
