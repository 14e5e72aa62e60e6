"""Where an objective ends up: a module trained in an enumerable world on exact expectations, compared with its target.

The module's own, unedited code gives every loss: fixed data are the whole population, each row weighted by how often it
is drawn; rollouts are all groups of completions there are, weighted by their probability under the policy. What is left
is optimisation without noise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from rlhf_lightning.errors import ContractError
from rlhf_lightning.models.layout import Layout
from rlhf_lightning.modules.distillation import GKDModule
from rlhf_lightning.modules.reward import RewardModule
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.training.module import AlignmentModule
from rlhf_lightning.training.rollout import RolloutModule
from rlhf_lightning.types import (
    DemonstrationBatch,
    PreferenceBatch,
    ProcessBatch,
    PromptBatch,
    RankedBatch,
    UnpairedBatch,
)
from rlhf_lightning.verification.exact import expectation_of
from rlhf_lightning.verification.resting_points import COPIES
from rlhf_lightning.verification.targets import demonstrated, judged, outputs_of, policy_of
from rlhf_lightning.verification.world import EnumerableWorld

PATH_EVERY = 5
"""Updates between two points of the path of training."""

ROUNDS = 3
STILL, SETTLED = 1e-7, 1e-6
"""Largest slope at rest: of a fixed function, and of losses that follow the samples."""


class Convergence(NamedTuple):
    """Where training came to rest.

    Attributes:
        policy: probability of each completion, shape (prompts, completions); for a reward model the softmax of its
            scores, or of minus its costs.
        target: what it should be; None where nothing says so.
        source: where the target comes from: "declared" by the class, or a "transcription" of its paper.
        distance: largest total variation distance over prompts; where minimisers are not unique, how far the loss is
            above its minimum instead; for `population.SCORES` the largest difference of what minimisers share; NaN
            without a target.
        gold_before: expected reward of the reference.
        gold_after: expected reward of the policy.
        kl: KL(policy || reference), nats.
        seconds: of training.
        path: (update, gold reward, KL) along the way.
        law: the rule of rewards and lengths that the policy at rest follows, in words; empty where it follows none.
        outputs: what the head of a reward model returns, shape (prompts, completions, outputs); None for a policy.
    """

    policy: Tensor
    target: Tensor | None
    source: str
    distance: float
    gold_before: float
    gold_after: float
    kl: float
    seconds: float
    path: tuple[tuple[int, float, float], ...] = ()
    law: str = ""
    outputs: Tensor | None = None


def small_world(seed: int = 0) -> EnumerableWorld:
    """The world that objectives are verified in: 2 prompts, 3 tokens, 2 long; 7 completions, 84 labelled pairs."""
    return EnumerableWorld(prompts=2, tokens=3, max_new_tokens=2, seed=seed)


def quiet_trainer() -> Trainer:
    """Return a trainer that only answers what modules ask of one."""
    return Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, barebones=False, max_epochs=1,
    )  # fmt: skip


def converge(
    module: AlignmentModule,
    world: EnumerableWorld,
    steps: int = 100,
    learning_rate: float = 0.2,
    shuffled: bool = False,
    judge: AlignmentModule | None = None,
) -> Convergence:
    """Train a module to rest on exact expectations and compare with its target.

    Args:
        module: made with ``init_from`` the world's folder; trained in place, in fp64.
        world: the world of that folder.
        steps: updates of a round; the learning rate falls to 0 along a cosine.
        learning_rate: of Adam at the start.
        shuffled: take labels or scores that say nothing (all equally likely), as a control.
        judge: module whose target it is compared with; None takes its own.

    Raises:
        TypeError: no population is known for the batch that the module takes.
    """
    started = time.perf_counter()
    prepare(module)
    path: list[tuple[int, float, float]] = []

    def watch(step: int) -> None:
        if step % PATH_EVERY == 0:
            now = policy_of(module, world)
            path.append((step, world.expected_reward(now), world.kl(now)))

    minimise(expected_loss(module, world, shuffled), module, steps, learning_rate, watch)
    policy = policy_of(module, world)
    seconds = time.perf_counter() - started
    outputs = outputs_of(module, world) if isinstance(module, RewardModule) else None
    target, source, distance = judged(module if judge is None else judge, world, policy, outputs)
    golds = (world.expected_reward(world.problem.reference), world.expected_reward(policy))
    kl, law = world.kl(policy), law_of(policy, world)
    path.append((steps, golds[1], kl))
    return Convergence(policy, target, source, distance, *golds, kl, seconds, tuple(path), law, outputs)


def law_of(policy: Tensor, world: EnumerableWorld) -> str:
    """Say which rule of rewards and lengths a policy follows; empty where it follows neither."""
    if not bool(policy.isfinite().all()):
        return ", and training diverged: its scores or probabilities are not finite"
    ratio = (policy.clamp_min(1e-300) / world.problem.reference).log().double()
    lengths = world.problem.lengths.double()
    centred = [part - part.mean(-1, keepdim=True) for part in (ratio, world.rewards, lengths)]
    wanted, rewards, by_length = (part.flatten() for part in centred)
    for parts, words in (((rewards,), "{0:.4g} reward"), ((rewards, by_length), "{0:.4g} reward {1:+.4g} length")):
        matrix = torch.stack(parts, -1)
        shares = torch.linalg.lstsq(matrix, wanted.unsqueeze(-1)).solution.squeeze(-1)
        if float((matrix @ shares - wanted).norm()) < 1e-3 * float(wanted.norm()):
            return f", log policy/reference = {words.format(*shares.tolist())} + constant"
    return ""


def prepare(module: AlignmentModule) -> AlignmentModule:
    """Load a module's models in fp64 and give it a trainer to ask."""
    module.trainer = quiet_trainer()
    module.load_settings = replace(module.load_settings, self_check=False)  # a table has too few tokens for it
    module.configure_model()
    module.train()
    module.double()
    for model in module.frozen_models():
        model.double()
    vars(module)["lay_out"] = remembered(module.lay_out)
    return module


