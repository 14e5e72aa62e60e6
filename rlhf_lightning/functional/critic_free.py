"""Policy gradients without a critic: one loss with five switches.

Where PPO learns a baseline, these methods take it from the scores of other samples. A method is a choice of advantage,
of probability ratio, of objective, of aggregation over tokens, and of the place of the KL term; each choice is a
function here or in `policy_gradient`. A sample that could not be scored has score NaN: it counts in no baseline and its
advantage is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_lightning.functional.logprobs import (
    MAX_LOG_RATIO,
    at_least_float32,
    kl_k1,
    masked_mean,
    masked_sum,
    masked_whiten,
    require_shape,
)
from rlhf_lightning.functional.policy_gradient import discounted_returns, token_ratio

# --- advantages ------------------------------------------------------------------------------------------------------


def dr_grpo_advantages(scores: Tensor, group: Tensor) -> Tensor:
    """Dr. GRPO: score minus the mean score of its group, and nothing else (Liu et al., arXiv 2503.20783).

    Args:
        scores: shape (episodes,); NaN where a sample could not be scored.
        group: index of the prompt each episode answers, int64 from 0, shape (episodes,).

    Returns:
        Advantages, shape (episodes,); exactly 0 in a group of equal scores, and they sum to 0 in every group.
    """
    return _centered(scores, group)[0]


def grpo_advantages(scores: Tensor, group: Tensor, epsilon: float = 1e-4, unbiased: bool = True) -> Tensor:
    r"""GRPO: (score - mean of its group) / (deviation of its group + epsilon) (Shao et al., arXiv 2402.03300).

    Args:
        scores: shape (episodes,); NaN where a sample could not be scored.
        group: index of the prompt each episode answers, int64 from 0, shape (episodes,).
        epsilon: keeps groups of nearly equal scores from exploding.
        unbiased: divide squares by G - 1 instead of G.

    Returns:
        Advantages, shape (episodes,); exactly 0 in a group of equal scores.
    """
    centered, count = _centered(scores, group)
    squares = torch.zeros_like(centered).index_add(0, group, centered**2)[group]
    return centered / ((squares / (count - int(unbiased)).clamp(min=1)).sqrt() + epsilon)


def lite_ppo_advantages(
    scores: Tensor, group: Tensor, epsilon: float = 1e-4, unbiased: bool = True, std: Tensor | None = None
) -> Tensor:
    r"""Lite PPO: (score - mean of its group) / (deviation of the whole batch + epsilon) (arXiv 2508.08221).

    Args:
        scores: of the whole rollout, shape (episodes,); NaN where a sample could not be scored.
        group: index of the prompt each episode answers, int64 from 0, shape (episodes,).
        epsilon: keeps a batch of nearly equal scores from exploding.
        unbiased: divide squares by n - 1 instead of n.
        std: deviation of the scores of all ranks, a scalar; None for these scores'.
    """
    if std is not None:
        return _centered(scores, group)[0] / (std + epsilon)
    scorable = ~scores.isnan()
    spread = scores - masked_mean(scores, scorable)
    variance = masked_sum(spread**2, scorable) / (scorable.sum() - int(unbiased)).clamp(min=1)
    return _centered(scores, group)[0] / (variance.sqrt() + epsilon)


def rloo_advantages(scores: Tensor, group: Tensor) -> Tensor:
    r"""RLOO: score minus the mean score of the group's other samples (Ahmadian et al., arXiv 2402.14740).

    Equals G / (G - 1) * (score - mean of the group). A sample without siblings gets 0.

    Args:
        scores: normally `sequence_rewards`, shape (episodes,); NaN where a sample could not be scored.
        group: index of the prompt each episode answers, int64 from 0, shape (episodes,).
    """
    centered, count = _centered(scores, group)
    return centered * count / (count - 1).clamp(min=1)


def remax_advantages(scores: Tensor, greedy_scores: Tensor) -> Tensor:
    """ReMax: score minus the score of the greedy completion of the same prompt (Li et al., arXiv 2310.10505).

    Args:
        scores: shape (episodes,).
        greedy_scores: score of the greedy completion of each episode's prompt, shape (episodes,).
    """
    require_shape("episodes", scores=scores, greedy_scores=greedy_scores)
    return torch.nan_to_num(at_least_float32(scores) - at_least_float32(greedy_scores), nan=0.0)


def reinforce_plus_plus_advantages(
    rewards: Tensor, completion_mask: Tensor, gamma: float = 1.0, mean: Tensor | None = None, var: Tensor | None = None
) -> Tensor:
    """REINFORCE++: reward to go, whitened over all tokens of the rollout (Hu et al., arXiv 2501.03262).

    Args:
        rewards: `token_rewards`, shape (episodes, length).
        completion_mask: bool, shape (episodes, length).
        gamma: discount per token.
        mean: of the rewards to go over all ranks; None for this rank's.
        var: biased, over all ranks; None for this rank's.
    """
    return masked_whiten(discounted_returns(rewards, completion_mask, gamma), completion_mask, mean=mean, var=var)


def reinforce_plus_plus_baseline_advantages(
    scores: Tensor, group: Tensor, completion_mask: Tensor, mean: Tensor | None = None, var: Tensor | None = None
) -> Tensor:
    """REINFORCE++-baseline: score minus the mean of its group, whitened over all tokens (Hu et al., arXiv 2501.03262).

    Args:
        scores: shape (episodes,); NaN where a sample could not be scored.
        group: index of the prompt each episode answers, int64 from 0, shape (episodes,).
        completion_mask: bool, shape (episodes, length).
        mean: of the centred scores over the tokens of all ranks; None for this rank's.
        var: biased, alike; None for this rank's.

    Returns:
        Advantages, shape (episodes, length).
    """
    scorable = completion_mask & ~scores.isnan().unsqueeze(-1)
    return masked_whiten(over_tokens(dr_grpo_advantages(scores, group), completion_mask), scorable, mean=mean, var=var)


def over_tokens(advantages: Tensor, completion_mask: Tensor) -> Tensor:
    """Give every completion token the advantage of its episode: (episodes,) to (episodes, length), 0 under the mask.

    Args:
        advantages: shape (episodes,).
        completion_mask: bool, shape (episodes, length).
    """
    require_shape("episodes", advantages=advantages, rows_of_mask=completion_mask.any(-1))
    return torch.where(completion_mask, advantages.unsqueeze(-1), 0.0)


def sequence_rewards(scores: Tensor, kl: Tensor, completion_mask: Tensor, kl_coef: float | Tensor) -> Tensor:
    r"""Score minus kl_coef times the completion's summed KL: the reward of a whole completion.

    Args:
        scores: shape (episodes,).
        kl: KL estimate of each token, normally `kl_k1`, shape (episodes, length).
        completion_mask: bool, shape (episodes, length).
        kl_coef: rewards per nat.
    """
    penalty = kl_coef * masked_sum(kl, completion_mask)
    require_shape("episodes", scores=scores, kl_per_episode=penalty)
    return at_least_float32(scores) - penalty


def overlong_penalty(lengths: Tensor, max_length: int, buffer: int) -> Tensor:
    r"""DAPO's soft overlong punishment, added to the score (Yu et al., arXiv 2503.14476, Eq. 13).

    0 up to max_length - buffer, then falling linearly to -1 at max_length, -1 beyond.

    Args:
        lengths: tokens of each completion, shape (episodes,).
        max_length: longest completion that is not punished in full.
        buffer: tokens over which the punishment grows.
    """
    return ((max_length - buffer - lengths) / buffer).clamp(-1, 0)


def informative_groups(scores: Tensor, group: Tensor) -> Tensor:
    """True for the groups whose scores differ: DAPO's dynamic sampling keeps those, the others teach nothing.

    Args:
        scores: shape (episodes,); NaN where a sample could not be scored.
        group: index of the prompt each episode answers, int64 from 0, shape (episodes,).

    Returns:
        Bool, shape (groups,).
    """
    differs = (_centered(scores, group)[0] != 0).long()
    return torch.zeros_like(torch.bincount(group)).index_add(0, group, differs) > 0


def _centered(scores: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Score minus its group's mean (0 where NaN), and how many samples of its group have a score."""
    require_shape("episodes", scores=scores, group=group)
    scores = at_least_float32(scores)
    scorable = ~scores.isnan()
    groups = torch.bincount(group).type_as(scores)
    # Measured from the group's lowest score, equal scores are exact zeros, and so is their distance from their mean.
    present = torch.where(scorable, scores, torch.inf)
    lowest = torch.full_like(groups, torch.inf).scatter_reduce(0, group, present, "amin")
    above = torch.where(scorable, scores - lowest[group], 0.0)
    count = torch.zeros_like(groups).index_add(0, group, scorable.type_as(scores))
    mean = torch.zeros_like(groups).index_add(0, group, above) / count.clamp(min=1)
    return torch.where(scorable, above - mean[group], 0.0), count[group]


