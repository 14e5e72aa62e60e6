"""Whole training steps taken by several ranks of one process: what coupled losses, whitening and groups must not see.

Each rank is a thread with a module, a share of the rows and a real Trainer of its own; only the Trainer's strategy is
simulated. Collectives meet at a barrier, and an update sums the gradients of all ranks as DDP would.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from rlhf_lightning.evaluation.verification.subject import Check, Subject, at_least, at_most
from rlhf_lightning.types import PromptBatch, Step

PATIENCE = 60.0
"""Seconds that a rank waits for the others before a collective counts as hung."""

RATE = 0.1
"""Learning rate between the updates of a rollout; small against the world's logits, far above rounding."""


class Meeting:
    """Where ranks exchange values, in lock step.

    Args:
        ranks: how many take part in every exchange.
    """

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._barrier = threading.Barrier(ranks, timeout=PATIENCE)
        self._values: list[Any] = [None] * ranks

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """Hand in a value and return those of all ranks, in their order."""
        self._values[rank] = value
        self._barrier.wait()
        found = list(self._values)
        self._barrier.wait()  # nobody hands in the next value before all have read this one
        return found

    def leave(self) -> None:
        """Break every exchange, present and future: a rank has failed."""
        self._barrier.abort()


class SimulatedRank(SingleDeviceStrategy):
    """The strategy of one rank: its collectives are exchanges between threads.

    Args:
        meeting: of all ranks.
        rank: this one.
    """

    def __init__(self, meeting: Meeting, rank: int) -> None:
        super().__init__(torch.device("cpu"))
        self.meeting = meeting
        self.global_rank = self.local_rank = rank
        self.world_size = meeting.ranks

    def reduce(self, tensor: Any, *args: Any, reduce_op: Any = "mean", **kwargs: Any) -> Any:
        """Return the sum, mean or largest of the ranks' tensors."""
        value = tensor if isinstance(tensor, Tensor) else torch.tensor(tensor)
        stacked = torch.stack(self.meeting.exchange(self.global_rank, value.detach()))
        if str(reduce_op).lower().endswith("max"):
            return stacked.amax(0)
        return stacked.sum(0) if str(reduce_op).lower().endswith("sum") else stacked.mean(0)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Return the ranks' tensors stacked; like a real collective it takes equal shapes alone."""
        found = self.meeting.exchange(self.global_rank, tensor.detach())
        if len({part.shape for part in found}) > 1:
            raise ValueError(f"all_gather of unequal shapes {[tuple(part.shape) for part in found]} hangs on real ranks")
        return torch.stack(found)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return what rank ``src`` has."""
        return self.meeting.exchange(self.global_rank, obj)[src]

    def barrier(self, name: str | None = None) -> None:
        """Wait for all ranks."""
        self.meeting.exchange(self.global_rank, None)


def gradients_over_ranks(
    subject: Subject, steps: Sequence[Step[Any]], change: Callable[[Any], None] | None = None
) -> list[Tensor]:
    """Take one training step and return the gradient of each of its updates, summed over ranks, flattened.

    Args:
        subject: the class; each rank gets a fresh instance of it.
        steps: the share of each rank.
        change: what to set on each instance first.

    Raises:
        ValueError: ranks called collectives with unequal shapes.
        RuntimeError: ranks took unequal numbers of updates or collectives, which hangs on real ones.
    """
    meeting = Meeting(len(steps))
    modules = [subject.fresh(moved=True) for _ in steps]

    def run(rank: int) -> list[Tensor]:
        module = modules[rank]
        _attach(module, meeting, rank)
        if change is not None:
            change(module)
        found: list[Tensor] = []

        def update(losses: Sequence[Callable[[], Tensor]], count: float) -> float:
            mine = subject.gradients(module, lambda: sum(loss() for loss in losses) / max(count, 1))
            found.append(torch.stack(meeting.exchange(rank, mine)).sum(0))
            _descend(module, found[-1])
            module.updates += 1
            return float(found[-1].norm())

        module.update = update
        try:
            with torch.enable_grad():
                module.training_step(steps[rank], 0)
        except threading.BrokenBarrierError:
            raise
        except BaseException:
            meeting.leave()
            raise
        return found

    with ThreadPoolExecutor(len(steps)) as pool:
        waiting = [pool.submit(run, rank) for rank in range(len(steps))]
    errors = [error for future in waiting if (error := future.exception()) is not None]
    first = next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), None)
    if first is not None:
        raise first
    if errors:
        raise RuntimeError("a rank waited for a collective that another never called: real ranks would hang")
    return waiting[0].result()


def _attach(module: Any, meeting: Meeting, rank: int) -> None:
    """Give a module a trainer that stands on a rank, and say that its first update is past."""
    module.trainer = Trainer(
        strategy=SimulatedRank(meeting, rank), logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, max_epochs=1,
    )  # fmt: skip
    module.updates = 1  # the policy has left its reference on purpose


@torch.no_grad()
def _descend(module: Any, gradient: Tensor) -> None:
    """Take a plain gradient step: Adam would blow rounding up into whole steps where a gradient is nearly zero."""
    trained = [p for p in module.parameters() if p.requires_grad and p.grad is not None]
    parts = gradient.split([p.numel() for p in trained]) if trained else ()
    for parameter, part in zip(trained, parts, strict=True):
        parameter.sub_(RATE * part.view_as(parameter).to(parameter))


def coupled_check(subject: Subject, whole: Any, shares: Sequence[Any], tokens: int) -> Check:
    """A loss with statistics of the step in it takes them over the rows of all ranks."""
    rows = len(whole.weights)
    alone = gradients_over_ranks(subject, [Step((whole,), rows, tokens)])
    apart = gradients_over_ranks(subject, [Step((share,), rows, tokens) for share in shares])
    return at_most(
        "two ranks",
        largest_difference(apart, alone),
        1e-9,
        "what couples the rows of a step must be gathered over all ranks, and the sum divided by the step's rows",
    )


def rollout_checks(subject: Subject) -> list[Check]:
    """How a rollout is cut into micro-batches, and among which ranks its groups are sampled, changes no gradient."""
    batch = subject.world.questions(samples=4)
    whole = gradients_over_ranks(subject, [_share(batch, slice(None))])
    half = len(batch.prompts) // 2
    cut = gradients_over_ranks(subject, [_share(batch, slice(None))], lambda m: setattr(m, "micro_batch_size", 3))
    ranks = gradients_over_ranks(subject, [_share(batch, slice(0, half)), _share(batch, slice(half, None))])
    reached = max((float(part.abs().max()) for part in whole), default=0.0)
    return [
        at_least("gradient", reached, 1e-12, "no gradient of a rollout reaches the weights: something is detached"),
        at_most(
            "micro-batches",
            largest_difference(cut, whole),
            1e-9,
            "return one loss per token and let `aggregation` reduce: a mean over a micro-batch weighs short ones more",
        ),
        at_most(
            "two ranks",
            largest_difference(ranks, whole),
            1e-9,
            "means and deviations of a rollout are over all ranks (moments_over_ranks), and the divisor is too",
        ),
    ]


def _share(batch: PromptBatch, rows: slice) -> Step[PromptBatch]:
    """Return a rank's share of a rollout's prompts."""
    mine = PromptBatch(
        prompts=batch.prompts[rows],
        texts=batch.texts[rows],
        columns={name: values[rows] for name, values in batch.columns.items()},
        episodes=batch.episodes[rows],
        group=batch.group[rows],
    )
    return Step((mine,), len(batch.prompts), 0)


def largest_difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference of two lists of gradients over the largest entry; infinite for unequal numbers."""
    if len(found) != len(expected):
        return float("inf")
    scale = max((float(part.abs().max()) for part in expected), default=0.0)
    apart = max((float((f - e).abs().max()) for f, e in zip(found, expected, strict=True)), default=0.0)
    return apart / max(scale, 1e-300)
