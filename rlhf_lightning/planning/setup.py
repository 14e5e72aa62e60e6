"""A run as far as memory and work depend on it: its models, rows and machine, as plain values that can be changed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from rlhf_lightning.models.loading import LoraSettings
from rlhf_lightning.models.packing import WIDEST
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
