"""The report of `rlhf evaluate-reward` on pairs: measurements of models and baselines, and their tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_lightning.evaluation import reward_models as room
from rlhf_lightning.evaluation.report import Section, interval, p_value, pyplot, save_figure
from rlhf_lightning.evaluation.reward_benchmarks import KnownList, by_style, list_scores, rewardbench, weighted_mean
from rlhf_lightning.evaluation.reward_models import KnownPair

MEAN = "mean of subsets"
PARTS_OF_TIES = ("tied", "reference", "margin", "margin_of_both")


def pair_report(
    gaps: Mapping[str, np.ndarray],
    tied_gaps: Mapping[str, np.ndarray],
    blind: Mapping[str, np.ndarray],
    decided: Sequence[KnownPair],
    tied: Sequence[KnownPair],
    lists: Mapping[int, KnownList],
    seed: int = 0,
) -> dict[str, Any]:
    """Return the measurements of each model and baseline.

    Args:
        gaps: margins of each model on the pairs with a winner.
        tied_gaps: margins of each model on the tied pairs.
        blind: margins without the prompt, by name of the baseline.
        decided: pairs with a winner.
        tied: pairs without one.
        lists: lists by row.
        seed: seed of bootstrap resampling and cross-validation folds.
    """
    longer = "longer completion"
    baselines = {
        longer: room.length_margins(decided),
        "bag of words": room.bag_of_words_margins(decided, seed),
        **blind,
    }
    positions = np.array([pair.position for pair in decided])
    if not np.isnan(positions).all():
        baselines["first in the file"] = positions
    ties = {**tied_gaps, longer: room.length_margins(tied)}
    measured = {
        name: {**accuracies(found, decided, seed), **list_scores(found, ties.get(name), decided, tied, lists, seed)}
        for name, found in {**baselines, **gaps}.items()
    }
    first, *_ = gaps
    rows = [pair.row for pair in decided]
    return {
        "decided": len(decided), "tied": len(tied),
        "models": {
            name: {
                **measured[name], **room.quality(found, decided),
                "margin_on_ties": float(abs(tied_gaps[name]).mean()) if len(tied) else None,
            }
            for name, found in gaps.items()
        },
        "baselines": {name: measured[name] for name in baselines},
        "against_first": {name: room.compared(gaps[first], found, rows, seed)
                          for name, found in {**gaps, **baselines}.items() if name != first},
    }  # fmt: skip


def accuracies(gaps: np.ndarray, pairs: Sequence[KnownPair], seed: int) -> dict[str, Any]:
    """Return the accuracy on all pairs, by subset, and by RewardBench's sections or styles if pairs have them."""
    members = {"all": list(range(len(pairs)))}
    for place, pair in enumerate(pairs):
        if pair.subset != "all":
            members.setdefault(pair.subset, []).append(place)
    parts = {name: (gaps[places], [pairs[place] for place in places]) for name, places in members.items()}
    found = {name: room.accuracy(part, [pair.row for pair in kept], seed) for name, (part, kept) in parts.items()}
    styled = all(pair.styles for pair in pairs)
    styles = {name: by_style(*part, seed) for name, part in parts.items()} if styled else {}
    return {**found.pop("all"), "subsets": found, "sections": rewardbench(found), "styles": styles}


def sections_of(report: Mapping[str, Any]) -> list[Section]:
    """Return the tables: accuracy with baselines, subsets, lists, calibration and paired tests."""
    models = report["models"]
    first, *_ = models
    both = {**models, **{f"baseline: {name}": found for name, found in report["baselines"].items()}}
    rows: list[list[Any]] = [
        [name, found["accuracy"], interval(found["ci"]), found["pairs"], found["equal"], found["missing"]]
        for name, found in both.items()
    ]
    header = ["model", "accuracy", "95 % interval", "pairs", "equal scores", "no score"]
    sections = [Section("Accuracy", header, rows, "Equal scores count as half right.")]
    sections += _tables_of_subsets(both)
    sections += _tables_of_styles(both, list(models))
    keys = ["ece", "brier", "log_loss", "margin", "margin_on_ties", "length_correlation"]
    rows = [[name, *(m[key] for key in keys)] for name, m in models.items()]
    note = "length_correlation: correlation of the margin with the difference of lengths in characters."
    sections.append(Section("Calibration, margins and length", ["model", *keys], rows, note))
    rows = [[name, test["difference"], interval(test["ci"]), p_value(test["p"]), test["test"]]
            for name, test in report["against_first"].items()]  # fmt: skip
    note = "Accuracy minus that of the first model on the same pairs; bootstrap interval by row."
    sections.append(
        Section(f"Against {first}", ["model or baseline", "difference", "95 % interval", "p", "test"], rows, note)
    )
    return [section for section in sections if section.rows]


