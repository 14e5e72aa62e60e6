"""Supervised fine-tuning."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_lightning.models.causal_lm import OverLogits
from rlhf_lightning.models.layout import Layout
from rlhf_lightning.models.transfer import to_device
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.training.offline import OfflineModule
from rlhf_lightning.training.returned_loss import loss_of
from rlhf_lightning.types import DemonstrationBatch, TokenLogprobs


class SFTModule(OfflineModule):
    r"""Supervised fine-tuning: imitate demonstrations.

    loss = -(1/N) \sum_{rows} w \sum_t log policy(y_t | x, y_{<t}), where N counts the supervised tokens of the whole
    optimizer step (InstructGPT, 2203.02155, Section 3.5). Only completion tokens count, including the end token.

    Target: the distribution that the demonstrations were drawn from.
    """

    paper = "Ouyang et al. 2022, arXiv 2203.02155"
    batch_type = DemonstrationBatch
    counts_tokens = True
    headline_metrics = ("val/loss", "val/perplexity", "val/token_accuracy")

    def __init__(
        self,
        learning_rate: float = 2e-5,
        lr_schedule: Literal["constant", "linear", "cosine"] = "cosine",
        warmup: float = 0.03,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, lr_schedule=lr_schedule, warmup=warmup, **kwargs)

    def token_loss(self, logprobs: TokenLogprobs) -> Tensor:
        """Return one loss per token, shape (rows, length). Override it for another objective on demonstrations."""
        return -logprobs.logprobs * logprobs.weights.unsqueeze(-1)

    def statistics_asked(self, layout: Layout, temperature: float = 1.0) -> OverLogits | None:
        """Add, in evaluation only, whether each target is the model's most likely token."""
        asked = super().statistics_asked(layout, temperature)
        if torch.is_grad_enabled():
            return asked

        def evaluated(logits: Tensor, ids: Tensor, *further: Tensor) -> dict[str, Tensor]:
            found = {} if asked is None else asked.function(logits, ids, *further)
            return {**found, "matches": (logits.argmax(-1) == ids).float()}

        return OverLogits(layout, evaluated, (layout.targets,) if asked is None else asked.further)

    def loss_sum(self, batch: DemonstrationBatch, meter: Meter) -> Tensor:
        layout = self.lay_out(batch.sequences)
        evaluating = not torch.is_grad_enabled()
        outputs = self.policy_outputs(layout, with_entropy=evaluating)
        mask = layout.completion_mask
        extras = {**self.slots_of(batch), **outputs.extras}
        logprobs = TokenLogprobs(outputs.logprobs, mask, to_device(batch.weights, self.device), extras)
        loss = loss_of(self.token_loss, logprobs, like=mask)
        meter.add("loss", loss.values, mask)
        meter.add("negative_logprob", -outputs.logprobs, mask)
        if outputs.entropy is not None:
            meter.add("token_accuracy", outputs.extras["matches"], mask)
            meter.add("entropy", outputs.entropy, mask)
        for name, values in loss.metrics.items():
            meter.add(name, values, mask if values.dim() == 2 else None)
        return torch.where(mask, loss.values, 0.0).sum()

    def evaluation_metrics(self) -> dict[str, float]:
        """Return held-out metrics; perplexity is the exponential of the mean negative log-probability per token."""
        means = super().evaluation_metrics()
        if "negative_logprob" in means:
            means["perplexity"] = math.exp(min(means["negative_logprob"], 50.0))
        return means
