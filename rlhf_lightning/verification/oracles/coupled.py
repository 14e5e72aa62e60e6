"""What objectives that sort a step's pairs should find: one loss of all prompts together, transcribed and minimised.

In NumPy and SciPy from the papers' formulas, in fp64, like `evaluation.targets`. Sorted values belong to no pair, so
pairs are not weighted: each is in the data as often as its label is likely, rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_expit, log_softmax

from rlhf_lightning.verification.oracles.population import Array, Population

COPIES = 3
"""A pair is in the data 2 * COPIES times, dealt to its two orders by the probability of either, rounded."""


class StepPairs(NamedTuple):
    """The step: index of prompt, chosen and rejected completion of each pair, and the reference's log-probabilities."""

    prompt: Array
    chosen: Array
    rejected: Array
    reference: Array

    def sides(self, values: Array) -> tuple[Array, Array]:
        """Values (prompts, completions) of the chosen and of the rejected completions."""
        return values[self.prompt, self.chosen], values[self.prompt, self.rejected]


Loss = Callable[[Array, StepPairs, float], float]
"""Of log-probabilities (prompts, completions), the step and beta."""


def pairs_of(problems: Sequence[Population]) -> StepPairs:
    """List each pair as often as it is in the data."""
    rows = [
        (prompt, i, j)
        for prompt, problem in enumerate(problems)
        for i in range(len(problem.reference))
        for j in range(len(problem.reference))
        if i != j
        for _ in range(round(2 * COPIES * float(problem.preference[i, j])))
    ]
    prompt, chosen, rejected = np.array(rows).T
    return StepPairs(prompt, chosen, rejected, np.log(np.array([problem.reference for problem in problems])))


def aot(logp: Array, pairs: StepPairs, beta: float) -> float:
    """2406.05882, paired: the k-th smallest margin of the policy against the k-th smallest of the reference."""
    margins = [np.sort(np.subtract(*pairs.sides(values))) for values in (logp, pairs.reference)]
    return float(-log_expit(beta * (margins[0] - margins[1])).mean())


def unpaired_aot(logp: Array, pairs: StepPairs, beta: float) -> float:
    """2406.05882, unpaired: the k-th smallest log-ratio of the chosen against the k-th smallest of the rejected."""
    chosen, rejected = pairs.sides(logp - pairs.reference)
    return float(-log_expit(beta * (np.sort(chosen) - np.sort(rejected))).mean())


def minimiser(loss: Loss, pairs: StepPairs, beta: float, start: Array) -> Array:
    """Return the policy that minimises a loss, shape (prompts, completions), looked for from ``start``.

    Sorting makes kinks, at which one run of a quasi-Newton method may stop short: each begins where the last one ended.
    """
    where = np.log(start)

    def objective(logits: Array) -> float:
        return loss(log_softmax(logits.reshape(where.shape), axis=-1), pairs, beta)

    found = where.ravel()
    for method in ("L-BFGS-B", "BFGS", "L-BFGS-B", "BFGS"):
        found = minimize(objective, found, method=method).x
    return np.exp(log_softmax(found.reshape(where.shape), axis=-1))


def value(name: str, policy: Array, pairs: StepPairs, module: Any) -> float:
    """Return the transcribed loss of a policy."""
    return LOSSES[name](np.log(policy), pairs, module.beta)


LOSSES: dict[str, Loss] = {"AOTModule": aot, "UnpairedAOTModule": unpaired_aot}
"""By the class that it judges. Neither is convex in the policy."""
