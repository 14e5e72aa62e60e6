"""Objectives on preference pairs that look at each side's log-ratio by itself, not at the margin alone.

In every docstring u and v are the implicit rewards of chosen and rejected, beta a_w and beta a_l, where a is the
log-ratio log policy/reference of a completion; x = u - v. Formulas are those of a certain label.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_lightning.errors import ContractError
from rlhf_lightning.functional.logprobs import MAX_LOG_RATIO
from rlhf_lightning.modules.dpo import DPOModule, PairObjective, normalised
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

    def pair_loss(self, pair: PreferenceLogprobs) -> Tensor | Loss:
        """Return the noise-contrastive loss, shape (pairs,)."""
        u, v = self.implicit_reward(pair)
        return -logsigmoid(u) - logsigmoid(-u) / 2 - logsigmoid(-v) / 2


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

    def preference_loss(self, pairs: PreferenceLogprobs) -> Tensor | Loss:
        """Return one loss per pair, shape (pairs,); the slot ``delta`` is the step's weighted mean reward."""
        chosen, rejected = self.implicit_reward(pairs)
        total = ((chosen + rejected) / 2 * pairs.weights).sum() / pairs.weights.sum().clamp_min(1e-12)
        slots = {**pairs.extras, "delta": total.detach().expand(len(chosen))}
        return super().preference_loss(pairs._replace(extras=slots))

    def pair_loss(self, pair: PreferenceLogprobs) -> Tensor | Loss:
        """Return the classifier's loss of both sides, shape (pairs,)."""
        (u, v), delta = self.implicit_reward(pair), pair.extras["delta"]
        return -logsigmoid(u - delta) - logsigmoid(delta - v)


class SPPOModule(DPOModule):
    r"""SPPO with hard labels: one step of self-play, each log-ratio regressed on a constant.

    loss = (a_w - 1 / (2 beta))^2 + (a_l + 1 / (2 beta))^2 (Wu et al., 2405.00675). Policy = reference gives
    1 / (2 beta^2).

    Target: no closed form; the minimiser of the population loss.

    Args:
        beta: inverse of the step size eta of the self-play game.
    """

    paper = "Wu et al. 2024, arXiv 2405.00675"

    def __init__(self, beta: float = 0.001, **kwargs: Any) -> None:
        super().__init__(beta=beta, **kwargs)

    def pair_loss(self, pair: PreferenceLogprobs) -> Tensor | Loss:
        """Return [(u - 1/2)^2 + (v + 1/2)^2] / beta^2, shape (pairs,)."""
        u, v = self.implicit_reward(pair)
        return ((u - 0.5) / self.beta) ** 2 + ((v + 0.5) / self.beta) ** 2


class APOZeroModule(DPOModule):
    r"""APO-zero, for chosen completions better than the policy's own: chosen goes up, rejected down.

    loss = 1 - sigmoid(u) + sigmoid(v) (D'Oosterlinck et al., 2408.06266). Policy = reference gives 1.

    Target: no closed form; the minimiser of the population loss. As the loss is bounded, it may give up poor
    completions altogether.
    """

    paper = "D'Oosterlinck et al. 2024, arXiv 2408.06266"

    def __init__(self, learning_rate: float = 2e-7, **kwargs: Any) -> None:
        super().__init__(learning_rate=learning_rate, **kwargs)

    def pair_loss(self, pair: PreferenceLogprobs) -> Tensor | Loss:
        """Return sigmoid(-u) + sigmoid(v), shape (pairs,)."""
        u, v = self.implicit_reward(pair)
        return torch.sigmoid(-u) + torch.sigmoid(v)


class APODownModule(DPOModule):
    r"""APO-down, for chosen completions worse than the policy's own: both go down, rejected further.

    loss = sigmoid(u) + 1 - sigmoid(x) (D'Oosterlinck et al., 2408.06266). Policy = reference gives 1.

    Target: no closed form; the minimiser of the population loss. u is pushed down on every chosen completion, so it may
    leave a prompt a single one.
    """

    paper = "D'Oosterlinck et al. 2024, arXiv 2408.06266"

    def __init__(self, learning_rate: float = 2e-7, **kwargs: Any) -> None:
        super().__init__(learning_rate=learning_rate, **kwargs)

    def pair_loss(self, pair: PreferenceLogprobs) -> Tensor | Loss:
        """Return sigmoid(u) + sigmoid(-x), shape (pairs,)."""
        u, v = self.implicit_reward(pair)
        return torch.sigmoid(u) + torch.sigmoid(v - u)


