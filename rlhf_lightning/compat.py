"""Wrap the private API of other packages that this package needs, with the version it was written for.

No other file uses a private name of another package. tests/test_compat.py tests each function; a failure says in one
sentence what has changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

# -- Lightning 2.6.6 --------------------------------------------------------------------------------------------------


def attached_trainer(module: Any) -> Any | None:
    """Return a module's trainer or None; ``module.trainer`` raises without one."""
    return module._trainer


def attached_datamodule(trainer: Any) -> Any:
    """Return a trainer's DataModule; None if the trainer was given none."""
    return getattr(trainer, "datamodule", None)


def restore_loader_position(trainer: Any) -> None:
    """Restore the data position from the checkpoint if the trainer has not.

    The trainer drops the position if its loaders are created before the checkpoint is loaded, for example by
    ``trainer.estimated_stepping_batches``.
    """
    loop = trainer.fit_loop
    if loop._combined_loader_states_to_load and loop._data_fetcher is not None:
        loop._load_combined_loader_states()
        iter(loop._data_fetcher)


def set_logged_step(trainer: Any, step: int) -> None:
    """Set the x-axis of later logging to ``step``; Lightning counts batches."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def logged_batch(trainer: Any) -> Any:
    """Return the batch of the current step; ``self.log`` weights epoch means by its size."""
    return getattr(trainer._results, "batch", None)


def call_before_zero_grad(trainer: Any, optimizer: Any) -> None:
    """Call the hooks ``on_before_zero_grad``; Lightning calls them only with automatic optimization."""
    from lightning.pytorch.trainer import call

    for hooks in (call._call_callback_hooks, call._call_lightning_module_hook):
        hooks(trainer, "on_before_zero_grad", optimizer)


def describe_endless_epochs(bar: Any) -> None:
    """Let a RichProgressBar write ``Epoch 0`` where it would write ``Epoch 0/-2``, as it does with max_steps alone."""
    if "_get_train_description" not in vars(bar):
        written = bar._get_train_description
        bar._get_train_description = lambda epoch: written(epoch).replace("/-2", "")


def checkpoint_period(callback: Any) -> tuple[int, Any]:
    """Return ``every_n_train_steps`` (0 for never) and ``train_time_interval`` of a ModelCheckpoint."""
    return callback._every_n_train_steps, callback._train_time_interval


def tuned_setting(finder: Any) -> str:
    """Return the name of the attribute that a BatchSizeFinder changes."""
    return str(finder._batch_arg_name)


def set_tuned_setting(finder: Any, name: str) -> None:
    """Let a BatchSizeFinder change another attribute."""
    finder._batch_arg_name = name


def validation_follows(trainer: Any) -> bool:
    """Return whether a validation follows the current training step."""
    loop = trainer.fit_loop.epoch_loop
    return bool(loop._should_check_val_fx(trainer.fit_loop._data_fetcher)) and not loop.val_loop.skip


def epoch_is_done(trainer: Any) -> bool:
    """Return whether no further training step follows in this epoch."""
    return bool(trainer.fit_loop.epoch_loop._is_training_done)


def dump_checkpoint(trainer: Any) -> dict[str, Any]:
    """Return Lightning's checkpoint without the barrier of ``trainer.save_checkpoint``."""
    checkpoint: dict[str, Any] = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    return checkpoint


@contextlib.contextmanager
def without_signal_handlers(trainer: Any) -> Iterator[None]:
    """Keep Lightning from installing signal handlers inside the context."""
    connector = trainer._signal_connector
    connector.register_signal_handlers = lambda: None
    try:
        yield
    finally:
        del connector.register_signal_handlers


def given_data(trainer: Any) -> Any:
    """Return the source of a trainer's training loader before fit: loaders, a DataModule or a module; or None."""
    source = trainer.fit_loop._data_source
    return source.instance if source.is_defined() else None


def held_out_data(trainer: Any) -> Any:
    """Return the source of a trainer's held-out loaders while it fits, validates or tests."""
    loops = {"fit": trainer.fit_loop.epoch_loop.val_loop, "test": trainer.test_loop, "validate": trainer.validate_loop}
    loop = loops.get(str(getattr(trainer.state.fn, "value", "")))
    return None if loop is None else loop._data_source.instance


def deals_out_loaders(trainer: Any) -> bool:
    """Return ``use_distributed_sampler``: whether a trainer shards a plain DataLoader over ranks."""
    return bool(trainer._accelerator_connector.use_distributed_sampler)


def cluster_environment(trainer: Any) -> Any:
    """Return the cluster environment that started the processes, even under a single-device strategy."""
    found = getattr(trainer.strategy, "cluster_environment", None)
    return found or trainer._accelerator_connector.cluster_environment


def mesh_sizes(strategy: Any) -> tuple[int | str, int | str]:
    """Return ``data_parallel_size`` and ``tensor_parallel_size`` as given to a ModelParallelStrategy."""
    return strategy._data_parallel_size, strategy._tensor_parallel_size


def subcommand_parsers(cli: Any) -> dict[str, Any]:
    """Return the parsers of a LightningCLI's subcommands by name."""
    parsers: dict[str, Any] = cli._subcommand_parsers
    return parsers


