"""What bends a preference objective while it trains: weights of pairs and of tokens, a moving beta or reference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.functional import adaptive_preference as adaptive
from rlhf_lightning.functional.preference import dpo_loss
from rlhf_lightning.models.causal_lm import load_policy
from rlhf_lightning.models.roles import Reference
from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.training.module import as_loss
from rlhf_lightning.types import EnumeratedProblem, Loss, PreferenceLogprobs, Step

ROUNDING = 1e-4
"""Nats within which margins are alike: where the policy is still the reference, all their deviation is noise."""


class WPOWeighting:
    r"""Mixin that weights the pairs of any objective by how much they look like the policy's own samples.

    Put it before the objective: ``class WPOSimPOModule(WPOWeighting, SimPOModule)``. Losses that break the pairing
    (AOT) cannot be weighted by pair.
    """

    max_pair_weight: float | None = 1.0

    def token_statistics(
        self, policy_logits: Tensor, reference_logits: Tensor | None, targets: Tensor
    ) -> Mapping[str, Tensor]:
        """Add the log-probability that two draws from the policy agree, without gradient."""
        further = super().token_statistics(policy_logits, reference_logits, targets)  # type: ignore[misc]
        return {**further, "log_collisions": adaptive.log_collision_probability(policy_logits.detach())}

    def preference_loss(self, logprobs: PreferenceLogprobs) -> Tensor | Loss:
        """Return the next objective's losses, each times w(chosen) w(rejected), shape (pairs,)."""
        loss = super().preference_loss(logprobs)  # type: ignore[misc]
        chosen, rejected = logprobs.policy_chosen_logprobs.detach(), logprobs.policy_rejected_logprobs.detach()
        weights = adaptive.wpo_weights(chosen, logprobs.extras["chosen_log_collisions"], logprobs.chosen_mask)
        weights = weights * adaptive.wpo_weights(
            rejected, logprobs.extras["rejected_log_collisions"], logprobs.rejected_mask
        )
        if self.max_pair_weight is not None:
            weights = weights.clamp_max(self.max_pair_weight)
        values, metrics = as_loss(loss)
        return Loss(weights * values, {**metrics, "pair_weight": weights})


