"""What became of the rows that were read: nothing is lost without a count and a reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from rlhf_lightning.data.canonical import REASONS


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
