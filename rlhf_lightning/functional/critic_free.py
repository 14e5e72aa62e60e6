"""Advantages without a critic: where PPO learns a baseline, these methods take it from the scores of other samples.

An advantage is a score minus a baseline, divided by a deviation or by nothing. A sample that could not be scored has
score NaN: it counts in no baseline and its advantage is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_lightning.functional.logprobs import at_least_float32, require_shape


def group_mean_advantages(scores: Tensor, group: Tensor) -> Tensor:
    """Score minus the mean score of its group (GRPO, arXiv 2402.03300; alone in Dr. GRPO, arXiv 2503.20783).

    Args:
        scores: shape (episodes,); NaN where a sample could not be scored.
        group: index of the prompt each episode answers, int64 from 0, shape (episodes,).

    Returns:
        Advantages, shape (episodes,); exactly 0 in a group of equal scores, and they sum to 0 in every group.
    """
    return _centered(scores, group)[0]


def leave_one_out_advantages(scores: Tensor, group: Tensor) -> Tensor:
    r"""Score minus the mean score of the group's other samples (RLOO, Ahmadian et al., arXiv 2402.14740).

    Equals G / (G - 1) * (score - mean of the group). A sample without siblings gets 0.

    Args:
        scores: shape (episodes,); NaN where a sample could not be scored.
        group: index of the prompt each episode answers, int64 from 0, shape (episodes,).
    """
    centered, count = _centered(scores, group)
    return centered * count / (count - 1).clamp(min=1)


def greedy_advantages(scores: Tensor, greedy_scores: Tensor) -> Tensor:
    """Score minus the score of the greedy completion of the same prompt (ReMax, Li et al., arXiv 2310.10505).

    Args:
        scores: shape (episodes,).
        greedy_scores: score of the greedy completion of each episode's prompt, shape (episodes,).
    """
    require_shape("episodes", scores=scores, greedy_scores=greedy_scores)
    return torch.nan_to_num(at_least_float32(scores) - at_least_float32(greedy_scores), nan=0.0)


def group_deviation(scores: Tensor, group: Tensor, unbiased: bool = True) -> Tensor:
    """Standard deviation of the scores of each episode's group, shape (episodes,) (GRPO, arXiv 2402.03300).

    Args:
        scores: shape (episodes,); NaN where a sample could not be scored.
        group: index of the prompt each episode answers, int64 from 0, shape (episodes,).
        unbiased: divide squares by G - 1 instead of G.
    """
    centered, count = _centered(scores, group)
    squares = torch.zeros_like(centered).index_add(0, group, centered**2)[group]
    return (squares / (count - int(unbiased)).clamp(min=1)).sqrt()


def over_tokens(advantages: Tensor, completion_mask: Tensor) -> Tensor:
    """Give every completion token the advantage of its episode: (episodes,) to (episodes, length), 0 under the mask.

    Args:
        advantages: shape (episodes,).
        completion_mask: bool, shape (episodes, length).
    """
    require_shape("episodes", advantages=advantages, rows_of_mask=completion_mask.any(-1))
    return torch.where(completion_mask, advantages.unsqueeze(-1), 0.0)


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
