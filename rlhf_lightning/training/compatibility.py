"""Check that strategy, precision, callbacks and trainer settings work together, before any weight is loaded.

Each ``refused_*`` rule is a function of plain values. It returns why a combination fails and the nearest combination
that works, or None. `check` applies all rules.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, Protocol

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from transformers import AutoConfig

from rlhf_lightning.compat import (
    mesh_sizes,
)
from rlhf_lightning.errors import SettingError
from rlhf_lightning.models.compiling import missing_compiler
from rlhf_lightning.models.folders import reading, trusts
from rlhf_lightning.models.loading import LoadSettings
from rlhf_lightning.models.lora import LoraSettings
from rlhf_lightning.models.resolving import is_adapter, resolve_folder
from rlhf_lightning.models.sharding import tensor_plan

SHARDED = "ModelParallelStrategy"


class Stage(Protocol):
    """Attributes of a module that the rules read."""

    batch_type: ClassVar[type]
    has_policy: ClassVar[bool]
    init_from: str
    lora: LoraSettings | None
    load_settings: LoadSettings
    compile_layers: bool
    critic_kind: str | None

    @property
    def updates_per_step(self) -> int:
        """Number of optimizer steps per training step."""
        ...


class IncompatibleError(SettingError):
    """The run's settings do not work together."""


# -- strategy, precision, quantization --------------------------------------------------------------------------------


def refused_strategy(strategy: str) -> str | None:
    """Refuse strategies, by kind or name, that fail or train wrongly with manual optimization."""
    if "fsdp" in strategy.lower():
        reason = (
            "the strategy fsdp (FSDP1) fails with manual optimization, which all modules here use, and cannot clip "
            "gradients by norm"
        )
    elif "spawn" in strategy.lower():
        return (
            "ddp_spawn would pickle the models into new processes: use ddp, which starts the script once for each rank"
        )
    elif "deepspeed" in strategy.lower() or strategy.lower().startswith("zero"):
        reason = "DeepSpeed's engine counts micro-batches and clips gradients, which the modules here do themselves"
    else:
        return None
    return f"{reason}: use {SHARDED} (FSDP2), for example with recipe:hardware/fsdp"


def refused_precision(precision: str) -> str | None:
    """Refuse fp16, since scaled gradients would be clipped before they are unscaled."""
    if precision not in ("16", "16-mixed", "16-true"):
        return None
    return f"trainer.precision={precision} would clip gradients before they are unscaled; use bf16-mixed or 32-true"


def refused_quantization(strategy: str, quantization: str | None) -> str | None:
    """Refuse to shard quantized weights."""
    if quantization is None or strategy != SHARDED:
        return None
    return (
        f"{quantization} weights cannot be sharded: a shard would split the blocks that share a scale. Use ddp, or one "
        f"GPU, with {quantization}, or {SHARDED} with bfloat16 weights"
    )


def refused_compilation(strategy: str, device: str, recomputes: bool) -> str | None:
    """Refuse to compile layers without a compiler for the device, and sharded layers that recompute activations."""
    if strategy == SHARDED and recomputes:
        return (
            f"compile_layers and activation_checkpointing do not work together with {SHARDED}: set one of them to false"
        )
    missing = missing_compiler(device)
    return None if missing is None else f"{missing}: install one, or set model.compile_layers to false"


def refused_sizes(data_parallel: int | str, tensor_parallel: int | str, ranks: int) -> str | None:
    """Refuse a mesh that does not match the ranks, or default sizes, which shard the model instead of the data."""
    if isinstance(data_parallel, str) or isinstance(tensor_parallel, str):
        given = f"data_parallel_size={data_parallel}, tensor_parallel_size={tensor_parallel}"
        return (
            f"{SHARDED} with {given} would shard each matrix over all devices of a host: set "
            f"data_parallel_size={ranks} and tensor_parallel_size=1"
        )
    if data_parallel * tensor_parallel == ranks:
        return None
    divides = ranks % tensor_parallel == 0
    remedy = f"{ranks // tensor_parallel}" if divides else f"{ranks} and tensor_parallel_size=1"
    return (
        f"{SHARDED} has data_parallel_size={data_parallel} x tensor_parallel_size={tensor_parallel}, but there are "
        f"{ranks} ranks: set data_parallel_size={remedy}"
    )


