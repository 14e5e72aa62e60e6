"""Tree attention over packed rows: which sequences share a prompt, and which cells of a row attend to each other.

A tree is a prompt followed by its completions. A packed row holds trees end to end. One mask over the whole row would
make kernels compute everything that it hides, a cost quadratic in the row's width. Attention is therefore computed in
one of two ways:

* by block, on a CPU and in single precision. A block holds one or several trees. A sequence that is alone in its block
  needs no mask, so that kernels skip its future tokens.
* by length, in half precision on a GPU. One call takes all pieces by their lengths. A piece is a prompt or a
  completion; a prompt with a single completion forms one piece with it. This way is used only if PyTorch has a kernel
  that passes `takes_lengths`.

transformers looks up attention functions by name. The function registered here as ``sdpa`` calls transformers' own one
for rows that are not packed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlhf_lightning.models.transfer import to_device
from rlhf_lightning.types import Sequences

# cuDNN's attention builds a plan for every new shape, which takes a tenth of a second, and every batch has sequences of
# new lengths. Without it PyTorch takes flash kernels, which need no plan.
torch.backends.cuda.enable_cudnn_sdp(False)

WIDEST = 2048
"""Maximum number of cells of a tree. Above it, the prompt is repeated in a new tree for the remaining completions,
because masked attention over a tree costs the square of its width."""

SMALL = 128
"""Maximum number of cells of trees that share a block: for so few cells another kernel call costs more than a mask."""


class Block(NamedTuple):
    """Neighbouring cells that attend only to each other.

    Attributes:
        width: number of cells.
        mask: bool, True where a cell may attend to another, shape (1, 1, width, width); None for causal attention
            within the block.
    """

    width: int
    mask: Tensor | None


class Pieces(NamedTuple):
    """The same row for kernels that take sequence lengths: query pieces, and the key cells that each attends to.

    A piece is the end of its own key sequence. Attention is causal and aligned at the end: the last cell of a piece
    attends to all of the piece's keys, and each earlier cell to one key less.

    Attributes:
        asking: start of each piece in the row, and the end of the last one, int32, shape (pieces + 1,).
        seen: the same for the key sequences of the pieces, concatenated.
        cells: the key sequences as cells of the row, int64; None if every piece attends only to itself.
        longest_asking: number of cells of the longest piece.
        longest_seen: number of keys of the longest key sequence.
    """

    asking: Tensor
    seen: Tensor
    cells: Tensor | None
    longest_asking: int
    longest_seen: int


class PackedRow:
    """Attention pattern of a packed row of trees. Masks and lengths are computed on first use and shared by all layers.

    Args:
        trees: for each tree, the number of tokens of its prompt and of each completion.
        device: device of the row.

    Attributes:
        is_causal: whether there are no trees: the pattern of rows with one sequence each.
    """

    def __init__(self, trees: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> None:
        self.trees, self.device = trees, device
        self.is_causal = not trees

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The row's blocks, from start to end."""
        found = blocks_of(self.trees)
        return tuple(Block(width, None if mask is None else to_device(mask, self.device)) for width, mask in found)

    @cached_property
    def pieces(self) -> Pieces:
        """The row's pieces, for kernels that take lengths."""
        asking, seen, cells, *longest = pieces_of(self.trees)
        moved = None if cells is None else to_device(cells, self.device)
        return Pieces(to_device(asking, self.device), to_device(seen, self.device), moved, *longest)

    def to(self, device: torch.device) -> PackedRow:
        """Return the same pattern on ``device``."""
        return PackedRow(self.trees, device)


def pieces_of(trees: Sequence[Sequence[int]]) -> Pieces:
    """Split a row of trees into pieces; a prompt without tokens gives no piece."""
    asking: list[int] = []
    seen: list[Tensor] = []
    start, shared = 0, False
    for prompt, *completions in trees:
        behind = start + prompt
        if len(completions) == 1:
            asking.append(prompt + completions[0])
            seen.append(torch.arange(start, behind + completions[0]))
            start = behind + completions[0]
            continue
        shared = True
        root = torch.arange(start, behind)
        if prompt:
            asking.append(prompt)
            seen.append(root)
        for size in completions:
            asking.append(size)
            seen.append(torch.cat([root, torch.arange(behind, behind + size)]))
            behind += size
        start = behind
    looked_at = [len(cells) for cells in seen]
    cells = torch.cat(seen) if shared else None
    return Pieces(_ends(asking), _ends(looked_at), cells, max(asking), max(looked_at))


def _ends(sizes: Sequence[int]) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).int()


def blocks_of(trees: Sequence[Sequence[int]]) -> Iterator[Block]:
    """Yield the attention blocks of a row of trees; each tree lists the tokens of its prompt and its completions."""
    together: list[Sequence[int]] = []
    for tree in trees:
        if together and sum(map(sum, together)) + sum(tree) > SMALL:
            yield _block(together)
            together = []
        together.append(tree)
    if together:
        yield _block(together)


def _block(trees: Sequence[Sequence[int]]) -> Block:
    width = sum(map(sum, trees))
    if len(trees) == 1 and len(trees[0]) == 2:
        return Block(width, None)
    return Block(width, _mask(trees).unsqueeze(0).unsqueeze(0))


