"""Baseline for reward models: logistic regression on the words of a completion."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F


def word_counts(text: str) -> Counter[str]:
    """Count the words of a text, in lower case."""
    return Counter(re.findall(r"\w+", text.lower()))


def fit_word_weights(pairs: Sequence[tuple[str, str]], strength: float = 1.0) -> dict[str, float]:
    r"""Fit the pairwise logistic model: score(text) = \sum_words weight * count.

    Minimises |weights|^2 / 2 + strength * \sum_pairs -log sigmoid(score(chosen) - score(rejected)). An intercept would
    cancel in the difference.

    Args:
        pairs: chosen and rejected text of each pair.
        strength: weight of the data against the penalty.

    Returns:
        The weight of each word seen, positive for words of chosen texts.
    """
    differences = [(word_counts(chosen), word_counts(rejected)) for chosen, rejected in pairs]
    vocabulary = sorted({word for pair in differences for counts in pair for word in counts})
    column = {word: index for index, word in enumerate(vocabulary)}
    design = torch.zeros(len(pairs), len(vocabulary), dtype=torch.float64)
    for row, (chosen, rejected) in enumerate(differences):
        for counts, sign in ((chosen, 1.0), (rejected, -1.0)):
            for word, count in counts.items():
                design[row, column[word]] += sign * count
    weights = torch.zeros(len(vocabulary), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        loss = weights.square().sum() / 2 - strength * F.logsigmoid(design @ weights).sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    return dict(zip(vocabulary, weights.tolist(), strict=True))


def score_words(weights: Mapping[str, float], text: str) -> float:
    """Score a text; words that were not in training have weight 0."""
    return sum(weights.get(word, 0.0) * count for word, count in word_counts(text).items())


def is_right(weights: Mapping[str, float], pairs: Sequence[tuple[str, str]]) -> torch.Tensor:
    """Return whether chosen scores above rejected (ties count as wrong), bool, shape (pairs,)."""
    return torch.tensor([score_words(weights, chosen) > score_words(weights, rejected) for chosen, rejected in pairs])
