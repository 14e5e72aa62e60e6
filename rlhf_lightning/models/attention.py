"""Attention over a row that several sequences share: each attends within its own block of cells, and to nothing else.

One mask over the whole row would have kernels compute all that it hides, the row's width squared. On a CPU, and in
single precision anywhere, attention therefore runs block by block, and a sequence that is alone in its block needs no
mask, so that kernels skip its future. In half precision on a GPU one call takes all sequences by their lengths, where
PyTorch has a kernel that was seen to do so.
transformers looks attention up by name: what is registered here under ``sdpa`` passes on to its own whatever has no
blocks.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlhf_lightning.models.packing import PackedRow, Pieces

# cuDNN's attention builds a plan for every shape it has not met, in a tenth of a second, and sequences have new lengths
# in every batch; the flash kernels that PyTorch takes instead need none.
torch.backends.cuda.enable_cudnn_sdp(False)


def attend_by_block(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed: PackedRow | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention as transformers calls it, within the blocks of a packed row.

    Queries have shape (rows, heads, width, size); keys and values may have fewer heads. Return the output, shape (rows,
    width, heads, size), and None for the probabilities, which no kernel gives.
    """
    if packed is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    half = half_precision_of(query)
    if half is not None and not options.get("dropout"):
        q, k, v = (part.squeeze(0).transpose(0, 1).to(half) for part in (query, key, value))
        return attend_by_length(q, k, v, packed.pieces, options.get("scaling")).unsqueeze(0), None
    if len(packed.blocks) == 1:
        return sdpa_attention_forward(module, query, key, value, packed.blocks[0].mask, **options)
    widths = [block.width for block in packed.blocks]
    parts = zip(packed.blocks, *(states.split(widths, dim=2) for states in (query, key, value)), strict=True)
    outputs = [sdpa_attention_forward(module, *states, block.mask, **options)[0] for block, *states in parts]
    return torch.cat(outputs, dim=1), None


def half_precision_of(query: Tensor) -> torch.dtype | None:
    """The type in which a kernel takes lengths; None where there is none: on a CPU, or in single precision."""
    if not query.is_cuda or query.shape[-1] > WIDEST_HEAD:
        return None
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    return dtype if dtype in (torch.float16, torch.bfloat16) and takes_lengths(query.device, dtype) else None


WIDEST_HEAD = 256
"""Largest size of a head that flash attention takes."""


@functools.cache
def takes_lengths(device: torch.device, dtype: torch.dtype) -> bool:
    """Try whether this PyTorch on this device attends by lengths as it should.

    The kernel is new, its arguments have changed between releases, and one that lined up the start of a piece with the
    start of what it looks at would train on the wrong cells without a word. One prompt of three tokens with
    completions of two and one tells.
    """
    pieces = Pieces(
        torch.tensor([0, 3, 5, 6], dtype=torch.int32, device=device),
        torch.tensor([0, 3, 8, 12], dtype=torch.int32, device=device),
        torch.tensor([0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5], device=device), 3, 5,
    )  # fmt: skip
    draws = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(6, heads, 32, generator=draws).to(device, dtype) for heads in (2, 1, 1))
    mask = torch.ones(6, 6, dtype=torch.bool, device=device).tril()
    mask[5, 3:5] = False
    try:
        found = attend_by_length(query, key, value, pieces, None)
    except (ImportError, TypeError, ValueError, RuntimeError):
        return False
    q, k, v = (part.float().transpose(0, 1) for part in (query, key, value))
    with torch.autocast(device.type, enabled=False):
        expected = scaled_dot_product_attention(q, k.expand_as(q), v.expand_as(q), attn_mask=mask).transpose(0, 1)
    return torch.allclose(found.float(), expected, atol=0.05)


def attend_by_length(query: Tensor, key: Tensor, value: Tensor, pieces: Pieces, scaling: float | None) -> Tensor:
    """Attention of pieces of a row to the cells they look at, in one call, shape (cells, heads, size).

    All is in half precision; keys and values may have fewer heads. ``scaling`` None is one over the root of size.
    """
    from torch.nn.attention.varlen import varlen_attn  # not in every release, see `takes_lengths`

    if pieces.cells is not None:
        key, value = key.index_select(0, pieces.cells), value.index_select(0, pieces.cells)
    options: dict[str, Any] = {}
    if (group := query.shape[1] // key.shape[1]) > 1:
        if shares_keys(varlen_attn):
            options["enable_gqa"] = True
        else:
            key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    output = varlen_attn(
        query, key, value, pieces.asking, pieces.seen, pieces.longest_asking, pieces.longest_seen,
        scale=scaling, window_size=(-1, 0), **options,
    )  # fmt: skip
    assert isinstance(output, Tensor)
    return output


@functools.cache
def shares_keys(kernel: Any) -> bool:
    """Whether a kernel by lengths takes fewer heads of keys than of queries, which PyTorch 2.11's does not."""
    return "enable_gqa" in inspect.signature(kernel).parameters


ALL_ATTENTION_FUNCTIONS["sdpa"] = attend_by_block

SEES_NOTHING = torch.zeros(1, 1, 1, 1, dtype=torch.bool)
"""The mask that goes with a packed row: should a model not hand that on to its attention, its states are NaN."""
