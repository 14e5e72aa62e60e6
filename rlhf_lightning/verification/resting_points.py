"""Stationary points of estimators without a population loss: their papers' mean updates, transcribed and solved.

A group's standardised score depends on the other members, and the sampled gradient of k2 or k3 is not the gradient of a
divergence. Such methods minimise no loss, but they have a mean update and a policy at which it is zero. Here the mean
updates are written in NumPy from the papers' formulas, in fp64, and share no code with the modules.

A policy is a table of next-token probabilities. The mean update sum_i p_i sum_t c_it grad log pi(y_it | y_i<t) is
therefore zero if c, averaged over all completions that contain a prefix, is the same for every next token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import least_squares, minimize
from scipy.special import log_expit, log_softmax

from rlhf_lightning.verification.population import Array, Population

STILL = 1e-9
"""Threshold below which a component of a mean update counts as zero."""

Coefficients = Callable[[Array, Array, Population, Any], Array]
"""Coefficient c of each token, from policy (completions,), log-ratios (completions, length), problem and module."""


def rest(coefficients: Coefficients, problem: Population, module: Any) -> Array | None:
    """Return the policy at which a mean update is zero; None if the solver finds none.

    Args:
        coefficients: coefficients of the method.
        problem: problem of one prompt, with rewards.
        module: module with the settings of the method.
    """
    reached = np.arange(problem.alike.shape[-1])[None, :] < problem.lengths[:, None]
    reference = _steps(problem.reference, problem)

    def update(logits: Array) -> Array:
        policy = np.exp(log_softmax(logits))
        ratios = np.log(_steps(policy, problem) / reference)
        weighted = np.where(reached, policy[:, None] * coefficients(policy, ratios, problem, module), 0.0)
        here, at_prefix = (
            np.einsum("ijk,jk->ik", alike, weighted) / np.einsum("ijk,j->ik", alike, policy)
            for alike in (problem.alike, _before(problem))
        )
        return np.append(np.where(reached, here - at_prefix, 0.0).ravel(), logits.mean())

    found = least_squares(update, np.log(problem.reference), xtol=1e-15, ftol=1e-15, gtol=1e-15)
    return np.exp(log_softmax(found.x)) if np.abs(found.fun).max() < STILL else None


def _before(problem: Population) -> Array:
    """Return whether two completions begin with the same k tokens, k = 0, 1, ...; cf. `Population.alike`."""
    everyone = np.ones_like(problem.alike[..., :1])
    return np.concatenate([everyone, problem.alike[..., :-1]], axis=-1)


def _steps(policy: Array, problem: Population) -> Array:
    """Return the probability of each k-th token given its prefix, shape (completions, length); 1 after the end."""
    return np.einsum("ijk,j->ik", problem.alike, policy) / np.einsum("ijk,j->ik", _before(problem), policy)


def advantages(policy: Array, rewards: Array, module: Any) -> Array:
    """Return a completion's mean advantage over all groups of two: (r - mean) / (std + epsilon), or r - mean."""
    groups = np.stack(np.broadcast_arrays(rewards[:, None], rewards[None, :]))
    centred = rewards[:, None] - groups.mean(0)
    if module.advantage_scale == "group":
        centred = centred / (groups.std(0, ddof=1 if module.scale_unbiased else 0) + module.scale_epsilon)
    return (centred * policy).sum(-1)


def kl_slope(ratios: Array, module: Any) -> Array:
    """Return the slope of a token's KL loss with log-ratio d at ratio 1; multiplied by the ratio, d(rho k) = k + k'."""
    value, slope = {
        "k1": (ratios, np.ones_like(ratios)),
        "k2": (ratios**2 / 2, ratios),
        "k3": (np.exp(-ratios) - 1 + ratios, 1 - np.exp(-ratios)),
    }[module.kl_estimator]
    return value + slope if module.kl_times_ratio else slope


def critic_free(moments: tuple[float, float]) -> Coefficients:
    """Transcribe a critic-free method from its settings: -A of each token, plus the slope of a KL loss.

    With a mean of token means, each completion has the same weight (2402.03300; at ratio 1 also 2507.18071). Otherwise
    each token has the same weight (2503.14476; at ratio 1 also 2506.13585). Whitened advantages (2501.03262) are (A -
    mean) / deviation.

    Args:
        moments: mean and deviation of the centred scores over the tokens of the population, for whitening.
    """
    mean, deviation = moments

    def coefficients(policy: Array, ratios: Array, problem: Population, module: Any) -> Array:
        rewards = problem.rewards
        if module.kl_place == "reward":
            rewards = rewards - module.kl_coef * ratios.sum(-1)
        advantage = advantages(policy, rewards, module)
        if module.whiten_advantages:
            advantage = (advantage - mean) / deviation
        if module.baseline == "leave_one_out":
            advantage = 2 * advantage
        update = -advantage[:, None] + np.zeros_like(ratios)
        if module.kl_place == "loss":
            update = update + module.kl_coef * kl_slope(ratios, module)
        by_length = module.aggregation_name == "sequence_mean_token_mean"
        return update / problem.lengths[:, None] if by_length else update

    return coefficients


