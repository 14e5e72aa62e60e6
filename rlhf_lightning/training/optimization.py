"""One optimizer step: length of a run, learning-rate schedule, weight decay, gradient clipping, skipped updates."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rlhf_lightning.compat import attached_datamodule
from rlhf_lightning.errors import StateError

if TYPE_CHECKING:
    from rlhf_lightning.training.module import AlignmentModule


def steps_of_epoch(trainer: Trainer) -> float:
    """Return the training steps of an epoch within the trainer's limits; infinite for data without a length.

    The DataModule's plan gives the count. Without one the trainer makes its loaders now and forgets the position of a
    resumed loader, which `checkpoint_state.begin` restores.
    """
    steps = getattr(attached_datamodule(trainer), "steps_per_epoch", None)
    if steps is None:
        trainer.fit_loop.setup_data()
        return float(trainer.num_training_batches)
    limit = trainer.limit_train_batches
    return min(steps, limit) if isinstance(limit, int) else int(steps * (1.0 if limit is None else limit))


def rows_of_step(trainer: Trainer) -> int:
    """Return the rows of a training step over all ranks: ``data.batch_size``, else the rows of the first step."""
    rows = getattr(attached_datamodule(trainer), "batch_size", None)
    if rows is not None:
        return int(rows)
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    loader: Any = trainer.train_dataloader
    with torch.random.fork_rng(devices=[]):  # a DataLoader draws a seed for its workers
        return int(next(iter(loader)).rows)


def updates_of_run(trainer: Trainer, updates_per_step: int = 1) -> int | None:
    """Return the optimizer steps of the whole run, or None if nothing bounds it; the DataModule must be set up."""
    bounds: list[int] = []
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        steps = steps_of_epoch(trainer)
        if not math.isinf(steps):
            bounds.append(int(steps) * trainer.max_epochs * updates_per_step)
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


class RateSchedule(LRScheduler):
    """Multiply each group's peak learning rate by a factor that depends only on the number of updates.

    A callback such as Lightning's BaseFinetuning may add groups during a run. Their learning rate is then taken as the
    scheduled one, from which their peak follows.

    Args:
        optimizer: its groups have their peak learning rates.
        factor: share of the peak that an update uses, see `schedule_factor`.
    """

    def __init__(self, optimizer: Optimizer, factor: Callable[[int], float]) -> None:
        self.factor = factor
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        """Return the learning rate of each group for the next update."""
        before, groups = self.factor(max(self.last_epoch - 1, 0)), self.optimizer.param_groups
        for group in groups:
            group.setdefault("initial_lr", group["lr"] / before if before else group["lr"])
        return [group["initial_lr"] * self.factor(self.last_epoch) for group in groups]

    def recompute(self) -> None:
        """Set the learning rates for the restored number of updates."""
        for group in self.optimizer.param_groups:
            set_rate(group, group["initial_lr"] * self.factor(self.last_epoch))

    def state_dict(self) -> dict[str, Any]:
        """Return the number of updates; the resuming run gives the rest."""
        return {name: value for name, value in super().state_dict().items() if name != "factor"}


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Set a group's learning rate; a compiled optimizer reads a tensor."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the trainable parameters for the optimizer: matrices decay, vectors (norms, biases) do not."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if p.dim() > 1], "weight_decay": weight_decay, "name": "matrices"},
        {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0, "name": "vectors"},
    ]
    return [group for group in groups if group["params"]]


def clip_by_global_norm(parameters: Iterable[nn.Parameter], limit: float | None) -> float:
    """Clip gradients, sharded ones too, to a global norm and return the norm before; None only measures."""
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    meshes: dict[Any, list[nn.Parameter]] = {}
    for parameter in with_gradient:
        meshes.setdefault(getattr(parameter.grad, "device_mesh", None), []).append(parameter)
    if len(meshes) > 1:  # torch cannot add the norms of matrices that are sharded over different ranks
        norm = math.hypot(*(clip_by_global_norm(group, None) for group in meshes.values()))
        if limit is not None and norm > limit:
            for parameter in with_gradient:
                assert parameter.grad is not None
                parameter.grad.mul_(limit / (norm + 1e-6))
        return norm
    found: Any = torch.nn.utils.clip_grad_norm_(with_gradient, math.inf if limit is None else limit)
    return float(found.full_tensor() if hasattr(found, "full_tensor") else found)


def without_gradient_sync(trainer: Trainer) -> contextlib.AbstractContextManager[None]:
    """Keep DDP from averaging gradients before the last micro-batch of a step.

    Ranks may have different numbers of micro-batches, and each averaging waits for all ranks.
    """
    strategy = trainer.strategy
    return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else contextlib.nullcontext()


class DivergenceError(StateError):
    """The loss or gradient was NaN or infinite in too many consecutive updates."""


class Skips:
    """Count consecutive skipped updates, and stop the run at a limit.

    Args:
        most: the run stops at this many consecutive skipped updates.
    """

    def __init__(self, most: int) -> None:
        self.most, self.in_a_row = most, 0

    def check(self, module: AlignmentModule, finite: bool) -> None:
        """Count an update of a module, whose loss and gradient were finite or not.

        Raises:
            DivergenceError: ``diverged``: the limit is reached.
        """
        self.in_a_row = 0 if finite else self.in_a_row + 1
        if self.in_a_row >= self.most:
            raise DivergenceError("diverged", _divergence_message(module, self.most))


def _divergence_message(module: AlignmentModule, count: int) -> str:
    weights = all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters())
    checkpoint = str(getattr(module.trainer.checkpoint_callback, "last_model_path", "") or "")
    message = f"non-finite loss or gradient in {count} consecutive updates (last: {module.updates})"
    if not weights:
        message += ", and the weights are non-finite too; resume from an earlier checkpoint"
    elif checkpoint:
        message += f"; these updates were skipped, and the last good checkpoint is {checkpoint}"
    else:
        message += "; these updates were skipped, and no checkpoint was written yet"
    return (
        f"{message}. Look at the rows named in skipped_updates.jsonl in the run folder, lower model.learning_rate, or "
        "raise model.max_skipped_updates"
    )
