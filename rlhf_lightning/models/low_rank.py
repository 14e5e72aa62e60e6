"""The product of a frozen matrix and the adapter on it, without a pass over memory that arithmetic does not ask for.

peft writes it as x W' + scaling * ((x A') B'): the scaled update, the sum, their gradients and the two parts of x's
gradient are each written out and read back. Here products add to what is there.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.tensor import DTensor


class LowRankProduct(Function):
    r"""x W' + b + s (x A') B' for a frozen W (out, in), A (rank, in) and B (out, rank) (Hu et al., 2106.09685, Eq. 3)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        """Return the product, shape (tokens, out), of x, shape (tokens, in)."""
        inner = x @ a.t()
        ctx.save_for_backward(x, inner, weight, a, b)
        ctx.scaling = scaling
        whole = x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())
        return whole.addmm_(inner, b.t(), alpha=scaling)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, A and B; what is frozen has none."""
        x, inner, weight, a, b = ctx.saved_tensors
        (gradient,) = gradients
        of_inner = (gradient @ b).mul_(ctx.scaling)
        of_x = (gradient @ weight).addmm_(of_inner, a) if ctx.needs_input_grad[0] else None
        return of_x, None, None, of_inner.t() @ x, (gradient.t() @ inner).mul_(ctx.scaling), None


class LowRankLinear(Linear):
    """peft's adapted linear layer; where it is in its plain form the product is `LowRankProduct`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output, shape (..., out)."""
        name = None if args or kwargs else self._plain_adapter(x)
        if name is None:
            return super().forward(x, *args, **kwargs)
        base, a, b = self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight
        flat = x.reshape(-1, x.shape[-1])
        product: Any = LowRankProduct.apply(flat, base.weight, base.bias, a, b, self.scaling[name])
        return product.view(*x.shape[:-1], -1)

    def _plain_adapter(self, x: Tensor) -> str | None:
        """Return the one active adapter, where all is of one precision and on this rank, nothing drops out and the
        matrix below is frozen; None otherwise.
        """
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(names) != 1 or torch.is_autocast_enabled(x.device.type):
            return None
        name, weight = names[0], self.base_layer.weight
        parts = (x, weight, self.lora_A[name].weight, self.lora_B[name].weight)
        plain = (
            type(self.base_layer) is nn.Linear
            and not weight.requires_grad
            and name not in self.lora_variant
            and not self.lora_bias[name]
            and isinstance(self.lora_dropout[name], nn.Identity)
            and len({part.dtype for part in parts}) == 1
            and not any(isinstance(part, DTensor) for part in parts)
        )
        return name if plain else None


def use_low_rank_products(model: nn.Module) -> None:
    """Have a peft model's plain linear layers compute by `LowRankLinear`; names, weights and merging stay peft's."""
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = LowRankLinear
