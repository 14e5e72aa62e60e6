"""All pairs of an optimizer step at once, for losses that look at them together.

Micro-batches and ranks exist because the activations of a whole step do not fit in memory; its log-probabilities do.
They are collected without gradient, the loss is taken on them as leaves, and a second pass through each micro-batch
carries the leaves' gradients on to the weights: the gradient of the whole step, exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from rlhf_lightning.training.gathering import data_ranks, each_share, gathered_rows
from rlhf_lightning.types import PreferenceLogprobs


class WholeStep(NamedTuple):
    """The pairs of all micro-batches of all ranks.

    Attributes:
        logprobs: of all pairs, rank after rank, as wide as the longest completion of any; without gradient.
        rows: where the pairs of each of this rank's micro-batches are among them.
    """

    logprobs: PreferenceLogprobs
    rows: tuple[slice, ...]

    def with_leaves(self) -> tuple[PreferenceLogprobs, dict[str, Tensor]]:
        """Return the pairs with the policy's log-probabilities and statistics as fresh leaves, and these by name."""
        parts = differentiable_parts(self.logprobs)
        leaves = {name: part.detach().requires_grad_() for name, part in parts.items()}
        chosen, rejected = (leaves[f"policy_{side}_logprobs"] for side in ("chosen", "rejected"))
        extras = {name: leaves.get(name, values) for name, values in self.logprobs.extras.items()}
        pairs = self.logprobs._replace(policy_chosen_logprobs=chosen, policy_rejected_logprobs=rejected, extras=extras)
        return pairs, leaves


def differentiable_parts(logprobs: PreferenceLogprobs) -> dict[str, Tensor]:
    """Return by name what may carry a gradient to the policy: its log-probabilities, and slots of tokens."""
    slots = {
        name: values for name, values in logprobs.extras.items() if values.dim() > 1 and values.is_floating_point()
    }
    sides = {f"policy_{side}_logprobs": getattr(logprobs, f"policy_{side}_logprobs") for side in ("chosen", "rejected")}
    return {**sides, **slots}


@torch.no_grad()
def whole_step(module: LightningModule, parts: Sequence[PreferenceLogprobs]) -> WholeStep:
    """Join this rank's micro-batches with those of the other ranks.

    Args:
        module: whose ranks take part.
        parts: log-probabilities of this rank's micro-batches, of which some may be empty; ranks may have other numbers
            of pairs, and completions of other lengths.
    """
    counts_here = [len(part.target) for part in parts]
    widest = max(mask.shape[1] for part in parts for mask in (part.chosen_mask, part.rejected_mask))
    sizes = each_share(module, torch.tensor([sum(counts_here), widest], device=module.device))
    counts, width = sizes[:, 0].tolist(), int(sizes[:, 1].max())

    def joined(column: list[Tensor | None]) -> Any:
        return _joined(module, column, counts, width)

    names = [name for name in PreferenceLogprobs._fields if name != "extras"]
    fields = {name: joined([getattr(part, name) for part in parts]) for name in names}
    extras = {name: joined([part.extras[name] for part in parts]) for name in parts[0].extras}
    starts = accumulate(counts_here, initial=sum(counts[: data_ranks(module)[0]]))
    rows = tuple(slice(start, stop) for start, stop in pairwise(starts))
    return WholeStep(PreferenceLogprobs(**fields, extras=extras), rows)


def _joined(
    module: LightningModule, column: Sequence[Tensor | None], counts: Sequence[int], width: int
) -> Tensor | None:
    """Return one field of all pairs on all ranks; None where it is left out."""
    present = [part for part in column if part is not None]
    if not present:
        return None
    rows = torch.cat([_padded(part, width) if part.dim() > 1 else part for part in present])
    return gathered_rows(module, rows, counts)


def _padded(grid: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(grid, (0, 0) * (grid.dim() - 2) + (0, width - grid.shape[1]))
