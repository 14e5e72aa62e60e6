"""Direct preference optimisation, and the family of losses on preference pairs that it heads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.functional.preference import dpo_loss
from rlhf_lightning.models.causal_lm import CausalLM, load_policy
from rlhf_lightning.models.export import export_policy
from rlhf_lightning.models.roles import Reference
from rlhf_lightning.training.coupled import WholeStep, differentiable_parts, whole_step
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.training.module import as_loss
from rlhf_lightning.training.offline import OfflineModule
from rlhf_lightning.training.slots import of_sides, on_device
from rlhf_lightning.types import EnumeratedProblem, Loss, PreferenceBatch, PreferenceLogprobs, Step


class DPOModule(OfflineModule):
    r"""Direct preference optimisation: the policy is its own reward model.

    loss = -p log sigmoid(beta d) - (1 - p) log sigmoid(-beta d), where
    d = log policy(y_c)/reference(y_c) - log policy(y_r)/reference(y_r) and p is the probability that chosen is better
    (Eq. 7 of Rafailov et al., 2305.18290, for p = 1). Policy = reference gives log 2.

    Target: reference * exp(reward / beta), normalised (Eq. 4), where labels are Bradley-Terry in the rewards.

    A subclass changes the objective by overriding ``preference_loss``; it receives token log-probabilities, masks,
    lengths, labels and weights, and returns one value per pair.

    Args:
        beta: strength of the pull towards the reference; the implicit reward is beta * log(policy / reference).
        label_smoothing: share s of the labels taken to be wrong; p becomes (1 - s) p + s (1 - p), whatever the loss.
        cache_reference: keep the reference's log-probabilities on disk ($RLHF_CACHE, else ~/.cache/rlhf_lightning), by
            the content of weights and rows, so that later epochs and runs forward the policy alone.

    Raises:
        ValueError: ``label_smoothing`` is outside [0, 0.5), or the objective takes labels as certain.
    """

    paper = "Rafailov et al. 2023, arXiv 2305.18290"
    batch_type = PreferenceBatch
    needs_reference = True
    headline_metrics = ("val/loss", "val/reward_margin", "val/reward_accuracy")

    def __init__(
        self,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        cache_reference: bool = True,
        learning_rate: float = 1e-6,
        warmup: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, warmup=warmup, **kwargs)
        if not 0 <= label_smoothing < 0.5:
            raise ValueError(f"label_smoothing is {label_smoothing}: it must lie in [0, 0.5)")
        if label_smoothing and not self.weighs_rows:
            raise ValueError(f"label_smoothing is {label_smoothing}, but {type(self).__name__} takes labels as certain")
        self.beta, self.label_smoothing, self.cache_reference = beta, label_smoothing, cache_reference

    @property
    def model(self) -> CausalLM:
        """The policy."""
        return self.policy

    def load_models(self) -> None:
        """Load the policy and its reference."""
        self.policy = load_policy(self.init_from, self.load_settings, self.lora)
        if self.needs_reference:
            self.reference = Reference(self.policy, self.init_from, self.load_settings)

    def preference_loss(self, logprobs: PreferenceLogprobs) -> Tensor | Loss:
        """Return one loss per pair, shape (pairs,). The override point of this family."""
        return dpo_loss(logprobs.margin, self.beta, logprobs.target)

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        """Return reference * exp(reward / beta), normalised (Eq. 4), where labels are Bradley-Terry of the rewards.

        A subclass with another loss has another optimum, and one that it knows it declares.
        """
        if type(self).preference_loss is not DPOModule.preference_loss or self.label_smoothing:
            return None
        return torch.softmax(problem.reference.log() + problem.rewards / self.beta, -1)

    @property
    def value_at_reference(self) -> float | None:
        """What each pair loses where the policy is the reference: log 2. A subclass with another loss says its own."""
        return math.log(2) if type(self).preference_loss is DPOModule.preference_loss else None

    def loss_sum(self, batch: PreferenceBatch, meter: Meter) -> Tensor:
        """Return the summed losses of a micro-batch's pairs."""
        logprobs = self.preference_logprobs(batch)
        loss = as_loss(self.preference_loss(logprobs))
        self._measure(logprobs, loss, meter)
        return (loss.values * logprobs.weights).sum()

    def smoothed(self, target: Tensor) -> Tensor:
        """Return labels, probabilities that chosen is better, with the share that is taken to be wrong mixed in."""
        return target * (1 - 2 * self.label_smoothing) + self.label_smoothing

    def preference_logprobs(self, batch: PreferenceBatch) -> PreferenceLogprobs:
        """Forward chosen and rejected completions together, through the policy and through the reference.

        Raises:
            ValueError: pairs are weighted, and the objective cannot weigh them.
        """
        if not self.weighs_rows and bool((batch.weights != 1).any()):
            raise ValueError(f"{type(self).__name__} matches pairs by rank and cannot weigh them: leave weights at 1")
        layout = self.lay_out(batch.sequences)
        outputs, reference = self.both_logprobs(batch.sequences, layout)
        pairs = len(batch.target)

        chosen, rejected = slice(None, pairs), slice(pairs, None)
        return PreferenceLogprobs(
            policy_chosen_logprobs=outputs.logprobs[chosen],
            policy_rejected_logprobs=outputs.logprobs[rejected],
            reference_chosen_logprobs=None if reference is None else reference[chosen],
            reference_rejected_logprobs=None if reference is None else reference[rejected],
            chosen_mask=layout.completion_mask[chosen],
            rejected_mask=layout.completion_mask[rejected],
            target=self.smoothed(batch.target.to(self.device)),
            rated_margin=batch.margin.to(self.device),
            weights=batch.weights.to(self.device),
            extras={**on_device(batch.extras, self.device), **of_sides(outputs.extras, pairs)},
        )

    # -- losses that couple the pairs of a step ------------------------------------------------------------------------

    def training_step(self, step: Step[PreferenceBatch], batch_idx: int) -> None:
        """Take one optimizer step; a loss that couples pairs is taken over all of the step's pairs at once."""
        if not self._couples(step):
            super().training_step(step, batch_idx)
            return
        whole, meter = self._whole_step(step), Meter()
        pairs, leaves = whole.with_leaves()
        loss = as_loss(self.preference_loss(pairs))
        self._measure(pairs, loss, meter)
        gradients = torch.autograd.grad((loss.values * pairs.weights).sum(), list(leaves.values()), allow_unused=True)
        slopes = {name: slope for name, slope in zip(leaves, gradients, strict=True) if slope is not None}
        parts = zip(step.micro_batches, whole.rows, strict=True)
        values = (loss.values * pairs.weights).detach()
        losses = [
            partial(
                self._with_gradient, batch, {name: slope[rows] for name, slope in slopes.items()}, values[rows].sum()
            )
            for batch, rows in parts
        ]
        norm = self.update(losses, step.rows)
        self.episodes += step.rows
        self.tokens += step.tokens
        self.log_training(meter, grad_norm=norm)

    def validation_step(self, step: Step[PreferenceBatch], batch_idx: int) -> None:
        """Add the metrics of held-out pairs; coupled ones are judged together, as in training."""
        if not self._couples(step):
            super().validation_step(step, batch_idx)
            return
        pairs = self._whole_step(step).logprobs
        self._measure(pairs, as_loss(self.preference_loss(pairs)), self._evaluation)

    def _couples(self, step: Step[PreferenceBatch]) -> bool:
        """Whether the loss of this step needs more pairs than a micro-batch has."""
        return self.batch_coupled and len(step.micro_batches) * self.trainer.world_size > 1

    def _whole_step(self, step: Step[PreferenceBatch]) -> WholeStep:
        """Return the log-probabilities of all pairs of the step, on all ranks, without gradient."""
        with torch.no_grad():
            return whole_step(self, [self.preference_logprobs(batch) for batch in step.micro_batches])

    def _with_gradient(self, batch: PreferenceBatch, slopes: Mapping[str, Tensor], value: Tensor) -> Tensor:
        """Return ``value``, with the given gradients by the micro-batch's log-probabilities and slots."""
        again = differentiable_parts(self.preference_logprobs(batch))
        carriers = [(again[name] * slope[:, : again[name].shape[1]]).sum() for name, slope in slopes.items()]
        carrier = torch.stack(carriers).sum()
        return value + carrier - carrier.detach()

    # -- metrics, export -----------------------------------------------------------------------------------------------

    def _measure(self, logprobs: PreferenceLogprobs, loss: Loss, meter: Meter) -> None:
        """Add what every preference objective is compared by."""
        measure_pairs(logprobs, loss, getattr(self, "beta", 1.0), len(loss.values), meter)

    def export(self, folder: str | Path) -> Path:
        """Write the policy as a Hugging Face folder."""
        return export_policy(self.policy, self.tokenizer, folder)


