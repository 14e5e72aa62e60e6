"""Slots: tensors of an objective's own that travel in ``extras``, beside the fields of the tuples in `types`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def on_device(extras: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return slots on a device."""
    return {name: values.to(device) for name, values in extras.items()}


def of_sides(extras: Mapping[str, Tensor], pairs: int) -> dict[str, Tensor]:
    """Part slots of chosen completions stacked on rejected ones into ``chosen_NAME`` and ``rejected_NAME``.

    Args:
        extras: slots of the completions, each of shape (2 * pairs, ...).
        pairs: number of pairs.
    """
    sides = {"chosen": slice(None, pairs), "rejected": slice(pairs, None)}
    return {f"{side}_{name}": values[rows] for name, values in extras.items() for side, rows in sides.items()}


def of_rows(extras: Mapping[str, Tensor], rows: Tensor, length: int) -> dict[str, Tensor]:
    """Return the slots of some rows, those of tokens cut to ``length``."""
    return {name: values[rows] if values.dim() == 1 else values[rows, :length] for name, values in extras.items()}
