"""Check a user's Lightning settings, callbacks, loaders and optimizers, before anything is loaded."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterator, Sequence
from types import CodeType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from rlhf_lightning.compat import (
    attached_datamodule,
    checkpoint_period,
    deals_out_loaders,
    describe_endless_epochs,
    given_data,
    held_out_data,
    set_tuned_setting,
    tuned_setting,
)
from rlhf_lightning.deprecation import warn_of_metric
from rlhf_lightning.errors import ContractError, SettingError, StateError
from rlhf_lightning.training.compatibility import Stage
from rlhf_lightning.training.optimization import check_moments
from rlhf_lightning.training.user_classes import misnamed_methods
from rlhf_lightning.types import PromptBatch, Step

ONE_STEP = (
    "one item of the data is already one optimizer step, split into micro-batches: set data.batch_size for the rows of "
    "a step, and data.micro_batch_size or data.max_tokens for memory"
)
CALLBACKS = {
    BackboneFinetuning: (
        "backbone-finetuning",
        "BackboneFinetuning unfreezes module.backbone, which modules of this package do not have: subclass "
        "lightning.pytorch.callbacks.BaseFinetuning, and freeze parts of module.policy",
    ),
    GradientAccumulationScheduler: ("accumulated-batches", f"GradientAccumulationScheduler: {ONE_STEP}"),
    StochasticWeightAveraging: (
        "stochastic-weight-averaging",
        "StochasticWeightAveraging copies the module before its weights are loaded, so it would average nothing: use "
        "lightning.pytorch.callbacks.EMAWeightAveraging or WeightAveraging",
    ),
}
"""Callbacks that do not work with manual optimization."""

NEVER_CALLED = ("optimizer_step", "optimizer_zero_grad", "lr_scheduler_step", "configure_gradient_clipping")
"""Hooks of a LightningModule that Lightning calls only with automatic optimization."""

EXTENDED = (
    "setup", "configure_model", "transfer_batch_to_device", "on_fit_start", "on_fit_end", "on_train_start",
    "on_train_end", "on_train_batch_start", "on_train_batch_end", "on_train_epoch_start", "on_train_epoch_end",
    "on_validation_start", "on_validation_epoch_start", "on_validation_epoch_end", "on_test_start",
    "on_test_epoch_start", "on_test_epoch_end", "on_predict_start", "on_save_checkpoint", "on_load_checkpoint",
)  # fmt: skip
"""Hooks that this package's modules implement, so that a subclass must call ``super()``."""

PACKAGES, GROUPS = ("rlhf_lightning", "lightning", "pytorch_lightning"), ("train", "val", "test", "rollout")
"""Packages whose classes log only metrics named GROUP/NAME, and the groups."""


def check_trainer(trainer: Trainer, module: Any) -> None:
    """Refuse trainer settings and callbacks that cannot work with ``fit``, and warn of methods that nothing calls.

    Raises:
        SettingError: with the code of the refusal.
    """
    for code, sentence in trainer_refusals(trainer, module):
        raise SettingError(code, sentence)
    for sentence in misnamed_methods(type(module)).values():
        rank_zero_warn(sentence)
    if trainer.max_epochs == -1 and isinstance(trainer.progress_bar_callback, RichProgressBar):
        describe_endless_epochs(trainer.progress_bar_callback)
    # Lightning warns at each save that the weights are those after the update, which is intended here.
    warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")


def check_hooks(module: Any) -> None:
    """Refuse a subclass's hook that would silently replace this package's implementation.

    Raises:
        ContractError: ``hook-without-super``.
    """
    for name in EXTENDED:
        owner, *inherited = [kind for kind in type(module).__mro__ if name in vars(kind)]
        hook = inspect.unwrap(vars(owner)[name])
        ours = any(kind.__module__.startswith("rlhf_lightning.") for kind in inherited)
        own = owner.__module__.startswith("rlhf_lightning.") or not inspect.isfunction(hook)
        if ours and not own and name not in _names_in(hook.__code__):
            raise ContractError(
                "hook-without-super",
                f"{owner.__name__}.{name} does not call super().{name}(...), so the work of {type(module).__name__} "
                "in that hook would be lost: call it",
            )


