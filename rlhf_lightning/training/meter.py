"""Metrics of an optimizer step or an evaluation: sums over micro-batches and ranks, divided at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from lightning.fabric.loggers import Logger
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor

from rlhf_lightning.compat import event_writer, has_prefix
from rlhf_lightning.models.transfer import to_device

INTERVAL = "_ci95"
SUM, SQUARES = f"{INTERVAL}/sum", f"{INTERVAL}/squares"
NOTHING = torch.zeros(())


class Meter:
    """Weighted means that do not depend on micro-batches and ranks.

    A mean of micro-batch means would give short and long micro-batches the same weight, so numerators and denominators
    are summed separately. Every rank must add the same names. Sums stay on the device until they are read.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._ratios: set[str] = set()
        self._checks: list[tuple[Tensor, Callable[[float], None]]] = []
        self._everyone: Tensor | None = None  # sums of all ranks, on the host; None if a value was added since

    def add(self, name: str, values: Tensor, mask: Tensor | None = None) -> None:
        """Add values of any shape; with ``mask``, only the values under it, weighted by it."""
        values = values.detach().double()
        weights = torch.ones_like(values) if mask is None else mask.to(values.dtype)
        values = torch.where(weights > 0, values, 0.0)
        self._add(name, torch.stack([(values * weights).sum(), weights.sum()]))

    def add_interval(self, name: str, values: Tensor) -> None:
        """Add independent values; the 95 % interval of their mean has half-width ``NAME_ci95``.

        The half-width is 1.96 standard errors; 0 for a single value.
        """
        self.add(name + SUM, values)
        self.add(name + SQUARES, values.double().square())

    def add_ratio(self, name: str, numerator: Tensor | float, denominator: Tensor | float) -> None:
        """Add to the numerator and denominator of a quotient, such as a loss divided by its tokens."""
        parts = [torch.as_tensor(x, dtype=torch.float64).detach() for x in (numerator, denominator)]
        device = next((part.device for part in parts if part.device.type != "cpu"), parts[0].device)
        self._add(name, torch.stack([to_device(part, device) for part in parts]))
        self._ratios.add(name)

    def _add(self, name: str, pair: Tensor) -> None:
        self._everyone, known = None, self._sums.get(name)
        if known is not None:  # a restored sum, or that of a rank without rows, may be on the host
            device = pair.device if known.device.type == "cpu" else known.device
            pair = to_device(known, device) + to_device(pair, device)
        self._sums[name] = pair

    def when_read(self, value: Tensor, check: Callable[[float], None]) -> None:
        """Call ``check`` with a scalar of this rank when the sums are next read."""
        self._checks.append((value, check))

    def forget(self, name: str) -> None:
        """Drop a name."""
        self._everyone = None
        self._sums.pop(name, None)

    def add_nothing(self, like: Meter) -> None:
        """Add the names of another meter with weight 0, since a rank without rows needs the same names."""
        for name in like._sums:
            self._add(name, torch.zeros(2, dtype=torch.float64))
        self._ratios |= like._ratios

    def state_dict(self) -> dict[str, list[float]]:
        """Return this rank's numerator and denominator of each name."""
        return {name: pair.tolist() for name, pair in self._sums.items()}

    def load_state_dict(self, states: Sequence[Mapping[str, list[float]]], rank: int, ranks: int) -> None:
        """Restore this rank's sums from the states of all ranks; if the world size changed, rank 0 gets all sums."""
        self._sums = {}
        for owner, state in enumerate(states):
            mine = owner == rank if len(states) == ranks else rank == 0
            for name, pair in state.items():  # every rank needs every name
                self._add(name, torch.tensor(pair if mine else [0.0, 0.0], dtype=torch.float64))

    def read(self, strategy: Strategy, loss: Tensor = NOTHING, norm: Tensor = NOTHING) -> tuple[float, float]:
        """Read the sums of all ranks, and an update's loss and gradient norm, in one collective and one transfer.

        Each transfer to the host waits for the device.

        Args:
            strategy: reduces over ranks.
            loss: this rank's loss, a scalar.
            norm: norm of the gradient of all ranks, a scalar.

        Returns:
            The sum of ``loss`` over ranks, and ``norm``.
        """
        checks, self._checks = self._checks, []
        parts = (*self._sums.values(), loss), (norm, *(value for value, _ in checks))
        summed, own = (
            torch.cat([to_device(one.detach(), strategy.root_device).double().view(-1) for one in part])
            for part in parts
        )
        found = torch.cat([strategy.reduce(summed, reduce_op="sum"), own]).tolist()
        sums, (total, length, *values) = found[: 2 * len(self._sums)], found[2 * len(self._sums) :]
        for (_, check), value in zip(checks, values, strict=True):
            check(value)
        self._everyone = torch.tensor(sums, dtype=torch.float64).view(-1, 2)
        return total, length

    def means(self, strategy: Strategy) -> dict[str, float]:
        """Return the mean of each name over all ranks, as last read; read them if a value was added since.

        Names without values are left out; a quotient without a denominator is 0.
        """
        if not self._sums:
            return {}
        if self._everyone is None:
            self.read(strategy)
        assert self._everyone is not None
        numerators, denominators = self._everyone.unbind(-1)
        quotients = numerators / denominators.clamp_min(1e-12)
        counts = dict(zip(self._sums, denominators.tolist(), strict=True))
        means = dict(zip(self._sums, quotients.tolist(), strict=True))
        means = {name: mean for name, mean in means.items() if counts[name] or name in self._ratios}
        for name in [name for name in means if name.endswith(SUM)]:
            own = name.removesuffix(SUM)
            variance = max(means.pop(own + SQUARES) - means.pop(name) ** 2, 0.0)
            means[own + INTERVAL] = 1.96 * (variance / max(counts[name] - 1, 1)) ** 0.5
        return means


