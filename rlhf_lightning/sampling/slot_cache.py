"""KV cache of a running batch: keys, values and states of its slots, written in place.

All rows share the same columns and end at the same column. A new prompt is placed so that its last token is in the last
column. One step then writes one column for all rows, and the batch is never wider than its longest row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer in a preallocated buffer; columns ``start`` to ``stop`` are in use.

    Args:
        slots: number of rows of the buffer, which has shape (slots, heads, columns, head size).
        room: number of free columns of the first allocation.
    """

    def __init__(self, slots: int, room: int) -> None:
        super().__init__()
        self.slots, self.room = slots, room
        self.rows = self.start = self.stop = 0
        self.fixed: tuple[Tensor, int] | None = None
        """Index of the next column, and number of columns to return, from the first on; None returns those in use."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers. They hold zeros because masked values must be finite."""
        columns = key_states.shape[-2] + self.room
        self.keys, self.values = (
            states.new_zeros(self.slots, states.shape[1], columns, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the next columns of all rows in use; return their keys and values, (rows, heads, width, head size)."""
        if self.fixed is not None:
            column, width = self.fixed
            for buffer, states in ((self.keys, key_states), (self.values, value_states)):
                buffer[: self.rows].index_copy_(2, column, states)
            return self.keys[: self.rows, :, :width], self.values[: self.rows, :, :width]
        columns = key_states.shape[-2]
        self.reserve(self.stop - self.start, columns)
        stop = self.stop + columns
        self.keys[: self.rows, :, self.stop : stop] = key_states
        self.values[: self.rows, :, self.stop : stop] = value_states
        self.stop = stop
        return self.keys[: self.rows, :, self.start : stop], self.values[: self.rows, :, self.start : stop]

    def enter(self, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Put rows into slots so that their last column is the last column in use.

        Keys and values have shape (entering, heads, width, head size); short rows are padded on the left.
        """
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self.reserve(keys.shape[-2], 0)
        columns = slice(self.stop - keys.shape[-2], self.stop)
        self.keys[slots, :, columns] = keys
        self.values[slots, :, columns] = values
        self.rows = max(self.rows, int(slots.max()) + 1)

    def reserve(self, width: int, ahead: int) -> None:
        """Ensure at least ``width`` columns in use and ``ahead`` free columns after them: move or grow the buffer."""
        used, capacity = self.stop - self.start, self.keys.shape[-2]
        width = max(width, used)
        lead = width - used
        if used == 0 and width + ahead <= capacity:
            self.start, self.stop = 0, width
            return
        if lead <= self.start and self.stop + ahead <= capacity:
            self.start -= lead
            return
        # Moving within the buffer must leave a share of it free; otherwise columns would move at every step.
        columns = capacity if width + ahead <= 0.75 * capacity else max(2 * capacity, width + ahead)
        self.keys, self.values = (self._moved(buffer, lead, columns) for buffer in (self.keys, self.values))
        self.start, self.stop = 0, width

    def _moved(self, buffer: Tensor, lead: int, columns: int) -> Tensor:
        """Return a buffer of ``columns`` columns with the used columns moved behind ``lead`` others."""
        used = buffer[: self.rows, :, self.start : self.stop]
        if columns == buffer.shape[-2]:
            used = used.clone()
        else:
            buffer = buffer.new_zeros(*buffer.shape[:2], columns, buffer.shape[-1])
        buffer[: self.rows, :, lead : lead + used.shape[-2]] = used
        return buffer

    def row(self, slot: int, count: int) -> tuple[Tensor, Tensor]:
        """Return a copy of the last ``count`` keys and values of a slot, each of shape (heads, count, head size)."""
        columns = slice(self.stop - count, self.stop)
        return self.keys[slot, :, columns].clone(), self.values[slot, :, columns].clone()

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows; they move to the first slots in their order."""
        columns = slice(self.start, self.stop)
        for buffer in (self.keys, self.values):
            buffer[: len(rows), :, columns] = buffer[rows, :, columns]
        self.rows = len(rows)

    def trim(self, width: int) -> None:
        """Keep only the last ``width`` columns."""
        self.start = max(self.start, self.stop - width)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the width that a forward pass of ``query_length`` tokens attends to, and its offset."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of columns in use."""
        return self.stop - self.start

    def get_max_length(self) -> int:
        """Return -1: the length is unbounded."""
        return -1


class SlotStates(LinearAttentionLayer):
    """Convolution and recurrent states of one layer, a row for each slot."""

    def enter(self, read: LinearAttentionLayer, rows: Tensor, slots: Tensor) -> None:
        """Put the states of selected rows into slots."""
        count = int(slots.max()) + 1
        for kind in ("conv_states", "recurrent_states"):
            own = getattr(self, kind)
            for index, states in getattr(read, kind).items():
                if states is None:
                    continue
                held = states[:0] if own[index] is None else own[index]
                if len(held) < count:
                    held = torch.cat([held, states.new_zeros(count - len(held), *states.shape[1:])])
                held[slots] = states[rows]
                own[index] = held
        for name in ("is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state"):
            setattr(self, name, {**getattr(read, name)})
        self.conv_kernel_size, self.device, self.dtype = {**read.conv_kernel_size}, read.device, read.dtype

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows; they move to the first slots in their order."""
        self.reorder_cache(rows)

    def trim(self, width: int) -> None:
        """Do nothing, since states have no columns."""


class Kept(NamedTuple):
    """Keys and values of the first tokens of a row that has left its slot.

    Attributes:
        tokens: number of tokens.
        layers: keys and values of each layer, each of shape (heads, count, head size).
    """

    tokens: int
    layers: list[tuple[Tensor, Tensor]]


class TokenRows:
    """Tokens of each row so far, shape (rows, width): the cache of a model that reads all tokens again at each step."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def reorder_cache(self, rows: Tensor) -> None:
        """Keep these rows, in this order."""
        self.ids = self.ids[rows]
