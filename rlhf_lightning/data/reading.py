"""One row, from any form to the canonical one, or refused: whatever it holds, nothing else comes of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rlhf_lightning.data.canonical import CanonicalRow, Row, RowRefused
from rlhf_lightning.data.files import Unreadable
from rlhf_lightning.data.formats import Reader

DEEPEST = 64
"""Levels of lists and objects in a row: what is deeper could not be written to JSON and read again everywhere."""


def read_row(
    row: Row | Unreadable, read: Reader, as_chat: bool = False, columns: Mapping[str, str] | None = None
) -> CanonicalRow:
    """Read one row.

    Args:
        row: as its source gave it.
        read: reads a row of any form of one kind, see `formats`.
        as_chat: whether plain text becomes a user's and an assistant's turn.
        columns: new name of each column to be renamed.

    Raises:
        RowRefused: it cannot be used.
    """
    if isinstance(row, Unreadable):
        raise RowRefused(row.reason)
    if _deeper(row, DEEPEST):
        raise RowRefused("too_deep")
    if columns:
        covered = set(columns.values()) - set(columns)
        row = {columns.get(name, name): value for name, value in row.items() if name not in covered}
    canonical = read(row, as_chat)
    try:
        parts = [canonical.prompt, canonical.completions, canonical.columns]
        json.dumps(parts, ensure_ascii=False, default=str).encode("utf-8")
    except (UnicodeError, ValueError, TypeError):
        raise RowRefused("broken_text") from None
    return canonical


def _deeper(value: Any, levels: int) -> bool:
    layer = [value]
    for _ in range(levels):
        layer = [
            inner
            for outer in layer
            for inner in (outer.values() if isinstance(outer, Mapping) else outer)
            if isinstance(inner, Mapping | list | tuple)
        ]
        if not layer:
            return False
    return True
