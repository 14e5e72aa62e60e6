"""Sharding with FSDP2: which modules are sharded, and how ranks keep their forward passes in step.

A sharded module gathers its weights when it is called and frees them when it returns. Gathering is a collective: if a
rank makes fewer passes, the others wait for it. Code whose number of passes depends on the rank's own rows (decoding,
micro-batches by tokens) asks this module how many passes to make.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from rlhf_lightning.models.scalar_head import trunk


def shard(model: Any, mesh: DeviceMesh, precision: str = "32-true") -> None:
    """Shard a CausalLM or ScalarModel over the data-parallel ranks: each decoder layer, then the rest with the root.

    With tensor parallelism, matrices are first sharded over the tensor-parallel ranks. Between two passes every weight
    is sharded, so that checkpoints, exports, norms and reference updates never read a stale gathered weight. A model
    that is already sharded is not changed.

    Args:
        model: the model; heads on it are sharded with its root.
        mesh: the mesh of the strategy, with the dimensions "data_parallel" and "tensor_parallel".
        precision: the trainer's; "bf16-mixed" gathers and computes in bf16 and reduces gradients in fp32.
    """
    if is_sharded(model):
        return
    if mesh["tensor_parallel"].size() > 1:
        plan = tensor_plan(model.model.config)
        assert plan is not None
        parallelize_module(trunk(model.model), mesh["tensor_parallel"], plan)
    low = torch.bfloat16 if precision == "bf16-mixed" else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=None if low is None else torch.float32)
    for part in (*decoder_layers(model), model):
        fully_shard(part, mesh=mesh["data_parallel"], mp_policy=policy, reshard_after_forward=True)


def decoder_layers(model: Any) -> list[nn.Module]:
    """Return the layers of a model's transformer: its largest list of modules; empty if it has none."""
    lists = [part for part in trunk(model.model).modules() if isinstance(part, nn.ModuleList)]
    return list(max(lists, key=lambda part: sum(p.numel() for p in part.parameters()), default=()))


def tensor_plan(config: Any) -> dict[str, ParallelStyle] | None:
    """Return transformers' tensor-parallel plan of a config; None without a plan, or if the plan uses styles other than
    colwise and rowwise.
    """
    plan = getattr(config, "base_model_tp_plan", None)
    styles: dict[str, ParallelStyle] = {"colwise": ColwiseParallel(), "rowwise": RowwiseParallel()}
    if not plan or not set(plan.values()) <= set(styles):
        return None
    return {name: styles[style] for name, style in plan.items()}


def is_sharded(model: nn.Module) -> bool:
    """Return whether a model's weights are sharded."""
    return isinstance(model, FSDPModule)


# -- keeping ranks in step --------------------------------------------------------------------------------------------


def most_passes(model: nn.Module, count: int) -> int:
    """Return the number of passes each rank must make: ``count``, or its maximum over ranks if the model is sharded."""
    return _largest(model, count) if is_sharded(model) else count


@contextmanager
def in_step(model: nn.Module, idle: Callable[[], Any]) -> Iterator[Callable[[], None]]:
    """Let ranks make different numbers of passes through a sharded model. A rank that is done calls ``idle`` until all
    ranks are done.

    Yields:
        A function to call before each pass.
    """
    if not is_sharded(model):
        yield lambda: None
        return

    def before_pass() -> None:
        _largest(model, 1)

    yield before_pass
    while _largest(model, 0):
        idle()


def on_any_rank(model: nn.Module, fact: bool) -> bool:
    """Return whether a fact holds on any rank. Every rank must call this, and waits for the others."""
    return bool(_largest(model, int(fact))) if dist.is_initialized() else fact


def wait_for_ranks() -> None:
    """Wait until every rank has called this."""
    if dist.is_initialized():
        dist.barrier()


def _largest(model: nn.Module, count: int) -> int:
    """Return the maximum of a count over all ranks."""
    found = torch.tensor(count, device=next(model.parameters()).device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


# -- whole tensors ----------------------------------------------------------------------------------------------------


def whole(tensor: Tensor) -> Tensor:
    """Gather a tensor from the shards of all ranks; every rank must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return this rank's shard of a tensor that every rank holds whole, sharded like ``other``."""
    tensor = tensor.to(other.device, other.dtype)
    return distribute_tensor(tensor, other.device_mesh, other.placements) if isinstance(other, DTensor) else tensor


def whole_weights(model: nn.Module) -> dict[str, Tensor] | None:
    """Gather a sharded model's weights on the CPU of rank zero, empty on other ranks; every rank must call this.

    Tied weights are gathered once. For an adapter the frozen backbone is left out. None for a model that is not
    sharded.
    """
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return None
    found: dict[int, Tensor] = {}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapter = hasattr(model, "peft_config")
    state = {
        name: weight for name, weight in model.state_dict(keep_vars=True).items() if not adapter or name in trained
    }
    for weight in state.values():
        if id(weight) not in found:
            together = whole(weight.detach())
            found[id(weight)] = together.cpu() if is_first_rank() else weight.new_empty(0)
    return {name: found[id(weight)] for name, weight in state.items()} if is_first_rank() else {}


def is_first_rank() -> bool:
    """Return whether this is the process that writes files."""
    return not dist.is_initialized() or dist.get_rank() == 0
