"""Derive the `Setup` of a run from the settings of rlhf fit."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from transformers import AutoConfig
from transformers.utils import cached_file

from rlhf_lightning.commands.parsing import usage_error
from rlhf_lightning.compat import mesh_sizes
from rlhf_lightning.errors import DataError, MissingError
from rlhf_lightning.models.folders import read_json
from rlhf_lightning.models.loading import LoadSettings
from rlhf_lightning.models.lora import LoraSettings
from rlhf_lightning.models.resolving import adapter_settings, backbone_record, fingerprint, is_adapter
from rlhf_lightning.planning.estimate import trained_skeleton
from rlhf_lightning.planning.memory import BF16, FP32
from rlhf_lightning.planning.setup import Frozen, Machine, RolloutPlan, Rows, Setup
from rlhf_lightning.training.compatibility import check, settled_precision
from rlhf_lightning.training.module import AlignmentModule
from rlhf_lightning.training.muon import mark_layers
from rlhf_lightning.training.optimization import made
from rlhf_lightning.training.rollout import RolloutModule

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_LLAMA_3 = {"vocab_size": 128256, "max_position_embeddings": 131072}
_TIED = {"tie_word_embeddings": True}
_SMOLLM2 = {"head_dim": 64, "vocab_size": 49152, "max_position_embeddings": 8192} | _TIED
_QWEN = {"model_type": "qwen2", "vocab_size": 151936, "max_position_embeddings": 131072} | _TIED


def _sizes(*values: int, **further: Any) -> dict[str, Any]:
    return {**dict(zip(_SIZES, values, strict=True)), **further}


PUBLISHED: dict[str, dict[str, Any]] = {
    # Dubey et al. 2024 (2407.21783), Table 3; for 3.2 the models' cards.
    "Llama-3.1-8B": _sizes(4096, 14336, 32, 32, 8, head_dim=128, **_LLAMA_3),
    "Llama-3.1-70B": _sizes(8192, 28672, 80, 64, 8, head_dim=128, **_LLAMA_3),
    "Llama-3.2-1B": _sizes(2048, 8192, 16, 32, 8, head_dim=64, **_LLAMA_3, **_TIED),
    "Llama-3.2-3B": _sizes(3072, 8192, 28, 24, 8, head_dim=128, **_LLAMA_3, **_TIED),
    # Allal et al. 2025 (2502.02737) and the models' cards.
    "SmolLM2-135M": _sizes(576, 1536, 30, 9, 3, **_SMOLLM2),
    "SmolLM2-360M": _sizes(960, 2560, 32, 15, 5, **_SMOLLM2),
    "SmolLM2-1.7B": _sizes(2048, 8192, 24, 32, 32, **_SMOLLM2),
    # Qwen team 2025 (2412.15115) and the model's card.
    "Qwen2.5-1.5B": _sizes(1536, 8960, 28, 12, 2, **_QWEN),
}
"""Architectures by the name of the base model; the default family is "llama"."""


def published(name: str) -> dict[str, Any] | None:
    """Return the config of a published architecture under any owner, base or Instruct; else None."""
    short = name.rpartition("/")[2].removesuffix("-Instruct")
    return {"model_type": "llama", **PUBLISHED[short]} if short in PUBLISHED else None


def config_text(name: str) -> str:
    """Return a model's Hugging Face config as JSON, without reading weights.

    Args:
        name: a config as JSON text (default family "llama") or .json file; a folder of weights or of an adapter (for
            its backbone); a .gguf file; a published architecture; or a hub id.
    """
    if name.lstrip().startswith("{"):
        try:
            return _as_text(json.loads(name))
        except json.JSONDecodeError as error:
            raise DataError(
                "invalid-json",
                f'the config {name!r} is not JSON: {error}; give an object, as {{"hidden_size": 4096, ...}}',
            ) from error
    path = Path(name).expanduser()
    if path.is_dir() and is_adapter(name):
        return config_text(adapter_settings(path)["base_model_name_or_path"])
    if path.suffix == ".json" or (path / "config.json").is_file():
        return _as_text(read_json(path / "config.json" if path.is_dir() else path))
    if path.suffix == ".gguf" and path.is_file():
        return _as_text(AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False).to_dict())
    known = published(name)
    if known is not None:
        return _as_text(known)
    try:
        found = cached_file(name, "config.json")
    except (OSError, ValueError) as error:
        raise MissingError(
            "no-model",
            f"the sizes of {name} are unknown: give them with --plan.config, as a config.json, as "
            f"'{{\"hidden_size\": 4096, ...}}', or as one of {', '.join(PUBLISHED)}",
        ) from error
    return _as_text(read_json(Path(found)))


def _as_text(config: Any) -> str:
    if not isinstance(config, dict):
        raise DataError(
            "invalid-json", f'the config {config!r} is not a JSON object: give one, as {{"hidden_size": 4096, ...}}'
        )
    kept = {name: value for name, value in config.items() if name not in ("quantization_config", "dtype")}
    return json.dumps({"model_type": "llama", **kept}, sort_keys=True, default=str)


CONTEXT_BYTES = int(0.6e9)
"""GPU memory of a CUDA process outside tensors: context, kernels, cuBLAS and NCCL workspaces. Not measured."""

A_MODEL = "model"
"""Placeholder for a model that was not given; it has the sizes of the trained model."""


def setup_of(module: AlignmentModule, datamodule: Any, trainer: Namespace, assumed: Any) -> Setup:
    """Return everything that the memory and compute of a run depend on.

    Args:
        module: the module, before anything is loaded.
        datamodule: its DataModule.
        trainer: the trainer's arguments.
        assumed: `planning.plan.Assumed`.

    Raises:
        SettingError: the combination does not work, as in `rlhf fit`.
    """
    if module.batch_type not in datamodule.batch_types:
        names = " or ".join(sorted(kind.__name__ for kind in datamodule.batch_types))
        wanted = f"{type(module).__name__} takes {module.batch_type.__name__}"
        usage_error("rlhf plan", f"{wanted}, but {type(datamodule).__name__} yields {names}")
    machine, stand_in = machine_of(trainer)
    check(cast(Trainer, stand_in), module, datamodule)
    settings = settled_precision(cast(Trainer, stand_in), module.load_settings, module.lora is not None, fits=True)
    config = config_text(assumed.config or module.init_from)
    lora, adapters = module.lora, 0
    if lora is not None and is_adapter(module.init_from):
        lora, adapters = _continued(module.init_from, lora), int(module.has_policy)
    size = BF16 if settings.dtype == "bfloat16" else FP32
    rows, rollout = rows_of(module, datamodule, assumed)
    setup = Setup(
        config=config,
        rows=rows,
        machine=machine,
        scalar=not module.has_policy,
        lora=lora,
        quantization=settings.quantization,
        bytes=size if lora is not None else FP32,
        checkpointing=settings.activation_checkpointing,
        eager=settings.attn_implementation == "eager",
        critic=module.critic_kind,
        adapters=adapters,
        rollout=rollout,
        optimizer_bytes=optimizer_bytes(module),
    )
    setup = with_frozen(setup, module, settings)
    return replace(setup, packs_rows=module.pack_rows and trained_skeleton(setup).packs_rows)


def optimizer_bytes(module: AlignmentModule) -> float:
    """Return the bytes of optimizer state per trained weight: AdamW's, or measured on a matrix of a layer."""
    if module.optimizer is None:
        return 2 * FP32
    weight = torch.nn.Parameter(torch.zeros(1024, 1024))
    mark_layers([torch.nn.ParameterList([weight])])
    weight.grad = torch.ones_like(weight)
    optimizer = made(module.optimizer, "optimizer", [weight], (torch.optim.Optimizer,))
    optimizer.step()
    tensors = [value for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor)]
    return sum(tensor.nbytes for tensor in tensors) / weight.numel()


