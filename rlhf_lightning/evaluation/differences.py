"""Significance of differences: intervals over seeds, and paired tests over seeds, prompts and pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95


class Difference(NamedTuple):
    """A difference of two means with its 95 % interval; NaN if there are too few values."""

    mean: float
    low: float
    high: float
    p: float  # two-sided
    n: int  # number of independent pairs; for unpaired values, size of the smaller sample
    test: str  # name of the test


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return mean and Student's 95 % interval of independent values, such as seeds; NaN bounds below two values."""
    found = np.asarray(values, dtype=float)
    mean = float(found.mean()) if len(found) else math.nan
    if len(found) < 2:
        return mean, math.nan, math.nan
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(found) - 1) * found.std(ddof=1) / math.sqrt(len(found)))
    return mean, mean - half, mean + half


def seed_difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference:
    """Test the difference of means, ``second`` minus ``first``; both hold one value per seed.

    Uses the paired t-test over the shared seeds if there are at least two, otherwise Welch's t-test. Runs with the same
    seed can be paired because they share data order and initial weights.
    """
    shared = sorted(first.keys() & second.keys())
    if len(shared) >= 2:
        gaps = np.array([second[seed] - first[seed] for seed in shared])
        mean, low, high = mean_interval(gaps.tolist())
        # If all gaps are equal, their variance is 0 and the t-test would divide by 0.
        p = float(stats.ttest_1samp(gaps, 0).pvalue) if gaps.std() > 0 else (1.0 if mean == 0 else math.nan)
        return Difference(mean, low, high, p, len(shared), "paired t-test over seeds")
    a, b = np.array(list(first.values())), np.array(list(second.values()))
    mean = float(b.mean() - a.mean())
    if min(len(a), len(b)) < 2 or a.std() + b.std() == 0:
        return Difference(mean, math.nan, math.nan, math.nan, min(len(a), len(b)), "none: one seed")
    test = stats.ttest_ind(b, a, equal_var=False)
    ends = test.confidence_interval(LEVEL)
    return Difference(
        mean, float(ends.low), float(ends.high), float(test.pvalue), min(len(a), len(b)), "Welch's t-test"
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values by Holm's step-down method (1979); NaN values stay NaN and are not counted."""
    found = np.asarray(p_values, dtype=float)
    adjusted, largest = np.full(len(found), np.nan), 0.0
    order = [int(place) for place in np.argsort(found) if not np.isnan(found[place])]
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, float(found[place]) * (len(order) - rank)))
        adjusted[place] = largest
    return [float(value) for value in adjusted]


def clustered_difference(
    gaps: Sequence[float], clusters: Sequence[int] | None = None, seed: int = 0, draws: int = 10_000
) -> Difference:
    """Test a mean of paired differences: bootstrap interval by cluster, and a sign-flip permutation test.

    Args:
        gaps: second minus first on the same item; NaN if either value is missing.
        clusters: the prompt of each item; all items of a prompt are resampled, and change sign, together.
        seed: seed of bootstrap and permutations.
        draws: number of bootstrap draws, and of sign flips.
    """
    import torch

    from rlhf_lightning.functional.statistics import bootstrap_interval

    found = np.asarray(gaps, dtype=float)
    owners = np.arange(len(found)) if clusters is None else np.asarray(clusters)
    owners, found = owners[~np.isnan(found)], found[~np.isnan(found)]
    _, owners = np.unique(owners, return_inverse=True)
    count = int(owners.max()) + 1 if len(owners) else 0
    mean = float(found.mean()) if len(found) else math.nan
    if count < 2:
        return Difference(mean, math.nan, math.nan, math.nan, count, "none: one prompt")
    low, high = bootstrap_interval(torch.from_numpy(found), draws, seed, clusters=torch.from_numpy(owners))
    sums = np.bincount(owners, weights=found)
    signs = np.random.default_rng(seed).integers(0, 2, (draws, count), dtype=np.int8) * 2 - 1
    as_large = int((np.abs(signs @ sums) >= abs(sums.sum()) - 1e-12).sum())
    return Difference(mean, float(low), float(high), (as_large + 1) / (draws + 1), count, "sign-flip test over prompts")


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Return the exact two-sided p-value of McNemar's test (1947) that two classifiers are right equally often."""
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    gained, lost = int((~a & b).sum()), int((a & ~b).sum())
    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
