"""What the store holds, as typed records: items, judgements, and what an annotator is asked."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from rlhf_lightning.errors import DataError, RlhfError
from rlhf_lightning.types import Message, Prompt

Verdict = Literal["ranking", "tie", "both_bad", "skip"]

STRENGTHS = 4
"""Levels of how much better a completion is: 1 hardly, 2 slightly, 3 clearly, 4 far better."""

LONGEST_TEXT = 100_000
"""Characters of an edited completion."""

MOST_CANDIDATES = 9
"""Completions of an item: each has a digit on the keyboard."""


class JudgementRefused(RlhfError, ValueError):
    """A judgement that cannot be what the annotator meant; the message says why."""


class Conflict(RlhfError, ValueError):
    """A judgement of something that has been judged already."""


class NotAsked(RlhfError, ValueError):
    """A judgement of something that was never asked: a page that was left open shows another store's."""


@dataclass(frozen=True)
class Candidate:
    """A completion to be judged, and where it comes from.

    Attributes:
        completion: plain text or messages.
        model: folder or name of the model that wrote it; None where nobody knows.
        sampling: settings it was sampled with.
        seed: seed of the sampling.
        episode: number of the episode under that seed.
    """

    completion: str | list[Message]
    model: str | None = None
    sampling: dict[str, Any] | None = None
    seed: int | None = None
    episode: int | None = None

    @property
    def text(self) -> str:
        """The completion as one text: the content of its turns."""
        if isinstance(self.completion, str):
            return self.completion
        return "\n\n".join(turn["content"] for turn in self.completion)


@dataclass(frozen=True)
class Item:
    """A prompt with the completions to be compared.

    Attributes:
        prompt: plain text or messages.
        candidates: two or more.
        columns: further columns of the prompt's row.
        id: number in the store, 0 before it is there.
    """

    prompt: Prompt
    candidates: tuple[Candidate, ...]
    columns: dict[str, Any] = field(default_factory=dict)
    id: int = 0

    def __post_init__(self) -> None:
        if not 2 <= len(self.candidates) <= MOST_CANDIDATES:
            raise DataError(
                "number-of-completions",
                f"an item has {len(self.candidates)} completions; 2 to {MOST_CANDIDATES} can be compared",
            )

    @property
    def key(self) -> str:
        """Hash of prompt and completions: the same comparison is in a store once."""
        return digest([self.prompt, [candidate.completion for candidate in self.candidates]])


