"""Objectives on single completions, each labelled desirable or undesirable."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_lightning.errors import undefined
from rlhf_lightning.functional.logprobs import at_least_float32
from rlhf_lightning.models.causal_lm import TokenOutputs
from rlhf_lightning.models.transfer import to_device
from rlhf_lightning.training.gathering import gathered_rows
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.training.offline import OfflineModule
from rlhf_lightning.training.returned_loss import loss_of
from rlhf_lightning.types import DataNeeds, Loss, Sequences, Step, UnpairedBatch, UnpairedLogprobs


class UnpairedModule(OfflineModule):
    r"""Base of objectives on single completions. A subclass overrides ``unpaired_loss`` and ``reference_point``.

    The reference point is the value that rewards are compared with. It is computed over the whole optimizer step and
    all ranks, in a first pass without gradient, so it does not depend on micro-batches or ranks.

    Args:
        beta: KL penalty coefficient; the implicit reward is beta * log(policy / reference).
        cache_reference: keep the reference's log-probabilities on disk ($RLHF_CACHE, else ~/.cache/rlhf_lightning),
            keyed by weights and rows, so that later epochs and runs skip the reference forward pass.
    """

    batch_type = UnpairedBatch
    needs_reference = True
    needs_mismatched: ClassVar[bool] = False
    """Whether each prompt also comes with a mismatched completion: the answer to another prompt."""

    ranges = {"beta": "(0, inf)"}
    headline_metrics = ("val/loss", "val/reward_margin")

    def __init__(
        self,
        beta: float = 0.1,
        cache_reference: bool = True,
        learning_rate: float = 5e-6,
        warmup: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, warmup=warmup, **kwargs)
        self.beta, self.cache_reference = beta, cache_reference
        self._reference_point: Tensor | None = None

    @property
    def data_needs(self) -> DataNeeds:
        return super().data_needs._replace(mismatched=self.needs_mismatched)

    # -- override points ----------------------------------------------------------------------------------------------

    def unpaired_loss(self, logprobs: UnpairedLogprobs) -> Tensor | Loss:
        """Return one loss per row, shape (rows,)."""
        raise undefined(self, "unpaired_loss")

    def reference_point(self, matched: Tensor, mismatched: Tensor) -> Tensor:
        """Return the reference point of a step, a scalar.

        Args:
            matched: log policy - log reference of the step's rows on all ranks, shape (rows,).
            mismatched: the same for the completions of other rows after these prompts; empty without
                ``needs_mismatched``.
        """
        return matched.new_zeros(())

    # -- the step -----------------------------------------------------------------------------------------------------

    def training_step(self, step: Step[UnpairedBatch], batch_idx: int) -> Any:
        """Compute the reference point over the whole step, then take one optimizer step."""
        self._reference_point = self._point_of(step)
        outputs = super().training_step(step, batch_idx)
        self._reference_point = None
        return outputs

    def validation_step(self, step: Step[UnpairedBatch], batch_idx: int) -> None:
        self._reference_point = self._point_of(step)
        super().validation_step(step, batch_idx)
        self._reference_point = None

    @torch.no_grad()
    def _point_of(self, step: Step[UnpairedBatch]) -> Tensor:
        """Return the reference point of a step, from the log-ratios of all ranks."""
        batches = step.micro_batches
        sides: list[list[Sequences]] = [
            [batch.sequences for batch in batches],
            [batch.mismatched for batch in batches if batch.mismatched is not None] if self.needs_mismatched else [],
        ]
        ratios = [[self._logratios(sequences) for sequences in side] for side in sides]
        empty = torch.zeros(0, device=self.device)
        matched, mismatched = (gathered_rows(self, torch.cat([empty, *side])) for side in ratios)
        return self.reference_point(matched, mismatched)

    def _logratios(self, sequences: Sequences) -> Tensor:
        """Return log policy - log reference of completions, shape (completions,)."""
        layout = self.lay_out(sequences)
        outputs: TokenOutputs = self.policy(layout)
        return outputs.logprobs.sum(-1) - self.reference_logprobs(sequences, layout).sum(-1)

    def unpaired_logprobs(self, batch: UnpairedBatch, reference_point: Tensor) -> UnpairedLogprobs:
        """Compute the completions' log-probabilities under the policy and the reference."""
        layout = self.lay_out(batch.sequences)
        outputs, reference = self.both_logprobs(batch.sequences, layout)
        return UnpairedLogprobs(
            policy_logprobs=outputs.logprobs,
            reference_logprobs=reference,
            completion_mask=layout.completion_mask,
            desirable=to_device(batch.desirable, self.device),
            weights=to_device(batch.weights, self.device),
            reference_point=reference_point,
            extras={**self.slots_of(batch), **outputs.extras},
        )

    def loss_sum(self, batch: UnpairedBatch, meter: Meter) -> Tensor:
        point = self._reference_point
        if point is None:  # called outside a step: treat the micro-batch as a step
            point = self._point_of(Step((batch,), len(batch.desirable), 0))
        logprobs = self.unpaired_logprobs(batch, point)
        loss = loss_of(self.unpaired_loss, logprobs, like=logprobs.weights)
        self._measure(logprobs, loss, meter)
        return (loss.values * logprobs.weights).sum()

    def _measure(self, logprobs: UnpairedLogprobs, loss: Loss, meter: Meter) -> None:
        """Record the implicit rewards of desirable and undesirable rows, and the reference point."""
        rewards = self.beta * logprobs.logratio.detach()
        meter.add_ratio("loss", (loss.values * logprobs.weights).sum(), len(rewards))
        meter.add("desirable_reward", rewards, logprobs.desirable)
        meter.add("undesirable_reward", rewards, ~logprobs.desirable)
        meter.add("reference_point", logprobs.reference_point.expand(len(rewards)))
        for name, values in loss.metrics.items():
            meter.add(name, values)

    def evaluation_metrics(self) -> dict[str, float]:
        """Return held-out metrics; the margin is the mean desirable reward minus the mean undesirable reward."""
        means = super().evaluation_metrics()
        if {"desirable_reward", "undesirable_reward"} <= means.keys():
            means["reward_margin"] = means["desirable_reward"] - means["undesirable_reward"]
        return means


