"""Convert verdicts of judges and people to preference labels, and measure their agreement.

A judge sees two completions as options A and B and names one (Constitutional AI, arXiv 2212.08073). Tensors have shape
(comparisons,) unless stated otherwise. ``probability`` is the judge's probability that the first option wins when the
completion is shown first. ``swapped_probability`` is the probability that the first option wins when the completion is
shown second.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlhf_lightning.functional.logprobs import at_least_float32, require_shape

# --- labels from log-probabilities -----------------------------------------------------------------------------------


def option_logprobs(variant_logprobs: Tensor) -> Tensor:
    """Return the log-probability of an option with several spellings ("A", " A", "(A)"): their logsumexp.

    Args:
        variant_logprobs: shape (comparisons, variants); minus infinity for a variant that does not apply.
    """
    return at_least_float32(variant_logprobs).logsumexp(-1)


def preference_probability(
    first_logprobs: Tensor, second_logprobs: Tensor, low: float = 0.0, high: float = 1.0
) -> Tensor:
    r"""Return the probability that the judge prefers the first option, sigmoid(l_A - l_B), clamped to [low, high].

    The two options are normalised, because a judge gives some probability to other tokens.

    Args:
        low: minimum probability; 0.4 for labels after a chain of thought, which saturate, else 0.
        high: maximum probability; 0.6 after a chain of thought, else 1.
    """
    require_shape("comparisons", first_logprobs=first_logprobs, second_logprobs=second_logprobs)
    return torch.sigmoid(at_least_float32(first_logprobs) - at_least_float32(second_logprobs)).clamp(low, high)


def debiased_probability(probability: Tensor, swapped_probability: Tensor) -> Tensor:
    r"""Average the preference for a completion over both orders, (p + 1 - p_swapped) / 2; exactly 1/2 for equal p."""
    require_shape("comparisons", probability=probability, swapped_probability=swapped_probability)
    return (probability - swapped_probability) / 2 + 0.5


def debiased_probability_from_logits(logit: Tensor, swapped_logit: Tensor) -> Tensor:
    r"""Average the log-odds of a completion over both orders and return sigmoid((z - z_swapped) / 2).

    Args:
        logit: z = l_A - l_B with the completion shown first.
        swapped_logit: l_A - l_B with the completion shown second.
    """
    require_shape("comparisons", logit=logit, swapped_logit=swapped_logit)
    return torch.sigmoid((at_least_float32(logit) - at_least_float32(swapped_logit)) / 2)


def verdict(probability: Tensor, swapped_probability: Tensor) -> Tensor:
    """Return 1 if both orders prefer the completion, 0 if neither does, 0.5 (a tie) if they disagree.

    The judge's consistency is the share of comparisons that are not ties.
    """
    require_shape("comparisons", probability=probability, swapped_probability=swapped_probability)
    return ((probability - 0.5).sign() - (swapped_probability - 0.5).sign()).div(2).trunc() / 2 + 0.5


def position_bias(probability: Tensor, swapped_probability: Tensor) -> Tensor:
    """Return the mean preference for the option shown first, minus a half; 0 for a judge that ignores order."""
    require_shape("comparisons", probability=probability, swapped_probability=swapped_probability)
    return (probability + swapped_probability).mean() / 2 - 0.5


def label_entropy(probability: Tensor) -> Tensor:
    r"""Return the entropy of a soft label, -p log p - (1 - p) log(1 - p) nats: log 2 for p = 1/2, 0 if certain."""
    require_shape("comparisons", probability=probability)
    p = at_least_float32(probability)
    entropy: Tensor = torch.special.entr(p) + torch.special.entr(1 - p)
    return entropy


# --- agreement -------------------------------------------------------------------------------------------------------


def agreement(preference: Tensor, human_preference: Tensor) -> Tensor:
    """Return 1 where a judge prefers the same completion as people, 0 where it prefers the other, 0.5 for any tie.

    Both are probabilities that the first completion is better; 0.5 is a tie.
    """
    require_shape("comparisons", preference=preference, human_preference=human_preference)
    return ((preference - 0.5).sign() * (human_preference - 0.5).sign() + 1) / 2


def krippendorff_alpha(values: Tensor, metric: Literal["nominal", "ordinal", "interval"] = "nominal") -> Tensor:
    r"""Measure the agreement of annotators, 1 - D_o / D_e (Krippendorff 2011, Computing Alpha-Reliability).

    D_o is the mean squared distance of values within units, D_e that of all values regardless of unit. 1 is perfect
    agreement, 0 is chance, below 0 is systematic disagreement. In a unit with m values each ordered pair counts
    1 / (m - 1). Units with fewer than two values are left out.

    Args:
        values: value of each annotator (rows) for each unit, NaN if missing, shape (annotators, units).
        metric: distance of two values. ``nominal``: 0 or 1; ``interval``: their difference; ``ordinal``: the number of
            values between them, with both ends counted half.

    Returns:
        A scalar in float64; NaN if no unit has two values, or all values are equal.
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
    if metric == "nominal":
        distance = 1 - torch.eye(len(levels), dtype=torch.float64, device=levels.device)
    else:
        place = levels if metric == "interval" else totals.cumsum(0) - totals / 2
        distance = (place.unsqueeze(-1) - place) ** 2
    alpha: Tensor = 1 - (coincidences * distance).sum() / (expected * distance).sum()
    return alpha


def annotator_reliability(votes: Tensor, iterations: int = 200, prior: float = 2.0) -> tuple[Tensor, Tensor]:
    r"""Estimate each annotator's accuracy, and which side of each pair is better (Dawid and Skene 1979).

    There is one rate per annotator, because sides are shown at random: P(vote right) = r_a. Expectation-maximisation
    starts from the mean vote: z_i = sigmoid(\sum_a (2 v_{ai} - 1) log(r_a / (1 - r_a))), r_a = the mean agreement of
    a's votes with z. An annotator who agrees with no other ends near 1/2 and has no weight. Below 1/2 votes count in
    the opposite direction.

    Args:
        votes: 1 for the first, 0 for the second, 0.5 for a tie, NaN if missing, shape (annotators, pairs).
        iterations: steps of expectation-maximisation.
        prior: pseudo-votes per annotator, three quarters of them right; they regularise the rates of annotators with
            few votes.

    Returns:
        r, shape (annotators,), and z, the probability that the first is better, shape (pairs,); float64.
    """
    require_shape("annotators pairs", votes=votes)
    known = (~votes.isnan()).double()
    first = votes.double().nan_to_num(0.5)
    lead = (2 * first - 1) * known
    better = (first * known).sum(0) / known.sum(0).clamp(min=1)
    rates = lead.new_full((len(votes),), 0.75)
    decided = known * (lead != 0)  # a tie does not show who is right
    for _ in range(iterations):
        right = (decided * (first * better + (1 - first) * (1 - better))).sum(-1)
        rates = (right + 0.75 * prior) / (decided.sum(-1) + prior)
        better = torch.sigmoid(torch.logit(rates) @ lead)
    return rates, better
