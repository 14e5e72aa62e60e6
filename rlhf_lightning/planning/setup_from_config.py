"""From the settings of a run, as `rlhf fit` takes them, to what its memory and work depend on."""

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

from rlhf_lightning.commands.parsing import usage_error
from rlhf_lightning.compat import mesh_sizes
from rlhf_lightning.models.loading import LoadSettings, LoraSettings, backbone_record, fingerprint, is_adapter
from rlhf_lightning.planning.estimate import trained_skeleton
from rlhf_lightning.planning.memory import BF16, FP32
from rlhf_lightning.planning.published import config_text
from rlhf_lightning.planning.setup import Frozen, Machine, RolloutPlan, Rows, Setup
from rlhf_lightning.training.compatibility import check
from rlhf_lightning.training.module import AlignmentModule
from rlhf_lightning.training.optimizers import made
from rlhf_lightning.training.precision import settled_precision
from rlhf_lightning.training.rollout import RolloutModule

CONTEXT_BYTES = int(0.6e9)
"""What a CUDA process holds on its GPU beside tensors: context, kernels, cuBLAS and NCCL workspaces. Not measured."""

A_MODEL = "model"
"""Stands for a model that nobody named: it has the sizes of the trained one."""


def setup_of(module: AlignmentModule, datamodule: Any, trainer: Namespace, assumed: Any) -> Setup:
    """Return a run as far as memory and work depend on it.

    Args:
        module: the module, nothing loaded.
        datamodule: where its rows come from.
        trainer: the trainer's arguments.
        assumed: what settings do not say.

    Raises:
        ValueError: the combination does not work, as `rlhf fit` would say before it loads weights.
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
    """Return the bytes of optimizer state for each trained weight: AdamW's, or measured on a matrix of 1024 x 1024."""
    if module.optimizer is None:
        return 2 * FP32
    weight = torch.nn.Parameter(torch.zeros(1024, 1024))
    weight.grad = torch.ones_like(weight)
    optimizer = made(module.optimizer, "optimizer", [weight], (torch.optim.Optimizer,))
    optimizer.step()
    tensors = [value for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor)]
    return sum(tensor.nbytes for tensor in tensors) / weight.numel()


def _continued(folder: str, lora: LoraSettings) -> LoraSettings:
    """The sizes of an adapter that is trained on."""
    record = json.loads((Path(folder) / "adapter_config.json").read_text())
    targets = record["target_modules"]
    return replace(lora, r=record["r"], targets=targets if isinstance(targets, str) else sorted(targets))


def machine_of(trainer: Namespace) -> tuple[Machine, Any]:
    """Return where a run would run, and what stands in for its trainer where combinations are checked."""
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
    """What this process has held at most: it has imported what a run imports, and no weight."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def _devices(given: Any, gpu: bool) -> int:
    """Devices of a host; "auto" means those of this one."""
    if isinstance(given, list):
        return len(given)
    if str(given) in ("auto", "-1"):
        return max(torch.cuda.device_count(), 1) if gpu else 1
    text = str(given)
    return len(text.split(",")) if "," in text else int(text)


def rows_of(module: AlignmentModule, datamodule: Any, assumed: Any) -> tuple[Rows, RolloutPlan | None]:
    """Return what an optimizer step learns from and what is sampled before it, all rows as long as settings allow."""
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
    """Add the models that stand beside the trained one, or the adapters on its backbone that play their parts."""
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
    """Return the folders that a scorer, or the scorers it is composed of, would load; functions load none."""
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
