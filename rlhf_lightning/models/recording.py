"""Record hidden states of layers and router logits while a model is forwarded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lightning.compat import router_recorder
from rlhf_lightning.errors import SettingError
from rlhf_lightning.models.layout import Layout
from rlhf_lightning.models.scalar_head import text_config, trunk
from rlhf_lightning.models.sharding import decoder_layers


@contextmanager
def kept_states(model: Any, layers: Sequence[int], layout: Layout) -> Iterator[dict[str, Tensor]]:
    """Record the outputs of some decoder layers at the predicting positions, without gradient, as ``hidden_N``.

    Forward the CausalLM on ``layout`` inside the context; layer -1 is the last.

    Raises:
        SettingError: the model has no such layer.
    """
    stack, kept = decoder_layers(model) if layers else [], dict[str, Tensor]()
    for number in layers:
        if not -len(stack) <= number < len(stack):
            raise SettingError(
                "unknown-layer", f"hidden_layers names layer {number}, but the model has {len(stack)} layers"
            )

    def keeping(number: int) -> Callable[..., None]:
        def keep(_layer: nn.Module, _given: Any, returned: Any) -> None:
            states = returned if isinstance(returned, Tensor) else returned[0]
            kept[f"hidden_{number}"] = states.detach().flatten(0, 1)[layout.predictors]

        return keep

    hooks = [stack[number].register_forward_hook(keeping(number)) for number in layers]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def recorded_routers(model: Any) -> Iterator[list[tuple[Tensor, Tensor | None]]]:
    """Record router logits of a mixture of experts in forwards with gradient, and which tokens are not padding.

    Raises:
        SettingError: ``no-router``.
    """
    inner = trunk(model.model)
    recorder = router_recorder(inner)
    if recorder is None:
        raise SettingError(
            "no-router", f"{type(inner).__name__} records no router logits; set router_aux_loss_coef to 0"
        )
    kind, end, index = recorder
    found: list[tuple[Tensor, Tensor | None]] = []
    layouts: list[Layout] = []

    def note(_module: nn.Module, given: Any) -> None:
        layouts[:] = [one for one in given[:1] if isinstance(one, Layout)]

    def keep(_module: nn.Module, _given: Any, returned: Any) -> None:
        logits = returned[index] if isinstance(returned, tuple | list) else returned
        if logits.requires_grad:
            found.append((logits.flatten(0, -2), real_cells(layouts[-1]) if layouts else None))

    routers = [one for name, one in inner.named_modules() if isinstance(one, kind) and name.endswith(end)]
    hooks = [model.register_forward_pre_hook(note), *(one.register_forward_hook(keep) for one in routers)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def experts_of_a_token(model: Any) -> int:
    """Return the number of experts per token of a mixture of experts."""
    config = text_config(model.model)
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_k", "moe_top_k", "top_k")
    return next((int(value) for name in names if isinstance(value := getattr(config, name, None), int)), 1)


def real_cells(layout: Layout) -> Tensor | None:
    """Return which cells of padded rows hold tokens, shape (rows * width,); None if all of them do."""
    rows, width = layout.input_ids.shape
    if layout.packed is not None or len(layout.last) != rows:
        return None
    places = torch.arange(width, device=layout.last.device)
    return (places <= (layout.last % width).unsqueeze(-1)).flatten()
