"""Pair losses as functions of log-ratios or log-probabilities, without loading a model."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_lightning import modules
from rlhf_lightning.training.returned_loss import as_loss
from rlhf_lightning.types import PreferenceLogprobs


def dpo_loss(margin: Tensor, beta: float, target: Tensor | None = None) -> Tensor:
    """Return DPO's loss written out, for comparison with other objectives; a target of None is a certain label."""
    agrees, disagrees = F.softplus(-beta * margin), F.softplus(beta * margin)
    return agrees if target is None else target * agrees + (1 - target) * disagrees


@cache
def unloaded(name: str, **settings: Any) -> Any:
    """Return an objective without a model."""
    return getattr(modules, name)(init_from="nowhere", **settings)


def certain_pairs(
    chosen: Tensor,
    rejected: Tensor,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    reference_chosen: Tensor | None = None,
    reference_rejected: Tensor | None = None,
    **extras: Tensor,
) -> PreferenceLogprobs:
    """Return pairs with these sequence log-probabilities, all on the first token; without lengths, each
    has one token.
    """
    lengths = [torch.ones_like(chosen) if n is None else n for n in (chosen_lengths, rejected_lengths)]
    width = max(int(torch.cat(lengths).max().ceil()), 1)
    masks = [torch.arange(width) < n.unsqueeze(-1) for n in lengths]
    references = [torch.zeros_like(chosen) if r is None else r for r in (reference_chosen, reference_rejected)]
    grids = [torch.nn.functional.pad(side.unsqueeze(-1), (0, width - 1)) for side in (chosen, rejected, *references)]
    ones = torch.ones_like(chosen)
    return PreferenceLogprobs(*grids, *masks, ones, 0 * ones, ones, extras)


def loss_of(name: str, **settings: Any) -> Callable[..., Tensor]:
    """Return the loss of certain pairs as a function of the arguments of `certain_pairs`."""
    module = unloaded(name, **settings)
    return lambda *given, **named: as_loss(module.preference_loss(certain_pairs(*given, **named))).values


def of_margin(name: str, **settings: Any) -> Callable[[Tensor], Tensor]:
    """Return the loss of certain pairs as a function of their margin."""
    loss = loss_of(name, **settings)
    return lambda margin: loss(margin, torch.zeros_like(margin))
