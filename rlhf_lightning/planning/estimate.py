r"""Estimate the memory and compute of a run on each rank from its settings.

The peak is the largest of these moments of a training step:

    sampling         weights, optimizer, gradients, KV cache, the distributions of one decoding step
    statistics       weights, optimizer, gradients, activations and logits of the rollout's forward passes
    backward begins  weights, optimizer, the micro-batch's activations, logits; gradients from the second micro-batch on
    backward ends    weights, optimizer, gradients, one block's activations
    update           weights, optimizer, gradients, the optimizer's temporaries

During sampling, the gradients of the last update are still allocated. In a backward pass activations shrink while
gradients grow, both block by block, so the peak is at its beginning or end.

Assumptions: all rows have the same length; every family is Llama-like; tensor parallelism shards all weights. Rounding
by GPU allocators and NCCL buffers are not counted.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig

from rlhf_lightning.models.lora import LoraSettings
from rlhf_lightning.planning import memory
from rlhf_lightning.planning.memory import BF16, FP32, DecoderSizes, Pass
from rlhf_lightning.planning.setup import (
    Frozen,
    MicroBatch,
    Parameter,
    Setup,
    Skeleton,
    micro_batch,
    skeleton,
    trained_share,
    weight_bytes,
)

SCORED_CELLS = 16_384
"""Tokens per forward pass of a reward model, see `scoring.LearnedScorer`."""

HOLES_FULL, HOLES_ADAPTER = 0.2, 0.3
"""Fragmentation of glibc's heap as a share of the activations, with all weights trained and with an adapter.

Measured on SmolLM2-135M (experiments/benchmarks/plan.md). With MALLOC_MMAP_THRESHOLD_=131072 in the environment there
is no fragmentation. Fragmentation on GPUs is not counted.
"""


class Role(NamedTuple):
    """A model of the run."""

    name: str  # policy, critic, reference ...
    parameters: int  # number of weights
    trained: int  # number of trained weights
    bytes: int  # bytes of its weights on a rank


class Plan(NamedTuple):
    """The estimate of a run."""

    roles: tuple[Role, ...]  # the models
    micro_batch: MicroBatch  # the largest micro-batch
    moments: dict[str, dict[str, int]]  # bytes on the fullest rank by moment and holder
    # tokens of a training step over all ranks, with the prompt counted for each completion; in rollouts sampled tokens
    tokens: int
    flops: dict[str, int]  # FLOPs of a training step over all ranks, by purpose

    @property
    def fullest(self) -> str:
        """The moment of the peak."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def peak(self) -> int:
        """Bytes at the peak on the fullest rank."""
        return sum(self.moments[self.fullest].values())


# -- models -----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _skeleton(config: str, lora: str, scalar: bool, value_head: bool, adapters: int) -> Skeleton:
    settings = None if lora == "null" else LoraSettings(**json.loads(lora))
    return skeleton(config_of(config), settings, scalar, value_head, adapters)


def config_of(text: str) -> Any:
    """Return the Hugging Face config for a JSON text."""
    values = json.loads(text)
    return AutoConfig.for_model(values.pop("model_type"), **values)


def trained_skeleton(setup: Setup) -> Skeleton:
    """Return the trained model, including a critic that shares its trunk."""
    lora = json.dumps(None if setup.lora is None else vars(setup.lora))
    found = _skeleton(setup.config, lora, setup.scalar, setup.critic == "shared", setup.adapters)
    if setup.critic != "adapter":
        return found
    adapter = tuple(part for part in found.parameters if part.trained)
    head = Parameter((1, DecoderSizes.of(config_of(setup.config)).hidden), True, False)
    return found._replace(parameters=(*found.parameters, *adapter, head))


def _roles(setup: Setup) -> list[tuple[str, Skeleton, int, str | None]]:
    """Return name, weights, bytes per frozen element and quantisation of every model, the trained model first."""
    name = "reward model" if setup.scalar else "policy"
    found = [(name, trained_skeleton(setup), setup.bytes, setup.quantization)]
    if setup.critic == "separate":
        found.append(("critic", _skeleton(setup.config, "null", True, False, 0), FP32, None))
    for frozen in setup.frozen:
        weights = _skeleton(frozen.config, "null", frozen.scalar, False, 0)
        still = tuple(part._replace(trained=False) for part in weights.parameters)
        found.append((frozen.name, weights._replace(parameters=still), frozen.bytes, frozen.quantization))
    return found


