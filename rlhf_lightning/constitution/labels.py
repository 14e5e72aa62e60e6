"""Comparisons and labels of a judge, their rows, and metrics of the judge."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_lightning.errors import DataError
from rlhf_lightning.functional.judging import agreement, label_entropy, position_bias, verdict
from rlhf_lightning.functional.statistics import bootstrap_interval, wilson_interval
from rlhf_lightning.scoring.judges.judge import Pair


@dataclass(frozen=True)
class Comparison:
    """A judge's comparison of a pair under one principle, in both orders."""

    principle: str  # id of the principle
    probability: float | None  # probability that the first position wins, in the pair's order; None without an answer
    swapped_probability: float | None  # probability that the first position wins, in the swapped order
    failures: tuple[str, ...] = ()  # reasons of missing answers
    mass: float = 1.0  # mean total probability of the two letters
    bounded: int = 0  # answers with only an upper bound for one letter's probability
    reasoning: tuple[str, ...] = ()  # the judge's reasoning in both orders

    @property
    def answered(self) -> bool:
        """Whether both orders have an answer; a label from one order would include the judge's position bias."""
        return self.probability is not None and self.swapped_probability is not None


class LabelledPair(NamedTuple):
    """A pair with a judge's label."""

    pair: Pair  # the pair
    comparisons: tuple[Comparison, ...]  # comparisons under each principle
    preference: float | None  # probability that the first is better, over orders and principles; None without an answer
    # 1 for the first, 0 for the second, 0.5 for a tie (orders or principles contradict each other)
    verdict: float | None

    def row(self, judge: str, constitution: str) -> dict[str, Any]:
        """Return the training row of the pair, with the label's provenance.

        Raises:
            DataError: the pair has no label.
        """
        if self.preference is None:
            raise DataError("no-labels", "the judge gave no answer to this pair, so it has no label: leave it out")
        kept = [one for one in self.comparisons if one.answered]
        forward, swapped = (one.tolist() for one in probabilities_of(kept))
        human, better = self.pair.preference, self.preference >= 0.5
        sides = (self.pair.first, self.pair.second) if better else (self.pair.second, self.pair.first)

        def of_chosen(probability: float) -> float:
            return probability if better else 1 - probability

        row: dict[str, Any] = {
            **self.pair.columns,
            "prompt": self.pair.prompt,
            "chosen": sides[0],
            "rejected": sides[1],
            "preference": of_chosen(self.preference),
            "judge": judge,
            "constitution": constitution,
            "principles": [one.principle for one in kept],
            "probabilities": [of_chosen(p) for p in forward],
            "swapped_probabilities": [of_chosen(1 - p) for p in swapped],
            "tie": self.verdict == 0.5,
        }
        if human is not None:
            row["human_preference"] = of_chosen(human)
        if any(one.reasoning for one in kept):
            row["reasoning"] = [text for one in kept for text in one.reasoning]
        return row


def probabilities_of(comparisons: Sequence[Comparison]) -> tuple[Tensor, Tensor]:
    """Return the probabilities that the first position wins, in both orders, float64, each of shape (comparisons,)."""
    return (
        torch.tensor([one.probability for one in comparisons], dtype=torch.float64),
        torch.tensor([one.swapped_probability for one in comparisons], dtype=torch.float64),
    )


def judge_metrics(labelled: Sequence[LabelledPair]) -> dict[str, Any]:
    """Return the metrics of a judge; a metric that the labels do not determine is None.

    ``consistency``: share of comparisons with the same verdict in both orders; ``position_bias``: mean P(first
    position) - 1/2; ``tie_rate``: share of comparisons whose verdict is a tie; ``parse_fail``: share of questions
    without an answer; ``entropy``: mean entropy of the labels, nats; ``letter_mass``: mean total probability of the two
    letters; ``agreement``: share of pairs with the same label as people, among pairs with a human preference (ties
    count half), with a 95 % interval over prompts.
    """
    comparisons = [comparison for one in labelled for comparison in one.comparisons]
    kept = [one for one in comparisons if one.answered]
    judged = [one for one in labelled if one.preference is not None]
    failures = Counter(reason for one in comparisons for reason in one.failures)
    questions = 2 * len(comparisons)
    metrics: dict[str, Any] = {
        "pairs": len(labelled),
        "labelled": len(judged),
        "questions": questions,
        "consistency": None,
        "position_bias": None,
        "tie_rate": None,
        "parse_fail": failures.total() / questions if questions else None,
        "parse_failures": dict(failures),
        "entropy": None,
        "letter_mass": None,
        "bounded": sum(one.bounded for one in kept),
        "agreement": agreement_with_people(judged),
        "by_principle": dict(Counter(one.principle for one in kept)),
    }
    if kept:
        forward, swapped = probabilities_of(kept)
        ties = verdict(forward, swapped) == 0.5
        undecided = (forward == 0.5) & (swapped == 0.5)  # a tie in both orders is consistent
        preferences = torch.tensor([one.preference for one in judged], dtype=torch.float64)
        metrics |= {
            "consistency": float((~ties | undecided).double().mean()),
            "position_bias": float(position_bias(forward, swapped)),
            "tie_rate": float(ties.double().mean()),
            "entropy": float(label_entropy(preferences).mean()),
            "letter_mass": sum(one.mass for one in kept) / len(kept),
        }
    return metrics


def agreement_with_people(labelled: Sequence[LabelledPair]) -> dict[str, Any] | None:
    """Return the share of pairs with the same label as people, with interval and counts; None without human labels."""
    rows = [one for one in labelled if one.pair.preference not in (None, 0.5)]
    if not rows:
        return None
    judge = torch.tensor([one.preference for one in rows], dtype=torch.float64)
    people = torch.tensor([one.pair.preference for one in rows], dtype=torch.float64)
    hits, numbers = agreement(judge, people), dict[str, int]()
    clusters = [numbers.setdefault(json.dumps(one.pair.prompt), len(numbers)) for one in rows]
    low, high = _interval(hits, torch.tensor(clusters), len(numbers))
    return {"mean": float(hits.mean()), "ci": [low, high], "pairs": len(rows), "prompts": len(numbers)}


def _interval(hits: Tensor, clusters: Tensor, prompts: int) -> tuple[float, float]:
    """Return the 95 % interval of a share; pairs of one prompt are not independent, so they are resampled together."""
    if prompts == len(hits):
        low, high = wilson_interval(hits.mean(), prompts)
    else:
        low, high = bootstrap_interval(hits, clusters=clusters)
    return float(low), float(high)


def describe(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the metrics as table rows of name and value."""

    def shown(name: str, form: str) -> str:
        return "-" if metrics[name] is None else format(metrics[name], form)

    names = ("consistency", "position_bias", "tie_rate", "parse_fail", "entropy", "letter_mass")
    rows = [(f"judge/{name}", shown(name, "+.3f" if name == "position_bias" else ".3f")) for name in names]
    found = metrics["agreement"]
    if found is not None:
        low, high = found["ci"]
        of = f"{found['pairs']:,} pairs of {found['prompts']:,} prompts"
        rows.append(("judge/agreement", f"{found['mean']:.3f} [{low:.3f}, {high:.3f}] on {of}"))
    if metrics["bounded"]:
        rows.append(("letters bounded", f"{metrics['bounded']:,} of {metrics['questions']:,} answers"))
    for reason, count in metrics["parse_failures"].items():
        rows.append((f"no answer: {reason}", f"{count:,} of {metrics['questions']:,} questions"))
    return rows
