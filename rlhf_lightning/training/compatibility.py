"""Which combinations of strategy, precision, quantisation, objective and devices work, asked before a weight is loaded.

Each rule is a function of plain values that returns why a combination does not work and the nearest one that does, or
None. `check` asks them all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from transformers import AutoConfig

from rlhf_lightning.compat import mesh_sizes
from rlhf_lightning.errors import SettingError
from rlhf_lightning.models.compiling import missing_compiler
from rlhf_lightning.models.folders import trusts
from rlhf_lightning.models.loading import is_adapter, resolve_folder
from rlhf_lightning.models.sharding import tensor_plan

if TYPE_CHECKING:
    from rlhf_lightning.training.module import AlignmentModule

SHARDED = "ModelParallelStrategy"


class IncompatibleError(SettingError):
    """The run's settings do not go together."""


def refused_strategy(strategy: str) -> str | None:
    """Refuse strategies that train wrongly, or fail, where a module takes its optimizer steps itself.

    Args:
        strategy: kind of the strategy, see `kind_of`, or a name as the trainer takes it.
    """
    name = strategy.lower()
    if "fsdp" in name:
        return (
            "the strategy fsdp (FSDP1) fails when a module takes its optimizer steps itself, as all do here, and it "
            f"cannot clip by norm: use {SHARDED} (FSDP2), laid over a run by recipe:hardware/fsdp"
        )
    if "deepspeed" in name:
        return (
            "DeepSpeed's engine counts micro-batches and clips gradients by itself, which the modules here do: use "
            f"{SHARDED} (FSDP2), laid over a run by recipe:hardware/fsdp"
        )
    return None


def refused_precision(precision: str) -> str | None:
    """Refuse fp16: its gradients are scaled, and would be clipped before they are unscaled."""
    if precision not in ("16", "16-mixed", "16-true"):
        return None
    return f"trainer.precision={precision} would clip gradients before they are unscaled; use bf16-mixed or 32-true"


def refused_quantization(strategy: str, quantization: str | None) -> str | None:
    """Refuse to cut 4-bit weights over ranks.

    Args:
        strategy: kind of the strategy.
        quantization: name of the weights' quantisation; None for plain weights.
    """
    if quantization is None or strategy != SHARDED:
        return None
    return (
        f"{quantization} weights cannot be cut over ranks: a shard would part the blocks that share a scale. Use ddp, "
        f"or one GPU, with {quantization}, or {SHARDED} with bfloat16 weights"
    )


def refused_compilation(strategy: str, device: str) -> str | None:
    """Refuse to compile layers where that cannot work.

    Args:
        strategy: kind of the strategy.
        device: kind of device that the model runs on.
    """
    if strategy == SHARDED:
        return f"compile_layers does not go with {SHARDED}, which cuts each layer: set model.compile_layers to false"
    missing = missing_compiler(device)
    return None if missing is None else f"{missing}: install one, or set model.compile_layers to false"


