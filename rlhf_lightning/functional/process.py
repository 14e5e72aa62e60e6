"""Losses and statistics of step-by-step judgements: process reward models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_lightning.errors import SettingError
from rlhf_lightning.functional.logprobs import at_least_float32, require_shape


def step_loss(scores: Tensor, labels: Tensor) -> Tensor:
    r"""Cross-entropy of each step's label, -y log sigmoid(s) - (1 - y) log sigmoid(-s) (arXiv 2305.20050, Section 2.6).

    The score that minimises it is the label's log-odds, log(y / (1 - y)). A score of 0 costs log 2 whatever the label.

    Args:
        scores: s, log-odds that the step is right, shape (steps,).
        labels: y, probability that it is right, shape (steps,).

    Returns:
        One loss per step in nats, shape (steps,).
    """
    require_shape("steps", scores=scores, labels=labels)
    scores = at_least_float32(scores)
    return -labels * F.logsigmoid(scores) - (1 - labels) * F.logsigmoid(-scores)


def first_errors(right: Tensor, row: Tensor, position: Tensor, rows: int) -> Tensor:
    """Position of each completion's first wrong step, -1 where every step is right.

    Args:
        right: bool, shape (steps,).
        row: index of the completion each step belongs to, int64, shape (steps,).
        position: number of each step within its completion, int64, shape (steps,).
        rows: completions.

    Returns:
        int64, shape (rows,).
    """
    require_shape("steps", right=right, row=row, position=position)
    none = torch.iinfo(torch.int64).max
    first = torch.full((rows,), none, dtype=torch.int64, device=right.device)
    first = first.scatter_reduce(0, row, torch.where(right, none, position), "amin")
    return torch.where(first == none, -1, first)


def aggregated_steps(log_probs: Tensor, row: Tensor, rows: int, how: str) -> Tensor:
    """One number per completion from its steps' log-probabilities of being right: their least, their sum, or the last.

    Args:
        log_probs: log-probability that each step is right, steps of a completion in order, shape (steps,).
        row: index of the completion each step belongs to, int64 in rising order, shape (steps,).
        rows: completions; each must have a step.
        how: "min", "product" or "last".

    Returns:
        Log of the aggregate, shape (rows,).

    Raises:
        SettingError: there is no such aggregate.
    """
    require_shape("steps", log_probs=log_probs, row=row)
    if how == "min":
        return log_probs.new_zeros(rows).scatter_reduce(0, row, log_probs, "amin")  # no log-probability is above 0
    if how == "product":
        return log_probs.new_zeros(rows).index_add(0, row, log_probs)
    if how != "last":
        raise SettingError("unknown-choice", f"aggregate is {how!r}; choose 'min', 'product' or 'last'")
    return log_probs[torch.bincount(row, minlength=rows).cumsum(0) - 1]
