"""What an audit looks for in texts and labels: damage, texts that read the same, preferences that contradict."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from rlhf_lightning.types import Message

DAMAGE = {
    "replacement": ("replacement characters, left by a decoding that failed", "\ufffd"),
    "mojibake": ("UTF-8 that was read as another encoding", "Ã[\x80-\xbf]|Â[\xa0-\xbf]|â€|ï»¿"),
    "control": ("control characters other than tab and line breaks", "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"),
    "invisible": (
        "invisible characters: zero width, direction marks, tags",
        "[\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff\U000e0000-\U000e007f]",
    ),
}
"""Kinds of damage: what each means, and the pattern that finds it."""

_ANY = re.compile("|".join(pattern for _, pattern in DAMAGE.values()))
_EACH = {name: re.compile(pattern) for name, (_, pattern) in DAMAGE.items()}

CONTROL_TOKENS = re.compile(
    r"<\|[a-zA-Z0-9_]{2,40}\|>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>|</?tool_call>"
)
"""Common spellings of control tokens, used without a tokenizer."""

SPEAKERS = re.compile(r"(?:^|\n)\s*(?:Human|Assistant|User|System|AI)\s*:|^### (?:Instruction|Response)", re.MULTILINE)
"""Speaker marks of transcripts; inside a turn they are often a second turn."""


def damage_of(text: str) -> Iterator[str]:
    """Yield the kinds of damage in a text, keys of `DAMAGE`."""
    if _ANY.search(text):
        yield from (name for name, pattern in _EACH.items() if pattern.search(text))


def contents_of(part: str | list[Message] | None) -> list[str]:
    """Return the texts of a prompt or a completion."""
    if part is None:
        return []
    return [part] if isinstance(part, str) else [message["content"] for message in part]


def key_of(texts: Iterable[str]) -> int:
    """Hash texts in their order, 64 bits."""
    digest = hashlib.blake2b(digest_size=8)
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass"))
        digest.update(b"\xff")  # in no UTF-8 text, so that no two lists are written alike
    return int.from_bytes(digest.digest(), "little", signed=True)


def normalised(text: str) -> str:
    """Normalise case, spaces and Unicode form (NFKC), which a reader overlooks."""
    return " ".join((text if text.isascii() else unicodedata.normalize("NFKC", text)).casefold().split())


WHOLE_LISTS = 32
"""Completions of a ranked list up to which all its pairs are compared; of longer ones those of neighbouring ranks."""


class Preferences:
    """Preferences between completions as a directed graph, 32 bytes a pair."""

    def __init__(self) -> None:
        self.prompts, self.better, self.worse, self.rows = array("q"), array("q"), array("q"), array("q")

    def add(self, row: int, prompt: int, completions: Sequence[int], ranks: Sequence[int]) -> None:
        """Add a row's preferences.

        Args:
            row: its number.
            prompt: hash of the prompt.
            completions: hash of each completion.
            ranks: rank of each completion, 0 is best.
        """
        near = len(completions) > WHOLE_LISTS
        for one, rank in zip(completions, ranks, strict=True):
            for other, lower in zip(completions, ranks, strict=True):
                if rank < lower and one != other and (not near or lower == rank + 1):
                    for column, value in zip(
                        (self.prompts, self.better, self.worse, self.rows), (prompt, one, other, row), strict=True
                    ):
                        column.append(value)

    def contradictions(self) -> tuple[list[int], list[int]]:
        """Return rows with a pair that another row judges the other way round, and rows on a longer cycle."""
        if not self.rows:
            return [], []
        prompts, better, worse, rows = (
            np.frombuffer(column, dtype=np.int64) for column in (self.prompts, self.better, self.worse, self.rows)
        )
        ends = np.concatenate([np.stack([prompts, better], 1), np.stack([prompts, worse], 1)])
        nodes = np.unique(ends, axis=0, return_inverse=True)[1].reshape(-1)
        count = int(nodes.max()) + 1
        start, stop = nodes[: len(rows)], nodes[len(rows) :]
        both = np.isin(start * count + stop, stop * count + start)
        graph = coo_array((np.ones(len(rows), dtype=np.int8), (start, stop)), shape=(count, count))
        _, component = connected_components(graph.tocsr(), directed=True, connection="strong")
        circle = (component[start] == component[stop]) & ~both
        return np.unique(rows[both]).tolist(), np.unique(rows[circle]).tolist()
