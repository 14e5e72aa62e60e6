"""What an objective's docstring says of its target is what its code declares and verification compares with."""

import inspect
import re

import pytest
import torch

from rlhf_lightning.commands.objectives import objective_classes
from rlhf_lightning.evaluation import targets
from rlhf_lightning.evaluation.convergence import converge
from rlhf_lightning.evaluation.verification import Subject, world_and_folder
from rlhf_lightning.modules import (
    BetaDPOModule,
    GRPOModule,
    GSPOModule,
    LDDPOModule,
    LitePPOModule,
    NashMDModule,
    ReinforcePlusPlusModule,
    RobustDPOModule,
    XPOModule,
)

SHIPPED = objective_classes()
NOWHERE_ELSE = {
    "AOTModule", "UnpairedAOTModule", "BetaDPOModule", "TRDPOModule", "IterativeDPOModule",
    "GRPOModule", "DAPOModule", "GSPOModule", "CISPOModule", "ReinforcePlusPlusBaselineModule",
}  # fmt: skip
"""Objectives that minimise no loss of a population: where they come to rest depends on steps or is a vanishing mean."""


def stated_target(kind: type) -> str:
    """The paragraph of a class's own docstring that says where it comes to rest."""
    found = re.findall(r"^Target: (.*?)(?:\n\n|\Z)", inspect.cleandoc(vars(kind).get("__doc__") or ""), re.S | re.M)
    assert len(found) == 1, f"{kind.__name__} states its target in one paragraph that begins with 'Target: '"
    return " ".join(found[0].split())


@pytest.mark.parametrize("kind", SHIPPED, ids=lambda kind: kind.__name__)
def test_the_docstring_states_the_target_that_the_code_declares(kind):
    world, folder = world_and_folder()
    module, problem = Subject(kind, world, folder).fresh(), world.problem
    if issubclass(kind, RobustDPOModule):  # closed for labels that were flipped at its rate
        rate = module.flip_rate
        problem = problem._replace(preference=(1 - 2 * rate) * problem.preference + rate)
    stated, declared = stated_target(kind), module.target_policy(problem)
    if declared is not None or kind.__name__ == "SFTModule":
        assert not stated.startswith("no closed form"), stated
        return
    assert stated.startswith("no closed form; "), stated
    if kind in (XPOModule, NashMDModule):  # found by the population's own minimiser, see evaluation.online_preference
        return
    transcribed = kind.__name__ in targets.TRANSCRIPTIONS or kind.__name__ in targets.FIXED_POINTS
    assert transcribed != (kind.__name__ in NOWHERE_ELSE)
    assert ("population loss" in stated) == (transcribed or kind.__name__ == "DiscoPOPModule"), stated


@pytest.mark.parametrize("kind", [LitePPOModule, ReinforcePlusPlusModule, LDDPOModule])
def test_exact_gradients_reach_the_target(kind):
    """Those whose statistics or token weights make it no matter of course."""
    world, folder = world_and_folder()
    found = converge(Subject(kind, world, folder).fresh(), world, steps=300)
    assert found.source == ("transcription" if kind is LDDPOModule else "declared")
    assert found.distance < 1e-3


def test_on_policy_methods_with_one_gradient_come_to_rest_at_one_place():
    world, folder = world_and_folder()
    ends = [
        converge(Subject(kind, world, folder).fresh(), world, steps=300).policy for kind in (GRPOModule, GSPOModule)
    ]
    torch.testing.assert_close(*ends, rtol=0, atol=1e-6)


def test_beta_dpo_over_the_whole_population_rests_where_dpo_does():
    world, folder = world_and_folder()
    module = Subject(BetaDPOModule, world, folder).fresh()
    policy = converge(module, world, steps=600).policy
    wanted = torch.softmax(world.problem.reference.log() + world.rewards / module.beta, -1)
    assert float((policy - wanted).abs().sum(-1).max()) / 2 < 1e-3
