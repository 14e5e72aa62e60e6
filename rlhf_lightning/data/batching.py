"""Plan the rows of an epoch, of its optimizer steps, and of each rank's micro-batches.

`BatchPlan` depends only on row lengths and settings: every rank computes the same plan without communication. The rows
of a step depend on (seed, epoch, batch_size) only. Within a step, rows are sorted by length, split into micro-batches
with little padding, and distributed so that every rank gets the same number of micro-batches and about the same work.
The split never changes the rows that a step averages over. To resume, a single integer (the step) suffices for any
number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from rlhf_lightning.errors import DataError, SettingError, StateError
from rlhf_lightning.micro_batches import cells_of, cut_micro_batches
from rlhf_lightning.types import NO_LIMITS, MicroBatchLimits


class PlannedStep(NamedTuple):
    """One rank's share of an optimizer step.

    Attributes:
        micro_batches: row indices of each micro-batch; every rank has the same number of micro-batches. A micro-batch
            is empty only if the step has fewer rows than the ranks need micro-batches.
        rows: rows of the step over all ranks.
        tokens: supervised tokens of the step over all ranks.
    """

    micro_batches: tuple[tuple[int, ...], ...]
    rows: int
    tokens: int


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """Permute ``range(count)`` by (seed, epoch) only: the result is the same for all machines and NumPy versions."""
    key = np.array([seed % 2**64, epoch % 2**64], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable")


def held_out_rows(groups: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Choose rows to hold out, by seed, so that no prompt is in both training and held-out rows.

    Return ``count`` rows in ascending order, or as close to it as whole prompts allow; ``groups`` numbers each row's
    prompt.

    Raises:
        SettingError: no row would be left to train on.
    """
    members: dict[int, list[int]] = {}
    for row, group in enumerate(np.asarray(groups).tolist()):
        members.setdefault(group, []).append(row)
    prompts = list(members.values())
    chosen: list[int] = []
    for index in shuffled(len(prompts), seed, 2**63).tolist():
        if len(chosen) + len(prompts[index]) <= count:
            chosen += prompts[index]
    if not chosen:
        chosen = min(prompts, key=len)
    if count >= len(groups) or len(chosen) == len(groups):
        raise SettingError(
            "no-rows-left",
            f"eval_rows {count} leaves no row to train on: {len(groups)} rows of {len(prompts)} "
            "prompts were kept, and rows of one prompt stay on one side; choose a smaller eval_rows",
        )
    return np.sort(np.asarray(chosen, dtype=np.int64))


def weighted_rows(rows: np.ndarray, sources: np.ndarray, weights: Sequence[float], seed: int, epoch: int) -> np.ndarray:
    """Return the rows of an epoch, each repeated by its source's weight; a fractional part is sampled anew each epoch.

    ``sources`` is the index of each row's source, shape (rows,).

    Raises:
        SettingError: no row is left.
    """
    if all(weight == 1 for weight in weights):
        return rows
    chosen = []
    for number, weight in enumerate(weights):
        mine = rows[sources == number]
        part = round(len(mine) * (weight % 1))
        chosen += [mine] * int(weight)
        chosen.append(np.sort(mine[shuffled(len(mine), seed + 1 + number, epoch)[:part]]))
    found = np.concatenate(chosen)
    if len(found) == 0:
        raise SettingError(
            "no-rows-left",
            f"the weights {', '.join(map(str, weights))} of the sources give an epoch without rows; "
            "choose larger weights",
        )
    return found


