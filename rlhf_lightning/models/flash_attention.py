"""FlashAttention-3 and -4 in place of the flash attention that PyTorch ships."""

from __future__ import annotations

from typing import Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from rlhf_lightning.errors import ModelError, PackageError, SettingError
from rlhf_lightning.models.packing import takes_lengths

PACKAGES = {"FA3": "flash_attn_interface (package flash-attn-3)", "FA4": "flash_attn.cute (package flash-attn-4)"}
"""The module that each implementation needs."""


class FlashAttention(Callback):
    """Let PyTorch's flash attention run FlashAttention-3 or -4, also on packed rows (attention by length).

    FA3 is for Hopper GPUs (Shah et al. 2024, arXiv 2407.08608), FA4 for Hopper and Blackwell. Both compute in half
    precision. All models of this process use them until the run ends. Results change only by rounding.

    Args:
        implementation: the kernels to use.

    Raises:
        SettingError: ``flash-attention-needs-gpu``.
        PackageError: ``no-flash-attention``.
        ModelError: ``flash-attention-differs``: on this GPU, attention by length is wrong or fails.
    """

    def __init__(self, implementation: Literal["FA3", "FA4"] = "FA3") -> None:
        self.implementation = implementation

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Activate the kernels, and compare attention by length with PyTorch's other kernels."""
        name, device = self.implementation, trainer.strategy.root_device
        if device.type != "cuda":
            raise SettingError(
                "flash-attention-needs-gpu",
                f"FlashAttention runs on NVIDIA GPUs, not on {device}; leave the callback out",
            )
        try:
            from torch.nn.attention import activate_flash_attention_impl  # not in every release

            activate_flash_attention_impl(name)
        except (ImportError, RuntimeError, ValueError) as error:
            raise PackageError(
                "no-flash-attention",
                f"{name} needs a PyTorch with activate_flash_attention_impl and the module {PACKAGES[name]}, but: "
                f"{error}; install them, or leave the callback out",
            ) from error
        takes_lengths.cache_clear()
        if not takes_lengths(device, torch.bfloat16):
            self.teardown(trainer, pl_module, stage)
            raise ModelError(
                "flash-attention-differs",
                f"{name} fails or computes wrong attention by length on {device}; update the module {PACKAGES[name]}, "
                "or leave the callback out",
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore PyTorch's own kernels."""
        from torch.nn.attention import restore_flash_attention_impl

        restore_flash_attention_impl()
        takes_lengths.cache_clear()
