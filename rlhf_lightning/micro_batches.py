"""Split rows into micro-batches by their cost, for fixed data and for rollouts.

Rows are sorted by cost to reduce padding. They are split into as few and as even micro-batches as the limits allow. The
split never changes a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlhf_lightning.types import MicroBatchLimits


def cut_micro_batches(
    costs: Sequence[int] | np.ndarray,
    limits: MicroBatchLimits,
    *,
    packed: bool = False,
    rows: Sequence[int] | None = None,
    multiple_of: int = 1,
) -> list[list[int]]:
    """Split units (a unit is a row, or several rows that share a prompt) into micro-batches.

    Args:
        costs: tokens of each unit.
        limits: limits of a micro-batch; a unit above the token budget gets its own micro-batch.
        packed: whether units are packed: the cost of a micro-batch is then the sum of its units. Otherwise each unit
            is padded to the longest.
        rows: number of rows of each unit; None counts 1 per unit.
        multiple_of: the number of micro-batches is a multiple of this number (of ranks).

    Returns:
        Indices of the units of each micro-batch, largest unit first; each unit occurs once. Some micro-batches are
        empty only if ``multiple_of`` requires more micro-batches than there are units.
    """
    costs = np.asarray(costs, dtype=np.int64)
    if not len(costs):
        return []
    order = np.argsort(-costs, kind="stable").tolist()
    falling = costs[order].tolist()
    sizes = [1] * len(falling) if rows is None else [rows[unit] for unit in order]
    spans = _Cut(falling, sizes, limits.micro_batch_size or sum(sizes), packed).spans(limits.max_tokens, multiple_of)
    return [order[start:stop] for start, stop in spans]


def cells_of(costs: Sequence[int], packed: bool) -> int:
    """Return the number of cells of a micro-batch: the sum of costs if packed, else rows times the longest row."""
    return sum(costs) if packed else len(costs) * max(costs, default=0)


class _Cut:
    """Search for the best split; ``costs`` are in descending order."""

    def __init__(self, costs: list[int], sizes: list[int], most: int, packed: bool) -> None:
        self.costs, self.sizes, self.most, self.packed = costs, sizes, most, packed

    def spans(self, max_tokens: int | None, multiple_of: int) -> list[tuple[int, int]]:
        """Return (start, stop) of each micro-batch."""
        costs = self.costs
        limit = max_tokens or sum(costs) + costs[0] * len(costs)
        wanted = multiple_of * -(-len(self.filled(limit)) // multiple_of)
        if wanted == 1:
            return [(0, len(costs))]
        low, high = min(costs[0], limit), limit  # a unit above the limit gets its own micro-batch
        while low < high:  # search the smallest token limit that needs no more micro-batches
            middle = (low + high) // 2
            if len(self.filled(middle)) <= wanted:
                high = middle
            else:
                low = middle + 1
        cuts = self.filled(low)
        while len(cuts) < wanted:
            cells = [(stop - start > 1, cells_of(costs[start:stop], self.packed)) for start, stop in cuts]
            largest = cells.index(max(cells))
            start, stop = cuts[largest]
            middle = (start + stop) // 2 if stop - start > 1 else stop
            cuts[largest : largest + 1] = [(start, middle), (middle, stop)]
        return cuts

    def filled(self, limit: int) -> list[tuple[int, int]]:
        """Fill micro-batches greedily: the fewest that the limits allow."""
        costs, sizes, cuts, start = self.costs, self.sizes, [], 0
        while start < len(costs):
            stop, cells, rows = start + 1, costs[start], sizes[start]
            while stop < len(costs):
                cells = cells + costs[stop] if self.packed else (stop - start + 1) * costs[start]
                rows += sizes[stop]
                if cells > limit or rows > self.most:
                    break
                stop += 1
            cuts.append((start, stop))
            start = stop
        return cuts
