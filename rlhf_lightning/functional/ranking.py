"""Losses on reward-model scores: comparisons, rankings, and reasoning steps.

Losses are returned per pair, group or step, in nats. r are scores: r_c of chosen and r_r of rejected completions.
Tensors of pairs have shape (pairs,). ``scores``, ``group`` and ``ranks`` have shape (completions,): ``group`` is the
index of each completion's group, int64 from 0 without gaps, and ``ranks`` its rank in the group: 0 is best, equal ranks
are ties. ``target`` is p, the probability that the chosen (or better ranked) completion is better; 1 for a plain label.
``margin`` is the rated strength of the preference, 0 where unrated. For rankings both have shape (groups,).
``centering`` is the weight of `centering_penalty`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_lightning.errors import SettingError
from rlhf_lightning.functional.logprobs import at_least_float32, require_shape

# --- pairs -----------------------------------------------------------------------------------------------------------


def bradley_terry_loss(
    chosen_scores: Tensor, rejected_scores: Tensor, target: Tensor | None = None, margin: Tensor | None = None
) -> Tensor:
    r"""Return the negative log-likelihood of a comparison, -log sigmoid(r_c - r_r), with soft label and margin.

    -p log sigmoid(delta - mu) - (1 - p) log sigmoid(-delta - mu), delta = r_c - r_r. p = 1 and mu = 0 is Eq. 1 of
    InstructGPT (arXiv 2203.02155) for two completions, mu > 0 is Eq. 2 of Llama 2 (arXiv 2307.09288). The loss is
    symmetric: it does not change if the completions are swapped and p becomes 1 - p. Without a margin, equal scores
    give log 2.

    Args:
        target: p; None means 1.
        margin: mu, gap of scores that a rated preference must exceed; None means 0. Use no margin in evaluation.
    """
    require_shape("pairs", chosen_scores=chosen_scores, rejected_scores=rejected_scores, target=target, margin=margin)
    delta = at_least_float32(chosen_scores) - at_least_float32(rejected_scores)
    gap = torch.zeros_like(delta) if margin is None else margin
    if target is None:
        return -F.logsigmoid(delta - gap)
    return -target * F.logsigmoid(delta - gap) - (1 - target) * F.logsigmoid(-delta - gap)


def centering_penalty(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """Return the penalty (r_c + r_r)^2, which fixes the constant of scores (Eisenstein et al., arXiv 2312.09244)."""
    require_shape("pairs", chosen_scores=chosen_scores, rejected_scores=rejected_scores)
    return (at_least_float32(chosen_scores) + at_least_float32(rejected_scores)) ** 2


def thurstone_loss(
    chosen_mean: Tensor, rejected_mean: Tensor, chosen_log_variance: Tensor, rejected_log_variance: Tensor,
    target: Tensor | None = None,
) -> Tensor:  # fmt: skip
    r"""Return the negative log-likelihood of comparing normal scores (Thurstone 1927, Law of comparative judgment).

    -p log Phi(z) - (1 - p) log Phi(-z), z = (m_c - m_r) / sqrt(e^{v_c} + e^{v_r}), with means m and log-variances v.
    Errors are independent (case III). v and z are clamped to [-20, 20]. Equal means give log 2. No target means p = 1.
    """
    require_shape("pairs", chosen_mean=chosen_mean, rejected_mean=rejected_mean, target=target)
    variances = [at_least_float32(one).clamp(-20, 20).exp() for one in (chosen_log_variance, rejected_log_variance)]
    gap = at_least_float32(chosen_mean) - at_least_float32(rejected_mean)
    z = (gap * (variances[0] + variances[1]).rsqrt()).clamp(-20, 20)
    share = torch.ones_like(z) if target is None else target
    loss: Tensor = -share * torch.special.log_ndtr(z) - (1 - share) * torch.special.log_ndtr(-z)
    return loss


def cost_sign_loss(costs: Tensor, safe: Tensor) -> Tensor:
    r"""Return the binary cross-entropy of a cost's sign in nats: -p log sigmoid(-c) - (1 - p) log sigmoid(c).

    A safe completion (p = 1) should have a cost below 0, a harmful one (p = 0) a cost above 0 (Dai et al., arXiv
    2310.12773, Eq. 6, second term). A cost of 0 gives log 2.
    """
    require_shape("completions", costs=costs, safe=safe)
    costs = at_least_float32(costs)
    return -safe * F.logsigmoid(-costs) - (1 - safe) * F.logsigmoid(costs)


def davidson_loss(chosen_scores: Tensor, rejected_scores: Tensor, target: Tensor, tie_share: float) -> Tensor:
    r"""Return the negative log-likelihood in nats of a comparison that may be a tie (Davidson 1970, JASA 65, 317).

    P(chosen) : P(rejected) : P(tie) = e^{delta / 2} : e^{-delta / 2} : nu, delta = r_c - r_r. ``tie_share`` is the
    probability of a tie for equal scores, nu / (2 + nu). As it goes to 0, the loss becomes `bradley_terry_loss` of the
    untied pairs. A target of 1 or 0 is a win and 0.5 a tie. Other targets are means of verdicts: the likelier side wins
    a share |2 p - 1| of them, and the rest are ties.

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


# --- rankings --------------------------------------------------------------------------------------------------------


