"""Verification: run any objective, unmodified, through the checks that its family's contract requires."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import time
from collections.abc import Callable
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_lightning.commands.objectives import objective_classes
from rlhf_lightning.errors import ContractError, RlhfError
from rlhf_lightning.modules.distillation import GKDModule, OnPolicyDistillationModule
from rlhf_lightning.modules.online_opponents import NashMDModule
from rlhf_lightning.modules.online_preference import OnlineDPOModule
from rlhf_lightning.modules.process_reward import ProcessRewardModule
from rlhf_lightning.modules.reward import RewardModule
from rlhf_lightning.modules.self_distillation import SelfDistillationModule
from rlhf_lightning.quiet import quiet_loading
from rlhf_lightning.training.module import AlignmentModule
from rlhf_lightning.training.on_policy import OnPolicyModule
from rlhf_lightning.training.rollout import RolloutModule
from rlhf_lightning.verification.cases import Update, some_rows, step_gradient
from rlhf_lightning.verification.convergence import Convergence, converge, law_of, small_world
from rlhf_lightning.verification.diagnosis import mistakes_of, shipped_base
from rlhf_lightning.verification.distillation_checks import (
    divergence_checks,
    sampled_distillation_checks,
    self_distillation_checks,
)
from rlhf_lightning.verification.foreign_checks import foreign_checks
from rlhf_lightning.verification.mistakes import is_certain, settings_of
from rlhf_lightning.verification.offline_checks import offline_checks
from rlhf_lightning.verification.on_policy_checks import on_policy_checks
from rlhf_lightning.verification.online_checks import online_checks, opponent_check
from rlhf_lightning.verification.reward_checks import process_checks, reward_checks
from rlhf_lightning.verification.state_checks import export_check, state_checks
from rlhf_lightning.verification.subject import Check, Subject, at_least, at_most
from rlhf_lightning.verification.targets import judged
from rlhf_lightning.verification.world import EnumerableWorld

__all__ = ["Check", "Verification", "verify"]

REACHED = 1e-3
"""Largest distance at which a target counts as reached."""

ALWAYS = ("target", "convergence")
"""Checks that a class cannot declare as intentional failures."""

BY_DESIGN = (
    "gradcheck", "reference slope", "ratio one", "pull back", "clip", "own token", "agreement", "kl penalty",
    "score slot",
)  # fmt: skip
"""Checks of the form of the loss. A method that reaches its declared target may fail them by design."""


class Verification(NamedTuple):
    """Result of verifying one class.

    Attributes:
        name: name of the class.
        settings: settings the class was created with.
        checks: one result per check.
        convergence: result of training to convergence; None if it was not trained.
        control: expected reward after a short run on true labels, minus the same on uninformative labels.
        seconds: total CPU seconds.
        mistakes: descriptions of the known mistakes that fit the class.
        notes: remarks, such as checks that could not be made.
        compared_with: shipped class that another project's loss is compared with; empty for none.
    """

    name: str
    settings: dict[str, Any]
    checks: list[Check]
    convergence: Convergence | None
    control: float
    seconds: float
    mistakes: list[str] = []
    notes: list[str] = []
    compared_with: str = ""

    @property
    def failed(self) -> list[Check]:
        """Checks that failed and that the class does not declare as intended; a missing target is not among them."""
        return [check for check in self.checks if not (check.held or check.meant) and check.name != "target"]

    @property
    def has_target(self) -> bool:
        """Whether a target is known, or the class says why there is none."""
        return all(check.held or check.meant for check in self.checks if check.name == "target")

    @property
    def held(self) -> bool:
        """Whether every check passed and the class has a target or says why not."""
        return not self.failed and self.has_target


@cache
def world_and_folder() -> tuple[EnumerableWorld, str]:
    """Return the verification world and its policy folder, created once per process and deleted at its end."""
    world, folder = small_world(), tempfile.mkdtemp(prefix="rlhf_verify_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return world, world.write(Path(folder) / "policy")


def verify(
    kind: type[AlignmentModule], settings: dict[str, Any] | None = None, with_convergence: bool = True
) -> Verification:
    """Run a class through its family's contract.

    Args:
        kind: the class, any subclass of a family's module.
        settings: arguments of the class; all others get values that suit the small world.
        with_convergence: also train to convergence and compare with the target.

    Raises:
        ContractError: the class belongs to no family with a contract, or its declarations for `rlhf verify` are wrong.
        SettingError: a required setting is missing.
    """
    started = time.process_time()
    if not (issubclass(kind, RolloutModule) or hasattr(kind, "loss_sum") or kind.contract is not None):
        raise ContractError(
            "not-verifiable",
            f"{kind.__name__} has no override point of a known family: derive from a shipped module, or declare its "
            "checks as contract",
        )
    world, folder = world_and_folder()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are tiny here
    try:
        with quiet_loading():
            subject = Subject(kind, world, folder, settings)
            checks = contract_of(kind)(subject)
            if hasattr(kind, "adapter"):
                checks = [check for check in checks if check.name not in kind.adapter.left_out]
                checks += foreign_checks(subject)
            own = is_of_a_user(kind)
            checks += state_checks(subject) if own else []
            found, module = None, subject.fresh()
            if with_convergence:
                found = with_twins_target(subject, converge(module, world, steps_of(kind), judge=judge_of(subject)))
                if kind.data_columns and found.target is not None and not found.distance <= REACHED:
                    with settings_of(world, signed_columns=False):  # columns may weight pairs instead of labelling them
                        found = converge(subject.fresh(), world, steps_of(kind), judge=judge_of(subject))
            control = measured_control(subject, found)
            advice = "training on true labels must give more gold reward than training on uninformative labels"
            checks.append(at_least("control", control, 1e-4, advice))
            if found is not None:
                checks += [*target_checks(subject, found), export_check(module, world)]
            fails = any(not check.held for check in checks)
            mistakes = mistakes_of(subject) if own or fails else []
            checks += [known_mistake_check(mistakes, says_nothing(kind, found))] if own else []
            checks = with_reasons(kind, checks, found)
            notes = notes_on(subject, checks)
            done = Verification(kind.__name__, subject.settings, checks, found, control, 0.0, [], notes)
    finally:
        torch.set_num_threads(threads)
    adapter = getattr(kind, "adapter", None)
    name = adapter.base.__name__ if adapter is not None and adapter.compared else ""
    return done._replace(seconds=time.process_time() - started, mistakes=mistakes, compared_with=name)


def is_of_a_user(kind: type[AlignmentModule]) -> bool:
    """Return whether a user-defined class derives from a shipped objective and declares no contract."""
    derives = shipped_base(kind) is not None and not hasattr(kind, "adapter")
    return derives and kind.contract is None and not kind.__module__.startswith("rlhf_lightning.")


def says_nothing(kind: type[AlignmentModule], found: Convergence | None) -> bool:
    """Return whether a class misses the target that it inherits and declares no other target."""
    away = found is not None and found.target is not None and not found.distance <= REACHED
    return away and kind.target_of is None and not kind.no_target and inherits_target(kind)


def known_mistake_check(mistakes: list[str], every: bool) -> Check:
    """Check that the class is not a shipped class with a known mistake.

    Args:
        mistakes: descriptions of the mistakes that fit the class.
        every: also count mistakes that are losses of other papers. They are intended only in a class that states its
            target.
    """
    certain = [words for words in mistakes if every or is_certain(words)]
    advice = (
        "the class equals the shipped class with this mistake: correct it, or explain in means_it why it is intended"
    )
    return at_most("known mistake", len(certain), 0, advice)


def notes_on(subject: Subject, checks: list[Check]) -> list[str]:
    """Return notes that fail no check, such as the checks that could not be made."""
    absent = sorted(subject.kind.means_it.keys() - {check.name for check in checks})
    said = [f"means_it names {', '.join(absent)}: not among the checks of this class"] if absent else []
    return [*subject.notes, *said]


def contract_of(kind: type[AlignmentModule]) -> Callable[[Subject], list[Check]]:
    """Return the checks that a class declares, or those of its family."""
    if kind.contract is not None:
        return kind.contract
    if issubclass(kind, GKDModule):
        return divergence_checks
    if issubclass(kind, SelfDistillationModule):
        return self_distillation_checks
    if issubclass(kind, ProcessRewardModule):
        return process_checks
    if issubclass(kind, OnPolicyDistillationModule):
        return sampled_distillation_checks
    if issubclass(kind, OnlineDPOModule):
        return online_checks
    if issubclass(kind, NashMDModule):
        return lambda subject: [*on_policy_checks(subject), opponent_check(subject)]
    if issubclass(kind, RewardModule):
        return reward_checks
    return on_policy_checks if issubclass(kind, OnPolicyModule) else offline_checks


def steps_of(kind: type[AlignmentModule]) -> int:
    """Return the updates per round: more for online pairs with tiny weights, and for adapters, which skip L-BFGS."""
    return 300 if hasattr(kind, "adapter") else 200 if issubclass(kind, OnlineDPOModule) else 100


def measured_control(subject: Subject, found: Convergence | None = None) -> float:
    """Return how much more gold reward true labels earn than uninformative ones.

    Args:
        subject: the class under verification.
        found: result of training on true labels to convergence; None judges by a short run alone.
    """
    control = subject.short_run(False) - subject.short_run(True)
    if control >= 1e-4 or found is None:
        return control
    # An objective that is not monotone at the reference may have to be trained to convergence.
    world, steps = subject.world, steps_of(subject.kind)
    control = found.gold_after - converge(subject.fresh(), world, steps, shuffled=True).gold_after
    if control < 1e-4:  # methods that treat rewards as success rates, or that learn from the ratings of pairs
        on_policy = issubclass(subject.kind, OnPolicyModule)
        with settings_of(world, **{"rewards": world.rewards.sigmoid()} if on_policy else {"rates_pairs": True}):
            return subject.short_run(False) - subject.short_run(True)
    return control


# -- the target -------------------------------------------------------------------------------------------------------


def judge_of(subject: Subject) -> Any:
    """Return the module whose target the class is compared with: itself, or the class that ``target_of`` names."""
    named = subject.kind.target_of
    if named is None:
        return None
    return Subject(named, subject.world, subject.folder, subject.settings_for(named)).fresh()


def inherits_target(kind: type[AlignmentModule]) -> bool:
    """Return whether a user-defined class inherits the closed form of a shipped class."""
    shipped = "rlhf_lightning."
    owners = [base for base in kind.__mro__ if {"target_policy", "reaches_kl_optimum"} & vars(base).keys()]
    return not kind.__module__.startswith(shipped) and owners[0].__module__.startswith(shipped)


def probe(subject: Subject) -> Tensor:
    """Return the gradient of one small step, which identifies a class within its family; its module is used up."""
    if issubclass(subject.kind, OnPolicyModule):
        return Update(subject).gradient()
    batch = some_rows(subject)
    tokens = sum(int(mask.sum()) for mask in batch.sequences.supervised)
    return step_gradient(subject, [batch], len(batch.weights), tokens, subject.module)


def twin_of(subject: Subject) -> tuple[Subject, float] | None:
    """Return the shipped class whose gradient is the same up to a positive factor, and this factor."""
    kind = subject.kind
    if kind.contract is not None or (issubclass(kind, RolloutModule) and not issubclass(kind, OnPolicyModule)):
        return None
    own = probe(Subject(kind, subject.world, subject.folder, subject.settings))
    for other in objective_classes():
        alike = contract_of(other) is contract_of(kind) and other.batch_type is kind.batch_type
        if other is kind or not alike or not bool(own.any()):
            continue
        try:
            shipped = Subject(other, subject.world, subject.folder, subject.settings_for(other))
            theirs = probe(shipped)
        except (RlhfError, TypeError, ValueError):  # the class does not take these settings
            continue
        if theirs.shape != own.shape or not bool(theirs.any()):
            continue
        factor = float(own @ theirs / (theirs @ theirs))
        if factor > 0 and float((own - factor * theirs).norm() / own.norm()) < 1e-9:
            return shipped, factor
    return None


def with_twins_target(subject: Subject, found: Convergence) -> Convergence:
    """Compare a class that states no target with the target of a shipped class that has the same gradient."""
    kind = subject.kind
    reached = found.target is not None and found.distance <= REACHED
    silent = found.target is None or (kind.target_of is None and inherits_target(kind))
    if reached or kind.no_target or not silent:
        return found
    twin = twin_of(subject)
    if twin is None:
        return found
    shipped, factor = twin
    name = shipped.kind.__name__
    # A loss other than that of the base class may be a mistake: it is reported, but its target is not taken over.
    if not (hasattr(kind, "adapter") or shipped.kind in kind.__mro__):
        said = f"; its gradient is {factor:.4g} times that of {name}: if this is intended, derive from it"
        return found._replace(law=found.law + said)
    target, _, distance = judged(shipped.fresh(), subject.world, found.policy, found.outputs)
    if target is None:
        return found
    source = f"the target of {name}: this gradient is {factor:.4g} times that of {name}"
    return found._replace(target=target, distance=distance, source=source)


def target_checks(subject: Subject, found: Convergence) -> list[Check]:
    """Compare the converged policy with the target; a class without a target must say why."""
    kind = subject.kind
    reached = found.target is not None and found.distance <= REACHED
    rest = f"training converges to gold reward {found.gold_after:.3f}, KL {found.kl:.3f}{found.law}"
    how = (
        "override target_policy; or name a shipped class with the same target, target_of = DPOModule; or say why "
        'nothing is known, no_target = "the reason"'
    )
    if kind.no_target and not reached:
        return [at_least("target", 0, 1, rest)._replace(meant=kind.no_target)]
    if found.target is None:
        return [at_least("target", 0, 1, f"the class declares no target; {rest}: {how}")]
    if not reached and kind.target_of is None and inherits_target(kind) and found.source == "declared":
        advice = f"the target that the class inherits is {found.distance:.2g} away; {rest}: {how}"
        return [at_least("target", 0, 1, advice)]
    law = law_of(found.target, subject.world).removeprefix(",")
    advice = (
        f"the converged policy is not the target ({found.source}): gold reward {found.gold_after:.3f}, KL "
        f"{found.kl:.3f}{found.law}{f'; the target has{law}' if law else ''}"
    )
    return [
        at_least("target", 1, 1, "the policy to which training should converge is known"),
        at_most("convergence", found.distance, REACHED, advice),
    ]


def with_reasons(kind: type[AlignmentModule], checks: list[Check], found: Convergence | None = None) -> list[Check]:
    """Give failed checks the reasons in ``means_it``, if the target is reached or the class says why there is none.

    If a class reaches a target that it declares itself, the checks in `BY_DESIGN` need no reason.

    Raises:
        ContractError: ``means_it`` misspells a check, or names a check that always has to hold.
    """
    names = {check.name for check in checks}
    for name in kind.means_it:  # a check that is absent here may be made at other settings
        meant = name if name in ALWAYS else next(iter(get_close_matches(name, names - {name}, cutoff=0.8)), "")
        if meant and (name not in names or name in ALWAYS):
            raise ContractError(
                "unknown-check",
                f"{kind.__name__}.means_it names {name!r}: it must be one of {', '.join(sorted(names))}, and "
                f"{' and '.join(ALWAYS)} always count",
            )
    targets = [check for check in checks if check.name in ALWAYS]
    if not targets or not all(check.held or check.meant for check in targets):
        return checks
    reasons = dict(kind.means_it)
    owner = next((base for base in kind.__mro__ if "target_policy" in vars(base)), kind)
    if not owner.__module__.startswith("rlhf_lightning.") and found is not None and found.source == "declared":
        reasons = dict.fromkeys(BY_DESIGN, "the target that the class declares is reached") | reasons
    return [
        check._replace(meant=reasons[check.name]) if not check.held and check.name in reasons else check
        for check in checks
    ]
