"""Metrics on their way to the loggers."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.fabric.loggers import Logger
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.summary_pb2 import Summary

from rlhf_lightning.compat import event_writer, has_prefix


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