def remembered(lay_out: Callable[[Any], Layout]) -> Callable[[Any], Layout]:
    """Return a function that lays out the same sequences once: a population is the same in every update."""
    kept: dict[int, tuple[Any, Layout]] = {}

    def of(sequences: Any) -> Layout:
        found = kept.get(id(sequences))
        if found is None:
            if len(kept) > 8:
                kept.pop(next(iter(kept)))
            found = kept[id(sequences)] = (sequences, lay_out(sequences))
        return found[1]

    return of


def minimise(
    loss: Callable[[], Tensor],
    module: AlignmentModule,
    steps: int,
    learning_rate: float,
    watch: Callable[[int], None] = lambda step: None,
) -> None:
    """Run rounds of Adam until the loss is at rest, each with a quarter of the learning rate of the one before.

    Where the loss is a fixed function, L-BFGS follows each round. Losses of samples, or with statistics of the step in
    them, are left to Adam.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    shares = hasattr(module, "adapter")  # a mean of another project: its gradient is exact, and no row has a value
    fixed = not (isinstance(module, RolloutModule | GKDModule) or module.batch_coupled or shares)
    still = STILL if fixed else SETTLED
    for place in range(ROUNDS * (2 if module.batch_coupled else 1)):  # sorting makes kinks
        descend(
            loss, parameters, steps, learning_rate / 4 ** (place % ROUNDS), watch if place == 0 else lambda step: None
        )
        left = steepest(parameters)
        if fixed and left >= still:
            before = [parameter.detach().clone() for parameter in parameters]
            finish(loss, parameters)
            fixed = steepest(parameters) < left / 10
            if not fixed:  # a weight without gradient, say: it goes where the value is lower, not where the slope is 0
                for parameter, value in zip(parameters, before, strict=True):
                    parameter.data.copy_(value)
                continue
            left = steepest(parameters)
        if left < still:
            return


def steepest(parameters: list[Any]) -> float:
    """Return the largest slope by a weight."""
    return max((float(p.grad.abs().max()) for p in parameters if p.grad is not None), default=0.0)


def finish(loss: Callable[[], Tensor], parameters: list[Any]) -> None:
    """Run L-BFGS on a fixed function."""
    finisher = torch.optim.LBFGS(
        parameters,
        max_iter=250,
        history_size=50,
        tolerance_grad=1e-10,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        finisher.zero_grad()
        value = loss()
        if value.requires_grad:
            value.backward()
        return value

    finisher.step(closure)


def descend(
    loss: Callable[[], Tensor],
    parameters: list[Any],
    steps: int,
    learning_rate: float,
    watch: Callable[[int], None] = lambda step: None,
) -> None:
    """Run Adam on a function without noise, its learning rate falling to 0 along a cosine."""
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, betas=(0.9, 0.99), eps=1e-12)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        watch(step)
        optimizer.zero_grad()
        value = loss()
        if value.requires_grad:  # labels that say nothing may leave nothing to learn
            value.backward()
        optimizer.step()
        schedule.step()


def expected_loss(module: AlignmentModule, world: EnumerableWorld, shuffled: bool = False) -> Callable[[], Tensor]:
    """Return the module's loss over its population as a function of its weights."""
    if hasattr(module, "expected_loss"):
        declared: Callable[[], Tensor] = module.expected_loss(world, shuffled)
        return declared
    if shuffled and module.teacher_name is not None:
        say_nothing(module, world)
    if isinstance(module, GKDModule):
        return expected_divergence(module, world)
    if isinstance(module, RolloutModule):
        return expectation_of(module)(module, world, shuffled).loss
    kind = module.batch_type
    if kind is PromptBatch or not hasattr(module, "loss_sum"):
        raise ContractError(
            "not-verifiable", f"{type(module).__name__} overrides how it samples: its expectation cannot be enumerated"
        )
    copies = None if module.weighs_rows else COPIES
    batches: dict[type, Callable[[], Any]] = {
        DemonstrationBatch: lambda: world.demonstrations(demonstrated(world)),
        PreferenceBatch: lambda: world.preferences(copies),
        RankedBatch: world.rankings,
        ProcessBatch: world.judged_steps,
        UnpairedBatch: world.judgements,
    }
    batch = with_columns(batches[kind](), module.data_columns, world, informative=not shuffled)
    if shuffled and copies is not None:
        batch = with_columns(world.preferences(copies, informative=False), module.data_columns, world, False)
    elif shuffled and kind is ProcessBatch:
        batch = batch._replace(labels=tuple(torch.full_like(labels, 0.5) for labels in batch.labels))
    elif shuffled:
        batch = batch._replace(weights=torch.full_like(batch.weights, float(batch.weights.mean())))
    loss_sum: Any = module.loss_sum
    return lambda: loss_sum(batch, Meter()) / len(batch.weights)