def refused_tensor_parallelism(tensor_parallel: int, lora: bool, has_plan: bool, heads: int | None) -> str | None:
    """Refuse tensor parallelism for adapters, and for models without a transformers plan that fits their heads."""
    remedy = "set tensor_parallel_size=1 and data_parallel_size to the number of ranks"
    if lora:
        return f"tensor parallelism shards the matrices that an adapter is attached to: {remedy}, or train every weight"
    if not has_plan:
        return f"transformers has no tensor-parallel plan for this model's family: {remedy}"
    if heads is not None and heads % tensor_parallel:
        return f"{heads} key and value heads cannot be divided by tensor_parallel_size={tensor_parallel}: {remedy}"
    return None


def refused_roles(strategy: str, critic: str | None) -> str | None:
    """Refuse a critic that runs the policy's backbone, since only the policy's own call gathers sharded weights."""
    if strategy != SHARDED or critic != "adapter":
        return None
    return f"critic=adapter forwards the policy's backbone, which {SHARDED} shards: use critic=shared or separate"


def refused_stacked_adapter(strategy: str, has_policy: bool, lora: bool, starts_from_adapter: bool) -> str | None:
    """Refuse a sharded reward adapter on top of another adapter, since the export must merge unsharded weights."""
    if strategy != SHARDED or has_policy or not lora or not starts_from_adapter:
        return None
    return (
        f"a reward adapter on top of another adapter is merged at export, and {SHARDED} shards its weights: start from "
        "a merged model (rlhf export --merge), or use ddp"
    )


# -- sharing a batch between ranks ------------------------------------------------------------------------------------


def refused_division(prompts: int, shares: int, samples: int) -> str | None:
    """Refuse rollouts with a number of prompts that data-parallel ranks cannot divide evenly."""
    if prompts % shares == 0:
        return None
    nearest = max(round(prompts / shares), 1) * shares * samples
    return (
        f"{shares} ranks cannot share the {prompts} prompts of a rollout evenly: set data.batch_size={nearest} "
        f"({nearest // samples} prompts, samples_per_prompt {samples})"
    )


