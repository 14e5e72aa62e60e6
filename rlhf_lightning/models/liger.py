"""Fused Triton kernels of the package liger-kernel for norms, rotary embeddings and gated MLPs."""

from __future__ import annotations

import inspect
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from transformers import AutoConfig

from rlhf_lightning.errors import ModelError, PackageError
from rlhf_lightning.models.folders import reading

OWN_LOSSES = ("cross_entropy", "fused_linear_cross_entropy")
"""Kernels that are left out: log-probabilities of every objective are computed in chunks here."""


class LigerKernels(Callback):
    """Replace a family's norms, rotary embeddings and gated MLPs by liger-kernel's, before any model is loaded.

    All models of the family in this process use them: policy, reference, critic and reward model. Results change only
    by rounding (Hsu et al. 2024, arXiv 2410.10989).

    Raises:
        PackageError: ``no-liger-kernel``.
        ModelError: ``no-kernels-for-family``.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Replace the modules; called before the weights are loaded."""
        try:
            from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as KERNELS
        except ImportError as error:
            raise PackageError(
                "no-liger-kernel",
                f"LigerKernels needs the packages liger-kernel and triton ({error}); install them, or leave the "
                "callback out",
            ) from error
        module: Any = pl_module
        name = module.backbone_source()
        with reading(name):
            family = AutoConfig.from_pretrained(name).model_type
        if family not in KERNELS:
            raise ModelError(
                "no-kernels-for-family", f"liger-kernel has no kernels for {family}; leave the callback out"
            )
        replace = KERNELS[family]
        replace(**{name: False for name in OWN_LOSSES if name in inspect.signature(replace).parameters})
