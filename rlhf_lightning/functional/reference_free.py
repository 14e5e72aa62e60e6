"""Losses on preference pairs that need no reference: they look at the policy's own sequence log-probabilities.

``*_sequence_logprobs`` are summed over a completion's tokens, in nats, shape (pairs,); ``*_lengths`` count those
tokens. Every loss returns one value per pair.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from rlhf_lightning.functional.logprobs import at_least_float32, log1mexp, require_shape
from rlhf_lightning.functional.preference import dpo_loss


def reference_free_dpo_loss(
    chosen_sequence_logprobs: Tensor, rejected_sequence_logprobs: Tensor, beta: float = 0.1
) -> Tensor:
    r"""DPO against a reference that gives every completion the same probability: -log sigmoid(beta * (S_w - S_l)).

    Args:
        chosen_sequence_logprobs: S_w, shape (pairs,).
        rejected_sequence_logprobs: S_l, shape (pairs,).
        beta: rewards per nat.
    """
    require_shape("pairs", chosen=chosen_sequence_logprobs, rejected=rejected_sequence_logprobs)
    return dpo_loss(at_least_float32(chosen_sequence_logprobs) - at_least_float32(rejected_sequence_logprobs), beta)


def simpo_loss(
    chosen_sequence_logprobs: Tensor,
    rejected_sequence_logprobs: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float = 2.0,
    gamma: float = 1.0,
) -> Tensor:
    r"""SimPO: the mean log-probability per token as the reward, with a target margin (Meng et al., arXiv 2405.14734).

    -log sigmoid(beta * (S_w / n_w - S_l / n_l) - gamma), their Eq. 6. Equal means give log(1 + e^gamma).

    Args:
        chosen_sequence_logprobs: S_w, shape (pairs,).
        rejected_sequence_logprobs: S_l, shape (pairs,).
        chosen_lengths: n_w, shape (pairs,).
        rejected_lengths: n_l, shape (pairs,).
        beta: rewards per nat per token.
        gamma: reward margin that a pair must clear.
    """
    chosen = _mean_logprobs(chosen_sequence_logprobs, chosen_lengths)
    rejected = _mean_logprobs(rejected_sequence_logprobs, rejected_lengths)
    require_shape("pairs", chosen=chosen, rejected=rejected)
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def log_odds_ratio(
    chosen_sequence_logprobs: Tensor,
    rejected_sequence_logprobs: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
) -> Tensor:
    r"""ORPO's log odds ratio, log [P_w / (1 - P_w)] - log [P_l / (1 - P_l)], with P = e^{S / n} per token.

    Args:
        chosen_sequence_logprobs: S_w, shape (pairs,).
        rejected_sequence_logprobs: S_l, shape (pairs,).
        chosen_lengths: n_w, shape (pairs,).
        rejected_lengths: n_l, shape (pairs,).
    """
    chosen = _mean_logprobs(chosen_sequence_logprobs, chosen_lengths)
    rejected = _mean_logprobs(rejected_sequence_logprobs, rejected_lengths)
    require_shape("pairs", chosen=chosen, rejected=rejected)
    return chosen - rejected - (log1mexp(chosen) - log1mexp(rejected))


def orpo_loss(
    chosen_sequence_logprobs: Tensor,
    rejected_sequence_logprobs: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    weight: float = 0.1,
) -> Tensor:
    r"""ORPO: fine-tuning on the chosen completion plus a penalty on the odds ratio (Hong et al., arXiv 2403.07691).

    -S_w / n_w - lambda * log sigmoid(`log_odds_ratio`). Equal means m give -m + lambda log 2.

    Args:
        chosen_sequence_logprobs: S_w, shape (pairs,).
        rejected_sequence_logprobs: S_l, shape (pairs,).
        chosen_lengths: n_w, shape (pairs,).
        rejected_lengths: n_l, shape (pairs,).
        weight: lambda, weight of the odds-ratio term.
    """
    log_odds = log_odds_ratio(chosen_sequence_logprobs, rejected_sequence_logprobs, chosen_lengths, rejected_lengths)
    return -_mean_logprobs(chosen_sequence_logprobs, chosen_lengths) - weight * F.logsigmoid(log_odds)


def cpo_loss(
    chosen_sequence_logprobs: Tensor,
    rejected_sequence_logprobs: Tensor,
    chosen_lengths: Tensor,
    beta: float = 0.1,
    alpha: float = 1.0,
) -> Tensor:
    r"""CPO: `reference_free_dpo_loss` plus alpha times the chosen completion's negative log-likelihood per token.

    -log sigmoid(beta * (S_w - S_l)) - alpha * S_w / n_w (Xu et al., arXiv 2401.08417).

    Args:
        chosen_sequence_logprobs: S_w, shape (pairs,).
        rejected_sequence_logprobs: S_l, shape (pairs,).
        chosen_lengths: n_w, shape (pairs,). The batch's mean length for every pair gives a mean over tokens.
        beta: rewards per nat.
        alpha: weight of the likelihood term.
    """
    preference = reference_free_dpo_loss(chosen_sequence_logprobs, rejected_sequence_logprobs, beta)
    return preference - alpha * _mean_logprobs(chosen_sequence_logprobs, chosen_lengths)


def _mean_logprobs(sequence_logprobs: Tensor, lengths: Tensor) -> Tensor:
    require_shape("pairs", sequence_logprobs=sequence_logprobs, lengths=lengths)
    return at_least_float32(sequence_logprobs) / lengths.clamp(min=1)
