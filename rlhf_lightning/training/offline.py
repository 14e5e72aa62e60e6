"""Base of stages that learn from fixed data: one training step is one optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rlhf_lightning.errors import undefined
from rlhf_lightning.functional.logprobs import load_balancing_loss
from rlhf_lightning.loading import cache_folder
from rlhf_lightning.models.causal_lm import TokenOutputs
from rlhf_lightning.models.export import export_policy
from rlhf_lightning.models.frozen import Reference, ReferenceCache
from rlhf_lightning.models.layout import Layout
from rlhf_lightning.models.recording import experts_of_a_token, recorded_routers
from rlhf_lightning.models.resolving import content_hash, resolve_folder
from rlhf_lightning.models.roles import load_policy
from rlhf_lightning.models.transfer import to_device
from rlhf_lightning.training.gathering import data_ranks
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.training.module import AlignmentModule
from rlhf_lightning.types import Sequences, Step


class OfflineModule(AlignmentModule):
    """Base of the stages on fixed data. A subclass implements ``loss_sum``."""

    counts_tokens: ClassVar[bool] = False
    """Whether the loss is a mean over tokens (SFT) rather than over rows."""

    cache_reference = False
    """Whether the reference's log-probabilities are cached on disk; a setting of objectives with a reference."""

    @property
    def model(self) -> nn.Module:
        return self.policy

    def load_models(self) -> None:
        """Load the policy, and the reference if the objective needs it."""
        self.policy = load_policy(self.init_from, self.load_settings, self.lora)
        if self.needs_reference:
            self.reference = Reference(self.policy, self.init_from, self.load_settings, own=self.reference_moves)

    def export(self, folder: str | Path) -> Path:
        return export_policy(self.policy, self.tokenizer, folder)

    @cached_property
    def reference_cache(self) -> ReferenceCache | None:
        """The cache of this run's reference log-probabilities; None without a cache."""
        if not self.cache_reference or self.reference_moves or self.load_settings.from_scratch:
            return None
        if self.device_mesh is not None:  # a cache hit on only one rank would desynchronise the forward passes
            return None
        weights = content_hash(resolve_folder(self.init_from))
        if weights is None:
            return None
        computed_in = f"{self.load_settings.dtype}_{self.trainer.precision}"  # matrix products depend on both
        if self.trainer.world_size > 1:  # otherwise two ranks with the same row would race to compute it
            computed_in += f"_{self.global_rank}_of_{self.trainer.world_size}"
        return ReferenceCache(cache_folder() / "reference" / f"{weights[:32]}_{computed_in}.sqlite")

    def reference_logprobs(self, sequences: Sequences, layout: Layout) -> Tensor:
        """Return the reference's log-probabilities of completions, shape (completions, length), without gradient."""
        assert self.reference is not None
        cache = self.reference_cache
        if cache is None:
            return self.reference.logprobs(layout)
        dtype = torch.float64 if next(self.parameters()).dtype == torch.float64 else torch.float32
        kept = cache.read(sequences, layout.completion_mask, dtype)
        if kept is not None:
            return to_device(kept, self.device)
        computed = self.reference.logprobs(layout)
        cache.write(sequences, computed)
        # Rows that were already cached keep their cached values. Another batch rounds differently, and a resumed run
        # finds the whole batch in the cache and must learn from the same numbers.
        kept = cache.read(sequences, layout.completion_mask, dtype)
        return computed if kept is None else kept.to(computed)

    def both_logprobs(self, sequences: Sequences, layout: Layout) -> tuple[TokenOutputs, Tensor | None]:
        """Return the policy's outputs with its statistics, and the reference's log-probabilities if there is one.

        Statistics that need the reference's logits require its forward pass each time, so they bypass the cache.
        """
        outputs = self.policy_outputs(layout)
        if "reference_logprobs" in outputs.extras:
            return outputs, outputs.extras["reference_logprobs"]
        return outputs, None if self.reference is None else self.reference_logprobs(sequences, layout)

    def loss_sum(self, batch: Any, meter: Meter) -> Tensor:
        """Return the sum of a micro-batch's losses, with gradient, and add its metrics to ``meter``."""
        raise undefined(self, "loss_sum")

    def training_step(self, step: Step[Any], batch_idx: int) -> Any:
        """Take one optimizer step over all micro-batches of ``step``."""
        meter, count = Meter(), self.loss_count(step)
        share = count / max(len(step.micro_batches) * data_ranks(self)[1], 1)
        losses = [partial(self._balanced, loss, meter, share) for loss in self.step_losses(step, meter)]
        norm = self.update(losses, count, meter)
        self.episodes += step.rows
        self.tokens += step.tokens
        sequences = (batch.sequences for batch in step.micro_batches if hasattr(batch, "sequences"))
        self.speed.read += sum(sum(part.lengths) for part in sequences)
        return self.log_training(meter, grad_norm=norm)

    def step_losses(self, step: Step[Any], meter: Meter) -> list[Callable[[], Tensor]]:
        """Return a function per micro-batch that returns its summed loss; losses that couple rows override it."""
        return [partial(self.loss_sum, batch, meter) for batch in step.micro_batches]

    def _balanced(self, loss_sum: Callable[[], Tensor], meter: Meter, share: float) -> Tensor:
        """Return the sum of a micro-batch's losses plus its share of the routers' load-balancing loss."""
        if not self.router_aux_loss_coef:
            return loss_sum()
        model: Any = self.model
        with recorded_routers(model) as routers:
            loss = loss_sum()
        top_k = experts_of_a_token(model)
        layers = [
            load_balancing_loss(logits, top_k, mask if mask is not None and len(mask) == len(logits) else None)
            for logits, mask in routers
        ]
        balance = torch.stack(layers).mean() if layers else loss.new_zeros(())
        meter.add("router_aux_loss", balance)
        return loss + self.router_aux_loss_coef * share * balance

    def loss_count(self, step: Step[Any]) -> int:
        """Return the divisor of the summed losses: tokens or rows of the step over all ranks."""
        return step.tokens if self.counts_tokens else step.rows

    def validation_step(self, step: Step[Any], batch_idx: int) -> None:
        """Record the metrics of held-out rows."""
        for batch in step.micro_batches:
            self.loss_sum(batch, self._evaluation)
