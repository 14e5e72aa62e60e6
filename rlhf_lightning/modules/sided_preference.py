"""Objectives on preference pairs that look at each side's log-ratio by itself, not at the margin alone.

In every docstring u = beta a_w and v = beta a_l are the implicit rewards of chosen and rejected, a the log-ratio
log policy/reference of a completion and x = u - v.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.functional import preference as losses
from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.modules.preference import normalised, over_orders
from rlhf_lightning.types import EnumeratedProblem, Loss, PreferenceLogprobs


class NCAModule(DPOModule):
    r"""NCA for pairs: noise contrast that holds up the chosen completion's own probability.

    loss = -log sigmoid(u) - 1/2 log sigmoid(-u) - 1/2 log sigmoid(-v) (Chen et al., 2402.05369).
    Policy = reference gives 2 log 2.

    Target: no closed form; the minimiser of the population loss.
    """

    paper = "Chen et al. 2024, arXiv 2402.05369"

    def __init__(self, beta: float = 0.01, **kwargs: Any) -> None:
        super().__init__(beta=beta, **kwargs)

    def preference_loss(self, logprobs: PreferenceLogprobs) -> Tensor | Loss:
        """Return one loss per pair, shape (pairs,); a soft label is the expectation over both orders."""
        return over_orders(logprobs, partial(losses.nca_pair_loss, beta=self.beta))

    @property
    def value_at_reference(self) -> float | None:
        """What each row loses where the policy is the reference."""
        return 2 * math.log(2)


class BCOPairModule(DPOModule):
    r"""BCO on pairs: a binary classifier, good or bad, whose logit is the implicit reward.

    loss = -log sigmoid(u - delta) - log sigmoid(-(v - delta)) (Jung et al., 2404.04656), delta the mean of all
    u and v of the optimizer step, without gradient. Policy = reference gives 2 log 2.

    Target: no closed form; the policy that minimises the population loss for the delta that it itself has.
    """

    paper = "Jung et al. 2024, arXiv 2404.04656"
    batch_coupled = True

    def __init__(self, beta: float = 0.01, learning_rate: float = 5e-7, **kwargs: Any) -> None:
        super().__init__(beta=beta, learning_rate=learning_rate, **kwargs)

    def preference_loss(self, logprobs: PreferenceLogprobs) -> Tensor | Loss:
        """Return one loss per pair, shape (pairs,)."""
        chosen, rejected = logprobs.chosen_logratio, logprobs.rejected_logratio
        weights = logprobs.weights / logprobs.weights.sum().clamp_min(1e-12)
        delta = (self.beta * (chosen + rejected) / 2 * weights).sum().detach()
        return over_orders(logprobs, partial(losses.bco_pair_loss, beta=self.beta, shift=delta))

    @property
    def value_at_reference(self) -> float | None:
        """What each row loses where the policy is the reference."""
        return 2 * math.log(2)


class SPPOModule(DPOModule):
    r"""SPPO with hard labels: one step of self-play, each log-ratio regressed on a constant.

    loss = (a_w - 1 / (2 beta))^2 + (a_l + 1 / (2 beta))^2 (Wu et al., 2405.00675). Policy = reference gives
    1 / (2 beta^2).

    Target: no closed form; the minimiser of the population loss.
    """

    paper = "Wu et al. 2024, arXiv 2405.00675"

    def __init__(self, beta: float = 0.001, **kwargs: Any) -> None:
        super().__init__(beta=beta, **kwargs)

    def preference_loss(self, logprobs: PreferenceLogprobs) -> Tensor | Loss:
        """Return one loss per pair, shape (pairs,); a soft label is the expectation over both orders."""
        return over_orders(logprobs, partial(losses.sppo_hard_loss, beta=self.beta))

    @property
    def value_at_reference(self) -> float | None:
        """What each row loses where the policy is the reference."""
        return 1 / (2 * self.beta**2)


class APOZeroModule(DPOModule):
    r"""APO-zero, for chosen completions better than the policy's own: chosen goes up, rejected down.

    loss = 1 - sigmoid(u) + sigmoid(v) (D'Oosterlinck et al., 2408.06266). Policy = reference gives 1.

    Target: no closed form; the minimiser of the population loss. As the loss is bounded, it may give up poor
    completions altogether.
    """

    paper = "D'Oosterlinck et al. 2024, arXiv 2408.06266"

    def __init__(self, learning_rate: float = 2e-7, **kwargs: Any) -> None:
        super().__init__(learning_rate=learning_rate, **kwargs)

    def preference_loss(self, logprobs: PreferenceLogprobs) -> Tensor | Loss:
        """Return one loss per pair, shape (pairs,); a soft label is the expectation over both orders."""
        return over_orders(logprobs, partial(losses.apo_zero_loss, beta=self.beta))

    @property
    def value_at_reference(self) -> float | None:
        """What each row loses where the policy is the reference."""
        return 1.0


class APODownModule(DPOModule):
    r"""APO-down, for chosen completions worse than the policy's own: both go down, rejected further.

    loss = sigmoid(u) + 1 - sigmoid(x) (D'Oosterlinck et al., 2408.06266). Policy = reference gives 1.

    Target: no closed form; the minimiser of the population loss. u is pushed down on every chosen completion, so it may
    leave a prompt a single one.
    """

    paper = "D'Oosterlinck et al. 2024, arXiv 2408.06266"

    def __init__(self, learning_rate: float = 2e-7, **kwargs: Any) -> None:
        super().__init__(learning_rate=learning_rate, **kwargs)

    def preference_loss(self, logprobs: PreferenceLogprobs) -> Tensor | Loss:
        """Return one loss per pair, shape (pairs,); a soft label is the expectation over both orders."""
        return over_orders(logprobs, partial(losses.apo_down_loss, beta=self.beta))

    @property
    def value_at_reference(self) -> float | None:
        """What each row loses where the policy is the reference."""
        return 1.0


class AlphaDPOModule(DPOModule):
    r"""f-DPO with an alpha-divergence as the leash: between the reverse KL (DPO) and the forward KL.

    loss = -log sigmoid(beta (f(a_w) - f(a_l))), f(a) = (1 - e^{-alpha a}) / alpha (Wang et al., 2309.16240).
    Policy = reference gives log 2.

    Target: beta f(log policy/reference) = reward + c, each prompt's c so that the policy sums to 1.

    Args:
        alpha: towards 0 the reverse KL, 1 the forward KL; above 0.
    """

    paper = "Wang et al. 2023, arXiv 2309.16240"

    def __init__(self, alpha: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if alpha <= 0:
            raise ValueError(f"alpha is {alpha}: it must be positive; its limit 0 is DPOModule")
        self.alpha = alpha

    def preference_loss(self, logprobs: PreferenceLogprobs) -> Tensor | Loss:
        """Return one loss per pair, shape (pairs,); a soft label is the expectation over both orders."""
        return over_orders(logprobs, partial(losses.alpha_dpo_loss, beta=self.beta, alpha=self.alpha))

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        """Return the policy with beta f(log policy/reference) = reward + c, each prompt's c so that it sums to 1."""
        return None if self.label_smoothing else _alpha_target(problem, self.beta, self.alpha)

    @property
    def value_at_reference(self) -> float | None:
        """What each row loses where the policy is the reference."""
        return math.log(2)


class ForwardKLDPOModule(DPOModule):
    r"""f-DPO with the forward KL as the leash: no completion of the reference is given up.

    loss = -log sigmoid(beta (f(a_w) - f(a_l))), f(a) = 1 - e^{-a} (Wang et al., 2309.16240).
    Policy = reference gives log 2.

    Target: beta (1 - reference/policy) = reward + c, each prompt's c so that the policy sums to 1.
    """

    paper = "Wang et al. 2023, arXiv 2309.16240"

    def preference_loss(self, logprobs: PreferenceLogprobs) -> Tensor | Loss:
        """Return one loss per pair, shape (pairs,); a soft label is the expectation over both orders."""
        return over_orders(logprobs, partial(losses.forward_kl_dpo_loss, beta=self.beta))

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        """Return the policy with beta (1 - reference/policy) = reward + c, each prompt's c so that it sums to 1."""
        return None if self.label_smoothing else _alpha_target(problem, self.beta, 1.0)

    @property
    def value_at_reference(self) -> float | None:
        """What each row loses where the policy is the reference."""
        return math.log(2)


class JensenShannonDPOModule(DPOModule):
    r"""f-DPO with the Jensen-Shannon divergence as the leash.

    loss = -log sigmoid(beta (f(a_w) - f(a_l))), f(a) = log 2 + log sigmoid(a) (Wang et al., 2309.16240).
    Policy = reference gives log 2.

    Target: beta f(log policy/reference) = reward + c, each prompt's c so that the policy sums to 1.
    """

    paper = "Wang et al. 2023, arXiv 2309.16240"

    def preference_loss(self, logprobs: PreferenceLogprobs) -> Tensor | Loss:
        """Return one loss per pair, shape (pairs,); a soft label is the expectation over both orders."""
        return over_orders(logprobs, partial(losses.jensen_shannon_dpo_loss, beta=self.beta))

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        """Return the policy with beta f(log policy/reference) = reward + c, each prompt's c so that it sums to 1."""
        if self.label_smoothing:
            return None

        def ratios(shift: Tensor) -> Tensor:
            half = torch.exp((problem.rewards + shift) / self.beta) / 2
            return half / (1 - half)

        highest = self.beta * math.log(2) - problem.rewards.amax(-1, keepdim=True)
        return normalised(problem.reference, ratios, highest - 100 * self.beta, highest - 1e-12)

    @property
    def value_at_reference(self) -> float | None:
        """What each row loses where the policy is the reference."""
        return math.log(2)


def _alpha_target(problem: EnumeratedProblem, beta: float, alpha: float) -> Tensor:
    """Return the policy with beta (1 - ratio^-alpha) / alpha = reward + c, ratio = policy / reference."""

    def ratios(shift: Tensor) -> Tensor:
        inside = 1 - alpha * (problem.rewards + shift) / beta
        return inside.clamp_min(1e-300) ** (-1 / alpha)

    highest = beta / alpha - problem.rewards.amax(-1, keepdim=True)
    return normalised(problem.reference, ratios, highest - beta / alpha * 1e6**alpha, highest)
