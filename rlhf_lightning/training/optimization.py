"""The arithmetic of an optimizer step: how long a run is, its learning-rate schedule, weight decay, clipping."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ParallelStrategy
from torch import nn


def updates_of_run(trainer: Trainer, updates_per_step: int = 1) -> int | None:
    """Return the optimizer steps of the whole run; None where nothing bounds it.

    Counted from the data's plan: reading ``trainer.estimated_stepping_batches`` here would make the trainer throw away
    the position that a resumed DataLoader has just been given.

    Args:
        trainer: the trainer, its DataModule set up.
        updates_per_step: optimizer steps of one training step.
    """
    steps = getattr(getattr(trainer, "datamodule", None), "steps_per_epoch", None)
    if steps is None and getattr(trainer, "train_dataloader", None) is not None:
        steps = len(trainer.train_dataloader)  # type: ignore[arg-type]
    limit, bounds = trainer.limit_train_batches, []
    if steps is not None and trainer.max_epochs is not None and trainer.max_epochs > 0:
        steps = min(steps, limit) if isinstance(limit, int) else int(steps * (limit or 1.0))
        bounds.append(steps * trainer.max_epochs * updates_per_step)
    if trainer.max_steps is not None and trainer.max_steps > 0:
        bounds.append(trainer.max_steps)
    return max(min(bounds), 1) if bounds else None


def schedule_factor(update: int, total: int, warmup: float, schedule: str) -> float:
    """Return the share of the peak learning rate that an update uses.

    Args:
        update: index of the update, from 0.
        total: updates of the run.
        warmup: updates of linear warm-up, or below 1 the share of all updates.
        schedule: "constant", "linear" to 0 or "cosine" to 0, after warm-up.
    """
    first = int(warmup if warmup >= 1 else warmup * total)
    if update < first:
        return (update + 1) / (first + 1)
    progress = min((update - first) / max(total - first, 1), 1.0)
    if schedule == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule == "cosine" else 1.0


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the trainable parameters for the optimizer: matrices decay, vectors (norms, biases) do not."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def clip_by_global_norm(parameters: Iterable[nn.Parameter], limit: float | None) -> float:
    """Clip gradients to a global norm, sharded ones too, and return the norm before; None measures only."""
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    meshes: dict[Any, list[nn.Parameter]] = {}
    for parameter in with_gradient:
        meshes.setdefault(getattr(parameter.grad, "device_mesh", None), []).append(parameter)
    if len(meshes) > 1:  # torch cannot put the norms of matrices cut over other ranks into one
        norm = math.hypot(*(clip_by_global_norm(group, None) for group in meshes.values()))
        if limit is not None and norm > limit:
            for parameter in with_gradient:
                assert parameter.grad is not None
                parameter.grad.mul_(limit / (norm + 1e-6))
        return norm
    found: Any = torch.nn.utils.clip_grad_norm_(with_gradient, math.inf if limit is None else limit)
    return float(found.full_tensor() if hasattr(found, "full_tensor") else found)


def without_gradient_sync(trainer: Trainer) -> contextlib.AbstractContextManager[None]:
    """Keep DDP from averaging the gradients of a micro-batch that is not the step's last.

    It is not for speed alone: ranks may have other numbers of micro-batches, and each averaging takes all of them.
    """
    strategy = trainer.strategy
    return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else contextlib.nullcontext()