def _names_in(code: CodeType) -> set[str]:
    """Return the names used in a function and its inner functions."""
    inner = (one for one in code.co_consts if isinstance(one, CodeType))
    return set(code.co_names).union(*map(_names_in, inner))


def trainer_refusals(trainer: Trainer, module: Any) -> Iterator[tuple[str, str]]:
    """Yield the error code and message of each refusal."""
    if trainer.gradient_clip_val is not None:
        yield (
            "trainer-clips-gradients",
            f"trainer.gradient_clip_val={trainer.gradient_clip_val}: the module clips gradients itself, after the last "
            "micro-batch; set model.max_grad_norm",
        )
    if trainer.accumulate_grad_batches != 1:
        yield ("accumulated-batches", f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches}: {ONE_STEP}")
    if module.automatic_optimization:
        yield (
            "automatic-optimization",
            f"{type(module).__name__} sets automatic_optimization to True, but the module takes its own steps, one "
            "for all micro-batches: leave it False",
        )
    for name in NEVER_CALLED:
        if getattr(type(module), name) is not getattr(LightningModule, name):
            yield (
                "hook-never-called",
                f"{type(module).__name__} overrides {name}, which Lightning never calls with manual optimization: "
                "override make_optimizer or on_before_clip, or set optimizer, lr_scheduler or max_grad_norm",
            )
    for name, value in module.hparams.items():
        used = vars(module).get(name, value)
        if isinstance(used, int | float | str) and used != value != module.hparams_initial.get(name, value):
            yield (
                "changed-hparams",
                f"hparams.{name} was changed to {value} and has no effect, the module has {used}: set module.{name}",
            )
    yield from refused_data(given_data(trainer))
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    own = (type(one).__module__.partition(".")[0] not in PACKAGES for one in (module, *callbacks))
    logs_more = any(own)  # a user's class may log any name
    for callback in callbacks:
        warn_of_metric(str(getattr(callback, "monitor", None)))
        group, _, name = str(getattr(callback, "monitor", None)).partition("_")
        if group in GROUPS and not logs_more:
            yield (
                "monitor-without-slash",
                f"{type(callback).__name__} monitors {group}_{name}, but metric names contain a slash: monitor "
                f"{group}/{name}",
            )
        if isinstance(callback, LearningRateFinder) and module.batch_type is PromptBatch:
            yield (
                "learning-rate-finder",
                f"the loss of {type(module).__name__} does not depend on the learning rate alone, because each "
                "rollout has other data: compare the score of short runs with different model.learning_rate",
            )
        if isinstance(callback, BatchSizeFinder):
            yield from tune_micro_batches(trainer, callback)
        yield from (refusal for kind, refusal in CALLBACKS.items() if isinstance(callback, kind))
        if isinstance(callback, ModelCheckpoint):
            yield from refused_checkpoint_period(*checkpoint_period(callback), module)


def refused_data(data: Any) -> Iterator[tuple[str, str]]:
    """Refuse a fit without data, and a DataLoader that would collate Steps."""
    if data is None:
        yield ("no-data", "there is no training data: call trainer.fit(module, datamodule), or give a loader of Steps")
    rows = getattr(data, "dataset", None)
    first = rows[0] if isinstance(rows, Sequence) and rows else None
    if isinstance(data, DataLoader) and data.batch_size is not None and isinstance(first, Step):
        yield ("collated-steps", "a Step is a batch already: give DataLoader(steps, batch_size=None)")


