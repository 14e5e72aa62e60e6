"""Over-optimisation of a scorer, measured by a known gold reward (Gao et al., arXiv 2210.10760)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.errors import DataError
from rlhf_lightning.evaluation.completions import Row, doublings, values_of
from rlhf_lightning.evaluation.policies import mean_with_interval
from rlhf_lightning.evaluation.report import plot_text, pyplot, save_figure
from rlhf_lightning.functional.statistics import (
    best_of_n_curve,
    best_of_n_kl,
    best_of_n_overoptimization,
    best_of_n_overoptimization_fit,
    best_of_n_peak,
    rl_overoptimization,
    rl_overoptimization_fit,
    rl_peak,
)

FEWEST = 3
"""Fewest completions of a prompt: the fit of best-of-n has two coefficients."""


def best_of_n_by(scores: Sequence[float], groups: Sequence[Sequence[Row]], seed: int = 0) -> dict[str, Any]:
    """Return `best_of_n_points` by the scores of all completions, in the order of the groups."""
    found = iter(scores)
    return best_of_n_points([[{**row, "score": next(found)} for row in group] for group in groups], seed)


def best_of_n_points(groups: Sequence[Sequence[Row]], seed: int = 0) -> dict[str, Any]:
    """Return the mean score and gold reward of best-of-n by score for n = 1, 2, 4, ..., and a fit of the gold reward.

    The largest n is the smallest number of completions of a prompt.

    Args:
        groups: completions of each prompt, `FEWEST` or more, with ``score`` and ``gold``; prompts with a missing score
            are left out.
        seed: seed of the intervals, which resample prompts.

    Returns:
        ``points`` with n, kl, score, gold and fit, the number of ``prompts``, and the fit's ``alpha``, ``beta`` and
        ``peak_kl``.

    Raises:
        DataError: ``no-scores``: no prompt has a score for every sample.
    """
    pairs = [[torch.from_numpy(values_of(rows, name)) for name in ("score", "gold")] for rows in groups]
    pairs = [pair for pair in pairs if not pair[0].isnan().any()]
    if not pairs:
        raise DataError("no-scores", "no prompt has a score for all of its samples: give a scorer that scores them")
    most = min(len(score) for score, _ in pairs)
    by_score, by_gold = (
        torch.stack([best_of_n_curve(pair[0], pair[side])[:most] for pair in pairs]) for side in (0, 1)
    )
    kl, mean = best_of_n_kl(torch.arange(1, most + 1)), by_gold.mean(0)
    forms = best_of_n_overoptimization, best_of_n_overoptimization_fit, best_of_n_peak
    fitted, fit = _fitted(*forms, kl.sqrt(), mean)
    points = [
        {"n": n, "kl": float(kl[n - 1]), "score": float(by_score[:, n - 1].mean()),
         "gold": mean_with_interval(by_gold[:, n - 1], seed), "fit": float(fitted[n - 1])}
        for n in doublings(most)
    ]  # fmt: skip
    return {"points": points, "prompts": len(pairs), **fit}


def draw_best_of_n(curves: Mapping[str, Mapping[str, Any]], path: Path) -> Path:
    """Draw the gold reward of best-of-n by score with intervals and fits (dashed), and return the path.

    Args:
        curves: results of `best_of_n_points` by the name of the scorer or model.
        path: file of the figure.
    """
    figure, axis = pyplot().subplots(figsize=(6.5, 4.5), layout="constrained")
    for number, (name, curve) in enumerate(curves.items()):
        points, colour = curve["points"], f"C{number % 10}"
        n, gold = [point["n"] for point in points], [point["gold"] for point in points]
        axis.plot(n, [one["mean"] for one in gold], "o-", color=colour, label=plot_text(name), markersize=4)
        axis.fill_between(n, *zip(*(one["ci"] for one in gold), strict=True), color=colour, alpha=0.15, linewidth=0)
        axis.plot(n, [point["fit"] for point in points], "--", color=colour, linewidth=1)
    ticks = sorted({point["n"] for curve in curves.values() for point in curve["points"]})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, map(str, ticks))
    axis.set_xlabel("n (the highest score of n completions)")
    axis.set_ylabel("gold reward")
    axis.grid(alpha=0.3)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center")
    return save_figure(figure, path, dpi=110)


def policy_points(kl: Sequence[float], gold: Sequence[float]) -> dict[str, Any] | None:
    """Fit the gold reward of trained policies against their KL; None with fewer than two policies away from the first.

    Args:
        kl: mean KL of each policy from the first policy, nats; that of the first is 0.
        gold: mean gold reward of each policy.

    Returns:
        ``fit``, the fitted gold reward of each policy, and ``alpha``, ``beta`` and ``peak_kl``.
    """
    if len({round(value, 9) for value in kl[1:] if value > 0}) < 2:
        return None
    distance = torch.tensor(kl, dtype=torch.float64).clamp(min=0).sqrt()
    distance[0] = 0.0
    forms = rl_overoptimization, rl_overoptimization_fit, rl_peak
    fitted, fit = _fitted(*forms, distance, torch.tensor(gold, dtype=torch.float64))
    return {"fit": fitted.tolist(), **fit}


def _fitted(
    curve: Callable[[Tensor, Tensor, Tensor], Tensor],
    fit: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    peak: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    distance: Tensor,
    gold: Tensor,
) -> tuple[Tensor, Mapping[str, float | None]]:
    """Return the fitted gold rewards, and alpha, beta and the KL of the peak; the first point has distance 0."""
    alpha, beta = fit(distance[1:], (gold - gold[0])[1:])
    top = float(peak(alpha, beta)[0] ** 2) if alpha > 0 and beta > 0 else math.inf
    found = {"alpha": float(alpha), "beta": float(beta), "peak_kl": top if math.isfinite(top) else None}
    return gold[0] + curve(distance, alpha, beta), found
