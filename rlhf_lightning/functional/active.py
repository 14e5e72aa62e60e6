"""Active learning of preferences: how much the label of a comparison would tell.

Scores are (members, completions): of the completions of one prompt, by each reward model of an ensemble. A list of more
than two completions is all of its pairs, and its value their mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_lightning.functional.logprobs import at_least_float32, require_shape


def preference_probabilities(scores: Tensor) -> Tensor:
    """Probability that the first of two completions is preferred, sigmoid(r_a - r_b), for every pair a before b.

    Args:
        scores: shape (members, completions).

    Returns:
        Shape (members, pairs).
    """
    require_shape("members completions", scores=scores)
    scores = at_least_float32(scores)
    first, second = torch.triu_indices(scores.shape[1], scores.shape[1], 1, device=scores.device)
    return torch.sigmoid(scores[:, first] - scores[:, second])


def uncertainty(scores: Tensor) -> Tensor:
    """How near the ensemble's mean probability is to a coin's, 1 - |2 p - 1|: 1 where it knows nothing, 0 where sure.

    Uncertainty sampling of Lewis and Gale (1994, arXiv cmp-lg/9407020), for two classes.

    Args:
        scores: shape (members, completions).

    Returns:
        A scalar in [0, 1].
    """
    return (1 - (2 * preference_probabilities(scores).mean(0) - 1).abs()).mean()


def disagreement(scores: Tensor) -> Tensor:
    """Variance of the preference probability over the members: 0 where all say the same, 1/4 where half are sure of a
    and half of b.

    Query by committee; its use for reward models is Christiano et al. (2017, arXiv 1706.03741), Section 2.2.4.

    Args:
        scores: shape (members, completions).

    Returns:
        A scalar in [0, 1/4].
    """
    return preference_probabilities(scores).var(0, correction=0).mean()


def farthest_first(features: Tensor, known: Tensor) -> Tensor:
    """Order in which each point is the farthest from all before it and from those known already; of equals the first.

    The greedy cover of Gonzalez (1985), which Sener and Savarese (2018, arXiv 1708.00489) use as a core-set. Where
    nothing is known the point nearest to the mean comes first. Takes (points + known) * points distances.

    Args:
        features: shape (points, size).
        known: shape (known, size).

    Returns:
        Indices of the points, int64, shape (points,).
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
