"""The optimizer: run length, learning-rate schedule, weight decay, clipping, skipped updates, and resuming."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from rlhf_lightning.compat import attached_datamodule
from rlhf_lightning.deprecation import warn_of_metric
from rlhf_lightning.errors import SettingError, StateError
from rlhf_lightning.loading import import_path

Made = TypeVar("Made")

SHORT_FORM = {
    "optimizer": ("learning_rate", "betas", "adam_eps", "weight_decay", "fused_optimizer"),
    "lr_scheduler": ("lr_schedule", "warmup"),
}
"""Settings that are read only by the default optimizer or the default schedule."""

SCHEDULERS = (LRScheduler, ReduceLROnPlateau)
"""Accepted base classes of a scheduler."""

MOVING = {"last_epoch", "base_lrs", "best", "num_bad_epochs", "cooldown_counter", "verbose"}
"""Scheduler attributes that are state, not settings."""

# -- one optimizer step -----------------------------------------------------------------------------------------------


def steps_of_epoch(trainer: Trainer) -> float:
    """Return the training steps of an epoch within the trainer's limits; infinite for data without a length.

    The DataModule's ``steps_per_epoch`` gives the count. Without it the trainer creates its loaders now and forgets the
    position of a resumed loader, which `ResumeState.begin` restores.
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
    """Return the optimizer steps of the whole run, or None if it has no limit; the DataModule must be set up."""
    bounds: list[int] = []
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        steps = steps_of_epoch(trainer)
        if not math.isinf(steps):
            bounds.append(int(steps) * trainer.max_epochs * updates_per_step)
    if trainer.max_steps is not None and trainer.max_steps > 0:
        bounds.append(trainer.max_steps)
    return max(min(bounds), 1) if bounds else None