def refused_share(datamodule: Any, shares: int) -> str | None:
    """Refuse a step with too few rows for the data-parallel ranks, or with prompts that they cannot divide evenly."""
    samples = getattr(datamodule, "samples_per_prompt", None)
    rows, unit = (datamodule.batch_size, "rows") if samples is None else (datamodule.batch_size // samples, "prompts")
    if rows < shares:
        return f"{shares} ranks cannot share {rows} {unit} a step: raise data.batch_size, or use at most {rows} ranks"
    return None if samples is None else refused_division(rows, shares, samples)


# -- checks of a trainer ----------------------------------------------------------------------------------------------


UNNEEDED_WARNINGS = (
    r"You have overridden `transfer_batch_to_device` in `LightningModule`.*",  # ragged batches stay on the CPU
    r".*isinstance\(treespec, LeafSpec\).*",  # between Lightning and torch
    r".*`LeafSpec`.*",
    r"It is recommended to use `self\.log\(.*sync_dist=True\)`.*",  # modules reduce before they log the quotient
)
"""Warnings of Lightning that require no action."""


def check(trainer: Trainer, module: Stage, datamodule: Any = None, fits: bool = True) -> None:
    """Refuse a combination that does not work, before anything is read; evaluation accepts any batch size.

    Raises:
        IncompatibleError: ``incompatible-settings``, with the nearest combination that works.
    """
    for message in UNNEEDED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for reason in filter(None, refusals(trainer, module, datamodule if fits else None)):
        raise IncompatibleError("incompatible-settings", reason)


def refusals(trainer: Trainer, module: Stage, datamodule: Any = None) -> Iterator[str | None]:
    """Yield the result of each rule; later rules assume that earlier rules found nothing."""
    kind, ranks = kind_of(trainer.strategy), trainer.num_devices * trainer.num_nodes
    lora = module.lora is not None
    yield refused_strategy(kind)
    yield refused_precision(str(trainer.precision))
    yield refused_quantization(kind, module.load_settings.quantization)
    if module.compile_layers:
        recomputes = module.load_settings.activation_checkpointing
        yield refused_compilation(kind, trainer.strategy.root_device.type, recomputes)
    yield refused_roles(kind, module.critic_kind)
    yield refused_stacked_adapter(kind, module.has_policy, lora, is_adapter(module.init_from))
    together = 1
    if isinstance(trainer.strategy, ModelParallelStrategy):
        data, width = mesh_sizes(trainer.strategy)
        yield refused_sizes(data, width, ranks)
        together = int(width)
        if together > 1:
            yield refused_tensor_parallelism(together, lora, *plan_of(module))
    if ranks > together and getattr(datamodule, "batch_size", None) is not None:
        yield refused_share(datamodule, ranks // together)


def kind_of(strategy: Strategy) -> str:
    """Return "single", "ddp", "fsdp", "ModelParallelStrategy", or another strategy's class name."""
    kinds = {SingleDeviceStrategy: "single", DDPStrategy: "ddp", FSDPStrategy: "fsdp", ModelParallelStrategy: SHARDED}
    return next((name for kind, name in kinds.items() if isinstance(strategy, kind)), type(strategy).__name__)


def plan_of(module: Stage) -> tuple[bool, int | None]:
    """Return from config.json whether a model has a tensor-parallel plan, and its number of key and value heads."""
    name = resolve_folder(module.init_from)
    with reading(name):
        config = AutoConfig.from_pretrained(
            name, trust_remote_code=trusts(name, module.load_settings.trust_remote_code)
        )
    heads = getattr(config, "num_key_value_heads", None)
    return tensor_plan(config) is not None, heads


# -- precision of the weights -----------------------------------------------------------------------------------------


class FrozenBFloat16(Precision):
    """``bf16-true`` for adapters: frozen weights in bf16, trained weights in fp32, without casts.

    Lightning's own plugin also casts the trained weights, and in bf16 an update below 1/256 of a weight vanishes. It
    also makes bf16 the default dtype of every new tensor, including the losses.
    """

    precision = "bf16-true"


def settled_precision(trainer: Trainer, settings: LoadSettings, trains_adapter: bool, fits: bool) -> LoadSettings:
    """Return the load settings under the trainer's precision; ``bf16-true`` replaces the precision plugin.

    Raises:
        SettingError: ``quantized-training`` or ``bf16-training``: trained weights would be quantized or in bf16.
    """
    if str(trainer.precision) == "bf16-true":
        trainer.strategy.precision_plugin = FrozenBFloat16()
        settings = replace(settings, dtype="bfloat16")
    if settings.quantization is not None:
        settings = replace(settings, device=str(trainer.strategy.root_device))
    if not fits or trains_adapter:
        return settings
    if settings.quantization is not None:
        raise SettingError(
            "quantized-training",
            f"quantization={settings.quantization} keeps the weights frozen, so there is nothing to train: set lora "
            "(for example --model.lora.r 16), or quantization=null",
        )
    if settings.dtype == "bfloat16":
        raise SettingError(
            "bf16-training",
            "every weight is trained in bf16, where updates below 1/256 of a weight vanish. Use "
            "trainer.precision=bf16-mixed with dtype=float32 (products in bf16, weights in fp32), or set lora (frozen "
            "weights in bf16, the adapter in fp32)",
        )
    return settings
