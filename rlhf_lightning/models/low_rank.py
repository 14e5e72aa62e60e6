"""The product of a frozen matrix and the adapter on it, without a pass over memory that arithmetic does not ask for.

peft writes it as x W' + scaling * ((x A') B'): the scaled update, the sum, their gradients and the two parts of x's
gradient are each written out and read back. Here products add to what is there.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.tensor import DTensor


class LowRankProduct(Function):
    r"""x W' + b + s (x A') B' for a frozen W (out, in), A (rank, in), B (out, rank) (Hu et al., 2106.09685, Eq. 3)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, state: Any, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        """Return the product.

        Args:
            ctx: what backward gets.
            x: shape (tokens, in).
            weight: W, in bitsandbytes' packing if there is a ``state``.
            state: how W is to be expanded from 4 bits, for this product and again for the gradient's; None if it is
                whole.
            bias: b, shape (out,); None for none.
            a: A.
            b: B.
            scaling: s.
        """
        inner = x @ a.t()
        ctx.save_for_backward(x, inner, weight, a, b)
        ctx.state, ctx.scaling = state, scaling
        dense = expanded(weight, state, x.dtype).t()
        whole = x @ dense if bias is None else torch.addmm(bias, x, dense)
        return whole.addmm_(inner, b.t(), alpha=scaling)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, A and B; what is frozen has none."""
        x, inner, weight, a, b = ctx.saved_tensors
        (gradient,) = gradients
        of_inner = (gradient @ b).mul_(ctx.scaling)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (gradient @ expanded(weight, ctx.state, x.dtype)).addmm_(of_inner, a)
        return of_x, None, None, None, of_inner.t() @ x, (gradient.t() @ inner).mul_(ctx.scaling), None


def expanded(weight: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    """Return a frozen matrix, shape (out, in), from its 4 bits where it is kept in them."""
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.view(-1, 1), state).to(dtype)


class LowRankForm:
    """The forward of an adapted layer that takes `LowRankProduct` where the layer is in its plain form."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output, shape (..., out)."""
        name = None if args or kwargs else plain_adapter(self, x)
        if name is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        base, a, b = self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight
        state = getattr(base.weight, "quant_state", None)
        flat = x.reshape(-1, x.shape[-1])
        product: Any = LowRankProduct.apply(flat, base.weight, state, base.bias, a, b, self.scaling[name])
        return product.view(*x.shape[:-1], len(b))


class LowRankLinear(LowRankForm, Linear):
    """peft's adapted linear layer with a product of its own."""


def plain_adapter(layer: Any, x: Tensor) -> str | None:
    """Return a layer's one active adapter, where all is of one precision and on this rank, nothing drops out and the
    matrix below is frozen; None otherwise.
    """
    if torch.compiler.is_compiling():
        return None  # the compiler fuses peft's form itself, and PyTorch 2.11's gives this one no gradient for B
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(names) != 1 or torch.is_autocast_enabled(x.device.type):
        return None
    name, base = names[0], layer.base_layer
    parts = [x, base.weight, layer.lora_A[name].weight, layer.lora_B[name].weight]
    plain = type(base) is nn.Linear
    if getattr(base.weight, "quant_state", None) is not None:
        # Elsewhere bitsandbytes has kernels that expand nothing for a few rows.
        plain = x.device.type == "cpu" and base.compute_dtype in (None, x.dtype)
        del parts[1]
    plain = (
        plain
        and not base.weight.requires_grad
        and name not in layer.lora_variant
        and not layer.lora_bias[name]
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and len({part.dtype for part in parts}) == 1
        and not any(isinstance(part, DTensor) for part in parts)
    )
    return name if plain else None


def use_low_rank_products(model: nn.Module) -> None:
    """Have a peft model's plain linear layers compute by `LowRankProduct`; names, weights and merging stay peft's."""
    for module in model.modules():
        kind: Any = type(module)
        if kind is Linear:
            module.__class__ = LowRankLinear
        elif kind.__name__ == "Linear4bit" and isinstance(module, LoraLayer):
            module.__class__ = _with_four_bits(kind)


@functools.cache
def _with_four_bits(kind: Any) -> Any:
    """Return peft's class for 4-bit layers, which exists where bitsandbytes does, with a product of its own."""
    return type("LowRankLinear4bit", (LowRankForm, kind), {"__doc__": "peft's adapted 4-bit layer, likewise."})