def schedule_factor(update: int, total: int, warmup: float, schedule: str) -> float:
    """Return the factor on the peak learning rate for an update, counted from 0.

    ``warmup`` is a number of updates; below 1 it is a share of ``total``. After warm-up the schedule is "constant", or
    "linear" or "cosine" down to 0.
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

    A callback such as Lightning's BaseFinetuning may add groups during a run. Their learning rate is then read as the
    scheduled rate, and their peak is computed from it. ``factor`` returns the factor of an update.
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
        """Return the number of updates; the resuming run provides the factor."""
        return {name: value for name, value in super().state_dict().items() if name != "factor"}


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Set a group's learning rate; a compiled optimizer keeps it in a tensor."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the trainable parameters in two groups: matrices with weight decay, vectors (norms, biases) without."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if p.dim() > 1], "weight_decay": weight_decay, "name": "matrices"},
        {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0, "name": "vectors"},
    ]
    return [group for group in groups if group["params"]]


def clip_by_global_norm(parameters: Iterable[nn.Parameter], limit: float | None) -> Tensor:
    """Clip gradients, also sharded ones, to a global norm; return the norm before clipping. None does not clip.

    The norm is a scalar on the device: reading it would wait for the backward pass.
    """
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    meshes: dict[Any, list[nn.Parameter]] = {}
    for parameter in with_gradient:
        meshes.setdefault(getattr(parameter.grad, "device_mesh", None), []).append(parameter)
    if len(meshes) > 1:  # torch cannot add the norms of matrices that are sharded over different ranks
        norm: Tensor = torch.stack([clip_by_global_norm(group, None).double() for group in meshes.values()]).norm()
        factor = torch.ones_like(norm) if limit is None else (limit / (norm + 1e-6)).clamp(max=1.0)
        for parameter in with_gradient:
            assert parameter.grad is not None
            parameter.grad.mul_(factor)
        return norm
    found: Any = torch.nn.utils.clip_grad_norm_(with_gradient, math.inf if limit is None else limit)
    whole: Tensor = found.full_tensor() if hasattr(found, "full_tensor") else found
    return whole


def accumulate_gradients(
    module: LightningModule, losses: Sequence[Callable[[], Tensor]], scale: float | Tensor
) -> Tensor:
    """Run the backward pass of each loss, times ``scale``; return the sum of the scaled losses, a scalar."""
    total = torch.zeros((), device=module.device)
    for index, loss in enumerate(losses):
        last = index == len(losses) - 1
        with contextlib.nullcontext() if last else without_gradient_sync(module.trainer):
            summed = loss()
            value = summed * (scale.to(summed.dtype) if isinstance(scale, Tensor) else scale)
            total += value.detach()
            module.manual_backward(value)
    return total


def without_gradient_sync(trainer: Trainer) -> contextlib.AbstractContextManager[None]:
    """Return a context in which DDP does not average gradients, for all but the last micro-batch of a step.

    Ranks may have different numbers of micro-batches, and each averaging waits for all ranks.
    """
    strategy = trainer.strategy
    return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else contextlib.nullcontext()


class DivergenceError(StateError):
    """The loss or gradient was NaN or infinite in too many consecutive updates."""


def divergence(module: LightningModule, count: int, last: int) -> DivergenceError:
    """Return the error ``diverged`` for ``count`` consecutive skipped updates that end with update ``last``."""
    checkpoint = str(getattr(module.trainer.checkpoint_callback, "last_model_path", "") or "")
    message = f"non-finite loss or gradient in {count} consecutive updates (last: {last})"
    if not all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters()):
        message += ", and the weights are non-finite too; resume from an earlier checkpoint"
    elif checkpoint:
        message += f"; these updates were skipped, and the last good checkpoint is {checkpoint}"
    else:
        message += "; these updates were skipped, and no checkpoint was written yet"
    return DivergenceError(
        "diverged",
        f"{message}. Look at the rows named in skipped_updates.jsonl in the run folder, lower model.learning_rate, or "
        "raise model.max_skipped_updates",
    )


# -- custom optimizer and scheduler ----------------------------------------------------------------------------------


def refuse_both(kind: type, settings: Mapping[str, Any]) -> None:
    """Refuse a custom optimizer or scheduler together with settings of the default one.

    Args:
        kind: class of the module, for the defaults.
        settings: the module's settings by name.

    Raises:
        SettingError: ``optimizer-and-short-form``.
    """
    for replacement, names in SHORT_FORM.items():
        if settings[replacement] is None:
            continue
        defaults = {name: _default_of(kind, name) for name in names}
        given = [name for name in names if not _equal(settings[name], defaults[name])]
        if given:
            listed = ", ".join(f"model.{name}={settings[name]}" for name in given)
            raise SettingError(
                "optimizer-and-short-form",
                f"model.{replacement} is given together with {listed}, which only the default {replacement} uses: "
                f"set it in model.{replacement}.init_args, and leave model.{given[0]} at its default "
                f"{defaults[given[0]]}",
            )


def _default_of(kind: type, name: str) -> Any:
    """Return the default of a constructor argument, from the class or its first base that has it."""
    for base in kind.__mro__:
        parameters = inspect.signature(vars(base)["__init__"]).parameters if "__init__" in vars(base) else {}
        if name in parameters:
            return parameters[name].default
    return inspect.Parameter.empty


def _equal(one: Any, other: Any) -> bool:
    return one == other or (isinstance(one, list | tuple) and tuple(one) == tuple(other))


def made(spec: Any, setting: str, of: Any, kinds: tuple[type[Made], ...]) -> Made:
    """Create an optimizer from weights, or a scheduler from an optimizer.

    Args:
        spec: a function, a class, its dotted path, or its ``class_path`` and ``init_args`` as kept in a checkpoint.
        setting: name of the setting, for error messages.
        of: the weights, or the optimizer.
        kinds: accepted classes of the result.

    Raises:
        SettingError: ``not-importable``, or ``no-optimizer``: the result is of another class.
    """
    if not callable(spec):
        named = spec if isinstance(spec, Mapping) else {"class_path": spec}
        spec = partial(import_path(str(named.get("class_path")), f"model.{setting}"), **named.get("init_args") or {})
    found = spec(of)
    if not isinstance(found, kinds):
        raise SettingError(
            "no-optimizer",
            f"model.{setting} makes {type(found).__name__}: it must make a {' or '.join(k.__name__ for k in kinds)}",
        )
    return found


# -- resuming ---------------------------------------------------------------------------------------------------------


def asked(optimizer: Optimizer, scheduler: Any) -> dict[str, Any]:
    """Return the settings of a new optimizer and its scheduler as plain data, to compare them on resuming."""
    groups = [
        {name: _plain(value) for name, value in group.items() if name not in ("params", "lr", "initial_lr")}
        | {"lr": _plain(group.get("initial_lr", group["lr"]))}
        for group in optimizer.param_groups
    ]
    state = {} if scheduler is None else scheduler.state_dict()
    settings = {name: _plain(v) for name, v in state.items() if name not in MOVING and not name.startswith("_")}
    return {
        "optimizer": _path(optimizer),
        "groups": groups,
        "scheduler": None if scheduler is None else _path(scheduler),
        "schedule": {name: value for name, value in settings.items() if isinstance(value, bool | int | float | str)},
    }


def check_same_kinds(now: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Refuse to resume with another class of optimizer or scheduler.

    Raises:
        StateError: ``another-optimizer``.
    """
    for part in ("optimizer", "scheduler"):
        if now[part] != before[part]:
            raise StateError(
                "another-optimizer",
                f"the checkpoint was trained with the {part} {before[part]}, whose state {now[part]} cannot load: "
                "resume with the same class, or start a new run from the exported model (model.init_from)",
            )