def centred_moments(problems: Sequence[Population]) -> tuple[float, float]:
    """Return mean and deviation of the centred scores over all tokens of all groups of two, weighted equally."""
    values, weights = [], []
    for problem in problems:
        values.append(((problem.rewards[:, None] - problem.rewards[None, :]) / 2).ravel())
        weights.append(np.broadcast_to(problem.lengths[:, None], (len(problem.rewards),) * 2).ravel())
    value, weight = np.concatenate(values), np.concatenate(weights)
    mean = float(np.average(value, weights=weight))
    return mean, float(np.sqrt(np.average((value - mean) ** 2, weights=weight) + 1e-8))


def rests(kind: type, problems: Sequence[Population], module: Any) -> list[Array] | None:
    """Return the stationary policy of a shipped critic-free class per prompt; None if its settings are not covered."""
    if kind.__name__ not in METHODS or not kind.__module__.startswith("rlhf_lightning.") or not _transcribed(module):
        return None
    method = critic_free(centred_moments(problems))
    found = [rest(method, problem, module) for problem in problems]
    solved = [policy for policy in found if policy is not None]
    return solved if len(solved) == len(found) else None


def _transcribed(module: Any) -> bool:
    """Return whether the mean update separates by prompt at these settings, and is zero somewhere."""
    by_prompt = (
        module.sampling.temperature == 1
        and module.advantage_scale != "batch"
        and module.baseline in ("group_mean", "leave_one_out")
    )
    whitened = module.whiten_advantages and (module.kl_place == "reward" or module.advantage_scale == "group")
    every = not (module.mask_truncated or module.dynamic_sampling or module.overlong_buffer or module.entropy_coef)
    return bool(module.kl_coef) and by_prompt and not whitened and every


METHODS = frozenset(
    ("CriticFreeModule", "GRPOModule", "DrGRPOModule", "GSPOModule", "DAPOModule", "CISPOModule", "LitePPOModule",
     "RLOOModule", "ReinforcePlusPlusBaselineModule")
)  # fmt: skip
"""Classes that are fully described by their settings. A user-defined subclass may do anything else."""


# -- losses that sort all pairs of a step ------------------------------------------------------------------------------

COPIES = 3
"""Each pair is in the data 2 * COPIES times, split between its two orders by their probabilities, rounded."""


class StepPairs(NamedTuple):
    """One step: indices of prompt, chosen and rejected completion of each pair, and reference log-probabilities."""

    prompt: Array
    chosen: Array
    rejected: Array
    reference: Array

    def sides(self, values: Array) -> tuple[Array, Array]:
        """Return the values (prompts, completions) of the chosen and of the rejected completions."""
        return values[self.prompt, self.chosen], values[self.prompt, self.rejected]


JointLoss = Callable[[Array, StepPairs, float], float]
"""Loss as a function of log-probabilities (prompts, completions), the step and beta."""


def pairs_of(problems: Sequence[Population]) -> StepPairs:
    """List each pair as often as the data contains it."""
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


def joint_minimiser(loss: JointLoss, pairs: StepPairs, beta: float, start: Array) -> Array:
    """Return the policy that minimises a loss, shape (prompts, completions); the search begins at ``start``.

    Sorting makes the loss non-smooth, and a single quasi-Newton run may stop early. Each run therefore starts at the
    end of the previous run.
    """
    where = np.log(start)

    def objective(logits: Array) -> float:
        return loss(log_softmax(logits.reshape(where.shape), axis=-1), pairs, beta)

    found = where.ravel()
    for method in ("L-BFGS-B", "BFGS", "L-BFGS-B", "BFGS"):
        found = minimize(objective, found, method=method).x
    return np.exp(log_softmax(found.reshape(where.shape), axis=-1))


def joint_loss(name: str, policy: Array, pairs: StepPairs, module: Any) -> float:
    """Return the transcribed loss of a policy."""
    return COUPLED[name](np.log(policy), pairs, module.beta)


COUPLED: dict[str, JointLoss] = {"AOTModule": aot, "UnpairedAOTModule": unpaired_aot}
"""Losses that sort the pairs of a step, by objective class. Each is one loss over all prompts and not convex in the
policy. Sorted values cannot be weighted, so pairs are repeated instead.
"""
