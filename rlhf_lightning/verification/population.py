"""Population losses of objectives without a closed form, transcribed from their papers and minimised independently.

Written in NumPy and SciPy from the papers' formulas, in fp64. No code is shared with the losses under test. A policy is
a probability for each completion of each prompt; its log-ratio is a = log policy - log reference. In a pair loss, the
first index is preferred with probability P, and all pairs are equally likely to be drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, log_expit, log_ndtr, log_softmax, ndtr

Array = np.ndarray


class Population(NamedTuple):
    """The enumerated problem of one prompt in NumPy.

    Attributes:
        reference: probability of each completion under the reference, shape (completions,).
        preference: P, shape (completions, completions).
        lengths: completion lengths in tokens, shape (completions,).
        alike: whether two completions begin with the same k tokens, k = 1, 2, ..., shape (completions, completions, k).
        rewards: shape (completions,).
        safe: whether each completion is safe, for cost models, shape (completions,).
    """

    reference: Array
    preference: Array
    lengths: Array
    alike: Array
    rewards: Array
    safe: Array

    @property
    def wins(self) -> Array:
        """Mean win rate of each completion, counting a comparison with itself as 1/2, shape (completions,)."""
        return self.preference.mean(-1)


Loss = Callable[[Array, Population, Any], float]
"""Population loss as a function of log-probabilities (completions,), the problem, and the module with the settings."""


def minimiser(loss: Loss, problem: Population, module: Any, start: Array | None = None) -> tuple[Array, float]:
    """Return the policy that minimises a population loss, and the minimum.

    Args:
        loss: the population loss.
        problem: problem of one prompt.
        module: module with the settings of the loss.
        start: initial policy; None starts at the reference.
    """
    start = np.log(problem.reference if start is None else np.maximum(start, 1e-300))

    def objective(logits: Array) -> float:
        return loss(log_softmax(logits), problem, module)

    best = minimize(objective, start, method="L-BFGS-B", options={"maxiter": 2000, "ftol": 1e-15, "gtol": 1e-10})
    best = minimize(objective, best.x, method="BFGS", options={"maxiter": 2000, "gtol": 1e-9})
    return np.exp(log_softmax(best.x)), float(best.fun)


def _pairs(values: Array, problem: Population) -> float:
    """Return the mean over pairs of different completions, weighted by P.

    Args:
        values: ``values[i, j]`` is the value of a pair if i is preferred, shape (completions, completions).
        problem: problem of one prompt.
    """
    count = len(problem.reference)
    off_diagonal = 1.0 - np.eye(count)
    return float((problem.preference * values * off_diagonal).sum() / off_diagonal.sum() * 2)


def _a(logp: Array, problem: Population) -> Array:
    return logp - np.log(problem.reference)


def _margins(values: Array) -> Array:
    return values[:, None] - values[None, :]


def beta_dpo(logp: Array, problem: Population, module: Any) -> float:
    """2407.08639 with the population as every step: the moving mean converges to the mean, and beta to its base."""
    return _pairs(-log_expit(module.beta * _margins(_a(logp, problem))), problem)


def conservative_dpo(logp: Array, problem: Population, module: Any) -> float:
    """Mitchell 2023: labels smoothed by e."""
    x, e = module.beta * _margins(_a(logp, problem)), module.label_smoothing
    return _pairs(-(1 - e) * log_expit(x) - e * log_expit(-x), problem)


def robust_dpo(logp: Array, problem: Population, module: Any) -> float:
    """2403.00409: unbiased for labels flipped with rate e."""
    x, e = module.beta * _margins(_a(logp, problem)), module.flip_rate
    return _pairs((-(1 - e) * log_expit(x) + e * log_expit(-x)) / (1 - 2 * e), problem)


def ipo(logp: Array, problem: Population, module: Any) -> float:
    """2310.12036; log-ratios are averaged over tokens if the module's setting says so."""
    a = _a(logp, problem)
    a = a / problem.lengths if module.average else a
    return _pairs((_margins(a) - 1 / (2 * module.beta)) ** 2, problem)


def hinge(logp: Array, problem: Population, module: Any) -> float:
    """2305.10425: non-smooth, and the minimiser need not be unique."""
    return _pairs(np.maximum(0.0, 1 - module.beta * _margins(_a(logp, problem))), problem)


def exo(logp: Array, problem: Population, module: Any) -> float:
    """2402.00856: KL from the policy's preference to the label (1 - e, e)."""
    x, e = module.beta * _margins(_a(logp, problem)), module.epsilon
    kl = expit(x) * (log_expit(x) - np.log(1 - e)) + expit(-x) * (log_expit(-x) - np.log(e))
    return _pairs(kl, problem)


def nca(logp: Array, problem: Population, module: Any) -> float:
    """2402.05369 for pairs."""
    r = module.beta * _a(logp, problem)
    u, v = r[:, None], r[None, :]
    return _pairs(-log_expit(u) - 0.5 * log_expit(-u) - 0.5 * log_expit(-v), problem)


