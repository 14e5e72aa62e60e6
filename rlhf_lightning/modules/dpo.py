"""Direct preference optimisation, and what every objective on preference pairs shares.

Notation: y_w and y_l are the chosen and the rejected completion of a pair, S_w and S_l the policy's log-probabilities
of them, n_w and n_l their lengths in tokens, a_w and a_l their log-ratios log policy(y) - log reference(y). The
implicit rewards are u = beta a_w and v = beta a_l, and the reward margin is x = u - v, unless the objective says
otherwise. L_0 is the loss of a pair where policy = reference. Equations are those of a certain label; the loss of a
soft label p is p * loss + (1 - p) * loss of the swapped pair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_lightning.errors import SettingError
from rlhf_lightning.training.gathering import WholeStep, differentiable_parts, whole_step
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.training.module import AlignmentModule, as_loss
from rlhf_lightning.training.offline import OfflineModule
from rlhf_lightning.types import EnumeratedProblem, Loss, PreferenceBatch, PreferenceLogprobs, Step


class PairObjective(AlignmentModule):
    """Base of losses on preference pairs, whether the pairs come from data or from the policy's own samples.

    A subclass overrides one or more of ``implicit_reward``, ``pair_loss`` and ``preference_loss``.
    """

    ranges = {"beta": "(0, inf)", "label_smoothing": "[0, 0.5)"}
    beta: float
    label_smoothing: float = 0.0

    def implicit_reward(self, pairs: PreferenceLogprobs) -> tuple[Tensor, Tensor]:
        """Return the rewards u of chosen and v of rejected that the policy implies, each of shape (pairs,).

        The default loss is of their difference, and the reward metrics are measured in them.
        """
        return self.beta * pairs.chosen_logratio, self.beta * pairs.rejected_logratio

    def reward_margin(self, pairs: PreferenceLogprobs) -> Tensor:
        """Return x = u - v, the implicit reward of chosen minus that of rejected, shape (pairs,)."""
        chosen, rejected = self.implicit_reward(pairs)
        return chosen - rejected

    def pair_loss(self, pair: PreferenceLogprobs) -> Tensor | Loss:
        """Return the loss of pairs whose chosen side is certainly better, here -log sigmoid(x), shape (pairs,)."""
        return -logsigmoid(self.reward_margin(pair))

    def preference_loss(self, pairs: PreferenceLogprobs) -> Tensor | Loss:
        """Return p * pair_loss(pair) + (1 - p) * pair_loss(swapped pair), shape (pairs,); metrics are mixed alike.

        Override it for a loss that is not of this form, such as one that compares the pairs of a step.
        """
        p = pairs.target
        if p.device.type == "cpu" and bool((p == 1).all()):  # on a GPU the test would wait for the device
            return self.pair_loss(pairs)
        # 0 * inf is NaN: where an order has probability 0, compute the loss of the other order instead.
        swapped = pairs.swapped()
        agrees = as_loss(self.pair_loss(pairs.where(p > 0, swapped)))
        disagrees = as_loss(self.pair_loss(swapped.where(p < 1, pairs)))

        def mixed(one: Tensor, other: Tensor) -> Tensor:
            return p * one + (1 - p) * other if one.shape == p.shape else one

        metrics = {name: mixed(values, disagrees.metrics[name]) for name, values in agrees.metrics.items()}
        return Loss(mixed(agrees.values, disagrees.values), metrics)

    def has_losses_of(self, kind: type) -> bool:
        """Return whether this class overrides none of the losses of ``kind``."""
        names = ("implicit_reward", "pair_loss", "preference_loss")
        return all(getattr(type(self), name) is getattr(kind, name) for name in names)

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        """Return reference * exp(reward / beta), normalised; None for another loss, or with label smoothing."""
        return tilted(problem, self.beta) if self.has_losses_of(PairObjective) and not self.label_smoothing else None

    @property
    def value_at_reference(self) -> float | None:
        """L_0, the loss of each pair where policy = reference; None if it depends on the pair or its slots.

        It is computed from three pairs of unequal lengths and log-probabilities.
        """
        if not self.needs_reference:
            return None
        logprobs = torch.tensor([[-1.0, 0.0], [-0.5, -3.0], [-0.7, -0.2]], dtype=torch.float64)
        both = torch.cat([logprobs, logprobs[[1, 0, 1]]])
        pairs = stacked_pairs(both, both, both != 0, {})._replace(rated_margin=torch.arange(3.0).double())
        try:
            with torch.no_grad():
                values = as_loss(self.preference_loss(pairs)).values
        except (KeyError, AttributeError):  # the loss reads a slot, or a property of an input of its own
            return None
        return float(values[0]) if values.allclose(values[0]) else None

    def measure_pairs(self, pairs: PreferenceLogprobs, loss: Loss, count: int, meter: Meter) -> None:
        """Add implicit rewards, margin, accuracy (ties count half) and the loss's own metrics to the meter.

        Args:
            pairs: log-probabilities of the pairs.
            loss: loss of each pair.
            count: number of pairs that the sum of losses is divided by, as in training. Every other metric is a mean
                over the weighted pairs.
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


