"""What bends a preference loss while it trains: weights of pairs and of tokens, a moving beta, a moving reference."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_lightning.functional.logprobs import MAX_LOG_RATIO, at_least_float32, masked_mean, require_shape


def log_collision_probability(logits: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Log-probability that two draws from the next-token distribution agree, log \sum_v p_v^2, in float32 or wider.

    Args:
        logits: shape (..., vocabulary).
        temperature: of the softmax.

    Returns:
        Shape (...).
    """
    log_softmax = (at_least_float32(logits) / temperature).log_softmax(-1)
    return (2 * log_softmax).logsumexp(-1)


def wpo_weights(logprobs: Tensor, log_collisions: Tensor, completion_mask: Tensor) -> Tensor:
    r"""WPO: how much a completion looks like the policy's own, e^{mean_t(log p_t - log \sum_v p_v^2)}, no gradient.

    A pair is weighted by the product of its two sides, capped at 1 if wished (Zhou et al., arXiv 2406.11827).

    Args:
        logprobs: the policy's, shape (rows, length).
        log_collisions: `log_collision_probability` at the same positions, shape (rows, length).
        completion_mask: bool, shape (rows, length).

    Returns:
        Weights, shape (rows,); 1 where tokens are as likely as ones that the policy samples are on average.
    """
    require_shape("rows length", logprobs=logprobs, log_collisions=log_collisions, completion_mask=completion_mask)
    closeness = masked_mean(logprobs - log_collisions, completion_mask, dim=-1)
    return closeness.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().detach()


def ld_dpo_token_weights(chosen_mask: Tensor, rejected_mask: Tensor, alpha: float = 0.5) -> tuple[Tensor, Tensor]:
    r"""LD-DPO: 1 on the first min(n_w, n_l) tokens of both sides, alpha on the longer side's rest, 0 under the mask.

    Multiply them into token log-ratios before summing (Liu et al., arXiv 2409.06411). alpha 1 is DPO.

    Args:
        chosen_mask: bool, shape (pairs, length).
        rejected_mask: bool, shape (pairs, length).
        alpha: weight of the tokens that only the longer completion has.

    Returns:
        Weights of the chosen and of the rejected tokens, each of shape (pairs, length).
    """
    require_shape("pairs length", chosen_mask=chosen_mask, rejected_mask=rejected_mask)
    shared = torch.minimum(chosen_mask.sum(-1), rejected_mask.sum(-1)).unsqueeze(-1)
    chosen, rejected = (
        torch.where(mask, torch.where(mask.cumsum(-1) <= shared, 1.0, alpha), 0.0)
        for mask in (chosen_mask, rejected_mask)
    )
    return chosen, rejected


def beta_dpo_statistics(margin: Tensor, mean: Tensor, std: Tensor, momentum: float = 0.9) -> tuple[Tensor, Tensor]:
    r"""beta-DPO's moving mean and deviation of the margins, updated before they are used (arXiv 2407.08639).

    m <- momentum m + (1 - momentum) batch value, both from 0; the batch's deviation is the unbiased one.

    Args:
        margin: chosen minus rejected log-ratio in nats of all pairs of the step, two or more, shape (pairs,).
        mean: moving mean so far, a scalar.
        std: moving deviation so far, a scalar.
        momentum: share of the old value that stays.
    """
    require_shape("pairs", margin=margin)
    margin = at_least_float32(margin).detach()
    return torch.lerp(margin.mean(), mean, momentum), torch.lerp(margin.std(), std, momentum)


def beta_dpo_pair_weights(margin: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    r"""beta-DPO's weights for drawing the pairs to keep, e^{-((M - m) / s)^2 / 2}: pairs far from the mean go first.

    Args:
        margin: M, chosen minus rejected log-ratio in nats, shape (pairs,).
        mean: m, moving mean, a scalar.
        std: s, moving deviation, a scalar above 0.
    """
    require_shape("pairs", margin=margin)
    return torch.exp(-0.5 * ((at_least_float32(margin).detach() - mean) / std) ** 2)


def beta_dpo_beta(
    kept_margin: Tensor, mean: Tensor, beta: float = 0.1, alpha: float = 0.6, floor: float = 1e-3
) -> Tensor:
    r"""beta-DPO's beta of one step, max(beta (1 + alpha (mean kept margin - m)), floor), without gradient.

    Args:
        kept_margin: margins of the pairs that were kept, shape (pairs,).
        mean: m, moving mean of the margins, a scalar.
        beta: the beta at an average step.
        alpha: how strongly beta follows the margins.
        floor: least beta.

    Returns:
        A scalar, for the ``beta`` of `dpo_loss`.
    """
    require_shape("pairs", kept_margin=kept_margin)
    return (beta * (1 + alpha * (at_least_float32(kept_margin).detach().mean() - mean))).clamp(min=floor)


def mixed_reference(reference: Tensor, policy: Tensor, alpha: float = 0.6) -> Tensor:
    r"""TR-DPO's soft update of one reference parameter, alpha policy + (1 - alpha) reference (arXiv 2404.09656).

    Args:
        reference: a parameter of the reference, any shape.
        policy: the policy's, same shape.
        alpha: share of the policy; 1 is the hard update.
    """
    require_shape("...", reference=reference, policy=policy)
    return torch.lerp(reference, policy.detach(), alpha)
