"""Convert canonical rows to token ids: rendering, bulk encoding, truncation, and dropping of unusable rows."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from rlhf_lightning.data.canonical import REASONS, CanonicalRow, Report, Row, RowRefused
from rlhf_lightning.data.files import Unreadable
from rlhf_lightning.data.formats import KINDS, Form, Reader, check_columns, read_row
from rlhf_lightning.errors import DataError
from rlhf_lightning.tokenization import (
    Encoded,
    Rendered,
    TurnsRefused,
    encode_rendered,
    joined_steps,
    opening_ids,
    render_answers,
    render_completion,
    render_prompt,
    render_steps,
    render_turns,
    settled,
    truncate,
)
from rlhf_lightning.types import Prompt

_as_json = json.JSONEncoder(ensure_ascii=False, default=str).encode

CHUNK = 512
PEEK = 100


@dataclass(slots=True)
class EncodedRow:
    """A prompt and its completions as token ids.

    Attributes:
        prompt: ids of the prompt, at least one.
        completions: ids of each completion.
        supervised: for each token of each completion, whether it enters the loss.
        ranks, target, margin, weight: as in `CanonicalRow`.
        text: the prompt as given by the data; without a prompt, the decoded text of its ids.
        columns: further columns.
        asked: the prompt, or the whole text without one; rows with an equal one are of the same group.
        source: index of the row's source.
        slots: numbers that the objective asks for, by column name.
    """

    prompt: list[int]
    completions: list[list[int]]
    supervised: list[list[bool]]
    ranks: list[int]
    target: float = 1.0
    margin: float = 0.0
    weight: float = 1.0
    text: Prompt = ""
    columns: Mapping[str, Any] = field(default_factory=dict)
    asked: Prompt = ""
    source: int = 0
    slots: Mapping[str, float] = field(default_factory=dict)

    @property
    def group(self) -> int:
        """Number of what is asked."""
        key = _as_json(self.asked).encode("utf-8")
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little", signed=True)

    @property
    def record(self) -> str:
        """Prompt and columns as JSON."""
        return _as_json({"prompt": self.text, "columns": self.columns})


class Outcome(NamedTuple):
    """Result of encoding one row.

    Attributes:
        row: the canonical row; None if it is dropped.
        encoded: the encoded rows; empty if the row is dropped.
        reason: why the row is dropped, a key of `canonical.REASONS`; None if it is kept.
        truncated: which of ``prompt`` and ``completion`` lost tokens.
        escaped: whether one of its texts spells a control token.
        merged: whether the tokenizer would encode prompt and completion differently if joined.
        split: whether each trained turn became a row.
        last_turn: whether only the last of several assistant turns is trained on.
        turns_cut: whether trained turns beyond the first 256 are left out.
        assistant_first: whether its conversation begins with the assistant.
        unused: columns and keys of turns that are not used.
        tokens, unknown: all tokens of its texts before truncation, and how many stand for unknown text.
    """

    row: CanonicalRow | None = None
    encoded: Sequence[EncodedRow] = ()
    reason: str | None = None
    truncated: tuple[str, ...] = ()
    escaped: bool = False
    merged: bool = False
    split: bool = False
    last_turn: bool = False
    turns_cut: bool = False
    assistant_first: bool = False
    unused: tuple[str, ...] = ()
    tokens: int = 0
    unknown: int = 0


class _Case(NamedTuple):
    """One prompt with its completions, rendered: a whole row, or one trained turn of a row."""

    texts: list[Rendered]
    context: Prompt | None
    weight: float = 1.0


@dataclass(frozen=True)
class Encoder:
    """Encodes rows of one kind.

    Args:
        read: function that reads a row of any form of that kind.
        forms: the forms that it reads, for the message about missing columns.
        columns: mapping from names of columns to their new names.
        max_length: maximum tokens of prompt and completion.
        max_prompt_length: maximum tokens of the prompt.
        as_chat: whether plain text becomes a user turn and an assistant turn.
        pairwise: whether a list of completions becomes all its pairs of different rank.
        apart: whether each completion becomes a separate row.
        separator: text between two steps, if the completions of a row are the steps of one completion.
        rendered: whether plain text was written by a chat template, so that control tokens in it are real.
        slots: numeric columns that the objective asks for, by their new names.
        turnwise: whether a conversation may become one row per trained turn.
        last_turn_only: whether only the assistant's last turn is trained on.
        hands_on: whether further columns are used later (by a scorer).
        prefix: instruction to add to each prompt, in the system turn or as a paragraph before plain text.
    """

    read: Reader
    forms: tuple[Form, ...]
    columns: Mapping[str, str] = field(default_factory=dict)
    max_length: int | None = None
    max_prompt_length: int | None = None
    as_chat: bool = False
    pairwise: bool = False
    apart: bool = False
    separator: str | None = None
    rendered: bool = False
    slots: tuple[str, ...] = ()
    turnwise: bool = False
    last_turn_only: bool = False
    hands_on: bool = False
    prefix: str | None = None

    def rows(
        self, tokenizer: PreTrainedTokenizerBase, rows: Iterable[Row | Unreadable], report: Report, where: str
    ) -> Iterator[EncodedRow]:
        """Encode rows in order, and count them in ``report``.

        Raises:
            DataError: the first rows match no form.
            ChatTemplateError: the tokenizer lacks a chat template for messages.
        """
        for chunk in self.chunks(rows, where):
            for outcome in self.counted(tokenizer, chunk, report):
                yield from outcome.encoded

    def chunks(self, rows: Iterable[Row | Unreadable], where: str) -> Iterator[list[Row | Unreadable]]:
        """Check the column names of the first rows; yield the rows in chunks that are encoded at once."""
        rows = iter(rows)
        chunk = list(islice(rows, PEEK))
        if readable := [row for row in chunk if not isinstance(row, Unreadable)]:
            self.check_names([name for row in readable for name in row if isinstance(name, str)], where)
        while chunk:
            yield chunk
            chunk = list(islice(rows, CHUNK))

    def check_names(self, names: list[str], where: str) -> None:
        """Check the column names, before they are renamed.

        Raises:
            DataError: they match no form, or a column is missing that is renamed or needed by the objective.
        """
        missing = [name for name in self.columns if name not in names]
        if missing:
            found = ", ".join(map(repr, dict.fromkeys(names)))
            raise DataError(
                "unknown-column",
                f"columns renames {', '.join(map(repr, missing))}, but {where} has the columns {found}; "
                "correct data.columns",
            )
        renamed = [self.columns.get(name, name) for name in names]
        check_columns(renamed, self.forms, where)
        absent = [name for name in self.slots if name not in renamed]
        if absent:
            found = ", ".join(map(repr, dict.fromkeys(renamed)))
            raise DataError(
                "missing-data-column",
                f"the objective asks for the column {', '.join(map(repr, absent))} (data_columns), but {where} has the "
                f"columns {found}; rename one by data.columns",
            )

    def counted(
        self, tokenizer: PreTrainedTokenizerBase, rows: Iterable[Row | Unreadable], report: Report
    ) -> list[Outcome]:
        """Encode some rows at once, and count them in ``report``; return one outcome per row."""
        outcomes = self.outcomes(tokenizer, rows)
        for outcome in outcomes:
            report.read += 1
            if outcome.reason is not None:
                report.drop(outcome.reason)
                continue
            report.kept += 1
            for name in ("escaped", "merged", "split", "last_turn", "turns_cut", "assistant_first", "unknown"):
                if getattr(outcome, name):
                    setattr(report, name, getattr(report, name) + 1)
            report.leave_unused(outcome.unused)
            report.encoded_tokens += outcome.tokens
            report.unknown_tokens += outcome.unknown
            report.tokens += sum(sum(flags) for piece in outcome.encoded for flags in piece.supervised)
            for part in outcome.truncated:
                report.truncated[part] = report.truncated.get(part, 0) + 1
        return outcomes

    def outcomes(self, tokenizer: PreTrainedTokenizerBase, rows: Iterable[Row | Unreadable]) -> list[Outcome]:
        """Encode some rows at once; return one outcome per row."""
        with settled(tokenizer):
            return self._outcomes(tokenizer, rows)

    def _outcomes(self, tokenizer: PreTrainedTokenizerBase, rows: Iterable[Row | Unreadable]) -> list[Outcome]:
        read: list[tuple[CanonicalRow, list[_Case], dict[str, float]] | RowRefused] = []
        for row in rows:
            try:
                canonical = instructed(read_row(row, self.read, self.as_chat, self.columns), self.prefix)
                numbers = self._numbers(canonical)
                read.append((canonical, self._render(tokenizer, canonical), numbers))
            except RowRefused as refusal:
                read.append(refusal)
        texts = [text for one in read if not isinstance(one, RowRefused) for case in one[1] for text in case.texts]
        encoded = iter(encode_rendered(tokenizer, texts))
        done: list[Outcome] = []
        for one in read:
            if isinstance(one, RowRefused):
                done.append(Outcome(reason=one.code))
                continue
            canonical, cases, slots = one
            parts = [[next(encoded) for _ in case.texts] for case in cases]
            done.append(self._outcome(tokenizer, canonical, cases, parts, slots))
        return done

    def _render(self, tokenizer: PreTrainedTokenizerBase, row: CanonicalRow) -> list[_Case]:
        prompt, rendered = row.prompt, self.rendered
        try:
            if prompt is None:
                whole = render_completion(tokenizer, str(row.completions[0]), "", rendered)
                return [_Case([whole._replace(opening=opening_ids(tokenizer))], None)]
            if self.separator is not None:
                steps = [str(step) for step in row.completions]
                texts = render_steps(tokenizer, steps, self.separator, prompt, rendered)
                return [_Case([render_prompt(tokenizer, prompt, rendered), *texts], prompt)]
            if self.turnwise and not isinstance(prompt, str) and prompt[-1]["role"] != "assistant":
                said = row.completions[0]
                turns = [*prompt, *([{"role": "assistant", "content": said}] if isinstance(said, str) else said)]
                found = render_turns(tokenizer, turns, self.last_turn_only, first=len(prompt))
                return [_Case([one.prompt, one.completion], one.context, one.weight) for one in found]
            return [_Case(render_answers(tokenizer, prompt, row.completions, rendered, self.last_turn_only), prompt)]
        except TurnsRefused as refusal:
            reason = refusal.code.replace("-", "_")
            raise RowRefused(reason if reason in REASONS else "template_refuses") from None

    def _outcome(
        self, tokenizer: PreTrainedTokenizerBase, row: CanonicalRow, cases: list[_Case], parts: list[list[Encoded]],
        slots: Mapping[str, float],
    ) -> Outcome:  # fmt: skip
        made: list[EncodedRow] = []
        cuts: set[str] = set()
        refusal: RowRefused | None = None
        for case, encoded in zip(cases, parts, strict=True):
            try:
                one, cut = self._encoded(tokenizer, row, case, encoded, slots)
                made += _apart(one) if self.apart else _pairs(one) if self.pairwise else [one]
                cuts |= cut
            except RowRefused as error:  # truncation may remove some of several turns
                refusal = error
        if not made:
            return Outcome(reason=refusal.code if refusal is not None else "no_learned_turn")
        every = [one for encoded in parts for one in encoded]
        return Outcome(
            row,
            made,
            None,
            tuple(sorted(cuts, reverse=True)),
            escaped=any(one.escaped for one in every),
            merged=any(one.merges for one in every),
            split=len(cases) > 1,
            last_turn=any(text.last_turn for case in cases for text in case.texts),
            turns_cut=any(text.turns_cut for case in cases for text in case.texts),
            assistant_first=bool(row.completions) and _begins_with_assistant(row.prompt),
            unused=self.unused_of(row),
            tokens=sum(len(one.ids) for one in every),
            unknown=sum(one.unknown for one in every),
        )

    def unused_of(self, row: CanonicalRow) -> tuple[str, ...]:
        """Return descriptions of the columns and the keys of turns that are not used."""
        used = {*self.slots, *(("labels",) if self.separator is not None else ()), *row.rendered_with}
        left = [] if self.hands_on else [name for name, value in row.columns.items() if value is not None]
        columns = [f"column {name!r}" for name in left if name not in used]
        return (*columns, *(f"key {name!r} of turns" for name in row.unused))

    def _numbers(self, row: CanonicalRow) -> dict[str, float]:
        """Return the values of the row's slots."""
        found = {}
        for name in self.slots:
            try:
                found[name] = float(row.columns[name])
            except (KeyError, TypeError, ValueError, OverflowError):
                raise RowRefused("bad_data_column") from None
            if not math.isfinite(found[name]):
                raise RowRefused("bad_data_column")
        return found

    def _encoded(
        self,
        tokenizer: PreTrainedTokenizerBase,
        row: CanonicalRow,
        case: _Case,
        parts: list[Encoded],
        slots: Mapping[str, float],
    ) -> tuple[EncodedRow, set[str]]:
        if row.prompt is None:  # a whole text: no earlier position could predict its first token
            whole = parts[0]
            prompt, answers = whole.ids[:1], [whole._replace(ids=whole.ids[1:], supervised=whole.supervised[1:])]
            text: Prompt = tokenizer.decode(prompt, skip_special_tokens=True)
        else:
            prompt, answers, text = parts[0].ids, parts[1:], case.context or row.prompt
        if self.separator is not None:
            answers = [_judged(answers, row.columns["labels"])]
        if not prompt:
            raise RowRefused("empty_prompt")
        opening = opening_ids(tokenizer)
        keep = len(opening) if tuple(prompt[: len(opening)]) == opening else 0
        full = [answer.ids for answer in answers]
        cut, completions = truncate(prompt, full, self.max_length, self.max_prompt_length, keep)
        supervised = [one.supervised[: len(ids)] for ids, one in zip(completions, answers, strict=True)]
        if any(not any(flags) for flags in supervised):
            raise RowRefused("nothing_supervised")
        if len(completions) > 1 and all(ids == completions[0] for ids in completions):
            written = all(ids == full[0] for ids in full)
            raise RowRefused("identical_completions" if written else "identical_after_truncation")
        cuts = {"prompt"} if len(cut) < len(prompt) else set()
        cuts |= {"completion"} if any(len(a) < len(b) for a, b in zip(completions, full, strict=True)) else set()
        one = EncodedRow(
            cut, completions, supervised, row.ranks, row.target, row.margin, row.weight * case.weight, text,
            row.columns, row.completions[0] if row.prompt is None else row.prompt, slots=slots,
        )  # fmt: skip
        return one, cuts


