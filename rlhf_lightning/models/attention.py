"""Attention over a row that several sequences share: each block of cells attends within itself, and to nothing else.

One mask over the whole row would have kernels compute all that it hides, the row's width squared; and a sequence that
is alone in its block needs no mask, so that kernels skip its future. transformers looks attention up by name: what is
registered here under ``sdpa`` passes on to its own whatever has no blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class Block(NamedTuple):
    """Neighbouring cells that attend to each other alone.

    Attributes:
        width: cells.
        mask: bool, True where a cell may look at another, shape (1, 1, width, width); None where each looks at all
            cells of the block before it.
    """

    width: int
    mask: Tensor | None


def attend_by_block(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    blocks: Sequence[Block] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention as transformers calls it, block by block where blocks are given.

    Args:
        module: the attention layer.
        query: shape (rows, heads, width, size).
        key: the same, with as many heads as the layer has keys.
        value: the same.
        attention_mask: which cells look at which; of no account where there are blocks.
        blocks: of the one row, from its start to its end; None is transformers' own attention.
        options: scaling, dropout, passed on.

    Returns:
        The output, shape (rows, width, heads, size), and None for the probabilities, which no kernel gives.
    """
    if blocks is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    widths = [block.width for block in blocks]
    parts = zip(blocks, *(states.split(widths, dim=2) for states in (query, key, value)), strict=True)
    outputs = [sdpa_attention_forward(module, *states, block.mask, **options)[0] for block, *states in parts]
    return torch.cat(outputs, dim=1), None


ALL_ATTENTION_FUNCTIONS["sdpa"] = attend_by_block

SEES_NOTHING = torch.zeros(1, 1, 1, 1, dtype=torch.bool)
"""The mask that goes with blocks: should a model not hand them on to its attention, its states are NaN, not wrong."""
