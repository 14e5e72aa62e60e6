"""How far a judge can be trusted: whether order decides, how sure it is, and whether people agree."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.constitution.labels import LabelledPair, failures_of, probabilities_of
from rlhf_lightning.functional.judging import agreement, label_entropy, position_bias, verdict
from rlhf_lightning.functional.statistics import bootstrap_interval, wilson_interval


def judge_metrics(labelled: Sequence[LabelledPair]) -> dict[str, Any]:
    """Return what is known of a judge from its labels.

    ``consistency``: share of comparisons judged alike in both orders; ``position_bias``: mean P(first place) - 1/2;
    ``tie_rate``: share of comparisons whose verdict is a tie, most of them since the orders contradict each other;
    ``parse_fail``: share of questions without an answer; ``entropy``: mean entropy of the labels, nats;
    ``letter_mass``: mean probability of the two letters together; ``agreement``: share of pairs with people's
    preference, a tie counted half, with a 95 % interval over prompts, of the pairs where people prefer one. What cannot
    be said is None.
    """
    comparisons = [comparison for one in labelled for comparison in one.comparisons]
    kept = [one for one in comparisons if one.answered]
    judged = [one for one in labelled if one.preference is not None]
    failures, questions = failures_of(labelled), 2 * len(comparisons)
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
        undecided = (forward == 0.5) & (swapped == 0.5)  # a tie in both orders contradicts nothing
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
    """Return the share of pairs with people's preference, its interval and the pairs counted; None of none."""
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
    """95 % interval of a share; pairs of one prompt are drawn together, as they are not independent."""
    if prompts == len(hits):
        low, high = wilson_interval(hits.mean(), prompts)
    else:
        low, high = bootstrap_interval(hits, clusters=clusters)
    return float(low), float(high)


def describe(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the metrics as rows of a table: name and value."""

    def shown(name: str, form: str = ".3f") -> str:
        return "-" if metrics[name] is None else format(metrics[name], form)

    rows = [
        ("judge/consistency", shown("consistency")),
        ("judge/position_bias", shown("position_bias", "+.3f")),
        ("judge/tie_rate", shown("tie_rate")),
        ("judge/parse_fail", shown("parse_fail")),
        ("judge/entropy", shown("entropy")),
        ("judge/letter_mass", shown("letter_mass")),
    ]
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
