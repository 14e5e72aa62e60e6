"""Base of objectives on preference pairs, from data or from samples. Notation as in `modules.dpo`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_lightning.training.gathering import data_ranks, each_share, gathered_rows, padded
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.training.module import AlignmentModule
from rlhf_lightning.training.returned_loss import as_loss, loss_of
from rlhf_lightning.types import EnumeratedProblem, Loss, PreferenceLogprobs


class PairObjective(AlignmentModule):
    """Base of losses on preference pairs, whether the pairs come from data or from the policy's own samples.

    A subclass overrides one or more of ``implicit_reward``, ``pair_loss`` and ``preference_loss``.
    """

    ranges = {"beta": "(0, inf)", "label_smoothing": "[0, 0.5)"}
    beta: float
    label_smoothing: float = 0.0

    def implicit_reward(self, pairs: PreferenceLogprobs) -> tuple[Tensor, Tensor]:
        """Return the implicit rewards u of chosen and v of rejected completions, each of shape (pairs,).

        The default loss is a function of their difference, and the reward metrics are computed from them.
        """
        return self.beta * pairs.chosen_logratio, self.beta * pairs.rejected_logratio

    def reward_margin(self, pairs: PreferenceLogprobs) -> Tensor:
        """Return x = u - v, the implicit reward of chosen minus rejected, shape (pairs,)."""
        chosen, rejected = self.implicit_reward(pairs)
        return chosen - rejected

    def pair_loss(self, pair: PreferenceLogprobs) -> Tensor | Loss:
        """Return the loss of pairs if chosen is certainly better, by default -log sigmoid(x), shape (pairs,)."""
        return -logsigmoid(self.reward_margin(pair))

    def preference_loss(self, pairs: PreferenceLogprobs) -> Tensor | Loss:
        """Return p * pair_loss(pair) + (1 - p) * pair_loss(swapped pair), shape (pairs,); metrics are averaged alike.

        Override it for a loss of another form, such as a loss that compares the pairs of a step.
        """
        p = pairs.target
        if p.device.type == "cpu" and bool((p == 1).all()):  # on a GPU this test would synchronise with the device
            return loss_of(self.pair_loss, pairs, like=p)
        # 0 * inf is NaN: if an order has probability 0, compute the loss of the other order in its place.
        swapped = pairs.swapped()
        agrees = loss_of(self.pair_loss, pairs.where(p > 0, swapped), like=p)
        disagrees = loss_of(self.pair_loss, swapped.where(p < 1, pairs), like=p)

        def mixed(one: Tensor, other: Tensor) -> Tensor:
            return p * one + (1 - p) * other if one.shape == p.shape else one

        metrics = {name: mixed(values, disagrees.metrics[name]) for name, values in agrees.metrics.items()}
        return Loss(mixed(agrees.values, disagrees.values), metrics)

    def has_losses_of(self, kind: type) -> bool:
        """Return whether this class inherits all pair losses of ``kind`` unchanged."""
        names = ("implicit_reward", "pair_loss", "preference_loss")
        return all(getattr(type(self), name) is getattr(kind, name) for name in names)

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        """Return reference * exp(reward / beta), normalised; None for another loss or with label smoothing."""
        return tilted(problem, self.beta) if self.has_losses_of(PairObjective) and not self.label_smoothing else None

    @property
    def value_at_reference(self) -> float | None:
        """L_0, the loss of each pair when policy = reference; None if it depends on the pair or its slots.

        It is computed from three pairs with unequal lengths and log-probabilities.
        """
        if not self.needs_reference:
            return None
        logprobs = torch.tensor([[-1.0, 0.0], [-0.5, -3.0], [-0.7, -0.2]], dtype=torch.float64)
        both = torch.cat([logprobs, logprobs[[1, 0, 1]]])
        pairs = stacked_pairs(both, both, both != 0, {})._replace(rated_margin=torch.arange(3.0).double())
        try:
            with torch.no_grad():
                values = as_loss(self.preference_loss(pairs)).values
        except (KeyError, AttributeError):  # the loss reads a slot, or an attribute of its own input type
            return None
        return float(values[0]) if values.allclose(values[0]) else None

    def measure_pairs(self, pairs: PreferenceLogprobs, loss: Loss, count: int, meter: Meter) -> None:
        """Record implicit rewards, margin, accuracy (ties count half) and the loss's own metrics.

        Args:
            pairs: log-probabilities of the pairs.
            loss: loss of each pair.
            count: number of pairs that divides the sum of losses, as in training. Every other metric is a mean over
                the weighted pairs.
            meter: collects the metrics.
        """
        with torch.no_grad():
            chosen, rejected = self.implicit_reward(pairs)
        weights = pairs.weights
        meter.add_ratio("loss", (loss.values * weights).sum(), count)
        metrics = {
            "chosen_reward": chosen,
            "rejected_reward": rejected,
            "reward_margin": chosen - rejected,
            "reward_accuracy": ((chosen > rejected).double() + (chosen >= rejected)) / 2,
            "chosen_logprob": pairs.chosen_sequence_logprobs,
            "rejected_logprob": pairs.rejected_sequence_logprobs,
            "length_difference": (pairs.chosen_lengths - pairs.rejected_lengths).double(),
        }
        for name, values in {**metrics, **loss.metrics}.items():
            meter.add(name, values, weights if values.shape == weights.shape else None)


def stacked_pairs(
    policy: Tensor, reference: Tensor | None, mask: Tensor, statistics: Mapping[str, Tensor]
) -> PreferenceLogprobs:
    """Return pairs with certain labels and weight 1, from tensors of shape (2 pairs, length): chosen, then rejected.

    Statistics of the rows become the slots ``chosen_NAME`` and ``rejected_NAME``.
    """
    count = len(mask) // 2
    ones = policy.new_ones(count)

    def sides(grid: Tensor | None) -> tuple[Any, Any]:
        return (None, None) if grid is None else (grid[:count], grid[count:])

    slots = {
        f"{side}_{name}": part
        for name, values in statistics.items()
        for side, part in zip(("chosen", "rejected"), sides(values), strict=True)
    }
    return PreferenceLogprobs(
        *sides(policy), *sides(reference), *sides(mask),
        target=ones, rated_margin=0 * ones, weights=ones, extras=slots,
    )  # fmt: skip


def per_token(pairs: PreferenceLogprobs, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """Return values of chosen and rejected completions divided by their lengths, each of shape (pairs,)."""
    return chosen / pairs.chosen_lengths.clamp(min=1), rejected / pairs.rejected_lengths.clamp(min=1)


def mean_logprobs(pairs: PreferenceLogprobs) -> tuple[Tensor, Tensor]:
    """Return the policy's log-probability per token, S / n, of chosen and rejected, each of shape (pairs,)."""
    return per_token(pairs, pairs.chosen_sequence_logprobs, pairs.rejected_sequence_logprobs)


