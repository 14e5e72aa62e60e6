"""Audit a data set: rows that training would drop or truncate, duplicates, leaks, contradictions, damaged text.

Rows are read once and not kept. What is kept of a row is a few 64-bit hashes, its lengths, and its number where
something was found. Rows are numbered from 1 in the order of the source.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.data.canonical import REASONS, CanonicalRow, Row, RowRefused
from rlhf_lightning.data.defects import (
    CONTROL_TOKENS,
    DAMAGE,
    SPEAKERS,
    NGrams,
    Preferences,
    SimilarTexts,
    contents_of,
    damage_of,
    key_of,
    normalised,
)
from rlhf_lightning.data.files import Unreadable
from rlhf_lightning.data.formats import read_row
from rlhf_lightning.data.tokenizing import CHUNK, EncodedRow, Outcome, encoder_for
from rlhf_lightning.functional.statistics import wilson_interval
from rlhf_lightning.tokenization import truncate

CHECKS = {
    "duplicate": "repeats an earlier row",
    "near_duplicate": "repeats an earlier row but for case, spaces or Unicode form",
    "similar": "shares most groups of 5 words with an earlier row (MinHash)",
    "near_identical": "completions of different rank differ in case, spaces or Unicode form alone",
    "both_ways": "another row judges the same completions the other way round",
    "circle": "lies on a circle of preferences (a over b, b over c, c over a)",
    "open_prompt": "the prompt ends with an assistant's turn, which the completion continues",
    "no_question": "the prompt ends with a turn that is neither the user's nor a tool's",
    "repeated_role": "two turns of the same role follow each other",
    "late_system": "a system turn that is not the first",
    "second_speaker": "a turn holds the mark of a speaker, such as 'Human:'",
    "control_token": "the text spells a control token, which is encoded as plain characters",
    "boundary_mismatch": "the tokenizer would encode prompt and completion otherwise together",
    "turns_apart": "the chat template rewrites earlier turns, so each learned turn becomes a row",
    "last_turn": "of several turns of the assistant only the last is learned",
    "turns_cut": "more than 256 turns would be learned; the later turns are left out",
    **{name: meaning for name, (meaning, _) in DAMAGE.items()},
    "prompt_cut": "the prompt loses tokens",
    "completion_cut": "a completion loses tokens, and with them its end",
    "prompt_crowds_out": "a completion shorter than half of max_length is cut, because the prompt takes the room",
    "leaked_row": "the whole row is in the training data",
    "leaked_prompt": "the prompt is in the training data",
    "leaked_similar": "shares most groups of 5 words with a row of the training data (MinHash)",
    "overlap": "shares a run of words with the training data (n-grams)",
    "longer_wins": "the longer completion is mostly the better one",
    "shorter_wins": "the shorter completion is mostly the better one",
}
"""Meaning of each check. Reasons to drop a row (`canonical.REASONS`) are checks, too."""

Keys = tuple[int | None, int]

SHORTCUT = 0.55
"""Length is a shortcut if the whole interval of its accuracy is above this, or below 1 minus this."""


@dataclass
class Finding:
    """Rows found by one check.

    Attributes:
        check: key of `CHECKS` or of `canonical.REASONS`.
        rows: numbers of the rows; none where the finding is of all rows together.
        first: for each of them, the earlier row that it repeats.
    """

    check: str
    rows: list[int] = field(default_factory=list)
    first: list[int] = field(default_factory=list)

    @property
    def meaning(self) -> str:
        """Meaning of the check."""
        return CHECKS.get(self.check) or REASONS[self.check]


@dataclass(frozen=True)
class LengthShortcut:
    """How often the longer of two completions is the better one.

    Attributes:
        accuracy: share of rows, a ranked list counting as the mean of its pairs; equal lengths are half right.
        low: lower end of the 95 % interval (Wilson).
        high: upper end.
        rows: rows with a preference.
    """

    accuracy: float
    low: float
    high: float
    rows: int


class Audit:
    """Collects findings over rows.

    Args:
        kind: key of `formats.KINDS`.
        columns: new name of each column to be renamed.
        as_chat: whether plain text becomes a user's and an assistant's turn.
        tokenizer: the policy's; None skips the checks that need tokens.
        max_length: most tokens of prompt and completion; None for no bound.
        max_prompt_length: most tokens of the prompt.
        similar: Jaccard similarity from which rows are similar, see `defects.SimilarTexts`; None looks for none.
        overlap: words of the runs that evaluation and training data should not share; None looks for none.
    """

    def __init__(
        self, kind: str, columns: dict[str, str] | None = None, as_chat: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None, max_length: int | None = None,
        max_prompt_length: int | None = None, similar: float | None = None, overlap: int | None = None,
    ) -> None:  # fmt: skip
        self.kind, self.columns, self.as_chat, self.tokenizer = kind, columns or {}, as_chat, tokenizer
        self.max_length, self.max_prompt_length = max_length, max_prompt_length
        self.encoder = encoder_for(kind, columns=self.columns, as_chat=as_chat)
        self.unused: Counter[str] = Counter()
        self.read = 0
        self.found: dict[str, Finding] = {}
        self.exact: dict[int, int] = {}
        self.loose: dict[int, int] = {}
        self.prompts: dict[int, int] = {}
        self.repeated_prompts = 0
        self.judged: dict[tuple[int, int], tuple[int, int]] = {}
        self.preferences = Preferences()
        self.similar = None if similar is None else SimilarTexts(similar)
        self.ngrams = None if overlap is None else NGrams(overlap)
        self.train: Audit | None = None
        self.longer_wins = array("f")
        self.lengths = array("q")

    def add(self, rows: Iterable[Row | Unreadable]) -> Iterator[Keys | None]:
        """Check rows.

        Yields:
            for each row the normalised hashes of its prompt (None for a whole text) and of the whole row; None for a
            row that cannot be used.
        """
        rows = iter(rows)
        while chunk := list(islice(rows, CHUNK)):
            tokenizer = self.tokenizer
            outcomes = map(self._read, chunk) if tokenizer is None else self.encoder.outcomes(tokenizer, chunk)
            yield from map(self._take_in, outcomes)

    def _read(self, row: Row | Unreadable) -> Outcome:
        try:
            read = read_row(row, self.encoder.read, self.as_chat, self.columns)
            return Outcome(read, unused=self.encoder.unused_of(read))
        except RowRefused as refusal:
            return Outcome(reason=refusal.code)

    def _take_in(self, outcome: Outcome) -> Keys | None:
        self.read += 1
        row = outcome.row
        if row is None:
            self._find(str(outcome.reason))
            return None
        self.unused.update(outcome.unused)
        for check, found in (
            ("control_token", outcome.escaped),
            ("boundary_mismatch", outcome.merged),
            ("turns_apart", outcome.split),
            ("last_turn", outcome.last_turn),
            ("turns_cut", outcome.turns_cut),
        ):
            if found:
                self._find(check)
        self._check_texts(row)
        self._check_turns(row)
        said = [key_of(map(normalised, contents_of(one))) for one in row.completions]
        asked = None if row.prompt is None else key_of(map(normalised, contents_of(row.prompt)))
        loose = hash((asked, *said, *row.ranks))
        repeats = self._check_duplicates(row, loose)
        if self.similar is not None or self.ngrams is not None:
            self._check_similar(row, loose, repeats)
        if asked is not None:
            self.repeated_prompts += asked in self.prompts
            self.prompts.setdefault(asked, self.read)
            self._check_judgements(row, asked, said)
        self._measure(row, max(outcome.encoded, key=_length, default=None))  # of learned turns, the longest row
        return asked, loose

    def compare(self, rows: Iterable[Row | Unreadable], train: Audit) -> None:
        """Check rows, and look for each in the training data."""
        self.train = train
        for keys in self.add(rows):
            if keys is None:
                continue
            asked, loose = keys
            if loose in train.loose:
                self._find("leaked_row")
            elif asked in train.prompts:
                self._find("leaked_prompt")

    def findings(self) -> list[Finding]:
        """Return the findings, in the order of `canonical.REASONS` and `CHECKS`."""
        both, circle = self.preferences.contradictions()
        for check, rows in (("both_ways", both), ("circle", circle)):
            if rows:
                known = self.found.get(check, Finding(check)).rows
                self.found[check] = Finding(check, sorted({*known, *rows}))
        shortcut = self.length_shortcut()
        for check, decides in (
            ("longer_wins", shortcut is not None and shortcut.low > SHORTCUT),
            ("shorter_wins", shortcut is not None and shortcut.high < 1 - SHORTCUT),
        ):
            if decides:
                self.found[check] = Finding(check)
        return [self.found[check] for check in (*REASONS, *CHECKS) if check in self.found]

    @property
    def usable(self) -> int:
        """Rows that training would keep."""
        return self.read - sum(len(found.rows) for check, found in self.found.items() if check in REASONS)

    def length_shortcut(self) -> LengthShortcut | None:
        """Return how often the longer completion is the better one; None without preferences."""
        if not self.longer_wins:
            return None
        accuracy = float(np.frombuffer(self.longer_wins, dtype=np.float32).mean())
        low, high = wilson_interval(accuracy, len(self.longer_wins))
        return LengthShortcut(accuracy, float(low), float(high), len(self.longer_wins))

    def quantiles(self, shares: Iterable[float] = (0.5, 0.95, 1.0)) -> list[int]:
        """Return quantiles of prompt plus longest completion, in tokens with a tokenizer, else in characters."""
        if not self.lengths:
            return []
        return np.quantile(np.frombuffer(self.lengths, dtype=np.int64), list(shares), method="higher").tolist()

    def _find(self, check: str, first: int | None = None) -> None:
        found = self.found.setdefault(check, Finding(check))
        if not found.rows or found.rows[-1] != self.read:
            found.rows.append(self.read)
            found.first += [] if first is None else [first]

    def _check_texts(self, row: CanonicalRow) -> None:
        for part in (row.prompt, *row.completions):
            for text in contents_of(part):
                for name in damage_of(text):
                    self._find(name)
                if self.tokenizer is None and CONTROL_TOKENS.search(text):
                    self._find("control_token")
                if not isinstance(part, str) and SPEAKERS.search(text):
                    self._find("second_speaker")

    def _check_turns(self, row: CanonicalRow) -> None:
        if row.prompt is None or isinstance(row.prompt, str):
            return
        turns = row.prompt
        if turns[-1]["role"] == "assistant":
            self._find("open_prompt")
        elif turns[-1]["role"] not in ("user", "tool"):
            self._find("no_question")
        for said in row.completions or [[]]:
            roles = [turn["role"] for turn in (turns if isinstance(said, str) else [*turns, *said])]
            if any(one == other != "tool" for one, other in zip(roles, roles[1:], strict=False)):
                self._find("repeated_role")
            if any(role in ("system", "developer") for role in roles[1:]):
                self._find("late_system")

    def _check_similar(self, row: CanonicalRow, loose: int, repeats: bool) -> None:
        """Look for a similar row before this one and in the training data, unless it is known to repeat one."""
        text = " ".join(normalised(one) for part in (row.prompt, *row.completions) for one in contents_of(part))
        train = self.train
        known = train is not None and loose in train.loose
        if train is not None and train.similar is not None and not known and train.similar.first_like(text):
            self._find("leaked_similar")
        if train is not None and train.ngrams is not None and train.ngrams.share(text) > 0:
            self._find("overlap")
        if self.similar is not None and not repeats:
            if (first := self.similar.first_like(text)) is not None:
                self._find("similar", first)
            self.similar.add(text, self.read)
        if train is None and self.ngrams is not None:
            self.ngrams.add(text)

    def _check_duplicates(self, row: CanonicalRow, loose: int) -> bool:
        """Look for an earlier row that this one repeats; return whether there is one."""
        parts = [row.prompt, *row.completions]
        labels = [str((row.ranks, row.target, row.columns.get("labels") if self.kind == "process" else None))]
        exact = key_of([*("\0".join(contents_of(part)) for part in parts), *labels])
        if exact in self.exact:
            self._find("duplicate", self.exact[exact])
        elif loose in self.loose:
            self._find("near_duplicate", self.loose[loose])
        repeats = exact in self.exact or loose in self.loose
        self.exact.setdefault(exact, self.read)
        self.loose.setdefault(loose, self.read)
        return repeats

    def _check_judgements(self, row: CanonicalRow, asked: int, keys: list[int]) -> None:
        if self.kind == "preference":
            if any(
                one == other and rank != lower
                for place, (one, rank) in enumerate(zip(keys, row.ranks, strict=True))
                for other, lower in zip(keys[:place], row.ranks[:place], strict=True)
            ):
                self._find("near_identical")
            ranks = row.ranks[::-1] if row.target < 0.5 else row.ranks
            if row.target != 0.5:
                self.preferences.add(self.read, asked, keys, ranks)
        elif self.kind == "unpaired":
            rank, first = self.judged.setdefault((asked, keys[0]), (row.ranks[0], self.read))
            if rank != row.ranks[0]:
                self._find("both_ways")
                known = self.found["both_ways"]
                known.rows = sorted({*known.rows, first})

    def _measure(self, row: CanonicalRow, encoded: EncodedRow | None) -> None:
        if encoded is not None:
            asked, said = len(encoded.prompt), [len(ids) for ids in encoded.completions]
            self._check_cuts(encoded)
        else:
            asked = sum(map(len, contents_of(row.prompt)))
            said = [sum(map(len, contents_of(one))) for one in row.completions]
        self.lengths.append(asked + max(said, default=0))
        if self.kind != "preference" or row.target == 0.5:
            return
        ranks = row.ranks[::-1] if row.target < 0.5 else row.ranks
        wins = [
            0.5 * ((one > other) - (one < other)) + 0.5
            for one, rank in zip(said, ranks, strict=True)
            for other, lower in zip(said, ranks, strict=True)
            if rank < lower
        ]
        if wins:
            self.longer_wins.append(sum(wins) / len(wins))

    def _check_cuts(self, row: EncodedRow) -> None:
        if self.max_length is None and self.max_prompt_length is None:
            return
        limit, most = self.max_length, self.max_prompt_length
        if self.kind == "prompt":
            limit, most = None, most or limit
        prompt, completions = truncate(row.prompt, row.completions, limit, most)
        if len(prompt) < len(row.prompt):
            self._find("prompt_cut")
        for cut, whole in zip(completions, row.completions, strict=True):
            if len(cut) < len(whole):
                self._find("completion_cut")
                if limit is not None and len(whole) <= limit // 2:
                    self._find("prompt_crowds_out")


def _length(row: EncodedRow) -> int:
    return len(row.prompt) + max(map(len, row.completions), default=0)


def summary(audit: Audit, source: str) -> dict[str, Any]:
    """Return all findings of an audit in plain values, with the numbers of all rows."""
    shortcut = audit.length_shortcut()
    return {
        "source": source,
        "kind": audit.kind,
        "read": audit.read,
        "usable": audit.usable,
        "distinct_prompts": len(audit.prompts),
        "unit": "characters" if audit.tokenizer is None else "tokens",
        "lengths": dict(zip(("median", "95%", "longest"), audit.quantiles(), strict=False)),
        "unused": dict(audit.unused),
        "length_shortcut": None if shortcut is None else vars(shortcut),
        "findings": [
            {"check": one.check, "meaning": one.meaning, "count": len(one.rows), "rows": one.rows, "first": one.first}
            for one in audit.findings()
        ],
    }
