"""AlphaPO: `rlhf fit --config experiments/objectives_of_users/alphapo.yaml`."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_lightning.modules import DPOModule
from rlhf_lightning.types import PreferenceLogprobs


class AlphaPOModule(DPOModule):
    """SimPO with a different reward shape, which keeps the likelihood of the chosen completion high.

    loss = -log sigmoid(r_w - r_l - gamma), r = beta (1 - P^{-alpha}) / alpha, P = policy(y)^{1/n} the geometric mean of
    the probabilities of y's n tokens (Gupta et al., 2501.03884). alpha -> 0 is SimPO.

    Args:
        beta: scale of the reward.
        gamma: target margin, in reward units.
        alpha: shape of the reward, not 0; the exponent -alpha log P is clamped to [-20, 20].
    """

    paper = "Gupta et al. 2025, arXiv 2501.03884"
    needs_reference = False
    no_target = "no closed form: rewards are powers of probabilities per token"
    ranges = {"gamma": "(-inf, inf)", "alpha": "(-inf, inf)"}

    def __init__(self, beta: float = 2.5, gamma: float = 0.25, alpha: float = 0.25, **kwargs: Any) -> None:
        super().__init__(beta=beta, **kwargs)
        self.gamma, self.alpha = gamma, alpha

    def implicit_reward(self, pairs: PreferenceLogprobs) -> tuple[Tensor, Tensor]:
        """Return beta (1 - P^{-alpha}) / alpha of chosen and rejected, each of shape (pairs,)."""
        chosen = -self.alpha * pairs.chosen_sequence_logprobs / pairs.chosen_lengths
        rejected = -self.alpha * pairs.rejected_sequence_logprobs / pairs.rejected_lengths
        rise, fall = (torch.expm1(power.clamp(-20, 20)) for power in (chosen, rejected))
        return -self.beta * rise / self.alpha, -self.beta * fall / self.alpha

    def pair_loss(self, pair: PreferenceLogprobs) -> Tensor:
        """Return one loss per pair, shape (pairs,)."""
        return -logsigmoid(self.reward_margin(pair) - self.gamma)