def tilted(problem: EnumeratedProblem, beta: float) -> Tensor:
    """Return reference * exp(reward / beta), normalised, shape (prompts, completions)."""
    return torch.softmax(problem.reference.log() + problem.rewards / beta, -1)


# -- losses that couple the pairs of a step ----------------------------------------------------------------------------


class WholeStep(NamedTuple):
    """The pairs of an optimizer step, of all micro-batches and ranks, for losses that couple them.

    Activations of a whole step do not fit in memory, but its log-probabilities do. They are first collected without
    gradient. The loss and its gradient are then computed with the log-probabilities as leaves. A second forward pass of
    each micro-batch backpropagates the leaves' gradients to the weights. The result is the exact gradient of the whole
    step.

    Attributes:
        logprobs: log-probabilities of all pairs, in rank order, padded to the longest completion; without gradient.
        rows: slice of each of this rank's micro-batches within them.
    """

    logprobs: PreferenceLogprobs
    rows: tuple[slice, ...]

    def losses(
        self, loss: Callable[[PreferenceLogprobs], Tensor], forwards: Sequence[Callable[[], PreferenceLogprobs]]
    ) -> list[Callable[[], Tensor]]:
        """Return, for each micro-batch, a function of its summed loss with the gradient of the whole step's loss.

        Args:
            loss: takes the pairs of the step and returns the loss of each pair.
            forwards: recompute the log-probabilities of each micro-batch, with gradient.
        """
        parts = _differentiable_parts(self.logprobs)
        leaves = {name: part.detach().requires_grad_() for name, part in parts.items()}
        fields = {name: leaf for name, leaf in leaves.items() if name in PreferenceLogprobs._fields}
        slots = {name: leaves.get(name, values) for name, values in self.logprobs.extras.items()}
        values = loss(self.logprobs._replace(**fields, extras=slots))
        gradients = torch.autograd.grad(values.sum(), list(leaves.values()), allow_unused=True)
        slopes = {name: slope for name, slope in zip(leaves, gradients, strict=True) if slope is not None}

        def carried(forward: Callable[[], PreferenceLogprobs], rows: slice) -> Tensor:
            again = _differentiable_parts(forward())
            carriers = [(again[name] * slope[rows][:, : again[name].shape[1]]).sum() for name, slope in slopes.items()]
            carrier = torch.stack(carriers).sum()
            return values.detach()[rows].sum() + carrier - carrier.detach()

        return [partial(carried, forward, rows) for forward, rows in zip(forwards, self.rows, strict=True)]


def _differentiable_parts(logprobs: PreferenceLogprobs) -> dict[str, Tensor]:
    """Return by name the tensors that may carry a gradient to the policy: log-probabilities and token slots."""
    slots = {
        name: values for name, values in logprobs.extras.items() if values.dim() > 1 and values.is_floating_point()
    }
    sides = {f"policy_{side}_logprobs": getattr(logprobs, f"policy_{side}_logprobs") for side in ("chosen", "rejected")}
    return {**sides, **slots}


@torch.no_grad()
def whole_step(module: LightningModule, parts: Sequence[PreferenceLogprobs]) -> WholeStep:
    """Join the micro-batches of all ranks; some may be empty, and counts and lengths may differ between ranks."""
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
    rows = torch.cat([padded(part, width) if part.dim() > 1 else part for part in present])
    return gathered_rows(module, rows, counts)
