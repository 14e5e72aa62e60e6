"""Small batches, rollouts and steps for the checks, and two ranks that run as threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.models.layout import select
from rlhf_lightning.training.collector import select_episodes
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.types import (
    NO_LIMITS,
    Advantages,
    DemonstrationBatch,
    MicroBatchLimits,
    Minibatch,
    PolicyLogprobs,
    PreferenceBatch,
    ProcessBatch,
    RankedBatch,
    Rollout,
    Sequences,
    Step,
    UnpairedBatch,
)
from rlhf_lightning.verification.convergence import with_columns
from rlhf_lightning.verification.exact import PolicyGradient, minibatch_of
from rlhf_lightning.verification.subject import Subject, differentiate

PICKED = (2, 11, 30, 48, 60, 75)
"""Groups selected for an update, from a rollout that contains all groups."""

FIRSTS = ((0, 0), (0, 3), (1, 1), (1, 5), (0, 6), (1, 0))
SECONDS = ((0, 2), (0, 0), (1, 4), (1, 0), (0, 1), (1, 6))
"""Prompt and completion of the rows of small batches, and of the completions that the rows are compared with."""


# -- batches ----------------------------------------------------------------------------------------------------------


def some_rows(subject: Subject) -> Any:
    """Return a small batch with unequal lengths, soft labels, unequal weights and the data columns of the class."""
    world, kind = subject.world, subject.kind.batch_type
    weights = torch.tensor([1.0, 0.5, 2.0, 1.0, 1.5, 1.0], dtype=torch.float64)
    target = torch.tensor([1.0, 0.7, 1.0, 0.2, 1.0, 0.9], dtype=torch.float64)
    if not subject.kind.weighs_rows and kind in (PreferenceBatch, RankedBatch):
        weights, target = torch.ones_like(weights), torch.ones_like(target)
    first, second, nothing = world.sequences(FIRSTS), world.sequences(SECONDS), torch.zeros_like(target)
    if kind is ProcessBatch:
        return judged_steps(first, weights)
    batch: Any
    if kind is DemonstrationBatch:
        batch = DemonstrationBatch(first, weights)
    elif kind is UnpairedBatch:
        desirable = torch.tensor([True, False, True, False, False, True])
        batch = UnpairedBatch(first, second, desirable, weights)
    elif kind is PreferenceBatch:
        both = first._replace(
            completions=first.completions + second.completions,
            parents=first.parents * 2,
            supervised=first.supervised + second.supervised,
        )
        batch = PreferenceBatch(both, target, nothing, weights)
    else:
        members = world.sequences([row for pair in zip(FIRSTS, SECONDS, strict=True) for row in pair])
        parents = tuple(index // 2 for index in range(2 * len(FIRSTS)))
        members = members._replace(prompts=members.prompts[::2], parents=parents)
        batch = RankedBatch(members, torch.tensor([0, 1] * len(FIRSTS)), target, nothing, weights)
    return with_columns(batch, subject.module.data_columns, world)


def judged_steps(sequences: Sequences, weights: Tensor) -> ProcessBatch:
    """Return completions of one and two steps with soft labels, and one step without a label."""
    flags = [flag.clone() for flag in sequences.supervised]
    flags[3][0] = False
    labels = torch.linspace(0.05, 0.95, 12, dtype=torch.float64)
    parts = tuple(labels[2 * row : 2 * row + int(flag.sum())] for row, flag in enumerate(flags))
    return ProcessBatch(sequences._replace(supervised=tuple(flags)), parts, weights)


def cut(batch: Any, sizes: Sequence[int]) -> list[Any]:
    """Split a batch into parts with the given numbers of rows."""
    starts = accumulate(sizes, initial=0)
    return [rows_of_batch(batch, range(start, start + size)) for start, size in zip(starts, sizes, strict=False)]


def rows_of_batch(batch: Any, rows: Sequence[int]) -> Any:
    """Select rows of a batch, in ascending order."""
    count, index, members = len(batch.weights), torch.tensor(list(rows)), list(rows)
    fields: dict[str, Any] = {
        name: part[index] for name, part in batch._asdict().items() if isinstance(part, Tensor) and name != "ranks"
    }
    if isinstance(batch, PreferenceBatch):
        members += [count + row for row in rows]
    elif isinstance(batch, RankedBatch):
        members = [member for row in rows for member in (2 * row, 2 * row + 1)]
        fields["ranks"] = batch.ranks[torch.tensor(members)]
    elif isinstance(batch, ProcessBatch):
        fields["labels"] = tuple(batch.labels[row] for row in rows)
    elif isinstance(batch, UnpairedBatch) and batch.mismatched is not None:
        fields["mismatched"] = select(batch.mismatched, list(rows))
    extras = {name: values[index] for name, values in batch.extras.items()}
    return batch._replace(sequences=select(batch.sequences, members), extras=extras, **fields)


def widened(given: Any, place: int | None = None, columns: int = 3) -> Any:
    """Insert masked columns into the grids of an input or a rollout, at a position or at the end."""

    def insert(part: Any) -> Any:
        if not isinstance(part, Tensor) or part.dim() < 2:
            return part
        at = part.shape[1] if place is None else place
        return torch.cat([part[:, :at], part.new_zeros(len(part), columns, *part.shape[2:]), part[:, at:]], 1)

    extras = {name: insert(part) for name, part in given.extras.items()}
    return given._replace(
        **{name: insert(part) for name, part in given._asdict().items() if name != "extras"}, extras=extras
    )


def narrowed(values: Tensor, place: int, columns: int = 3) -> Tensor:
    """Remove the columns that `widened` inserted at a position."""
    return torch.cat([values[:, :place], values[:, place + columns :]], 1)


# -- steps ------------------------------------------------------------------------------------------------------------


def gradient_of(subject: Subject, module: Any, run: Callable[[], Any]) -> Tensor:
    """Return the gradient of the optimizer step in ``run``, without applying the step."""
    found: list[Tensor] = []

    def update(losses: Any, count: Any, meter: Any = None) -> float:
        found.append(subject.gradients(module, lambda: sum(loss() / max(count, 1) for loss in losses)))
        return 0.0

    module.update = update
    try:
        run()
    finally:
        vars(module).pop("update", None)
    return found[0]


def step_gradient(subject: Subject, batches: Sequence[Any], rows: int, tokens: int, module: Any = None) -> Tensor:
    """Return the gradient of a whole training step over micro-batches, through the module's own ``training_step``."""
    module = subject.fresh(moved=True) if module is None else module
    return gradient_of(subject, module, lambda: module.training_step(Step(tuple(batches), rows, tokens), 0))


