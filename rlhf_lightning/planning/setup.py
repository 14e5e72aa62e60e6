"""The description of a run for memory and compute estimates: plain values, and the weight shapes of its models."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_lightning.models.lora import LoraSettings, add_lora
from rlhf_lightning.models.packing import WIDEST
from rlhf_lightning.models.scalar_head import reads_trees
from rlhf_lightning.planning.memory import FP32


@dataclass(frozen=True)
class Machine:
    """The devices and the parallelism of a run."""

    gpu: bool = False  # GPUs rather than CPU processes
    data_ranks: int = 1  # ranks with different data
    tensor_ranks: int = 1  # ranks that share one model
    strategy: str = "single"  # "single", "ddp", or "sharded" (FSDP2)
    precision: str = "32-true"  # trainer.precision
    process_bytes: int = 0  # memory of a process outside tensors
    holes: bool = False  # whether the allocator's heap fragments, see `estimate.HOLES_FULL`

    @property
    def cuts(self) -> int:
        """Number of ranks over which FSDP2 shards weights, gradients and optimizer state (no tensor parallelism)."""
        return self.data_ranks if self.strategy == "sharded" else 1

    @property
    def autocast(self) -> bool:
        """Whether matrix products run in bf16 while weights stay in fp32."""
        return self.precision == "bf16-mixed"


@dataclass(frozen=True)
class Rows:
    """The rows of one optimizer step, all of the same length."""

    groups: int  # prompts over all ranks: demonstrations, pairs, or the prompts of a minibatch
    completions: int  # completions per prompt
    prompt: int  # tokens of a prompt
    completion: int  # tokens of a completion
    micro_batch_size: int | None = None  # limit in completions; None for no limit
    max_tokens: int | None = None  # limit of a micro-batch in tokens, padding included
    parts_groups: bool = False  # whether micro-batches may split a prompt's completions (rollouts)

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        return self.prompt + self.completion


@dataclass(frozen=True)
class RolloutPlan:
    """The sampling of a training step before its updates."""

    prompts: int  # prompts over all ranks
    slots: int | None  # completions that a rank decodes in one batch; None means all
    updates: int  # optimizer steps per rollout


@dataclass(frozen=True)
class Frozen:
    """A frozen model of the run."""

    name: str  # its role
    config: str  # its Hugging Face config, as JSON
    scalar: bool  # whether it is a reward model
    bytes: int  # bytes per element
    quantization: str | None = None  # quantisation of its linear layers
    judges: bool = True  # whether it runs a forward pass on every micro-batch, like the policy (reference, teacher)


@dataclass(frozen=True)
class Setup:
    """Everything that the memory and compute of a run depend on."""

    config: str  # the trained model's Hugging Face config, as JSON
    rows: Rows  # the rows of an optimizer step
    machine: Machine  # devices and parallelism
    scalar: bool = False  # whether a reward model is trained rather than a policy
    lora: LoraSettings | None = None  # the trained adapter; None trains all weights
    quantization: str | None = None  # quantisation of the frozen backbone
    bytes: int = FP32  # bytes per element of the frozen backbone
    checkpointing: bool = False  # activation checkpointing
    eager: bool = False  # attention without fused kernels
    packs_rows: bool = True  # whether a prompt is computed once for all its completions
    critic: str | None = None  # "separate", "shared", "adapter" or None
    adapters: int = 0  # additional frozen adapters on the backbone
    adapter_reference: bool = False  # whether the policy without its adapter is the reference
    frozen: tuple[Frozen, ...] = ()  # the other models
    rollout: RolloutPlan | None = None  # the rollout; None for fixed data
    optimizer_bytes: float = 2 * FP32  # optimizer state per trained weight; AdamW has two moments


class MicroBatch(NamedTuple):
    """The largest micro-batch of a rank."""

    rows: int  # rows of the batch
    width: int  # tokens of a row, padding included
    tokens: int  # tokens in the loss
    masked: bool  # whether completions share their prompt's row (prompt trees)
    passes: int  # micro-batches per optimizer step on a rank

    @property
    def cells(self) -> int:
        """Tokens of a forward pass, padding included."""
        return self.rows * self.width


def micro_batch(rows: Rows, ranks: int, packs_rows: bool) -> MicroBatch:
    """Split an optimizer step of equal rows into micro-batches, as `data.BatchPlan` and rollouts do."""
    most, limit = rows.micro_batch_size or math.inf, rows.max_tokens or math.inf
    members = 1
    if packs_rows and rows.completions > 1:
        members = min(rows.completions, max((WIDEST - rows.prompt) // rows.completion, 1))
        if rows.parts_groups:
            members = int(min(members, most, max((limit - rows.prompt) // rows.completion, 1)))
    width = rows.prompt + members * rows.completion
    trees = math.ceil(rows.completions / members)  # rows per prompt
    if rows.parts_groups:
        mine = math.ceil(rows.groups / ranks) * trees
        fit = int(max(1, min(mine, most // members, limit // width)))
        count = math.ceil(mine / fit)
        return MicroBatch(fit, width, fit * members * rows.completion, members > 1, count)
    fit = int(max(1, min(rows.groups, most // rows.completions, limit // (trees * width))))
    count = math.ceil(math.ceil(rows.groups / fit) / ranks)
    groups = math.ceil(rows.groups / (count * ranks))
    supervised = groups * rows.completions * rows.completion
    return MicroBatch(groups * trees, width, supervised, members > 1, count)


class Parameter(NamedTuple):
    """A weight tensor of a model."""

    shape: tuple[int, ...]  # shape before sharding
    trained: bool  # whether training changes it
    # whether it is the weight of a linear layer of the backbone (no embedding, head or adapter); quantisation keeps
    # these in 4 or 8 bits if they are frozen
    matrix: bool

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def share(self, ranks: int) -> int:
        """Return the number of elements on the fullest rank when FSDP2 shards the first dimension."""
        return math.ceil(self.shape[0] / ranks) * math.prod(self.shape[1:]) if self.shape else 1


class Skeleton(NamedTuple):
    """The weight shapes of a model."""

    parameters: tuple[Parameter, ...]  # its weights; tied weights are listed once
    outside: int  # elements outside the decoder layers
    packs_rows: bool  # whether it can compute a prompt once for several completions


def skeleton(
    config: Any, lora: LoraSettings | None = None, scalar: bool = False, value_head: bool = False, adapters: int = 0
) -> Skeleton:
    """Build a model on the meta device, without memory for weights, and list its weights.

    Args:
        config: the Hugging Face config.
        lora: the trained adapter; None trains all weights.
        scalar: whether it has a scalar head instead of an LM head.
        value_head: whether it also has a value head with a bias.
        adapters: number of additional frozen adapters of the same size.
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
    """Return the ids of the weights of all linear layers except the head."""
    return {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in ("lm_head", "score")
    }