def measure_pairs(logprobs: PreferenceLogprobs, loss: Loss, beta: float, count: int, meter: Meter) -> None:
    """Add the implicit rewards, margins and accuracy that every objective on pairs is compared by.

    Args:
        logprobs: of the pairs.
        loss: of each pair.
        beta: rewards per nat of log-ratio.
        count: pairs that the sum of losses is divided by.
        meter: what they are added to.
    """
    chosen, rejected = logprobs.chosen_logratio.detach(), logprobs.rejected_logratio.detach()
    weights = logprobs.weights
    # The loss is what is trained, a sum over the count of pairs; everything else is a mean over the weighted pairs.
    meter.add_ratio("loss", (loss.values * weights).sum(), count)
    metrics = {
        "chosen_reward": beta * chosen,
        "rejected_reward": beta * rejected,
        "reward_margin": beta * (chosen - rejected),
        "reward_accuracy": (chosen > rejected).double(),
        "chosen_logprob": logprobs.chosen_sequence_logprobs,
        "rejected_logprob": logprobs.rejected_sequence_logprobs,
        "length_difference": (logprobs.chosen_lengths - logprobs.rejected_lengths).double(),
    }
    for name, values in {**metrics, **loss.metrics}.items():
        meter.add(name, values, weights if values.shape == weights.shape else None)
