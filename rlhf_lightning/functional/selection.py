"""Optimising by selection: which of several samples of a prompt to keep.

Scores are (..., samples): several samples of one prompt along the last dimension. NaN marks a sample that is missing or
could not be scored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_lightning.functional.logprobs import at_least_float32, require_shape


def best_of_n(scores: Tensor) -> Tensor:
    """Index of the best-scored sample, the first one among equals; a missing sample is never chosen while one is there.

    Args:
        scores: shape (..., samples).
    """
    return torch.where(scores.isnan(), -torch.inf, scores).argmax(-1)


def soft_best_of_n(scores: Tensor, temperature: float) -> Tensor:
    """Probability of drawing each sample in soft best-of-n, softmax(scores / temperature); missing samples get 0.

    Args:
        scores: shape (..., samples).
        temperature: 0.5 and the like; towards 0 it is best-of-n, towards infinity a fair draw.
    """
    return (torch.where(scores.isnan(), -torch.inf, at_least_float32(scores)) / temperature).softmax(-1)


def weighted_best_of_n(answers: Tensor, weights: Tensor) -> Tensor:
    """Index of a sample whose answer gathers the most weight; equal weights are a majority vote (self-consistency).

    Args:
        answers: id of each sample's final answer, int64, negative where none was found, shape (..., samples).
        weights: non-negative, such as sigmoid or exp of a score; NaN counts as 0. Shape (..., samples).

    Returns:
        Shape (...): the first sample that gives the winning answer.
    """
    require_shape("...", answers=answers, weights=weights)
    weights = torch.nan_to_num(at_least_float32(weights), nan=0.0)
    same = (answers.unsqueeze(-1) == answers.unsqueeze(-2)).type_as(weights)
    votes = (same @ weights.unsqueeze(-1)).squeeze(-1)
    return torch.where(answers < 0, -torch.inf, votes).argmax(-1)
