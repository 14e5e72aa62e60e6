"""Preference objectives that adapt during training: pair weights, token weights, a changing beta or reference.

Notation as in `dpo`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_lightning.functional.logprobs import MAX_LOG_RATIO, masked_mean
from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.training.pairs import PairObjective, tilted
from rlhf_lightning.training.returned_loss import as_loss
from rlhf_lightning.types import EnumeratedProblem, Loss, PreferenceLogprobs, Step

ROUNDING = 1e-4
"""Nats within which margins count as equal: while policy = reference, their standard deviation is rounding noise."""


class WPOWeighting(PairObjective):
    r"""Mixin that weights the pairs of any objective by the likelihood of their completions under the policy.

    List it before the objective: ``class WPOSimPOModule(WPOWeighting, SimPOModule)``. Losses that sort pairs (AOT)
    cannot be weighted by pair.
    """

    max_pair_weight: float | None = 1.0

    def token_statistics(
        self, policy_logits: Tensor, reference_logits: Tensor | None, targets: Tensor
    ) -> Mapping[str, Tensor]:
        """Add the log-probability that two samples of the policy agree, log sum_v p(v)^2, without gradient."""
        further = super().token_statistics(policy_logits, reference_logits, targets)
        return {**further, "log_collisions": (2 * policy_logits.detach().log_softmax(-1)).logsumexp(-1)}

    def completion_weights(self, logprobs: Tensor, log_collisions: Tensor, mask: Tensor) -> Tensor:
        """Return w(y) = e^{mean_t(log p(y_t) - log sum_v p(v)^2)} of completions, shape (pairs,), without gradient."""
        closeness = masked_mean(logprobs.detach() - log_collisions.detach(), mask, dim=-1)
        return closeness.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()

    def preference_loss(self, pairs: PreferenceLogprobs) -> Tensor | Loss:
        slots = pairs.extras
        chosen = (pairs.policy_chosen_logprobs, slots["chosen_log_collisions"], pairs.chosen_mask)
        rejected = (pairs.policy_rejected_logprobs, slots["rejected_log_collisions"], pairs.rejected_mask)
        weights = self.completion_weights(*chosen) * self.completion_weights(*rejected)
        weights = weights.clamp_max(torch.inf if self.max_pair_weight is None else self.max_pair_weight)
        values, metrics = as_loss(super().preference_loss(pairs))
        return Loss(weights * values, {**metrics, "pair_weight": weights})


class WPOModule(WPOWeighting, DPOModule):
    r"""WPO: DPO with pairs weighted by how likely the policy is to write them.

    loss = w(y_w) w(y_l) DPO, w(y) = e^{mean_t(log p(y_t) - log sum_v p(v)^2)} without gradient. w is 1 where tokens are
    as likely as the policy's samples are on average (Zhou et al., 2406.11827, Section 3). L_0 = w(y_w) w(y_l) log 2.
    Target: reference * exp(reward / beta), normalised, as in DPO: both orders of a pair have the same weight.

    Args:
        max_pair_weight: upper bound of a pair's weight; null for no bound.
    """

    paper = "Zhou et al. 2024, arXiv 2406.11827"
    ranges = {"max_pair_weight": "(0, inf)"}

    def __init__(self, max_pair_weight: float | None = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.max_pair_weight = max_pair_weight

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        return None if self.label_smoothing else tilted(problem, self.beta)


class BetaDPOModule(DPOModule):
    r"""beta-DPO: each step has its own beta, larger where the step's margins are large; outlying pairs are left out.

    loss = -log sigmoid(beta_step (a_w - a_l)), beta_step = max(beta (1 + alpha (mean kept d - m)), 1e-3) with
    d = a_w - a_l and m the moving mean of d (Wu et al., 2407.08639, Section 4, as released). A share ``keep`` of the
    step's pairs is drawn with weights e^{-((d - m) / s)^2 / 2}, where s is the moving standard deviation. L_0 = log 2.
    Held-out pairs are evaluated with ``beta``.
    Target: no closed form; the minimiser of the population loss when every step is the whole population. Then the
    moving mean equals the mean, so beta_step = beta, as in DPO. With smaller steps the result depends on which pairs
    share a step.

    Args:
        alpha: how strongly beta_step follows the margins.
        keep: share of a step's pairs that are kept.
        momentum: EMA decay of the moving mean and standard deviation; both start at 0 and are updated before use.
    """

    paper = "Wu et al. 2024, arXiv 2407.08639"
    ranges = {"alpha": "[0, inf)", "keep": "(0, 1]", "momentum": "[0, 1]"}
    batch_coupled = True

    def __init__(self, alpha: float = 0.6, keep: float = 0.8, momentum: float = 0.9, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.alpha, self.keep, self.momentum = alpha, keep, momentum
        self.margin_mean, self.margin_std = 0.0, 0.0

    def preference_loss(self, pairs: PreferenceLogprobs) -> Tensor | Loss:
        """Return one loss per pair, shape (pairs,): 0 for dropped pairs; kept pairs are scaled up to compensate."""
        margin = pairs.margin

        def dpo(beta: float | Tensor) -> Tensor:
            x = beta * margin
            return -pairs.target * logsigmoid(x) - (1 - pairs.target) * logsigmoid(-x)

        if not torch.is_grad_enabled():
            return dpo(self.beta)
        known = margin.detach()
        if not bool(known.isfinite().all()):  # the update will be skipped; keep NaN out of the moving statistics
            return Loss(dpo(self.beta), {"step_beta": torch.full_like(known, self.beta)})
        if len(known) > 1:
            self.margin_mean += (1 - self.momentum) * (float(known.mean()) - self.margin_mean)
            self.margin_std += (1 - self.momentum) * (float(known.std()) - self.margin_std)
        kept = self._kept(known)
        beta = (self.beta * (1 + self.alpha * (known[kept].mean() - self.margin_mean))).clamp(min=1e-3)
        values = dpo(beta) * kept * (len(margin) / kept.sum())
        return Loss(values, {"step_beta": beta.expand(len(margin))})

    def _kept(self, margin: Tensor) -> Tensor:
        """Draw the pairs to keep, bool, shape (pairs,). The draw is seeded by the update, so all ranks agree."""
        count = max(int(self.keep * len(margin)), 1)  # rounds down, as in the released code
        if count == len(margin) or self.margin_std <= ROUNDING:
            return torch.ones_like(margin, dtype=torch.bool)
        order = margin.argsort()  # pairs arrive in rank order; sorting makes the draw independent of the world size
        distance = (margin[order] - self.margin_mean) / self.margin_std
        weights = torch.exp(-0.5 * distance**2).double().clamp_min(1e-300).cpu()
        seed = np.random.SeedSequence([self.seed % 2**64, self.updates]).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(seed))
        kept = torch.zeros_like(margin, dtype=torch.bool)
        kept[order[torch.multinomial(weights, count, generator=generator).to(order.device)]] = True
        return kept

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["margins"] = [self.margin_mean, self.margin_std]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.margin_mean, self.margin_std = checkpoint["margins"]


class LDDPOModule(DPOModule):
    r"""LD-DPO: tokens beyond the shorter completion's length have a lower weight, to reduce length bias.

    DPO on log-ratios summed with weight 1 on the first min(n_w, n_l) tokens and ``alpha`` on the later tokens (Liu et
    al., 2409.06411). L_0 = log 2. With alpha 1 it equals DPO.
    Target: no closed form; the minimiser of the population loss. A token's weight depends on the other completion, so
    no reward per completion can produce all margins.

    Args:
        alpha: weight of the tokens beyond the shorter completion's length.
    """

    paper = "Liu et al. 2024, arXiv 2409.06411"
    ranges = {"alpha": "[0, 1]"}

    def __init__(self, alpha: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.alpha = alpha

    def implicit_reward(self, pairs: PreferenceLogprobs) -> tuple[Tensor, Tensor]:
        shared = torch.minimum(pairs.chosen_lengths, pairs.rejected_lengths).unsqueeze(-1)

        def reward(logratio: Tensor, mask: Tensor) -> Tensor:
            weights = torch.where(mask.cumsum(-1) <= shared, 1.0, self.alpha) * mask
            return self.beta * (logratio * weights).sum(-1)

        chosen, rejected = pairs.token_logratios
        return reward(chosen, pairs.chosen_mask), reward(rejected, pairs.rejected_mask)


class TRDPOModule(DPOModule):
    r"""TR-DPO: DPO with a reference that is updated from the policy.

    The loss is DPO's. Every ``reference_every`` updates, each reference weight becomes alpha policy + (1 - alpha)
    reference (Gorbatovski et al., 2404.09656, Eq. 5); alpha 1 replaces the reference. L_0 = log 2. With an adapter the
    reference is a separate model, since a mixture of adapters has a higher rank.
    Target: reference * exp(reward / beta), normalised, with the current reference. With alpha 1 and training that
    converges between updates of the reference, the k-th update leads to start * exp((k + 1) reward / beta).

    Args:
        alpha: weight of the policy in the new reference.
        reference_every: optimizer updates between two updates of the reference.
    """

    paper = "Gorbatovski et al. 2024, arXiv 2404.09656"
    ranges = {"alpha": "(0, 1]", "reference_every": "[1, inf)"}
    reference_moves = True

    def __init__(self, alpha: float = 0.6, reference_every: int = 512, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.alpha, self.reference_every = alpha, reference_every

    def training_step(self, step: Step[Any], batch_idx: int) -> Any:
        """Take one optimizer step, and update the reference after every ``reference_every`` updates."""
        outputs = super().training_step(step, batch_idx)
        if self.updates % self.reference_every == 0:
            assert self.reference is not None
            self.reference.follow(self.alpha)
        return outputs
