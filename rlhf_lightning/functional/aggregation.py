"""Aggregations: how the losses of tokens become the loss of one optimizer step.

An aggregation is a weight for each token and a divisor. The step's loss is the weighted sum over all micro-batches and
ranks, divided by the sum of their divisors. How a batch is cut therefore changes neither its value nor its gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlhf_lightning.types import Aggregation

AggregationName = Literal["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "constant"]


def token_mean(learned: Tensor) -> Aggregation:
    r"""Every token weighs the same: \sum m l / \sum m (PPO; DAPO, arXiv 2503.14476).

    Args:
        learned: m, bool, True on the tokens that are learned from, shape (rows, length).
    """
    return Aggregation(learned.float(), learned.sum())


def sequence_mean_token_mean(learned: Tensor) -> Aggregation:
    r"""Every completion weighs the same: the mean over rows of each row's token mean (GRPO, arXiv 2402.03300).

    Args:
        learned: bool, shape (rows, length). Fully masked rows do not count.
    """
    return Aggregation(learned / learned.sum(-1, keepdim=True).clamp_min(1), learned.any(-1).sum())


def sequence_mean_token_sum(learned: Tensor) -> Aggregation:
    r"""The mean over rows of each row's token sum: the policy gradient of whole completions (RLOO, arXiv 2402.14740).

    Args:
        learned: bool, shape (rows, length). Fully masked rows do not count.
    """
    return Aggregation(learned.float(), learned.any(-1).sum())


def constant_length(learned: Tensor, max_length: int) -> Aggregation:
    r"""Divide by a constant, \sum m l / (rows * max_length), so that no length counts (Dr. GRPO, arXiv 2503.20783).

    Args:
        learned: m, bool, shape (rows, length). Fully masked rows count too.
        max_length: the constant per row.
    """
    return Aggregation(learned / max_length, torch.tensor(float(len(learned))))


def aggregate(name: AggregationName, learned: Tensor, max_length: int) -> Aggregation:
    """Return the named aggregation.

    Args:
        name: one of `AggregationName`.
        learned: bool, True on the tokens that are learned from, shape (rows, length).
        max_length: the constant per row of "constant".
    """
    if name == "constant":
        return constant_length(learned, max_length)
    choices = {
        "token_mean": token_mean,
        "sequence_mean_token_mean": sequence_mean_token_mean,
        "sequence_mean_token_sum": sequence_mean_token_sum,
    }
    return choices[name](learned)
