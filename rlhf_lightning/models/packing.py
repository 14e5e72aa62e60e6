"""Which sequences share a prompt, and which cells of a row attend to each other.

A tree is a prompt with completions behind it. A packed row holds trees end to end. Attention over it runs in blocks of
one or several trees, or piece by piece: a prompt, a completion, or both together where there is but one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_lightning.types import Sequences

WIDEST = 2048
"""Cells of a tree beyond which its prompt is written again for the rest of its completions: attention over a tree costs
its width squared, for every mask."""

SMALL = 128
"""Cells up to which trees share a block: for so few, calling a kernel once more costs more than what a mask hides."""


class Block(NamedTuple):
    """Neighbouring cells that attend to each other alone.

    Attributes:
        width: cells.
        mask: bool, True where a cell may look at another, shape (1, 1, width, width); None where each looks at all
            cells of the block before it.
    """

    width: int
    mask: Tensor | None


class Pieces(NamedTuple):
    """The same row for kernels that take lengths: neighbouring cells, and the cells that the last of them looks at.

    A cell looks at as many cells fewer as it stands before the last one of its piece: the piece is the end of what it
    looks at.

    Attributes:
        asking: where each piece starts in the row and the last one ends, int32, shape (pieces + 1,).
        seen: the same for what the pieces look at, put end to end.
        cells: that, as cells of the row, int64; None where the pieces look at themselves alone.
        longest_asking: cells of the longest piece.
        longest_seen: most cells that a piece looks at.
    """

    asking: Tensor
    seen: Tensor
    cells: Tensor | None
    longest_asking: int
    longest_seen: int


class PackedRow:
    """How the cells of a row of trees attend. What a kernel is not told is not made; the layers share what is.

    Args:
        trees: of each tree the tokens of its prompt and of each completion.
        device: where the row is.
    """

    def __init__(self, trees: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> None:
        self.trees, self.device = trees, device

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """From the row's start to its end."""
        found = blocks_of(self.trees)
        return tuple(Block(width, None if mask is None else mask.to(self.device)) for width, mask in found)

    @cached_property
    def pieces(self) -> Pieces:
        """The same by lengths."""
        asking, seen, cells, *longest = pieces_of(self.trees)
        moved = None if cells is None else cells.to(self.device)
        return Pieces(asking.to(self.device), seen.to(self.device), moved, *longest)

    def to(self, device: torch.device) -> PackedRow:
        """Return the same on ``device``."""
        return PackedRow(self.trees, device)


def pieces_of(trees: Sequence[Sequence[int]]) -> Pieces:
    """Cut a row of trees into pieces; a prompt without tokens is none."""
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
    """Yield the blocks that a row of trees attends in; of each tree the tokens of its prompt and its completions."""
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
    """Return which cells each cell may look at: its prompt's and its own piece's before it; bool, (width, width)."""
    pieces = torch.tensor([size for tree in trees for size in tree])
    number = torch.arange(len(pieces))
    prompt = number - torch.tensor([place for tree in trees for place in range(len(tree))])
    owner, root = number.repeat_interleave(pieces), prompt.repeat_interleave(pieces)
    return ((owner == owner.unsqueeze(-1)) | (owner == root.unsqueeze(-1))).tril_()


def trees_of(sequences: Sequences, rows: Iterable[int] | None = None) -> Iterator[list[int]]:
    """Yield the completions (those of ``rows``, None for all) that share a prompt, in the order of their first.

    Equal prompts are one.
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
    """Cells that a prompt and these of its completions take."""
    prompt = sequences.prompts[sequences.parents[members[0]]]
    return len(prompt) + sum(len(sequences.completions[member]) for member in members)


NARROW = 256
"""Cells up to which prompts with a common beginning form a tree, or up to twice that beginning if it is longer."""


def prefix_trees(prompts: Sequence[Tensor]) -> list[tuple[int, list[int]]]:
    """Group prompts by a common beginning, where reading it once saves cells.

    Args:
        prompts: token ids of each, none empty.

    Returns:
        For each group the tokens that all its prompts begin with, 0 for none, and the prompts. Each prompt has at least
        one token beyond.
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
    """Return how many tokens two texts begin with alike, at most ``most`` and all but the last of either."""
    most = min(most, len(one) - 1, len(other) - 1)
    return next((place for place in range(most) if one[place] != other[place]), most)