def check_moments(optimizer: Optimizer) -> None:
    """Refuse restored moments with shapes other than their weights', since a fused kernel would read out of bounds.

    Raises:
        StateError: ``checkpoint-does-not-fit``.
    """
    for weight, state in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"):
            shape = getattr(state.get(name), "shape", None)  # None for a number, and for a missing name
            if shape not in (None, torch.Size() if name == "step" else weight.shape):
                raise StateError(
                    "checkpoint-does-not-fit",
                    f"the checkpoint's optimizer has {name} of shape {tuple(shape)} for a weight of shape "
                    f"{tuple(weight.shape)}; use another checkpoint of the run",
                )


def take_new_settings(optimizer: Optimizer, scheduler: Any, now: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Apply this run's settings to a restored optimizer and scheduler; moments and counters are kept.

    Unchanged settings are not touched, so that an unchanged run resumes bit for bit. The default schedule computes its
    learning rate from the new peak; the learning rate of another scheduler is scaled with the peak. ``now`` and
    ``before`` are the results of `asked` in this run and in the run that wrote the checkpoint.
    """
    if scheduler is not None:
        changed = {name: value for name, value in now["schedule"].items() if before["schedule"].get(name) != value}
        for name, value in changed.items():
            setattr(scheduler, name, value)
    groups = zip(optimizer.param_groups, now["groups"], before["groups"], strict=False)  # a callback may add groups
    for index, (group, new, old) in enumerate(groups):
        for name, value in new.items():
            if old.get(name) != value and name != "lr":
                group[name] = tuple(value) if isinstance(value, list) else value
        if new["lr"] != old["lr"]:
            ratio = new["lr"] / old["lr"] if old["lr"] else None
            set_rate(group, new["lr"] if ratio is None else float(group["lr"]) * ratio)
            if "initial_lr" in group:
                group["initial_lr"] = new["lr"]
            if hasattr(scheduler, "base_lrs"):
                scheduler.base_lrs[index] = new["lr"]
    if isinstance(scheduler, RateSchedule):
        scheduler.recompute()


def _path(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)


def monitored(scheduler: ReduceLROnPlateau) -> str:
    """Return the metric that a plateau scheduler monitors.

    Raises:
        SettingError: ``plateau-without-monitor``: torch's own class has no monitor.
    """
    name = getattr(scheduler, "monitor", None)
    if name is None:
        raise SettingError(
            "plateau-without-monitor",
            "torch's ReduceLROnPlateau does not name the metric that it monitors: use "
            "lightning.pytorch.cli.ReduceLROnPlateau with monitor (for example val/loss)",
        )
    warn_of_metric(str(name))
    return str(name)


def step_plateau(scheduler: ReduceLROnPlateau, metrics: Mapping[str, Any]) -> None:
    """Step a plateau scheduler with its metric after a validation.

    Raises:
        SettingError: ``unknown-monitor``: validation does not log the metric.
    """
    name = monitored(scheduler)
    if name not in metrics:
        known = ", ".join(sorted(metric for metric in metrics if metric.startswith("val/"))) or "none"
        raise SettingError(
            "unknown-monitor", f"lr_scheduler.monitor is {name!r}, which validation does not log; it logs {known}"
        )
    scheduler.step(float(metrics[name]))
