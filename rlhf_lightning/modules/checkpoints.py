"""What a checkpoint holds of a module beside Lightning's own, and whether it fits the module that takes it up."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

ANOTHER_STRATEGY = (
    "the checkpoint was not written under ModelParallelStrategy and cannot be resumed under it; resume it with the "
    "strategy it was written under, or start a new run from its exported model (model.init_from)"
)

COUNTERS = ("updates", "episodes", "tokens", "rollouts")
"""They address sampling and give TensorBoard's x-axes."""


def trained_names(module: nn.Module) -> set[str]:
    """Return the names of the weights that training changes, a tied one under its first."""
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def check_names(module: nn.Module, found: set[str]) -> None:
    """Compare the names of trained weights with those in a checkpoint.

    Raises:
        RuntimeError: they are not the same.
    """
    trainable = trained_names(module)
    missing, unknown = sorted(trainable - found), sorted(found - trainable)
    if missing or unknown:
        raise RuntimeError(
            f"the checkpoint does not fit {type(module).__name__}: {len(missing)} trainable weights are missing "
            f"({', '.join(missing[:2]) or 'none'}), {len(unknown)} are unknown ({', '.join(unknown[:2]) or 'none'})"
        )


def saved(module: Any) -> dict[str, Any]:
    """Return the counters, the names of the trained weights, and the fingerprints of what these stand on."""
    return {
        "sharded": module.device_mesh is not None,
        "trained": sorted(trained_names(module)),
        "progress": {name: getattr(module, name) for name in COUNTERS},
        "started_from": dict(module.fingerprints),
    }


def restore(module: Any, checkpoint: Mapping[str, Any]) -> None:
    """Take up what ``saved`` returned.

    Raises:
        RuntimeError: frozen weights, which no checkpoint holds, are not those it was trained on; or, where weights are
            cut over ranks, the checkpoint is of another model or another strategy.
    """
    if module.device_mesh is not None:
        if not checkpoint["sharded"] and module.trainer.state.fn == "fit":
            raise RuntimeError(f"{ANOTHER_STRATEGY}: the optimizer's state is in another order")
        check_names(module, set(checkpoint["trained"]))
    for name in COUNTERS:
        setattr(module, name, checkpoint["progress"][name])
    if module.lora is not None or module.reference is not None:
        _check_backbone(module, checkpoint["started_from"])


def _check_backbone(module: Any, before: Mapping[str, Any]) -> None:
    """Hold the frozen weights to those that the checkpoint was trained on."""
    now = module.fingerprints
    for part in ("backbone", "adapter", "quantization"):
        if before[part] != now[part]:
            raise RuntimeError(
                f"the checkpoint was trained on another {part}: {str(before[part])[:8]}, and this run starts from "
                f"{str(now[part])[:8]} ({module.init_from}). Frozen weights are in no checkpoint, so resume from the "
                "same init_from"
            )


def plain(value: Any) -> Any:
    """Return hyper-parameters as plain types, which a checkpoint can hold and load without running code."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    kind = value if hasattr(value, "__qualname__") else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"
