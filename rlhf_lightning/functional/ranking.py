"""Losses on the scores of compared completions: Bradley-Terry and its margin, soft-label and ranked forms."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_lightning.errors import SettingError
from rlhf_lightning.functional.logprobs import at_least_float32, require_shape


def bradley_terry_loss(
    chosen_scores: Tensor, rejected_scores: Tensor, target: Tensor | None = None, margin: Tensor | None = None
) -> Tensor:
    r"""Negative log-likelihood of a comparison, -log sigmoid(r_c - r_r), with optional soft label and margin.

    -p log sigmoid(delta - mu) - (1 - p) log sigmoid(-delta - mu), delta = r_c - r_r. p = 1 and mu = 0 is Eq. 1 of
    InstructGPT (arXiv 2203.02155) for two completions, mu > 0 is Eq. 2 of Llama 2 (arXiv 2307.09288). Exchanging the
    completions, and p with 1 - p, changes nothing. Equal scores give log 2 without a margin.

    Args:
        chosen_scores: r_c, shape (pairs,).
        rejected_scores: r_r, shape (pairs,).
        target: p, probability that chosen is the better one, shape (pairs,); None means 1.
        margin: mu, gap of scores that a rated preference must clear, shape (pairs,); None means 0. Evaluate without.

    Returns:
        One loss per pair in nats, shape (pairs,).
    """
    require_shape("pairs", chosen_scores=chosen_scores, rejected_scores=rejected_scores, target=target, margin=margin)
    delta = at_least_float32(chosen_scores) - at_least_float32(rejected_scores)
    gap = torch.zeros_like(delta) if margin is None else margin
    if target is None:
        return -F.logsigmoid(delta - gap)
    return -target * F.logsigmoid(delta - gap) - (1 - target) * F.logsigmoid(-delta - gap)


def centering_penalty(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """Penalty (r_c + r_r)^2, which fixes the free constant of the scores (Eisenstein et al., arXiv 2312.09244).

    Args:
        chosen_scores: r_c, shape (pairs,).
        rejected_scores: r_r, shape (pairs,).
    """
    require_shape("pairs", chosen_scores=chosen_scores, rejected_scores=rejected_scores)
    return (at_least_float32(chosen_scores) + at_least_float32(rejected_scores)) ** 2


def untied_pairs(group: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs of one group whose ranks differ, as indices (better, worse), each of shape (pairs,).

    Args:
        group: index of each completion's group, int64, shape (completions,).
        ranks: rank within the group, 0 is best; int64, shape (completions,).
    """
    require_shape("completions", group=group, ranks=ranks)
    better, worse = (_same_group(group) & (ranks.unsqueeze(1) < ranks.unsqueeze(0))).nonzero(as_tuple=True)
    return better, worse


def ranked_pairs_loss(
    scores: Tensor, group: Tensor, ranks: Tensor, target: Tensor, margin: Tensor, centering: float = 0.0
) -> Tensor:
    r"""Bradley-Terry loss averaged over all untied pairs of each group, so that a prompt weighs one (InstructGPT).

    1 / \binom{K}{2} \sum_{i beats j} -log sigmoid(r_i - r_j), Eq. 1 of arXiv 2203.02155, plus
    ``centering`` * mean (r_i + r_j)^2. A group without an untied pair gives exactly 0 and no gradient.

    Args:
        scores: r, shape (completions,).
        group: index of each completion's group, int64 below the number of groups, shape (completions,).
        ranks: rank within the group, 0 is best, equal ranks are ties; int64, shape (completions,).
        target: probability that the better ranked of a pair is better, shape (groups,); 1 for plain labels.
        margin: rated strength of the preference, shape (groups,); 0 where unrated.
        centering: weight of `centering_penalty`.

    Returns:
        One loss per group, shape (groups,).
    """
    require_shape("completions", scores=scores, group=group, ranks=ranks)
    require_shape("groups", target=target, margin=margin)
    better, worse = untied_pairs(group, ranks)
    pair_group = group[better]
    losses = bradley_terry_loss(scores[better], scores[worse], target[pair_group], margin[pair_group])
    losses = losses + centering * centering_penalty(scores[better], scores[worse])
    pairs = torch.bincount(pair_group, minlength=len(target))
    return losses.new_zeros(len(target)).index_add(0, pair_group, losses) / pairs.clamp(min=1)