def trained_passes(setup: Setup, batch: MicroBatch) -> list[Pass]:
    """Return the forward passes with gradient in one graph: the policy's, and a separate critic's."""
    machine = setup.machine
    low = machine.strategy == "sharded" and machine.autocast
    how = Pass(
        weight_bytes=BF16 if low or (setup.lora is not None and setup.bytes == BF16) else FP32,
        autocast=machine.autocast,
        rank=None if setup.lora is None else setup.lora.r,
        targets=_targets(setup.lora),
        adapter_bytes=BF16 if low else FP32,
        checkpointing=setup.checkpointing,
        masked=batch.masked,
        eager=setup.eager,
        quantized=setup.quantization is not None,
    )
    if setup.critic == "separate":
        whole = replace(how, weight_bytes=BF16 if low else FP32, rank=None, quantized=False)
        return [how, whole]
    return [how, how] if setup.critic == "adapter" else [how]


def _targets(lora: LoraSettings | None) -> frozenset[str]:
    """Return the adapted projections; projection names of other families count as all projections."""
    if lora is None or isinstance(lora.targets, str):
        return frozenset(memory.PROJECTIONS)
    return frozenset(lora.targets) & frozenset(memory.PROJECTIONS) or frozenset(memory.PROJECTIONS)


# -- memory -----------------------------------------------------------------------------------------------------------


