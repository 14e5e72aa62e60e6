"""The contract of module state: validation leaves it alone, checkpoints and exports keep it."""

from __future__ import annotations

import ast
import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_lightning.errors import ModelError
from rlhf_lightning.models.layout import padded_layout
from rlhf_lightning.models.loading import LoadSettings
from rlhf_lightning.models.roles import load_policy
from rlhf_lightning.modules.online_preference import OnlineDPOModule
from rlhf_lightning.modules.reward import RewardModule
from rlhf_lightning.modules.self_distillation import SelfDistillationModule
from rlhf_lightning.scoring import LearnedScorer
from rlhf_lightning.training.checkpoint_state import COUNTERS
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.training.rollout import RolloutModule
from rlhf_lightning.training.user_classes import misnamed_methods, nodes_of, own_bases
from rlhf_lightning.types import Step
from rlhf_lightning.verification import online_checks
from rlhf_lightning.verification.cases import Case, some_rows
from rlhf_lightning.verification.exact import SelfTaught
from rlhf_lightning.verification.subject import Check, Subject, at_least, at_most, parameters_of
from rlhf_lightning.verification.targets import all_rows, scores_of
from rlhf_lightning.verification.world import EnumerableWorld

OF_THE_BASES = frozenset((*COUNTERS, "training", "limits", "_buffers", "_untouched"))
"""Attributes of the shipped bases that change in every step."""

State = dict[str, Any]


def state_checks(subject: Subject) -> list[Check]:
    """Return the checks of the state that a user-defined class keeps, if it changes what is learned."""
    validated, _ = moved_by(subject, validate)
    trained, module = moved_by(subject, train)
    advice = (
        f"validation changes {', '.join(validated)}, which changes training: update state in on_rollout_end, or "
        "only while self.trainer.training is true"
    )
    checks = [at_most("validation state", effect(subject, validated), 0, advice)]
    kept = after_checkpoint(subject) if trained else {}
    lost = {name: value for name, value in trained.items() if not same(value, kept[name])}
    advice = (
        f"a resumed run starts with a different {', '.join(lost)}: save it in on_save_checkpoint, and restore it in "
        "on_load_checkpoint"
    )
    checks.append(at_most("checkpoint", effect(subject, lost), 0, advice))
    held = [name for name, value in vars(module).items() if isinstance(value, Tensor) and value.grad_fn is not None]
    advice = f"{', '.join(held)} keeps the graph of a past step, and with it that step's memory: detach stored tensors"
    checks.append(at_most("state graph", len(held), 0, advice))
    unread = unread_settings(subject.kind)
    advice = f"the setting {', '.join(unread)} is never read: use it, or remove it"
    checks.append(at_most("settings read", len(unread), 0, advice))
    if own_bases(subject.kind):
        misnamed = misnamed_methods(subject.kind)
        advice = "; ".join(misnamed.values()) or "a method that overrides nothing is used in its file"
        checks.append(at_most("methods meant", len(misnamed), 0, advice))
    if getattr(module, "reference", None) is not None and not module.reference_moves:
        checks.append(reference_check(subject))
    if "kl_coef" in trained:
        checks.append(kl_coef_check(subject))
    return checks


def unread_settings(kind: type) -> list[str]:
    """Return the settings that a user-defined class stores under their names but that no code of its file reads."""
    own = own_bases(kind)
    named = {name for base in own for name in parameters_of(base)}
    taken = {name for base in kind.__mro__[len(own) :] for name in parameters_of(base)}
    nodes = nodes_of(base for base in own if parameters_of(base))
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    kept = {node.attr for node in attributes if isinstance(node.ctx, ast.Store)}
    read = {node.attr for node in attributes if isinstance(node.ctx, ast.Load)}
    handed_on = {node.arg for node in nodes if isinstance(node, ast.keyword)}
    return sorted((named - taken) & kept - read - handed_on)


# -- changes of state -------------------------------------------------------------------------------------------------


def state_of(module: Any) -> State:
    """Return a copy of all numbers and tensors of a module and of its user-defined member objects, by name."""
    found: State = {}
    for name, value in [*vars(module).items(), *module.named_buffers(recurse=False)]:
        if name in OF_THE_BASES or name.startswith("__"):
            continue
        if is_plain(value):
            found[name] = copy.deepcopy(value)
        elif getattr(type(value), "__module__", "").split(".")[0] == type(module).__module__.split(".")[0]:
            for inner, part in getattr(value, "__dict__", {}).items():
                if is_plain(part) and not type(value).__module__.startswith("rlhf_lightning."):
                    found[f"{name}.{inner}"] = copy.deepcopy(part)
    return found


def is_plain(value: Any) -> bool:
    """Return whether a value is a number, a tensor, or a collection of numbers and tensors."""
    if isinstance(value, dict):
        return all(is_plain(part) for part in value.values())
    if isinstance(value, list | tuple) or type(value).__name__ == "deque":
        return all(is_plain(part) for part in value)
    return isinstance(value, bool | int | float | np.ndarray) or (isinstance(value, Tensor) and value.is_leaf)


