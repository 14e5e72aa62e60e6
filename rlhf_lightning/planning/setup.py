"""A run as plain values: what its memory and compute depend on, and the weights of its models."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_lightning.models.loading import LoraSettings, add_lora
from rlhf_lightning.models.packing import WIDEST
from rlhf_lightning.models.scalar_head import reads_trees
from rlhf_lightning.planning.memory import FP32


@dataclass(frozen=True)
class Machine:
    """Where a run would run.

    Args:
        gpu: whether on GPUs.
        data_ranks: ranks that see other data.
        tensor_ranks: ranks that hold one model together.
        strategy: "single", "ddp", or "sharded" (FSDP2).
        precision: the trainer's.
        process_bytes: what a process holds beside tensors.
        holes: whether the allocator keeps freed pieces between activations.
    """

    gpu: bool = False
    data_ranks: int = 1
    tensor_ranks: int = 1
    strategy: str = "single"
    precision: str = "32-true"
    process_bytes: int = 0
    holes: bool = False

    @property
    def cuts(self) -> int:
        """Ranks that weights, gradients and moments are cut over, matrices over the tensor-parallel ones besides."""
        return self.data_ranks if self.strategy == "sharded" else 1

    @property
    def autocast(self) -> bool:
        """Whether products run in bf16 whatever the weights are in."""
        return self.precision == "bf16-mixed"


@dataclass(frozen=True)
class Rows:
    """What one optimizer step learns from, all rows alike.

    Args:
        groups: prompts over all ranks: demonstrations, pairs, or the prompts of a minibatch.
        completions: of each prompt.
        prompt: tokens of a prompt.
        completion: tokens of a completion.
        micro_batch_size: most completions of a micro-batch; None for no bound.
        max_tokens: most cells of a micro-batch; None for no bound.
        parts_groups: whether a prompt's completions may lie in several micro-batches (rollouts).
    """

    groups: int
    completions: int
    prompt: int
    completion: int
    micro_batch_size: int | None = None
    max_tokens: int | None = None
    parts_groups: bool = False

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        return self.prompt + self.completion


@dataclass(frozen=True)
class RolloutPlan:
    """What a training step samples before its updates.

    Args:
        prompts: over all ranks.
        slots: completions that a rank decodes side by side; None takes all.
        updates: optimizer steps that are taken on it.
    """

    prompts: int
    slots: int | None
    updates: int


@dataclass(frozen=True)
class Frozen:
    """A model that stands beside the trained one.

    Args:
        name: its part.
        config: its Hugging Face config, as JSON.
        scalar: whether it gives scores.
        bytes: of an element.
        quantization: of its matrices.
        judges: whether it forwards the rows of every micro-batch with the policy (reference, teacher).
    """

    name: str
    config: str
    scalar: bool
    bytes: int
    quantization: str | None = None
    judges: bool = True


@dataclass(frozen=True)
class Setup:
    """A run, as far as memory and work depend on it.

    Args:
        config: the trained model's Hugging Face config, as JSON.
        rows: what an optimizer step learns from.
        machine: where it runs.
        scalar: whether a score is trained rather than a policy.
        lora: the adapter that trains; None trains every weight.
        quantization: of the adapter's backbone.
        bytes: of an element of the adapter's backbone.
        checkpointing: whether activations are recomputed.
        eager: whether attention is written out.
        packs_rows: whether a prompt is computed once for its completions.
        critic: "separate", "shared", "adapter" or None.
        adapters: further frozen adapters on the backbone.
        adapter_reference: whether the policy without its adapter forwards every micro-batch too.
        frozen: the models beside it.
        rollout: what is sampled first; None on fixed data.
        optimizer_bytes: the optimizer's state, for each weight that trains; AdamW keeps two moments.
    """

    config: str
    rows: Rows
    machine: Machine
    scalar: bool = False
    lora: LoraSettings | None = None
    quantization: str | None = None
    bytes: int = FP32
    checkpointing: bool = False
    eager: bool = False
    packs_rows: bool = True
    critic: str | None = None
    adapters: int = 0
    adapter_reference: bool = False
    frozen: tuple[Frozen, ...] = ()
    rollout: RolloutPlan | None = None
    optimizer_bytes: float = 2 * FP32


class MicroBatch(NamedTuple):
    """The widest micro-batch of a rank.

    Attributes:
        rows: rows of cells.
        width: cells of a row.
        tokens: supervised tokens.
        masked: whether completions share a prompt's row.
        passes: micro-batches of an optimizer step on a rank.
    """

    rows: int
    width: int
    tokens: int
    masked: bool
    passes: int

    @property
    def cells(self) -> int:
        """Cells of a forward pass."""
        return self.rows * self.width


def micro_batch(rows: Rows, ranks: int, packs_rows: bool) -> MicroBatch:
    """Cut an optimizer step of equal rows as the data's plan and the rollouts' do.

    Args:
        rows: what the step learns from.
        ranks: ranks that share it.
        packs_rows: whether a prompt may be computed once for its completions.
    """
    most, limit = rows.micro_batch_size or math.inf, rows.max_tokens or math.inf
    members = 1
    if packs_rows and rows.completions > 1:
        members = min(rows.completions, max((WIDEST - rows.prompt) // rows.completion, 1))
        if rows.parts_groups:
            members = int(min(members, most, max((limit - rows.prompt) // rows.completion, 1)))
    width = rows.prompt + members * rows.completion
    trees = math.ceil(rows.completions / members)  # rows that a prompt takes
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
