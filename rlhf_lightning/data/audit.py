"""Audit a data set: rows that training would drop or truncate, duplicates, leaks, contradictions, damaged text.

Rows are read once and not stored. For each row the audit keeps a few 64-bit hashes, its lengths, and its number if
something was found. Rows are numbered from 1 in source order.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.data.canonical import REASONS, CanonicalRow, Row, RowRefused
from rlhf_lightning.data.defects import (
    CONTROL_TOKENS,
    DAMAGE,
    NGrams,
    Preferences,
    SimilarTexts,
    contents_of,
    damage_of,
    disorder_of,
    has_speaker,
    key_of,
    longer_wins,
    normalised,
)
from rlhf_lightning.data.files import Unreadable
from rlhf_lightning.data.formats import read_row
from rlhf_lightning.data.tokenizing import CHUNK, EncodedRow, Outcome, encoder_for
from rlhf_lightning.functional.statistics import wilson_interval
from rlhf_lightning.tokenization import truncate
from rlhf_lightning.workers import in_forks

CHECKS = {
    "duplicate": "repeats an earlier row",
    "near_duplicate": "repeats an earlier row up to case, spaces or Unicode form",
    "similar": "shares most groups of 5 words with an earlier row (MinHash)",
    "near_identical": "completions of different rank differ only in case, spaces or Unicode form",
    "both_ways": "another row gives the opposite preference for the same completions",
    "circle": "is part of a preference cycle (a over b, b over c, c over a)",
    "open_prompt": "the prompt ends with an assistant's turn, which the completion continues",
    "no_question": "the last turn of the prompt is from neither the user nor a tool",
    "repeated_role": "two turns of the same role follow each other",
    "late_system": "a system turn that is not the first",
    "second_speaker": "a turn contains a speaker label, such as 'Human:'",
    "control_token": "the text spells a control token, which is encoded as plain characters",
    "boundary_mismatch": "the tokenizer would encode prompt and completion differently as one text",
    "unknown_token": "the texts or the chat template contain tokens unknown to the tokenizer",
    "turns_apart": "the chat template rewrites earlier turns, so each trained turn becomes a row",
    "last_turn": "of several assistant turns only the last is trained on",
    "turns_cut": "more than 256 turns would be trained on; the later turns are left out",
    **{name: meaning for name, (meaning, _) in DAMAGE.items()},
    "prompt_cut": "the prompt is truncated",
    "completion_cut": "a completion is truncated and loses its end",
    "prompt_crowds_out": "a completion shorter than half of max_length is truncated, because the prompt is long",
    "leaked_row": "the whole row is in the training data",
    "leaked_prompt": "the prompt is in the training data",
    "leaked_similar": "shares most groups of 5 words with a row of the training data (MinHash)",
    "overlap": "shares a word n-gram with the training data",
    "longer_wins": "the longer completion is usually the preferred one",
    "shorter_wins": "the shorter completion is usually the preferred one",
}
"""Meaning of each check. Reasons to drop a row (`canonical.REASONS`) are checks, too."""

Keys = tuple[int | None, int]


class RowFacts(NamedTuple):
    """Facts about one row that the audit uses.

    Attributes:
        checks: findings in the row alone: keys of `CHECKS`, or the key of `canonical.REASONS` to drop the row.
        unused: columns and keys of turns that are not used.
        asked: hash of the normalised prompt; None for a whole text.
        said: hash of each normalised completion; None if the row cannot be used.
        ranks: rank of each completion, 0 is best; reversed if the second is more probably the better one.
        target: as in `CanonicalRow`.
        exact: hash of the unmodified texts and labels.
        loose: hash of normalised texts and ranks.
        length: length of the prompt plus the longest completion, in tokens with a tokenizer, else in characters.
        tokens, unknown: tokens of all its texts, and unknown tokens; 0 without a tokenizer.
        longer_wins: share of its pairs in which the longer completion is the better one.
        text: the normalised texts, if similar texts or n-grams are searched.
    """

    checks: tuple[str, ...]
    unused: tuple[str, ...] = ()
    asked: int | None = None
    said: Sequence[int] | None = None
    ranks: Sequence[int] = ()
    target: float = 1.0
    exact: int = 0
    loose: int = 0
    length: int = 0
    tokens: int = 0
    unknown: int = 0
    longer_wins: float | None = None
    text: str | None = None


SHORTCUT = 0.55
"""Length is reported as a shortcut if the interval of its accuracy lies above this value, or below 1 - this value."""


@dataclass
class Finding:
    """Rows found by one check.

    Attributes:
        check: key of `CHECKS` or of `canonical.REASONS`.
        rows: numbers of the rows; empty if the finding concerns all rows together.
        first: for each of these rows, the earlier row that it repeats.
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
    """Share of preferences in which the longer completion is the better one.

    Attributes:
        accuracy: share of rows; a ranked list counts as the mean of its pairs, equal lengths count as half right.
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
        columns: mapping from names of columns to their new names.
        as_chat: whether plain text becomes a user turn and an assistant turn.
        tokenizer: the policy's; None skips the checks that need tokens.
        max_length: maximum tokens of prompt and completion; None for no limit.
        max_prompt_length: maximum tokens of the prompt.
        similar: minimum Jaccard similarity of similar rows, see `defects.SimilarTexts`; None skips this check.
        overlap: length in words of the n-grams that evaluation and training data should not share; None skips this
            check.
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
        self.disputed: set[int] = set()
        self.preferences = Preferences()
        self.similar = None if similar is None else SimilarTexts(similar)
        self.ngrams = None if overlap is None else NGrams(overlap)
        self.train: Audit | None = None
        self.longer_wins = array("f")
        self.lengths = array("q")
        self.tokens = self.unknown_tokens = 0

    def add(self, rows: Iterable[Row | Unreadable]) -> Iterator[Keys | None]:
        """Check rows.

        Yields:
            For each row the normalised hashes of its prompt (None for a whole text) and of the whole row; None for a
            row that cannot be used.
        """
        rows = iter(rows)
        for facts in in_forks(self._examine, iter(lambda: list(islice(rows, CHUNK)), [])):
            yield from map(self._take_in, facts)

    def _examine(self, rows: Sequence[Row | Unreadable]) -> list[RowFacts]:
        """Check each row individually."""
        tokenizer = self.tokenizer
        outcomes = map(self._read, rows) if tokenizer is None else self.encoder.outcomes(tokenizer, rows)
        return list(map(self._facts, outcomes))

    def _read(self, row: Row | Unreadable) -> Outcome:
        try:
            read = read_row(row, self.encoder.read, self.as_chat, self.columns)
            return Outcome(read, unused=self.encoder.unused_of(read))
        except RowRefused as refusal:
            return Outcome(reason=refusal.code)

    def _facts(self, outcome: Outcome) -> RowFacts:
        row = outcome.row
        if row is None:
            return RowFacts((str(outcome.reason),))
        texts = [contents_of(part) for part in (row.prompt, *row.completions)]
        normal = [list(map(normalised, part)) for part in texts]
        keys = list(map(key_of, normal))
        labels = str((row.ranks, row.target, row.columns.get("labels") if self.kind == "process" else None))
        asked, *said = [sum(map(len, part)) for part in texts]
        encoded = max(outcome.encoded, key=_length, default=None)  # for rows per trained turn, the longest
        if encoded is not None:
            asked, said = len(encoded.prompt), list(map(len, encoded.completions))
        return RowFacts(
            (*_of_tokens(outcome), *self._of_texts(row, texts), *disorder_of(row), *self._of_cuts(encoded)),
            outcome.unused,
            None if row.prompt is None else keys[0],
            keys[1:],
            row.ranks[::-1] if row.target < 0.5 else row.ranks,
            row.target,
            key_of([*("\0".join(part) for part in texts), labels]),
            hash((None if row.prompt is None else keys[0], *keys[1:], *row.ranks)),
            asked + max(said, default=0),
            outcome.tokens,
            outcome.unknown,
            None if self.kind != "preference" else longer_wins(row, said),
            " ".join(chain(*normal)) if self.similar is not None or self.ngrams is not None else None,
        )

    def _take_in(self, facts: RowFacts) -> Keys | None:
        self.read += 1
        for check in facts.checks:
            self._find(check)
        if facts.said is None:
            return None
        self.unused.update(facts.unused)
        repeats = self._check_duplicates(facts)
        if facts.text is not None:
            self._check_similar(facts.text, facts.loose, repeats)
        if facts.asked is not None:
            self.repeated_prompts += facts.asked in self.prompts
            self.prompts.setdefault(facts.asked, self.read)
            self._check_judgements(facts, facts.asked, facts.said)
        self.lengths.append(facts.length)
        self.tokens += facts.tokens
        self.unknown_tokens += facts.unknown
        if facts.longer_wins is not None:
            self.longer_wins.append(facts.longer_wins)
        return facts.asked, facts.loose

    def compare(self, rows: Iterable[Row | Unreadable], train: Audit) -> None:
        """Check rows, and search for each of them in the training data."""
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
        for check, rows in (("both_ways", {*both, *self.disputed}), ("circle", {*circle})):
            if rows:
                self.found[check] = Finding(check, sorted(rows))
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

    def _of_texts(self, row: CanonicalRow, texts: Sequence[Sequence[str]]) -> Iterator[str]:
        for part, contents in zip((row.prompt, *row.completions), texts, strict=True):
            for text in contents:
                yield from damage_of(text)
                if self.tokenizer is None and CONTROL_TOKENS.search(text):
                    yield "control_token"
                if not isinstance(part, str) and has_speaker(text):
                    yield "second_speaker"

    def _of_cuts(self, row: EncodedRow | None) -> Iterator[str]:
        limit, most = self.max_length, self.max_prompt_length
        if row is None or (limit is None and most is None):
            return
        if self.kind == "prompt":
            limit, most = None, most or limit
        prompt, completions = truncate(row.prompt, row.completions, limit, most)
        if len(prompt) < len(row.prompt):
            yield "prompt_cut"
        for cut, whole in zip(completions, row.completions, strict=True):
            if len(cut) < len(whole):
                yield "completion_cut"
                if limit is not None and len(whole) <= limit // 2:
                    yield "prompt_crowds_out"

    def _check_similar(self, text: str, loose: int, repeats: bool) -> None:
        """Search for similar rows, earlier and in the training data, unless the row is already a known duplicate."""
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

    def _check_duplicates(self, row: RowFacts) -> bool:
        """Search for an earlier row that this row repeats; return whether there is one."""
        if row.exact in self.exact:
            self._find("duplicate", self.exact[row.exact])
        elif row.loose in self.loose:
            self._find("near_duplicate", self.loose[row.loose])
        repeats = row.exact in self.exact or row.loose in self.loose
        self.exact.setdefault(row.exact, self.read)
        self.loose.setdefault(row.loose, self.read)
        return repeats

    def _check_judgements(self, row: RowFacts, asked: int, said: Sequence[int]) -> None:
        if self.kind == "preference":
            if any(
                one == other and rank != lower
                for place, (one, rank) in enumerate(zip(said, row.ranks, strict=True))
                for other, lower in zip(said[:place], row.ranks[:place], strict=True)
            ):
                self._find("near_identical")
            if row.target != 0.5:
                self.preferences.add(self.read, asked, said, row.ranks)
        elif self.kind == "unpaired":
            rank, first = self.judged.setdefault((asked, said[0]), (row.ranks[0], self.read))
            if rank != row.ranks[0]:
                self.disputed |= {first, self.read}


def _of_tokens(outcome: Outcome) -> Iterator[str]:
    for check, found in (
        ("control_token", outcome.escaped),
        ("boundary_mismatch", outcome.merged),
        ("unknown_token", outcome.unknown),
        ("turns_apart", outcome.split),
        ("last_turn", outcome.last_turn),
        ("turns_cut", outcome.turns_cut),
    ):
        if found:
            yield check


def _length(row: EncodedRow) -> int:
    return len(row.prompt) + max(map(len, row.completions), default=0)
