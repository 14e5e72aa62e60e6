"""Modules trained on samples converge where their exact gradients do, within a total variation of 0.05."""

from typing import Any

import pytest
import torch
from tiny_models import fit, quiet_trainer
from torch import Tensor

from rlhf_lightning import modules
from rlhf_lightning.commands.objectives import objective_classes
from rlhf_lightning.modules import CriticFreeModule
from rlhf_lightning.types import Step
from rlhf_lightning.verification.contract import world_and_folder
from rlhf_lightning.verification.convergence import converge, descend
from rlhf_lightning.verification.targets import judged, policy_of
from rlhf_lightning.verification.world import EnumerableWorld
from verification.estimators import questions_of

ROLLOUTS, GROUPS, SAMPLES = 120, 64, 2
UNCHECKED: dict[str, Any] = {"self_check": False}  # tables have no logits for unlisted sequences
CASES: dict[str, dict[str, Any]] = {
    "CriticFreeModule": {},
    "GRPOModule": {},
    "DrGRPOModule": {},
    "DAPOModule": {"dynamic_sampling": False},
    "LitePPOModule": {},
    "GSPOModule": {},
    "CISPOModule": {},
    "RLOOModule": {},
    "ReinforcePlusPlusModule": {},
    "ReinforcePlusPlusBaselineModule": {
        "kl_coef": 1.0
    },  # in units of deviations, not rewards: with a weaker penalty it collapses
    "ReMaxModule": {},
}


def made(name: str, **settings: Any) -> Any:
    world, folder = world_and_folder()
    further = {**CASES[name], **settings}
    return getattr(modules, name)(
        world.score, init_from=folder, max_new_tokens=2, **UNCHECKED, **{"kl_coef": 0.5, **further}
    )


def test_every_critic_free_method_is_tested():
    shipped = {kind.__name__ for kind in objective_classes() if issubclass(kind, CriticFreeModule)}
    elsewhere = {"NashMDModule"}  # its rollouts depend on an opponent
    assert CASES.keys() == shipped - elsewhere


def rest_of_the_whitened_baseline(world: EnumerableWorld, kl_coef: float) -> Tensor:
    """Solve for the limit of REINFORCE++-baseline with large rollouts, transcribed from the paper.

    In this limit, whitening uses moments under the policy. The module's exact expectation weights all groups equally
    when it whitens, which changes the balance of scores and KL.
    """
    prefixes, tokens, mask = world.walks
    table = world.reference_table.clone().requires_grad_()
    reference = torch.log_softmax(world.reference_table, -1)[prefixes, tokens]
    centred = (world.rewards[:, :, None] - world.rewards[:, None, :]) / 2  # groups of two: value of the first

    def loss() -> Tensor:
        logprobs = torch.log_softmax(table, -1)[prefixes, tokens]
        p = torch.where(mask, logprobs, 0.0).sum(-1).exp().detach()
        weight = p[:, :, None] * p[:, None, :] * mask.sum(-1)[:, :, None]
        weight = weight / weight.sum()
        mean = (weight * centred).sum()
        deviation = (weight * (centred - mean) ** 2).sum().sqrt()
        advantages = (((centred - mean) / deviation) * p[:, None, :]).sum(-1)
        k2 = (logprobs - reference) ** 2 / 2
        losses = -advantages[:, :, None] * logprobs + kl_coef * k2
        return (p[:, :, None] * torch.where(mask, losses, 0.0)).sum()

    descend(loss, [table], 300, 0.1)
    return world.probabilities(table.detach())


@pytest.mark.parametrize("name", CASES)
def test_sampled_training_converges_where_exact_gradients_do(name: str):
    """The limit is the declared target, or else the result of training on the exact mean of the estimator."""
    world, _ = world_and_folder()
    target = made(name).target_policy(world.problem)
    if name == "ReinforcePlusPlusBaselineModule":
        target = rest_of_the_whitened_baseline(world, made(name).kl_coef)
    elif target is None:
        target = converge(made(name), world).policy
    module = made(name, learning_rate=0.06, lr_schedule="linear")
    size = world.config.prompts * SAMPLES * GROUPS
    batches = [questions_of(world, GROUPS, SAMPLES, size * number) for number in range(ROLLOUTS)]
    module.trainer = quiet_trainer()
    fit(module, [Step((batch,), size, 0) for batch in batches])
    reached = policy_of(module, world)
    distance = 0.5 * (reached - target).abs().sum(-1)
    start = 0.5 * (world.problem.reference - target).abs().sum(-1)
    assert float(distance.max()) < 0.05, distance
    assert float(start.max()) > 0.2, "a target that is near the start would say nothing"


def sampled(module: Any, rollouts: int, samples: int, groups: int = GROUPS) -> Tensor:
    """Train on rollouts of every prompt and return the policy."""
    world, _ = world_and_folder()
    size = world.config.prompts * samples * groups
    batches = [questions_of(world, groups, samples, size * number) for number in range(rollouts)]
    module.trainer = quiet_trainer()
    fit(module, [Step((batch,), size, 0) for batch in batches])
    return policy_of(module, world)


@pytest.mark.parametrize("mixture", [0.0, 0.5, 1.0])
def test_nash_md_converges_to_the_best_response(mixture: float):
    """Its opponent is the equilibrium policy itself for mixture 0, and the reference for mixture 1."""
    world, folder = world_and_folder()
    settings = {"temperature": 1.0, "max_new_tokens": 2, "kl_coef": 0.2, "learning_rate": 0.06, "lr_schedule": "linear"}
    settings |= UNCHECKED
    module = modules.NashMDModule(world.score, init_from=folder, mixture=mixture, **settings)
    reached = sampled(module, ROLLOUTS, 1, 2 * GROUPS)
    _, source, distance = judged(module, world, reached)
    assert source == ("transcription" if mixture == 0.5 else "declared")
    assert distance < 0.05
    start = 0.5 * (world.problem.reference - reached).abs().sum(-1)
    assert float(start.max()) > 0.1


def test_on_policy_distillation_converges_to_the_teacher(tmp_path: Any):
    world, folder = world_and_folder()
    teacher = world.write_teacher(tmp_path / "teacher")
    module = modules.OnPolicyDistillationModule(
        teacher, init_from=folder, max_new_tokens=2, learning_rate=0.06, lr_schedule="linear", **UNCHECKED
    )
    reached = sampled(module, ROLLOUTS, 1, 2 * GROUPS)
    assert float((0.5 * (reached - world.problem.teacher).abs().sum(-1)).max()) < 0.05
    assert float((0.5 * (world.problem.reference - world.problem.teacher).abs().sum(-1)).max()) > 0.1


def test_gkd_on_samples_converges_to_the_teacher(tmp_path: Any):
    world, folder = world_and_folder()
    teacher = world.write_teacher(tmp_path / "teacher")
    module = modules.GKDModule(
        teacher,
        init_from=folder,
        on_policy_fraction=1.0,
        max_new_tokens=2,
        learning_rate=0.05,
        lr_schedule="linear",
        **UNCHECKED,
    )
    module.trainer = quiet_trainer()
    batch = world.demonstrations(world.problem.reference)
    fit(module, [Step((batch,), len(batch.weights), 2 * len(batch.weights))] * ROLLOUTS)
    distance = 0.5 * (policy_of(module, world) - world.problem.teacher).abs().sum(-1)
    assert float(distance.max()) < 0.05, distance