def _mask(trees: Sequence[Sequence[int]]) -> Tensor:
    """Return which cells each cell may attend to (its prompt and its own piece, causally); bool, (width, width)."""
    pieces = torch.tensor([size for tree in trees for size in tree])
    number = torch.arange(len(pieces))
    prompt = number - torch.tensor([place for tree in trees for place in range(len(tree))])
    owner, root = number.repeat_interleave(pieces), prompt.repeat_interleave(pieces)
    return ((owner == owner.unsqueeze(-1)) | (owner == root.unsqueeze(-1))).tril_()


def trees_of(sequences: Sequences, rows: Iterable[int] | None = None) -> Iterator[list[int]]:
    """Group completions (of ``rows``, or all for None) by prompt; yield the groups in order of their first completion.

    Equal prompts count as one prompt. A group is split where its tree would exceed `WIDEST` cells.
    """
    trees: dict[bytes, list[list[int]]] = {}
    widths: dict[bytes, int] = {}
    for member in range(len(sequences.completions)) if rows is None else rows:
        prompt, size = sequences.prompts[sequences.parents[member]], len(sequences.completions[member])
        key = prompt.numpy().tobytes()
        if key not in trees or widths[key] + size > WIDEST:
            trees.setdefault(key, []).append([])
            widths[key] = len(prompt)
        trees[key][-1].append(member)
        widths[key] += size
    return (members for split in trees.values() for members in split)


def tree_width(sequences: Sequences, members: Sequence[int]) -> int:
    """Return the number of cells of a tree: a prompt and these of its completions."""
    prompt = sequences.prompts[sequences.parents[members[0]]]
    return len(prompt) + sum(len(sequences.completions[member]) for member in members)


NARROW = 256
"""Maximum number of cells of a tree of prompts with a common prefix; twice the prefix length if that is larger."""


def prefix_trees(prompts: Sequence[Tensor]) -> list[tuple[int, list[int]]]:
    """Group prompts by a common prefix, where computing the prefix once saves cells.

    Args:
        prompts: token ids of each prompt; no prompt is empty.

    Returns:
        For each group, the length of the common prefix (0 for none) and the indices of its prompts. Each prompt has at
        least one token after the prefix.
    """
    texts = [prompt.tolist() for prompt in prompts]
    groups: list[tuple[int, list[int]]] = []
    width = 0  # cells of the last group
    for row in sorted(range(len(texts)), key=texts.__getitem__):
        size = len(texts[row])
        if groups:
            common, members = groups[-1]
            shared = _common(texts[members[-1]], texts[row], common if len(members) > 1 else size)
            joint = shared + sum(len(texts[one]) - shared for one in (*members, row))
            if shared and joint < width + size and joint <= max(NARROW, 2 * shared):
                groups[-1], width = (shared, [*members, row]), joint
                continue
        groups.append((0, [row]))
        width = size
    return groups


def _common(one: Sequence[int], other: Sequence[int], most: int) -> int:
    """Return the length of the common prefix of two texts, at most ``most`` and shorter than either text."""
    most = min(most, len(one) - 1, len(other) - 1)
    return next((place for place in range(most) if one[place] != other[place]), most)


# -- attention --------------------------------------------------------------------------------------------------------


def attend_by_block(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed: PackedRow | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute scaled dot-product attention with transformers' interface, within the blocks of a packed row.

    Queries have shape (rows, heads, width, size); keys and values may have fewer heads. Return the output, shape (rows,
    width, heads, size), and None instead of the attention probabilities, which these kernels do not return.
    """
    # Compiled layers depend on this condition: on a row's identity or number of trees, they would be compiled again.
    if packed is None or packed.is_causal:
        mask = attention_mask if packed is None else None
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    return attend_in_row(module, query, key, value, packed, **options)


@torch.compiler.disable
def attend_in_row(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, packed: PackedRow, **options: Any
) -> tuple[Tensor, None]:
    """Compute the attention of a packed row, by block or by length.

    Compiled layers call it between two graphs: rows have different numbers of blocks, and each number would need a
    graph of its own.
    """
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
    """Return the dtype for attention by length, or None if no such kernel applies: on a CPU, or in single precision."""
    if not query.is_cuda or query.shape[-1] > WIDEST_HEAD:
        return None
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    return dtype if dtype in (torch.float16, torch.bfloat16) and takes_lengths(query.device, dtype) else None


WIDEST_HEAD = 256
"""Largest head size that flash attention supports."""


@functools.cache
def takes_lengths(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether this PyTorch on this device computes attention by length correctly, by trying it.

    The kernel is new, and its arguments have changed between releases. A kernel that aligned a piece with the start of
    its keys instead of their end would silently train on wrong cells. The test is one prompt of three tokens with
    completions of two and one tokens.
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
    """Compute attention of the pieces of a row to their keys in one call; return shape (cells, heads, size).

    All tensors are in half precision; keys and values may have fewer heads. ``scaling`` None means 1 / sqrt(size).
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
    """Return whether an attention-by-length kernel supports grouped-query attention; PyTorch 2.11's does not."""
    return "enable_gqa" in inspect.signature(kernel).parameters


ALL_ATTENTION_FUNCTIONS["sdpa"] = attend_by_block

CAUSAL_ROWS = PackedRow(())
"""Pattern of rows with one sequence each. It spares transformers' masks: to find out that none is needed, transformers
reads values from the device in every forward pass."""

SEES_NOTHING = torch.zeros(1, 1, 1, 1, dtype=torch.bool)
"""Mask passed with a packed row. If a model does not forward the packed row to its attention, its states become NaN."""
