"""A model without its numbers: the shapes of its weights, which of them train, and the bytes they take."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_lightning.models.loading import LoraSettings, add_lora
from rlhf_lightning.models.scalar_head import reads_trees
from rlhf_lightning.planning.memory import FP32


class Parameter(NamedTuple):
    """A weight that a role would have.

    Attributes:
        shape: of the whole weight.
        trained: whether training changes it.
        matrix: whether it is one of the backbone's products, which quantisation keeps in 4 or 8 bits where they are
            frozen: no embedding, head or adapter.
    """

    shape: tuple[int, ...]
    trained: bool
    matrix: bool

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def share(self, ranks: int) -> int:
        """Elements on the fullest rank where the first dimension is dealt in equal pieces, the last ones short or
        empty (FSDP2's cut).
        """
        return math.ceil(self.shape[0] / ranks) * math.prod(self.shape[1:]) if self.shape else 1


class Skeleton(NamedTuple):
    """A model without its numbers.

    Attributes:
        parameters: its weights, tied ones once.
        outside: weights that belong to no decoder layer, as elements.
        packs_rows: whether it can read a prompt once for several completions.
    """

    parameters: tuple[Parameter, ...]
    outside: int
    packs_rows: bool


def skeleton(
    config: Any, lora: LoraSettings | None = None, scalar: bool = False, value_head: bool = False, adapters: int = 0
) -> Skeleton:
    """Build a model on the meta device, which gives tensors shapes and no memory, and list its weights.

    Args:
        config: the Hugging Face config.
        lora: the adapter that trains; None trains every weight.
        scalar: a score instead of a language model's head.
        value_head: a further scalar head on the trunk, with a bias.
        adapters: further adapters of the same sizes that stay frozen.
    """
    kind = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    config = copy.deepcopy(config)
    config.num_labels = 1
    with torch.device("meta"):
        model = kind.from_config(config)
        trees = reads_trees(model)
        layers = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=_size, default=nn.ModuleList())
        outside = _size(model) - _size(layers)
        matrices = _matrices(model)
        if lora is not None:
            model = add_lora(model, lora, "SEQ_CLS" if scalar else "CAUSAL_LM")
    found = [Parameter(tuple(p.shape), p.requires_grad, id(p) in matrices) for p in model.parameters()]
    frozen = [Parameter(part.shape, False, False) for part in found if part.trained] if lora is not None else []
    if value_head:
        found += [Parameter((1, config.hidden_size), True, False), Parameter((1,), True, False)]
    return Skeleton(tuple(found + frozen * adapters), outside, trees)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _matrices(model: nn.Module) -> set[int]:
    """Ids of the weights of all linear layers but the head."""
    return {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in ("lm_head", "score")
    }


def quantized_bytes(count: int, kind: str, rows: int) -> int:
    r"""Bytes of a quantised matrix.

    nf4 with its scales quantised too: n/2 for the codes, a byte for each block of 64, an fp32 scale for each 256 of
    those blocks, and two tables and an offset of 17 + 256 numbers: about 0.516 a weight. int8: a byte a weight and an
    fp32 scale a row.

    Args:
        count: weights.
        kind: "nf4" or "int8".
        rows: outputs of the matrix.
    """
    if kind == "int8":
        return count + FP32 * rows
    blocks = math.ceil(count / 64)
    return math.ceil(count / 2) + blocks + FP32 * math.ceil(blocks / 256) + FP32 * (16 + 256 + 1)


def weight_bytes(
    parameters: Sequence[Parameter], frozen_bytes: int, quantization: str | None = None, ranks: int = 1
) -> int:
    """Bytes of a model's weights on a rank: trained ones in fp32.

    Args:
        parameters: its weights.
        frozen_bytes: of an element that is not trained.
        quantization: "nf4", "int8" or None.
        ranks: ranks that the weights are cut over.
    """
    total = 0
    for part in parameters:
        if quantization is not None and part.matrix and not part.trained:
            total += quantized_bytes(part.size, quantization, part.shape[0])
        else:
            total += part.share(ranks) * (FP32 if part.trained else frozen_bytes)
    return total


def trained_share(parameters: Sequence[Parameter], ranks: int = 1) -> int:
    """Weights that train, on the fullest rank."""
    return sum(part.share(ranks) for part in parameters if part.trained)