@dataclass(frozen=True)
class Answer:
    """What an annotator says about an item, completions numbered as they were shown.

    Attributes:
        verdict: ``ranking`` by ``ranks``; ``tie``: equally good; ``both_bad``: all are bad; ``skip``: cannot say.
        ranks: for a ranking, the rank of each completion as shown, 0 is best, equal ranks are ties.
        strength: how much better the chosen one of two is, 1 to `STRENGTHS`; None where it was not said.
        reasons: what decided.
        flags: what is wrong with the item.
        edited: a completion as it should have been; None without one.
        edited_place: which of the completions, as shown, was edited.
        seconds: time spent, seconds.
    """

    verdict: Verdict
    ranks: tuple[int, ...] | None = None
    strength: int | None = None
    reasons: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    edited: str | None = None
    edited_place: int | None = None
    seconds: float = 0.0

    def check(self, count: int) -> None:
        """Raise `JudgementRefused` unless it is an answer about ``count`` completions."""
        if self.verdict not in get_args(Verdict):
            raise JudgementRefused(
                "unknown-verdict",
                f"the verdict {self.verdict!r} is unknown; choose one of {', '.join(get_args(Verdict))}",
            )
        if (self.verdict == "ranking") != (self.ranks is not None):
            raise JudgementRefused("ranks-without-ranking", "ranks go with the verdict ranking, and with no other")
        if self.ranks is not None:
            levels = sorted(set(self.ranks))
            if len(self.ranks) != count or levels != list(range(len(levels))):
                raise JudgementRefused(
                    "invalid-ranks",
                    f"the ranks are invalid; give one for each of {count} completions, counted from 0 without gaps",
                )
            if len(levels) < 2:
                raise JudgementRefused("all-ranks-equal", "all ranks are equal; use the verdict tie")
        if self.strength is not None and (self.verdict != "ranking" or count > 2):
            raise JudgementRefused(
                "strength-without-choice", "a strength goes with the choice between two completions only"
            )
        if self.strength is not None and not 1 <= self.strength <= STRENGTHS:
            raise JudgementRefused(
                "invalid-strength", f"the strength is {self.strength}: it must be between 1 and {STRENGTHS}"
            )
        if (self.edited is None) != (self.edited_place is None):
            raise JudgementRefused(
                "edit-without-place", "an edited completion needs its place, and a place needs its completion"
            )
        if self.edited is not None and not self.edited.strip():
            raise JudgementRefused("empty-edit", "the edited completion is empty")
        if self.edited is not None and len(self.edited) > LONGEST_TEXT:
            raise JudgementRefused("edit-too-long", f"the edited completion has more than {LONGEST_TEXT:,} characters")
        if self.edited_place is not None and not 0 <= self.edited_place < count:
            raise JudgementRefused(
                "invalid-place", f"the edited place is {self.edited_place}: it must be between 0 and {count - 1}"
            )
        if not (math.isfinite(self.seconds) and 0 <= self.seconds <= 1e6):
            raise JudgementRefused(
                "invalid-seconds", f"the seconds spent are {self.seconds}: they must be between 0 and 1,000,000"
            )


@dataclass(frozen=True)
class StoredJudgement:
    """A judgement as the store keeps it, completions numbered as the item has them.

    Attributes:
        id: row number; rows are never changed and never go.
        annotator: who judged.
        item: number of the item.
        repeat: whether the annotator had judged the item before: a measure of consistency, no label.
        shown: the completions in the order in which they were shown.
        verdict, strength, reasons, flags, edited, seconds: as in `Answer`.
        ranks: rank of each completion.
        edited_place: the completion that was edited.
        judged: when, ISO 8601, UTC.
    """

    id: int
    annotator: str
    item: int
    repeat: bool
    shown: tuple[int, ...]
    verdict: Verdict
    ranks: tuple[int, ...] | None
    strength: int | None
    reasons: tuple[str, ...]
    flags: tuple[str, ...]
    edited: str | None
    edited_place: int | None
    seconds: float
    judged: str

    @property
    def picked_left(self) -> bool | None:
        """Whether the first of two completions shown was chosen; None where neither was, or there were more."""
        if self.ranks is None or len(self.shown) != 2:
            return None
        return self.ranks[self.shown[0]] < self.ranks[self.shown[1]]


class Assignment(NamedTuple):
    """What an annotator is asked.

    Attributes:
        id: number in the store.
        item: what is to be judged.
        shown: the item's completions in the order in which they are shown.
        repeat: whether the annotator has judged it before.
    """

    id: int
    item: Item
    shown: tuple[int, ...]
    repeat: bool


class Snapshot(NamedTuple):
    """All judgements up to one.

    Attributes:
        upto: row number of the last; 0 where there is none.
        fingerprint: hash of these judgements and of what they judge.
    """

    upto: int
    fingerprint: str


def digest(value: Any) -> str:
    """Hash of a plain value."""
    return hashlib.blake2b(encoded(value).encode(), digest_size=16).hexdigest()


def encoded(value: Any) -> str:
    """JSON of a plain value, one spelling for each."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def in_item_order(ranks: Sequence[int], shown: Sequence[int]) -> tuple[int, ...]:
    """Ranks of completions as the item has them, from ranks in the order in which they were shown."""
    found = [0] * len(shown)
    for place, rank in zip(shown, ranks, strict=True):
        found[place] = rank
    return tuple(found)