class FDivergence(PairObjective):
    """Mixin: the implicit reward is beta f(log policy/reference), f from the divergence that holds the policy."""

    def f(self, logratio: Tensor) -> Tensor:
        """Return f of log-ratios, shape (pairs,)."""
        raise ContractError("undefined-method", f"{type(self).__name__} must define 'f'")

    def ratio(self, value: Tensor) -> Tensor:
        """Return the ratio policy/reference at which f has a value; infinite where f does not reach it."""
        raise ContractError("undefined-method", f"{type(self).__name__} must define 'ratio'")

    def implicit_reward(self, pairs: PreferenceLogprobs) -> tuple[Tensor, Tensor]:
        """Return beta f(a)."""
        return self.beta * self.f(pairs.chosen_logratio), self.beta * self.f(pairs.rejected_logratio)

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        """Return the policy with f(log policy/reference) = (reward + c) / beta."""
        return None if self.label_smoothing else normalised(problem, problem.rewards / self.beta, self.ratio)


class AlphaDPOModule(FDivergence, DPOModule):
    r"""f-DPO with an alpha-divergence as KL penalty: between the reverse KL (DPO) and the forward KL.

    loss = -log sigmoid(beta (f(a_w) - f(a_l))), f(a) = (1 - e^{-alpha a}) / alpha (Wang et al., 2309.16240), where
    alpha a is held within 20. Policy = reference gives log 2.

    Target: beta f(log policy/reference) = reward + c, each prompt's c so that the policy sums to 1.

    Args:
        alpha: 1 is the forward KL; the limit 0, the reverse KL, is DPOModule.
    """

    paper = "Wang et al. 2023, arXiv 2309.16240"
    ranges = {"alpha": "(0, inf)"}

    def __init__(self, alpha: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.alpha = alpha

    def f(self, logratio: Tensor) -> Tensor:
        """Return (1 - e^{-alpha a}) / alpha."""
        return -torch.expm1(-(self.alpha * logratio).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)) / self.alpha

    def ratio(self, value: Tensor) -> Tensor:
        """Return policy/reference, infinite from 1 / alpha on."""
        return (1 - self.alpha * value).clamp_min(1e-300) ** (-1 / self.alpha)


class ForwardKLDPOModule(FDivergence, DPOModule):
    r"""f-DPO with the forward KL as KL penalty: no completion of the reference is given up.

    loss = -log sigmoid(beta (f(a_w) - f(a_l))), f(a) = 1 - e^{-a} (Wang et al., 2309.16240).
    Policy = reference gives log 2.

    Target: beta (1 - reference/policy) = reward + c, each prompt's c so that the policy sums to 1.
    """

    paper = "Wang et al. 2023, arXiv 2309.16240"

    def f(self, logratio: Tensor) -> Tensor:
        """Return 1 - e^{-a}."""
        return -torch.expm1(-logratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))

    def ratio(self, value: Tensor) -> Tensor:
        """Return policy/reference, infinite from 1 on."""
        return (1 - value).clamp_min(1e-300).reciprocal()


class JensenShannonDPOModule(FDivergence, DPOModule):
    r"""f-DPO with the Jensen-Shannon divergence as KL penalty.

    loss = -log sigmoid(beta (f(a_w) - f(a_l))), f(a) = log 2 + log sigmoid(a) (Wang et al., 2309.16240).
    Policy = reference gives log 2.

    Target: beta f(log policy/reference) = reward + c, each prompt's c so that the policy sums to 1.
    """

    paper = "Wang et al. 2023, arXiv 2309.16240"

    def f(self, logratio: Tensor) -> Tensor:
        """Return log 2 + log sigmoid(a)."""
        return math.log(2) + logsigmoid(logratio)

    def ratio(self, value: Tensor) -> Tensor:
        """Return policy/reference, infinite from log 2 on."""
        return (2 * torch.exp(-value) - 1).clamp_min(1e-300).reciprocal()
