"""Private API of other packages that this one cannot do without, each with the version it was read from.

Nothing else in the package reaches for a private name of another package. tests/test_compat.py holds one test for each
function here: it says in one sentence what has changed.
"""

from __future__ import annotations

from typing import Any

# -- Lightning 2.6.6 --------------------------------------------------------------------------------------------------


def attached_trainer(module: Any) -> Any | None:
    """Return a module's trainer, None where it has none; ``module.trainer`` raises there."""
    return module._trainer


def attached_datamodule(trainer: Any) -> Any:
    """Return a trainer's DataModule, None where it was given none and lacks the attribute."""
    return getattr(trainer, "datamodule", None)


def restore_loader_position(trainer: Any) -> None:
    """Put the data where the checkpoint had it, if the trainer has thrown that away.

    It does so where its loaders were made before the checkpoint is loaded, as ``trainer.estimated_stepping_batches``
    makes them: what the checkpoint says is then never given to them.
    """
    loop = trainer.fit_loop
    if loop._combined_loader_states_to_load and loop._data_fetcher is not None:
        loop._load_combined_loader_states()
        iter(loop._data_fetcher)


def set_logged_step(trainer: Any, step: int) -> None:
    """Have whatever logs from now on log at x = step; Lightning's own count is of batches."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def checkpoint_period(callback: Any) -> tuple[int, Any]:
    """Return ``every_n_train_steps`` (0 for never) and ``train_time_interval`` of a ModelCheckpoint."""
    return callback._every_n_train_steps, callback._train_time_interval


def validation_follows(trainer: Any) -> bool:
    """Return whether a validation follows the training step that has just ended."""
    loop = trainer.fit_loop.epoch_loop
    return bool(loop._should_check_val_fx(trainer.fit_loop._data_fetcher)) and not loop.val_loop.skip


def epoch_is_done(trainer: Any) -> bool:
    """Return whether no further training step follows in this epoch."""
    return bool(trainer.fit_loop.epoch_loop._is_training_done)


def dump_checkpoint(trainer: Any) -> dict[str, Any]:
    """Return what Lightning writes into a checkpoint, without the barrier of ``trainer.save_checkpoint``."""
    checkpoint: dict[str, Any] = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    return checkpoint


def remember_signal_handlers(trainer: Any, handlers: dict[int, Any]) -> None:
    """Have Lightning put these handlers back when the trainer is torn down, in place of those it found."""
    trainer._signal_connector._original_handlers.update(handlers)


def cluster_environment(trainer: Any) -> Any:
    """Return the environment that started the processes, also under a strategy of one device."""
    found = getattr(trainer.strategy, "cluster_environment", None)
    return found or trainer._accelerator_connector.cluster_environment


def mesh_sizes(strategy: Any) -> tuple[int | str, int | str]:
    """Return ``data_parallel_size`` and ``tensor_parallel_size`` as a ModelParallelStrategy was given them."""
    return strategy._data_parallel_size, strategy._tensor_parallel_size


def bar_is_enabled(progress_bar: Any) -> bool:
    """Return whether Lightning has enabled a progress bar on this rank."""
    return bool(progress_bar._enabled)


def subcommand_parsers(cli: Any) -> dict[str, Any]:
    """Return the parsers of a LightningCLI's subcommands by name."""
    parsers: dict[str, Any] = cli._subcommand_parsers
    return parsers


def setting_of(cli: Any, settings: Any, name: str) -> Any:
    """Return a setting of a LightningCLI's subcommand."""
    return cli._get(settings, name)


# -- TensorBoard 2.21 and its writer in torch 2.13, under Lightning 2.6.6's logger ------------------------------------


def event_writer(logger: Any) -> Any:
    """Return the file writer of a TensorBoardLogger, which takes several values as one event."""
    return logger.experiment._get_file_writer()


def event_file(logger: Any) -> str:
    """Return the path of the file that a TensorBoardLogger appends to."""
    return str(event_writer(logger).event_writer._file_name)


def has_prefix(logger: Any) -> bool:
    """Return whether a TensorBoardLogger puts a prefix before the names of metrics."""
    return bool(logger._prefix)


# -- jsonargparse 4.53 ------------------------------------------------------------------------------------------------


def parser_actions(parser: Any) -> list[Any]:
    """Return the options of a parser."""
    return getattr(parser, "_actions", [])


def type_of_option(action: Any) -> Any:
    """Return the type hint of an option; None where it has none."""
    return getattr(action, "_typehint", None)


# -- transformers 5.23 ------------------------------------------------------------------------------------------------


def uses_sdpa(model: Any) -> bool:
    """Return whether a model's family has the kernel ``sdpa``, and this model runs it."""
    return bool(model._supports_sdpa) and model.config._attn_implementation == "sdpa"


def is_stateful(model: Any) -> bool:
    """Return whether a model keeps a recurrent state, which no mask reaches."""
    return bool(getattr(model, "_is_stateful", False))


# -- peft 0.21 --------------------------------------------------------------------------------------------------------


def adapter_switch(layer: Any) -> tuple[str | list[str], bool]:
    """Return which adapters an adapted layer reads, and whether it reads none."""
    return layer._active_adapter, layer._disable_adapters


def set_adapter_switch(layer: Any, switch: tuple[str | list[str], bool]) -> None:
    """Set which adapters a layer reads; peft's own way changes ``requires_grad`` too."""
    layer._active_adapter, layer._disable_adapters = switch


# -- torch 2.13 and datasets 4 ----------------------------------------------------------------------------------------


def allow_graphs(count: int) -> None:
    """Let torch.compile keep so many graphs of a function."""
    import torch

    settings: Any = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, count)


def memory_format_encoding() -> Any:
    """Return the enumeration that shard metadata name a tensor's memory format by."""
    from torch.distributed.checkpoint import metadata

    return metadata._MEM_FORMAT_ENCODING


def dataset_fingerprint(dataset: Any) -> str:
    """Return the hash that ``datasets`` keeps of what a dataset was made from."""
    return str(dataset._fingerprint)
