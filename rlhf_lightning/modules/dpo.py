"""Direct preference optimisation, and the family of losses on preference pairs that it heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from rlhf_lightning.functional.preference import dpo_loss
from rlhf_lightning.models.causal_lm import CausalLM, load_policy
from rlhf_lightning.models.export import export_policy
from rlhf_lightning.models.roles import Reference
from rlhf_lightning.modules.base import as_loss, layout_of
from rlhf_lightning.modules.meter import Meter
from rlhf_lightning.modules.offline import OfflineModule
from rlhf_lightning.types import EnumeratedProblem, Loss, PreferenceBatch, PreferenceLogprobs, Step


class DPOModule(OfflineModule):
    r"""Direct preference optimisation: the policy is its own reward model.

    loss = -p log sigmoid(beta d) - (1 - p) log sigmoid(-beta d), where
    d = log policy(y_c)/reference(y_c) - log policy(y_r)/reference(y_r) and p is the probability that chosen is better
    (Eq. 7 of Rafailov et al., 2305.18290, for p = 1). Policy = reference gives log 2.

    A subclass changes the objective by overriding ``preference_loss``; it receives token log-probabilities, masks,
    lengths, labels and weights, and returns one value per pair.

    Args:
        beta: strength of the pull towards the reference; the implicit reward is beta * log(policy / reference).
        label_smoothing: share of labels taken to be wrong; p becomes (1 - s) p + s (1 - p).
    """

    paper = "Rafailov et al. 2023, arXiv 2305.18290"
    batch_type = PreferenceBatch
    needs_reference = True
    needs_collisions: ClassVar[bool] = False
    """Whether the loss looks at how likely two draws from the policy agree at each token (WPO)."""

    headline_metrics = ("val/loss", "val/reward_margin", "val/reward_accuracy")

    def __init__(
        self,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        learning_rate: float = 1e-6,
        warmup: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, warmup=warmup, **kwargs)
        self.beta, self.label_smoothing = beta, label_smoothing
        self.reference: Reference | None = None

    @property
    def model(self) -> CausalLM:
        """The policy."""
        return self.policy

    def load_models(self) -> None:
        """Load the policy and its reference."""
        self.policy = load_policy(self.init_from, self.load_settings, self.lora)
        if self.needs_reference:
            self.reference = Reference(self.policy, self.init_from, self.load_settings)

    def frozen_models(self) -> Sequence[nn.Module]:
        """The reference, unless it lives in the policy as its backbone."""
        return () if self.reference is None else self.reference.models

    def preference_loss(self, logprobs: PreferenceLogprobs) -> Tensor | Loss:
        """Return one loss per pair, shape (pairs,). The override point of this family."""
        target = logprobs.target * (1 - 2 * self.label_smoothing) + self.label_smoothing
        return dpo_loss(logprobs.margin, self.beta, target)

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

    def training_step(self, step: Step[PreferenceBatch], batch_idx: int) -> None:
        """Take one optimizer step; a loss that couples pairs is taken over all of the step's pairs at once."""
        if self.batch_coupled and len(step.micro_batches) * self.trainer.world_size > 1:
            self._coupled_step(step)
        else:
            super().training_step(step, batch_idx)

    def preference_logprobs(self, batch: PreferenceBatch) -> PreferenceLogprobs:
        """Forward chosen and rejected completions together, through the policy and through the reference."""
        layout = layout_of(batch.sequences, self.device)
        outputs = self.policy(layout, with_collisions=self.needs_collisions)
        reference = None if self.reference is None else self.reference.logprobs(layout)
        pairs = len(batch.target)

        chosen, rejected = slice(None, pairs), slice(pairs, None)
        return PreferenceLogprobs(
            policy_chosen_logprobs=outputs.logprobs[chosen],
            policy_rejected_logprobs=outputs.logprobs[rejected],
            reference_chosen_logprobs=None if reference is None else reference[chosen],
            reference_rejected_logprobs=None if reference is None else reference[rejected],
            chosen_mask=layout.completion_mask[chosen],
            rejected_mask=layout.completion_mask[rejected],
            target=batch.target.to(self.device),
            rated_margin=batch.margin.to(self.device),
            weights=batch.weights.to(self.device),
            chosen_log_collisions=None if outputs.collisions is None else outputs.collisions[chosen],
            rejected_log_collisions=None if outputs.collisions is None else outputs.collisions[rejected],
        )

    def _coupled_step(self, step: Step[PreferenceBatch]) -> None:
        """Take a step whose loss depends on all pairs at once, in the memory of one micro-batch.

        A first pass without gradient collects the log-probabilities of every pair on every rank; the loss is taken on
        them as leaves; a second pass pushes each leaf's gradient through its own micro-batch. The gradient is exact.
        """
        with torch.no_grad():
            parts = [self.preference_logprobs(batch) for batch in step.micro_batches]
        width = self._widest(parts)
        mine = [_pad_width(part, width) for part in parts]
        columns: Any = zip(*mine, strict=True)
        joined: list[Any] = [None if column[0] is None else torch.cat(column) for column in columns]
        local = PreferenceLogprobs(*joined)
        counts = self._counts(len(local.target))
        fields: list[Any] = [None if field is None else self._gathered(field, counts) for field in local]
        whole = PreferenceLogprobs(*fields)
        chosen, rejected = (x.detach().requires_grad_() for x in whole[:2])
        whole = whole._replace(policy_chosen_logprobs=chosen, policy_rejected_logprobs=rejected)
        loss, meter = as_loss(self.preference_loss(whole)), Meter()
        self._measure(whole, loss, meter)
        gradients = torch.autograd.grad((loss.values * whole.weights).sum(), (chosen, rejected))
        offset = sum(counts[: self.global_rank])
        starts = torch.tensor([0] + [len(part.target) for part in parts]).cumsum(0).tolist()

        def surrogate(batch: PreferenceBatch, rows: slice) -> Tensor:
            again = self.preference_logprobs(batch)
            pairs = zip((again.policy_chosen_logprobs, again.policy_rejected_logprobs), gradients, strict=True)
            return torch.stack([(now * gradient[rows, : now.shape[1]]).sum() for now, gradient in pairs]).sum()

        norm = self.update(
            [
                partial(surrogate, batch, slice(offset + start, offset + end))
                for batch, start, end in zip(step.micro_batches, starts[:-1], starts[1:], strict=True)
            ],
            step.rows,
        )
        self.episodes += step.rows
        self.tokens += step.tokens
        self.log_training(meter, grad_norm=norm)

    def _widest(self, parts: Sequence[PreferenceLogprobs]) -> int:
        """Return the longest completion of the step over all ranks."""
        widest = max(max(part.chosen_mask.shape[1], part.rejected_mask.shape[1]) for part in parts)
        return int(self.trainer.strategy.reduce(torch.tensor(float(widest), device=self.device), reduce_op="max"))

    def _counts(self, mine: int) -> list[int]:
        """Return how many pairs of the step each rank has."""
        if self.trainer.world_size == 1:
            return [mine]
        return cast(Tensor, self.all_gather(torch.tensor(mine, device=self.device))).tolist()

    def _gathered(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Concatenate rows of all ranks, in the order of the ranks; a collective needs equal shapes, so pad and cut."""
        if self.trainer.world_size == 1:
            return rows
        padded = torch.cat([rows, rows.new_zeros(max(counts) - len(rows), *rows.shape[1:])])
        gathered = cast(Tensor, self.all_gather(padded))
        return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])

    def _measure(self, logprobs: PreferenceLogprobs, loss: Loss, meter: Meter) -> None:
        """Add the implicit rewards, margins and accuracy that every preference objective is compared by."""
        chosen, rejected = logprobs.chosen_logratio.detach(), logprobs.rejected_logratio.detach()
        scale = getattr(self, "beta", 1.0)
        meter.add_ratio("loss", (loss.values * logprobs.weights).sum(), len(loss.values))
        meter.add("chosen_reward", scale * chosen)
        meter.add("rejected_reward", scale * rejected)
        meter.add("reward_margin", scale * (chosen - rejected))
        meter.add("reward_accuracy", (chosen > rejected).double())
        meter.add("chosen_logprob", logprobs.policy_chosen_logprobs.sum(-1))
        meter.add("rejected_logprob", logprobs.policy_rejected_logprobs.sum(-1))
        meter.add("length_difference", (logprobs.chosen_lengths - logprobs.rejected_lengths).double())
        for name, values in loss.metrics.items():
            meter.add(name, values)

    def export(self, folder: str | Path) -> Path:
        """Write the policy as a Hugging Face folder."""
        return export_policy(self.policy, self.tokenizer, folder)


def _pad_width(part: PreferenceLogprobs, width: int) -> PreferenceLogprobs:
    """Pad every token tensor with zeros to ``width``, so that micro-batches can be stacked."""
    fields: Any = part
    per_token = [field is not None and field.dim() == 2 for field in fields]
    padded = [
        torch.nn.functional.pad(field, (0, width - field.shape[1])) if wide else field
        for field, wide in zip(fields, per_token, strict=True)
    ]
    return PreferenceLogprobs(*padded)
