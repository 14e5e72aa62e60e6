"""Metrics of one optimizer step or one evaluation, summed over micro-batches and ranks before they are divided."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from lightning.fabric.loggers import Logger
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor

from rlhf_lightning.compat import event_writer, has_prefix


class Meter:
    """Weighted means that do not depend on how a batch was cut.

    A mean of micro-batch means weighs a short micro-batch like a long one; here numerators and denominators travel
    separately until the end. Every rank must add the same names.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor, mask: Tensor | None = None) -> None:
        """Add values of any shape, those under ``mask`` alone."""
        values = values.detach().double()
        weights = torch.ones_like(values) if mask is None else mask.to(values.dtype)
        values = torch.where(weights > 0, values, 0.0)
        self._add(name, torch.stack([(values * weights).sum(), weights.sum()]))

    def add_ratio(self, name: str, numerator: Tensor | float, denominator: Tensor | float) -> None:
        """Add a part of a quotient whose numerators and denominators sum, such as a loss over its tokens."""
        pair = torch.stack([torch.as_tensor(x, dtype=torch.float64).detach().cpu() for x in (numerator, denominator)])
        self._add(name, pair)

    def _add(self, name: str, pair: Tensor) -> None:
        pair = pair.cpu()
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def forget(self, name: str) -> None:
        """Drop what was added under ``name``."""
        self._sums.pop(name, None)

    def add_nothing(self, like: Meter) -> None:
        """Add every name of another meter with no weight: a rank without rows must know the names too."""
        for name in like._sums:
            self._add(name, torch.zeros(2, dtype=torch.float64))

    def state_dict(self) -> dict[str, list[float]]:
        """Return the numerator and denominator of each name that this rank has added."""
        return {name: pair.tolist() for name, pair in self._sums.items()}

    def load_state_dict(self, states: Sequence[Mapping[str, list[float]]], rank: int, ranks: int) -> None:
        """Take up this rank's share of what all ranks had added; where their number is another, the first has it all.

        Args:
            states: each rank's ``state_dict``.
            rank: this rank.
            ranks: how many there are now.
        """
        self._sums = {}
        for owner, state in enumerate(states):
            mine = owner == rank if len(states) == ranks else rank == 0
            for name, pair in state.items():  # the names are known everywhere
                self._add(name, torch.tensor(pair if mine else [0.0, 0.0], dtype=torch.float64))

    def means(self, strategy: Strategy) -> dict[str, float]:
        """Return the mean of each name over all that was added on all ranks. One collective for all of them."""
        if not self._sums:
            return {}
        table = torch.stack(list(self._sums.values())).to(strategy.root_device)
        if strategy.root_device.type == "mps":
            table = table.float()
        table = strategy.reduce(table, reduce_op="sum")
        numerators, denominators = table.cpu().unbind(-1)
        quotients = numerators / denominators.clamp_min(1e-12)
        return dict(zip(self._sums, quotients.tolist(), strict=True))


def moments_over_ranks(strategy: Strategy, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of the unmasked values of all ranks, scalars: whitening must not see ranks."""
    count = strategy.reduce(mask.sum().double(), reduce_op="sum").clamp_min(1)
    mean = strategy.reduce(torch.where(mask, values, 0.0).sum().double(), reduce_op="sum") / count
    squares = torch.where(mask, (values - mean) ** 2, 0.0).sum().double()
    variance = strategy.reduce(squares, reduce_op="sum") / count
    return mean.to(values.dtype), variance.to(values.dtype)


def log_scalars(loggers: Iterable[Logger], metrics: dict[str, float], step: int) -> None:
    """Log metrics at x = step, on the first rank alone.

    TensorBoard gets all of them as one event: Lightning's logger writes one for each, which takes a model of a million
    parameters a hundredth of its step.
    """
    for logger in loggers:
        if type(logger) is TensorBoardLogger and not has_prefix(logger):
            _write_event(logger, metrics, step)
        else:
            logger.log_metrics(metrics, step=step)


def log_over(loggers: Iterable[Logger], axis: str, metrics: dict[str, float], position: int) -> None:
    """Log metrics again over another x-axis than updates, under ``by_<axis>/``, to TensorBoard alone.

    Its views know one x-axis a tag. Other loggers count updates, and have the axis as ``progress/<axis>`` in each row.
    """
    views = [logger for logger in loggers if isinstance(logger, TensorBoardLogger)]
    log_scalars(views, {f"by_{axis}/{name}": value for name, value in metrics.items()}, position)


@rank_zero_only
def _write_event(logger: TensorBoardLogger, metrics: dict[str, float], step: int) -> None:
    values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
    event_writer(logger).add_summary(Summary(value=values), step)