def _tables_of_subsets(both: Mapping[str, Mapping[str, Any]]) -> list[Section]:
    """Return the accuracy by subset and by RewardBench's sections, best-of-k accuracy, and the score of ties."""

    def listed(name: str, found: Mapping[str, Any]) -> Iterator[list[Any]]:
        parts = {"all": found["lists"], **found["list_subsets"]} if found["lists"] else {}
        for part, one in parts.items():
            yield [name, part, one["accuracy"], interval(one["ci"]), one["lists"], one["chance"], one["missing"]]
        if found["ties"] and found["list_subsets"]:
            yield [name, "ties", found["ties"]["accuracy"], interval(found["ties"]["ci"]), found["ties"]["prompts"],
                   None, found["ties"]["missing"]]  # fmt: skip
        if found["average"]:
            yield [name, MEAN, found["average"]["accuracy"], interval(found["average"]["ci"]), None, None, None]

    subsets: list[list[Any]] = []
    for name, found in both.items():
        parts = found["subsets"]
        mean = {MEAN: {**weighted_mean(list(parts.values()), [1] * len(parts)), "pairs": None}} if parts else {}
        subsets += [[name, part, one["accuracy"], interval(one["ci"]), one["pairs"]]
                    for part, one in {**parts, **mean}.items()]  # fmt: skip
    sections = [[name, part, one["accuracy"], interval(one["ci"])]
                for name, found in both.items() for part, one in found["sections"].items()]  # fmt: skip
    lists = [row for name, found in both.items() for row in listed(name, found)]
    ties = [[name, one["accuracy"], interval(one["ci"]), *(one[part] for part in PARTS_OF_TIES), one["prompts"],
             one["missing"]] for name, found in both.items() if (one := found["ties"])]  # fmt: skip
    return [
        Section("Subsets", ["model", "subset", "accuracy", "95 % interval", "pairs"], subsets),
        Section(
            "RewardBench", ["model", "section", "accuracy", "95 % interval"], sections,
            "A section weights its subsets by pairs, math-prm by the pairs of code. RewardBench's own code counts "
            "equal scores as wrong.",
        ),
        Section(
            "Best of k", ["model", "subset", "best found", "95 % interval", "lists", "chance", "no score"], lists,
            "A best completion that shares the highest score with others counts one divided by their number.",
        ),
        Section(
            "Ties", ["model", "score", "95 % interval", *PARTS_OF_TIES, "prompts", "left out"], ties,
            "RewardBench 2's score: right completions above all wrong ones, in the rows with several (tied) and with "
            "one right completion (reference), and that distance above the range of the right ones (margin), also in "
            "both rows of a prompt (margin_of_both).",
        ),
    ]  # fmt: skip


def _tables_of_styles(found: Mapping[str, Any], models: Sequence[str]) -> list[Section]:
    """Return the tables of accuracy by style of models and baselines; empty if the rows have no styles."""
    levels = ("easy", "normal", "hard")
    rows = [
        [name, part, *(f"{at[level]['accuracy']:.3f} {interval(at[level]['ci'])}" for level in levels), at["average"]]
        for name, measured in found.items() for part, at in measured["styles"].items()
    ]  # fmt: skip
    cells = [
        [name, f"style {chosen}", *accuracies]
        for name in models if found[name]["styles"]
        for chosen, accuracies in enumerate(found[name]["styles"]["all"]["matrix"], 1)
    ]  # fmt: skip
    if not rows:
        return []
    note = (
        "Easy: the chosen completion has the later style of the lists (in RM-Bench the more elaborate one). Normal: "
        "both have the same style. Hard: the rejected completion has the later style."
    )
    rejected = [f"rejected: style {number}" for number in range(1, len(cells[0]) - 1)]
    return [
        Section("Accuracy by style", ["model", "subset", *levels, "average"], rows, note),
        Section("Accuracy by pair of styles", ["model", "chosen", *rejected], cells),
    ]


def draw_reliability(models: Mapping[str, Any], path: Path) -> Path:
    """Draw accuracy against confidence for each model, and return the path."""
    figure, axis = pyplot().subplots(figsize=(5, 4.5), layout="constrained")
    axis.plot([0.5, 1], [0.5, 1], "--", color="#888888", label="calibrated")
    for name, found in models.items():
        axis.plot(*list(zip(*found["reliability"], strict=True))[:2], "o-", label=f"{name}, ECE {found['ece']:.3f}")
    axis.set_xlabel("confidence, sigmoid of the absolute margin")
    axis.set_ylabel("accuracy")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    return save_figure(figure, path, dpi=110)
