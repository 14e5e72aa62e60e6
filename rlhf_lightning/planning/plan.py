"""``rlhf plan``: estimate the memory and compute of a run from its command line; no weights are loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

from rlhf_lightning.atomic_files import refuse_special, write_text
from rlhf_lightning.commands.flags import flags, option_pairs, with_underscores
from rlhf_lightning.commands.messages import parameters_of, subclasses_of
from rlhf_lightning.commands.parsing import PlainParser, in_copied_context
from rlhf_lightning.commands.train_settings import SettingsCLI
from rlhf_lightning.errors import check_range
from rlhf_lightning.loading import flat_settings, read_config
from rlhf_lightning.models.lora import LoraSettings
from rlhf_lightning.planning.estimate import Plan, Rates, measured_rates, most_tokens_per_second, plan
from rlhf_lightning.planning.memory import BF16, FP32
from rlhf_lightning.planning.setup import Setup, micro_batch
from rlhf_lightning.planning.setup_from_config import A_MODEL, setup_of
from rlhf_lightning.quiet import silence_libraries
from rlhf_lightning.training.module import AlignmentModule

FITS, DOES_NOT_FIT = 0, 1
GB = 1e9
PLACEHOLDERS = {"model.init_from": A_MODEL, "data.source": "rows.jsonl", "model.scorer": A_MODEL}
"""Values for required settings that an estimate does not need."""


@dataclass
class Assumed:
    """Assumptions that are not settings of a run.

    Args:
        config: sizes of the trained model if ``model.init_from`` is not available: a config.json, its text, as
            '{"hidden_size": 4096, ...}', or a published architecture such as Llama-3.1-8B.
        prompt_length: tokens of a prompt; null uses data.max_prompt_length, else half of data.max_length.
        completion_length: tokens of a completion; null uses the rest of data.max_length (rollouts:
            model.max_new_tokens).
    """

    config: str | None = None
    prompt_length: int | None = None
    completion_length: int | None = None


class PlanCLI(SettingsCLI):
    """Parse a command line like ``rlhf fit`` and build module, data and strategy, but no trainer and no folder."""

    shown = "plan"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of `rlhf plan`."""
        super().add_arguments_to_parser(parser)
        add_plan_options(parser)


def add_plan_options(parser: ArgumentParser) -> None:
    """Add the options that `rlhf fit` does not have."""
    parser.add_argument("--memory", type=float | None, default=None, help="memory of each device in GB")
    parser.add_argument("--speed", type=bool, default=False, help="measure this machine for 5 s: tokens per second")
    parser.add_argument("--json", type=str | None, default=None, help="also write the plan to this file")
    parser.add_class_arguments(Assumed, "plan")


