"""What a judge made of pairs: comparisons in both orders, the label of each pair, and the row that training reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_lightning.errors import DataError
from rlhf_lightning.scoring.judges.judge import Pair


@dataclass(frozen=True)
class Comparison:
    """What a judge said of a pair under one principle.

    Attributes:
        principle: id of the principle.
        probability: that the completion shown first is better, the pair's first shown first; None without an answer.
        swapped_probability: that the completion shown first is better, the pair's second shown first.
        failures: why there was no answer, one reason a question.
        mass: mean probability of the two letters together.
        bounded: answers of which one letter's probability was only bounded.
        reasoning: what the judge said before it answered, in both orders.
    """

    principle: str
    probability: float | None
    swapped_probability: float | None
    failures: tuple[str, ...] = ()
    mass: float = 1.0
    bounded: int = 0
    reasoning: tuple[str, ...] = ()

    @property
    def answered(self) -> bool:
        """Whether both orders have an answer: half a comparison would carry the bias of its order."""
        return self.probability is not None and self.swapped_probability is not None


class LabelledPair(NamedTuple):
    """A pair with what a judge made of it.

    Attributes:
        pair: the pair.
        comparisons: what was said under each principle.
        preference: probability that the first is better, of both orders and all principles; None without an answer.
        verdict: 1 the first, 0 the second, 0.5 a tie: the orders contradict each other, or the principles do.
    """

    pair: Pair
    comparisons: tuple[Comparison, ...]
    preference: float | None
    verdict: float | None

    def row(self, judge: str, constitution: str) -> dict[str, Any]:
        """Return the row that training reads: the better completion is chosen, with where the label comes from.

        Args:
            judge: name of the judge.
            constitution: fingerprint of the constitution.

        Raises:
            DataError: the pair has no label.
        """
        if self.preference is None:
            raise DataError("no-labels", "the judge gave no answer to this pair, which has no label: leave it out")
        kept = [one for one in self.comparisons if one.answered]
        forward = [one.probability for one in kept]
        # Of the chosen completion, as everything in the row.
        swapped = [1 - one.swapped_probability for one in kept if one.swapped_probability is not None]
        human, better = self.pair.preference, self.preference >= 0.5
        sides = (self.pair.first, self.pair.second) if better else (self.pair.second, self.pair.first)
        row: dict[str, Any] = {
            **self.pair.columns,
            "prompt": self.pair.prompt,
            "chosen": sides[0],
            "rejected": sides[1],
            "preference": self.preference if better else 1 - self.preference,
            "judge": judge,
            "constitution": constitution,
            "principles": [one.principle for one in kept],
            "probabilities": [p if better else 1 - p for p in forward if p is not None],
            "swapped_probabilities": [p if better else 1 - p for p in swapped],
            "tie": self.verdict == 0.5,
        }
        if human is not None:
            row["human_preference"] = human if better else 1 - human
        if any(one.reasoning for one in kept):
            row["reasoning"] = [text for one in kept for text in one.reasoning]
        return row


def probabilities_of(comparisons: Sequence[Comparison]) -> tuple[Tensor, Tensor]:
    """Probabilities that the first place wins, in the one and in the other order, float64, shape (comparisons,)."""
    return (
        torch.tensor([one.probability for one in comparisons], dtype=torch.float64),
        torch.tensor([one.swapped_probability for one in comparisons], dtype=torch.float64),
    )


def failures_of(labelled: Sequence[LabelledPair]) -> Counter[str]:
    """How often which reason kept an answer from being one."""
    return Counter(reason for one in labelled for comparison in one.comparisons for reason in comparison.failures)
