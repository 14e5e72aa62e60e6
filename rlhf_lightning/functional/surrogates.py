"""Policy-gradient losses: probability ratios, surrogate objectives, sampler corrections and aggregations.

Token tensors have shape (rows, length), right-padded. ``logprobs`` (with gradient) and ``old_logprobs`` are the
policy's log-probabilities, now and at the rollout's start. ``behaviour_logprobs`` are the sampling engine's.
``advantages`` A are 0 under the mask. ``completion_mask`` and ``learned`` (tokens that enter the loss) are bool. Losses
are returned per token and are minimised. At ratio 1 every surrogate here has the gradient of -A log policy.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlhf_lightning.functional.logprobs import (
    MAX_LOG_RATIO,
    at_least_float32,
    kl_k1,
    masked_mean,
    masked_sum,
    require_shape,
)
from rlhf_lightning.types import Aggregation

RatioName = Literal["token", "sequence", "sequence_product", "none"]
CorrectionName = Literal[
    "token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_mask", "bypass"
]
AggregationName = Literal["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "constant"]

# --- ratios ----------------------------------------------------------------------------------------------------------


def token_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Return the ratio of each token, policy / old policy; the log-ratio is clamped to +-20 before `exp`."""
    return kl_k1(logprobs, old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def sequence_ratio(logprobs: Tensor, old_logprobs: Tensor, completion_mask: Tensor) -> Tensor:
    r"""Return the ratio of each whole completion, e^{\sum_t log-ratio}, clamped to e^{+-20}, shape (rows,)."""
    log_ratio = masked_sum(kl_k1(logprobs, old_logprobs), completion_mask)
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def geometric_sequence_ratio(logprobs: Tensor, old_logprobs: Tensor, completion_mask: Tensor) -> Tensor:
    r"""Return GSPO's ratio of each completion, the geometric mean of token ratios, shape (rows,) (arXiv 2507.18071)."""
    log_ratio = masked_mean(kl_k1(logprobs, old_logprobs), completion_mask, dim=-1)
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def over_sequence(ratio: Tensor, logprobs: Tensor, completion_mask: Tensor) -> Tensor:
    r"""Give each token its completion's ratio with the token's own gradient, sg(ratio) e^{lp - sg(lp)}; 1 if masked.

    GSPO-token of Zheng et al. (arXiv 2507.18071, Eq. 14). With one advantage per completion, this has the gradient of
    the ratio itself for a token mean per row of `geometric_sequence_ratio`, and for a token sum per row of
    `sequence_ratio`.

    Args:
        ratio: ratio of each completion, shape (rows,).
    """
    own_gradient = token_ratio(logprobs, logprobs.detach())  # its value is 1
    return torch.where(completion_mask, ratio.detach().unsqueeze(-1) * own_gradient, 1.0)


def policy_ratio(name: RatioName, logprobs: Tensor, old_logprobs: Tensor, completion_mask: Tensor) -> Tensor:
    """Return the named ratio on each token, with gradient, shape (rows, length).

    Args:
        name: "token" (PPO), "sequence" (GSPO's geometric mean), "sequence_product" (of the whole completion, RLOO), or
            "none" (value 1 with the gradient of log policy, for samples of the current policy).
    """
    if name in ("token", "none"):
        return token_ratio(logprobs, old_logprobs if name == "token" else logprobs.detach())
    of_sequence = geometric_sequence_ratio if name == "sequence" else sequence_ratio
    return over_sequence(of_sequence(logprobs, old_logprobs, completion_mask), logprobs, completion_mask)


# --- objectives ------------------------------------------------------------------------------------------------------


def clipped_surrogate_loss(
    ratio: Tensor,
    advantages: Tensor,
    clip: float = 0.2,
    dual_clip: float | None = None,
    clip_high: float | None = None,
    ratio_cap: float | None = None,
) -> Tensor:
    r"""Return PPO's clipped surrogate, max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip_high)), for any kind of ratio.

    Eq. 7 of Schulman et al. (arXiv 1707.06347). At ratio 1 the value is -A and its gradient the policy gradient.

    Args:
        clip: maximum decrease of the ratio, and maximum increase unless ``clip_high`` is set.
        dual_clip: c > 1 bounds the loss by -c A where A < 0 (Ye et al., arXiv 1912.09729).
        clip_high: maximum increase of the ratio (DAPO, arXiv 2503.14476).
        ratio_cap: delta > 1 + clip_high caps the unclipped ratio too (INTELLECT-2, arXiv 2505.07291); None for no cap.
    """
    require_shape("...", ratio=ratio, advantages=advantages)
    clipped = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    unclipped = ratio if ratio_cap is None else ratio.clamp(max=ratio_cap)
    losses = torch.maximum(-advantages * unclipped, -advantages * clipped)
    if dual_clip is None:
        return losses
    return torch.where(advantages < 0, torch.minimum(losses, -dual_clip * advantages), losses)


def clip_fractions(
    ratio: Tensor,
    advantages: Tensor,
    clip: float = 0.2,
    dual_clip: float | None = None,
    clip_high: float | None = None,
    ratio_cap: float | None = None,
) -> dict[str, Tensor]:
    """Mark with 1 the tokens whose gradient `clipped_surrogate_loss`, with the same arguments, sets to 0.

    "clip_fraction_low" marks A < 0 with ratio below 1 - clip, "clip_fraction_high" A > 0 with ratio above
    1 + clip_high. "clip_fraction" also marks A < 0 with ratio above ``dual_clip`` or ``ratio_cap``. The clip fractions
    are means over tokens.
    """
    ratio = ratio.detach()
    low = (ratio < 1 - clip) & (advantages < 0)
    high = (ratio > 1 + (clip if clip_high is None else clip_high)) & (advantages > 0)
    bounds = [bound for bound in (dual_clip, ratio_cap) if bound is not None]
    far = (ratio > min(bounds, default=torch.inf)) & (advantages < 0)
    names = {"clip_fraction": low | high | far, "clip_fraction_low": low, "clip_fraction_high": high}
    return {name: marked.type_as(ratio) for name, marked in names.items()}


def soft_gate_loss(
    ratio: Tensor, advantages: Tensor, temperature: float = 1.0, temperature_negative: float = 1.05
) -> Tensor:
    r"""Return SAPO's loss with a smooth gate instead of a clip, -(4 / tau) sigmoid(tau (ratio - 1)) A.

    arXiv 2511.20347. At ratio 1 the value is -2 A / tau and the gradient is the policy gradient; the gradient fades as
    the ratio moves away from 1. tau is ``temperature`` where A > 0 and ``temperature_negative`` elsewhere; a larger tau
    fades faster.
    """
    require_shape("...", ratio=ratio, advantages=advantages)
    tau = torch.where(advantages > 0, temperature, temperature_negative).type_as(ratio)
    return -4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantages


def reinforce_loss(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """Return Williams's policy gradient as a loss per token, -A * logprob; for samples of the current policy."""
    require_shape("rows length", logprobs=logprobs, advantages=advantages)
    return -advantages * at_least_float32(logprobs)


def cispo_loss(
    ratio: Tensor, logprobs: Tensor, advantages: Tensor, high: float | None = 5.0, low: float | None = None
) -> Tensor:
    r"""Return CISPO's loss, REINFORCE weighted by a bounded ratio: -sg(clip(ratio, low, high)) A logprob.

    MiniMax, arXiv 2506.13585. Unlike a clip, the bounds leave every token its gradient. At ratio 1 the gradient is that
    of the clipped surrogate.

    Args:
        high: maximum weight; 5 in ScaleRL (arXiv 2510.13786); None for no bound.
        low: minimum weight, as in verl and NeMo-RL; None for no bound.
    """
    weight = ratio.detach()
    if high is not None or low is not None:
        weight = weight.clamp(low, high)
    return weight * reinforce_loss(logprobs, advantages)


# --- sampler corrections ---------------------------------------------------------------------------------------------
# A sampled token has three log-probabilities: behaviour (the sampling engine's), old (the trainer's forward pass at the
# rollout's start) and the current policy's. A correction multiplies the loss by a weight without gradient, a function
# of delta = old - behaviour. The ratio of the policy gradient compares current and old, and does not change.


def sampler_weights(
    correction: CorrectionName,
    old_logprobs: Tensor,
    behaviour_logprobs: Tensor,
    completion_mask: Tensor,
    high: float = 2.0,
    low: float | None = None,
) -> Tensor:
    r"""Return the sampler correction's weight of each token, shape (rows, length).

    - token_truncate: e^{delta_t} clipped to [low, high]; truncated importance sampling (Ionides 2008).
    - token_mask: e^{delta_t} if low <= e^{delta_t} <= high, else 0; IcePop.
    - sequence_truncate: e^{\sum_t delta_t} clipped to [low, high], one weight per completion.
    - sequence_mask: e^{\sum_t delta_t} if within [low, high], else 0.
    - geometric_mask: 1 if low <= e^{mean_t delta_t} <= high, else 0; it rejects whole completions.
    - bypass: 1; the trainer uses the behaviour log-probabilities as the old ones.

    Args:
        high: maximum weight, or maximum ratio that is kept.
        low: minimum weight, or minimum ratio that is kept; None takes 0.5 for the token and geometric masks, and no
            bound for the others.
    """
    if correction == "bypass":
        return torch.ones_like(old_logprobs)
    if low is None:
        low = 0.5 if correction in ("token_mask", "geometric_mask") else 0.0
    if correction.startswith("token"):
        ratio = token_ratio(old_logprobs, behaviour_logprobs)
    else:
        of_sequence = geometric_sequence_ratio if correction == "geometric_mask" else sequence_ratio
        ratio = of_sequence(old_logprobs, behaviour_logprobs, completion_mask).unsqueeze(-1).expand(old_logprobs.shape)
    if correction.endswith("truncate"):
        return ratio.clamp(low, high)
    kept = (ratio <= high) & (ratio >= low)
    return torch.where(kept, torch.ones_like(ratio) if correction == "geometric_mask" else ratio, 0.0)


def effective_share(mean: Tensor, variance: Tensor) -> Tensor:
    r"""Return the effective sample size of weights as a share of their number, (\sum w)^2 / (n \sum w^2), in [0, 1].

    The arguments are the mean of the weights and their biased variance.
    """
    square = mean.square()
    return torch.where(square > 0, square / (square + variance).clamp_min(1e-30), 0.0)


def normalised_weights(weights: Tensor, completion_mask: Tensor, batch_mean: Tensor | None = None) -> Tensor:
    """Divide weights by their mean over the batch's tokens, so that a correction keeps the step size (verl).

    Args:
        weights: shape (rows, length).
        batch_mean: mean over the whole batch and all ranks, a scalar; None takes the mean of these rows.
    """
    mean = masked_mean(weights, completion_mask) if batch_mean is None else batch_mean
    return weights / mean.clamp_min(1e-8)


def off_policy_weights(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, completion_mask: Tensor, threshold: float
) -> Tensor:
    """Return 0 if A < 0 and the completion's mean of old - current logprob exceeds ``threshold``, else 1.

    DeepSeek-V3.2. Completions with negative advantage are dropped from the loss once they have become much less likely
    than at the rollout, measured in nats per token.
    """
    moved = masked_mean(kl_k1(old_logprobs, logprobs.detach()), completion_mask, dim=-1).unsqueeze(-1)
    return ((advantages >= 0) | (moved <= threshold)).type_as(old_logprobs)


# --- aggregations ----------------------------------------------------------------------------------------------------
# An aggregation is a weight for each token and a divisor. The loss of an optimizer step is the weighted sum over all
# micro-batches and ranks, divided by the sum of their divisors. So the split of a batch changes neither value nor
# gradient. In the equations m is ``learned`` and l the loss of a token. A row without learned tokens counts only in
# `constant_length`.


def token_mean(learned: Tensor) -> Aggregation:
    r"""Give every token the same weight: \sum m l / \sum m (PPO; DAPO, arXiv 2503.14476)."""
    return Aggregation(learned.float(), learned.sum())


def sequence_mean_token_mean(learned: Tensor) -> Aggregation:
    r"""Give every completion the same weight: the mean over rows of each row's token mean (GRPO, arXiv 2402.03300)."""
    return Aggregation(learned / learned.sum(-1, keepdim=True).clamp_min(1), learned.any(-1).sum())


def sequence_mean_token_sum(learned: Tensor) -> Aggregation:
    r"""Average each row's token sum over rows: the policy gradient of completions (RLOO, arXiv 2402.14740)."""
    return Aggregation(learned.float(), learned.any(-1).sum())


def constant_length(learned: Tensor, max_length: int) -> Aggregation:
    r"""Divide by a constant, \sum m l / (rows * max_length), so that length has no effect (Dr. GRPO, 2503.20783)."""
    return Aggregation(learned / max_length, torch.tensor(float(len(learned))))


def aggregate(name: AggregationName, learned: Tensor, max_length: int) -> Aggregation:
    """Return the named aggregation; ``max_length`` is the constant per row for "constant"."""
    if name == "constant":
        return constant_length(learned, max_length)
    choices = {
        "token_mean": token_mean,
        "sequence_mean_token_mean": sequence_mean_token_mean,
        "sequence_mean_token_sum": sequence_mean_token_sum,
    }
    return choices[name](learned)