class WPOModule(WPOWeighting, DPOModule):
    r"""WPO: DPO in which pairs count by how likely the policy itself would have written them.

    loss = w(y_c) w(y_r) DPO, w(y) = e^{mean_t(log p(y_t) - log sum_v p(v)^2)} without gradient (Zhou et al.,
    2406.11827, Section 3). Policy = reference gives w(y_c) w(y_r) log 2.

    Target: reference * exp(reward / beta), normalised, as DPO's: both orders of a pair have one weight, so each pair
    alone is at its best there.

    Args:
        max_pair_weight: bound of the weight of a pair; None does not bound it.
    """

    paper = "Zhou et al. 2024, arXiv 2406.11827"

    def __init__(self, max_pair_weight: float | None = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.max_pair_weight = max_pair_weight

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        """Return reference * exp(reward / beta), normalised."""
        if self.label_smoothing:
            return None
        return torch.softmax(problem.reference.log() + problem.rewards / self.beta, -1)


class BetaDPOModule(DPOModule):
    r"""beta-DPO: each step has a beta of its own, larger where its pairs are far apart; outlying pairs are left out.

    beta_step = max(beta (1 + alpha (mean kept d - m)), 1e-3) with d the margin and m its moving mean; the share
    ``keep`` of the step's pairs is drawn with weights e^{-((d - m) / s)^2 / 2}, s the moving deviation (Wu et al.,
    2407.08639, Section 4, as released). Policy = reference gives log 2. Held-out pairs are measured at ``beta`` itself.

    Target: no closed form; the minimiser of the population loss where every step is the population: the moving mean is
    then at rest at the mean, which leaves beta, and so DPO's place. How pairs meet in smaller steps moves it.

    Args:
        alpha: how strongly beta follows the margins.
        keep: share of the pairs of a step that are kept.
        momentum: of the moving mean and deviation, both from 0.
    """

    paper = "Wu et al. 2024, arXiv 2407.08639"
    batch_coupled = True

    def __init__(self, alpha: float = 0.6, keep: float = 0.8, momentum: float = 0.9, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 < keep <= 1:
            raise ValueError(f"keep is {keep}: it must lie in (0, 1]")
        self.alpha, self.keep, self.momentum = alpha, keep, momentum
        self.margin_mean, self.margin_std = 0.0, 0.0

    def preference_loss(self, logprobs: PreferenceLogprobs) -> Tensor | Loss:
        """Return one loss per pair, shape (pairs,); 0 for those left out, whose share the others make up."""
        margin = logprobs.margin
        if not torch.is_grad_enabled():  # held-out pairs are measured at the given beta, and move nothing
            return dpo_loss(margin, self.beta, logprobs.target)
        mean, std = margin.new_tensor(self.margin_mean), margin.new_tensor(self.margin_std)
        if not bool(margin.isfinite().all()):  # the update will be skipped; the moving values must not keep this
            return Loss(dpo_loss(margin, self.beta, logprobs.target), {"step_beta": torch.full_like(margin, self.beta)})
        if len(margin) > 1:
            mean, std = adaptive.beta_dpo_statistics(margin, mean, std, self.momentum)
            self.margin_mean, self.margin_std = float(mean), float(std)
        kept = self._kept(margin.detach(), mean, std)
        beta = adaptive.beta_dpo_beta(margin[kept], mean, self.beta, self.alpha)
        values = dpo_loss(margin, beta, logprobs.target) * kept * (len(margin) / kept.sum())
        return Loss(values, {"step_beta": beta.expand(len(margin))})

    def _kept(self, margin: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Draw the pairs to keep, bool, shape (pairs,): addressed by the update, so that every rank draws alike."""
        count = max(round(self.keep * len(margin)), 1)
        if count == len(margin) or std <= ROUNDING:
            return torch.ones_like(margin, dtype=torch.bool)
        order = margin.argsort()  # the pairs come rank after rank: in their own order all numbers of ranks draw alike
        weights = adaptive.beta_dpo_pair_weights(margin[order], mean, std).double().clamp_min(1e-300).cpu()
        generator = torch.Generator().manual_seed(hash((self.seed, self.updates)) % 2**63)
        drawn = torch.multinomial(weights, count, replacement=False, generator=generator)
        kept = torch.zeros(len(margin), dtype=torch.bool)
        kept[order.cpu()[drawn]] = True
        return kept.to(margin.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the moving mean and deviation of the margins."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["margins"] = [self.margin_mean, self.margin_std]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them up again."""
        super().on_load_checkpoint(checkpoint)
        self.margin_mean, self.margin_std = checkpoint["margins"]

    @property
    def value_at_reference(self) -> float | None:
        """What each row loses where the policy is the reference."""
        return math.log(2)


class LDDPOModule(DPOModule):
    r"""LD-DPO: the tokens that only the longer completion has count less, so that length is not what is learned.

    DPO on log-ratios summed with weight 1 on the first min(n_w, n_l) tokens and ``alpha`` behind them (Liu et al.,
    2409.06411). Policy = reference gives log 2; alpha 1 is DPO.

    Target: no closed form; the minimiser of the population loss. A token's weight depends on the other completion, so
    that no reward of a completion alone gives all margins.

    Args:
        alpha: weight of the tokens beyond the shorter completion's length.
    """

    paper = "Liu et al. 2024, arXiv 2409.06411"

    def __init__(self, alpha: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.alpha = alpha

    def preference_loss(self, logprobs: PreferenceLogprobs) -> Tensor | Loss:
        """Return one loss per pair, shape (pairs,)."""
        assert logprobs.reference_chosen_logprobs is not None and logprobs.reference_rejected_logprobs is not None
        width = max(logprobs.chosen_mask.shape[1], logprobs.rejected_mask.shape[1])

        def wide(grid: Tensor) -> Tensor:
            return torch.nn.functional.pad(grid, (0, width - grid.shape[1]))

        masks = (wide(logprobs.chosen_mask), wide(logprobs.rejected_mask))
        w_chosen, w_rejected = adaptive.ld_dpo_token_weights(*masks, self.alpha)
        chosen = wide(logprobs.policy_chosen_logprobs - logprobs.reference_chosen_logprobs) * w_chosen
        rejected = wide(logprobs.policy_rejected_logprobs - logprobs.reference_rejected_logprobs) * w_rejected
        return dpo_loss(chosen.sum(-1) - rejected.sum(-1), self.beta, logprobs.target)

    @property
    def value_at_reference(self) -> float | None:
        """What each row loses where the policy is the reference."""
        return math.log(2)


class TRDPOModule(DPOModule):
    r"""TR-DPO: DPO whose reference follows the policy, so that the leash does not hold it at the start for ever.

    Every ``reference_every`` updates each reference weight becomes alpha policy + (1 - alpha) reference (Gorbatovski et
    al., 2404.09656, Eq. 5); alpha 1 replaces the reference. Policy = reference gives log 2. With an
    adapter the reference is a model of its own: a mixture of adapters has the rank of all of them together.

    Target: reference * exp(reward / beta), normalised, with the reference of the moment. Each move makes it another: at
    rest between hard moves (alpha 1), the k-th leads to start * exp((k + 1) reward / beta).

    Args:
        alpha: share of the policy in the new reference.
        reference_every: updates between two moves of the reference.
    """

    paper = "Gorbatovski et al. 2024, arXiv 2404.09656"
    reference_moves = True

    def __init__(self, alpha: float = 0.6, reference_every: int = 512, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if reference_every < 1:
            raise ValueError(f"reference_every is {reference_every}: the reference moves every one or more updates")
        self.alpha, self.reference_every = alpha, reference_every

    def load_models(self) -> None:
        """Load the policy, and a reference of its own in every case: it will move."""
        self.policy = load_policy(self.init_from, self.load_settings, self.lora)
        if self.needs_reference:
            self.reference = Reference(self.policy, self.init_from, self.load_settings, own=True)

    def training_step(self, step: Step[Any], batch_idx: int) -> None:
        """Take one optimizer step; now and then the reference follows."""
        super().training_step(step, batch_idx)
        if self.updates % self.reference_every == 0:
            self.move_reference()

    def move_reference(self) -> None:
        """Mix the policy's weights into the reference's."""
        assert self.reference is not None
        self.reference.follow(self.alpha)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the reference's weights once they have moved: nothing else knows where they are."""
        super().on_save_checkpoint(checkpoint)
        if self.updates >= self.reference_every:
            assert self.reference is not None
            checkpoint["reference"] = self.reference.moved_weights()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the reference where it was; an export goes without it."""
        super().on_load_checkpoint(checkpoint)
        if self.reference is not None and "reference" in checkpoint:
            self.reference.restore(checkpoint["reference"])
