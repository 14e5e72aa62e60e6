"""Compute a frozen linear layer plus its LoRA adapter with fewer passes over memory.

peft computes x W' + scaling * ((x A') B'). It writes the scaled update, the sum, their gradients and the two parts of
x's gradient to memory and reads each back. Here the matrix products accumulate into an existing result instead.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from rlhf_lightning.compat import changes_in_place, copy_each
from rlhf_lightning.models.scalar_head import trunk, unwrapped


class LowRankProduct(Function):
    r"""Compute x W' + b + s (z A') B' for a frozen W (out, in), A (rank, in) and B (out, rank).

    z is x, or x after dropout (Hu et al., 2106.09685, Eq. 3).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, state: Any, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float,
        dropped: Tensor | None = None, casts: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """Return x W' + b + s (z A') B'.

        Args:
            ctx: context for the backward pass.
            x: shape (tokens, in), in the precision of the products: autocast's, or that of all tensors. The backward
                pass casts or dequantises W again, so that no copy of W is stored.
            weight: W, in bitsandbytes' packed format if there is a ``state``.
            state: bitsandbytes' state to dequantise W from 4 bits; None if W is not quantised.
            bias: b, shape (out,); None for none.
            a: A.
            b: B.
            scaling: s.
            dropped: z, in the same precision; None if it is x.
            casts: A and B in that precision; None casts them here.
        """
        dtype = x.dtype
        a, b = (a.to(dtype), b.to(dtype)) if casts is None else casts
        inner = (x if dropped is None else dropped) @ a.t()
        # A's gradient needs x without dropout, and z with dropout.
        ctx.save_for_backward(x if dropped is None else dropped, inner, weight, a, b)
        ctx.state, ctx.scaling, ctx.drops = state, scaling, dropped is not None
        dense = expanded(weight, state, dtype).t()
        whole = x @ dense if bias is None else torch.addmm(bias.to(dtype), x, dense)
        return whole.addmm_(inner, b.t(), alpha=scaling)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, A, B and z; frozen tensors have none."""
        seen, inner, weight, a, b = ctx.saved_tensors
        (gradient,) = gradients
        of_inner = gradient @ b
        of_x = of_dropped = None
        if ctx.needs_input_grad[0]:
            of_x = gradient @ expanded(weight, ctx.state, seen.dtype)
            if not ctx.drops:
                of_x.addmm_(of_inner, a, alpha=ctx.scaling)
        if ctx.drops and ctx.needs_input_grad[7]:
            of_dropped = scaled_product(of_inner, a, ctx.scaling)
        of_a = scaled_product(of_inner.t(), seen, ctx.scaling)
        of_b = scaled_product(gradient.t(), inner, ctx.scaling)
        return of_x, None, None, None, of_a, of_b, None, of_dropped, None


def scaled_product(one: Tensor, other: Tensor, scaling: float) -> Tensor:
    """Return ``scaling`` times a matrix product, in one operation."""
    unread = one.new_empty(1, 1)  # beta = 0: addmm reads neither its values nor its NaNs
    return torch.addmm(unread, one, other, beta=0, alpha=scaling)


def expanded(weight: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    """Return a frozen matrix in the given precision, shape (out, in), dequantised from 4 bits if necessary."""
    if state is None:
        return weight.to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.view(-1, 1), state).to(dtype)


class LowRankForm:
    """Forward of an adapted layer that uses `LowRankProduct` if the layer has its plain form (see `plain_adapter`)."""

    casts: tuple[str, tuple[Tensor, Tensor]] | None = None
    """Name of an adapter and its matrices in autocast's precision; set during a forward of the trunk."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output, shape (..., out)."""
        name = None if args or kwargs else plain_adapter(self, x)
        if name is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        base, a, b = self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight
        state = getattr(base.weight, "quant_state", None)
        cast = shared_cast(x, product_dtype(x))
        flat, dropout = cast.reshape(-1, x.shape[-1]), self.lora_dropout[name]
        drops = dropout.training and not isinstance(dropout, nn.Identity)
        dropped = dropout(cast).reshape(flat.shape) if drops else None
        known = self.casts[1] if self.casts is not None and self.casts[0] == name else None
        product: Any = LowRankProduct.apply(
            flat, base.weight, state, base.bias, a, b, self.scaling[name], dropped, known
        )
        return product.view(*x.shape[:-1], len(b))


