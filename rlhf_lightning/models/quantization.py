"""Quantise the frozen backbone of an adapter to 4 or 8 bits."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any, Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from rlhf_lightning.errors import ModelError, PackageError, SettingError

Quantization = Literal["nf4", "int8"]
KINDS = ("nf4", "int8")


def quantization_config(kind: str, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return transformers' settings for a quantised backbone. Embeddings, norms and heads keep their precision.

    Args:
        kind: "nf4", 4-bit normal floats in blocks of 64 with quantised scales (QLoRA, 2305.14314): 0.52 bytes per
            weight; or "int8", absmax over rows and columns with outliers kept separate (LLM.int8(), 2208.07339).
        compute_dtype: precision that 4-bit weights are dequantised to for each product.

    Raises:
        SettingError: the kind is unknown.
        PackageError: bitsandbytes is not installed.
    """
    if kind not in KINDS:
        raise SettingError("unknown-choice", f"quantization is {kind!r}; choose 'nf4' or 'int8'")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise PackageError(
            "no-bitsandbytes",
            f"quantization={kind} needs bitsandbytes, which is not installed; install it, or set quantization to null",
        )
    if kind == "int8":
        # bitsandbytes warns at every product that inputs are cast to half precision, which is intended.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def use_one_arithmetic(model: nn.Module) -> None:
    """Make 4-bit layers compute the same in eval mode as in train mode.

    On CPUs with bf16 instructions bitsandbytes repacks a layer's weights when it first runs without gradient, and then
    multiplies in bf16. The sampling policy would then differ from the updated policy, and ratios would differ from 1.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - no attribute that nn.Module declares


def leave_the_file(model: nn.Module) -> None:
    """Copy the unquantised weights out of their memory-mapped file.

    On the CPU such weights are pages of the file itself. A single one keeps the whole file in memory, including the
    full-precision matrices that are quantised by now.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor) in (nn.Parameter, torch.Tensor) and tensor.device.type == "cpu":  # others are quantised
            tensor.data = tensor.data.clone()


def quantization_of(model: Any) -> Quantization | None:
    """Return how a Hugging Face model's weights are quantised; None in full precision."""
    if getattr(model, "is_loaded_in_4bit", False):
        return "nf4"
    return "int8" if getattr(model, "is_loaded_in_8bit", False) else None


def refuse_quantized_file(model: Any, name: str, asked: Quantization | None) -> None:
    """Refuse to train on weights that their file holds in 4 or 8 bits, unless asked for: quantised weights stay frozen.

    Raises:
        ModelError: ``quantized-weights``.
    """
    found = quantization_of(model)
    if found != asked and found is not None:
        raise ModelError(
            "quantized-weights",
            f"{name} holds its weights in {4 if found == 'nf4' else 8} bits, which must stay frozen: set quantization "
            f"to {found} and lora (--model.quantization {found} --model.lora.r 16), or name the full-precision model",
        )
