"""Diagnosis: describe what a class does wrong by fitting its gradient on the gradients of known mistakes.

Each known mistake is the loss of the shipped base class with one change. A mistake is reported if its gradient equals
that of the class up to a factor. Shaped rewards and advantages are diagnosed in the same way.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf_lightning.commands.objectives import objective_classes
from rlhf_lightning.errors import RlhfError
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.training.module import AlignmentModule
from rlhf_lightning.training.on_policy import OnPolicyModule
from rlhf_lightning.training.returned_loss import as_loss
from rlhf_lightning.training.user_classes import own_bases
from rlhf_lightning.types import (
    CriticValues,
    DistillationLogits,
    PolicyLogprobs,
    PreferenceLogprobs,
    RankedScores,
    Step,
    UnpairedLogprobs,
)
from rlhf_lightning.verification.advantage_mistakes import advantage_mistake, return_mistake, reward_mistake
from rlhf_lightning.verification.cases import Case, cut, some_rows
from rlhf_lightning.verification.exact import PairPopulation
from rlhf_lightning.verification.fit import FITS, OPTIMIZER, diagnose, misfit
from rlhf_lightning.verification.mistakes import Losses, is_certain, settings_of
from rlhf_lightning.verification.subject import (
    Subject,
    known_statistics,
    parameters_of,
    point_of,
)

ODD = {"beta": 0.37, "label_smoothing": 0.0, "desirable_weight": 1.3, "undesirable_weight": 0.8}
"""Settings used for the fit, at which all mistakes are distinguishable."""


RELATIVES = 2
"""Maximum number of shipped objectives, besides its base, that a class is compared with."""

LACKING = (TypeError, ValueError, AttributeError, KeyError, IndexError, NotImplementedError)
"""Errors of settings that a class does not accept, and of fields that it does not have."""


def shipped_base(kind: type[AlignmentModule]) -> type[AlignmentModule] | None:
    """Return the nearest shipped base of a class; None if there is none, or for a shipped class."""
    shipped = set(objective_classes())
    return next((base for base in kind.__mro__[1:] if base in shipped), None)


def relatives_of(kind: type[AlignmentModule]) -> list[type[AlignmentModule]]:
    """Return the shipped objectives of the same family that a class names as `target_of`, or whose own settings it has.

    A method may be written as a subclass of a more general class. It is then compared with the shipped method too.
    """
    own = {name for one in own_bases(kind) for name in parameters_of(one)} - {"self", "kwargs"}
    found = []
    for other in objective_classes():
        alike = other.batch_type is kind.batch_type and point_of(other) == point_of(kind)
        settings = parameters_of(other).keys() - {"self", "kwargs", "scorer", "beta", "kl_coef", *OPTIMIZER}
        if alike and other not in kind.__mro__ and (other is kind.target_of or (settings and settings <= own)):
            found.append(other)
    return found[:RELATIVES]


def mistakes_of(subject: Subject) -> list[str]:
    """Return descriptions of the known mistakes that fit a class."""
    base = shipped_base(subject.kind)
    if base is None or (hasattr(subject.kind, "adapter") and issubclass(base, OnPolicyModule)):
        return []
    found = [*statistic_mistakes(subject.module), *mistakes_against(subject, base)]
    if not any(map(is_certain, found)) and not hasattr(subject.kind, "adapter"):
        for other in relatives_of(subject.kind):
            certain = filter(is_certain, mistakes_against(subject, other))
            found += [f"{words} (of {other.__name__})" for words in certain]
    return list(dict.fromkeys(found))


def mistakes_against(subject: Subject, base: type[AlignmentModule]) -> list[str]:
    """Return the mistakes that turn a shipped objective into the class."""
    found: list[str] = []
    # Errors lose only descriptions, no checks: a class may lack the field that a known mistake would change.
    with contextlib.suppress(RlhfError, RuntimeError, *LACKING):
        right = Subject(base, subject.world, subject.folder, subject.settings_for(base)).fresh(moved=True)
        found = _of_rollouts(subject, right) if issubclass(base, OnPolicyModule) else _of_batches(subject, right)
    return [words for words in found if words]


def statistic_mistakes(module: Any) -> list[str]:
    """Report statistics of tokens that are divergences with the wrong sign."""
    return [
        f"the statistic {name} is minus {words}"
        for name, (words, sign) in known_statistics(module).items()
        if sign < 0 and words.startswith("KL")
    ]


def probe_input(subject: Subject, module: Any) -> Any:
    """Return an input of a module's override point at which settings, labels, margins and ratios all matter."""
    if issubclass(subject.kind, OnPolicyModule):
        return _rollout_probe(subject)[1]
    if hasattr(module, "pair_loss_sum"):
        rollout = PairPopulation(module, subject.world).rollout()
        given = module.preference_logprobs(rollout, module.pairs(rollout))
    else:
        batch = some_rows(subject)
        given = subject.seen(module, lambda: module.loss_sum(batch, Meter()))
    if given is None:
        return None
    if isinstance(given, PreferenceLogprobs):
        given = given._replace(rated_margin=torch.linspace(0.2, 1.3, len(given.target), dtype=torch.float64))
    elif isinstance(given, RankedScores):
        given = given._replace(margin=torch.linspace(0.2, 1.3, len(given.target), dtype=torch.float64))
    elif isinstance(given, UnpairedLogprobs):
        given = given._replace(reference_point=torch.tensor(0.37, dtype=torch.float64))
    # Three columns of padding, so that the width of the grid differs from every other size.
    plain = {n: p.detach() for n, p in given._asdict().items() if isinstance(p, Tensor)}
    wide = {n: pad(p, (0, 3)) for n, p in plain.items() if p.dim() == 2}
    if not hasattr(given, "extras") or isinstance(given, RankedScores):
        return given._replace(**plain)
    slots = {n: pad(p, (0, 0) * (p.dim() - 2) + (0, 3)) if p.dim() > 1 else p for n, p in given.extras.items()}
    return given._replace(**{**plain, **wide}, extras=slots)


