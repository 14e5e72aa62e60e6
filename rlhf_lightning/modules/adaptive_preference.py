"""Preference objectives that change while they train: weights of pairs and of tokens, a moving beta or reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.functional.preference import dpo_loss, wpo_weights
from rlhf_lightning.modules.dpo import DPOModule, PairObjective, tilted
from rlhf_lightning.training.module import as_loss
from rlhf_lightning.types import EnumeratedProblem, Loss, PreferenceLogprobs, Step

ROUNDING = 1e-4
"""Nats within which margins are alike: where the policy is still the reference, all their deviation is noise."""


class WPOWeighting(PairObjective):
    r"""Mixin that weights the pairs of any objective by how much they look like the policy's own samples.

    Put it before the objective: ``class WPOSimPOModule(WPOWeighting, SimPOModule)``. Losses that break the pairing
    (AOT) cannot be weighted by pair.
    """

    max_pair_weight: float | None = 1.0

    def token_statistics(
        self, policy_logits: Tensor, reference_logits: Tensor | None, targets: Tensor
    ) -> Mapping[str, Tensor]:
        """Add the log-probability that two draws from the policy agree, log sum_v p(v)^2, without gradient."""
        further = super().token_statistics(policy_logits, reference_logits, targets)
        return {**further, "log_collisions": (2 * policy_logits.detach().log_softmax(-1)).logsumexp(-1)}

    def preference_loss(self, pairs: PreferenceLogprobs) -> Tensor | Loss:
        """Return the next objective's losses, each times w(chosen) w(rejected), shape (pairs,)."""
        grids, slots = pairs, pairs.extras
        chosen = wpo_weights(grids.policy_chosen_logprobs, slots["chosen_log_collisions"], grids.chosen_mask)
        rejected = wpo_weights(grids.policy_rejected_logprobs, slots["rejected_log_collisions"], grids.rejected_mask)
        weights = (chosen * rejected).clamp_max(torch.inf if self.max_pair_weight is None else self.max_pair_weight)
        values, metrics = as_loss(super().preference_loss(pairs))
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
    ranges = {"max_pair_weight": "(0, inf)"}

    def __init__(self, max_pair_weight: float | None = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.max_pair_weight = max_pair_weight

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        """Return reference * exp(reward / beta), normalised."""
        return None if self.label_smoothing else tilted(problem, self.beta)


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
        momentum: of the moving mean and deviation, both from 0 and moved before they are used.
    """

    paper = "Wu et al. 2024, arXiv 2407.08639"
    ranges = {"alpha": "[0, inf)", "keep": "(0, 1]", "momentum": "[0, 1]"}
    batch_coupled = True

    def __init__(self, alpha: float = 0.6, keep: float = 0.8, momentum: float = 0.9, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.alpha, self.keep, self.momentum = alpha, keep, momentum
        self.margin_mean, self.margin_std = 0.0, 0.0

    def preference_loss(self, pairs: PreferenceLogprobs) -> Tensor | Loss:
        """Return one loss per pair, shape (pairs,); 0 for those left out, whose share the others make up."""
        margin, plain = pairs.margin, dpo_loss(pairs.margin, self.beta, pairs.target)
        if not torch.is_grad_enabled():  # held-out pairs are measured at the given beta, and move nothing
            return plain
        known = margin.detach()
        if not bool(known.isfinite().all()):  # the update will be skipped; the moving values must not keep this
            return Loss(plain, {"step_beta": torch.full_like(known, self.beta)})
        if len(known) > 1:
            self.margin_mean += (1 - self.momentum) * (float(known.mean()) - self.margin_mean)
            self.margin_std += (1 - self.momentum) * (float(known.std()) - self.margin_std)
        kept = self._kept(known)
        beta = (self.beta * (1 + self.alpha * (known[kept].mean() - self.margin_mean))).clamp(min=1e-3)
        values = dpo_loss(margin, beta, pairs.target) * kept * (len(margin) / kept.sum())
        return Loss(values, {"step_beta": beta.expand(len(margin))})

    def _kept(self, margin: Tensor) -> Tensor:
        """Draw the pairs to keep, bool, shape (pairs,): addressed by the update, so that every rank draws alike."""
        count = max(round(self.keep * len(margin)), 1)
        if count == len(margin) or self.margin_std <= ROUNDING:
            return torch.ones_like(margin, dtype=torch.bool)
        order = margin.argsort()  # the pairs come rank after rank: in their own order all numbers of ranks draw alike
        apart = (margin[order] - self.margin_mean) / self.margin_std
        weights = torch.exp(-0.5 * apart**2).double().clamp_min(1e-300).cpu()
        generator = torch.Generator().manual_seed(hash((self.seed, self.updates)) % 2**63)
        kept = torch.zeros_like(margin, dtype=torch.bool)
        kept[order[torch.multinomial(weights, count, generator=generator).to(order.device)]] = True
        return kept

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the moving mean and deviation of the margins."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["margins"] = [self.margin_mean, self.margin_std]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the moving mean and deviation."""
        super().on_load_checkpoint(checkpoint)
        self.margin_mean, self.margin_std = checkpoint["margins"]


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
    ranges = {"alpha": "[0, 1]"}

    def __init__(self, alpha: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.alpha = alpha

    def implicit_reward(self, pairs: PreferenceLogprobs) -> tuple[Tensor, Tensor]:
        """Return beta times the weighted sums of token log-ratios."""
        shared = torch.minimum(pairs.chosen_lengths, pairs.rejected_lengths).unsqueeze(-1)
        weights = [
            torch.where(mask.cumsum(-1) <= shared, 1.0, self.alpha) * mask
            for mask in (pairs.chosen_mask, pairs.rejected_mask)
        ]
        chosen, rejected = pairs.token_logratios
        return self.beta * (chosen * weights[0]).sum(-1), self.beta * (rejected * weights[1]).sum(-1)


class TRDPOModule(DPOModule):
    r"""TR-DPO: DPO whose reference follows the policy, so that the start does not hold it back for ever.

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
    ranges = {"alpha": "(0, 1]", "reference_every": "[1, inf)"}
    reference_moves = True

    def __init__(self, alpha: float = 0.6, reference_every: int = 512, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.alpha, self.reference_every = alpha, reference_every

    def training_step(self, step: Step[Any], batch_idx: int) -> None:
        """Take one optimizer step; after every ``reference_every`` updates, move the reference."""
        super().training_step(step, batch_idx)
        if self.updates % self.reference_every == 0:
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