def setting_of(cli: Any, settings: Any, name: str) -> Any:
    """Return a setting of a LightningCLI's subcommand."""
    return cli._get(settings, name)


def run_subcommand(cli: Any, subcommand: str) -> None:
    """Run a subcommand as LightningCLI does; a subclass overrides this method."""
    from lightning.pytorch.cli import LightningCLI

    LightningCLI._run_subcommand(cli, subcommand)


# -- TensorBoard 2.21 and its writer in torch 2.13, under Lightning 2.6.6's logger ------------------------------------


def event_writer(logger: Any) -> Any:
    """Return the file writer of a TensorBoardLogger; it can write several values as one event."""
    return logger.experiment._get_file_writer()


def event_file(logger: Any) -> str:
    """Return the path of the file that a TensorBoardLogger appends to."""
    return str(event_writer(logger).event_writer._file_name)


def has_prefix(logger: Any) -> bool:
    """Return whether a TensorBoardLogger adds a prefix to the names of metrics."""
    return bool(logger._prefix)


# -- jsonargparse 4.53 ------------------------------------------------------------------------------------------------


def parser_actions(parser: Any) -> list[Any]:
    """Return the options of a parser."""
    return getattr(parser, "_actions", [])


def type_of_option(action: Any) -> Any:
    """Return the type hint of an option, or None."""
    return getattr(action, "_typehint", None)


# -- transformers 5.23 ------------------------------------------------------------------------------------------------


def uses_sdpa(model: Any) -> bool:
    """Return whether a model supports the kernel ``sdpa`` and uses it."""
    return bool(model._supports_sdpa) and model.config._attn_implementation == "sdpa"


def is_stateful(model: Any) -> bool:
    """Return whether a model has a recurrent state, to which attention masks do not apply."""
    return bool(getattr(model, "_is_stateful", False))


def attention_kernel(config: Any) -> str | None:
    """Return the attention kernel that a model with this config runs."""
    kernel: str | None = config._attn_implementation
    return kernel


def router_recorder(trunk: Any) -> tuple[Any, str, int] | None:
    """Return the class, name suffix and output index of the routers whose logits a transformer records, or None."""
    found = (getattr(trunk, "_can_record_outputs", None) or {}).get("router_logits")
    if found is None or getattr(found, "target_class", found) is None:
        return None
    return getattr(found, "target_class", found), getattr(found, "layer_name", None) or "", getattr(found, "index", 0)


def erases_pad_row(model: Any) -> bool:
    """Return whether loading a model of this class overwrites the pad token's stored embedding row with 0."""
    import torch

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        probe = torch.nn.Embedding(2, 2, padding_idx=0)
        probe.weight.fill_(1.0)
        probe.weight._is_hf_initialized = True  # type: ignore[attr-defined]
        shell = object.__new__(type(model))  # a class may redraw its own modules instead
        torch.nn.Module.__init__(shell)
        shell.config = model.config
        try:
            shell._init_weights(probe)
        except AttributeError:
            return False
        return bool((probe.weight == 0).any())


def new_model(kind: Any, config: Any, kernel: str) -> Any:
    """Build a model of a class from a config in fp32, with newly initialised weights and the given attention kernel."""
    import torch

    return kind._from_config(config, dtype=torch.float32, attn_implementation=kernel)


# -- peft 0.21 --------------------------------------------------------------------------------------------------------


def adapter_switch(layer: Any) -> tuple[str | list[str], bool]:
    """Return the active adapters of a layer, and whether adapters are disabled."""
    return layer._active_adapter, layer._disable_adapters


def set_adapter_switch(layer: Any, switch: tuple[str | list[str], bool]) -> None:
    """Set a layer's active adapters; peft's own method changes ``requires_grad`` too."""
    layer._active_adapter, layer._disable_adapters = switch


def wrapper_holds(wrapper: Any, name: str) -> bool:
    """Return whether a fully trained module (``modules_to_save``) has weights for the adapter of this name."""
    return name in wrapper._adapters


def bypasses_adapters(model: Any, name: str) -> bool:
    """Return whether peft refuses an adapter on a layer because a fused kernel reads the layer's weight directly."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, name.rpartition(".")[2])
    except ValueError:
        return True
    return False


# -- torch 2.13 and datasets 5 ----------------------------------------------------------------------------------------


def allow_graphs(count: int) -> None:
    """Let torch.compile keep at least ``count`` graphs of a function."""
    import torch

    settings: Any = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, count)


def changes_in_place(tensor: Any) -> int:
    """Return how often a tensor was changed in place."""
    count: int = tensor._version
    return count


def memory_format_encoding() -> Any:
    """Return the enumeration of memory formats that shard metadata uses."""
    from torch.distributed.checkpoint import metadata

    return metadata._MEM_FORMAT_ENCODING


def dataset_fingerprint(dataset: Any) -> str:
    """Return the fingerprint of a Hugging Face dataset."""
    return str(dataset._fingerprint)


def copy_each(copies: list[Any], parts: list[Any]) -> None:
    """Copy a list of tensors into another list in one operation; the precision may differ."""
    import torch

    torch._foreach_copy_(copies, parts)
