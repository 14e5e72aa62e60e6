"""Whether a policy-gradient estimator has the mean that it should: gradients of many rollouts, a test of their mean.

Every rollout goes through the module's own, unedited code: its sampler and scorer, its statistics, its rewards and
advantages, its loss. Nothing is averaged but what the module itself averages, so that all that a rollout's statistics
do to the mean of the estimator (a group's deviation, whitening) is in it.
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
"""Share of the largest variance below which a direction counts as one in which all rollouts agree."""


def rollout_gradients(
    module: OnPolicyModule,
    world: EnumerableWorld,
    rollouts: int,
    samples: int,
    at: Tensor | None = None,
    first_episode: int = 0,
) -> Tensor:
    """Return the gradient of each of many independent rollouts, fp64, shape (rollouts, trained weights).

    All completions are drawn side by side, since an episode's is a function of the weights, the seed and its number
    alone; rewards, advantages and losses are taken rollout by rollout.

    Args:
        module: with its models loaded, see ``convergence.prepare``. Its weights are left as they were.
        world: whose prompts are answered, each ``samples`` times in a rollout.
        rollouts: number of rollouts.
        samples: completions of each prompt.
        at: weights to take the gradient at, flattened: those of a later update from the same rollout, its ratios no
            longer 1; None takes the weights that sampled.
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
        world: whose prompts they are.
        rollouts: how often.
        samples: completions of each prompt.
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
    """Return some episodes of a rollout as a rollout of their own; groups are numbered from 0."""
    chosen = select_episodes(rollout, rows)
    return chosen._replace(group=chosen.group - chosen.group.min())


def _gradient(module: OnPolicyModule, rollout: Rollout, advantages: Any, batch: PromptBatch) -> Tensor:
    """Return the gradient that one update on the whole rollout would take its step by."""

    def backward(losses: Any, count: float) -> float:
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
    """Return the weights that training changes, in their order."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


@contextmanager
def _weights(module: nn.Module, at: Tensor | None) -> Iterator[None]:
    """Give the module other weights while the block runs."""
    before = parameters_to_vector(trained(module)).detach().clone()
    try:
        if at is not None:
            vector_to_parameters(at, trained(module))
        yield
    finally:
        vector_to_parameters(before, trained(module))


class MeanTest(NamedTuple):
    """Hotelling's one-sample test.

    Attributes:
        p_value: probability of means as far away or further, were the hypothesis true.
        degrees: directions in which samples differ: the test is over these.
        unvarying: largest distance from the hypothesis in the other directions, where it must be 0, in units of the
            largest mean.
    """

    p_value: float
    degrees: int
    unvarying: float


def mean_test(samples: Tensor, mean: Tensor) -> MeanTest:
    r"""Test whether independent samples of a vector have the given mean, in all directions at once.

    T^2 = n (m - mu)^T S^{-1} (m - mu), on the directions in which samples differ; T^2 (n - d) / (d (n - 1)) is
    F-distributed with d and n - d degrees of freedom (Hotelling 1931). Coordinates are scaled by their deviation first,
    so that units have no say in which directions count.

    Args:
        samples: fp64, shape (samples, coordinates); clearly more samples than directions.
        mean: the hypothesis mu, shape (coordinates,).

    Raises:
        DataError: the samples are too few to show all directions in which they differ.
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
    if degrees >= count - 1:  # no more directions can be seen in so few: others may be hidden
        raise DataError(
            "too-few-samples",
            f"{count} samples differ in {degrees} directions: a test of their mean needs more samples",
        )
    statistic = count * float((along[kept] ** 2 / eigenvalues[kept]).sum())
    ratio = statistic * (count - degrees) / (degrees * (count - 1))
    return MeanTest(float(f_distribution.sf(ratio, degrees, count - degrees)), degrees, still)
