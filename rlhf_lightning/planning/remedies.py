"""What would make a run fit: changes of its settings, the least intrusive first, each tried on the plan."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from rlhf_lightning.models.loading import LoraSettings
from rlhf_lightning.planning.estimate import plan
from rlhf_lightning.planning.memory import BF16, FP32
from rlhf_lightning.planning.setup import Setup, micro_batch

NODE = 8
"""GPUs of a host, as most have them."""


class Remedy(NamedTuple):
    """A change that takes less memory.

    Attributes:
        flags: what to add to the command line, one or several changes together.
        setup: the run so changed.
        peak: bytes on the fullest rank.
    """

    flags: tuple[str, ...]
    setup: Setup
    peak: int


def remedies(setup: Setup, limit: int) -> list[Remedy]:
    """Return what would make a run fit: every single change that does, else the first changes that do together.

    Where even all of them do not, all of them are returned as one, with the peak that remains.

    Args:
        setup: a run that does not fit.
        limit: bytes that a rank may hold.
    """
    fitting: dict[str, Remedy] = {}
    for flag, changed in changes(setup):
        peak = plan(changed).peak
        if peak <= limit:
            fitting.setdefault(_argument(flag), Remedy((flag,), changed, peak))
    if fitting:
        return list(fitting.values())
    together = Remedy((), setup, plan(setup).peak)
    while together.peak > limit and (better := _next(together)) is not None:
        together = better
    return [together]


def _next(so_far: Remedy) -> Remedy | None:
    """Make the first further change that helps, as strongly as it can be made."""
    done = {_argument(flag) for flag in so_far.flags}
    strongest: dict[str, Remedy] = {}
    for flag, changed in changes(so_far.setup):
        one = Remedy((*so_far.flags, flag), changed, plan(changed).peak)
        name = _argument(flag)
        if name not in done and one.peak < min(0.99 * so_far.peak, strongest.get(name, so_far).peak):
            strongest[name] = one
    return next(iter(strongest.values()), None)


def _argument(flag: str) -> str:
    return flag.split()[0]


def changes(setup: Setup) -> Iterator[tuple[str, Setup]]:
    """Yield flags that lower memory and the run they lead to; the first ones change no result beyond rounding."""
    yield from _smaller_micro_batches(setup)
    machine = setup.machine
    if not setup.checkpointing:
        yield "--model.activation_checkpointing true", replace(setup, checkpointing=True)
    if machine.gpu and machine.precision == "32-true":
        mixed = replace(machine, precision="bf16-mixed")
        yield "--trainer.precision bf16-mixed", replace(setup, machine=mixed)
    if any(frozen.bytes == FP32 for frozen in setup.frozen):
        light = tuple(replace(frozen, bytes=BF16) for frozen in setup.frozen)
        yield "--model.frozen_dtype bfloat16", replace(setup, frozen=light)
    if machine.strategy != "sharded" and machine.gpu and setup.quantization is None:
        count = max(machine.data_ranks, NODE)
        cut = replace(machine, data_ranks=count, strategy="sharded", precision="bf16-mixed")
        yield f"--config recipe:hardware/fsdp --trainer.devices {count}", replace(setup, machine=cut)
    if machine.strategy == "sharded":
        for times in (2, 4, 8):
            more = replace(machine, data_ranks=times * machine.data_ranks)
            yield _on_ranks(more.data_ranks * more.tensor_ranks, more.data_ranks), replace(setup, machine=more)
    yield from _fewer_weights(setup)
    rows = setup.rows
    if setup.rollout is None and rows.length >= 512:
        shorter = replace(rows, prompt=rows.prompt // 2, completion=rows.completion // 2)
        yield f"--data.max_length {shorter.length}", replace(setup, rows=shorter)


def _on_ranks(ranks: int, data_ranks: int) -> str:
    """Flags of a run on so many GPUs, over several hosts where one has too few."""
    hosts = f"{NODE} --trainer.num_nodes {math.ceil(ranks / NODE)}" if ranks > NODE else f"{ranks}"
    return f"--trainer.devices {hosts} --trainer.strategy.data_parallel_size {data_ranks}"


def _smaller_micro_batches(setup: Setup) -> Iterator[tuple[str, Setup]]:
    """Yield bounds of a half, a quarter ... of the micro-batch's cells, down to one row."""
    batch = micro_batch(setup.rows, setup.machine.data_ranks, setup.packs_rows)
    for halvings in range(1, 1 + math.floor(math.log2(max(batch.rows, 1)))):
        cells = batch.width * max(batch.rows >> halvings, 1)
        yield f"--data.max_tokens {cells}", replace(setup, rows=replace(setup.rows, max_tokens=cells))


def _fewer_weights(setup: Setup) -> Iterator[tuple[str, Setup]]:
    """Yield an adapter in place of all weights, half or a quarter of the bytes for what stands still, a shared critic.

    They change what is trained.
    """
    if setup.lora is None:
        beside = tuple(frozen for frozen in setup.frozen if frozen.name != "reference")
        refers = len(beside) < len(setup.frozen)
        adapted = replace(setup, lora=LoraSettings(), frozen=beside, adapter_reference=refers)
        yield "--model.lora.r 16", adapted
        if setup.machine.gpu:
            yield "--model.lora.r 16 --model.dtype bfloat16", replace(adapted, bytes=BF16)
        if setup.machine.strategy != "sharded":
            four = replace(adapted, bytes=BF16, quantization="nf4")
            yield "--model.lora.r 16 --model.dtype bfloat16 --model.quantization nf4", four
    elif setup.quantization is None and setup.machine.strategy != "sharded":
        yield (
            "--model.quantization nf4 --model.dtype bfloat16",
            replace(setup, bytes=BF16, quantization="nf4"),
        )
    if setup.critic == "separate":
        yield "--model.critic shared", replace(setup, critic="shared")
