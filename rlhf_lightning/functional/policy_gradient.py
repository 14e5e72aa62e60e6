"""Policy gradients: token rewards, advantages with and without a critic, and the critic's loss.

Token tensors have shape (rows, length), right-padded; rows of a whole rollout are called episodes. Notation: rewards r;
the critic's current values V, and ``old_values`` from when the rollout was collected; returns R; the KL estimate ``kl``
(normally k1, nats); the bool ``completion_mask``.

``scores`` and ``finished`` (whether the completion ended with an end token) have shape (episodes,). So has ``group``,
the index of each episode's prompt, int64 from 0. A score is NaN if a sample could not be scored: it enters no baseline,
and its advantage is 0. ``gamma`` is the discount per token, ``kl_coef`` the KL penalty coefficient in reward units per
nat. Losses are returned per token; the caller reduces them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_lightning.errors import SettingError
from rlhf_lightning.functional.logprobs import at_least_float32, kl_k1, require_shape


def token_rewards(scores: Tensor, kl: Tensor, completion_mask: Tensor, kl_coef: float | Tensor) -> Tensor:
    """Return each token's reward, -kl_coef * kl, plus the score at the last completion token; 0 under the mask.

    The KL-shaped reward of Ziegler et al. (arXiv 1909.08593, Eq. 2), per token.
    """
    require_shape("episodes", scores=scores, rows_of_mask=completion_mask.any(-1))
    require_shape("episodes length", kl=kl, completion_mask=completion_mask)
    count = completion_mask.cumsum(-1)
    last = completion_mask & (count == count[:, -1:])
    rewards = torch.where(completion_mask, -kl_coef * at_least_float32(kl), 0.0)
    return rewards + torch.where(last, at_least_float32(scores).unsqueeze(-1), 0.0)


def rewards_after_end(
    scores: Tensor, kl: Tensor, completion_mask: Tensor, kl_coef: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Return `token_rewards` in the layout of Huang et al. (arXiv 2403.17031): the score follows the end token.

    The score has an extra slot, the state after the end token. This state has a value, so it enters advantages
    and the value loss. No action is taken there, so it does not enter the policy loss.

    Returns:
        Rewards, and the mask of states with a value; both of shape (episodes, length + 1).
    """
    require_shape("episodes", scores=scores, rows_of_mask=completion_mask.any(-1))
    require_shape("episodes length", kl=kl, completion_mask=completion_mask)
    slots = torch.arange(completion_mask.shape[-1] + 1, device=kl.device)
    end = torch.where(F.pad(completion_mask, (1, 0)), slots, 0).amax(-1, keepdim=True)
    rewards = torch.where(completion_mask, -kl_coef * at_least_float32(kl), 0.0)
    rewards = F.pad(rewards, (0, 1))
    score_reward = torch.where(slots == end, at_least_float32(scores).unsqueeze(-1), 0.0)
    return rewards + score_reward, F.pad(completion_mask, (0, 1)) | (slots == end)


def generalized_advantages(
    rewards: Tensor, values: Tensor, completion_mask: Tensor, gamma: float | Tensor = 1.0, lam: float | Tensor = 0.95
) -> tuple[Tensor, Tensor]:
    r"""Return generalized advantage estimates and returns (Schulman et al., arXiv 1506.02438, Eq. 16).

    delta_t = r_t + gamma V_{t+1} - V_t; A_t = delta_t + gamma lam A_{t+1}; R_t = A_t + V_t, with V = A = 0 after the
    end. Masked tokens inside a completion (a tool's output) are skipped: V_{t+1} and A_{t+1} are those of the next
    unmasked token.

    Args:
        gamma: discount after each token: a scalar, or shape (episodes, length), see `turn_discounts`.
        lam: GAE lambda: 0 gives A = delta, 1 gives Monte-Carlo returns; a scalar, or shape (episodes,).

    Returns:
        Advantages, not whitened, and returns; both of shape (episodes, length), 0 under the mask.
    """
    require_shape("episodes length", rewards=rewards, values=values, completion_mask=completion_mask)
    rewards, values = at_least_float32(rewards), at_least_float32(values)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = values.new_zeros(len(values))
    for t in reversed(range(values.shape[-1])):
        mask, discount = completion_mask[:, t], gamma[:, t] if isinstance(gamma, Tensor) else gamma
        delta = rewards[:, t] + discount * next_value - values[:, t]
        next_advantage = torch.where(mask, delta + discount * lam * next_advantage, next_advantage)
        next_value = torch.where(mask, values[:, t], next_value)
        advantages[:, t] = torch.where(mask, next_advantage, 0.0)
    return advantages, torch.where(completion_mask, advantages + values, 0.0)


