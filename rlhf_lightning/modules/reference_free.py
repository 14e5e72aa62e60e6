"""Preference objectives without a reference model, which halves the memory for weights. Notation as in `dpo`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_lightning.functional.logprobs import log1mexp
from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.modules.preference import RPOModule
from rlhf_lightning.training.pairs import mean_logprobs
from rlhf_lightning.types import EnumeratedProblem, Loss, PreferenceLogprobs


class ReferenceFreeDPOModule(DPOModule):
    r"""DPO with a uniform reference: the policy's log-probability is the implicit reward.

    loss = -log sigmoid(beta (S_w - S_l)) (a special case of Rafailov et al., 2305.18290). When S_w = S_l, the loss is
    log 2.
    Target: exp(reward / beta), normalised.
    """

    needs_reference = False

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        return None if self.label_smoothing else torch.softmax(problem.rewards / self.beta, -1)


class SimPOModule(DPOModule):
    r"""SimPO: mean log-probabilities as rewards, and a gap that the margin must exceed.

    loss = -log sigmoid(beta (S_w / n_w - S_l / n_l) - gamma) (Meng et al., 2405.14734, Eq. 6). When the means are
    equal, the loss is -log sigmoid(-gamma).
    Target: no closed form; the minimiser of the population loss. Because of gamma, margins differ from the log-odds.

    Args:
        beta: reward units per nat of mean log-probability; 2 to 10.
        gamma: the gap, in reward units; about half of beta.
    """

    paper = "Meng et al. 2024, arXiv 2405.14734"
    needs_reference = False
    ranges = {"gamma": "(-inf, inf)"}

    def __init__(self, beta: float = 2.0, gamma: float = 1.0, learning_rate: float = 1e-6, **kwargs: Any) -> None:
        super().__init__(beta=beta, learning_rate=learning_rate, **kwargs)
        self.gamma = gamma

    def implicit_reward(self, pairs: PreferenceLogprobs) -> tuple[Tensor, Tensor]:
        chosen, rejected = mean_logprobs(pairs)
        return self.beta * chosen, self.beta * rejected

    def pair_loss(self, pair: PreferenceLogprobs) -> Tensor | Loss:
        return -logsigmoid(self.reward_margin(pair) - self.gamma)


class ORPOModule(DPOModule):
    r"""ORPO: fine-tuning on the chosen completion plus an odds ratio against the rejected completion, in one stage.

    loss = -S_w / n_w - weight * log sigmoid(o), o = log [P_w / (1 - P_w)] - log [P_l / (1 - P_l)] the log odds ratio of
    the mean probabilities per token P = e^{S / n} (Hong et al., 2403.07691, Eq. 6 and 7). When both means are m, the
    loss is -m + weight * log 2. The likelihood is averaged over each row's completion. TRL averages over all chosen
    tokens of a batch instead, and the authors' code also counts the prompt's tokens.
    Target: no closed form; the minimiser of the population loss. Since the weight is small, it is close to the chosen
    completions' frequencies divided by their lengths.

    Args:
        weight: the paper's lambda, weight of the odds ratio.
    """

    paper = "Hong et al. 2024, arXiv 2403.07691"
    needs_reference = False
    ranges = {"weight": "[0, inf)"}

    def __init__(self, weight: float = 0.1, learning_rate: float = 5e-6, **kwargs: Any) -> None:
        super().__init__(learning_rate=learning_rate, **kwargs)
        self.weight = weight

    def implicit_reward(self, pairs: PreferenceLogprobs) -> tuple[Tensor, Tensor]:
        chosen, rejected = mean_logprobs(pairs)
        return chosen - log1mexp(chosen), rejected - log1mexp(rejected)

    def pair_loss(self, pair: PreferenceLogprobs) -> Tensor | Loss:
        nll, odds = -mean_logprobs(pair)[0], self.reward_margin(pair)
        return Loss(nll - self.weight * logsigmoid(odds), {"nll_loss": nll, "log_odds_ratio": odds})


class CPOModule(RPOModule):
    r"""CPO: reference-free DPO plus the likelihood of the chosen completion.

    loss = -log sigmoid(beta (S_w - S_l)) - alpha S_w / n_w (Xu et al., 2401.08417). When S and n are the same on both
    sides, the loss is log 2 - alpha S / n. TRL averages the likelihood over all chosen tokens of a batch.
    Target: no closed form; the minimiser of the population loss. It lies between exp(reward / beta) and the chosen
    completions' frequencies divided by their lengths.
    """

    paper = "Xu et al. 2024, arXiv 2401.08417"
    needs_reference = False