def quantized_bytes(count: int, kind: str, rows: int) -> int:
    r"""Return the bytes of a quantised matrix with ``count`` weights and ``rows`` outputs.

    nf4 with double quantisation: n/2 for the codes, 1 per block of 64 weights, an fp32 scale per 256 blocks, and 273
    fp32 numbers of tables and offset: about 0.516 per weight. int8: 1 per weight and an fp32 scale per row.
    """
    if kind == "int8":
        return count + FP32 * rows
    blocks = math.ceil(count / 64)
    return math.ceil(count / 2) + blocks + FP32 * math.ceil(blocks / 256) + FP32 * (16 + 256 + 1)


def weight_bytes(
    parameters: Sequence[Parameter], frozen_bytes: int, quantization: str | None = None, ranks: int = 1
) -> int:
    """Return the bytes of a model's weights on each of ``ranks`` ranks that share them; trained weights are in fp32."""
    total = 0
    for part in parameters:
        if quantization is not None and part.matrix and not part.trained:
            total += quantized_bytes(part.size, quantization, part.shape[0])
        else:
            total += part.share(ranks) * (FP32 if part.trained else frozen_bytes)
    return total


def trained_share(parameters: Sequence[Parameter], ranks: int = 1) -> int:
    """Return the number of trained weights on the fullest rank."""
    return sum(part.share(ranks) for part in parameters if part.trained)
