"""Collectives: gather rows from all ranks, sum over all data, and join the rows of a whole optimizer step.

Counts of rows may differ between ranks. The ranks of a tensor-parallel group hold one model together and see the same
rows, which count once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from rlhf_lightning.types import Advantages, Minibatch, PreferenceLogprobs, Rollout


def ranks_of_a_model(module: LightningModule) -> int:
    """Return the number of ranks that hold one model together; 1 without tensor parallelism."""
    mesh = module.device_mesh
    return 1 if mesh is None else mesh["tensor_parallel"].size()


def data_ranks(module: LightningModule) -> tuple[int, int]:
    """Return the index of this rank's share of the data, and the number of shares."""
    size = ranks_of_a_model(module)
    return module.global_rank // size, module.trainer.world_size // size


def summed_over_ranks(module: LightningModule, value: Tensor) -> Tensor:
    """Sum over all data, in fp64; the result is the same on every rank."""
    total: Tensor = module.trainer.strategy.reduce(value.double(), reduce_op="sum")
    return total / ranks_of_a_model(module)


def each_share(module: LightningModule, value: Tensor) -> Tensor:
    """Gather a value from each share of the data, shape (shares, ...)."""
    everyone: Any = module.all_gather(value)
    shares: Tensor = everyone.view(module.trainer.world_size, *value.shape)[:: ranks_of_a_model(module)]
    return shares


def gathered_rows(module: LightningModule, rows: Tensor, counts: Sequence[int] | None = None) -> Tensor:
    """Gather rows from all ranks, in the order of ranks, without gradient to the other ranks.

    Args:
        module: gives the ranks.
        rows: this rank's rows, shape (rows, ...); further dimensions are equal on every rank.
        counts: rows of each share of the data; None asks for them, which is one more collective.
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
    """Return all ranks' episodes of an optimizer step, in the order of their numbers.

    Args:
        module: gives the ranks.
        rollout: this rank's episodes.
        advantages: their advantages.
        rows: this rank's rows of the minibatch; ``Minibatch.rows`` is the place of each row of the rollout among all
            episodes, -1 outside the minibatch.
        logprobs: the policy's log-probabilities before the update, shape (episodes, length); None leaves them out.
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
    index = torch.tensor(rows, dtype=torch.long, device=device)
    width = int(each_share(module, torch.tensor(mask.shape[1], device=device)).max())
    episodes = rollout.episodes.to(device)
    first = torch.stack([episodes[rollout.group == group].min() for group in rollout.group])
    fields = {name: _padded(grid[index], width) for name, grid in grids.items() if grid is not None}
    fields |= {"scores": rollout.scores[index], "group": first[index], "episodes": episodes[index]}
    counts = each_share(module, torch.tensor(len(rows), device=device)).tolist()
    everyone = {name: gathered_rows(module, values, counts) for name, values in fields.items()}
    numbers, order = everyone.pop("episodes").sort()
    places = torch.full_like(episodes, -1).scatter(0, index, torch.searchsorted(numbers, episodes[index]))
    return Minibatch(rows=places, **{name: values[order] for name, values in everyone.items()})


class WholeStep(NamedTuple):
    """The pairs of an optimizer step, of all micro-batches and ranks, for losses that look at them together.

    Activations of a whole step do not fit in memory; its log-probabilities do. They are collected without gradient, the
    loss is taken on them as leaves, and a second pass through each micro-batch carries the leaves' gradients on to the
    weights. The result is the exact gradient of the whole step.

    Attributes:
        logprobs: of all pairs, in the order of ranks, padded to the longest completion; without gradient.
        rows: place of each of this rank's micro-batches among them.
    """

    logprobs: PreferenceLogprobs
    rows: tuple[slice, ...]

    def with_leaves(self) -> tuple[PreferenceLogprobs, dict[str, Tensor]]:
        """Return the pairs with log-probabilities and token slots as new leaves, and the leaves by name."""
        parts = differentiable_parts(self.logprobs)
        leaves = {name: part.detach().requires_grad_() for name, part in parts.items()}
        chosen, rejected = (leaves[f"policy_{side}_logprobs"] for side in ("chosen", "rejected"))
        extras = {name: leaves.get(name, values) for name, values in self.logprobs.extras.items()}
        pairs = self.logprobs._replace(policy_chosen_logprobs=chosen, policy_rejected_logprobs=rejected, extras=extras)
        return pairs, leaves


def differentiable_parts(logprobs: PreferenceLogprobs) -> dict[str, Tensor]:
    """Return the tensors that may carry a gradient to the policy, by name: log-probabilities and token slots."""
    slots = {
        name: values for name, values in logprobs.extras.items() if values.dim() > 1 and values.is_floating_point()
    }
    sides = {f"policy_{side}_logprobs": getattr(logprobs, f"policy_{side}_logprobs") for side in ("chosen", "rejected")}
    return {**sides, **slots}


@torch.no_grad()
def whole_step(module: LightningModule, parts: Sequence[PreferenceLogprobs]) -> WholeStep:
    """Join the micro-batches of all ranks.

    Args:
        module: gives the ranks.
        parts: log-probabilities of this rank's micro-batches; some may be empty. Counts of pairs and lengths of
            completions may differ between ranks.
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
    present = [part for part in column if part is not None]
    if not present:
        return None
    rows = torch.cat([_padded(part, width) if part.dim() > 1 else part for part in present])
    return gathered_rows(module, rows, counts)


def _padded(grid: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(grid, (0, 0) * (grid.dim() - 2) + (0, width - grid.shape[1]))
