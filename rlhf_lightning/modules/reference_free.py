"""Objectives on preference pairs that need no reference: half the memory, and nothing that holds the policy back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.functional import reference_free as losses
from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.types import EnumeratedProblem, Loss, PreferenceLogprobs


class ReferenceFreeDPOModule(DPOModule):
    r"""DPO with a uniform reference: the policy's log-probability is the implicit reward.

    loss = -log sigmoid(beta (S_w - S_l)), S the sequence log-probabilities (a special case of Rafailov et al.,
    2305.18290). Equal log-probabilities give log 2.

    Target: exp(reward / beta), normalised.
    """

    needs_reference = False

    def preference_loss(self, logprobs: PreferenceLogprobs) -> Tensor | Loss:
        """Return one loss per pair, shape (pairs,); a soft label is the expectation over both orders."""
        chosen, rejected = logprobs.chosen_sequence_logprobs, logprobs.rejected_sequence_logprobs
        agrees = losses.reference_free_dpo_loss(chosen, rejected, self.beta)
        disagrees = losses.reference_free_dpo_loss(rejected, chosen, self.beta)
        return logprobs.target * agrees + (1 - logprobs.target) * disagrees

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        """Return exp(reward / beta), normalised."""
        if self.label_smoothing:
            return None
        return torch.softmax(problem.rewards / self.beta, -1)


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

    def __init__(self, beta: float = 2.0, gamma: float = 1.0, learning_rate: float = 1e-6, **kwargs: Any) -> None:
        super().__init__(beta=beta, learning_rate=learning_rate, **kwargs)
        self.gamma = gamma

    def preference_loss(self, logprobs: PreferenceLogprobs) -> Tensor | Loss:
        """Return one loss per pair, shape (pairs,); a soft label is the expectation over both orders."""
        chosen, rejected = logprobs.chosen_sequence_logprobs, logprobs.rejected_sequence_logprobs
        n_w, n_l = logprobs.chosen_lengths, logprobs.rejected_lengths
        agrees = losses.simpo_loss(chosen, rejected, n_w, n_l, self.beta, self.gamma)
        disagrees = losses.simpo_loss(rejected, chosen, n_l, n_w, self.beta, self.gamma)
        return logprobs.target * agrees + (1 - logprobs.target) * disagrees


class ORPOModule(DPOModule):
    r"""ORPO: fine-tuning on the chosen completion and an odds ratio against the rejected one, in one stage.

    loss = -S_w / n_w - weight * log sigmoid(o), o the log odds ratio of the two completions' mean probabilities per
    token (Hong et al., 2403.07691, Eq. 6 and 7). Equal means m give -m + weight * log 2.

    Target: no closed form; the minimiser of the population loss. As the weight is small, it is near the chosen
    completions' frequencies over lengths.

    Args:
        weight: lambda, weight of the odds ratio.
    """

    paper = "Hong et al. 2024, arXiv 2403.07691"
    needs_reference = False

    def __init__(self, weight: float = 0.1, learning_rate: float = 5e-6, **kwargs: Any) -> None:
        super().__init__(learning_rate=learning_rate, **kwargs)
        self.weight = weight

    def preference_loss(self, logprobs: PreferenceLogprobs) -> Tensor | Loss:
        """Return one loss per pair, shape (pairs,); a soft label is the expectation over both orders."""
        chosen = (logprobs.chosen_sequence_logprobs, logprobs.chosen_lengths)
        rejected = (logprobs.rejected_sequence_logprobs, logprobs.rejected_lengths)

        def loss(best: tuple[Tensor, Tensor], worst: tuple[Tensor, Tensor]) -> Tensor:
            return losses.orpo_loss(best[0], worst[0], best[1], worst[1], self.weight)

        odds = losses.log_odds_ratio(chosen[0], rejected[0], chosen[1], rejected[1])
        values = logprobs.target * loss(chosen, rejected) + (1 - logprobs.target) * loss(rejected, chosen)
        return Loss(values, {"nll_loss": -chosen[0] / chosen[1], "log_odds_ratio": odds})


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

    def __init__(self, alpha: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.alpha = alpha

    def preference_loss(self, logprobs: PreferenceLogprobs) -> Tensor | Loss:
        """Return one loss per pair, shape (pairs,); a soft label is the expectation over both orders."""
        chosen, rejected = logprobs.chosen_sequence_logprobs, logprobs.rejected_sequence_logprobs
        n_w, n_l = logprobs.chosen_lengths, logprobs.rejected_lengths
        agrees = losses.cpo_loss(chosen, rejected, n_w, self.beta, self.alpha)
        disagrees = losses.cpo_loss(rejected, chosen, n_l, self.beta, self.alpha)
        values = logprobs.target * agrees + (1 - logprobs.target) * disagrees
        return Loss(values, {"nll_loss": -chosen / n_w})
