"""The policy or scores of a trained module, and their target: declared by the class, or transcribed from its paper."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_lightning.models.layout import Layout, padded_layout
from rlhf_lightning.modules.reward import RewardModule
from rlhf_lightning.training.module import AlignmentModule
from rlhf_lightning.verification import population, resting_points
from rlhf_lightning.verification.exact import rest_of
from rlhf_lightning.verification.world import EnumerableWorld


def demonstrated(world: EnumerableWorld) -> Tensor:
    """Return the policy that demonstrations are drawn from: softmax of mean win rates, shape (prompts, completions)."""
    return torch.softmax(world.problem.preference.mean(-1), -1)


def all_rows(world: EnumerableWorld) -> list[tuple[int, int]]:
    """Return the (prompt, completion) indices of every completion."""
    return [(p, i) for p in range(world.config.prompts) for i in range(len(world.completions))]


def scores_of(module: RewardModule, layout: Layout) -> Tensor:
    """Return a reward module's score of each completion, shape (completions,)."""
    outputs = module.reward_model(layout)
    return module.score_of(outputs) if module.outputs > 1 else outputs


@torch.no_grad()
def outputs_of(module: RewardModule, world: EnumerableWorld) -> Tensor:
    """Return the outputs of a reward model's head, fp64, shape (prompts, completions, outputs)."""
    outputs = module.reward_model(padded_layout(world.sequences(all_rows(world))))
    return outputs.double().view(world.config.prompts, len(world.completions), module.outputs)


def softmax_of_outputs(module: RewardModule, outputs: Tensor) -> Tensor:
    """Return the softmax of the scores of outputs (prompts, completions, outputs), or of the negated costs."""
    flat = outputs.flatten(0, 1)
    scores = module.score_of(flat) if module.outputs > 1 else flat[:, 0]
    return _softmax(module, scores.view(outputs.shape[:2]))


def _softmax(module: RewardModule, scores: Tensor) -> Tensor:
    return torch.softmax(-scores if module.lower_is_better else scores, -1)


@torch.no_grad()
def policy_of(module: AlignmentModule, world: EnumerableWorld) -> Tensor:
    """Return the probability of each completion, shape (prompts, completions).

    For a reward model it is the softmax of the scores. For costs it is the softmax of the negated costs, so that better
    completions have a higher probability.
    """
    if isinstance(module, RewardModule):
        return softmax_of_outputs(module, outputs_of(module, world))
    policy: Any = module.model
    return world.probabilities(policy.model.model.table.weight)


def judged(
    module: AlignmentModule, world: EnumerableWorld, policy: Tensor, outputs: Tensor | None = None
) -> tuple[Tensor | None, str, float]:
    """Return the target policy of a module, the source of the target, and the distance of ``policy`` from it.

    Args:
        module: module that defines the target.
        world: world of the target.
        policy: policy after training.
        outputs: head outputs of a trained reward model; None computes them from ``module``.
    """
    declared = module.target_policy(world.problem)
    if declared is not None:
        target = _softmax(module, declared) if isinstance(module, RewardModule) else declared
        return target, "declared", _distance(policy, target)
    rest = rest_of(module, world)
    if rest is not None:
        return rest, "transcription", _distance(policy, rest)
    name = type(module).__name__ if type(module).__module__.startswith("rlhf_lightning.") else ""
    # Labels contain the smoothing. Only the transcription of conservative DPO has it in its loss, as smoothing is its
    # whole method.
    smoothing = 0.0 if name == "ConservativeDPOModule" else float(getattr(module, "label_smoothing", 0.0))
    problems = [population_of(world, prompt, smoothing) for prompt in range(world.config.prompts)]
    starts = [row if name in population.MANY_MINIMA else None for row in policy.numpy()]
    resting = resting_points.rests(type(module), problems, module)
    if isinstance(module, RewardModule) and name in population.SCORES:
        found_outputs = outputs_of(module, world) if outputs is None else outputs
        return _judged_outputs(population.SCORES[name], problems, module, found_outputs)
    if name == "SFTModule":
        target = demonstrated(world)
    elif resting is not None:
        target = torch.tensor(np.array(resting))
    elif name in resting_points.COUPLED:
        return _judged_together(name, problems, module, policy)
    elif name in population.FIXED_POINTS:
        fixed = population.fixed_point(population.FIXED_POINTS[name], problems, module, starts)
        target = torch.tensor(np.array(fixed))
    elif name in population.TRANSCRIPTIONS:
        loss = population.TRANSCRIPTIONS[name]
        found = [population.minimiser(loss, p, module, start) for p, start in zip(problems, starts, strict=True)]
        target = torch.tensor(np.array([best for best, _ in found]))
        if name in population.NOT_UNIQUE:
            reached = [loss(np.log(row), p, module) for row, p in zip(policy.numpy(), problems, strict=True)]
            return target, "excess loss", max(r - least for r, (_, least) in zip(reached, found, strict=True))
    else:
        return None, "", float("nan")
    return target, "transcription", _distance(policy, target)


def _judged_outputs(
    objective: population.ScoreObjective, problems: list[population.Population], module: RewardModule, outputs: Tensor
) -> tuple[Tensor, str, float]:
    """Compare the quantity that minimisers share: less than a policy if the scale is free, more if levels count."""
    best = [population.score_minimiser(objective, problem, module) for problem in problems]
    differences = [
        np.abs(objective.identified(found) - objective.identified(wanted)).max()
        for found, wanted in zip(outputs.detach().numpy(), best, strict=True)
    ]
    return softmax_of_outputs(module, torch.tensor(np.array(best))), "transcription", float(np.max(differences))


def _judged_together(
    name: str, problems: list[population.Population], module: Any, policy: Tensor
) -> tuple[Tensor, str, float]:
    """Compare losses: minimisers of sorted values are not unique, and one start does not find all of them."""
    pairs, loss = resting_points.pairs_of(problems), resting_points.COUPLED[name]
    best = resting_points.joint_minimiser(loss, pairs, module.beta, policy.numpy())
    reached, least = (resting_points.joint_loss(name, at, pairs, module) for at in (policy.numpy(), best))
    return torch.tensor(best), "excess loss", reached - least


def population_of(world: EnumerableWorld, prompt: int, smoothing: float = 0.0) -> population.Population:
    """Return the problem of one prompt in NumPy, for the transcriptions; labels are flipped with rate ``smoothing``."""
    problem, texts = world.problem, world.completions
    parts = (problem.reference, problem.preference, problem.lengths, problem.rewards)
    reference, preference, lengths, rewards = (np.asarray(part[prompt], dtype=np.float64) for part in parts)
    preference = (1 - smoothing) * preference + smoothing * (1 - preference)
    alike = [[[a[:k] == b[:k] for k in range(1, world.config.max_new_tokens + 1)] for b in texts] for a in texts]
    safe = world.safe[prompt].numpy()
    return population.Population(reference, preference, lengths, np.array(alike, dtype=np.float64), rewards, safe)


def _distance(policy: Tensor, target: Tensor) -> float:
    return float((0.5 * (policy - target).abs().sum(-1)).max())
