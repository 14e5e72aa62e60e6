"""Settings of Lightning's trainer, and its callbacks, that cannot work where a module takes its own optimizer steps."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch.optim.lr_scheduler import ReduceLROnPlateau

from rlhf_lightning.compat import checkpoint_period
from rlhf_lightning.errors import SettingError

if TYPE_CHECKING:
    from rlhf_lightning.training.module import AlignmentModule


class Refusal(NamedTuple):
    """Why a run is refused: the stable code, and the sentence with what to do."""

    code: str
    sentence: str


ONE_STEP = (
    "one item of the data is one optimizer step already, cut into micro-batches: set data.batch_size for the rows of a "
    "step, and data.micro_batch_size or data.max_tokens for memory"
)
CALLBACKS: dict[type, Refusal] = {
    GradientAccumulationScheduler: Refusal("accumulated-batches", f"GradientAccumulationScheduler: {ONE_STEP}"),
    StochasticWeightAveraging: Refusal(
        "stochastic-weight-averaging",
        "StochasticWeightAveraging copies the module before its weights are read, and would average nothing: use "
        "lightning.pytorch.callbacks.EMAWeightAveraging or WeightAveraging",
    ),
    BatchSizeFinder: Refusal(
        "batch-size-finder",
        "BatchSizeFinder would change what the model learns: batch_size is the size of an optimizer step. For memory "
        "set data.max_tokens; `rlhf plan` says what a run takes",
    ),
    LearningRateFinder: Refusal(
        "learning-rate-finder",
        "LearningRateFinder needs automatic optimization: compare short runs with different model.learning_rate",
    ),
}
"""Callbacks that do not work with a module that takes its own optimizer steps."""


def check_trainer(trainer: Trainer, module: AlignmentModule) -> None:
    """Refuse settings and callbacks that cannot work, before anything is loaded.

    Args:
        trainer: the trainer, about to fit.
        module: the module.

    Raises:
        SettingError: with the code of the refusal.
    """
    for refusal in refusals(trainer, module):
        raise SettingError(*refusal)
    # At each save it says that weights are those after the update, as they should be.
    warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")


def refusals(trainer: Trainer, module: AlignmentModule) -> Iterator[Refusal]:
    """Yield why a run is refused."""
    if trainer.gradient_clip_val is not None:
        yield Refusal(
            "trainer-clips-gradients",
            f"trainer.gradient_clip_val={trainer.gradient_clip_val}: the module clips by itself, after the last "
            "micro-batch; set model.max_grad_norm",
        )
    if trainer.accumulate_grad_batches != 1:
        yield Refusal(
            "accumulated-batches", f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches}: {ONE_STEP}"
        )
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        yield from (refusal for kind, refusal in CALLBACKS.items() if isinstance(callback, kind))
        if isinstance(callback, ModelCheckpoint):
            yield from refused_checkpoint_period(*checkpoint_period(callback), module)


def refused_checkpoint_period(every: int, interval: Any, module: AlignmentModule) -> Iterator[Refusal]:
    """Refuse a ModelCheckpoint that would leave out checkpoints without a word.

    Args:
        every: its ``every_n_train_steps``: optimizer updates, looked at when a training step ends.
        interval: its ``train_time_interval``.
        module: the module, with ``updates_per_step``.
    """
    instead = "use rlhf_lightning.runs.RunCheckpoint(every_n_updates=..., every_n_rollouts=...)"
    if interval is not None:
        yield Refusal(
            "checkpoint-by-time",
            f"ModelCheckpoint(train_time_interval={interval}) never saves where a module takes its own optimizer "
            f"steps: {instead}, or every_n_train_steps",
        )
    per_step = module.updates_per_step if every > 1 else 1
    if every % per_step:
        yield Refusal(
            "checkpoint-within-rollout",
            f"ModelCheckpoint(every_n_train_steps={every}) counts updates, of which each rollout takes {per_step}, and "
            f"saves after a rollout alone: give a multiple of {per_step}, or {instead}",
        )


def check_optimizers(trainer: Trainer) -> None:
    """Refuse several optimizers, and a plateau scheduler that would never be stepped.

    Raises:
        SettingError: ``several-optimizers`` or ``plateau-without-validation``.
    """
    if len(trainer.optimizers) != 1:
        raise SettingError(
            "several-optimizers",
            f"configure_optimizers makes {len(trainer.optimizers)} optimizers, and update() steps one: give the "
            "weights as groups of one optimizer ([{'params': ..., 'lr': ...}, ...])",
        )
    plateau = any(isinstance(config.scheduler, ReduceLROnPlateau) for config in trainer.lr_scheduler_configs)
    if plateau and not trainer.enable_validation:
        raise SettingError(
            "plateau-without-validation",
            "ReduceLROnPlateau is stepped once per validation, and this run has none: give held-out rows "
            "(data.eval_source) and leave trainer.limit_val_batches above 0",
        )