def endless_rows(
    rows_of: Callable[[int], np.ndarray], start: int, stop: int, seed: int, shuffle: bool = True
) -> np.ndarray:
    """Return the rows at ``start .. stop - 1`` of an endless sequence of passes, each shuffled differently.

    ``rows_of`` returns the rows of a pass, given its number; every pass has the same number of rows.
    """
    size = len(rows_of(0))
    passes = []
    for number in range(start // size, -(-stop // size)):
        rows = rows_of(number)
        passes.append(rows[shuffled(size, seed, number)] if shuffle else rows)
    offset = start % size
    return np.concatenate(passes)[offset : offset + stop - start]


class BatchPlan:
    """The optimizer steps of one epoch.

    Args:
        lengths: cost of each row in tokens. For one sequence: its length. For a pair: twice the longer sequence, or
            prompt plus both completions if packing shares the prompt.
        tokens: supervised tokens of each row.
        batch_size: rows of an optimizer step over all ranks.
        limits: limits of a micro-batch, see `micro_batches`.
        ranks: number of data-parallel ranks.
        seed: seed of the order.
        epoch: number of the epoch; each epoch has its own order.
        shuffle: whether rows are shuffled; otherwise steps take them in their given order.
        drop_last: whether to drop a last step with fewer than ``batch_size`` rows.
        packed: whether the model supports packed rows without padding, see `models.layout.packed_layout`.

    Raises:
        SettingError: a size is not positive.
        DataError: there are no rows.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        tokens: Sequence[int] | np.ndarray,
        *,
        batch_size: int,
        limits: MicroBatchLimits = NO_LIMITS,
        ranks: int = 1,
        seed: int = 0,
        epoch: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        packed: bool = False,
    ) -> None:
        for name, size in (("batch_size", batch_size), ("ranks", ranks)):
            if size < 1:
                raise SettingError("setting-out-of-range", f"{name} is {size}: it must be at least 1")
        for name, limit in limits._asdict().items():
            if limit is not None and limit < 1:
                raise SettingError(
                    "setting-out-of-range", f"{name} is {limit}: it must be at least 1, or None for no limit"
                )
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.tokens = np.asarray(tokens, dtype=np.int64)
        if self.lengths.shape != self.tokens.shape or self.lengths.ndim != 1:
            raise DataError(
                "shape-mismatch",
                f"{len(self.lengths)} lengths for {len(self.tokens)} token counts; give one of each per row",
            )
        count = len(self.lengths)
        if count == 0:
            raise DataError("no-rows", "a plan of steps needs at least one row, and got none")
        if drop_last and count < batch_size:
            raise SettingError(
                "batch-too-large",
                f"{count} rows are fewer than batch_size {batch_size}, and drop_last drops the incomplete "
                "batch; choose a smaller batch_size",
            )
        self.batch_size = batch_size
        self.limits = limits
        self.ranks = ranks
        self.packed = packed
        self.steps = count // batch_size if drop_last else -(-count // batch_size)
        self.order = shuffled(count, seed, epoch) if shuffle else np.arange(count)

    def __len__(self) -> int:
        return self.steps

    def rows_of(self, step: int) -> np.ndarray:
        """Return the indices of the rows of a step, over all ranks."""
        if not 0 <= step < self.steps:
            raise StateError("no-such-step", f"step {step} is outside an epoch of {self.steps} steps")
        return self.order[step * self.batch_size : (step + 1) * self.batch_size]

    def step(self, index: int, rank: int) -> PlannedStep:
        """Return one rank's share of the step ``index``."""
        rows = self.rows_of(index)
        lengths = self.lengths[rows]
        cuts = cut_micro_batches(lengths, self.limits, packed=self.packed, multiple_of=self.ranks)
        costs = [cells_of(lengths[cut].tolist(), self.packed) for cut in cuts]
        mine = _distributed(costs, self.ranks)[rank]
        groups = tuple(tuple(rows[cuts[index]].tolist()) for index in mine)
        return PlannedStep(groups, len(rows), int(self.tokens[rows].sum()))


def _distributed(costs: list[int], ranks: int) -> list[list[int]]:
    """Assign micro-batches in rounds of one per rank: the costliest of a round goes to the least loaded rank."""
    falling = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for first in range(0, len(falling), ranks):
        by_load = sorted(range(ranks), key=lambda r: (loads[r], r))
        for rank, index in zip(by_load, falling[first : first + ranks], strict=True):
            shares[rank].append(index)
            loads[rank] += costs[index]
    return shares