def same(one: Any, other: Any) -> bool:
    """Return whether two values of `state_of` are equal."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple) or type(one).__name__ == "deque":
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Tensor | np.ndarray):
        return one.shape == other.shape and bool((one == other).all())
    return bool(one == other)


def set_state(module: Any, state: State) -> None:
    """Set values of `state_of` on a module."""
    for name, value in state.items():
        holder, _, inner = name.partition(".")
        setattr(getattr(module, holder) if inner else module, inner or holder, copy.deepcopy(value))


def moved_by(subject: Subject, run: Callable[[Subject, Any], Any]) -> tuple[State, Any]:
    """Return the state that a step changes, with its new values, and the module after that step."""
    module = subject.fresh(moved=True)
    before = state_of(module)
    run(subject, module)
    after = state_of(module)
    moved = {name: after[name] for name in before if name in after and not same(before[name], after[name])}
    return moved, module


# -- steps ------------------------------------------------------------------------------------------------------------


def step_of(subject: Subject, first_episode: int = 0) -> Step[Any]:
    """Return a step of a few rows."""
    if issubclass(subject.kind, RolloutModule):
        batch: Any = subject.world.questions(2, first_episode)
        return Step((batch,), len(batch.prompts), 0)
    batch = some_rows(subject)
    return Step((batch,), len(batch.weights), 9)


def validate(subject: Subject, module: Any) -> None:
    """Run a validation step as Lightning does."""
    module.trainer.validating = True
    module.eval()
    with torch.no_grad():
        module.on_validation_epoch_start()
        module.validation_step(step_of(subject), 0)
    module.train()
    module.trainer.training = True


def train(subject: Subject, module: Any) -> dict[str, Any]:
    """Run a training step that does not change the weights; return the logged metrics."""
    module.trainer.training = True
    module.update = lambda losses, count, meter=None: float(sum(loss().detach() for loss in losses))
    try:
        return dict(module.training_step(step_of(subject), 0) or {})
    finally:
        vars(module).pop("update", None)


def after_checkpoint(subject: Subject) -> State:
    """Return the state of a module that resumes from a checkpoint after a training step."""
    module, resumed = subject.fresh(moved=True), subject.fresh(moved=True)
    train(subject, module)
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    kept = module.state_dict()  # Lightning saves the buffers
    resumed.load_state_dict({name: kept[name] for name, _ in module.named_buffers() if name in kept}, strict=False)
    resumed.on_load_checkpoint(checkpoint)
    return state_of(resumed)


def effect(subject: Subject, state: State) -> float:
    """Return how much a state changes what is learned from the same data."""
    if not state:
        return 0.0
    plain, moved = subject.fresh(moved=True), subject.fresh(moved=True)
    set_state(moved, state)
    before, after = learned(subject, plain), learned(subject, moved)
    return float((after - before).abs().max()) if before.shape == after.shape else float("inf")


def learned(subject: Subject, module: Any) -> Tensor:
    """Return what a module learns from data or samples: the gradient, or advantages and losses for rollouts."""
    if isinstance(module, OnlineDPOModule):
        rollout = online_checks.some_groups(subject, module)
        pairs = module.pairs(rollout)
        return subject.gradients(module, lambda: module.pair_loss_sum(rollout, pairs, Meter()))
    if isinstance(module, SelfDistillationModule):
        taught: Any = module
        return subject.gradients(module, SelfTaught(taught, subject.world).loss)
    if isinstance(module, RolloutModule):
        case = Case(subject, module)
        found: Tensor = case.advantages.advantages.detach()
        losses = torch.where(case.rollout.completion_mask, subject.values(module, case.logprobs()).detach(), 0.0)
        return torch.cat([found.flatten(), losses.flatten()])
    batch = step_of(subject).micro_batches[0]
    return subject.gradients(module, lambda: module.loss_sum(batch, Meter()))


def reference_check(subject: Subject) -> Check:
    """Check that training does not change the reference, unless the class declares ``reference_moves``.

    Integer settings of the class are set to 1, so that an action of every 64th step happens in every step.
    """
    module = subject.fresh(moved=True, **subject.integers_at_one)
    before = [part.detach().clone() for model in module.frozen_models() for part in model.parameters()]
    train(subject, module)
    after = [part for model in module.frozen_models() for part in model.parameters()]
    moved = sum(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
    advice = "training changes the reference, but its log-probabilities are cached: declare reference_moves = True"
    return at_most("reference moves", moved, 0, advice)


def kl_coef_check(subject: Subject) -> Check:
    """Check that an adaptive KL coefficient is larger after a rollout with large KL than after one with small KL."""
    found = []
    for kl in (1e-4, 20.0):
        module = subject.fresh(moved=True)
        measured = module.log_rollout

        def told(
            meter: Meter, *rest: Any, kl: float = kl, measured: Any = measured, **further: Any
        ) -> dict[str, float]:
            meter.forget("rollout/kl")
            meter.add("rollout/kl", torch.tensor([kl]))
            return measured(meter, *rest, **further)

        module.log_rollout = told
        train(subject, module)
        found.append(float(module.kl_coef))
    advice = "the KL coefficient must grow where the KL is above its target, and shrink below it: look at the sign"
    return at_least("adaptive kl", found[1] - found[0], 1e-12, advice)


def export_check(module: Any, world: EnumerableWorld) -> Check:
    """Check that the exported folder gives the same numbers as the trained module."""
    layout = padded_layout(world.sequences(all_rows(world)))
    unchecked = LoadSettings(self_check=False)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        module.float()
        exported = str(module.export(Path(folder) / "model"))
        if isinstance(module, RewardModule):
            trained = scores_of(module, layout) - module.reward_model.bias
            scorer = LearnedScorer(exported)
            scorer.load_beside(None, unchecked)
            residual = (scorer.score_sequences(world.sequences(all_rows(world))) - trained).abs().max()
            residual = residual / trained.abs().max().clamp_min(1)  # relative error in single precision
        else:
            trained = module.policy(layout).logprobs.sum(-1)
            try:
                residual = (load_policy(exported, unchecked)(layout).logprobs.sum(-1) - trained).abs().max()
            except ModelError as error:  # a loss without a minimum: weights overflow
                if error.code != "non-finite-weights":
                    raise
                residual = trained.new_tensor(float("inf"))
    return at_most("export", residual, 1e-5, "the exported model must give the same outputs")