def expected_divergence(module: GKDModule, world: EnumerableWorld) -> Callable[[], Tensor]:
    """Return the loss over demonstrations and over the student's samples, weighted by how often each is learned from.

    The samples are drawn from the student of the moment, and no gradient goes through that.
    """
    data = world.demonstrations(demonstrated(world))
    student: Any = module.policy

    def loss() -> Tensor:
        table = student.model.model.table.weight.detach()
        sampled = world.demonstrations(world.probabilities(table / module.sampling.temperature))
        on_data, on_samples = (module.loss_sum(batch, Meter()) / len(data.weights) for batch in (data, sampled))
        return (1 - module.on_policy_fraction) * on_data + module.on_policy_fraction * on_samples

    return loss


def with_columns(batch: Any, names: Sequence[str], world: EnumerableWorld, informative: bool = True) -> Any:
    """Return a batch with the columns that an objective declares: the reward of each row's completion in the first.

    Of pairs and groups it is the reward of the first completion less that of the last; further columns hold it plus 1,
    plus 2 and so on. Uninformative columns hold 0. The columns in `SAFETY` say instead whether a completion is safe, 0
    or 1; uninformative ones hold 0.5.
    """
    if not names:
        return batch
    sequences, count = batch.sequences, len(batch.weights)

    def sides_of(table: Tensor) -> Tensor:
        values = world.values_of(sequences, table)
        return values.view(-1, count) if isinstance(batch, PreferenceBatch) else values.view(count, -1).T

    sides, safe = sides_of(world.rewards), sides_of(world.safe.double())
    rewards = sides[0] - sides[-1] if len(sides) > 1 else sides[0]
    rewards = rewards if world.signed_columns or len(sides) < 2 else rewards.abs()
    extras = dict(batch.extras)
    for place, name in enumerate(names):
        if name in SAFETY:
            labels = safe[SAFETY[name]]
            extras[name] = labels if informative else torch.full_like(labels, 0.5)
        else:
            extras[name] = (rewards if informative else torch.zeros_like(rewards)) + place
    return batch._replace(extras=extras)


SAFETY = {"chosen_safe": 0, "rejected_safe": -1}
"""Columns of safety labels, by the place of the completion in its pair."""


@torch.no_grad()
def say_nothing(module: Any, world: EnumerableWorld) -> None:
    """Let a module's teacher say what the reference says, from which nothing can be learned."""
    table = module.teacher.model.model.model.table.weight
    table.copy_(world.reference_table.to(table))
