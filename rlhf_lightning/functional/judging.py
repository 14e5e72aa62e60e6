"""From a judge's log-probabilities to preference labels (Constitutional AI, arXiv 2212.08073).

A judge sees two completions as options A and B and names one. Tensors have one entry per comparison.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_lightning.functional.logprobs import at_least_float32, require_shape


def option_logprobs(variant_logprobs: Tensor) -> Tensor:
    """Log-probability of an option that may be written in several ways ("A", " A", "(A)"): their logsumexp.

    Args:
        variant_logprobs: shape (comparisons, variants); minus infinity where a way does not apply.
    """
    return at_least_float32(variant_logprobs).logsumexp(-1)


def preference_probability(
    first_logprobs: Tensor, second_logprobs: Tensor, low: float = 0.0, high: float = 1.0
) -> Tensor:
    r"""Probability that the judge prefers the first option, sigmoid(l_A - l_B), held within [low, high].

    Normalising over the two options matters, as a judge puts mass on other tokens too.

    Args:
        first_logprobs: l_A, shape (comparisons,).
        second_logprobs: l_B, shape (comparisons,).
        low: least probability; 0.4 for labels read after a chain of thought, which saturate, else 0.
        high: largest probability; 0.6 after a chain of thought, else 1.
    """
    require_shape("comparisons", first_logprobs=first_logprobs, second_logprobs=second_logprobs)
    return torch.sigmoid(at_least_float32(first_logprobs) - at_least_float32(second_logprobs)).clamp(low, high)


def debiased_probability(probability: Tensor, swapped_probability: Tensor) -> Tensor:
    r"""Preference for a completion averaged over both orders, (p + 1 - p_swapped) / 2; equal ones give 1/2 to the bit.

    Args:
        probability: p, that the first option wins where the completion stands first, shape (comparisons,).
        swapped_probability: p_swapped, that the first option wins where it stands second, shape (comparisons,).
    """
    require_shape("comparisons", probability=probability, swapped_probability=swapped_probability)
    return (probability - swapped_probability) / 2 + 0.5


def debiased_probability_from_logits(logit: Tensor, swapped_logit: Tensor) -> Tensor:
    r"""Preference for a completion with the log-odds averaged over both orders, sigmoid((z - z_swapped) / 2).

    Args:
        logit: z = l_A - l_B where the completion stands first, shape (comparisons,).
        swapped_logit: l_A - l_B where it stands second, shape (comparisons,).
    """
    require_shape("comparisons", logit=logit, swapped_logit=swapped_logit)
    return torch.sigmoid((at_least_float32(logit) - at_least_float32(swapped_logit)) / 2)


def verdict(probability: Tensor, swapped_probability: Tensor) -> Tensor:
    """1 where both orders prefer the completion, 0 where neither does, 0.5 (a tie) where they disagree.

    The share of comparisons that are no tie is the judge's consistency.

    Args:
        probability: that the first option wins where the completion stands first, shape (comparisons,).
        swapped_probability: that the first option wins where it stands second, shape (comparisons,).
    """
    require_shape("comparisons", probability=probability, swapped_probability=swapped_probability)
    return ((probability - 0.5).sign() - (swapped_probability - 0.5).sign()).div(2).trunc() / 2 + 0.5


def position_bias(probability: Tensor, swapped_probability: Tensor) -> Tensor:
    """Mean preference for whatever stands first, minus a half; 0 for a judge that ignores order.

    Args:
        probability: that the first option wins, in one order, shape (comparisons,).
        swapped_probability: that the first option wins, in the other, shape (comparisons,).
    """
    require_shape("comparisons", probability=probability, swapped_probability=swapped_probability)
    return (probability + swapped_probability).mean() / 2 - 0.5


def label_entropy(probability: Tensor) -> Tensor:
    r"""Entropy of a soft label in nats, -p log p - (1 - p) log(1 - p): log 2 of one that cannot tell, 0 of a sure one.

    Args:
        probability: p, shape (comparisons,).
    """
    require_shape("comparisons", probability=probability)
    p = at_least_float32(probability)
    entropy: Tensor = torch.special.entr(p) + torch.special.entr(1 - p)
    return entropy


def agreement(preference: Tensor, human_preference: Tensor) -> Tensor:
    """1 where a judge prefers what people prefer, 0 where it prefers the other, 0.5 where it cannot tell.

    Args:
        preference: the judge's probability that the first completion is better, shape (comparisons,).
        human_preference: people's, same shape; none is 0.5.
    """
    require_shape("comparisons", preference=preference, human_preference=human_preference)
    return ((preference - 0.5).sign() * (human_preference - 0.5).sign() + 1) / 2
