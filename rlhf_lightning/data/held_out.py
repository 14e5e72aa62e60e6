"""Which rows of a store are seen: those held out, and those of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from rlhf_lightning.data.batching import shuffled
from rlhf_lightning.errors import SettingError


def held_out_rows(groups: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Rows to hold out, by seed, so that no prompt is on both sides.

    Args:
        groups: number of each row's prompt, shape (rows,).
        count: rows to hold out.
        seed: seed of the choice.

    Returns:
        the rows in rising order: ``count`` of them, or as near as whole prompts come to it.

    Raises:
        SettingError: if no row would be left to train on.
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
    """Rows of an epoch: each as often as the weight of its source says, a fraction by a fresh choice each epoch.

    Args:
        rows: the rows there are, shape (rows,).
        sources: number of the source of each of them, shape (rows,).
        weights: weight of each source.
        seed: seed of the choices.
        epoch: number of the epoch.

    Raises:
        SettingError: if no row is left.
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
            f"the weights {', '.join(map(str, weights))} of the sources leave no row in an epoch; "
            "choose larger weights",
        )
    return found


def endless_rows(
    rows_of: Callable[[int], np.ndarray], start: int, stop: int, seed: int, shuffle: bool = True
) -> np.ndarray:
    """Rows at the places ``start .. stop - 1`` of an endless sequence of passes, each in an order of its own.

    Args:
        rows_of: rows of a pass, by its number; as many in each.
        start: first place.
        stop: the place after the last.
        seed: seed of the orders.
        shuffle: whether passes are shuffled.
    """
    size = len(rows_of(0))
    passes = []
    for number in range(start // size, -(-stop // size)):
        rows = rows_of(number)
        passes.append(rows[shuffled(size, seed, number)] if shuffle else rows)
    offset = start % size
    return np.concatenate(passes)[offset : offset + stop - start]