def in_ranks(modules: Sequence[Any], run: Callable[[Any, Any], Tensor], shares: Sequence[Any]) -> tuple[Tensor, str]:
    """Run ``run`` on several ranks and return the sum of its results.

    Each rank is a thread with its own module and data.

    The collectives exchange values as between processes. If a rank fails, or waits for a collective that another rank
    never enters, the sum is infinite and the error message is returned.
    """
    barrier = threading.Barrier(len(modules), timeout=60)
    given: list[Any] = [None] * len(modules)

    def exchange(rank: int, value: Tensor) -> Tensor:
        given[rank] = value.detach()
        barrier.wait()
        everyone = torch.stack(given)
        barrier.wait()  # before this value is overwritten by the next
        return everyone

    def reduced(rank: int, value: Tensor, group: Any = None, reduce_op: str = "mean") -> Tensor:
        everyone = exchange(rank, value)
        return everyone.sum(0) if reduce_op == "sum" else everyone.mean(0)

    def gathered(rank: int, value: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        return exchange(rank, value)

    def on_rank(module: Any, share: Any) -> Tensor:
        try:
            return run(module, share)
        except BaseException:
            barrier.abort()  # release the waiting ranks
            raise

    for rank, module in enumerate(modules):
        strategy = module.trainer.strategy
        strategy.world_size, strategy.global_rank = len(modules), rank
        strategy.reduce, strategy.all_gather = partial(reduced, rank), partial(gathered, rank)
    with ThreadPoolExecutor(len(modules)) as pool:
        found = [pool.submit(on_rank, module, share) for module, share in zip(modules, shares, strict=True)]
    errors = [one.exception() for one in found if one.exception() is not None]
    if errors:
        first = min(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError))
        return torch.full((), torch.inf, dtype=torch.float64), f" ({type(first).__name__}: {first})"
    return torch.stack([one.result() for one in found]).sum(0), ""


# -- rollouts ---------------------------------------------------------------------------------------------------------