class DPOModule(PairObjective, OfflineModule):
    r"""Direct preference optimisation: the policy is its own reward model.

    loss = -log sigmoid(x), x = beta [log policy(y_w)/reference(y_w) - log policy(y_l)/reference(y_l)] (Rafailov et al.,
    2305.18290, Eq. 7). L_0 = log 2.
    Target: reference * exp(reward / beta), normalised (Eq. 4), where labels are Bradley-Terry in the rewards.

    Args:
        beta: KL penalty coefficient; the implicit reward is beta * log(policy / reference).
        label_smoothing: share s of labels assumed to be wrong; p becomes (1 - s) p + s (1 - p) for every loss.
        cache_reference: keep the reference's log-probabilities on disk ($RLHF_CACHE, else ~/.cache/rlhf_lightning),
            keyed by weights and rows, so that later epochs and runs need no reference forward pass.

    Raises:
        SettingError: a setting is outside its range, or the objective takes labels as certain.
    """

    paper = "Rafailov et al. 2023, arXiv 2305.18290"
    batch_type = PreferenceBatch
    needs_reference = True
    headline_metrics = ("val/loss", "val/reward_margin", "val/reward_accuracy")

    def __init__(
        self, beta: float = 0.1, label_smoothing: float = 0.0, cache_reference: bool = True,
        learning_rate: float = 1e-6, warmup: float = 0.1, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(learning_rate=learning_rate, warmup=warmup, **kwargs)
        if label_smoothing and not self.weighs_rows:
            takes = f"{type(self).__name__} takes labels as certain"
            raise SettingError("labels-are-certain", f"label_smoothing is {label_smoothing}, but {takes}: set it to 0")
        self.beta, self.label_smoothing, self.cache_reference = beta, label_smoothing, cache_reference

    def loss_sum(self, batch: PreferenceBatch, meter: Meter) -> Tensor:
        return self._measured_loss(self.preference_logprobs(batch), meter).sum()

    def _measured_loss(self, pairs: PreferenceLogprobs, meter: Meter) -> Tensor:
        """Return the weighted loss of each pair, and add the metrics."""
        loss = as_loss(self.preference_loss(pairs))
        self.measure_pairs(pairs, loss, len(loss.values), meter)
        return loss.values * pairs.weights

    def smoothed(self, target: Tensor) -> Tensor:
        """Return labels p with label smoothing applied."""
        return target * (1 - 2 * self.label_smoothing) + self.label_smoothing

    def preference_logprobs(self, batch: PreferenceBatch) -> PreferenceLogprobs:
        """Forward chosen and rejected completions together, through the policy and through the reference.

        Raises:
            SettingError: pairs are weighted, and the objective cannot weigh them.
        """
        if not self.weighs_rows and bool((batch.weights != 1).any()):
            ranked = f"{type(self).__name__} matches pairs by rank and cannot weigh them"
            raise SettingError("pairs-without-weights", f"{ranked}: leave weights at 1")
        layout = self.lay_out(batch.sequences)
        outputs, reference = self.both_logprobs(batch.sequences, layout)
        pairs = stacked_pairs(outputs.logprobs, reference, layout.completion_mask, outputs.extras)
        return pairs._replace(
            target=self.smoothed(batch.target.to(self.device)),
            rated_margin=batch.margin.to(self.device),
            weights=batch.weights.to(self.device),
            extras={**self.slots_of(batch), **pairs.extras},
        )

    # -- losses that couple the pairs of a step ------------------------------------------------------------------------

    def training_step(self, step: Step[PreferenceBatch], batch_idx: int) -> Any:
        """Take one optimizer step; a loss that couples pairs is computed on all pairs of the step at once."""
        if not self._couples(step):
            return super().training_step(step, batch_idx)
        whole, meter = self._whole_step(step), Meter()
        pairs, leaves = whole.with_leaves()
        values = self._measured_loss(pairs, meter)
        gradients = torch.autograd.grad(values.sum(), list(leaves.values()), allow_unused=True)
        slopes = {name: slope for name, slope in zip(leaves, gradients, strict=True) if slope is not None}
        losses = []
        for batch, rows in zip(step.micro_batches, whole.rows, strict=True):
            own = {name: slope[rows] for name, slope in slopes.items()}
            losses.append(partial(self._with_gradient, batch, own, values.detach()[rows].sum()))
        norm = self.update(losses, step.rows)
        self.episodes += step.rows
        self.tokens += step.tokens
        return self.log_training(meter, grad_norm=norm)

    def validation_step(self, step: Step[PreferenceBatch], batch_idx: int) -> None:
        if self._couples(step):
            self._measured_loss(self._whole_step(step).logprobs, self._evaluation)
        else:
            super().validation_step(step, batch_idx)

    def _couples(self, step: Step[PreferenceBatch]) -> bool:
        """Whether the loss of this step needs more pairs than one micro-batch has."""
        return self.batch_coupled and len(step.micro_batches) * self.trainer.world_size > 1

    def _whole_step(self, step: Step[PreferenceBatch]) -> WholeStep:
        """Return the log-probabilities of all pairs of the step, on all ranks, without gradient."""
        with torch.no_grad():
            return whole_step(self, [self.preference_logprobs(batch) for batch in step.micro_batches])

    def _with_gradient(self, batch: PreferenceBatch, slopes: Mapping[str, Tensor], value: Tensor) -> Tensor:
        """Return ``value`` with the given gradients with respect to the micro-batch's log-probabilities and slots."""
        again = differentiable_parts(self.preference_logprobs(batch))
        carriers = [(again[name] * slope[:, : again[name].shape[1]]).sum() for name, slope in slopes.items()]
        carrier = torch.stack(carriers).sum()
        return value + carrier - carrier.detach()


def stacked_pairs(
    policy: Tensor, reference: Tensor | None, mask: Tensor, statistics: Mapping[str, Tensor]
) -> PreferenceLogprobs:
    """Return pairs, certain and of weight 1, from grids of shape (2 pairs, length): chosen rows, then rejected ones.

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


def tilted(problem: EnumeratedProblem, beta: float) -> Tensor:
    """Return reference * exp(reward / beta), normalised, shape (prompts, completions)."""
    return torch.softmax(problem.reference.log() + problem.rewards / beta, -1)


def normalised(problem: EnumeratedProblem, values: Tensor, ratio: Callable[[Tensor], Tensor]) -> Tensor:
    """Return reference * ratio(value + c), with each prompt's c such that it sums to 1, shape (prompts, completions).

    Args:
        problem: the enumerated problem.
        values: value of each completion (reward, win rate), shape (prompts, completions).
        ratio: policy / reference at a shifted value; it must increase, and may reach infinity.
    """
    low, high = -1e9 * torch.ones_like(values[:, :1]), 1e9 * torch.ones_like(values[:, :1])
    for _ in range(200):
        middle = (low + high) / 2
        below = (problem.reference * ratio(values + middle)).sum(-1, keepdim=True) < 1
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    policy = problem.reference * ratio(values + low)
    return policy / policy.sum(-1, keepdim=True)
