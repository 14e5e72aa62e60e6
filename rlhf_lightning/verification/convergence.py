"""Convergence: train a module in an enumerable world on exact expectations, and compare the result with its target.

The module's own, unmodified code computes every loss. Fixed data are the whole population, each row weighted by its
probability. Rollouts contain all groups of completions, weighted by their probability under the policy. The
optimisation is therefore noise-free.
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
"""Updates between two recorded points of the training path."""

ROUNDS = 3
STILL, SETTLED = 1e-7, 1e-6
"""Largest gradient component at convergence: for a fixed function, and for losses that follow the samples."""


class Convergence(NamedTuple):
    """Result of training to convergence.

    Attributes:
        policy: probability of each completion, shape (prompts, completions); for a reward model the softmax of its
            scores, or of its negated costs.
        target: the policy that training should reach; None if it is unknown.
        source: where the target comes from: "declared" by the class, or a "transcription" of its paper.
        distance: largest total variation distance over prompts. If minimisers are not unique: the loss minus its
            minimum. For `population.SCORES`: the largest difference in the quantity that all minimisers share. NaN
            without a target.
        gold_before: expected reward of the reference.
        gold_after: expected reward of the policy.
        kl: KL(policy || reference), nats.
        seconds: training time.
        path: (update, gold reward, KL) during training.
        law: formula in rewards and lengths that the converged policy follows, as text; empty if none fits.
        outputs: outputs of a reward model's head, shape (prompts, completions, outputs); None for a policy.
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
    """Return the world used for verification: 2 prompts, 3 tokens, length 2; 7 completions, 84 labelled pairs."""
    return EnumerableWorld(prompts=2, tokens=3, max_new_tokens=2, seed=seed)


def quiet_trainer() -> Trainer:
    """Return a minimal trainer that answers the modules' queries."""
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
    """Train a module to convergence on exact expectations and compare it with its target.

    Args:
        module: created with the world's folder as ``init_from``; trained in place, in fp64.
        world: the world of that folder.
        steps: updates per round; the learning rate follows a cosine schedule down to 0.
        learning_rate: initial learning rate of Adam.
        shuffled: train on uninformative labels or scores (all equally likely), as a control.
        judge: module that defines the target; None takes the target of ``module``.

    Raises:
        ContractError: the module overrides how it samples, so that its expectation cannot be enumerated.
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
    """Describe the formula in rewards and lengths that a policy follows, or report divergence; empty if none fits."""
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
    """Load a module's models in fp64 and attach a minimal trainer."""
    module.trainer = quiet_trainer()
    module.load_settings = replace(module.load_settings, self_check=False)  # the table has too few tokens for it
    module.configure_model()
    module.train()
    module.double()
    for model in module.frozen_models():
        model.double()
    vars(module)["lay_out"] = remembered(module.lay_out)
    return module


def remembered(lay_out: Callable[[Any], Layout]) -> Callable[[Any], Layout]:
    """Cache the layout of sequences: a population is the same in every update."""
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
    """Run rounds of Adam until the loss has converged, each at a quarter of the previous learning rate.

    For a fixed function, L-BFGS follows each round. Losses of samples, or with statistics of the step, use Adam alone.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    shares = hasattr(module, "adapter")  # an adapter's mean has an exact gradient but no values per row
    fixed = not (isinstance(module, RolloutModule | GKDModule) or module.batch_coupled or shares)
    still = STILL if fixed else SETTLED
    for place in range(ROUNDS * (2 if module.batch_coupled else 1)):  # sorting makes the loss non-smooth
        descend(
            loss, parameters, steps, learning_rate / 4 ** (place % ROUNDS), watch if place == 0 else lambda step: None
        )
        left = steepest(parameters)
        if fixed and left >= still:
            before = [parameter.detach().clone() for parameter in parameters]
            finish(loss, parameters)
            fixed = steepest(parameters) < left / 10
            if not fixed:  # for example a detached weight: L-BFGS lowers the value, not the gradient
                for parameter, value in zip(parameters, before, strict=True):
                    parameter.data.copy_(value)
                continue
            left = steepest(parameters)
        if left < still:
            return


def steepest(parameters: list[Any]) -> float:
    """Return the largest gradient component."""
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
    """Run Adam on a deterministic loss with a cosine schedule down to 0."""
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, betas=(0.9, 0.99), eps=1e-12)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        watch(step)
        optimizer.zero_grad()
        value = loss()
        if value.requires_grad:  # uninformative labels may leave a loss without gradient
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
    """Return the loss over demonstrations and student samples, weighted by how often each is trained on.

    The samples are drawn from the current student, without gradient through the sampling.
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
    """Return a batch with the data columns that an objective declares.

    The first column holds the reward of each row's completion. For pairs and groups it is the reward of the first
    completion minus that of the last. The k-th column (k = 0, 1, ...) holds this value plus k; uninformative columns
    hold k. The columns in `SAFETY` hold instead whether a completion is safe, 0 or 1; uninformative ones hold 0.5.
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
"""Columns of safety labels, with the position of their completion in the pair."""


@torch.no_grad()
def say_nothing(module: Any, world: EnumerableWorld) -> None:
    """Copy the reference into a module's teacher, so that there is nothing to learn from it."""
    table = module.teacher.model.model.model.table.weight
    table.copy_(world.reference_table.to(table))
