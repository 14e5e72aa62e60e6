"""Verification: any objective, unedited, through the contract that its family has to keep."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rlhf_lightning.errors import ContractError
from rlhf_lightning.models.causal_lm import load_policy
from rlhf_lightning.modules.distillation import GKDModule, OnPolicyDistillationModule
from rlhf_lightning.modules.online_opponents import NashMDModule
from rlhf_lightning.modules.online_preference import OnlineDPOModule
from rlhf_lightning.modules.process_reward import ProcessRewardModule
from rlhf_lightning.training.module import AlignmentModule
from rlhf_lightning.training.on_policy import OnPolicyModule
from rlhf_lightning.training.rollout import RolloutModule
from rlhf_lightning.verification.checks.distillation import divergence_checks, sampled_distillation_checks
from rlhf_lightning.verification.checks.offline import offline_checks
from rlhf_lightning.verification.checks.on_policy import on_policy_checks
from rlhf_lightning.verification.checks.online_preference import online_checks, opponent_check
from rlhf_lightning.verification.checks.process import process_checks
from rlhf_lightning.verification.checks.subject import Check, Subject, at_least, at_most
from rlhf_lightning.verification.convergence import Convergence, converge, small_world
from rlhf_lightning.verification.world import EnumerableWorld

__all__ = ["Check", "Verification", "verify"]


class Verification(NamedTuple):
    """What became of a class.

    Attributes:
        name: of the class.
        settings: that it was made with.
        checks: one by one.
        convergence: where it came to rest.
        control: expected reward after a short run on true labels less that on labels that say nothing.
        seconds: of everything.
    """

    name: str
    settings: dict[str, Any]
    checks: list[Check]
    convergence: Convergence | None
    control: float
    seconds: float

    @property
    def held(self) -> bool:
        """Whether every check held."""
        return all(check.held for check in self.checks)


@cache
def world_and_folder() -> tuple[EnumerableWorld, str]:
    """The world of verification and its policy's folder, written once a process."""
    world = small_world()
    return world, world.write(Path(tempfile.mkdtemp(prefix="rlhf_verify_")) / "policy")


def verify(
    kind: type[AlignmentModule], settings: dict[str, Any] | None = None, with_convergence: bool = True
) -> Verification:
    """Run a class through its family's contract.

    Args:
        kind: the class, any subclass of a family's module.
        settings: arguments of the class; what they leave out gets values that the small world can follow.
        with_convergence: also train it to rest and compare with its target.

    Raises:
        ContractError: the class belongs to no family that has a contract.
    """
    started = time.perf_counter()
    world, folder = world_and_folder()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are tiny here
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            subject = Subject(kind, world, folder, settings)
            on_policy = issubclass(kind, RolloutModule)
            if not on_policy and not hasattr(kind, "loss_sum"):
                raise ContractError(
                    "not-verifiable",
                    f"{kind.__name__} has no override point of a known family: there is no contract to verify",
                )
            checks = contract_of(kind)(subject)
            control = subject.short_run(False) - subject.short_run(True)
            if control < 1e-4:  # an objective that is not monotone at the reference may need to come to rest
                ends = (converge(subject.fresh(), world, 300, shuffled=shuffled) for shuffled in (False, True))
                control = next(ends).gold_after - next(ends).gold_after
            checks.append(
                at_least(
                    "control", control, 1e-4, "true labels must earn more gold reward than labels that say nothing"
                )
            )
            found = None
            if with_convergence:
                module = subject.fresh()
                # A rare pair counts by the product of two small chances, and takes its time.
                found = converge(module, world, steps=600 if issubclass(kind, OnlineDPOModule) else 300)
                if found.target is not None:
                    checks.append(
                        at_most(
                            "convergence",
                            found.distance,
                            1e-3,
                            f"the policy it comes to rest at is not its target "
                            f"({found.source}); it earns {found.gold_after:.3f} at KL {found.kl:.3f}",
                        )
                    )
                checks.append(export_check(module, world))
    finally:
        torch.set_num_threads(threads)
    return Verification(kind.__name__, subject.settings, checks, found, control, time.perf_counter() - started)


def contract_of(kind: type[AlignmentModule]) -> Callable[[Subject], list[Check]]:
    """Return the checks of a class's family."""
    if issubclass(kind, GKDModule):
        return divergence_checks
    if issubclass(kind, ProcessRewardModule):
        return process_checks
    if issubclass(kind, OnPolicyDistillationModule):
        return sampled_distillation_checks
    if issubclass(kind, OnlineDPOModule):
        return online_checks
    if issubclass(kind, NashMDModule):
        return lambda subject: [*on_policy_checks(subject), opponent_check(subject)]
    return on_policy_checks if issubclass(kind, OnPolicyModule) else offline_checks


def export_check(module: Any, world: EnumerableWorld) -> Check:
    """What is handed over is what was trained."""
    from rlhf_lightning.models.layout import padded_layout
    from rlhf_lightning.modules.reward import RewardModule
    from rlhf_lightning.scoring import LearnedScorer

    rows = [(prompt, index) for prompt in range(world.config.prompts) for index in range(len(world.completions))]
    layout = padded_layout(world.sequences(rows))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        module.float()
        exported = str(module.export(Path(folder) / "model"))
        if isinstance(module, RewardModule):
            trained = module.reward_model(layout) - module.reward_model.bias
            apart = (LearnedScorer(exported).score_sequences(world.sequences(rows)) - trained).abs().max()
        else:
            trained = module.policy(layout).logprobs.sum(-1)
            apart = (load_policy(exported)(layout).logprobs.sum(-1) - trained).abs().max()
    return at_most("export", apart, 1e-5, "the exported folder must give the same numbers")
