"""Muon for the matrices of decoder layers and AdamW for every other weight, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from rlhf_lightning.models.sharding import shard_like, whole


class MuonAdamW(Optimizer):
    r"""Update the matrices of decoder layers with Muon, and every other weight with AdamW.

    Muon (Jordan et al. 2024) replaces the momentum B of a matrix W by a matrix with the same singular vectors and
    singular values near 1:

    B <- mu B + (1 - mu) G;  W <- (1 - lr wd) W - 0.2 lr \sqrt{max(rows, columns)} NS(mu B + (1 - mu) G)

    NS is five Newton-Schulz iterations in bf16. The factor 0.2 \sqrt{...} gives an update a root mean square of 0.2 lr,
    as AdamW's in long runs, so that both take one learning rate (Liu et al. 2025, arXiv 2502.16982, Section 2.2). Muon
    keeps one moment, AdamW two. Embeddings, LM heads, value and score heads take AdamW, and so do vectors, without
    weight decay. Of sharded weights each rank keeps its share of the moments; NS needs whole matrices, so every rank
    gathers them one at a time and computes all of them.

    Args:
        params: the weights; `mark_layers` has marked those of the decoder layers.
        lr: learning rate.
        weight_decay: decoupled weight decay of all matrices.
        momentum: mu.
        betas: AdamW's decay rates.
        eps: AdamW's epsilon.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 2e-5,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        kinds: dict[str, list[nn.Parameter]] = {"layers": [], "matrices": [], "vectors": []}
        for weight in params:
            matrix = "layers" if weight.dim() == 2 and getattr(weight, MARK, False) else "matrices"
            kinds[matrix if weight.dim() > 1 else "vectors"].append(weight)
        groups: list[dict[str, Any]] = [{"params": kinds[name], "name": name} for name in kinds]
        groups[0]["momentum"], groups[-1]["weight_decay"] = momentum, 0.0
        self._adamw = AdamW(groups[1:], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        super().__init__([groups[0], *self._adamw.param_groups], self._adamw.defaults)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the weights that have a gradient; return the result of ``closure``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_layers(self.param_groups[0])
        # Shared anew in each step: loading a state replaces both, and a callback may add a group.
        self._adamw.param_groups, self._adamw.state = self.param_groups[1:], self.state
        self._adamw.step()
        return loss

    @torch.no_grad()
    def _step_layers(self, group: dict[str, Any]) -> None:
        rate, momentum = float(group["lr"]), group["momentum"]
        for weight in group["params"]:
            if weight.grad is None:
                continue
            state = self.state[weight]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(weight.grad)
            moment = state["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
            update = orthogonalised(whole(weight.grad.lerp(moment, momentum)))
            weight.mul_(1 - rate * group["weight_decay"])
            weight.add_(shard_like(update, weight), alpha=-0.2 * rate * max(weight.shape) ** 0.5)


def orthogonalised(matrix: Tensor) -> Tensor:
    """Return a matrix with the same singular vectors, and singular values near 1, in bf16, shape (rows, columns).

    Five Newton-Schulz iterations X <- a X + (b A + c A^2) X with A = X X^T (Jordan et al. 2024). The coefficients raise
    small singular values fastest; the singular values end between 0.7 and 1.2.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    found = matrix.T.bfloat16() if tall else matrix.bfloat16()
    found = found / found.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = found @ found.T
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), found, beta=3.4445)
    return found.T if tall else found


MARK = "in_decoder_layer"
"""Attribute of a weight that belongs to a decoder layer."""


def mark_layers(layers: Iterable[nn.Module]) -> None:
    """Mark the weights of decoder layers: an optimizer receives weights without names."""
    for layer in layers:
        for weight in layer.parameters():
            setattr(weight, MARK, True)
