"""Over-optimisation of a scorer, measured by a known gold reward (Gao et al., arXiv 2210.10760)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.errors import DataError
from rlhf_lightning.evaluation.completions import Row, doublings, values_of
from rlhf_lightning.evaluation.policies import mean_with_interval
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


def best_of_n_points(rows: Sequence[Row], samples: int, seed: int = 0) -> dict[str, Any]:
    """Return the mean score and gold reward of best-of-n by score for n = 1, 2, 4, ..., and a fit of the gold reward.

    Args:
        rows: completions with ``score`` and ``gold``; prompts with a missing score are left out.
        samples: completions per prompt, at least 3.
        seed: seed of the intervals, which resample prompts.

    Returns:
        ``points`` with n, kl, score, gold and fit, and the fit's ``alpha``, ``beta`` and ``peak_kl``.

    Raises:
        DataError: ``no-scores``: no prompt has a score for every sample.
    """
    scores, gold = (torch.from_numpy(values_of(rows, name)).view(-1, samples) for name in ("score", "gold"))
    scored = ~scores.isnan().any(-1)
    if not scored.any():
        raise DataError("no-scores", "no prompt has a score for all of its samples: give a scorer that scores them")
    by_score, by_gold = (best_of_n_curve(scores[scored], values[scored]) for values in (scores, gold))
    kl, mean = best_of_n_kl(torch.arange(1, samples + 1)), by_gold.mean(0)
    forms = best_of_n_overoptimization, best_of_n_overoptimization_fit, best_of_n_peak
    fitted, fit = _fitted(*forms, kl.sqrt(), mean)
    points = [
        {"n": n, "kl": float(kl[n - 1]), "score": float(by_score[:, n - 1].mean()),
         "gold": mean_with_interval(by_gold[:, n - 1], seed), "fit": float(fitted[n - 1])}
        for n in doublings(samples)
    ]  # fmt: skip
    return {"points": points, **fit}


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