def turn_discounts(completion_mask: Tensor, turn_gamma: float, gamma: float = 1.0) -> Tensor:
    """Return the discount after each token: ``gamma``, multiplied by ``turn_gamma`` after the last token of a turn.

    A turn is a contiguous run of the policy's tokens; the replies between turns are masked.
    """
    ends = completion_mask & ~F.pad(completion_mask[:, 1:], (0, 1))
    return torch.where(ends, gamma * turn_gamma, gamma)


def last_turn_lengths(completion_mask: Tensor) -> Tensor:
    """Return the number of tokens of each episode's last turn, int64, shape (episodes,); without a gap all tokens."""
    starts = completion_mask & ~F.pad(completion_mask[:, :-1], (1, 0))
    turn = starts.cumsum(-1)
    return (completion_mask & (turn == turn.amax(-1, keepdim=True))).sum(-1)


def turn_returns(rewards: Tensor, completion_mask: Tensor, gamma: float = 1.0) -> tuple[Tensor, Tensor]:
    r"""Return the return of each turn, G_k = sum over j >= k of gamma^(j - k) r_j, r_j the sum of rewards in turn j.

    Turn-level credit assignment (Zeng et al., arXiv 2505.11821), discounted between turns and not within a turn.

    Returns:
        Returns of shape (episodes, turns), NaN for missing turns; and the turn index of each token, int64, shape
        (episodes, length), valid only under the mask.
    """
    require_shape("episodes length", rewards=rewards, completion_mask=completion_mask)
    starts = completion_mask & ~F.pad(completion_mask[:, :-1], (1, 0))
    turn = (starts.cumsum(-1) - 1).clamp_min(0)
    # The discounted sum of rewards from a turn's first token on is the turn's return.
    to_go = discounted_returns(rewards, completion_mask, turn_discounts(completion_mask, gamma))
    places = torch.arange(int(starts.sum(-1).max()) if starts.numel() else 0, device=rewards.device)
    of_turn = starts.unsqueeze(-1) & (turn.unsqueeze(-1) == places)
    returns = torch.where(of_turn, to_go.unsqueeze(-1), 0.0).sum(1)
    return torch.where(of_turn.any(1), returns, torch.nan), turn


def discounted_returns(rewards: Tensor, completion_mask: Tensor, gamma: float | Tensor = 1.0) -> Tensor:
    r"""Return the Monte-Carlo return, R_t = r_t + gamma R_{t+1}, skipping masked tokens; 0 under the mask."""
    return generalized_advantages(rewards, torch.zeros_like(rewards), completion_mask, gamma, lam=1.0)[1]


def missing_eos_scores(
    scores: Tensor, finished: Tensor, penalty: float | None = None, replacement: float | None = None
) -> Tensor:
    """Penalise the scores of unfinished completions.

    Args:
        penalty: amount to subtract from an unfinished completion's score.
        replacement: score of an unfinished completion; -1 in Huang et al. (arXiv 2403.17031).

    Raises:
        SettingError: both penalty and replacement are given.
    """
    require_shape("episodes", scores=scores, finished=finished)
    if penalty is not None and replacement is not None:
        raise SettingError(
            "conflicting-settings", f"penalty is {penalty} and replacement {replacement}: give one of them"
        )
    if replacement is not None:
        return torch.where(finished, scores, replacement)
    return scores if penalty is None else torch.where(finished, scores, scores - penalty)


