r"""Corrections for a sampling engine whose log-probabilities differ from the trainer's.

Three log-probabilities of one sampled token: behaviour (the engine's), old (the trainer's forward pass at the rollout's
start) and the policy's now. A correction multiplies the loss by a weight, without gradient, of
delta = old - behaviour. The ratio of the policy gradient is of now and old, and does not change.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlhf_lightning.functional.logprobs import kl_k1, masked_mean
from rlhf_lightning.functional.surrogates import geometric_sequence_ratio, sequence_ratio, token_ratio

CorrectionName = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_mask"]


def sampler_weights(
    correction: CorrectionName,
    old_logprobs: Tensor,
    behaviour_logprobs: Tensor,
    completion_mask: Tensor,
    high: float = 2.0,
    low: float = 0.5,
) -> Tensor:
    r"""Return the weight of each token, shape (rows, length).

    - token_truncate: min(e^{delta_t}, high); truncated importance sampling (Ionides 2008).
    - token_mask: e^{delta_t} where low <= e^{delta_t} <= high, else 0; IcePop.
    - sequence_truncate: min(e^{\sum_t delta_t}, high), one weight for a completion.
    - sequence_mask: e^{\sum_t delta_t} up to high, 0 above.
    - geometric_mask: 1 where low <= e^{mean_t delta_t} <= high, else 0; it rejects whole completions.

    Args:
        correction: one of the above.
        old_logprobs: the policy's at the rollout's start, from the trainer's forward pass, shape (rows, length).
        behaviour_logprobs: the same as the sampling engine reported them, shape (rows, length).
        completion_mask: bool, shape (rows, length).
        high: largest weight, or largest ratio that is kept.
        low: smallest ratio that the token and geometric masks keep.
    """
    if correction.startswith("token"):
        ratio = token_ratio(old_logprobs, behaviour_logprobs)
    else:
        of_sequence = geometric_sequence_ratio if correction == "geometric_mask" else sequence_ratio
        ratio = of_sequence(old_logprobs, behaviour_logprobs, completion_mask).unsqueeze(-1).expand(old_logprobs.shape)
    if correction.endswith("truncate"):
        return ratio.clamp(max=high)
    kept = (ratio <= high) if correction == "sequence_mask" else (ratio <= high) & (ratio >= low)
    return torch.where(kept, torch.ones_like(ratio) if correction == "geometric_mask" else ratio, 0.0)


def normalised_weights(weights: Tensor, completion_mask: Tensor, batch_mean: Tensor | None = None) -> Tensor:
    """Divide weights by their mean over the tokens of the batch, so that a correction keeps the step's size (verl).

    Args:
        weights: shape (rows, length).
        completion_mask: bool, shape (rows, length).
        batch_mean: mean over the whole batch and all ranks, a scalar; None for these rows'.
    """
    mean = masked_mean(weights, completion_mask) if batch_mean is None else batch_mean
    return weights / mean.clamp_min(1e-8)


def off_policy_weights(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, completion_mask: Tensor, threshold: float
) -> Tensor:
    """Return 0 where A < 0 and the completion's mean of old - now exceeds ``threshold``, else 1 (DeepSeek-V3.2).

    Bad completions that have become much less likely than they were are no longer learned from.

    Args:
        logprobs: the policy's now, shape (rows, length).
        old_logprobs: the policy's at the rollout's start, shape (rows, length).
        advantages: A, shape (rows, length).
        completion_mask: bool, shape (rows, length).
        threshold: nats per token.
    """
    moved = masked_mean(kl_k1(old_logprobs, logprobs.detach()), completion_mask, dim=-1).unsqueeze(-1)
    return ((advantages >= 0) | (moved <= threshold)).type_as(old_logprobs)