def tune_micro_batches(trainer: Trainer, finder: BatchSizeFinder) -> Iterator[tuple[str, str]]:
    """Let a BatchSizeFinder tune ``data.micro_batch_size`` (memory only); refuse it if the data has none."""
    data = attached_datamodule(trainer)
    if not hasattr(data, "micro_batch_size") or tuned_setting(finder) not in ("batch_size", "micro_batch_size"):
        yield (
            "batch-size-finder",
            f"{tuned_setting(finder)} cannot be tuned: the batch size is that of an optimizer step and changes "
            "training. Give a DataModule of rlhf_lightning.data, whose micro_batch_size can be tuned",
        )
        return
    if tuned_setting(finder) == "batch_size":
        set_tuned_setting(finder, "micro_batch_size")
        rank_zero_info(
            "data.micro_batch_size is tuned, because it changes only memory; data.batch_size stays "
            f"{data.batch_size}, because it changes training"
        )
    if data.micro_batch_size is None:
        data.micro_batch_size = data.hparams["micro_batch_size"] = 1  # Lightning's search needs a number to change


def refused_checkpoint_period(every: int, interval: Any, module: Stage) -> Iterator[tuple[str, str]]:
    """Refuse a ModelCheckpoint that would silently skip checkpoints.

    ``every`` counts optimizer updates, and Lightning tests it when a training step ends.
    """
    instead = "use rlhf_lightning.runs.RunCheckpoint(every_n_updates=..., every_n_rollouts=...)"
    if interval is not None:
        yield (
            "checkpoint-by-time",
            f"ModelCheckpoint(train_time_interval={interval}) never saves with manual optimization: {instead}, or "
            "every_n_train_steps",
        )
    per_step = module.updates_per_step if every > 1 else 1
    if every % per_step:
        yield (
            "checkpoint-within-rollout",
            f"ModelCheckpoint(every_n_train_steps={every}) counts updates, but saves only after a rollout, which takes "
            f"{per_step} updates: give a multiple of {per_step}, or {instead}",
        )


def check_loader(trainer: Trainer, module: Any) -> None:
    """Refuse a DataLoader of Steps that the Trainer distributed to the ranks: a Step is one rank's share already.

    Steps that have fewer rows than asked are announced.

    Raises:
        SettingError: ``dealt-steps``.
    """
    loader: Any = trainer.train_dataloader
    if isinstance(getattr(loader, "sampler", None), DistributedSampler) and deals_out_loaders(trainer):
        raise SettingError(
            "dealt-steps",
            "the Trainer distributed the loader's Steps over the ranks, but a Step is already one rank's share of an "
            "update: set Trainer(use_distributed_sampler=False) and give each rank its share, or the rows to a "
            "DataModule",
        )
    for sentence in _too_few_rows(attached_datamodule(trainer), module):
        rank_zero_info(sentence)


def _too_few_rows(data: Any, module: Any) -> Iterator[str]:
    """Yield a sentence for each size that the data or the rollout cannot fill."""
    if getattr(data, "batch_size", None) is None or not hasattr(data, "epoch_rows"):
        return
    # A stream, and a user's DataModule with its own loaders, have no store of rows.
    stored = hasattr(data, "store") and not data.streaming
    episodes, rows = data.batch_size, len(data.epoch_rows(0)) if stored else math.inf
    if module.batch_type is not PromptBatch:
        if episodes > rows:
            yield f"data.batch_size is {episodes}, but an epoch has {rows} rows: an optimizer step takes {rows} rows."
        return
    if (prompts := getattr(data, "prompts_per_rollout", 0)) > rows:
        yield (
            f"A rollout takes {prompts} prompts (data.batch_size / data.samples_per_prompt), but the "
            f"data has {rows}: prompts repeat within a rollout, each time as another group."
        )
    if (asked := getattr(module, "mini_batch_size", None) or 0) > episodes:
        yield (
            f"model.mini_batch_size is {asked}, but a rollout has {episodes} episodes (data.batch_size): an optimizer "
            f"step takes {episodes} episodes."
        )


def check_evaluation_loaders(trainer: Trainer) -> None:
    """Refuse several loaders of held-out rows, since their metrics would be merged into one mean.

    Raises:
        SettingError: ``several-loaders``.
    """
    found = held_out_data(trainer)
    if isinstance(found, list | tuple | dict) and len(found) > 1:
        raise SettingError(
            "several-loaders",
            f"{len(found)} validation loaders are given, but their metrics would be averaged together: give one to "
            "fit, and call trainer.validate for each of the others",
        )