def adapted_kl_coef(
    kl_coef: float | Tensor, kl: float | Tensor, target: float, horizon: float, episodes: int
) -> Tensor:
    r"""Return the KL coefficient after a rollout, adapted towards a target KL (Ziegler et al., arXiv 1909.08593).

    kl_coef * (1 + e * episodes / horizon), e = clip(kl / target - 1, -0.2, 0.2). kl is the sequence KL in nats, summed
    over tokens and averaged over the rollout's ``episodes`` completions. Over ``horizon`` episodes the coefficient
    changes by at most about 20 %.
    """
    error = (torch.as_tensor(kl) / target - 1).clamp(-0.2, 0.2)
    return kl_coef * (1 + error * episodes / horizon)


def approx_kl(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Estimate how far updates moved the policy in a rollout, 1/2 (logprobs - old_logprobs)^2 per token in nats."""
    return kl_k1(logprobs, old_logprobs).square() / 2


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None = 0.2) -> Tensor:
    r"""Return the critic's clipped squared error, 1/2 max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2).

    Args:
        clip: maximum change of a value within a rollout; None for the plain squared error.
    """
    require_shape("rows length", values=values, old_values=old_values, returns=returns)
    unclipped = (values - returns) ** 2
    if clip is None:
        return unclipped / 2
    clipped = (values.clamp(old_values - clip, old_values + clip) - returns) ** 2
    return torch.maximum(unclipped, clipped) / 2


def value_clip_fraction(values: Tensor, old_values: Tensor, returns: Tensor, clip: float = 0.2) -> Tensor:
    """Return 1 for each token whose gradient `clipped_value_loss`, with the same arguments, sets to 0; else 0."""
    require_shape("rows length", values=values, old_values=old_values, returns=returns)
    clipped = values.clamp(old_values - clip, old_values + clip)
    return ((clipped - returns) ** 2 > (values - returns) ** 2).type_as(values)


# --- advantages without a critic: baselines from other samples' scores -----------------------------------------------


def group_mean_advantages(scores: Tensor, group: Tensor) -> Tensor:
    """Subtract the group's mean score (GRPO, arXiv 2402.03300); exactly 0 in a group of equal scores."""
    return _centered(scores, group)[0]


def leave_one_out_advantages(scores: Tensor, group: Tensor) -> Tensor:
    r"""Subtract the mean score of the group's other samples (RLOO, Ahmadian et al., arXiv 2402.14740).

    Equals G / (G - 1) * (score - mean of the group). A sample that is alone in its group gets 0.
    """
    centered, count = _centered(scores, group)
    return centered * count / (count - 1).clamp(min=1)


def greedy_advantages(scores: Tensor, greedy_scores: Tensor) -> Tensor:
    """Subtract the score of the greedy completion of the same prompt (ReMax, Li et al., arXiv 2310.10505)."""
    require_shape("episodes", scores=scores, greedy_scores=greedy_scores)
    return torch.nan_to_num(at_least_float32(scores) - at_least_float32(greedy_scores), nan=0.0)


def group_deviation(scores: Tensor, group: Tensor, unbiased: bool = True) -> Tensor:
    """Return the standard deviation of scores in each episode's group, shape (episodes,) (GRPO, arXiv 2402.03300).

    ``unbiased`` divides the sum of squares by G - 1 instead of G.
    """
    centered, count = _centered(scores, group)
    squares = torch.zeros_like(centered).index_add(0, group, centered**2)[group]
    return (squares / (count - int(unbiased)).clamp(min=1)).sqrt()


def over_tokens(advantages: Tensor, completion_mask: Tensor) -> Tensor:
    """Broadcast each episode's advantage to its completion tokens, shape (episodes, length), 0 under the mask."""
    require_shape("episodes", advantages=advantages, rows_of_mask=completion_mask.any(-1))
    return torch.where(completion_mask, advantages.unsqueeze(-1), 0.0)


def overlong_penalty(lengths: Tensor, max_length: int, buffer: int) -> Tensor:
    r"""Return DAPO's soft overlong penalty, to add to the score (Yu et al., arXiv 2503.14476, Eq. 13).

    0 up to max_length - buffer tokens, then falling linearly to -1 at max_length, and -1 beyond; shape (episodes,).
    """
    return ((max_length - buffer - lengths) / buffer).clamp(-1, 0)


def informative_groups(scores: Tensor, group: Tensor) -> Tensor:
    """Return True for groups with different scores, bool, shape (groups,); only these have a gradient (DAPO)."""
    differs = (_centered(scores, group)[0] != 0).long()
    return torch.zeros_like(torch.bincount(group)).index_add(0, group, differs) > 0


# --- judgements with parts --------------------------------------------------------------------------------------------


def standardised_in_groups(values: Tensor, group: Tensor, epsilon: float = 1e-4) -> Tensor:
    r"""Standardise values in groups: (value - mean of its group) / (standard deviation of its group + epsilon).

    The deviation divides by G - 1. GDPO standardises each reward in this way before summing rewards (arXiv 2601.05242).
    NaN values stay NaN and enter no mean.
    """
    scaled = group_mean_advantages(values, group) / (group_deviation(values, group) + epsilon)
    return torch.where(values.isnan(), torch.nan, scaled)


def group_means(values: Tensor, group: Tensor) -> Tensor:
    """Return the mean of each group with at least one value, shape (groups with a value,); NaN values do not count."""
    known = ~values.isnan()
    counts = torch.bincount(group[known])
    sums = torch.zeros_like(counts, dtype=values.dtype).index_add(0, group[known], values[known])
    return (sums / counts)[counts > 0]


def constrained_scores(scores: Tensor, costs: Sequence[Tensor], multipliers: Sequence[float]) -> Tensor:
    r"""Return the score under constraints, (score - \sum_j lambda_j cost_j) / (1 + \sum_j lambda_j).

    The Lagrangian of PPO-Lagrangian, scaled so that a large multiplier does not enlarge the step (Dai et al., arXiv
    2310.12773).
    """
    paid = scores
    for cost, multiplier in zip(costs, multipliers, strict=True):
        require_shape("episodes", scores=scores, cost=cost)
        paid = paid - multiplier * cost
    return paid / (1 + sum(multipliers))


def lagrange_multiplier(multiplier: float, excess: float, learning_rate: float, largest: float = 1000.0) -> float:
    r"""Update a multiplier after a rollout: log lambda += learning_rate * excess, clipped to [1 / largest, largest].

    ``excess`` is the mean cost minus its limit.
    """
    bound = math.log(largest)
    return math.exp(min(max(math.log(multiplier) + learning_rate * excess, -bound), bound))


def pid_multiplier(
    integral: float, excess: float, rise: float, proportional: float, gain: float, derivative: float,
    largest: float = 1000.0,
) -> tuple[float, float]:  # fmt: skip
    r"""Return the multiplier after a rollout, max(0, K_P e + I + K_D max(0, rise)) with I = max(0, I + K_I e), and I.

    PID control of the dual (Stooke et al., arXiv 2007.03964, Algorithm 2), with K_I, the ``gain``, inside the integral.
    e is the mean cost minus its limit, ``rise`` the mean cost minus that of the previous rollout. ``largest`` bounds
    both results, the multiplier and the new integral.
    """
    integral = min(max(integral + gain * excess, 0.0), largest)
    return min(max(proportional * excess + integral + derivative * max(rise, 0.0), 0.0), largest), integral


def _centered(scores: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Return score minus its group's mean (0 if NaN), and the number of scored samples in its group."""
    require_shape("episodes", scores=scores, group=group)
    scores = at_least_float32(scores)
    scorable = ~scores.isnan()
    groups = torch.bincount(group).type_as(scores)
    # Relative to the group's lowest score, equal scores are exactly 0, and so is their distance from their mean.
    present = torch.where(scorable, scores, torch.inf)
    lowest = torch.full_like(groups, torch.inf).scatter_reduce(0, group, present, "amin")
    above = torch.where(scorable, scores - lowest[group], 0.0)
    count = torch.zeros_like(groups).index_add(0, group, scorable.type_as(scores))
    mean = torch.zeros_like(groups).index_add(0, group, above) / count.clamp(min=1)
    return torch.where(scorable, above - mean[group], 0.0), count[group]