class Case:
    """A rollout of every completion in groups, computed by the subject's own code, with its rewards and advantages.

    Args:
        subject: the class under verification.
        module: an instance with its models loaded.
    """

    def __init__(self, subject: Subject, module: Any) -> None:
        self.subject, self.module = subject, module
        self.expected = PolicyGradient(module, subject.world)
        self.rollout: Rollout = subject_rollout(self.expected)
        self.rewards: Tensor = module.shape_rewards(self.rollout).detach()
        self.advantages: Advantages = module.advantages(self.rollout, self.rewards)

    def logprobs(self, **changes: Any) -> PolicyLogprobs:
        """Return the input of the policy loss at ratio 1, with changed fields."""
        rollout = self.rollout
        plain = PolicyLogprobs(
            rollout.old_logprobs.clone(),
            rollout.old_logprobs,
            rollout.reference_logprobs,
            rollout.entropy,
            self.advantages.advantages.detach(),
            rollout.completion_mask,
            rollout.behaviour_logprobs,
            extras=rollout.extras,
            rollout=rollout,
            minibatch=minibatch_of(self.module, rollout, self.advantages),
        )
        # A field that the rows and their minibatch share is changed in both.
        shared = {name: part for name, part in changes.items() if name in Minibatch._fields}
        if plain.minibatch is not None:
            plain = plain._replace(minibatch=plain.minibatch._replace(**shared))
        return plain._replace(**changes)

    def moved_by(self, nats: float | Tensor, sign: float | None = None) -> PolicyLogprobs:
        """Return the input where tokens are e^nats times as likely as at the rollout.

        Args:
            nats: log-ratio of the tokens.
            sign: advantage of every token; None keeps the advantages.
        """
        mask = self.rollout.completion_mask
        old = torch.where(mask, self.rollout.old_logprobs - nats, 0.0)
        changes: dict[str, Any] = {"old_logprobs": old, "behaviour_logprobs": old}
        if sign is not None:
            changes["advantages"] = torch.where(mask, torch.full_like(old, sign), 0.0)
        return self.logprobs(**changes)

    def loss(self, given: PolicyLogprobs) -> Tensor:
        """Return the loss of each token, 0 where masked."""
        return torch.where(given.completion_mask, self.subject.values(self.module, given), 0.0)

    def slopes(self, given: PolicyLogprobs) -> Tensor:
        """Return the gradient of the summed loss with respect to each token's log-probability."""
        return differentiate(self.loss, given, ["logprobs"])[1]["logprobs"]

    def advantages_of(self, **changes: Any) -> Tensor:
        """Return the advantages of the rollout with changed fields."""
        changed = self.rollout._replace(**changes)
        found: Tensor = self.module.advantages(changed, self.module.shape_rewards(changed)).advantages
        return found.detach()


def subject_rollout(expected: PolicyGradient) -> Rollout:
    """Return the rollout that an expectation sums over, with random values for the critic."""
    found: list[Rollout] = []
    module = expected.module
    original = module.advantages

    def keeping(rollout: Rollout, rewards: Tensor) -> Advantages:
        found.append(rollout)
        return original(rollout, rewards)

    module.advantages = keeping  # type: ignore[method-assign]
    try:
        expected.loss()
    finally:
        vars(module).pop("advantages", None)
    rollout = found[0]
    if rollout.values is None:
        return rollout
    values = torch.randn(rollout.values.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mask = rollout.completion_mask
    return rollout._replace(values=torch.where(mask, values, 0.0) if values.shape == mask.shape else values)


def part_of(rollout: Rollout, rows: Sequence[int]) -> Rollout:
    """Select rows of a rollout and renumber the groups."""
    part = select_episodes(rollout, rows)
    return part._replace(group=torch.unique(part.group, return_inverse=True)[1])


class Update:
    """One update on a few groups of a rollout, by the module's own code; the policy has moved since the rollout."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.module = subject.fresh(moved=True)
        case = Case(subject, self.module)
        size = case.expected.group_size
        self.rows = [row for group in PICKED for row in range(size * group, size * (group + 1))]
        if size == 1:
            self.rows = [row % len(case.rollout.scores) for row in self.rows]
        noise = torch.randn(case.rollout.old_logprobs.shape, generator=torch.Generator().manual_seed(5))
        old = torch.where(case.rollout.completion_mask, case.rollout.old_logprobs + 0.1 * noise, 0.0)
        self.rollout = part_of(case.rollout._replace(old_logprobs=old), self.rows)
        self.rollout = self.rollout._replace(episodes=torch.arange(len(self.rows)))
        self.advantages = self.module.advantages(self.rollout, self.module.shape_rewards(self.rollout).detach())

    def gradient(
        self, module: Any = None, rows: Sequence[int] | None = None, limits: MicroBatchLimits = NO_LIMITS
    ) -> Tensor:
        """Return the gradient of an update on some rows, flattened."""
        one: Any = self.module if module is None else module
        one.limits = limits
        chosen = list(range(len(self.rows)) if rows is None else rows)
        questions = self.subject.world.questions(1)
        return gradient_of(
            self.subject,
            one,
            lambda: one.learn_minibatch(self.rollout, self.advantages, chosen, questions, Meter()),
        )

    def over_ranks(self, run: Callable[[Any, Sequence[int]], Tensor]) -> tuple[Tensor, str]:
        """Return the sum of ``run`` over two ranks with unequal shares of groups, and the error if a rank fails."""
        place = 2 * len(self.rows) // 3
        modules = [self.subject.fresh(moved=True) for _ in range(2)]
        return in_ranks(modules, run, [range(place), range(place, len(self.rows))])

    def rank_residual(self, module: Any, rows: Sequence[int]) -> Tensor:
        """Return how far the advantages of a rank that holds some rows are from those of the whole rollout, a scalar.

        A constant on all tokens is left out: a baseline of one rank has no bias.
        """
        share = part_of(self.rollout, rows)
        found = module.advantages(share, module.shape_rewards(share).detach()).advantages.detach()
        lead = (found - self.advantages.advantages.detach()[list(rows)])[share.completion_mask]
        return (lead - lead.mean()).abs().max()
