"""TensorBoard's HPARAMS tab: every setting once, beside the metrics that runs are compared by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import hparams as hparams_summary

from rlhf_lightning.compat import event_writer
from rlhf_lightning.runs.run import updates_of


def flat_hparams(module: LightningModule, trainer: Trainer, data: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return all settings of a run, named as on the command line (``model.beta``), as text, numbers and booleans.

    Args:
        module: the module, with its hyper-parameters.
        trainer: the trainer.
        data: arguments of the DataModule; None takes its hyper-parameters, if it keeps any.
    """
    flat: dict[str, Any] = {"model": type(module).__name__}
    flat.update(_flat("model", module.hparams))
    datamodule = getattr(trainer, "datamodule", None)
    if datamodule is not None:
        flat["data"] = type(datamodule).__name__
        flat.update(_flat("data", datamodule.hparams if data is None else data))
    flat["trainer.max_epochs"], flat["trainer.max_steps"] = trainer.max_epochs, trainer.max_steps
    flat["trainer.precision"], flat["trainer.ranks"] = str(trainer.precision), trainer.world_size
    return {name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in flat.items()}


def _flat(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested settings to dotted names; Lightning's own entries (``_class_path``) are left out."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if str(key).startswith("_"):
            continue
        if isinstance(value, Mapping) and value:
            flat.update(_flat(f"{prefix}.{key}", value))
        else:
            flat[f"{prefix}.{key}"] = value
    return flat


class RunHparams(Callback):
    """Fill the HPARAMS tab.

    Lightning's own way either adds a meaningless ``hp_metric`` or plots a made-up first value of every metric. Here the
    settings are written at the start with the names of the module's ``headline_metrics``, and no values: those come
    from what validation logs, and at the end of training the final ones are written under the last step.

    Args:
        data_settings: arguments of the DataModule, which does not keep them itself.
    """

    def __init__(self, data_settings: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.data_settings = data_settings
        self._earlier: dict[str, float] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write settings and the names of the metrics."""
        if not trainer.is_global_zero:
            return
        flat, tags = flat_hparams(pl_module, trainer, self.data_settings), getattr(pl_module, "headline_metrics", ())
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.hparams.update(flat)
                writer = event_writer(logger)
                for summary in hparams_summary(flat, dict.fromkeys(tags, 0.0)):
                    writer.add_summary(summary)
            else:
                logger.log_hyperparams(flat)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the final value of each headline metric."""
        final = self._headlines(trainer, pl_module)
        if trainer.is_global_zero and final:
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):  # others take a metric's last value by themselves
                    logger.log_metrics(final, updates_of(pl_module))

    def _headlines(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        """Return the latest value of each headline metric, in this session or those before it."""
        values, tags = trainer.callback_metrics, getattr(module, "headline_metrics", ())
        return self._earlier | {tag: float(values[tag]) for tag in tags if tag in values}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the latest values: a run may be resumed behind its last validation."""
        checkpoint["headlines"] = self._headlines(trainer, pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take them up again."""
        self._earlier = checkpoint.get("headlines", {})
