"""Incremental decoding with continuous batching and a KV cache; `slot_cache` holds the cache of a running batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from rlhf_lightning.models.causal_lm import CausalLM, Decoding, DecodingStep, OwnCache, takes
from rlhf_lightning.models.layout import FEW_PADS
from rlhf_lightning.models.packing import SEES_NOTHING, PackedRow, prefix_trees
from rlhf_lightning.models.scalar_head import trunk
from rlhf_lightning.models.transfer import to_device
from rlhf_lightning.sampling.slot_cache import Kept, SlotLayer, SlotStates, TokenRows
from rlhf_lightning.sampling.static_steps import StaticSteps, is_replayable

ROOM = 256
"""Free columns of the first allocation; a batch that needs more columns doubles the buffer."""

FULL_ENOUGH = 0.75
"""Share of active rows below which refilling or shrinking the batch pays off: each costs about one step."""


class Mixture(NamedTuple):
    """A second model that contributes to the distribution of every token.

    Attributes:
        other: context manager that yields the second model for one forward pass; it may be the first model in another
            state (adapters off).
        mix: combines the logits of both models into those to sample from; all have shape (rows, vocabulary).
    """

    other: Callable[[], AbstractContextManager[CausalLM]]
    mix: Callable[[Tensor, Tensor], Tensor]


class Prefix(NamedTuple):
    """Prefilled prompts, before any token is sampled.

    Attributes:
        logits: logits after each prompt, shape (prompts, vocabulary).
        cache: keys and values of the prompts, padded on the left, or another kind of cache of the model.
        other: the same prompts prefilled by the second model of a mixture.
    """

    logits: Tensor
    cache: Any
    other: Prefix | None = None

    def select(self, row: int) -> Prefix:
        """Return a single prompt; the others are dropped."""
        index = torch.tensor([row], device=self.logits.device)
        self.cache.reorder_cache(index)
        return Prefix(self.logits[index], self.cache, None if self.other is None else self.other.select(row))


def takes_positions(model: CausalLM) -> bool:
    """Whether the model takes the positions of its tokens; otherwise it may count them from its cache."""
    return takes(trunk(model.model), "position_ids")


REFILLED = (DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer)
"""Cache layer classes with slots that can be refilled."""


def default_decoding(model: CausalLM, checked: bool = False) -> Decoding:
    """Return the decoding method of a model, or with ``checked`` the first method to try.

    A model that counts positions itself needs rows that start together. Sliding windows and recurrent states in slots
    are tried only if a check follows.
    """
    layers = DynamicCache(config=model.model.config).layers
    kinds = REFILLED if checked else REFILLED[:1]
    known = bool(layers) and all(type(layer) in kinds for layer in layers)
    attends = any(isinstance(layer, CacheLayerMixin) for layer in layers)
    return "slots" if known and (takes_positions(model) or not attends) else "batches"


def whole_cache(config: Any) -> DynamicCache:
    """Return a cache with layers that keep all columns, since the sliding windows of a batch's rows differ."""
    cache = DynamicCache(config=config)
    cache.layers = [DynamicLayer() if type(one) is DynamicSlidingWindowLayer else one for one in cache.layers]
    return cache