def _continued(folder: str, lora: LoraSettings) -> LoraSettings:
    """Return the LoRA settings of an existing adapter that continues training."""
    record = adapter_settings(folder)
    targets = record["target_modules"]
    return replace(lora, r=record["r"], targets=targets if isinstance(targets, str) else sorted(targets))


def machine_of(trainer: Namespace) -> tuple[Machine, Any]:
    """Return the machine of a run, and a stand-in for its trainer, used to check combinations."""
    gpu = trainer.accelerator in ("gpu", "cuda") or (trainer.accelerator == "auto" and torch.cuda.is_available())
    ranks = _devices(trainer.devices, gpu) * trainer.num_nodes
    precision = str(trainer.precision or "32-true")
    precision = {"32": "32-true", "bf16": "bf16-mixed"}.get(precision, precision)
    given, kind, tensor = trainer.strategy, "single", 1
    if isinstance(given, ModelParallelStrategy):
        kind = "sharded"
    elif ranks > 1 or "ddp" in str(given):
        kind, given = "ddp", DDPStrategy(parallel_devices=[torch.device("cpu")])
    else:
        given = SingleDeviceStrategy("cpu")
    stand_in = SimpleNamespace(
        strategy=given, precision=precision, num_devices=ranks // trainer.num_nodes, num_nodes=trainer.num_nodes
    )
    if kind == "sharded":
        width = mesh_sizes(given)[1]
        tensor = width if isinstance(width, int) else tensor
    process = CONTEXT_BYTES if gpu else _own_bytes()
    holes = not gpu and sys.platform == "linux" and "MALLOC_MMAP_THRESHOLD_" not in os.environ
    return Machine(gpu, max(ranks // tensor, 1), tensor, kind, precision, process, holes), stand_in


def _own_bytes() -> int:
    """Return the peak memory of this process, which has imported all packages but loaded no weights."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def _devices(given: Any, gpu: bool) -> int:
    """Return the number of devices of a host; "auto" counts those of this host."""
    if isinstance(given, list):
        return len(given)
    if str(given) in ("auto", "-1"):
        return max(torch.cuda.device_count(), 1) if gpu else 1
    text = str(given)
    return len(text.split(",")) if "," in text else int(text)


def rows_of(module: AlignmentModule, datamodule: Any, assumed: Any) -> tuple[Rows, RolloutPlan | None]:
    """Return the rows of an optimizer step and the rollout before it; all rows have the maximum length."""
    longest = datamodule.max_length or 1024
    if not isinstance(module, RolloutModule):
        prompt = assumed.prompt_length or (
            longest - assumed.completion_length if assumed.completion_length else datamodule.max_prompt_length
        )
        prompt = prompt or longest // 2
        completion = assumed.completion_length or max(longest - prompt, 1)
        each = 2 if module.batch_type.__name__ in ("PreferenceBatch", "RankedBatch") else 1
        most = datamodule.micro_batch_size
        most = None if most is None else most * each
        return Rows(datamodule.batch_size, each, prompt, completion, most, datamodule.max_tokens), None
    each = datamodule.samples_per_prompt
    episodes = datamodule.batch_size
    mini = min(module.mini_batch_size or episodes, episodes)
    rows = Rows(
        groups=max(mini // each, 1),
        completions=each,
        prompt=assumed.prompt_length or datamodule.max_prompt_length or longest,
        completion=assumed.completion_length or module.sampling.max_new_tokens,
        micro_batch_size=datamodule.micro_batch_size,
        max_tokens=datamodule.max_tokens,
        parts_groups=True,
    )
    updates = module.ppo_epochs * math.ceil(episodes / mini)
    return rows, RolloutPlan(datamodule.prompts_per_rollout, module.sampling.batch_size, updates)


def with_frozen(setup: Setup, module: AlignmentModule, settings: LoadSettings) -> Setup:
    """Add the other models: frozen models, or adapters on the trained model's backbone."""
    size = BF16 if (settings.frozen_dtype or settings.dtype) == "bfloat16" else FP32
    frozen: list[Frozen] = []
    moves = module.reference_moves
    refers = module.holds_reference
    teacher = module.teacher_name
    if teacher is not None:
        frozen.append(Frozen("teacher", config_text(teacher), False, size))
    elif refers and (moves or setup.lora is None):
        frozen.append(Frozen("reference", setup.config, False, FP32 if moves else size))
    adapters = setup.adapters
    scorer = module.collector.scorer_spec if isinstance(module, RolloutModule) else None
    for folder in reward_models(scorer):
        record = backbone_record(folder) if is_adapter(folder) else {}
        kind = record.get("quantization")
        mine = record.get("fingerprint") is not None and record["fingerprint"] == fingerprint(module.backbone_source())
        if mine and setup.lora is not None and kind == setup.quantization and setup.machine.strategy != "sharded":
            adapters += 1
        else:
            here = Path(folder).is_dir()
            config = config_text(folder) if here else setup.config
            frozen.append(Frozen("reward model", config, True, size, kind, judges=False))
    shared = refers and teacher is None and not moves and setup.lora is not None
    return replace(setup, adapters=adapters, frozen=tuple(frozen), adapter_reference=shared)


def reward_models(scorer: Any) -> list[str]:
    """Return the model folders that a scorer and its component scorers would load."""
    if isinstance(scorer, Namespace):
        scorer = scorer.as_dict()
    if isinstance(scorer, dict):
        inner = scorer.get("init_args") or {}
        return [folder for value in (*inner.values(), *_others(scorer)) for folder in reward_models(value)]
    if isinstance(scorer, (list, tuple)):
        return [folder for value in scorer for folder in reward_models(value)]
    named = isinstance(scorer, str) and (scorer == A_MODEL or "/" in scorer or _is_dir(scorer))
    return [scorer] if named else []


def _others(scorer: dict[str, Any]) -> list[Any]:
    return [value for name, value in scorer.items() if name not in ("class_path", "init_args")]


def _is_dir(name: str) -> bool:
    return Path(name).expanduser().is_dir()