# --- ratios of sequences ---------------------------------------------------------------------------------------------


def sequence_ratio(logprobs: Tensor, old_logprobs: Tensor, completion_mask: Tensor) -> Tensor:
    r"""Probability ratio of each whole completion, e^{\sum_t log-ratio}, held within e^{+-20}.

    Args:
        logprobs: the policy's, shape (rows, length).
        old_logprobs: the policy's when it sampled, shape (rows, length).
        completion_mask: bool, shape (rows, length).

    Returns:
        Shape (rows,).
    """
    log_ratio = masked_sum(kl_k1(logprobs, old_logprobs), completion_mask)
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def geometric_sequence_ratio(logprobs: Tensor, old_logprobs: Tensor, completion_mask: Tensor) -> Tensor:
    r"""GSPO's ratio of each completion, the geometric mean of its token ratios (Zheng et al., arXiv 2507.18071).

    Args:
        logprobs: the policy's, shape (rows, length).
        old_logprobs: the policy's when it sampled, shape (rows, length).
        completion_mask: bool, shape (rows, length).

    Returns:
        Shape (rows,).
    """
    log_ratio = masked_mean(kl_k1(logprobs, old_logprobs), completion_mask, dim=-1)
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def gspo_token_ratio(logprobs: Tensor, old_logprobs: Tensor, completion_mask: Tensor) -> Tensor:
    r"""GSPO's ratio spread over tokens, e^{sg(mean log-ratio) + lp - sg(lp)}: its value, each token's own gradient.

    GSPO-token of Zheng et al. (arXiv 2507.18071); with one advantage per completion and `sequence_mean_token_mean` it
    has the gradient of `geometric_sequence_ratio`.

    Args:
        logprobs: the policy's, with gradient, shape (rows, length).
        old_logprobs: the policy's when it sampled, shape (rows, length).
        completion_mask: bool, shape (rows, length).

    Returns:
        Shape (rows, length); 1 under the mask.
    """
    ratio = geometric_sequence_ratio(logprobs, old_logprobs, completion_mask).detach().unsqueeze(-1)
    own_gradient = token_ratio(logprobs, logprobs.detach())  # 1, but not for the gradient
    return torch.where(completion_mask, ratio * own_gradient, 1.0)


