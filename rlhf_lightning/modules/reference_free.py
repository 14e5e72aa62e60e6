"""Objectives on preference pairs that need no reference: half the memory, and nothing that holds the policy back.

In every docstring S_w and S_l are the policy's sequence log-probabilities of chosen and rejected, n_w and n_l their
lengths in tokens. Formulas are those of a certain label.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_lightning.functional.logprobs import log1mexp
from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.modules.preference import mean_logprobs
from rlhf_lightning.types import EnumeratedProblem, Loss, PreferenceLogprobs


class ReferenceFreeDPOModule(DPOModule):
    r"""DPO with a uniform reference: the policy's log-probability is the implicit reward.

    loss = -log sigmoid(beta (S_w - S_l)) (a special case of Rafailov et al., 2305.18290). Equal log-probabilities give
    log 2.

    Target: exp(reward / beta), normalised.
    """

    needs_reference = False

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        """Return exp(reward / beta), normalised."""
        return None if self.label_smoothing else torch.softmax(problem.rewards / self.beta, -1)


class SimPOModule(DPOModule):
    r"""SimPO: mean log-probabilities as rewards, and a gap that a pair must clear.

    loss = -log sigmoid(beta (S_w / n_w - S_l / n_l) - gamma) (Meng et al., 2405.14734, Eq. 6). Equal means give
    -log sigmoid(-gamma).

    Target: no closed form; the minimiser of the population loss. The gap keeps margins from the log-odds.

    Args:
        beta: reward units per nat of mean log-probability; 2 to 10.
        gamma: gap in reward units; about half of beta.
    """

    paper = "Meng et al. 2024, arXiv 2405.14734"
    needs_reference = False
    ranges = {"gamma": "(-inf, inf)"}

    def __init__(self, beta: float = 2.0, gamma: float = 1.0, learning_rate: float = 1e-6, **kwargs: Any) -> None:
        super().__init__(beta=beta, learning_rate=learning_rate, **kwargs)
        self.gamma = gamma

    def implicit_reward(self, pairs: PreferenceLogprobs) -> tuple[Tensor, Tensor]:
        """Return beta S / n."""
        chosen, rejected = mean_logprobs(pairs)
        return self.beta * chosen, self.beta * rejected

    def pair_loss(self, pair: PreferenceLogprobs) -> Tensor | Loss:
        """Return -log sigmoid(reward margin - gamma), shape (pairs,)."""
        return -logsigmoid(self.reward_margin(pair) - self.gamma)


class ORPOModule(DPOModule):
    r"""ORPO: fine-tuning on the chosen completion and an odds ratio against the rejected one, in one stage.

    loss = -S_w / n_w - weight * log sigmoid(o), o = log [P_w / (1 - P_w)] - log [P_l / (1 - P_l)] the log odds ratio of
    the mean probabilities per token P = e^{S / n} (Hong et al., 2403.07691, Eq. 6 and 7). Equal means m give
    -m + weight * log 2.

    Target: no closed form; the minimiser of the population loss. As the weight is small, it is near the chosen
    completions' frequencies over lengths.

    Args:
        weight: lambda, weight of the odds ratio.
    """

    paper = "Hong et al. 2024, arXiv 2403.07691"
    needs_reference = False
    ranges = {"weight": "[0, inf)"}

    def __init__(self, weight: float = 0.1, learning_rate: float = 5e-6, **kwargs: Any) -> None:
        super().__init__(learning_rate=learning_rate, **kwargs)
        self.weight = weight

    def implicit_reward(self, pairs: PreferenceLogprobs) -> tuple[Tensor, Tensor]:
        """Return the log-odds log [P / (1 - P)] of each side."""
        chosen, rejected = mean_logprobs(pairs)
        return chosen - log1mexp(chosen), rejected - log1mexp(rejected)

    def pair_loss(self, pair: PreferenceLogprobs) -> Tensor | Loss:
        """Return the NLL per token plus the odds-ratio term, shape (pairs,)."""
        nll, odds = -mean_logprobs(pair)[0], self.reward_margin(pair)
        return Loss(nll - self.weight * logsigmoid(odds), {"nll_loss": nll, "log_odds_ratio": odds})


class CPOModule(DPOModule):
    r"""CPO: reference-free DPO with the chosen completion's likelihood.

    loss = -log sigmoid(beta (S_w - S_l)) - alpha S_w / n_w (Xu et al., 2401.08417). Equal log-probabilities S of equal
    lengths n give log 2 - alpha S / n.

    Target: no closed form; the minimiser of the population loss, between exp(reward / beta) and the chosen completions'
    frequencies over lengths.

    Args:
        alpha: weight of the likelihood.
    """

    paper = "Xu et al. 2024, arXiv 2401.08417"
    needs_reference = False
    ranges = {"alpha": "[0, inf)"}

    def __init__(self, alpha: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.alpha = alpha

    def pair_loss(self, pair: PreferenceLogprobs) -> Tensor | Loss:
        """Return the logistic loss plus alpha NLL per token, shape (pairs,)."""
        nll = -mean_logprobs(pair)[0]
        return Loss(-logsigmoid(self.reward_margin(pair)) + self.alpha * nll, {"nll_loss": nll})