PEAKS = {
    "B200": 2250e12, "H200": 989e12, "H100": 989e12, "GH200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
    "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip
"""Peak FLOP/s of dense bf16 products by part of the GPU's name, from data sheets; the longest match is used."""


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return the peak FLOP/s of a device in a trainer's precision; None if unknown."""
    if device.type != "cuda" or not precision.startswith("bf16"):
        return None
    name = torch.cuda.get_device_name(device)
    return next((PEAKS[part] for part in sorted(PEAKS, key=len, reverse=True) if part in name), None)


class TokenClock:
    """Tokens per second between two logged steps, including the time of anything in between, such as a validation.

    Attributes:
        read: tokens that this rank has forwarded and trained on, with prompts; 0 if the objective does not count them.
        collected: seconds that this rank has spent on collecting rollouts.
    """

    def __init__(self) -> None:
        self.read, self.collected = 0, 0.0
        self._mark: tuple[float, int, int, float] | None = None

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Count the time of a block as time spent on collecting a rollout."""
        begun = time.perf_counter()
        yield
        self.collected += time.perf_counter() - begun

    def since_last(self, tokens: int, devices: int, shares: int, peak_seconds: float) -> dict[str, float]:
        """Return the speed since the last call as metrics; nothing at the first call.

        Args:
            tokens: tokens of the run so far.
            devices: number of ranks.
            shares: number of ranks with rows of their own; the ranks that share a model share its products, too.
            peak_seconds: time of a token's products at the device's peak; 0 if the peak is unknown.
        """
        now, mark = (time.perf_counter(), tokens, self.read, self.collected), self._mark
        self._mark = now
        if mark is None or tokens <= mark[1]:
            return {}
        seconds, learned, read, collected = (new - old for new, old in zip(now, mark, strict=True))
        speed, each = learned / max(seconds, 1e-9), read * shares / devices / max(seconds, 1e-9)
        found = {"tokens_per_second": speed, "tokens_per_second_per_device": speed / devices}
        if read:
            found |= {"trained_tokens_per_second_per_device": each}
        if read and peak_seconds:
            found |= {"mfu": each * peak_seconds}
        if collected:
            found |= {"rollout_tokens_per_second_per_device": learned / devices / collected}
        return {f"perf/{name}": value for name, value in found.items()}


def moments_over_ranks(strategy: Strategy, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and biased variance of the unmasked values of all ranks, two scalars, for whitening."""
    count = strategy.reduce(mask.sum().double(), reduce_op="sum").clamp_min(1)
    mean = strategy.reduce(torch.where(mask, values, 0.0).sum().double(), reduce_op="sum") / count
    squares = torch.where(mask, (values - mean) ** 2, 0.0).sum().double()
    variance = strategy.reduce(squares, reduce_op="sum") / count
    return mean.to(values.dtype), variance.to(values.dtype)


def log_scalars(loggers: Iterable[Logger], metrics: dict[str, float], step: int) -> None:
    """Log metrics at x = step, on rank 0.

    TensorBoard gets all metrics as one event. Lightning's logger writes one event per metric, which takes 1 % of the
    step time of a model with a million parameters.
    """
    for logger in loggers:
        if type(logger) is TensorBoardLogger and not has_prefix(logger):
            _write_event(logger, metrics, step)
        else:
            logger.log_metrics(metrics, step=step)


def log_to_tensorboard(loggers: Iterable[Logger], metrics: dict[str, float], position: int) -> None:
    """Log metrics only to TensorBoard, which has one x-axis per tag and plots equal tags of all runs in one chart.

    Other loggers have the other axes as ``progress/<axis>`` in each row.
    """
    log_scalars([logger for logger in loggers if isinstance(logger, TensorBoardLogger)], metrics, position)


@rank_zero_only
def _write_event(logger: TensorBoardLogger, metrics: dict[str, float], step: int) -> None:
    values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
    event_writer(logger).add_summary(Summary(value=values), step)
