"""Which weights are kept in which precision, settled before any is read."""

from __future__ import annotations

from dataclasses import replace

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import Precision

from rlhf_lightning.errors import SettingError
from rlhf_lightning.models.loading import LoadSettings


class FrozenBFloat16(Precision):
    """``bf16-true`` for adapters: frozen weights in bf16, everything that is trained in fp32.

    Lightning's own casts the trained weights too, in which an update below 1/256 of a weight vanishes, and makes bf16
    the default of every new tensor, the losses' among them. Here the weights are loaded as they should be and nothing
    is cast.
    """

    precision = "bf16-true"


def settled_precision(trainer: Trainer, settings: LoadSettings, trains_adapter: bool, fits: bool) -> LoadSettings:
    """Return how weights are loaded under the trainer's precision and strategy.

    Args:
        trainer: the trainer; under ``bf16-true`` its precision plugin is replaced.
        settings: as the module was told.
        trains_adapter: whether an adapter is trained rather than every weight.
        fits: whether anything is trained at all.

    Raises:
        ValueError: trained weights would be kept in bf16 or quantised, or sharded in 4 or 8 bits.
    """
    if str(trainer.precision) == "bf16-true":
        trainer.strategy.precision_plugin = FrozenBFloat16()
        settings = replace(settings, dtype="bfloat16")
    if settings.quantization is not None:
        if any("ModelParallel" in kind.__name__ or "FSDP" in kind.__name__ for kind in type(trainer.strategy).__mro__):
            raise SettingError(
                "quantized-sharding",
                f"quantization={settings.quantization} cannot be sharded: use strategy ddp or a single device, or "
                "quantization=null",
            )
        settings = replace(settings, device=str(trainer.strategy.root_device))
    if fits and not trains_adapter:
        if settings.quantization is not None:
            raise SettingError(
                "quantized-training",
                f"quantization={settings.quantization} keeps the weights frozen, so there is nothing to train: set "
                "lora (for example --model.lora.r 16), or quantization=null",
            )
        if settings.dtype == "bfloat16":
            raise SettingError(
                "bf16-training",
                "every weight is trained and would be kept in bf16, in which an update below 1/256 of a weight "
                "vanishes. Use trainer.precision=bf16-mixed with dtype=float32 (products in bf16, weights in fp32), or "
                "set lora (frozen weights in bf16, the adapter in fp32)",
            )
    return settings
