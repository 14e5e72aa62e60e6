"""Losses on single completions that are labelled desirable or undesirable (KTO)."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_lightning.functional.logprobs import at_least_float32, require_shape


def kto_reference_point(mismatched_logratios: Tensor) -> Tensor:
    r"""KTO's z0 = max(0, mean log-ratio of completions put after other rows' prompts), an estimate of the policy's KL.

    Without gradient. Where a step spans ranks or micro-batches, average the log-ratios over all of them first: the
    maximum comes last. Ethayarajh et al. (arXiv 2402.01306).

    Args:
        mismatched_logratios: log policy - log reference of completion i - 1 after prompt i, shape (rows,).

    Returns:
        A scalar, at least 0.
    """
    require_shape("rows", mismatched_logratios=mismatched_logratios)
    return at_least_float32(mismatched_logratios).mean().clamp(min=0).detach()


def kto_loss(
    logratio: Tensor,
    desirable: Tensor,
    reference_point: Tensor,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    r"""KTO: prospect-theoretic value of one completion against a reference point (arXiv 2402.01306, Sec. 4).

    lambda_D (1 - sigmoid(beta (a - z0))) for a desirable completion, lambda_U (1 - sigmoid(beta (z0 - a))) for an
    undesirable one. policy = reference gives lambda / 2.

    Args:
        logratio: a = log policy - log reference of each completion in nats, shape (rows,).
        desirable: bool, shape (rows,).
        reference_point: z0 from `kto_reference_point`, a scalar.
        beta: rewards per nat.
        desirable_weight: lambda_D; choose lambda_D n_D / (lambda_U n_U) between 1 and 4/3.
        undesirable_weight: lambda_U.

    Returns:
        One loss per row, shape (rows,).
    """
    require_shape("rows", logratio=logratio, desirable=desirable)
    advantage = beta * (at_least_float32(logratio) - reference_point)
    gain = desirable_weight * torch.sigmoid(-advantage)
    return torch.where(desirable, gain, undesirable_weight * torch.sigmoid(advantage))
