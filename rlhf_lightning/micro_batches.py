"""Cut rows into micro-batches by their cost, for fixed data and for rollouts.

Rows are sorted by cost, so that little is padded, and cut into as few and as even micro-batches as the limits allow.
The cut never changes a gradient.
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
    """Cut units (rows, or several rows that share a prompt) into micro-batches.

    Args:
        costs: tokens of each unit.
        limits: bounds of a micro-batch; a larger unit gets a micro-batch of its own.
        packed: whether units are packed, so that a micro-batch costs the sum of its units; otherwise each unit is
            padded to the longest.
        rows: rows of each unit; None counts 1 each.
        multiple_of: the number of micro-batches is a multiple of this (ranks).

    Returns:
        Units of each micro-batch, largest first, every unit once. Micro-batches are empty only if ``multiple_of`` asks
        for more of them than there are units.
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
    """Return the cells of a micro-batch: the sum of its costs if packed, else rows times the longest."""
    return sum(costs) if packed else len(costs) * max(costs, default=0)


class _Cut:
    """A search for the cut; ``costs`` are in falling order."""

    def __init__(self, costs: list[int], sizes: list[int], most: int, packed: bool) -> None:
        self.costs, self.sizes, self.most, self.packed = costs, sizes, most, packed

    def spans(self, max_tokens: int | None, multiple_of: int) -> list[tuple[int, int]]:
        """Return (start, stop) of each micro-batch."""
        costs = self.costs
        limit = max_tokens or sum(costs) + costs[0] * len(costs)
        wanted = multiple_of * -(-len(self.filled(limit)) // multiple_of)
        if wanted == 1:
            return [(0, len(costs))]
        low, high = min(costs[0], limit), limit  # a larger unit stands alone
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
        """Fill one micro-batch after the other: the fewest that the limits allow."""
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
