"""One row, from any form to the canonical one or refused, and a count of what became of all rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rlhf_lightning.data.canonical import REASONS, CanonicalRow, Row, RowRefused
from rlhf_lightning.data.files import Unreadable
from rlhf_lightning.data.formats import Reader


@dataclass
class Report:
    """Counts of rows; ``read == kept + sum(dropped.values())`` always.

    Attributes:
        read: rows read.
        kept: rows kept.
        dropped: rows dropped, by reason (see `canonical.REASONS`).
        truncated: kept rows whose ``prompt`` or ``completion`` lost tokens.
        tokens: supervised tokens of the kept rows.
        escaped: kept rows whose text spells a control token, which is encoded as the characters it is made of.
    """

    read: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    truncated: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    escaped: int = 0

    def drop(self, reason: str) -> None:
        """Count a row that is dropped."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def __add__(self, other: Report) -> Report:
        """Counts of both."""
        return Report(
            self.read + other.read,
            self.kept + other.kept,
            dict(Counter(self.dropped) + Counter(other.dropped)),
            dict(Counter(self.truncated) + Counter(other.truncated)),
            self.tokens + other.tokens,
            self.escaped + other.escaped,
        )

    @property
    def metrics(self) -> dict[str, float]:
        """The counts as ``data/...`` metrics."""
        counts = {"read": self.read, "kept": self.kept, "dropped": sum(self.dropped.values()), "tokens": self.tokens}
        counts |= {"escaped": self.escaped} if self.escaped else {}
        counts |= {f"dropped_{reason}": count for reason, count in self.dropped.items()}
        counts |= {f"truncated_{part}": count for part, count in self.truncated.items()}
        return {f"data/{name}": float(count) for name, count in counts.items()}

    def describe(self, where: str) -> str:
        """One sentence on the rows of ``where``, with the reason of every row dropped."""
        text = f"{where}: {self.read:,} rows read, {self.kept:,} kept"
        if self.dropped:
            reasons = sorted(self.dropped.items(), key=lambda item: -item[1])
            text += ", dropped: " + ", ".join(f"{count:,} {reason} ({REASONS[reason]})" for reason, count in reasons)
        if self.truncated:
            text += "; truncated: " + ", ".join(f"{count:,} {part}s" for part, count in sorted(self.truncated.items()))
        if self.escaped:
            text += (
                f"; {self.escaped:,} spell control tokens, which stay plain text (rendered: true if a chat template "
                "wrote the data)"
            )
        return text + "."

    def to_dict(self) -> dict[str, Any]:
        """A copy in plain values, to be written down."""
        return asdict(self)

    def restore(self, values: dict[str, Any]) -> None:
        """Take over the counts that `to_dict` gave."""
        vars(self).update(asdict(Report(**values)))


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
