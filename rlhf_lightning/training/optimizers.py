"""Make the optimizer and learning-rate scheduler of a run, and give a resumed run the settings asked for now."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from rlhf_lightning.errors import SettingError, StateError
from rlhf_lightning.loading import import_path
from rlhf_lightning.training.optimization import RateSchedule, set_rate

if TYPE_CHECKING:
    from rlhf_lightning.training.module import AlignmentModule

Made = TypeVar("Made")

SHORT_FORM = {
    "optimizer": ("learning_rate", "betas", "adam_eps", "weight_decay", "fused_optimizer"),
    "lr_scheduler": ("lr_schedule", "warmup"),
}
"""Settings that only the default optimizer, or the default schedule, reads."""

MOVING = {"last_epoch", "base_lrs", "best", "num_bad_epochs", "cooldown_counter", "verbose"}
"""Attributes of a scheduler that are counters, not settings."""


def refuse_both(module: AlignmentModule) -> None:
    """Refuse an optimizer, or a scheduler, together with settings of the default one.

    Raises:
        SettingError: ``optimizer-and-short-form``.
    """
    for replacement, names in SHORT_FORM.items():
        if getattr(module, replacement) is None:
            continue
        defaults = {name: default_of(type(module), name) for name in names}
        given = [name for name in names if not _equal(getattr(module, name), defaults[name])]
        if given:
            listed = ", ".join(f"model.{name}={getattr(module, name)}" for name in given)
            raise SettingError(
                "optimizer-and-short-form",
                f"model.{replacement} is given together with {listed}, which only the default {replacement} reads: set "
                f"it in model.{replacement}.init_args, and leave model.{given[0]} at its default {defaults[given[0]]}",
            )


def default_of(kind: type, name: str) -> Any:
    """Return the default of a constructor's argument, from the class or the first base that has it."""
    for base in kind.__mro__:
        parameters = inspect.signature(vars(base)["__init__"]).parameters if "__init__" in vars(base) else {}
        if name in parameters:
            return parameters[name].default
    return inspect.Parameter.empty


def _equal(one: Any, other: Any) -> bool:
    return one == other or (isinstance(one, list | tuple) and tuple(one) == tuple(other))


def factory(spec: Any, setting: str) -> Callable[[Any], Any]:
    """Return the function that makes an optimizer from weights, or a scheduler from an optimizer.

    Args:
        spec: a function, a class, its dotted path, or its ``class_path`` and ``init_args`` as kept in a checkpoint.
        setting: name of the setting, for the error.

    Raises:
        SettingError: ``not-importable``.
    """
    if callable(spec):
        given: Callable[[Any], Any] = spec
        return given
    settings = spec if isinstance(spec, Mapping) else {"class_path": spec}
    kind = import_path(str(settings.get("class_path")), f"model.{setting}")
    return partial(kind, **settings.get("init_args") or {})


def made(spec: Any, setting: str, of: Any, kinds: tuple[type[Made], ...]) -> Made:
    """Make the optimizer, or the scheduler, that a setting asks for.

    Raises:
        SettingError: ``no-optimizer``: it made something else.
    """
    found = factory(spec, setting)(of)
    if not isinstance(found, kinds):
        raise SettingError(
            "no-optimizer",
            f"model.{setting} makes {type(found).__name__}: it must make a {' or '.join(k.__name__ for k in kinds)}",
        )
    return found


# -- resuming ---------------------------------------------------------------------------------------------------------


def asked(optimizer: Optimizer, scheduler: Any) -> dict[str, Any]:
    """Return the settings of a new optimizer and its scheduler as plain data, to compare them when a run is resumed."""
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
                f"the checkpoint was trained with the {part} {before[part]}, whose state {now[part]} cannot take: "
                "resume with the same class, or start a new run from the exported model (model.init_from)",
            )


def take_new_settings(optimizer: Optimizer, scheduler: Any, now: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Give a restored optimizer and scheduler the settings asked for now; moments and counters stay.

    Unchanged settings are left alone, so that an unchanged run is resumed bit for bit. The default schedule computes
    its learning rate from the new peak; the learning rate of another scheduler is scaled with the peak.

    Args:
        optimizer: the restored optimizer.
        scheduler: its restored scheduler, or None.
        now: `asked` of this run.
        before: `asked` of the run that wrote the checkpoint.
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


# -- schedulers that look at a metric ---------------------------------------------------------------------------------


def monitored(scheduler: ReduceLROnPlateau) -> str:
    """Return the metric that a plateau scheduler monitors.

    Raises:
        SettingError: ``plateau-without-monitor``: torch's own class names none.
    """
    name = getattr(scheduler, "monitor", None)
    if name is None:
        raise SettingError(
            "plateau-without-monitor",
            "torch's ReduceLROnPlateau does not name the metric that it monitors: use "
            "lightning.pytorch.cli.ReduceLROnPlateau with monitor (for example val/loss)",
        )
    return str(name)


def step_plateau(scheduler: ReduceLROnPlateau, metrics: Mapping[str, Any]) -> None:
    """Step a plateau scheduler with its metric after a validation.

    Raises:
        SettingError: ``unknown-monitor``: validation does not log it.
    """
    name = monitored(scheduler)
    if name not in metrics:
        known = ", ".join(sorted(metric for metric in metrics if metric.startswith("val/"))) or "none"
        raise SettingError(
            "unknown-monitor", f"lr_scheduler.monitor is {name!r}, which validation does not log; it logs {known}"
        )
    scheduler.step(float(metrics[name]))


SCHEDULERS = (LRScheduler, ReduceLROnPlateau)
"""What a scheduler may be."""
