"""The target in an objective's docstring is the one that its code declares and verification compares with."""

import inspect
import re

import numpy as np
import pytest
import torch

from rlhf_lightning.commands.objectives import objective_classes
from rlhf_lightning.modules import (
    AOTModule,
    GRPOModule,
    GSPOModule,
    IterativeDPOModule,
    LDDPOModule,
    LitePPOModule,
    NashMDModule,
    ReinforcePlusPlusModule,
    RobustDPOModule,
    TRDPOModule,
    XPOModule,
)
from rlhf_lightning.verification import population, resting_points
from rlhf_lightning.verification.contract import Subject, world_and_folder
from rlhf_lightning.verification.convergence import converge, expected_loss, minimise
from rlhf_lightning.verification.targets import policy_of, population_of

SHIPPED = objective_classes()


def stated_target(kind: type) -> str:
    """Return the paragraph of a class's own docstring that states its target."""
    found = re.findall(r"^Target: (.*?)(?:\n\n|\Z)", inspect.cleandoc(vars(kind).get("__doc__") or ""), re.S | re.M)
    assert len(found) == 1, f"{kind.__name__} states its target in one paragraph that begins with 'Target: '"
    return " ".join(found[0].split())


@pytest.mark.parametrize("kind", SHIPPED, ids=lambda kind: kind.__name__)
def test_docstring_and_code_declare_the_same_target(kind):
    world, folder = world_and_folder()
    module, problem = Subject(kind, world, folder).fresh(), world.problem
    if issubclass(kind, RobustDPOModule):  # closed form for labels flipped at its rate
        rate = module.flip_rate
        problem = problem._replace(preference=(1 - 2 * rate) * problem.preference + rate)
    stated, declared = stated_target(kind), module.target_policy(problem)
    if declared is not None or kind.__name__ == "SFTModule":
        assert not stated.startswith("no closed form"), stated
        return
    assert stated.startswith("no closed form; "), stated
    if kind in (XPOModule, NashMDModule):  # solved in verification.exact
        return
    if kind.__name__ in resting_points.METHODS:
        assert "where its mean update vanishes" in stated, stated
        return
    transcribed = {*population.TRANSCRIPTIONS, *population.FIXED_POINTS, *resting_points.COUPLED, *population.SCORES}
    assert kind.__name__ in transcribed and "population loss" in stated, stated


@pytest.mark.parametrize("kind", [LitePPOModule, ReinforcePlusPlusModule, LDDPOModule])
def test_exact_gradients_reach_the_target(kind):
    """Check methods whose statistics or token weights could change the target."""
    world, folder = world_and_folder()
    found = converge(Subject(kind, world, folder).fresh(), world)
    assert found.source == ("transcription" if kind is LDDPOModule else "declared")
    assert found.distance < 1e-3


def test_on_policy_methods_with_equal_gradients_converge_to_the_same_policy():
    world, folder = world_and_folder()
    ends = [converge(Subject(kind, world, folder).fresh(), world).policy for kind in (GRPOModule, GSPOModule)]
    torch.testing.assert_close(*ends, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [TRDPOModule, IterativeDPOModule])
def test_a_moving_reference_moves_the_policy_equally_each_round(kind):
    world, folder = world_and_folder()
    module = Subject(kind, world, folder).fresh()
    for moves in range(3):
        minimise(expected_loss(module, world), module, 200, 0.2)
        wanted = torch.softmax(world.problem.reference.log() + (moves + 1) * world.rewards / module.beta, -1)
        assert float((policy_of(module, world) - wanted).abs().sum(-1).max()) / 2 < 1e-3
        module.reference.follow(1.0)


def test_sorted_margin_minimisers_are_found_from_the_reference():
    world, folder = world_and_folder()
    module = Subject(AOTModule, world, folder).fresh()
    policy = converge(module, world).policy.numpy()
    pairs = resting_points.pairs_of([population_of(world, prompt) for prompt in range(world.config.prompts)])
    separate = resting_points.joint_minimiser(resting_points.aot, pairs, module.beta, world.problem.reference.numpy())
    losses = [resting_points.joint_loss("AOTModule", found, pairs, module) for found in (policy, separate)]
    assert abs(losses[0] - losses[1]) < 1e-5


def test_a_wrong_mean_update_has_another_fixed_point():
    """The solver's answer depends on the transcribed update: it does not merely return the trained policy."""
    world, folder = world_and_folder()
    module = Subject(GRPOModule, world, folder).fresh()
    problem = population_of(world, 0)
    right = resting_points.rest(resting_points.critic_free((0.0, 1.0)), problem, module)
    centred = lambda policy, ratios, problem, module: (  # noqa: E731 - the deviation left out
        (problem.rewards @ policy - problem.rewards)[:, None] / 2 + module.kl_coef * (1 - np.exp(-ratios))
    )
    wrong = resting_points.rest(centred, problem, module)
    assert right is not None and wrong is not None
    assert np.abs(right - wrong).sum() / 2 > 0.05