class KTOModule(UnpairedModule):
    r"""Kahneman-Tversky optimisation: gains and losses relative to an estimate of the KL to the reference.

    loss = lambda_D (1 - sigmoid(beta (a - z0))) for a desirable row and lambda_U (1 - sigmoid(beta (z0 - a))) for an
    undesirable row, where a is the completion's log-ratio. z0 = max(0, mean log-ratio of mismatched completions)
    estimates KL(policy || reference), without gradient (Ethayarajh et al., 2402.01306, Section 4). When policy =
    reference, the loss is lambda / 2.

    Target: no closed form; the policy that minimises the population loss at its own z0.

    Args:
        desirable_weight: lambda_D; choose it so that lambda_D n_D / (lambda_U n_U) is in [1, 3/2], with n_D desirable
            and n_U undesirable rows.
        undesirable_weight: lambda_U.
    """

    paper = "Ethayarajh et al. 2024, arXiv 2402.01306"
    ranges = {"desirable_weight": "[0, inf)", "undesirable_weight": "[0, inf)"}
    needs_mismatched = True

    def __init__(
        self, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0, **kwargs: Any
    ) -> None:
        super().__init__(beta=beta, **kwargs)
        self.desirable_weight, self.undesirable_weight = desirable_weight, undesirable_weight

    def reference_point(self, matched: Tensor, mismatched: Tensor) -> Tensor:
        if not len(mismatched):
            return matched.new_zeros(())
        return at_least_float32(mismatched).mean().clamp(min=0).detach()

    def unpaired_loss(self, logprobs: UnpairedLogprobs) -> Tensor | Loss:
        advantage = self.beta * (logprobs.logratio - logprobs.reference_point)
        gain, loss = torch.sigmoid(-advantage), torch.sigmoid(advantage)
        return torch.where(logprobs.desirable, self.desirable_weight * gain, self.undesirable_weight * loss)


class BCOModule(UnpairedModule):
    r"""Binary classifier optimisation: classify desirable against undesirable, with the implicit reward as the logit.

    loss = -log sigmoid(beta a - delta) for a desirable row and -log sigmoid(-(beta a - delta)) for an undesirable row.
    delta is the mean reward of the rows of the optimizer step, without gradient (Jung et al., 2404.04656, Section 4).
    When policy = reference, the loss is log 2.

    Target: no closed form; the policy that minimises the population loss at its own delta.
    """

    paper = "Jung et al. 2024, arXiv 2404.04656"

    def __init__(self, beta: float = 0.01, learning_rate: float = 5e-7, **kwargs: Any) -> None:
        super().__init__(beta=beta, learning_rate=learning_rate, **kwargs)

    def reference_point(self, matched: Tensor, mismatched: Tensor) -> Tensor:
        """Return delta, the mean implicit reward of the step's rows, in reward units."""
        return self.beta * matched.mean() if len(matched) else matched.new_zeros(())

    def unpaired_loss(self, logprobs: UnpairedLogprobs) -> Tensor | Loss:
        logits = self.beta * logprobs.logratio - logprobs.reference_point
        return -logsigmoid(torch.where(logprobs.desirable, logits, -logits))

    @property
    def value_at_reference(self) -> float | None:
        return math.log(2)
