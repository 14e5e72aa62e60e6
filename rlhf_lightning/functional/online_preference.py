"""Preference objectives on completions that the policy itself has just sampled.

Online DPO needs no loss of its own: its pairs come from `best_and_worst` of the policy's samples, and its loss is
`dpo_loss`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_lightning.functional.logprobs import at_least_float32, masked_sum, require_shape
from rlhf_lightning.functional.preference import dpo_loss


def best_and_worst(scores: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the best- and of the worst-scored sample of each group; groups whose scores all tie are left out.

    Args:
        scores: shape (episodes,); NaN where a sample could not be scored, which is then neither.
        group: index of the prompt each episode answers, int64 from 0, shape (episodes,).

    Returns:
        Chosen and rejected episodes, each of shape (pairs,), in the order of their groups.
    """
    require_shape("episodes", scores=scores, group=group)
    groups = torch.bincount(group)
    member = group == torch.arange(len(groups), device=group.device).unsqueeze(-1)
    member = member & ~scores.isnan()  # (groups, episodes)
    highest, chosen = torch.where(member, scores, -torch.inf).max(-1)
    lowest, rejected = torch.where(member, scores, torch.inf).min(-1)
    return chosen[highest > lowest], rejected[highest > lowest]


def xpo_loss(margin: Tensor, explored_sequence_logprobs: Tensor, beta: float = 0.1, alpha: float = 1e-5) -> Tensor:
    r"""XPO: DPO plus an exploration bonus, -log sigmoid(beta * margin) + alpha log policy(y') (arXiv 2405.21046).

    y' was sampled from the reference; making it less likely sends the policy elsewhere. At the start log 2 plus the
    bonus.

    Args:
        margin: chosen minus rejected log-ratio in nats, shape (pairs,).
        explored_sequence_logprobs: log policy(y'), shape (pairs,).
        beta: rewards per nat.
        alpha: weight of the bonus.
    """
    require_shape("pairs", margin=margin, explored_sequence_logprobs=explored_sequence_logprobs)
    return dpo_loss(margin, beta) + alpha * at_least_float32(explored_sequence_logprobs)


def nash_md_logits(policy_logits: Tensor, reference_logits: Tensor, mixture: float = 0.5) -> Tensor:
    r"""Logits of the opponent that Nash-MD samples, the geometric mixture policy^{1 - c} reference^c.

    (1 - c) policy logits + c reference logits (Munos et al., arXiv 2312.00886).

    Args:
        policy_logits: shape (..., vocabulary).
        reference_logits: same shape.
        mixture: c, share of the reference.
    """
    require_shape("...", policy_logits=policy_logits, reference_logits=reference_logits)
    return torch.lerp(at_least_float32(policy_logits), at_least_float32(reference_logits), mixture)


def nash_md_loss(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    completion_mask: Tensor,
    win_probability: Tensor,
    beta: float = 0.1,
) -> Tensor:
    r"""Nash-MD: policy gradient of the chance to beat the opponent, regularised by the KL (Munos et al., 2312.00886).

    -(P(y beats y') - 1/2) log policy(y) + beta \sum_t sg(lp_t - lp_ref_t) lp_t.

    Args:
        logprobs: lp, the policy's, with gradient, of its own sample y, shape (rows, length).
        reference_logprobs: lp_ref, shape (rows, length).
        completion_mask: bool, shape (rows, length).
        win_probability: P, a judge's or reward model's, without gradient, shape (rows,).
        beta: rewards per nat.

    Returns:
        One loss per row, shape (rows,).
    """
    require_shape("rows length", logprobs=logprobs, reference_logprobs=reference_logprobs, mask=completion_mask)
    require_shape("rows", win_probability=win_probability, rows_of_mask=completion_mask.any(-1))
    log_ratio = (logprobs - reference_logprobs).detach()
    penalty = beta * masked_sum(log_ratio * logprobs, completion_mask)
    return penalty - (win_probability - 0.5) * masked_sum(logprobs, completion_mask)