def plan(setup: Setup) -> Plan:
    """Return the estimate of a run."""
    batch = micro_batch(setup.rows, setup.machine.data_ranks, setup.packs_rows)
    machine, roles = setup.machine, _roles(setup)
    tensor = machine.tensor_ranks
    held = [weight_bytes(one.parameters, size, kind, machine.cuts) // tensor for _, one, size, kind in roles]
    trained = sum(trained_share(one.parameters, machine.cuts) // tensor for _, one, _, _ in roles)
    always = {"weights": sum(held), "optimizer": int(setup.optimizer_bytes * trained), "process": machine.process_bytes}
    gradients = FP32 * trained
    if machine.strategy == "ddp":
        always["gradient buckets"] = gradients
    gathered = {"gathered weights": _gathered_bytes(setup, roles)} if machine.strategy == "sharded" else {}
    moments = _moments(setup, batch, roles, gradients)
    rows = setup.rows
    count = rows.groups * rows.completions
    if setup.rollout is not None:
        tokens = setup.rollout.prompts * rows.completions * rows.completion
    else:
        tokens = count * rows.length
    described = (
        Role(name, sum(p.size for p in one.parameters), trained_share(one.parameters), size)
        for (name, one, _, _), size in zip(roles, held, strict=True)
    )
    passing = {name: {} if name == "update" else gathered for name in moments}  # the optimizer works on shards
    whole = {
        name: {**always, **passing[name], **{k: v for k, v in parts.items() if v}} for name, parts in moments.items()
    }
    return Plan(tuple(described), batch, whole, tokens, _flops(setup, batch))


def _gathered_bytes(setup: Setup, roles: list[tuple[str, Skeleton, int, str | None]]) -> int:
    """Return the bytes that FSDP2 gathers during forward and backward pass.

    These are the weights outside the blocks, of each trained model; two blocks of one model, the current and the next;
    and the gradients of trained weights before they are reduced and sharded, in compute precision and in fp32.
    """
    low = BF16 if setup.machine.autocast else FP32
    total, widest = 0, 0
    for _, one, size, _ in roles:
        trains = [part for part in one.parameters if part.trained]
        block = DecoderSizes.of(config_of(setup.config))
        every = sum(part.size for part in one.parameters)
        two = 2 * (every - one.outside) // block.layers // setup.machine.tensor_ranks
        element = low if setup.machine.autocast else (FP32 if trains else size)
        whole = len(trains) > 0 and setup.lora is None
        total += one.outside * (element + (low if whole else 0)) if trains else 0
        widest = max(widest, two * element + (two // 2 * (low + FP32) if whole else 0))
    return total + widest


def _moments(
    setup: Setup, batch: MicroBatch, roles: list[tuple[str, Skeleton, int, str | None]], gradients: int
) -> dict[str, dict[str, int]]:
    """Return bytes by moment and holder, without memory that is always allocated."""
    block = DecoderSizes.of(config_of(setup.config))
    passes = trained_passes(setup, batch)
    tensor = setup.machine.tensor_ranks
    parts = [memory.kept_bytes(block, how, batch.rows, batch.width) // tensor for how in passes]
    kept, holes = sum(parts), 0
    if setup.machine.holes:
        shares = [HOLES_FULL if how.rank is None else HOLES_ADAPTER for how in passes]
        holes = int(sum(share * part for share, part in zip(shares, parts, strict=True)))
    flight = max(memory.backward_bytes(block, how, batch.rows, batch.width) for how in passes) // tensor
    language = 0 if setup.scalar else 1
    states = language * batch.tokens * block.hidden * passes[0].compute_bytes
    head = language * memory.head_bytes(block, batch.tokens, setup.lora is None)
    asides = [_aside(setup, batch, frozen) for frozen in setup.frozen if frozen.judges]
    if setup.adapter_reference:
        asides.append(_forward(block, passes[0], batch, True))
    before = gradients if batch.passes > 1 else 0
    begins = [{"activations": kept + states + flight, "logits": head}]
    begins += [{"activations": kept + states + part, "logits": logits} for part, logits in asides]
    fullest = max(begins, key=lambda held: sum(held.values()))
    one_block = kept // block.layers if not setup.checkpointing else 0
    tied = FP32 * block.vocabulary * block.hidden if setup.lora is None else 0
    largest = max((part.share(setup.machine.cuts) for _, one, _, _ in roles for part in one.parameters if part.trained))
    trained = gradients // FP32
    moments = {} if setup.rollout is None else _rollout_moments(setup, block, passes[0], gradients)
    return moments | {
        "backward begins": {"gradients": before, **fullest, "allocator": holes},
        "backward ends": {"gradients": gradients + tied // setup.machine.cuts, "activations": one_block + flight},
        "update": {"gradients": gradients, "temporaries": FP32 * (trained if setup.machine.gpu else 2 * largest)},
    }


def _forward(block: DecoderSizes, how: Pass, batch: MicroBatch, language: bool) -> tuple[int, int]:
    """Return the bytes of activations and logits in a forward pass without gradient."""
    logits = memory.head_bytes(block, batch.tokens, False, gradient=False) if language else 0
    return memory.forward_bytes(block, how, batch.rows, batch.width), logits


def _aside(setup: Setup, batch: MicroBatch, frozen: Frozen) -> tuple[int, int]:
    how = Pass(
        weight_bytes=frozen.bytes,
        autocast=setup.machine.autocast,
        masked=batch.masked,
        quantized=frozen.quantization is not None,
    )
    return _forward(DecoderSizes.of(config_of(frozen.config)), how, batch, not frozen.scalar)


def _rollout_moments(setup: Setup, block: DecoderSizes, how: Pass, gradients: int) -> dict[str, dict[str, int]]:
    """Return the bytes while completions are sampled, and while the rollout is scored and its statistics computed."""
    assert setup.rollout is not None
    rows, machine = setup.rows, setup.machine
    mine = math.ceil(setup.rollout.prompts * rows.completions / machine.data_ranks)
    slots = min(setup.rollout.slots or mine, mine)
    whole = replace(rows, groups=setup.rollout.prompts)
    batch = micro_batch(whole, machine.data_ranks, setup.packs_rows)
    judged = [_forward(block, how, batch, not setup.scalar)]
    judged += [_aside(setup, batch, frozen) for frozen in setup.frozen if frozen.judges]
    scored = max(min(mine, SCORED_CELLS // rows.length), 1)
    for frozen in setup.frozen:
        if not frozen.judges:
            judged.append(_aside(setup, batch._replace(rows=scored, width=rows.length, masked=False), frozen))
    activations, logits = max(judged, key=sum)
    return {
        "sampling": {
            "gradients": gradients,
            "KV cache": memory.cache_bytes(block, slots, rows.length, how.compute_bytes),
            "activations": memory.forward_bytes(block, how, slots, rows.prompt),
            "logits": memory.sampling_bytes(block, slots),
        },
        "statistics": {"gradients": gradients, "activations": activations, "logits": logits},
    }


# -- speed ------------------------------------------------------------------------------------------------------------


class Rates(NamedTuple):
    """Maximum rates of a device: FLOP/s of matrix products, and bytes per second of a copy (reads and writes)."""

    products: float
    traffic: float


def measured_rates(setup: Setup, batch: MicroBatch, seconds: float = 5.0) -> Rates | None:
    """Measure a run's largest matrix product and a copy on this machine; None if the run needs a missing GPU.

    Args:
        setup: the run.
        batch: its largest micro-batch.
        seconds: total time of both measurements.
    """
    if setup.machine.gpu and not torch.cuda.is_available():
        return None
    block, machine = DecoderSizes.of(config_of(setup.config)), setup.machine
    device = "cuda" if machine.gpu else "cpu"
    low = machine.autocast or machine.precision == "bf16-true" or setup.bytes == BF16
    dtype = torch.bfloat16 if low else torch.float32
    cells = min(max(batch.rows * batch.width, 1), 16384)
    left = torch.rand(cells, block.hidden, device=device, dtype=dtype)
    right = torch.rand(block.hidden, block.intermediate, device=device, dtype=dtype)
    buffer, other = torch.rand(2, 2**24, device=device)
    product = _per_second(lambda: torch.mm(left, right), device, seconds / 2)
    copy = _per_second(lambda: buffer.copy_(other), device, seconds / 2)
    return Rates(product * 2 * cells * block.hidden * block.intermediate, copy * 2 * buffer.nbytes)


def _per_second(call: Callable[[], Any], device: str, seconds: float) -> float:
    """Return how often a call completes per second, measured in the fastest of about ten time intervals."""
    call()
    began, fastest = time.perf_counter(), math.inf
    while time.perf_counter() - began < seconds:
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds / 10:
            call()
            count += 1
            if device == "cuda":
                torch.cuda.synchronize()
        fastest = min(fastest, (time.perf_counter() - start) / count)
    return 1 / fastest


def most_tokens_per_second(setup: Setup, found: Plan, rates: Rates) -> float:
    """Return the roofline of a run: FLOPs at the rate of matrix products, plus memory traffic at the rate of a copy.

    Memory traffic counts activations and their gradients (written and read), the optimizer's state and the weights
    (read and written), and the weights once for every decoding step of a batch.
    """
    machine = setup.machine
    compute = sum(found.flops.values()) / (machine.data_ranks * machine.tensor_ranks) / rates.products
    held = found.moments[found.fullest]
    updates = 1 if setup.rollout is None else setup.rollout.updates
    moved = 4 * held.get("activations", 0) * found.micro_batch.passes * updates
    moved += 2 * updates * (held.get("optimizer", 0) + sum(role.trained for role in found.roles) * FP32)
    if setup.rollout is not None:
        drawn = setup.rollout.prompts * setup.rows.completions / machine.data_ranks
        batches = math.ceil(drawn / min(setup.rollout.slots or drawn, drawn))
        moved += found.roles[0].bytes * setup.rows.completion * batches
    return found.tokens / (compute + moved / rates.traffic)


# -- compute ----------------------------------------------------------------------------------------------------------


def _flops(setup: Setup, batch: MicroBatch) -> dict[str, int]:
    """Return the FLOPs of a training step over all ranks by purpose."""
    block, passes = DecoderSizes.of(config_of(setup.config)), trained_passes(setup, batch)
    updates = 1 if setup.rollout is None else setup.rollout.updates
    rows = setup.rows
    members = batch.tokens // (batch.rows * rows.completion)
    cells = rows.groups * math.ceil(rows.completions / max(members, 1)) * batch.width
    tokens = 0 if setup.scalar else rows.groups * rows.completions * rows.completion
    once = memory.forward_flops(block, cells, batch.width) + memory.head_flops(block, tokens, True, gradient=False)
    learning = sum(
        memory.forward_flops(block, cells, batch.width) + memory.backward_flops(block, cells, batch.width, how)
        for how in passes
    ) + memory.head_flops(block, tokens, setup.lora is None)
    judges = sum(frozen.judges for frozen in setup.frozen) + setup.adapter_reference
    if setup.rollout is None:
        return {"learning": learning} | ({"reference": judges * once} if judges else {})
    times = setup.rollout.prompts / rows.groups
    drawn = int(times * rows.groups * rows.completions)
    scorers = sum(not frozen.judges for frozen in setup.frozen)
    decoding = memory.forward_flops(block, drawn * rows.length, rows.length)
    decoding += memory.head_flops(block, drawn * rows.completion, True, gradient=False)
    judged = int(times * once * (len(passes) + judges)) + scorers * memory.forward_flops(
        block, drawn * rows.length, rows.length
    )
    return {"sampling": decoding, "statistics": judged, "learning": updates * learning}
