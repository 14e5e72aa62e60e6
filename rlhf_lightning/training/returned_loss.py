"""What an objective's method returns: one loss for each row or token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rlhf_lightning.errors import ContractError
from rlhf_lightning.types import Loss


def as_loss(returned: Tensor | Loss) -> Loss:
    """Return an objective's result as a Loss; a plain tensor has no metrics."""
    return returned if isinstance(returned, Loss) else Loss(returned)


def loss_of(method: Callable[..., Tensor | Loss], *given: Any, like: Tensor) -> Loss:
    """Call an objective's method; return its losses, one for each element of ``like``.

    Raises:
        ContractError: ``loss-shape``; the method returned no tensor, or one of another shape. A mean over rows would
            be averaged again, and a shape such as (rows, 1) would be broadcast.
    """
    loss = as_loss(method(*given))
    shape = tuple(loss.values.shape) if isinstance(loss.values, Tensor) else None
    if shape != tuple(like.shape):
        found = type(loss.values).__name__ if shape is None else f"a tensor of shape {shape}"
        raise ContractError(
            "loss-shape",
            f"{getattr(method, '__qualname__', method)} returned {found}, expected shape {tuple(like.shape)}: return "
            "one loss for each row or token, without mean() or sum()",
        )
    return loss