def untied_pairs(group: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Return all pairs within a group that differ in rank, as indices (better, worse), each of shape (pairs,)."""
    require_shape("completions", group=group, ranks=ranks)
    better, worse = (_same_group(group) & (ranks.unsqueeze(1) < ranks.unsqueeze(0))).nonzero(as_tuple=True)
    return better, worse


def ranked_pairs_loss(
    scores: Tensor, group: Tensor, ranks: Tensor, target: Tensor, margin: Tensor, centering: float = 0.0
) -> Tensor:
    r"""Average the Bradley-Terry loss over the untied pairs of each group, so that every prompt has the same weight.

    1 / \binom{K}{2} \sum_{i beats j} -log sigmoid(r_i - r_j) (InstructGPT, arXiv 2203.02155, Eq. 1), plus
    ``centering`` * mean (r_i + r_j)^2; shape (groups,). A group without an untied pair gives exactly 0 and no gradient.
    """
    require_shape("completions", scores=scores, group=group, ranks=ranks)
    require_shape("groups", target=target, margin=margin)
    better, worse = untied_pairs(group, ranks)
    of_pair = group[better]
    losses = bradley_terry_loss(scores[better], scores[worse], target[of_pair], margin[of_pair])
    losses = losses + centering * centering_penalty(scores[better], scores[worse])
    return mean_by_group(losses, of_pair, len(target))


def ranked_davidson_loss(
    scores: Tensor, group: Tensor, ranks: Tensor, target: Tensor, tie_share: float, centering: float = 0.0
) -> Tensor:
    """Average `davidson_loss` over all pairs of each group, with equal ranks as ties, shape (groups,)."""
    require_shape("completions", scores=scores, group=group, ranks=ranks)
    tied = (_same_group(group) & (ranks.unsqueeze(1) == ranks.unsqueeze(0))).triu(1).nonzero(as_tuple=True)
    better, worse = (torch.cat(sides) for sides in zip(untied_pairs(group, ranks), tied, strict=True))
    of_pair = group[better]
    verdicts = torch.where(ranks[better] == ranks[worse], 0.5, target[of_pair])
    losses = davidson_loss(scores[better], scores[worse], verdicts, tie_share)
    losses = losses + centering * centering_penalty(scores[better], scores[worse])
    return mean_by_group(losses, of_pair, len(target))


def plackett_luce_loss(scores: Tensor, group: Tensor, ranks: Tensor, groups: int | None = None) -> Tensor:
    r"""Return the negative log-likelihood of a ranking in nats: each completion is picked before all lower-ranked ones.

    \sum_k [logsumexp_{j ranked at or below k} r_j - r_k] (Plackett 1975; Luce 1959), shape (groups,). Tied completions
    do not compete: a group in which all completions are tied gives exactly 0. A group of two gives
    `bradley_terry_loss`. ``groups`` is the number of groups, if it is known: to count them waits for a GPU.
    """
    require_shape("completions", scores=scores, group=group, ranks=ranks)
    scores = at_least_float32(scores)
    itself = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    competes = (_same_group(group) & (ranks.unsqueeze(1) < ranks.unsqueeze(0))) | itself
    against = torch.where(competes, scores.unsqueeze(0), float("-inf")).logsumexp(-1)
    return scores.new_zeros(len(torch.bincount(group)) if groups is None else groups).index_add(
        0, group, against - scores
    )


def _same_group(group: Tensor) -> Tensor:
    return group.unsqueeze(1) == group.unsqueeze(0)


def mean_by_group(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Return the mean of each group's values, of pairs or completions, shape (groups,); 0 for an empty group."""
    sums, counts = values.new_zeros(groups), values.new_zeros(groups)  # bincount would wait for a GPU
    return sums.index_add(0, group, values) / counts.index_add(0, group, torch.ones_like(values)).clamp(min=1)


# --- steps: process reward models ------------------------------------------------------------------------------------
# ``row`` is the index of each step's completion, int64, shape (steps,), and ``rows`` the number of completions.


def step_loss(scores: Tensor, labels: Tensor) -> Tensor:
    r"""Return the cross-entropy of each step's label in nats, -y log sigmoid(s) - (1 - y) log sigmoid(-s).

    Shape (steps,). Lightman et al. (arXiv 2305.20050, Section 2.6). The minimiser is the label's log-odds,
    log(y / (1 - y)). A score of 0 costs log 2 for any label.
    """
    require_shape("steps", scores=scores, labels=labels)
    scores = at_least_float32(scores)
    return -labels * F.logsigmoid(scores) - (1 - labels) * F.logsigmoid(-scores)


def first_errors(right: Tensor, row: Tensor, position: Tensor, rows: int) -> Tensor:
    """Return the position of each completion's first wrong step, int64, shape (rows,); -1 if every step is right.

    Args:
        right: bool, shape (steps,).
        position: index of each step within its completion, int64, shape (steps,).
    """
    require_shape("steps", right=right, row=row, position=position)
    none = torch.iinfo(torch.int64).max
    first = torch.full((rows,), none, dtype=torch.int64, device=right.device)
    first = first.scatter_reduce(0, row, torch.where(right, none, position), "amin")
    return torch.where(first == none, -1, first)


def aggregated_steps(log_probs: Tensor, row: Tensor, rows: int, how: str) -> Tensor:
    """Aggregate the log-probabilities that steps are right into one number per completion, shape (rows,).

    Args:
        log_probs: log-probability that each step is right, ordered by completion and step, shape (steps,); each
            completion must have a step.
        how: "min" (the minimum), "product" (the sum of logs) or "last".

    Raises:
        SettingError: the aggregate is unknown.
    """
    require_shape("steps", log_probs=log_probs, row=row)
    if how == "min":
        return log_probs.new_zeros(rows).scatter_reduce(0, row, log_probs, "amin")  # log-probabilities are at most 0
    if how == "product":
        return log_probs.new_zeros(rows).index_add(0, row, log_probs)
    if how != "last":
        raise SettingError("unknown-choice", f"aggregate is {how!r}; choose 'min', 'product' or 'last'")
    return log_probs[torch.bincount(row, minlength=rows).cumsum(0) - 1]
