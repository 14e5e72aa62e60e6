"""Rows of all ranks where ranks have other numbers of them, which a collective by itself would hang on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor


def gathered_rows(module: LightningModule, rows: Tensor, counts: Sequence[int] | None = None) -> Tensor:
    """Return the rows of all ranks, rank after rank, without gradient to the others.

    Args:
        module: whose ranks take part.
        rows: this rank's, shape (rows, ...); equal in all further dimensions on every rank.
        counts: rows of each rank; None asks for them, which is one more collective.
    """
    if module.trainer.world_size == 1:
        return rows
    if counts is None:
        found: Any = module.all_gather(torch.tensor(len(rows), device=module.device))
        counts = found.tolist()
    # A collective takes equal shapes alone: pad to the fullest rank, and cut what each has too much.
    padded = torch.cat([rows, rows.new_zeros(max(counts) - len(rows), *rows.shape[1:])])
    everyone: Any = module.all_gather(padded)
    return torch.cat([part[:count] for part, count in zip(everyone, counts, strict=True)])