def encoder_for(kind: str, **settings: Any) -> Encoder:
    """Return an encoder for rows of a kind, a key of `formats.KINDS`, without splitting rows into pairs."""
    separator = "\n" if kind == "process" else None
    return Encoder(*KINDS[kind], separator=separator, turnwise=kind == "sft", hands_on=kind == "prompt", **settings)


def instructed(row: CanonicalRow, prefix: str | None) -> CanonicalRow:
    """Add an instruction to the beginning of a row's prompt: in the system turn, or before plain text."""
    if prefix is None:
        return row
    if row.prompt is None:
        raise RowRefused("empty_prompt")
    if isinstance(row.prompt, str):
        return replace(row, prompt=f"{prefix}\n\n{row.prompt}")
    first, *others = row.prompt
    if first["role"] != "system":
        return replace(row, prompt=[{"role": "system", "content": prefix}, *row.prompt])
    return replace(row, prompt=[{**first, "content": f"{prefix}\n\n{first['content']}"}, *others])


def _begins_with_assistant(prompt: Prompt | None) -> bool:
    roles = [] if prompt is None or isinstance(prompt, str) else [turn["role"] for turn in prompt]
    return "assistant" in roles[: roles.index("user") if "user" in roles else 0]


def _judged(steps: list[Encoded], labels: list[float | None]) -> Encoded:
    """Join steps into one completion; True marks the last token of each judged step."""
    if not all(step.ids for step in steps):
        raise RowRefused("empty_completion")
    ids, ends = joined_steps(steps)
    judged = iter(label is not None for label in labels)
    return Encoded(ids, [end and next(judged) for end in ends])


def _apart(row: EncodedRow) -> list[EncodedRow]:
    """Return each completion as a separate row."""
    parts = zip(row.completions, row.supervised, row.ranks, strict=True)
    return [replace(row, completions=[ids], supervised=[flags], ranks=[rank]) for ids, flags, rank in parts]


def _pairs(row: EncodedRow) -> list[EncodedRow]:
    """Return all pairs of completions of different rank."""
    places = range(len(row.ranks))
    pairs = [
        replace(
            row,
            completions=[row.completions[i], row.completions[j]],
            supervised=[row.supervised[i], row.supervised[j]],
            ranks=[0, 1],
        )
        for i in places
        for j in places
        if row.ranks[i] < row.ranks[j] and row.completions[i] != row.completions[j]
    ]
    if not pairs:
        raise RowRefused("identical_completions")
    return pairs
