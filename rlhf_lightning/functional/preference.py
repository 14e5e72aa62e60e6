"""Formulas on preference pairs that several objectives share; those of one objective stand in its class."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from rlhf_lightning.functional.logprobs import MAX_LOG_RATIO, at_least_float32, masked_mean, require_shape


def dpo_loss(margin: Tensor, beta: float | Tensor, target: Tensor | None = None) -> Tensor:
    r"""DPO: -p log sigmoid(beta margin) - (1 - p) log sigmoid(-beta margin) in nats, shape (pairs,).

    p = 1 is Eq. 7 of Rafailov et al. (arXiv 2305.18290); p = 1 - flip rate is their conservative DPO.

    Args:
        margin: chosen minus rejected log-ratio, log policy - log reference, in nats, shape (pairs,).
        beta: rewards per nat of log-ratio; a scalar tensor where it adapts.
        target: p, probability that chosen is the better one, shape (pairs,); None means 1.
    """
    require_shape("pairs", margin=margin, target=target)
    x = beta * at_least_float32(margin)
    return -F.logsigmoid(x) if target is None else -target * F.logsigmoid(x) - (1 - target) * F.logsigmoid(-x)


def wpo_weights(logprobs: Tensor, log_collisions: Tensor, completion_mask: Tensor) -> Tensor:
    r"""WPO: how much a completion looks like the policy's own, e^{mean_t(log p_t - log \sum_v p_v^2)}, no gradient.

    1 where tokens are as likely as the policy's samples are on average (Zhou et al., arXiv 2406.11827). Shape (rows,).

    Args:
        logprobs: the policy's, shape (rows, length).
        log_collisions: log-probability that two draws from the next-token distribution agree, shape (rows, length).
        completion_mask: bool, shape (rows, length).
    """
    require_shape("rows length", logprobs=logprobs, log_collisions=log_collisions, completion_mask=completion_mask)
    closeness = masked_mean(logprobs.detach() - log_collisions.detach(), completion_mask, dim=-1)
    return closeness.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
