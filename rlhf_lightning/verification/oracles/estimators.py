"""Where estimators that are no loss of a population come to rest: their papers' mean updates, transcribed and solved.

A group's standardised score depends on who is in the group, and k3 or k2 of a sample is no divergence's gradient: such
methods minimise nothing. What they do have is a mean update, here written in NumPy from the papers' formulas, in fp64,
sharing nothing with the modules, and a policy at which it is zero.

A policy is a table of next-token probabilities, so a mean update sum_i p_i sum_t c_it grad log pi(y_it | y_i<t) is zero
where c, averaged over the completions that pass a prefix, is the same whatever token comes next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.optimize import least_squares
from scipy.special import log_softmax

from rlhf_lightning.verification.oracles.population import Array, Population

STILL = 1e-9
"""Largest component of a mean update that counts as none."""

Coefficients = Callable[[Array, Array, Population, Any], Array]
"""c of each token: of policy (completions,), token log-ratios (completions, length), the problem and the module."""


def rest(coefficients: Coefficients, problem: Population, module: Any) -> Array | None:
    """Return the policy at which a mean update is zero; None where it is zero nowhere that the solver gets to.

    Args:
        coefficients: of the method.
        problem: of one prompt, with rewards.
        module: whose settings the method takes.
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
    """Whether two completions begin with the same k tokens, k = 0, 1, ...; like `Population.alike`, one step back."""
    everyone = np.ones_like(problem.alike[..., :1])
    return np.concatenate([everyone, problem.alike[..., :-1]], axis=-1)


def _steps(policy: Array, problem: Population) -> Array:
    """Probability of each completion's k-th token given those before, shape (completions, length); 1 past its end."""
    return np.einsum("ijk,j->ik", problem.alike, policy) / np.einsum("ijk,j->ik", _before(problem), policy)


def _standardised(policy: Array, problem: Population, module: Any) -> Array:
    """Mean of (r - mean_g) / (std_g + epsilon) over groups of two that a completion is in."""
    rewards = problem.rewards
    groups = np.stack(np.broadcast_arrays(rewards[:, None], rewards[None, :]))
    deviation = groups.std(0, ddof=1 if getattr(module, "unbiased", True) else 0)
    return ((rewards[:, None] - groups.mean(0)) / (deviation + getattr(module, "epsilon", 1e-4)) * policy).sum(-1)


def grpo(policy: Array, ratios: Array, problem: Population, module: Any) -> Array:
    """2402.03300 and, at ratio 1, 2507.18071: each completion counts alike; k3's slope is 1 - reference / policy."""
    advantage = _standardised(policy, problem, module)[:, None]
    return (-advantage + module.kl_coef * (1 - np.exp(-ratios))) / problem.lengths[:, None]


def dapo(policy: Array, ratios: Array, problem: Population, module: Any) -> Array:
    """2503.14476 and, at ratio 1, 2506.13585: each token counts alike."""
    return grpo(policy, ratios, problem, module) * problem.lengths[:, None]


def whitened_baseline(moments: tuple[float, float]) -> Coefficients:
    """2501.03262, Section 3: scores less their group's mean, whitened; k2's slope is the log-ratio.

    Args:
        moments: mean and deviation of the centred scores over the tokens of the population.
    """
    mean, deviation = moments

    def coefficients(policy: Array, ratios: Array, problem: Population, module: Any) -> Array:
        centred = (problem.rewards[:, None] - problem.rewards[None, :]) / 2
        advantage = ((centred - mean) / deviation * policy).sum(-1)
        return -advantage[:, None] + module.kl_coef * ratios

    return coefficients


def centred_moments(problems: Sequence[Population]) -> tuple[float, float]:
    """Mean and deviation of centred scores over the tokens of all groups of two, each group as often as any other."""
    values, weights = [], []
    for problem in problems:
        values.append(((problem.rewards[:, None] - problem.rewards[None, :]) / 2).ravel())
        weights.append(np.broadcast_to(problem.lengths[:, None], (len(problem.rewards),) * 2).ravel())
    value, weight = np.concatenate(values), np.concatenate(weights)
    mean = float(np.average(value, weights=weight))
    return mean, float(np.sqrt(np.average((value - mean) ** 2, weights=weight) + 1e-8))


def rests(name: str, problems: Sequence[Population], module: Any) -> list[Array] | None:
    """Return where a shipped method comes to rest on each prompt; None if it is none of these, or has no leash."""
    if name not in METHODS or not module.kl_coef:
        return None
    method = METHODS[name] or whitened_baseline(centred_moments(problems))
    found = [rest(method, problem, module) for problem in problems]
    solved = [policy for policy in found if policy is not None]
    return solved if len(solved) == len(found) else None


METHODS: dict[str, Coefficients | None] = {
    "GRPOModule": grpo,
    "GSPOModule": grpo,
    "DAPOModule": dapo,
    "CISPOModule": dapo,
    "ReinforcePlusPlusBaselineModule": None,
}
"""By the class whose update it is; None stands for what whitens over all prompts together."""