class Decoder:
    """Model with a KV cache that decodes rows of tokens step by step.

    Args:
        model: the model.
        slots: maximum number of rows at the same time.
        room: expected number of columns beyond the prompts.
    """

    def __init__(self, model: CausalLM, slots: int, room: int) -> None:
        self.model, self.config = model, model.model.config
        self.decoding: Decoding = model.decoding or default_decoding(model)
        self.cache: Any = None
        self.columns = 0  # number of cached columns, if the decoder does not refill
        self.slots, self.room = slots, min(room, ROOM)
        self.static: StaticSteps | None = None

    @property
    def refills(self) -> bool:
        """Whether rows may enter a running batch."""
        return self.decoding == "slots"

    @property
    def equal_lengths(self) -> bool:
        """Whether prompts that are prefilled together must have the same length."""
        return self.decoding in ("equal", "uncached")

    @property
    def width(self) -> int:
        """Number of columns read so far."""
        if self.refills:
            layers = [] if self.cache is None else self.cache.layers
            return next((layer.get_seq_length() for layer in layers if isinstance(layer, SlotLayer)), 0)
        return self.columns

    def prefill(self, prompts: Sequence[Tensor], kept: Sequence[Kept] = ()) -> Prefix:
        """Prefill prompts, each an int64 tensor of token ids; with ``kept``, only the tokens after the cached ones."""
        if kept:
            return self._read_on(prompts, kept)
        if self.refills and self.model.reads_trees and len(prompts) > 1:
            groups, widest = prefix_trees(prompts), max(map(len, prompts))
            cells = sum(shared + sum(len(prompts[row]) - shared for row in rows) for shared, rows in groups)
            if cells < (1 - FEW_PADS) * len(prompts) * widest:
                return self._read_packed(prompts, groups, widest)
        device, width = next(self.model.parameters()).device, max(len(prompt) for prompt in prompts)
        input_ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            input_ids[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = 1
        input_ids, mask = to_device(input_ids, device), to_device(mask, device)
        if not self.refills:
            return self._read_together(input_ids, mask)
        cache = whole_cache(self.config)
        return Prefix(self.model(DecodingStep(input_ids, mask, self._positions(mask), cache)), cache)

    def _read_packed(self, prompts: Sequence[Tensor], groups: Sequence[tuple[int, list[int]]], width: int) -> Prefix:
        """Prefill prompts in one row without padding, each common prefix once (see `prefix_trees`).

        ``width`` is the length of the longest prompt.
        """
        pieces: list[Tensor] = []
        positions: list[Tensor] = []
        trees: list[list[int]] = []
        cells = torch.zeros(len(prompts), width, dtype=torch.long)  # cell of each prompt's tokens, padded on the left
        start = 0
        for shared, rows in groups:
            pieces += [prompts[rows[0]][:shared], *(prompts[row][shared:] for row in rows)]
            trees.append([shared, *(len(prompts[row]) - shared for row in rows)])
            behind = start + shared
            positions.append(torch.arange(shared))
            for row in rows:
                size = len(prompts[row])
                cells[row, width - size : width - size + shared] = torch.arange(start, start + shared)
                cells[row, width - size + shared :] = torch.arange(behind, behind + size - shared)
                positions.append(torch.arange(shared, size))
                behind += size - shared
            start = behind
        device = next(self.model.parameters()).device
        cells, packed = to_device(cells, device), PackedRow(trees, device)
        ids, places = (to_device(torch.cat(parts).unsqueeze(0), device) for parts in (pieces, positions))
        read = DynamicCache(config=self.config)
        step = DecodingStep(ids, to_device(SEES_NOTHING, device), places, read, packed, cells[:, -1])
        logits = self.model(step)
        cache = DynamicCache(config=self.config)
        for number, layer in enumerate(read.layers):
            keys, values = (
                part[0].index_select(1, cells.flatten()).unflatten(1, cells.shape).transpose(0, 1)
                for part in (layer.keys, layer.values)
            )
            cache.update(keys, values, number)
        return Prefix(logits, cache)

    def _read_on(self, prompts: Sequence[Tensor], kept: Sequence[Kept]) -> Prefix:
        """Prefill the last tokens of rows with cached prefixes; all rows read equally many, some of them again."""
        device = next(self.model.parameters()).device
        width = max(len(ids) - known.tokens for ids, known in zip(prompts, kept, strict=True))
        counts = [max(len(ids) - width, 0) for ids in prompts]
        cached = max(counts)
        input_ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros(len(prompts), cached + width, dtype=torch.long)
        for row, (ids, count) in enumerate(zip(prompts, counts, strict=True)):
            read = ids[count:]
            input_ids[row, width - len(read) :] = read
            mask[row, cached - count if count else cached + width - len(read) :] = 1
        cache = whole_cache(self.config)
        for layer in range(len(kept[0].layers) if cached else 0):
            rows = [(known.layers[layer], count) for known, count in zip(kept, counts, strict=True)]
            keys, values = (
                torch.stack([_padded_left(both[part][:, :count], cached) for both, count in rows]) for part in (0, 1)
            )
            cache.update(keys, values, layer)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -width:]
        ids, mask, positions = (to_device(part, device) for part in (input_ids, mask, positions))
        step = DecodingStep(ids, mask, positions, cache)
        return Prefix(self.model(step), cache)

    def _read_together(self, input_ids: Tensor, mask: Tensor) -> Prefix:
        """Prefill prompts that start together; the model creates the cache itself, if it has one."""
        self.columns = input_ids.shape[1]
        if self.decoding == "uncached":
            return Prefix(self.model(DecodingStep(input_ids)), TokenRows(input_ids))
        cache = OwnCache()
        if self.equal_lengths:
            return Prefix(self.model(DecodingStep(input_ids, cache=cache)), cache)
        return Prefix(self.model(DecodingStep(input_ids, mask, self._positions(mask), cache)), cache)

    def _positions(self, mask: Tensor) -> Tensor | None:
        """Return the positions of padded prompts; None if the model takes no positions."""
        return (mask.cumsum(-1) - 1).clamp_min(0) if takes_positions(self.model) else None

    def enter(self, prefix: Prefix, rows: Tensor, slots: Tensor) -> None:
        """Put prefilled prompts into slots; without refilling, into all slots in order.

        Args:
            prefix: the prompts; consumed if the decoder does not refill.
            rows: index of the prompt for each slot; one prompt may enter several slots.
            slots: target slots, int64.
        """
        whole = torch.equal(rows, torch.arange(len(prefix.logits), device=rows.device))
        if not self.refills:
            if not whole:
                prefix.cache.reorder_cache(rows)
            self.cache = prefix.cache
            return
        if self.cache is None:
            layers = [
                SlotStates(one.number_of_states)
                if isinstance(one, LinearAttentionLayer)
                else SlotLayer(self.slots, self.room)
                for one in prefix.cache.layers
            ]
            self.cache = Cache(layers=layers)
        for layer, read in zip(self.cache.layers, prefix.cache.layers, strict=True):
            if isinstance(layer, SlotStates):
                layer.enter(read, rows, slots)
                continue
            keys, values = (read.keys, read.values) if whole else (read.keys[rows], read.values[rows])
            layer.enter(keys, values, slots)

    def step(self, tokens: Tensor, lengths: np.ndarray) -> Tensor:
        """Decode one token in each slot; return the next logits, shape (rows, vocabulary).

        Args:
            tokens: int64, shape (rows,).
            lengths: number of tokens of each row including this token, int64, shape (rows,).
        """
        if self.static is not None and self.refills:
            return self.static.run(self.cache, tokens, lengths)
        width = self.width + 1 if self.width else int(lengths.max())
        self.columns += 1
        if self.decoding == "uncached":
            self.cache.ids = torch.cat([self.cache.ids, tokens.unsqueeze(-1)], -1)
            return self.model(DecodingStep(self.cache.ids))
        if self.equal_lengths:
            return self.model(DecodingStep(tokens.unsqueeze(-1), cache=self.cache))
        mask: Tensor | None = None
        # A model with full attention takes the mask in the form of its layers, and creates no mask itself.
        whole = self.refills and self.model.reads_trees
        if not whole or (lengths != width).any():
            seen = np.arange(width) >= width - lengths[:, None]
            cells = torch.from_numpy(seen[:, None, None] if whole else seen.astype(np.int64))
            mask = to_device(cells, tokens.device)
        takes_them = takes_positions(self.model)
        positions = to_device(torch.from_numpy(lengths[:, None] - 1), tokens.device) if takes_them else None
        return self.model(DecodingStep(tokens.unsqueeze(-1), mask, positions, self.cache))

    def leave(self, slots: Sequence[int], counts: Sequence[int]) -> list[Kept]:
        """Return the keys and values of rows that leave their slots; empty if the decoder cannot continue from them.

        ``counts`` are the numbers of tokens read so far in each row.
        """
        if not self.refills or any(isinstance(layer, SlotStates) for layer in self.cache.layers):
            return []
        return [
            Kept(count, [layer.row(slot, count) for layer in self.cache.layers])
            for slot, count in zip(slots, counts, strict=True)
        ]

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows; they move to the first slots in their order."""
        if not self.refills:
            self.cache.reorder_cache(rows)
        else:
            for layer in self.cache.layers:
                layer.keep(rows)

    def trim(self, width: int) -> None:
        """Keep only the last ``width`` columns, if the decoder refills."""
        if self.refills and self.cache is not None:
            for layer in self.cache.layers:
                layer.trim(width)


class MixedDecoder(Decoder):
    """Decoder of a mixture: two models decode the same tokens with their own caches, and their logits are mixed."""

    def __init__(self, model: CausalLM, slots: int, room: int, mixture: Mixture) -> None:
        super().__init__(model, slots, room)
        self.mixture = mixture
        with mixture.other() as other:
            self.other = Decoder(other, slots, room)
        for decoder in (self, self.other):
            decoder.decoding = max(self.decoding, self.other.decoding, key=get_args(Decoding).index)

    def prefill(self, prompts: Sequence[Tensor], kept: Sequence[Kept] = ()) -> Prefix:
        own = super().prefill(prompts)
        with self.mixture.other():
            other = self.other.prefill(prompts)
            return Prefix(self.mixture.mix(own.logits, other.logits), own.cache, other)

    def enter(self, prefix: Prefix, rows: Tensor, slots: Tensor) -> None:
        assert prefix.other is not None
        super().enter(prefix, rows, slots)
        self.other.enter(prefix.other, rows, slots)

    def step(self, tokens: Tensor, lengths: np.ndarray) -> Tensor:
        own = super().step(tokens, lengths)
        with self.mixture.other():
            return self.mixture.mix(own, self.other.step(tokens, lengths))

    def leave(self, slots: Sequence[int], counts: Sequence[int]) -> list[Kept]:
        return []  # both models prefill the whole conversation again

    def keep(self, rows: Tensor) -> None:
        super().keep(rows)
        self.other.keep(rows)

    def trim(self, width: int) -> None:
        super().trim(width)
        self.other.trim(width)


def _padded_left(states: Tensor, width: int) -> Tensor:
    """Pad keys or values of shape (heads, columns, head size) with zeros to ``width`` columns."""
    return torch.nn.functional.pad(states, (0, 0, width - states.shape[1], 0))


def make_decoder(
    model: CausalLM, slots: int, room: int, mixture: Mixture | None = None, graphs: bool = False
) -> Decoder:
    """Return the decoder of a model, or of the two models of a mixture; with ``graphs``, CUDA replays its steps."""
    decoder = Decoder(model, slots, room) if mixture is None else MixedDecoder(model, slots, room, mixture)
    if graphs and mixture is None and is_replayable(model):
        decoder.static = StaticSteps(model)
    elif graphs:
        rank_zero_warn(
            "cuda_graphs has no effect on these rollouts: it needs one model with whole weights on a GPU, and full "
            "attention in all layers. The tokens are sampled without it."
        )
    return decoder


def idle_pass(model: CausalLM, mixture: Mixture | None) -> None:
    """Run a forward pass of one token to stay in step with ranks that still decode with sharded weights."""
    make_decoder(model, 1, 1, mixture).prefill([torch.zeros(1, dtype=torch.long)])