def _rollout_probe(subject: Subject) -> tuple[Case, PolicyLogprobs]:
    """Return a rollout of every group, and the input of its policy loss after the policy has moved."""
    case = Case(subject, subject.module)
    mask = case.rollout.completion_mask
    noise = torch.randn(mask.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    old = torch.where(mask, case.rollout.old_logprobs + 0.5 * noise, 0.0)
    return case, case.logprobs(old_logprobs=old, behaviour_logprobs=old)


def value_input(subject: Subject) -> CriticValues | None:
    """Return an input of a value loss whose values have moved since the rollout, some beyond the clip range."""
    case, given = _rollout_probe(subject)
    mask, returns = case.rollout.completion_mask, case.advantages.returns
    if case.rollout.values is None or returns is None:
        return None
    width = mask.shape[1]
    old = case.rollout.values[:, :width]
    moved = torch.where(mask, old + case.rollout.old_logprobs - given.old_logprobs, 0.0).detach()
    return CriticValues(moved, old, returns[:, :width].detach(), mask)


def _of_batches(subject: Subject, right: Any) -> list[str]:
    given = probe_input(subject, right)
    if given is None:
        return []
    found = [input_mistake(given, probe_input(subject, subject.module)), *step_mistakes_of(subject, right)]

    def of(module: Any) -> Losses:
        return lambda one: subject.values(module, one)

    odd = {name: value for name, value in ODD.items() if _alike(subject.module, right, name)}
    smoothed = bool(getattr(right, "label_smoothing", 0.0))
    tried = [odd, {**odd, "label_smoothing": right.label_smoothing}] if smoothed else [odd]
    if isinstance(given, DistillationLogits) and right.beta in (0, 1):
        tried.append({})  # the setting of the class selects one of the two divergences
    for settings in tried:
        with settings_of(subject.module, **settings), settings_of(right, **settings):
            found.append(diagnose(given, of(subject.module), of(right), right))
    return found


def _alike(module: Any, right: Any, name: str) -> bool:
    return isinstance(getattr(right, name, None), float) and getattr(module, name, None) == getattr(right, name)


def input_mistake(right: Any, own: Any) -> str:
    """Describe how the input of a loss differs from that of the shipped loss; empty if they are equal."""
    if own is None or type(own) is not type(right):
        return ""
    for name in right._fields:
        wanted, given = getattr(right, name), getattr(own, name)
        if not isinstance(wanted, Tensor) or not isinstance(given, Tensor):
            continue
        label = name.replace("_", " ")
        if wanted.shape != given.shape:
            return (
                f"{label} has the shape {tuple(given.shape)} instead of {tuple(wanted.shape)}: too many or too few "
                "tokens"
            )
        if wanted.dtype == torch.bool:
            if bool((wanted != given).any()):
                return f"{label} differs: too many or too few tokens"
            continue
        if float((wanted - given).abs().max()) < 1e-9:
            continue
        for other in right._fields:
            values = getattr(right, other)
            alike = isinstance(values, Tensor) and values.shape == given.shape and values.dtype == given.dtype
            if other != name and alike and float((values - given).abs().max()) < 1e-9:
                return f"{label} is {other.replace('_', ' ')}"
        if name == "target" and bool(((given > 0) & (given < 1) & (wanted > 0) & (wanted < 1)).all()):
            factor, residual = misfit(torch.logit(given).double(), torch.logit(wanted).double())
            if residual < FITS:
                return f"the log-odds of the labels are {factor:.4g} times what they should be"
        factor, residual = misfit(given.flatten().double(), wanted.flatten().double())
        return (
            f"{label} is {factor:.4g} times what it should be"
            if residual < FITS
            else f"{label} is not what it should be"
        )
    return ""


def step_mistakes_of(subject: Subject, right: Any) -> list[str]:
    """Describe how the loss of a micro-batch and the count of a step differ from the shipped ones."""
    module = subject.module
    if not hasattr(module, "loss_sum") or hasattr(module, "pair_loss_sum"):
        return []
    batch = some_rows(subject)
    shares = []
    for size in (2, 4):
        part = cut(batch, [size])[0]
        own, theirs = (subject.gradients(one, partial(one.loss_sum, part, Meter())) for one in (module, right))
        shares.append(misfit(own, theirs))
    found = []
    if all(residual < 1e-5 for _, residual in shares):
        for words, power in (("divided", -1), ("multiplied", 1)):
            factors = [factor for factor, _ in shares]
            if abs(factors[1] / factors[0] - 2.0**power) < 1e-6:
                found.append(f"loss_sum is {words} by the rows of its micro-batch")
    even = batch._replace(weights=torch.ones_like(batch.weights))
    if subject.kind.weighs_rows:
        twice = batch._replace(weights=batch.weights**2)
        own = subject.gradients(module, partial(module.loss_sum, batch, Meter()))
        for words, other in (("are ignored", even), ("count twice", twice)):
            factor, residual = misfit(own, subject.gradients(right, partial(right.loss_sum, other, Meter())))
            if residual < 1e-7 and factor > 0:
                found.append(f"the weights of the rows {words}")
    step = Step((cut(batch, [1])[0],), 1000, 5000)
    counted, wanted = module.loss_count(step), right.loss_count(step)
    if counted != wanted:
        found.append(f"the step counts {counted:g} but all ranks and micro-batches contain {wanted:g}")
    return found


def _of_rollouts(subject: Subject, right: Any) -> list[str]:
    case, given = _rollout_probe(subject)
    found = [reward_mistake(case)]
    with contextlib.suppress(RlhfError, RuntimeError):
        found.append(advantage_mistake(case, right))
        found.append(return_mistake(case, right))
    found.append(
        diagnose(given, lambda one: subject.values(case.module, one), lambda one: subject.values(right, one), right)
    )
    values = value_input(subject) if hasattr(right, "value_loss") else None
    if values is not None:

        def of(module: Any) -> Losses:
            return lambda one: as_loss(module.value_loss(one)).values

        found.append(diagnose(values, of(case.module), of(right), right))
    return found