# --- objectives without a clip ---------------------------------------------------------------------------------------


def reinforce_loss(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """Williams's policy gradient as a loss per token, -A * logprob; for samples of this very policy.

    Args:
        logprobs: the policy's, with gradient, shape (rows, length).
        advantages: A, shape (rows, length), 0 under the mask.
    """
    require_shape("rows length", logprobs=logprobs, advantages=advantages)
    return -advantages * at_least_float32(logprobs)


def cispo_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, cap: float = 5.0) -> Tensor:
    r"""CISPO: REINFORCE weighted by a capped ratio, -sg(min(ratio, cap)) A logprob (MiniMax, arXiv 2506.13585).

    Unlike a clip, the cap leaves every token its gradient. At ratio 1 the gradient is that of `clipped_policy_loss`.

    Args:
        logprobs: the policy's, with gradient, shape (rows, length).
        old_logprobs: the policy's when it sampled, shape (rows, length).
        advantages: A, shape (rows, length), 0 under the mask.
        cap: largest weight; 5 in ScaleRL (arXiv 2510.13786).
    """
    weight = token_ratio(logprobs, old_logprobs).detach().clamp(max=cap)
    return weight * reinforce_loss(logprobs, advantages)


# --- aggregations ----------------------------------------------------------------------------------------------------


def token_mean(losses: Tensor, completion_mask: Tensor, tokens: Tensor | int | None = None) -> Tensor:
    r"""Every token weighs the same: \sum m l / \sum m (DAPO, PPO).

    Args:
        losses: shape (rows, length).
        completion_mask: m, bool, shape (rows, length).
        tokens: of the whole optimizer step; None for these rows'.
    """
    return masked_sum(losses, completion_mask, dim=None) / _count(completion_mask if tokens is None else tokens)


def sequence_mean_token_mean(losses: Tensor, completion_mask: Tensor, rows: Tensor | int | None = None) -> Tensor:
    r"""Every completion weighs the same: the mean over rows of each row's mean over tokens (GRPO, GSPO).

    Args:
        losses: shape (rows, length).
        completion_mask: bool, shape (rows, length).
        rows: with a token, of the whole optimizer step; None for these. Fully masked rows do not count.
    """
    total = masked_mean(losses, completion_mask, dim=-1).sum()
    return total / _count(completion_mask.any(-1) if rows is None else rows)


def sequence_mean_token_sum(losses: Tensor, completion_mask: Tensor, rows: Tensor | int | None = None) -> Tensor:
    r"""The mean over rows of each row's sum over tokens: the policy gradient of whole completions (RLOO, ReMax).

    Args:
        losses: shape (rows, length).
        completion_mask: bool, shape (rows, length).
        rows: with a token, of the whole optimizer step; None for these. Fully masked rows do not count.
    """
    total = masked_sum(losses, completion_mask, dim=None)
    return total / _count(completion_mask.any(-1) if rows is None else rows)


def constant_length_mean(
    losses: Tensor, completion_mask: Tensor, max_length: int, rows: Tensor | int | None = None
) -> Tensor:
    r"""Sum over tokens divided by a constant, \sum m l / (rows * max_length), so that length has no say (Dr. GRPO).

    Args:
        losses: shape (rows, length).
        completion_mask: m, bool, shape (rows, length).
        max_length: the constant per row.
        rows: of the whole optimizer step, masked or not; None for these.
    """
    rows = len(completion_mask) if rows is None else rows
    return masked_sum(losses, completion_mask, dim=None) / (max_length * _count(rows))


def _count(counted: Tensor | int) -> Tensor:
    return torch.as_tensor(counted).sum().clamp(min=1)