def davidson_loss(chosen_scores: Tensor, rejected_scores: Tensor, target: Tensor, tie_share: float) -> Tensor:
    r"""Negative log-likelihood of a comparison that may end in a tie (Davidson 1970, JASA 65, 317).

    P(chosen) : P(rejected) : P(tie) = e^{delta / 2} : e^{-delta / 2} : nu, delta = r_c - r_r. Equal scores tie with
    probability nu / (2 + nu), which is ``tie_share``; towards 0 ties vanish and this is `bradley_terry_loss` of the
    untied. The target says how the comparison ended: 1 and 0 are wins, 0.5 a tie, and between them it is the mean of
    verdicts, of which as many are ties as can be: |2 p - 1| of them are wins of the likelier side and the rest ties.

    Args:
        chosen_scores: r_c, shape (pairs,).
        rejected_scores: r_r, shape (pairs,).
        target: p, shape (pairs,).
        tie_share: probability that equals tie, in (0, 1).

    Returns:
        One loss per pair in nats, shape (pairs,).

    Raises:
        SettingError: tie_share is outside (0, 1).
    """
    require_shape("pairs", chosen_scores=chosen_scores, rejected_scores=rejected_scores, target=target)
    if not 0 < tie_share < 1:
        raise SettingError("setting-out-of-range", f"tie_share is {tie_share}: it must be in (0, 1)")
    half = (at_least_float32(chosen_scores) - at_least_float32(rejected_scores)) / 2
    tie = torch.full_like(half, math.log(2 * tie_share / (1 - tie_share)))
    logprobs = torch.stack([half, -half, tie], -1).log_softmax(-1)
    lead = 2 * target - 1
    shares = torch.stack([lead.clamp(min=0), (-lead).clamp(min=0), 1 - lead.abs()], -1)
    return -(shares * logprobs).sum(-1)


def ranked_davidson_loss(
    scores: Tensor, group: Tensor, ranks: Tensor, target: Tensor, tie_share: float, centering: float = 0.0
) -> Tensor:
    """`davidson_loss` averaged over all pairs of each group, equal ranks being ties, so that a prompt weighs one.

    Args:
        scores: r, shape (completions,).
        group: index of each completion's group, int64 below the number of groups, shape (completions,).
        ranks: rank within the group, 0 is best, equal ranks are ties; int64, shape (completions,).
        target: of each group's pairs of different rank, the better ranked as chosen, shape (groups,).
        tie_share: probability that equals tie, in (0, 1).
        centering: weight of `centering_penalty`.

    Returns:
        One loss per group, shape (groups,).
    """
    require_shape("completions", scores=scores, group=group, ranks=ranks)
    tied = (_same_group(group) & (ranks.unsqueeze(1) == ranks.unsqueeze(0))).triu(1).nonzero(as_tuple=True)
    better, worse = (torch.cat(sides) for sides in zip(untied_pairs(group, ranks), tied, strict=True))
    pair_group = group[better]
    verdicts = torch.where(ranks[better] == ranks[worse], 0.5, target[pair_group])
    losses = davidson_loss(scores[better], scores[worse], verdicts, tie_share)
    losses = losses + centering * centering_penalty(scores[better], scores[worse])
    pairs = torch.bincount(pair_group, minlength=len(target))
    return losses.new_zeros(len(target)).index_add(0, pair_group, losses) / pairs.clamp(min=1)


def plackett_luce_loss(scores: Tensor, group: Tensor, ranks: Tensor) -> Tensor:
    r"""Negative log-likelihood of a whole ranking: each completion is picked ahead of all that rank below it.

    \sum_k [logsumexp_{j ranked at or below k} r_j - r_k] (Plackett 1975; Luce 1959). Completions tied with each other
    do not compete, so a group of ties gives exactly 0; a group of two gives `bradley_terry_loss`.

    Args:
        scores: r, shape (completions,).
        group: index of each completion's group, int64 from 0 without gaps, shape (completions,).
        ranks: rank within the group, 0 is best; int64, shape (completions,).

    Returns:
        One loss per group in nats, shape (groups,).
    """
    require_shape("completions", scores=scores, group=group, ranks=ranks)
    scores = at_least_float32(scores)
    itself = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    competes = (_same_group(group) & (ranks.unsqueeze(1) < ranks.unsqueeze(0))) | itself
    against = torch.where(competes, scores.unsqueeze(0), float("-inf")).logsumexp(-1)
    groups = len(torch.bincount(group))
    return scores.new_zeros(groups).index_add(0, group, against - scores)


def _same_group(group: Tensor) -> Tensor:
    return group.unsqueeze(1) == group.unsqueeze(0)