def refused_sizes(data_parallel: int | str, tensor_parallel: int | str, ranks: int) -> str | None:
    """Refuse a mesh that is not the ranks', or is left to defaults that cut the model where data should be shared.

    Args:
        data_parallel: ranks that see other data, as the strategy was given it.
        tensor_parallel: ranks that hold one model together, as the strategy was given it.
        ranks: processes of the run.
    """
    if isinstance(data_parallel, str) or isinstance(tensor_parallel, str):
        given = f"data_parallel_size={data_parallel}, tensor_parallel_size={tensor_parallel}"
        return (
            f"{SHARDED} with {given} would cut each matrix over all devices of a host: set "
            f"data_parallel_size={ranks} and tensor_parallel_size=1"
        )
    if data_parallel * tensor_parallel == ranks:
        return None
    nearest = max(ranks // tensor_parallel, 1)
    remedy = f"set data_parallel_size={nearest}"
    if nearest * tensor_parallel != ranks:
        remedy = f"set data_parallel_size={ranks} and tensor_parallel_size=1"
    return (
        f"{SHARDED} has data_parallel_size={data_parallel} x tensor_parallel_size={tensor_parallel}, but there are "
        f"{ranks} ranks: {remedy}"
    )


def refused_tensor_parallelism(tensor_parallel: int, lora: bool, has_plan: bool, heads: int | None) -> str | None:
    """Refuse to cut matrices that nothing says how to cut.

    Args:
        tensor_parallel: ranks that hold one model together.
        lora: whether an adapter is trained.
        has_plan: whether transformers has a plan for the model's family.
        heads: key and value heads of the model, if known.
    """
    remedy = "set tensor_parallel_size=1 and data_parallel_size to the number of ranks"
    if lora:
        return f"tensor parallelism cuts the matrices that an adapter hangs on: {remedy}, or train every weight"
    if not has_plan:
        return f"transformers has no tensor-parallel plan for this model's family: {remedy}"
    if heads is not None and heads % tensor_parallel:
        return f"{heads} key and value heads cannot be dealt to tensor_parallel_size={tensor_parallel} ranks: {remedy}"
    return None


def refused_roles(strategy: str, critic: str | None) -> str | None:
    """Refuse a critic that forwards the policy's backbone by itself: only the policy's own call gathers cut weights.

    Args:
        strategy: kind of the strategy.
        critic: what the critic is; None in families without one.
    """
    if strategy != SHARDED or critic != "adapter":
        return None
    return f"critic=adapter forwards the policy's backbone, whose weights {SHARDED} cuts: use critic=shared or separate"


def refused_stacked_adapter(strategy: str, has_policy: bool, lora: bool, starts_from_adapter: bool) -> str | None:
    """Refuse reward adapters on top of an adapter, which an export merges in one piece.

    Args:
        strategy: kind of the strategy.
        has_policy: whether the stage trains a policy.
        lora: whether an adapter is trained.
        starts_from_adapter: whether it starts from an adapter's folder.
    """
    if strategy != SHARDED or has_policy or not lora or not starts_from_adapter:
        return None
    return (
        f"a reward adapter on top of another adapter is merged when it is exported, and {SHARDED} cuts its weights: "
        "start from a merged model (rlhf export --merge), or use ddp"
    )


def refused_share(rows: int, shares: int, unit: str) -> str | None:
    """Refuse more ranks than there is work in a step.

    Args:
        rows: rows, or for on-policy modules prompts, of a training step over all ranks.
        shares: ranks that see other data.
        unit: what the rows are.
    """
    if rows >= shares:
        return None
    return f"{shares} ranks cannot share {rows} {unit} a step: raise data.batch_size, or use at most {rows} ranks"


def refused_division(prompts: int, shares: int, samples: int) -> str | None:
    """Refuse rollouts whose prompts ranks cannot share evenly.

    Args:
        prompts: prompts of a rollout over all ranks.
        shares: ranks that see other data.
        samples: completions of each prompt.
    """
    if prompts % shares == 0:
        return None
    nearest = max(round(prompts / shares), 1) * shares * samples
    return (
        f"{shares} ranks cannot share the {prompts} prompts of a rollout evenly: set data.batch_size={nearest} "
        f"({nearest // samples} prompts, samples_per_prompt {samples})"
    )


# -- asked of a trainer -----------------------------------------------------------------------------------------------


def check(trainer: Trainer, module: AlignmentModule, datamodule: Any = None, fits: bool = True) -> None:
    """Refuse a combination that does not work, before anything is read.

    Args:
        trainer: the trainer.
        module: the module.
        datamodule: where its data comes from, if that is a DataModule.
        fits: whether it is to train, rather than to evaluate.

    Raises:
        IncompatibleError: it does not work; the message says why and names the nearest combination that does.
    """
    for reason in refusals(trainer, module, datamodule if fits else None):
        if reason is not None:
            raise IncompatibleError("incompatible-settings", reason)


def refusals(trainer: Trainer, module: AlignmentModule, datamodule: Any = None) -> Iterator[str | None]:
    """Yield what each rule says of a combination; later ones lean on what earlier ones found in order."""
    kind, ranks = kind_of(trainer.strategy), trainer.num_devices * trainer.num_nodes
    lora = module.lora is not None
    yield refused_strategy(kind)
    yield refused_precision(str(trainer.precision))
    yield refused_quantization(kind, quantization_of(module))
    if module.compile_layers:
        yield refused_compilation(kind, trainer.strategy.root_device.type)
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
        yield from refused_shares(datamodule, ranks // together)


def refused_shares(datamodule: Any, shares: int) -> list[str | None]:
    """Refuse a batch that ranks cannot share.

    Args:
        datamodule: gives rows, or where it has ``samples_per_prompt``, prompts.
        shares: ranks that see other data.
    """
    samples = getattr(datamodule, "samples_per_prompt", None)
    if samples is None:
        return [refused_share(datamodule.batch_size, shares, "rows")]
    prompts = datamodule.batch_size // samples
    return [refused_share(prompts, shares, "prompts"), refused_division(prompts, shares, samples)]


def kind_of(strategy: Strategy) -> str:
    """Return "single", "ddp", "fsdp", "ModelParallelStrategy", or another strategy's class name."""
    kinds = {SingleDeviceStrategy: "single", DDPStrategy: "ddp", FSDPStrategy: "fsdp", ModelParallelStrategy: SHARDED}
    return next((name for kind, name in kinds.items() if isinstance(strategy, kind)), type(strategy).__name__)


def quantization_of(module: AlignmentModule) -> str | None:
    """Return the quantisation that a module's weights are to be loaded in; None for plain weights."""
    return module.load_settings.quantization


def plan_of(module: AlignmentModule) -> tuple[bool, int | None]:
    """Return whether a module's model has a tensor-parallel plan, and its key and value heads; reads config.json."""
    name = resolve_folder(module.init_from)
    config = AutoConfig.from_pretrained(name, trust_remote_code=trusts(name, module.load_settings.trust_remote_code))
    heads = getattr(config, "num_key_value_heads", None)
    return tensor_plan(config) is not None, heads