def sppo(logp: Array, problem: Population, module: Any) -> float:
    """2405.00675 with hard labels."""
    a, half = _a(logp, problem), 1 / (2 * module.beta)
    return _pairs((a[:, None] - half) ** 2 + (a[None, :] + half) ** 2, problem)


def apo_zero(logp: Array, problem: Population, module: Any) -> float:
    """2408.06266."""
    r = module.beta * _a(logp, problem)
    return _pairs(1 - expit(r[:, None]) + expit(r[None, :]), problem)


def apo_down(logp: Array, problem: Population, module: Any) -> float:
    """2408.06266."""
    r = module.beta * _a(logp, problem)
    return _pairs(expit(r[:, None]) + 1 - expit(_margins(r)), problem)


def discopop(logp: Array, problem: Population, module: Any) -> float:
    """2406.08414: logistic and exponential loss, mixed by a gate."""
    x = module.beta * _margins(_a(logp, problem))
    gate = expit(x / module.temperature)
    return _pairs((1 - gate) * -log_expit(x) + gate * np.exp(-x), problem)


def rpo(logp: Array, problem: Population, module: Any) -> float:
    """2404.19733: DPO plus the per-token log-likelihood of the chosen completion."""
    x = module.beta * _margins(_a(logp, problem))
    return _pairs(-log_expit(x) - module.alpha * (logp / problem.lengths)[:, None], problem)


def simpo(logp: Array, problem: Population, module: Any) -> float:
    """2405.14734."""
    return _pairs(-log_expit(module.beta * _margins(logp / problem.lengths) - module.gamma), problem)


def orpo(logp: Array, problem: Population, module: Any) -> float:
    """2403.07691."""
    mean = logp / problem.lengths
    odds = mean - np.log1p(-np.exp(np.minimum(mean, -1e-12)))
    return _pairs(-mean[:, None] - module.weight * log_expit(_margins(odds)), problem)


def cpo(logp: Array, problem: Population, module: Any) -> float:
    """2401.08417."""
    likelihood = module.alpha * (logp / problem.lengths)[:, None]
    return _pairs(-log_expit(module.beta * _margins(logp)) - likelihood, problem)


def ld_dpo(logp: Array, problem: Population, module: Any) -> float:
    """2409.06411: tokens beyond the length of the shorter completion are weighted by alpha.

    The log-ratio of a completion's first k tokens is computed from all completions that begin with these tokens.
    """
    policy, reference = (np.einsum("ijk,j->ik", problem.alike, p) for p in (np.exp(logp), problem.reference))
    begun = np.log(policy) - np.log(reference)
    shared = np.minimum(problem.lengths[:, None], problem.lengths[None, :]).astype(int) - 1
    first = np.take_along_axis(begun, shared, axis=1)
    weighted = module.alpha * _a(logp, problem)[:, None] + (1 - module.alpha) * first
    return _pairs(-log_expit(module.beta * (weighted - weighted.T)), problem)


def davidson(logp: Array, problem: Population, module: Any) -> float:
    """Davidson 1970, on comparisons without ties; the scores are log-probabilities."""
    d, nu = _margins(logp), 2 * module.tie_share / (1 - module.tie_share)
    return _pairs(np.log(np.exp(d / 2) + np.exp(-d / 2) + nu) - d / 2, problem)


def sft(logp: Array, problem: Population, module: Any) -> float:
    """Cross-entropy on demonstrations drawn from softmax(win rate)."""
    data = np.exp(log_softmax(problem.wins))
    return float(-(data * logp).sum())


TRANSCRIPTIONS: dict[str, Loss] = {
    "BetaDPOModule": beta_dpo,
    "ConservativeDPOModule": conservative_dpo,
    "RobustDPOModule": robust_dpo,
    "IPOModule": ipo,
    "HingeModule": hinge,
    "EXOModule": exo,
    "NCAModule": nca,
    "SPPOModule": sppo,
    "APOZeroModule": apo_zero,
    "APODownModule": apo_down,
    "DiscoPOPModule": discopop,
    "RPOModule": rpo,
    "SimPOModule": simpo,
    "ORPOModule": orpo,
    "CPOModule": cpo,
    "LDDPOModule": ld_dpo,
    "DavidsonModule": davidson,
}
"""Transcribed loss of each shipped class. User-defined classes declare ``target_policy`` instead."""


NOT_UNIQUE = ("HingeModule",)
"""Classes with flat minima: losses are compared instead of policies."""

MANY_MINIMA = ("DiscoPOPModule", "KTOModule")
"""Classes that are not convex in the policy: the search for the minimiser starts at the trained policy."""


class FixedPoint(NamedTuple):
    """An objective that compares with a statistic of its own policy; no gradient flows through the statistic.

    Attributes:
        loss: function of log-probabilities, the problem, the module and the statistic.
        statistic: function of the log-ratios of all prompts, shape (prompts, completions), and the module.
    """

    loss: Callable[[Array, Population, Any, float], float]
    statistic: Callable[[Array, Any], float]


