"""Defects that an audit looks for: damaged text, texts that read the same, and contradictory preferences."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from rlhf_lightning.data.canonical import CanonicalRow
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
"""Kinds of damage: the meaning of each kind, and the pattern that finds it."""

_LINES = str.maketrans("", "", "\t\n\r")
_EACH = {name: re.compile(pattern) for name, (_, pattern) in DAMAGE.items()}

CONTROL_TOKENS = re.compile(
    r"<\|[a-zA-Z0-9_]{2,40}\|>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>|</?tool_call>"
)
"""Common spellings of control tokens, for an audit without a tokenizer."""

_SPEAKERS = re.compile(
    r"^[^\S\n]*(?:Human|Assistant|User|System|AI)[^\S\n]*:|^### (?:Instruction|Response)", re.MULTILINE
)


def damage_of(text: str) -> Iterator[str]:
    """Yield the kinds of damage in a text, keys of `DAMAGE`."""
    if not (text.isascii() and text.translate(_LINES).isprintable()):  # fast path: true of most English texts
        yield from (name for name, pattern in _EACH.items() if pattern.search(text))


def has_speaker(text: str) -> bool:
    """Return whether a text holds a speaker mark of transcripts; inside a turn, it often marks a second turn."""
    return (":" in text or "###" in text) and _SPEAKERS.search(text) is not None


def contents_of(part: str | list[Message] | None) -> list[str]:
    """Return the texts of a prompt or a completion."""
    if part is None:
        return []
    return [part] if isinstance(part, str) else [message["content"] for message in part]


def key_of(texts: Iterable[str]) -> int:
    """Hash a list of texts to 64 bits."""
    digest = hashlib.blake2b(digest_size=8)
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass"))
        digest.update(b"\xff")  # never occurs in UTF-8, so that different lists give different input
    return int.from_bytes(digest.digest(), "little", signed=True)


def normalised(text: str) -> str:
    """Normalise case, spaces and Unicode form (NFKC): differences that a reader overlooks."""
    return " ".join((text if text.isascii() else unicodedata.normalize("NFKC", text)).casefold().split())


def disorder_of(row: CanonicalRow) -> Iterator[str]:
    """Yield the problems with the order of a row's turns, keys of `audit.CHECKS`."""
    if row.prompt is None or isinstance(row.prompt, str):
        return
    turns = row.prompt
    if turns[-1]["role"] == "assistant":
        yield "open_prompt"
    elif turns[-1]["role"] not in ("user", "tool"):
        yield "no_question"
    for said in row.completions or [[]]:
        roles = [turn["role"] for turn in (turns if isinstance(said, str) else [*turns, *said])]
        if any(one == other != "tool" for one, other in zip(roles, roles[1:], strict=False)):
            yield "repeated_role"
        if any(role in ("system", "developer") for role in roles[1:]):
            yield "late_system"


def longer_wins(row: CanonicalRow, lengths: Sequence[int]) -> float | None:
    """Return the share of a preference's pairs in which the longer completion is better; None without such pairs."""
    if row.target == 0.5:
        return None
    ranks = row.ranks[::-1] if row.target < 0.5 else row.ranks
    wins = [
        0.5 * ((one > other) - (one < other)) + 0.5
        for one, rank in zip(lengths, ranks, strict=True)
        for other, lower in zip(lengths, ranks, strict=True)
        if rank < lower
    ]
    return sum(wins) / len(wins) if wins else None


WHOLE_LISTS = 32
"""Maximum completions of a ranked list to compare all pairs; in a longer list only neighbouring ranks are compared."""


class Preferences:
    """Preferences between completions as a directed graph; takes 32 bytes per pair."""

    def __init__(self) -> None:
        self.prompts, self.better, self.worse, self.rows = array("q"), array("q"), array("q"), array("q")

    def add(self, row: int, prompt: int, completions: Sequence[int], ranks: Sequence[int]) -> None:
        """Add a row's preferences, given hashes of prompt and completions and the rank of each completion (0 is
        best).
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
        """Return rows with a pair that another row judges the opposite way, and rows on a longer preference cycle."""
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


HASHES, BANDS = 128, 16
"""Length of a MinHash signature, and its number of bands. Rows that agree in all numbers of a band are compared.

A band has 8 numbers. Rows of Jaccard similarity 0.8 are compared with probability 0.95, of 0.9 with 0.9999.
"""

SHINGLE = 5
"""Words per shingle; MinHash compares sets of shingles."""


class SimilarTexts:
    """Finds texts that share most of their shingles with an earlier text, by MinHash (Broder, 1997); 0.7 KB per text.

    Args:
        least: minimum Jaccard similarity of the shingle sets of similar texts, as estimated from their signatures
            (standard deviation 0.035 at 0.8).
    """

    def __init__(self, least: float) -> None:
        self.least = least
        lot = np.random.default_rng(0)
        self.factors = lot.integers(0, 2**63, HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self.shifts = lot.integers(0, 2**63, HASHES, dtype=np.uint64)
        self.signatures: list[np.ndarray] = []
        self.numbers: list[int] = []
        self.bands: dict[tuple[int, bytes], int] = {}

    def signature(self, text: str) -> np.ndarray:
        """Return the MinHash signature of a normalised text, uint32, shape (HASHES,)."""
        words = text.split()
        shingles = {" ".join(words[place : place + SHINGLE]) for place in range(max(len(words) - SHINGLE + 1, 1))}
        keys = np.array([key_of([shingle]) for shingle in sorted(shingles)], dtype=np.int64).view(np.uint64)
        return ((keys[:, None] * self.factors + self.shifts) >> np.uint64(32)).min(0).astype(np.uint32)

    def first_like(self, text: str) -> int | None:
        """Return the number of the earliest similar text, or None."""
        signature = self.signature(text)
        places = {self.bands[key] for key in self._keys(signature) if key in self.bands}
        for place in sorted(places):
            if (self.signatures[place] == signature).mean() >= self.least:
                return self.numbers[place]
        return None

    def add(self, text: str, number: int) -> None:
        """Store a text under its number."""
        signature = self.signature(text)
        for key in self._keys(signature):
            self.bands.setdefault(key, len(self.signatures))
        self.signatures.append(signature)
        self.numbers.append(number)

    def _keys(self, signature: np.ndarray) -> list[tuple[int, bytes]]:
        return [(band, part.tobytes()) for band, part in enumerate(signature.reshape(BANDS, -1))]


class NGrams:
    """The word n-grams of texts, as hashes of 8 bytes each.

    Args:
        n: words per n-gram; 13 in the search for test questions by Brown et al. (2020).
    """

    def __init__(self, n: int) -> None:
        self.n, self.kept, self.sorted = n, array("q"), np.empty(0, dtype=np.int64)

    def add(self, text: str) -> None:
        """Store the n-grams of a normalised text."""
        self.kept.extend(self._keys(text))

    def share(self, text: str) -> float:
        """Return the share of a text's n-grams that are stored; 0 for a text of fewer than n words."""
        keys = np.array(self._keys(text), dtype=np.int64)
        if len(self.kept):
            self.sorted = np.unique(np.concatenate([self.sorted, np.frombuffer(self.kept, dtype=np.int64)]))
            self.kept = array("q")
        if not len(keys) or not len(self.sorted):
            return 0.0
        places = np.searchsorted(self.sorted, keys).clip(max=len(self.sorted) - 1)
        return float((self.sorted[places] == keys).mean())

    def _keys(self, text: str) -> list[int]:
        words = text.split()
        return [key_of(words[place : place + self.n]) for place in range(len(words) - self.n + 1)]
