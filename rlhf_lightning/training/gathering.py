"""Collectives: gather rows from all ranks, sum over all data, and join the episodes of a whole optimizer step.

The number of rows may differ between ranks. The ranks of a tensor-parallel group hold one model together and get the
same rows, which count once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from rlhf_lightning.models.transfer import to_device
from rlhf_lightning.types import Advantages, Minibatch, Rollout


def ranks_of_a_model(module: LightningModule) -> int:
    """Return the number of ranks that hold one model together; 1 without tensor parallelism."""
    mesh = module.device_mesh
    return 1 if mesh is None else mesh["tensor_parallel"].size()


def data_ranks(module: LightningModule) -> tuple[int, int]:
    """Return the index of this rank's share of the data, and the number of shares."""
    size = ranks_of_a_model(module)
    return module.global_rank // size, module.trainer.world_size // size


def summed_over_ranks(module: LightningModule, value: Tensor) -> Tensor:
    """Return the sum over all data, in fp64; the result is the same on every rank."""
    total: Tensor = module.trainer.strategy.reduce(to_device(value, module.device).double(), reduce_op="sum")
    return total / ranks_of_a_model(module)


def each_share(module: LightningModule, value: Tensor) -> Tensor:
    """Gather a value from each share of the data, shape (shares, ...)."""
    everyone: Any = module.all_gather(value)
    shares: Tensor = everyone.view(module.trainer.world_size, *value.shape)[:: ranks_of_a_model(module)]
    return shares


def gathered_rows(module: LightningModule, rows: Tensor, counts: Sequence[int] | None = None) -> Tensor:
    """Gather rows from all ranks, in rank order, without gradient to the other ranks.

    Args:
        module: provides the ranks.
        rows: this rank's rows, shape (rows, ...); further dimensions are equal on every rank.
        counts: rows of each share of the data; None gathers the counts with one more collective.
    """
    if module.trainer.world_size == 1:
        return rows
    if counts is None:
        counts = each_share(module, torch.tensor(len(rows), device=module.device)).tolist()
    # A collective needs equal shapes: pad to the longest share, and drop the padding afterwards.
    padded = torch.cat([rows, rows.new_zeros(max(counts) - len(rows), *rows.shape[1:])])
    return torch.cat([part[:count] for part, count in zip(each_share(module, padded), counts, strict=True)])


def whole_minibatch(
    module: LightningModule, rollout: Rollout, advantages: Advantages, rows: list[int], logprobs: Tensor | None
) -> Minibatch:
    """Return the episodes of an optimizer step on all ranks, in the order of their numbers.

    ``rows`` are this rank's rows of the minibatch. ``logprobs`` are the policy's log-probabilities of the whole rollout
    before the update. ``Minibatch.rows`` is the index of each row of the rollout among all episodes of the minibatch,
    -1 outside it.
    """
    assert rollout.episodes is not None
    device, mask, learned = module.device, rollout.completion_mask, advantages.learned
    grids = {
        "old_logprobs": rollout.old_logprobs,
        "entropy": torch.zeros_like(rollout.old_logprobs) if rollout.entropy is None else rollout.entropy,
        "advantages": advantages.advantages,
        "completion_mask": mask,
        "learned": mask if learned is None else learned,
        "behaviour_logprobs": rollout.behaviour_logprobs,
        "logprobs": logprobs,
    }
    index = to_device(torch.tensor(rows, dtype=torch.long), device)
    width = int(each_share(module, torch.tensor(mask.shape[1], device=device)).max())
    episodes = rollout.episodes.to(device)
    first = torch.stack([episodes[rollout.group == group].min() for group in rollout.group])
    fields = {name: padded(grid[index], width) for name, grid in grids.items() if grid is not None}
    fields |= {"scores": rollout.scores[index], "group": first[index], "episodes": episodes[index]}
    counts = each_share(module, torch.tensor(len(rows), device=device)).tolist()
    everyone = {name: gathered_rows(module, values, counts) for name, values in fields.items()}
    numbers, order = everyone.pop("episodes").sort()
    places = torch.full_like(episodes, -1).scatter(0, index, torch.searchsorted(numbers, episodes[index]))
    return Minibatch(rows=places, **{name: values[order] for name, values in everyone.items()})


def padded(grid: Tensor, width: int) -> Tensor:
    """Pad the second dimension with 0 to ``width``."""
    return torch.nn.functional.pad(grid, (0, 0) * (grid.dim() - 2) + (0, width - grid.shape[1]))
