"""Select samples: to keep, to pair, or to ask people about."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_lightning.functional.logprobs import at_least_float32, require_shape

# --- one of n samples ------------------------------------------------------------------------------------------------


def soft_best_of_n(scores: Tensor, temperature: float) -> Tensor:
    """Return the probability of each sample of a prompt in soft best-of-n, softmax(scores / temperature).

    As the temperature goes to 0 this becomes best-of-n, as it goes to infinity a uniform draw.

    Args:
        scores: one for each sample, shape (..., samples).
        temperature: positive, in units of the score.

    Returns:
        Probabilities, shape (..., samples).
    """
    return (at_least_float32(scores) / temperature).softmax(-1)


# --- pairs of a rollout ----------------------------------------------------------------------------------------------


def best_and_worst(scores: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Return the indices of the best- and worst-scored sample of each group; groups of equal scores are left out.

    Args:
        scores: shape (episodes,); a sample with NaN is never selected.
        group: index of each episode's prompt, int64 from 0, shape (episodes,).

    Returns:
        Chosen and rejected episodes, each of shape (pairs,), in the order of their groups.
    """
    require_shape("episodes", scores=scores, group=group)
    groups = torch.bincount(group)
    member = group == torch.arange(len(groups), device=group.device).unsqueeze(-1)
    member = member & ~scores.isnan()  # (groups, episodes)
    highest, chosen = torch.where(member, scores, -torch.inf).max(-1)
    lowest, rejected = torch.where(member, scores, torch.inf).min(-1)
    return chosen[highest > lowest], rejected[highest > lowest]


# --- active learning: how informative the label of a comparison is ---------------------------------------------------
# ``scores`` has shape (members, completions): scores of one prompt's completions by each reward model of an ensemble.
# For more than two completions, the value is the mean over all pairs.


def preference_probabilities(scores: Tensor) -> Tensor:
    """Return the probability that the first of two is preferred, sigmoid(r_a - r_b), shape (members, pairs a < b)."""
    require_shape("members completions", scores=scores)
    scores = at_least_float32(scores)
    first, second = torch.triu_indices(scores.shape[1], scores.shape[1], 1, device=scores.device)
    return torch.sigmoid(scores[:, first] - scores[:, second])


def uncertainty(scores: Tensor) -> Tensor:
    """Return the uncertainty of the ensemble's mean probability, 1 - |2 p - 1|: 1 for p = 1/2, 0 for a certain p.

    A scalar. Uncertainty sampling of Lewis and Gale (1994, arXiv cmp-lg/9407020), for two classes.
    """
    return (1 - (2 * preference_probabilities(scores).mean(0) - 1).abs()).mean()


def disagreement(scores: Tensor) -> Tensor:
    """Return the variance of the preference probability over the members, a scalar in [0, 1/4].

    Query by committee; its use for reward models is Christiano et al. (2017, arXiv 1706.03741), Section 2.2.4.
    """
    return preference_probabilities(scores).var(0, correction=0).mean()


def farthest_first(features: Tensor, known: Tensor) -> Tensor:
    """Order points so that each is the farthest from all earlier and known points; ties go to the first point.

    The greedy cover of Gonzalez (1985), used by Sener and Savarese (2018, arXiv 1708.00489) as a core-set. Without
    known points, the point nearest to the mean comes first. Computes (points + known) * points distances.
    ``features`` has shape (points, size), ``known`` (known, size). Returns indices of the points, int64.
    """
    require_shape("points size", features=features)
    require_shape("known size", known=known)
    features, known = at_least_float32(features), at_least_float32(known)
    count = len(features)
    order = torch.empty(count, dtype=torch.int64, device=features.device)
    distance = torch.full((count,), torch.inf, dtype=features.dtype, device=features.device)
    if len(known) and count:
        distance = torch.cdist(features, known).amin(1)
    for place in range(count):
        central = place == 0 and not len(known)
        chosen = (features - features.mean(0)).norm(dim=1).argmin() if central else distance.argmax()
        order[place] = chosen
        distance = torch.minimum(distance, (features - features[chosen]).norm(dim=1))
        distance[chosen] = -torch.inf
    return order
