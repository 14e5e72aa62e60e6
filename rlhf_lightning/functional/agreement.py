"""How far people agree, and how far each of them can be trusted."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlhf_lightning.functional.logprobs import require_shape


def krippendorff_alpha(values: Tensor, metric: Literal["nominal", "ordinal", "interval"] = "nominal") -> Tensor:
    r"""Agreement of any number of annotators, 1 - D_o / D_e (Krippendorff 2011, Computing Alpha-Reliability).

    D_o is the mean squared distance within units, D_e that of all values whatever their unit: 1 is perfect agreement,
    0 what chance gives, below 0 systematic disagreement. A unit with m values counts each of its ordered pairs
    1 / (m - 1); a unit with fewer than two values counts nothing.

    Args:
        values: of each annotator (rows) on each unit, NaN where there is none, shape (annotators, units).
        metric: distance of two values: ``nominal`` 0 or 1; ``interval`` their difference; ``ordinal`` the number of
            values that lie between them, the ends counted half.

    Returns:
        A scalar in float64; NaN where no unit has two values, or all values are equal.
    """
    require_shape("annotators units", values=values)
    known = ~values.isnan()
    paired = known & (known.sum(0) > 1)
    levels = values[paired].double().unique()
    member = (values.double().unsqueeze(-1) == levels) & paired.unsqueeze(-1)  # (annotators, units, levels)
    counts = member.double().sum(0)  # (units, levels)
    per_unit = counts.sum(-1)
    pairs = counts.unsqueeze(-1) * counts.unsqueeze(-2) - torch.diag_embed(counts)
    coincidences = (pairs / (per_unit - 1).clamp(min=1)[:, None, None]).sum(0)  # (levels, levels)
    totals = coincidences.sum(-1)
    expected = (totals.unsqueeze(-1) * totals - torch.diag(totals)) / (totals.sum() - 1)
    distance = _squared_distance(levels, totals, metric)
    alpha: Tensor = 1 - (coincidences * distance).sum() / (expected * distance).sum()
    return alpha


def _squared_distance(levels: Tensor, totals: Tensor, metric: str) -> Tensor:
    if metric == "nominal":
        return 1 - torch.eye(len(levels), dtype=torch.float64, device=levels.device)
    place = levels if metric == "interval" else totals.cumsum(0) - totals / 2
    return (place.unsqueeze(-1) - place) ** 2


def annotator_reliability(votes: Tensor, iterations: int = 200, prior: float = 2.0) -> tuple[Tensor, Tensor]:
    r"""Probability that each annotator is right, and that the first of each pair is better (Dawid and Skene 1979).

    One rate for each annotator, since sides are shown at random: P(vote right) = r_a. Expectation-maximisation from the
    mean vote: z_i = sigmoid(\sum_a (2 v_{ai} - 1) log(r_a / (1 - r_a))), r_a = the mean agreement of a's votes with z.
    Who agrees with nobody ends near 1/2 and counts nothing; below 1/2 their votes count the other way round.

    Args:
        votes: 1 for the first, 0 for the second, 0.5 for a tie, NaN where there is none, shape (annotators, pairs).
        iterations: steps of expectation-maximisation.
        prior: votes, right three times in four, that each annotator is credited with: keeps rates of few votes sane.

    Returns:
        r, shape (annotators,), and z, shape (pairs,); float64.
    """
    require_shape("annotators pairs", votes=votes)
    known = (~votes.isnan()).double()
    first = votes.double().nan_to_num(0.5)
    lead = (2 * first - 1) * known
    better = (first * known).sum(0) / known.sum(0).clamp(min=1)
    rates = lead.new_full((len(votes),), 0.75)
    decided = known * (lead != 0)  # a tie says nothing of who is right
    for _ in range(iterations):
        right = (decided * (first * better + (1 - first) * (1 - better))).sum(-1)
        rates = (right + 0.75 * prior) / (decided.sum(-1) + prior)
        better = torch.sigmoid(torch.logit(rates) @ lead)
    return rates, better
