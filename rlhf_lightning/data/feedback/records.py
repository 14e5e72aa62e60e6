"""Typed records of the feedback store: items, answers, judgements, assignments, snapshots."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from rlhf_lightning.errors import DataError, RlhfError
from rlhf_lightning.types import Message, Prompt

Verdict = Literal["ranking", "tie", "both_bad", "skip"]

STRENGTHS = 4
"""Levels of preference strength."""

STRENGTH_WORDS = {1: "barely better", 2: "slightly better", 3: "clearly better", 4: "much better"}
"""Names of the strength levels on the annotation page."""

LONGEST_TEXT = 100_000
"""Maximum characters of an edited completion."""

LONGEST_SECONDS = 1_000_000
"""Maximum duration of a judgement, seconds."""

MOST_CANDIDATES = 9
"""Maximum completions of an item: each has a digit key on the page."""


class JudgementRefused(RlhfError, ValueError):
    """A judgement that is malformed or inconsistent."""


class Conflict(RlhfError, ValueError):
    """A second judgement of an assignment that has already been judged."""


class NotAsked(RlhfError, ValueError):
    """A judgement of an assignment that this annotator was never given, such as from a page of another store."""


def text_of(completion: str | list[Message]) -> str:
    """Return a completion as one text: the contents of its turns."""
    return completion if isinstance(completion, str) else "\n\n".join(turn["content"] for turn in completion)


@dataclass(frozen=True)
class Candidate:
    """A completion to be judged, with its provenance.

    Attributes:
        completion: plain text or messages.
        model: folder or name of the model that wrote it; None if unknown.
        sampling: sampling settings.
        seed: sampling seed.
        episode: episode number under that seed.
    """

    completion: str | list[Message]
    model: str | None = None
    sampling: dict[str, Any] | None = None
    seed: int | None = None
    episode: int | None = None

    @property
    def text(self) -> str:
        """The completion as one text."""
        return text_of(self.completion)


@dataclass(frozen=True)
class Item:
    """A prompt and the completions to be compared.

    Attributes:
        prompt: plain text or messages.
        candidates: two or more completions.
        columns: other columns of the prompt's row.
        id: number in the store; 0 before it is added.
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
        """Hash of prompt and completions; a store holds each key once."""
        return digest([self.prompt, [candidate.completion for candidate in self.candidates]])


@dataclass(frozen=True)
class Answer:
    """An annotator's answer about an item, with completions numbered as shown.

    Attributes:
        verdict: ``ranking`` (by ``ranks``), ``tie``, ``both_bad`` (all are bad) or ``skip`` (no opinion).
        ranks: rank of each completion as shown; 0 is best, equal ranks are ties.
        strength: how much better the preferred of two completions is, 1 to `STRENGTHS`; None if not rated.
        reasons: reasons for the choice.
        flags: problems of the item.
        edited: a corrected completion written by the annotator, or None.
        edited_place: index of the edited completion, as shown.
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
        """Raise `JudgementRefused` unless this is a valid answer about ``count`` completions."""
        if self.verdict not in get_args(Verdict):
            raise JudgementRefused(
                "unknown-verdict",
                f"the verdict {self.verdict!r} is unknown; choose one of {', '.join(get_args(Verdict))}",
            )
        if (self.verdict == "ranking") != (self.ranks is not None):
            raise JudgementRefused("ranks-without-ranking", "ranks are allowed only with the verdict ranking")
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
                "strength-without-choice", "a strength is allowed only for a choice between two completions"
            )
        if self.strength is not None and not 1 <= self.strength <= STRENGTHS:
            raise JudgementRefused(
                "invalid-strength", f"the strength is {self.strength}: it must be between 1 and {STRENGTHS}"
            )
        if (self.edited is None) != (self.edited_place is None):
            raise JudgementRefused("edit-without-place", "an edited completion and its position must be given together")
        if self.edited is not None and not self.edited.strip():
            raise JudgementRefused("empty-edit", "the edited completion is empty")
        if self.edited is not None and len(self.edited) > LONGEST_TEXT:
            raise JudgementRefused("edit-too-long", f"the edited completion has more than {LONGEST_TEXT:,} characters")
        if self.edited_place is not None and not 0 <= self.edited_place < count:
            raise JudgementRefused(
                "invalid-place", f"the edited place is {self.edited_place}: it must be between 0 and {count - 1}"
            )
        if not 0 <= self.seconds <= LONGEST_SECONDS:
            raise JudgementRefused(
                "invalid-seconds", f"the seconds spent are {self.seconds}: they must be from 0 to {LONGEST_SECONDS:,}"
            )


@dataclass(frozen=True)
class StoredJudgement:
    """A judgement as stored, with completions numbered as in the item.

    Attributes:
        id: row number; rows are never changed or deleted.
        annotator: name of the annotator.
        item: item number.
        repeat: whether this is a hidden repeat, which measures consistency and is not a label.
        shown: indices of the completions in the order shown.
        verdict, strength, reasons, flags, edited, seconds: as in `Answer`.
        ranks: rank of each completion.
        edited_place: index of the edited completion.
        judged: time of the judgement, ISO 8601, UTC.
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
        """Whether the annotator chose the left of two completions; None for ties and longer lists."""
        if self.ranks is None or len(self.shown) != 2:
            return None
        return self.ranks[self.shown[0]] < self.ranks[self.shown[1]]


class Assignment(NamedTuple):
    """An item given to an annotator.

    Attributes:
        id: number in the store.
        item: the item to judge.
        shown: indices of the item's completions in the order shown.
        repeat: whether the annotator has judged the item before.
    """

    id: int
    item: Item
    shown: tuple[int, ...]
    repeat: bool


class Snapshot(NamedTuple):
    """The state of a store at one row of its judgements.

    Attributes:
        upto: row number of the last judgement; 0 if there is none.
        fingerprint: hash of the judgements and of the items they judge.
    """

    upto: int
    fingerprint: str


def digest(value: Any) -> str:
    """Hash a plain value."""
    return hashlib.blake2b(encoded(value).encode(), digest_size=16).hexdigest()


def encoded(value: Any) -> str:
    """Encode a plain value as canonical JSON."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def in_item_order(ranks: Sequence[int], shown: Sequence[int]) -> tuple[int, ...]:
    """Reorder ranks from the order shown to the order of the item."""
    by_place = dict(zip(shown, ranks, strict=True))
    return tuple(by_place[place] for place in range(len(shown)))