def check_optimizers(trainer: Trainer) -> None:
    """Refuse several optimizers, moments that do not fit, and a plateau scheduler without validation.

    Raises:
        SettingError: ``several-optimizers`` or ``plateau-without-validation``.
        StateError: ``checkpoint-does-not-fit``.
    """
    if len(trainer.optimizers) != 1:
        raise SettingError(
            "several-optimizers",
            f"configure_optimizers makes {len(trainer.optimizers)} optimizers, but update() steps only one: give the "
            "weights as groups of one optimizer ([{'params': ..., 'lr': ...}, ...])",
        )
    check_moments(trainer.optimizers[0])
    plateau = any(isinstance(config.scheduler, ReduceLROnPlateau) for config in trainer.lr_scheduler_configs)
    if plateau and not trainer.enable_validation:
        raise SettingError(
            "plateau-without-validation",
            "ReduceLROnPlateau is stepped once per validation, and this run has none: give held-out rows "
            "(data.eval_source) and leave trainer.limit_val_batches above 0",
        )


def check_length(trainer: Trainer, stage: str) -> None:
    """Refuse a fit without any update.

    Raises:
        SettingError: ``no-updates``.
    """
    if stage == "fit" and 0 in (trainer.max_steps, trainer.max_epochs, trainer.limit_train_batches):
        raise SettingError(
            "no-updates",
            "trainer.max_steps, max_epochs or limit_train_batches is 0: no update would be made; give 1 or more, or "
            "`rlhf validate`",
        )


def check_datamodule(datamodule: Any, module: Any, stage: str) -> None:
    """Refuse a DataModule with another batch type.

    Raises:
        ContractError: ``wrong-batch-type``.
    """
    offered = getattr(datamodule, "batch_types", None)
    if offered is not None and stage != "predict" and module.batch_type not in offered:
        names = " or ".join(sorted(kind.__name__ for kind in offered))
        wanted = f"{type(module).__name__} takes {module.batch_type.__name__}"
        raise ContractError("wrong-batch-type", f"{wanted}, but {type(datamodule).__name__} yields {names}")


def check_step(batch: Any, module: Any) -> None:
    """Refuse an item of the DataLoader that is not a Step of the module's batch type.

    Raises:
        ContractError: ``no-step`` or ``wrong-batch-type``.
    """
    if not hasattr(batch, "micro_batches"):
        raise ContractError(
            "no-step",
            f"the DataLoader yields a {type(batch).__name__}, and {type(module).__name__} takes a Step of "
            f"{module.batch_type.__name__}: give the rows to a DataModule of rlhf_lightning.data as its source (a "
            "datasets.Dataset, a list of dicts or a file)",
        )
    parts = batch.micro_batches
    if not module.trainer.predicting and parts and not isinstance(parts[0], module.batch_type):
        raise ContractError(
            "wrong-batch-type",
            f"{type(module).__name__} takes {module.batch_type.__name__}, but the DataLoader yields Steps of "
            f"{type(parts[0]).__name__}",
        )


def check_progress(trainer: Trainer, module: Any) -> None:
    """Refuse to resume if an overridden hook did not restore the counters.

    Raises:
        StateError: ``lost-progress``.
    """
    if trainer.ckpt_path is not None and trainer.global_step and not module.updates:
        raise StateError(
            "lost-progress",
            f"the checkpoint has {trainer.global_step} updates, and {type(module).__name__} restored none: its "
            "on_save_checkpoint and on_load_checkpoint must call super()",
        )


def check_stepped(trainer: Trainer, module: Any, outputs: Any, before: int) -> None:
    """Refuse a ``training_step`` that returned a loss but took no optimizer step (``global_step`` is unchanged).

    Raises:
        ContractError: ``loss-without-update``.
    """
    if outputs and "loss" in outputs and trainer.global_step == before:
        raise ContractError(
            "loss-without-update",
            f"{type(module).__name__}.training_step returned a loss and took no optimizer step, and modules of this "
            "package optimize manually: override the loss itself (docs/extending.md), call super().training_step, or "
            "self.update([lambda: loss_sum], count)",
        )