def fixed_point(
    objective: FixedPoint, problems: list[Population], module: Any, starts: Sequence[Array | None]
) -> list[Array]:
    """Return the fixed point: each prompt's minimiser at a statistic that equals the statistic of these minimisers."""
    statistic, policies = 0.0, [problem.reference for problem in problems]
    for _ in range(60):

        def loss(logp: Array, problem: Population, module: Any, at: float = statistic) -> float:
            return objective.loss(logp, problem, module, at)

        policies = [minimiser(loss, p, module, start)[0] for p, start in zip(problems, starts, strict=True)]
        ratios = np.array([_a(np.log(q), p) for q, p in zip(policies, problems, strict=True)])
        new = objective.statistic(ratios, module)
        if abs(new - statistic) < 1e-9:
            break
        statistic, starts = new, policies
    return policies


def _judgement(good: Array, bad: Array, problem: Population) -> float:
    return float((problem.wins * good + (1 - problem.wins) * bad).mean())


def _bco(logp: Array, problem: Population, module: Any, delta: float) -> float:
    r = module.beta * _a(logp, problem) - delta
    return _judgement(-log_expit(r), -log_expit(-r), problem)


def _bco_pair(logp: Array, problem: Population, module: Any, delta: float) -> float:
    r = module.beta * _a(logp, problem) - delta
    return _pairs(-log_expit(r)[:, None] - log_expit(-r)[None, :], problem)


def _kto(logp: Array, problem: Population, module: Any, z0: float) -> float:
    x = module.beta * (_a(logp, problem) - z0)
    good, bad = module.desirable_weight * (1 - expit(x)), module.undesirable_weight * (1 - expit(-x))
    return _judgement(good, bad, problem)


FIXED_POINTS: dict[str, FixedPoint] = {
    "BCOModule": FixedPoint(_bco, lambda ratios, module: module.beta * float(ratios.mean())),
    "BCOPairModule": FixedPoint(_bco_pair, lambda ratios, module: module.beta * float(ratios.mean())),
    "KTOModule": FixedPoint(_kto, lambda ratios, module: max(0.0, float(ratios.mean()))),
}
"""2404.04656 (both) and 2402.01306: delta and z0 as fixed points."""


class ScoreObjective(NamedTuple):
    """A reward model's loss that determines more, or less, than differences of scores.

    Attributes:
        loss: population loss of the head's outputs (completions, outputs), the problem, and the module.
        identified: the quantity that all minimisers share, computed from outputs (completions, outputs).
    """

    loss: Loss
    identified: Callable[[Array], Array]


def score_minimiser(objective: ScoreObjective, problem: Population, module: Any) -> Array:
    """Return outputs (completions, outputs) that minimise a population loss; the search starts at 0."""
    shape = (len(problem.reference), module.outputs)

    def loss(outputs: Array) -> float:
        return objective.loss(outputs.reshape(shape), problem, module)

    best = np.zeros(shape).ravel()
    for method in ("L-BFGS-B", "BFGS"):
        best = minimize(loss, best, method=method, options={"maxiter": 2000, "gtol": 1e-10}).x
    return best.reshape(shape)


def cost(outputs: Array, problem: Population, module: Any) -> float:
    """2310.12773 Eq. 6: the preferred completion costs less, and exactly the safe completions have negative costs.

    ``centering`` is the term of 2312.09244.
    """
    costs = outputs[:, 0]
    signs = -log_expit(np.where(problem.safe, -1.0, 1.0) * costs)
    pairs = -log_expit(-_margins(costs)) + module.centering * (costs[:, None] + costs[None, :]) ** 2
    return _pairs(pairs + module.sign_coef * (signs[:, None] + signs[None, :]), problem)


def _thurstone_z(outputs: Array) -> Array:
    means, variances = outputs[:, 0], np.exp(outputs[:, 1])
    return _margins(means) / np.sqrt(variances[:, None] + variances[None, :])


def thurstone(outputs: Array, problem: Population, module: Any) -> float:
    """Thurstone 1927, case III: normally distributed scores with a mean and a log-variance for each completion."""
    return _pairs(-log_ndtr(_thurstone_z(outputs)), problem)


def ratings(outputs: Array, problem: Population, module: Any) -> float:
    """2311.09528: squared error of each attribute; the rating of attribute k (k = 0, 1, ...) is reward + k."""
    rated = problem.rewards[:, None] + np.arange(outputs.shape[1])
    data = np.exp(log_softmax(problem.wins))
    return float((data[:, None] * (outputs - rated) ** 2).mean(-1).sum())


SCORES: dict[str, ScoreObjective] = {
    "CostModule": ScoreObjective(cost, lambda outputs: expit(outputs[:, 0])),
    "MeanVarianceRewardModule": ScoreObjective(thurstone, lambda outputs: ndtr(_thurstone_z(outputs))),
    "AttributesRewardModule": ScoreObjective(ratings, lambda outputs: outputs),
}
"""Transcribed reward model losses. Compared are the probability of harm, the preference probabilities (means and
deviations are determined only up to a scale and a constant), and the ratings.
"""
