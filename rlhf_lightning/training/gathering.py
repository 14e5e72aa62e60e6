"""What ranks tell each other: rows of which each may have another number, sums over all data.

Where the ranks of a tensor-parallel group hold one model together, they see the same rows: those count once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor


def ranks_of_a_model(module: LightningModule) -> int:
    """Return how many ranks hold one model together and see the same rows; 1 without tensor parallelism."""
    mesh = module.device_mesh
    return 1 if mesh is None else mesh["tensor_parallel"].size()


def data_ranks(module: LightningModule) -> tuple[int, int]:
    """Return which share of the data this rank sees, and how many shares there are."""
    size = ranks_of_a_model(module)
    return module.global_rank // size, module.trainer.world_size // size


def summed_over_ranks(module: LightningModule, value: Tensor) -> Tensor:
    """Return the sum over all data, fp64, the same on every rank."""
    total: Tensor = module.trainer.strategy.reduce(value.double(), reduce_op="sum")
    return total / ranks_of_a_model(module)


def each_share(module: LightningModule, value: Tensor) -> Tensor:
    """Return the value of each share of the data, shape (shares, ...)."""
    everyone: Any = module.all_gather(value)
    shares: Tensor = everyone.view(module.trainer.world_size, *value.shape)[:: ranks_of_a_model(module)]
    return shares


def gathered_rows(module: LightningModule, rows: Tensor, counts: Sequence[int] | None = None) -> Tensor:
    """Return the rows of all ranks, rank after rank, without gradient to the others.

    Args:
        module: whose ranks take part.
        rows: this rank's, shape (rows, ...); equal in all further dimensions on every rank.
        counts: rows of each share of the data; None asks for them, which is one more collective.
    """
    if module.trainer.world_size == 1:
        return rows
    if counts is None:
        counts = each_share(module, torch.tensor(len(rows), device=module.device)).tolist()
    # A collective takes equal shapes alone: pad to the fullest rank, and cut what each has too much.
    padded = torch.cat([rows, rows.new_zeros(max(counts) - len(rows), *rows.shape[1:])])
    return torch.cat([part[:count] for part, count in zip(each_share(module, padded), counts, strict=True)])
