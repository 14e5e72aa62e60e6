"""Direct preference optimisation, and the notation of all objectives on preference pairs.

Notation: y_w and y_l are the chosen and the rejected completion of a pair; S_w and S_l are their log-probabilities
under the policy; n_w and n_l are their lengths in tokens; a_w and a_l are their log-ratios log policy(y) - log
reference(y). The implicit rewards are u = beta a_w and v = beta a_l, and the reward margin is x = u - v, unless the
objective says otherwise. L_0 is the loss of a pair when policy = reference. Equations are for a certain label; the loss
of a soft label p is p * loss + (1 - p) * loss of the swapped pair.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.errors import SettingError
from rlhf_lightning.models.transfer import to_device
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.training.offline import OfflineModule
from rlhf_lightning.training.pairs import PairObjective, WholeStep, stacked_pairs, whole_step
from rlhf_lightning.training.returned_loss import loss_of
from rlhf_lightning.types import EnumeratedProblem, PreferenceBatch, PreferenceLogprobs, Step


class DPOModule(PairObjective, OfflineModule):
    r"""Direct preference optimisation: the policy is its own reward model.

    loss = -log sigmoid(x), x = beta [log policy(y_w)/reference(y_w) - log policy(y_l)/reference(y_l)] (Rafailov et al.,
    2305.18290, Eq. 7). L_0 = log 2.
    Target: reference * exp(reward / beta), normalised (Eq. 4), where labels are Bradley-Terry in the rewards.

    Args:
        beta: KL penalty coefficient; the implicit reward is beta * log(policy / reference).
        label_smoothing: share s of labels assumed to be wrong; labels p become (1 - s) p + s (1 - p) in every loss.
        cache_reference: keep the reference's log-probabilities on disk ($RLHF_CACHE, else ~/.cache/rlhf_lightning),
            keyed by weights and rows, so that later epochs and runs skip the reference forward pass.

    Raises:
        SettingError: a setting is outside its range, or label smoothing is set for an objective without soft labels.
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
            takes = f"{type(self).__name__} treats labels as certain"
            raise SettingError("labels-are-certain", f"label_smoothing is {label_smoothing}, but {takes}: set it to 0")
        self.beta, self.label_smoothing, self.cache_reference = beta, label_smoothing, cache_reference

    def loss_sum(self, batch: PreferenceBatch, meter: Meter) -> Tensor:
        return self._measured_loss(self.preference_logprobs(batch), meter).sum()

    def _measured_loss(self, pairs: PreferenceLogprobs, meter: Meter) -> Tensor:
        """Return the weighted loss of each pair, and record the metrics."""
        loss = loss_of(self.preference_loss, pairs, like=pairs.target)
        self.measure_pairs(pairs, loss, len(loss.values), meter)
        return loss.values * pairs.weights

    def smoothed(self, target: Tensor) -> Tensor:
        """Return labels p with label smoothing applied."""
        return target * (1 - 2 * self.label_smoothing) + self.label_smoothing

    def preference_logprobs(self, batch: PreferenceBatch) -> PreferenceLogprobs:
        """Compute the log-probabilities of chosen and rejected completions under the policy and the reference.

        Raises:
            SettingError: pairs have weights, and the objective does not support weights.
        """
        if not self.weighs_rows and bool((batch.weights != 1).any()):
            ranked = f"{type(self).__name__} matches pairs by rank and cannot weight them"
            raise SettingError("pairs-without-weights", f"{ranked}: leave weights at 1")
        layout = self.lay_out(batch.sequences)
        outputs, reference = self.both_logprobs(batch.sequences, layout)
        pairs = stacked_pairs(outputs.logprobs, reference, layout.completion_mask, outputs.extras)
        return pairs._replace(
            target=self.smoothed(to_device(batch.target, self.device)),
            rated_margin=to_device(batch.margin, self.device),
            weights=to_device(batch.weights, self.device),
            extras={**self.slots_of(batch), **pairs.extras},
        )

    # -- losses that couple the pairs of a step -----------------------------------------------------------------------

    def step_losses(self, step: Step[PreferenceBatch], meter: Meter) -> list[Callable[[], Tensor]]:
        if not self._couples(step):
            return super().step_losses(step, meter)
        forwards = [partial(self.preference_logprobs, batch) for batch in step.micro_batches]
        return self._whole_step(step).losses(partial(self._measured_loss, meter=meter), forwards)

    def validation_step(self, step: Step[PreferenceBatch], batch_idx: int) -> None:
        if self._couples(step):
            self._measured_loss(self._whole_step(step).logprobs, self._evaluation)
        else:
            super().validation_step(step, batch_idx)

    def _couples(self, step: Step[PreferenceBatch]) -> bool:
        """Whether the loss of this step depends on pairs outside one micro-batch."""
        return self.batch_coupled and len(step.micro_batches) * self.trainer.world_size > 1

    @torch.no_grad()
    def _whole_step(self, step: Step[PreferenceBatch]) -> WholeStep:
        """Return the log-probabilities of all pairs of the step, on all ranks, without gradient."""
        return whole_step(self, [self.preference_logprobs(batch) for batch in step.micro_batches])


def normalised(problem: EnumeratedProblem, values: Tensor, ratio: Callable[[Tensor], Tensor]) -> Tensor:
    """Return reference * ratio(value + c), shape (prompts, completions); c makes each prompt's row sum to 1.

    The constant c is found by bisection.

    Args:
        problem: the enumerated problem.
        values: value of each completion (reward, win rate), shape (prompts, completions).
        ratio: policy / reference as a function of the shifted value; it must increase, and may be infinite.
    """
    low, high = -1e9 * torch.ones_like(values[:, :1]), 1e9 * torch.ones_like(values[:, :1])
    for _ in range(200):
        middle = (low + high) / 2
        below = (problem.reference * ratio(values + middle)).sum(-1, keepdim=True) < 1
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    policy = problem.reference * ratio(values + low)
    return policy / policy.sum(-1, keepdim=True)