def shared_cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in the given precision; the cast is cached on the tensor and shared by all layers that read it."""
    if x.dtype == dtype:
        return x
    key = (dtype, torch.is_grad_enabled(), None if x.is_inference() else changes_in_place(x))
    kept: Any = getattr(x, "low_rank_cast", None)
    if kept is None or kept[0] != key:
        kept = x.low_rank_cast = (key, x.to(dtype))  # type: ignore[attr-defined]
    cast: Tensor = kept[1]
    return cast


class AdapterCasts:
    """Casts a model's adapter matrices for autocast in one operation, in each forward of its trunk.

    Args:
        layers: the model's adapted layers.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers

    def make(self, *_: Any) -> None:
        """Cast the matrices of the active adapters unless they are sharded; a forward pre-hook."""
        found = [
            (layer, names[0], layer.lora_A[names[0]].weight, layer.lora_B[names[0]].weight)
            for layer in self.layers
            if len(names := [name for name in layer.active_adapters if name in layer.lora_A]) == 1
        ]
        parts = [part.detach() for _, _, a, b in found for part in (a, b)]
        if not parts or torch.compiler.is_compiling() or not torch.is_autocast_enabled(parts[0].device.type):
            return
        dtype = torch.get_autocast_dtype(parts[0].device.type)
        if any(isinstance(part, DTensor) or part.device != parts[0].device for part in parts) or {dtype} == {
            part.dtype for part in parts
        }:
            return
        room = torch.empty(sum(part.numel() for part in parts), dtype=dtype, device=parts[0].device)
        pieces = room.split([part.numel() for part in parts])
        copies = [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]
        copy_each(copies, parts)
        for (layer, name, _a, _b), *both in zip(found, copies[::2], copies[1::2], strict=True):
            layer.casts = (name, tuple(both))

    def drop(self, *_: Any) -> None:
        """Drop the casts; a forward hook, because the matrices may change before the next forward."""
        for layer in self.layers:
            layer.casts = None


class LowRankLinear(LowRankForm, Linear):
    """peft's adapted linear layer, computed with `LowRankProduct`."""


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the precision of a product with x: autocast's, otherwise x's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def plain_adapter(layer: Any, x: Tensor) -> str | None:
    """Return the name of a layer's only active adapter, or None if `LowRankProduct` does not apply.

    It applies if all tensors are on this rank, the base matrix is frozen, and autocast or a common dtype determines the
    precision.
    """
    if torch.compiler.is_compiling():
        return None  # the compiler fuses peft's form itself, and with PyTorch 2.11 this form gives B no gradient
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(names) != 1:
        return None
    name, base, dtype = names[0], layer.base_layer, product_dtype(x)
    parts = [x, base.weight, layer.lora_A[name].weight, layer.lora_B[name].weight]
    plain = type(base) is nn.Linear
    if getattr(base.weight, "quant_state", None) is not None:
        # On a GPU, bitsandbytes has a kernel that multiplies a single row without dequantising the matrix.
        plain = (x.device.type == "cpu" or x.numel() > x.shape[-1]) and base.compute_dtype in (None, dtype)
        del parts[1]
    # Autocast casts half and single precision, but not double precision.
    kinds = {part.dtype for part in parts}
    common = kinds == {dtype} or (torch.is_autocast_enabled(x.device.type) and torch.float64 not in kinds)
    plain = (
        plain
        and not base.weight.requires_grad
        and name not in layer.lora_variant
        and not layer.lora_bias[name]
        and common
        and not any(isinstance(part, DTensor) for part in parts)
    )
    return name if plain else None


def use_low_rank_products(model: nn.Module) -> None:
    """Make a peft model's plain linear layers compute `LowRankProduct`; names, weights and merging stay peft's."""
    for module in model.modules():
        kind: Any = type(module)
        if kind is Linear:
            module.__class__ = LowRankLinear
        elif kind.__name__ == "Linear4bit" and isinstance(module, LoraLayer):
            module.__class__ = _with_four_bits(kind)
    if not isinstance(unwrapped(model), PreTrainedModel):
        return
    inner: Any = trunk(model)
    layers = [module for module in inner.modules() if isinstance(module, LowRankForm)]
    if layers and not hasattr(inner, "adapter_casts"):
        inner.adapter_casts = casts = AdapterCasts(layers)
        inner.register_forward_pre_hook(casts.make)
        inner.register_forward_hook(casts.drop, always_call=True)


@functools.cache
def _with_four_bits(kind: Any) -> Any:
    """Return peft's 4-bit layer class, which exists only with bitsandbytes, extended by `LowRankForm`."""
    return type("LowRankLinear4bit", (LowRankForm, kind), {"__doc__": "peft's adapted 4-bit layer, likewise."})
