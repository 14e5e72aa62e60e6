"""Test whether a policy-gradient estimator has the right mean, from the gradients of many rollouts.

Every rollout uses the module's own, unmodified code: sampler and scorer, statistics, rewards, advantages, and loss.
Only the module averages over samples. The effect of rollout statistics (a group's deviation, whitening) on the mean of
the estimator is therefore included.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from scipy.stats import f as f_distribution
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from rlhf_lightning.errors import DataError
from rlhf_lightning.training.collector import select_episodes
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.training.on_policy import OnPolicyModule
from rlhf_lightning.types import PromptBatch, Rollout
from rlhf_lightning.verification.world import EnumerableWorld

NO_VARIANCE = 1e-9
"""Fraction of the largest variance below which a direction counts as constant over all rollouts."""


def rollout_gradients(
    module: OnPolicyModule,
    world: EnumerableWorld,
    rollouts: int,
    samples: int,
    at: Tensor | None = None,
    first_episode: int = 0,
) -> Tensor:
    """Return the gradients of many independent rollouts, fp64, shape (rollouts, trained weights).

    All completions are sampled in one batch, since an episode depends only on the weights, the seed and its number.
    Rewards, advantages and losses are computed per rollout.

    Args:
        module: module with its models loaded, see ``convergence.prepare``. Its weights are restored.
        world: world whose prompts are answered, each ``samples`` times per rollout.
        rollouts: number of rollouts.
        samples: completions per prompt.
        at: flattened weights at which the gradient is taken, as in a later update of the same rollout with ratios other
            than 1; None takes the sampling weights.
        first_episode: number of the first episode.
    """
    batch = questions_of(world, rollouts, samples, first_episode)
    everything = module.collect(batch)
    size = world.config.prompts * samples
    gradients = []
    with _weights(module, at):
        for start in range(0, rollouts * size, size):
            rollout = rows_of(everything, range(start, start + size))
            advantages = module.advantages(rollout, module.shape_rewards(rollout))
            gradients.append(_gradient(module, rollout, advantages, batch))
    return torch.stack(gradients)


def questions_of(world: EnumerableWorld, rollouts: int, samples: int, first_episode: int = 0) -> PromptBatch:
    """Return the prompts of several rollouts in a row: every prompt ``samples`` times, in separate groups.

    Args:
        world: world of the prompts.
        rollouts: number of rollouts.
        samples: completions per prompt.
        first_episode: number of the first episode.
    """
    once, prompts = world.questions(samples), world.config.prompts
    return PromptBatch(
        prompts=once.prompts * rollouts,
        texts=once.texts * rollouts,
        columns={},
        episodes=torch.arange(first_episode, first_episode + rollouts * len(once.prompts)),
        group=torch.cat([once.group + prompts * number for number in range(rollouts)]),
    )


def rows_of(rollout: Rollout, rows: range) -> Rollout:
    """Select episodes of a rollout, and renumber the groups from 0."""
    chosen = select_episodes(rollout, rows)
    return chosen._replace(group=chosen.group - chosen.group.min())


def _gradient(module: OnPolicyModule, rollout: Rollout, advantages: Any, batch: PromptBatch) -> Tensor:
    """Return the gradient of one update on the whole rollout."""

    def backward(losses: Any, count: Any, meter: Any = None) -> float:
        module.zero_grad()
        for loss in losses:
            (loss() / max(count, 1)).backward()
        return 0.0

    module.update = backward  # type: ignore[method-assign]
    try:
        module.learn_minibatch(rollout, advantages, list(range(len(rollout.scores))), batch, Meter())
    finally:
        vars(module).pop("update", None)
    return parameters_to_vector([torch.zeros_like(p) if p.grad is None else p.grad for p in trained(module)]).double()


def trained(module: nn.Module) -> list[nn.Parameter]:
    """Return the trained weights, in order."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


@contextmanager
def _weights(module: nn.Module, at: Tensor | None) -> Iterator[None]:
    """Set other weights on the module within a block."""
    before = parameters_to_vector(trained(module)).detach().clone()
    try:
        if at is not None:
            vector_to_parameters(at, trained(module))
        yield
    finally:
        vector_to_parameters(before, trained(module))


class MeanTest(NamedTuple):
    """Result of Hotelling's one-sample test.

    Attributes:
        p_value: probability of a mean at least as far from the hypothesis, if the hypothesis is true.
        degrees: number of directions in which samples differ; the test covers these directions.
        unvarying: largest distance from the hypothesis in the other directions, where it must be 0, relative to the
            largest mean.
    """

    p_value: float
    degrees: int
    unvarying: float


def mean_test(samples: Tensor, mean: Tensor) -> MeanTest:
    r"""Test whether independent samples of a vector have the given mean, in all directions at once.

    The statistic is T^2 = n (m - mu)^T S^{-1} (m - mu), on the directions in which samples differ. T^2 (n - d) / (d (n
    - 1)) is F-distributed with d and n - d degrees of freedom (Hotelling 1931). Coordinates are first scaled by their
    deviation, so that the choice of directions does not depend on units.

    Args:
        samples: fp64, shape (samples, coordinates); many more samples than directions.
        mean: the hypothesis mu, shape (coordinates,).

    Raises:
        DataError: there are too few samples to find all directions in which they differ.
    """
    count, difference = len(samples), samples.mean(0) - mean
    deviation = samples.std(0)
    varies = deviation > NO_VARIANCE * deviation.max()
    unit = mean.abs().max().clamp_min(1e-300)
    still = float((difference[~varies] / unit).abs().max()) if bool((~varies).any()) else 0.0
    if not bool(varies.any()):
        return MeanTest(1.0, 0, still)
    scaled, scaled_difference = samples[:, varies] / deviation[varies], difference[varies] / deviation[varies]
    eigenvalues, directions = torch.linalg.eigh(torch.cov(scaled.T).reshape(int(varies.sum()), -1))
    along = directions.T @ scaled_difference
    kept = eigenvalues > NO_VARIANCE * eigenvalues.max()
    if bool((~kept).any()):
        still = max(still, float(along[~kept].abs().max() * deviation.max() / unit))
    degrees = int(kept.sum())
    if degrees >= count - 1:  # rank limited by the samples: further directions may exist
        raise DataError(
            "too-few-samples",
            f"{count} samples differ in {degrees} directions: a test of their mean needs more samples",
        )
    statistic = count * float((along[kept] ** 2 / eigenvalues[kept]).sum())
    ratio = statistic * (count - degrees) / (degrees * (count - 1))
    return MeanTest(float(f_distribution.sf(ratio, degrees, count - degrees)), degrees, still)