def tool_parser() -> ArgumentParser:
    """Return a parser with only the options of `add_plan_options`."""
    parser = PlainParser()
    add_plan_options(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    silence_libraries()
    argv = with_underscores(argv)
    cli = in_copied_context(PlanCLI, ["fit", *argv, *placeholders(argv)])
    settings = cli.config_init.fit
    check_range(settings.memory is None or settings.memory > 0, "give the GB of a device", memory=settings.memory)
    for name in ("prompt_length", "completion_length"):
        length = getattr(settings.plan, name)
        check_range(length is None or length >= 1, "it must be at least 1 token", **{f"plan.{name}": length})
    if settings.json is not None:
        refuse_special(Path(settings.json))
    setup = setup_of(cli.model, cli.datamodule, settings.trainer, settings.plan)
    found = plan(setup)
    limit = None if settings.memory is None else int(settings.memory * GB)
    helpful = remedies(setup, limit) if limit is not None and found.peak > limit else []
    print(described(type(cli.model).__name__, setup, found, limit, helpful))
    record = as_record(type(cli.model).__name__, setup, found, limit, helpful)
    if settings.speed:
        rates = measured_rates(setup, found.micro_batch)
        record["most_tokens_per_second"] = None if rates is None else most_tokens_per_second(setup, found, rates)
        print(_speed(rates, record["most_tokens_per_second"]))
    if settings.json is not None:
        write_text(Path(settings.json), json.dumps(record, indent=2) + "\n")
    return DOES_NOT_FIT if helpful else FITS


# -- arguments --------------------------------------------------------------------------------------------------------


def placeholders(argv: Sequence[str]) -> list[str]:
    """Return flags for missing required settings, because a plan needs no data and, with --plan.config, no model."""
    given, files = flags(argv), [value for name, value in option_pairs(argv) if name == "--config"]
    settings = [flat_settings(read_config(Path(file))) for file in files if Path(file).is_file()]
    known = {name.removeprefix("--").replace(".init_args", "") for name in given}.union(*settings)
    if any(name.endswith(".help") or name in ("help", "print_config") for name in known):
        return []
    written = [found[name] for found in settings for name in ("model", "model.class_path") if name in found]
    kind = given.get("--model", given.get("--model.class_path", "")) or next(iter(written), "")
    takes = parameters_of(_full_path(kind)) if kind else []
    return [
        part
        for name, value in PLACEHOLDERS.items()
        if not any(one == name or one.startswith(f"{name}.") for one in known)
        and (name != "model.scorer" or "scorer" in takes)
        for part in (f"--{name}", value)
    ]


def _full_path(kind: str) -> str:
    found = subclasses_of(AlignmentModule).get(kind)
    return kind if found is None else f"{found.__module__}.{found.__qualname__}"


# -- remedies ---------------------------------------------------------------------------------------------------------

NODE = 8
"""Number of GPUs per host."""


class Remedy(NamedTuple):
    """A change of settings that needs less memory."""

    flags: tuple[str, ...]  # flags to add, for one or several changes together
    setup: Setup  # the changed run
    peak: int  # bytes on the fullest rank


def remedies(setup: Setup, limit: int) -> list[Remedy]:
    """Return the single changes that make a run fit into ``limit`` bytes per rank; if there are none, a combination.

    If all changes together are not enough, return them as one remedy with its peak.
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
    """Add the next change that helps, at its strongest value."""
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
    """Yield flags that lower memory, each with the changed run; the first flags change results only by rounding."""
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
    """Return the flags for this many GPUs, on several hosts if needed."""
    hosts = f"{NODE} --trainer.num_nodes {math.ceil(ranks / NODE)}" if ranks > NODE else f"{ranks}"
    return f"--trainer.devices {hosts} --trainer.strategy.data_parallel_size {data_ranks}"


def _smaller_micro_batches(setup: Setup) -> Iterator[tuple[str, Setup]]:
    """Yield limits of one half, one quarter ... of the micro-batch, down to one row."""
    batch = micro_batch(setup.rows, setup.machine.data_ranks, setup.packs_rows)
    for halvings in range(1, 1 + math.floor(math.log2(max(batch.rows, 1)))):
        cells = batch.width * max(batch.rows >> halvings, 1)
        yield f"--data.max_tokens {cells}", replace(setup, rows=replace(setup.rows, max_tokens=cells))


def _fewer_weights(setup: Setup) -> Iterator[tuple[str, Setup]]:
    """Yield changes for smaller weights in memory: an adapter, lower precision of frozen weights, a shared critic."""
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
        yield "--model.quantization nf4 --model.dtype bfloat16", replace(setup, bytes=BF16, quantization="nf4")
    if setup.critic == "separate":
        yield "--model.critic shared", replace(setup, critic="shared")


# -- output -----------------------------------------------------------------------------------------------------------


def described(name: str, setup: Setup, found: Plan, limit: int | None, helpful: Sequence[Remedy]) -> str:
    """Return the plan as text."""
    machine, batch, rows = setup.machine, found.micro_batch, setup.rows
    trains = "all weights" if setup.lora is None else f"an adapter of rank {setup.lora.r}"
    trains += f" on {setup.quantization}" if setup.quantization else ""
    kind = {"single": "", "ddp": ", ddp", "sharded": ", sharded"}[machine.strategy]
    ranks = machine.data_ranks * machine.tensor_ranks
    where = f"{ranks} {'GPU' if machine.gpu else 'CPU process'}{'' if ranks == 1 else 's' if machine.gpu else 'es'}"
    lines = [f"{name}: {trains}, {machine.precision}, {where}{kind}", ""]
    lines.append(f"{'model':<16}{'parameters':>17}{'trained':>17}{'GB a rank':>12}")
    for role in found.roles:
        lines.append(f"{role.name:<16}{role.parameters:>17,}{role.trained:>17,}{role.bytes / GB:>12.2f}")
    shared = " that share their prompt" if batch.masked else ""
    each = f" x {rows.completions} completions{shared}" if rows.completions > 1 else ""
    what = "rollout" if setup.rollout is not None else "step"
    lines += [
        "",
        f"an update: {rows.groups} prompts of {rows.prompt} tokens{each} of {rows.completion}; "
        f"{_times(batch.passes, 'micro-batch')} a rank of {batch.rows} x {batch.width} tokens",
        f"a {what}:  {found.tokens:,} tokens, {_flops(sum(found.flops.values()))} "
        f"({', '.join(f'{part} {_flops(count)}' for part, count in found.flops.items())})",
        "",
        *_table(found),
        "",
        f"peak: {found.peak / GB:.2f} GB a rank, {found.fullest}",
    ]
    return "\n".join([*lines, *_verdict(found, limit, helpful)])


def _table(found: Plan) -> list[str]:
    """Return the lines of the table of memory by holder and moment."""
    holders = list(dict.fromkeys(holder for parts in found.moments.values() for holder in parts))
    lines = ["GB a rank         " + "".join(f"{moment:>17}" for moment in found.moments)]
    for holder in holders:
        cells = (parts.get(holder) for parts in found.moments.values())
        lines.append(f"{holder:<18}" + "".join(f"{'' if b is None else f'{b / GB:.2f}':>17}" for b in cells))
    total = "".join(f"{sum(parts.values()) / GB:>17.2f}" for parts in found.moments.values())
    return [*lines, f"{'together':<18}{total}"]


def _verdict(found: Plan, limit: int | None, helpful: Sequence[Remedy]) -> list[str]:
    """Return the lines that say whether the run fits, and the remedies."""
    if limit is None:
        return []
    if not helpful:
        return [f"fits {limit / GB:g} GB; {(limit - found.peak) / GB:.2f} GB to spare"]
    lines = [f"does not fit {limit / GB:g} GB; {(found.peak - limit) / GB:.2f} GB too much", ""]
    if helpful[0].peak > limit:
        lines.append("all of these together are not enough:" if helpful[0].flags else "no setting would help")
    else:
        lines.append("each of these is enough:" if len(helpful[0].flags) == 1 else "these together are enough:")
    for remedy in helpful:
        lines += [f"  {flag}" for flag in remedy.flags[:-1]]
        lines += [f"  {flag:<72}{remedy.peak / GB:>8.2f} GB" for flag in remedy.flags[-1:]]
    return lines


def as_record(name: str, setup: Setup, found: Plan, limit: int | None, helpful: Sequence[Remedy]) -> dict[str, Any]:
    """Return the plan as plain values."""
    return {
        "module": name,
        "machine": asdict(setup.machine),
        "rows": asdict(setup.rows),
        "roles": [role._asdict() for role in found.roles],
        "micro_batch": found.micro_batch._asdict(),
        "bytes": found.moments,
        "peak_bytes": found.peak,
        "peak_moment": found.fullest,
        "tokens_per_step": found.tokens,
        "flops_per_step": found.flops,
        "memory_bytes": limit,
        "fits": None if limit is None else found.peak <= limit,
        "remedies": [{"flags": list(one.flags), "peak_bytes": one.peak} for one in helpful],
    }


def _speed(rates: Rates | None, most: float | None) -> str:
    """Return the line about the speed of a run."""
    if rates is None or most is None:
        return "speed: not measured, because the run uses GPUs and this machine has none"
    measured = f"products {_flops(rates.products)}/s, copies {rates.traffic / GB:.1f} GB/s"
    return f"speed: at most {most:,.0f} tokens/s on devices like this one ({measured})"


def _times(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 'es'}"


def _flops(count: float) -> str:
    """Return FLOPs with a unit prefix."""
    power = min(int(math.log10(max(count, 1))) // 3, 6)
    return f"{count / 1000**power:.3g} {('', 'k', 'M', 'G', 'T', 'P', 'E')[power]}FLOP"
