"""Chi-squared preference optimisation: `rlhf fit --config experiments/objectives_of_users/chi_po.yaml`."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_lightning.modules import DPOModule
from rlhf_lightning.types import EnumeratedProblem, PreferenceLogprobs


class ChiPOModule(DPOModule):
    """Chi-squared preference optimisation (chi-PO): DPO with a chi-squared penalty against over-optimisation.

    loss = -log sigmoid(clip(beta (phi(z_w) - phi(z_l)), -2 R, 2 R)), phi(z) = z + log z, z = policy/reference (Huang et
    al., 2407.13399, Algorithm 1), R = ``max_reward``; log z is clamped to at most 20 before `exp`. Policy = reference
    gives log 2. A margin beyond 2 R has no gradient.

    Target: beta phi(policy/reference) = reward + c, with c chosen for each prompt so that the policy sums to 1; valid
    for rewards within R.

    Args:
        beta: weight of the divergence.
        max_reward: R, the maximum difference of two rewards of a prompt; margins are clipped to 2 R.
    """

    paper = "Huang et al. 2024, arXiv 2407.13399"
    ranges = {"max_reward": "(0, inf)"}

    def __init__(self, beta: float = 0.1, max_reward: float = 10.0, **kwargs: Any) -> None:
        super().__init__(beta=beta, **kwargs)
        self.max_reward = max_reward

    def implicit_reward(self, pairs: PreferenceLogprobs) -> tuple[Tensor, Tensor]:
        """Return beta phi(policy/reference) of chosen and rejected, each of shape (pairs,)."""
        chosen, rejected = pairs.chosen_logratio, pairs.rejected_logratio
        return self.beta * (chosen.clamp_max(20).exp() + chosen), self.beta * (rejected.clamp_max(20).exp() + rejected)

    def pair_loss(self, pair: PreferenceLogprobs) -> Tensor:
        """Return one loss per pair, shape (pairs,)."""
        return -logsigmoid(self.reward_margin(pair).clamp(-2 * self.max_reward, 2 * self.max_reward))

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        """Return reference * z with beta phi(z) = reward + c; c is found by bisection, and so is log z for each c."""
        low, high = (torch.full_like(problem.rewards[:, :1], bound) for bound in (-1e3, 1e3))
        for _ in range(100):
            middle = (low + high) / 2
            below = (problem.reference * ratio((problem.rewards + middle) / self.beta)).sum(-1, keepdim=True) < 1
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return problem.reference * ratio((problem.rewards + low) / self.beta)


def ratio(phi: Tensor) -> Tensor:
    """Return z with z + log z = phi, shape of ``phi``."""
    low, high = (phi - 1).clamp_max(0), phi  # bounds of log z
    for _ in range(100):
        middle = (low + high) / 2
        below = middle.exp() + middle < phi
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low.exp()
