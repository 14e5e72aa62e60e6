"""Convert rows of every supported form to canonical rows, or refuse them with a reason.

Demonstrations: ``messages`` or ``conversations``; ``prompt`` + ``completion``; ``instruction`` (+ ``input``) +
``output``; ``input`` + ``output``; ``text`` alone.

Preferences: ``prompt`` (or ``conversations``, or ``instruction`` + ``input``) + ``chosen`` + ``rejected``; ``chosen`` +
``rejected`` that begin with the same prompt (common turns, or a transcript of "Human:" and "Assistant:" turns);
``prompt`` + ``completions``, best first or with ``ranks``; ``prompt`` + ``completion_1`` + ``completion_2`` + ``label``
(1 or 2 for the better one, 0 or "tie") or ``labels`` (a list of such votes).

Completions judged individually: a demonstration with ``label``, or a preference, whose two completions become two rows.

Completions judged step by step: ``prompt`` + ``completions`` (the steps of one completion) + ``labels``.

Prompts: ``prompt``, or the part of the other forms before the completion. Text may be plain or messages everywhere.

``system``, ``history`` (earlier turns) and ``tools`` (or ``functions``) are added to the prompt of any form.
``preference`` (probability that chosen is better), ``margin`` (rated strength) and ``weight`` (weight of the row) are
optional numbers. With messages, ``chat_template_kwargs`` and ``documents`` are variables of the row's chat template.
All other columns are passed on.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_lightning.data.canonical import CanonicalRow, Row, RowRefused
from rlhf_lightning.data.files import Unreadable
from rlhf_lightning.data.turns import (
    LARGEST,
    MEDIA,
    completion_of,
    context_of,
    from_json,
    in_context,
    messages_of,
    one_style,
    pair_of,
    parted,
    prompt_of,
    spells_turns,
    template_args_in,
    text_of,
    unused_keys,
    with_user,
)
from rlhf_lightning.errors import DataError
from rlhf_lightning.loading import is_too_deep
from rlhf_lightning.types import Message, Prompt

TEMPLATE_COLUMNS = ("chat_template_kwargs", "documents")
"""Columns with variables of the chat template."""

LABELS = ("preference", "margin", "weight")

MOST_COMPLETIONS = 256
"""Maximum completions of a ranked list, because every two of them can become a pair."""

Form = tuple[str, ...]
DEMONSTRATION_FORMS: tuple[Form, ...] = (
    ("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"), ("input", "output"),
    ("text",),
)  # fmt: skip
PREFERENCE_FORMS: tuple[Form, ...] = (
    ("prompt", "chosen", "rejected"), ("conversations", "chosen", "rejected"), ("instruction", "chosen", "rejected"),
    ("chosen", "rejected"), ("prompt", "completions"), ("prompt", "completion_1", "completion_2", "label"),
    ("prompt", "completion_1", "completion_2", "labels"),
)  # fmt: skip
UNPAIRED_FORMS: tuple[Form, ...] = (
    ("prompt", "completion", "label"), ("messages", "label"), ("conversations", "label"), *PREFERENCE_FORMS[:4],
)  # fmt: skip
PROCESS_FORMS: tuple[Form, ...] = (("prompt", "completions", "labels"),)
PROMPT_FORMS: tuple[Form, ...] = (
    ("prompt",), ("messages",), ("conversations",), ("chosen", "rejected"), ("instruction",), ("input",)
)  # fmt: skip
ALL_FORMS = (*DEMONSTRATION_FORMS, *PREFERENCE_FORMS, *UNPAIRED_FORMS, *PROCESS_FORMS, *PROMPT_FORMS)

OTHER_NAMES = {
    "prompt": ("question", "query", "problem", "user", "context"),
    "completion": ("response", "answer", "solution", "target", "reply"),
    "chosen": ("preferred", "better", "win", "positive"),
    "rejected": ("dispreferred", "worse", "lose", "negative"),
    "messages": ("conversation", "dialog", "dialogue", "chat", "turns"),
    "completions": ("responses", "answers"),
    "label": ("is_good", "thumbs_up"),
}
"""Names that other data sets use for a column."""


def form_of(row: Row, forms: tuple[Form, ...]) -> Form:
    """Return the first form whose columns the row has, preferably with a value: tables fill in nulls."""
    found = [form for form in forms if all(column in row for column in form)]
    if not found:
        raise RowRefused("missing_columns")
    return next((form for form in found if any(row[column] is not None for column in form)), found[0])


def check_columns(found: Iterable[str], forms: tuple[Form, ...], where: str) -> None:
    """Raise an error if the columns match no form; it names the columns and similar accepted names."""
    found = list(dict.fromkeys(found))
    matched = next((form for form in forms if set(form) <= set(found)), None)
    asked = next((name for name in OTHER_NAMES["prompt"] if name in found), None)
    if matched is None or (matched == ("chosen", "rejected") and asked is not None):
        raise no_form(found, forms, where)


def no_form(found: Sequence[str], forms: tuple[Form, ...], where: str) -> DataError:
    """Return the error for columns that match no form, with similar accepted names."""
    missing = {column for form in forms for column in form} - set(found)
    near = {}
    for name in found:
        known = [wanted for wanted in missing if name in OTHER_NAMES.get(wanted, ())]
        if match := known or difflib.get_close_matches(name, missing, n=1, cutoff=0.8):
            near[name] = match[0]
    hint = "".join(f" Did you mean {wanted!r} by {column!r}?" for column, wanted in near.items())
    holds = (name for name, kind in KINDS.items() if any(set(form) <= set(found) for form in kind.forms))
    example = "question: prompt"
    if not near and (kind := next(holds, None)):
        hint = f" They are those of {'SFT' if kind == 'sft' else kind.capitalize()}DataModule."
        example = "chosen: completion" if ("prompt", "completion") in forms and "chosen" in found else example
    if len(found) == 1 and ";" in found[0]:
        hint = " Its columns are separated by semicolons: save it with commas."
    accepted = "; ".join(" + ".join(form) for form in forms)
    return DataError(
        "no-accepted-form",
        f"{where} has the columns {', '.join(map(repr, found)) or 'none'}, and none of the accepted forms: {accepted}."
        f"{hint} Rename columns with the argument columns, e.g. columns: {{{example}}}.",
    )


def _with_lists(row: Row, forms: tuple[Form, ...]) -> tuple[Row, Form]:
    """Find the row's form, and parse message columns that hold JSON text, if all of them do."""
    if "conversations" in row and row.get("messages") is None and row.get("chosen") is None:
        row = {**row, "messages": row["conversations"]}
    names = ("prompt", "completion", "chosen", "rejected")
    texts = {name: row[name] for name in names if row.get(name) is not None}
    spelt = [name for name, value in texts.items() if spells_turns(value)]
    if len(spelt) > 1 and len(spelt) == len(texts):  # a single such column may be ordinary text
        row = {**row, **{name: from_json(texts[name], "json_text") for name in spelt}}
    form = form_of(row, forms)
    if "messages" in form and isinstance(row["messages"], str):
        row = {**row, "messages": from_json(row["messages"], "malformed_messages")}
    return row, form


def demonstration(row: Row, as_chat: bool = False) -> CanonicalRow:
    """Read a prompt and the completion to imitate."""
    row, form = _with_lists(row, DEMONSTRATION_FORMS)
    used = {*form, *LABELS, "conversations"}
    prompt: Prompt | None
    completion: str | list[Message]
    if form == ("messages",):
        prompt, completion = parted(messages_of(row["messages"]))
    elif form == ("text",):
        prompt, completion = None, text_of(row["text"], "empty_completion")
    elif form == ("instruction", "output"):
        used.add("input")
        prompt, completion = _instruction(row), completion_of(row["output"])
    else:
        prompt, completion = prompt_of(row[form[0]]), completion_of(row[form[1]])
    if prompt is not None:
        used |= context_of(row)
        prompt, (completion,) = one_style(prompt, [completion], as_chat)
        prompt = in_context(row, prompt)
    return CanonicalRow(prompt, [completion], [0], weight=_label(row, "weight", 1.0), columns=_others(row, used))


def preference_with_ties(row: Row, as_chat: bool = False) -> CanonicalRow:
    """Read a preference or a ranked list, also if all its ranks are tied, for objectives that learn from ties."""
    return preference(row, as_chat, keep_tied=True)


def preference(row: Row, as_chat: bool = False, keep_tied: bool = False) -> CanonicalRow:
    """Read a prompt and two or more completions with their ranks."""
    row, form = _with_lists(row, PREFERENCE_FORMS)
    used = {*form, *LABELS, *context_of(row)}
    if "completion_1" in form:
        row = {**row, **_voted(row, form[-1])}
        form = ("prompt", "chosen", "rejected")
    if form == ("prompt", "completions"):
        used.add("ranks")
        prompt, completions, ranks = _ranked(row, keep_tied)
    else:
        if form[0] == "conversations":
            row = {**row, "prompt": row["conversations"]}
        elif form[0] == "instruction":
            used.add("input")
            row = {**row, "prompt": _instruction(row)}
        prompt, completions = pair_of(row, form[0] != "chosen")
        ranks = [0, 1]
    prompt, completions = one_style(prompt, completions, as_chat)
    prompt = in_context(row, prompt)
    if len(completions) == 2 and completions[0] == completions[1]:
        raise RowRefused("identical_completions")
    return CanonicalRow(
        prompt, completions, ranks,
        target=_label(row, "preference", 1.0, most=1.0) if len(completions) == 2 else 1.0,
        margin=_label(row, "margin", 0.0, least=-LARGEST),
        weight=_label(row, "weight", 1.0),
        columns=_others(row, used),
    )  # fmt: skip


def unpaired(row: Row, as_chat: bool = False) -> CanonicalRow:
    """Read a prompt with good (rank 0) or bad (rank 1) completions: one with its label, or the two of a pair."""
    row, form = _with_lists(row, UNPAIRED_FORMS)
    if "label" not in form:
        return preference(row, as_chat)
    demonstrated = demonstration({name: value for name, value in row.items() if name != "label"}, as_chat)
    demonstrated.ranks = [0 if _judgement(row["label"]) else 1]
    return demonstrated


def _judgement(value: Any) -> bool:
    known = {"true": True, "1": True, "false": False, "0": False, "-1": False}
    if not isinstance(value, str | bool | int | float):
        raise RowRefused("bad_label")
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip().lower()
    if text not in known:
        raise RowRefused("bad_label")
    return known[text]


def process(row: Row, as_chat: bool = False) -> CanonicalRow:
    """Read a prompt and the steps of one completion; each label is right, wrong, or the probability of being right."""
    form = form_of(row, PROCESS_FORMS)
    steps, labels = row["completions"], row["labels"]
    if not isinstance(steps, list | tuple) or not steps:
        raise RowRefused("empty_completion")
    if not isinstance(labels, list | tuple) or len(labels) != len(steps):
        raise RowRefused("bad_step_labels")
    texts = [text_of(step, "empty_completion") for step in steps]
    found, _ = one_style(prompt_of(row["prompt"]), [], as_chat)
    found = in_context(row, found)
    columns = {**_others(row, {*form, *LABELS, *context_of(row)}), "labels": [_step_label(label) for label in labels]}
    return CanonicalRow(found, list(texts), [0], weight=_label(row, "weight", 1.0), columns=columns)


def _step_label(value: Any) -> float | None:
    if value is None:
        return None
    if not isinstance(value, bool | int | float) or not 0 <= value <= 1:
        raise RowRefused("bad_step_labels")
    return float(value)


def prompt(row: Row, as_chat: bool = False) -> CanonicalRow:
    """Read a prompt alone; further columns are passed on to the scorer."""
    row, form = _with_lists(row, PROMPT_FORMS)
    used = {*form, "conversations", *context_of(row)}
    if form == ("messages",):
        turns = messages_of(row["messages"])
        while turns and turns[-1]["role"] == "assistant":
            turns = turns[:-1]
        found: Prompt = with_user(turns)
    elif form == ("chosen", "rejected"):
        found, _ = pair_of(row, False)
    elif form == ("instruction",):
        used.add("input")
        found = _instruction(row)
    else:
        found = prompt_of(row[form[0]])
    found, _ = one_style(found, [], as_chat)
    found = in_context(row, found)
    # A scorer is called with ``prompts`` and the sampled ``completions``, and with the columns as keyword arguments.
    return CanonicalRow(found, columns=_others(row, used | {"prompts", "completions"}))


Reader = Callable[[Row, bool], CanonicalRow]


class Kind(NamedTuple):
    """A kind of rows.

    Attributes:
        read: function that reads a row of any form of this kind.
        forms: the forms that it reads.
    """

    read: Reader
    forms: tuple[Form, ...]


KINDS = {
    "process": Kind(process, PROCESS_FORMS),
    "preference": Kind(preference_with_ties, PREFERENCE_FORMS),
    "unpaired": Kind(unpaired, UNPAIRED_FORMS[:3]),
    "sft": Kind(demonstration, DEMONSTRATION_FORMS),
    "prompt": Kind(prompt, PROMPT_FORMS),
}
"""Kinds by the name of their DataModule; kinds whose forms need more columns come first."""


def kind_of(columns: Iterable[str], where: str) -> str:
    """Return the name of the first kind with a form that the columns match.

    Raises:
        DataError: the columns match no form; the error names similar accepted names.
    """
    found = list(dict.fromkeys(columns))
    for name, kind in KINDS.items():
        if any(set(form) <= set(found) for form in kind.forms):
            return name
    raise no_form(found, tuple(dict.fromkeys(form for kind in KINDS.values() for form in kind.forms)), where)


def read_row(
    row: Row | Unreadable, read: Reader, as_chat: bool = False, columns: Mapping[str, str] | None = None
) -> CanonicalRow:
    """Read one row with a reader, after renaming its columns by ``columns``.

    Raises:
        RowRefused: the row cannot be used.
    """
    if isinstance(row, Unreadable):
        raise RowRefused(row.reason)
    if is_too_deep(row):
        raise RowRefused("too_deep")
    if columns:
        covered = set(columns.values()) - set(columns)
        row = {columns.get(name, name): value for name, value in row.items() if name not in covered}
    if not MEDIA.isdisjoint(row) and any(row.get(name) for name in MEDIA):
        raise RowRefused("media")
    canonical = read(row, as_chat)
    _add_template_args(canonical)
    canonical.unused = tuple(dict.fromkeys(unused_keys(row.values())))
    try:
        parts = [canonical.prompt, *canonical.completions]
        if all(type(part) is str for part in parts) and not canonical.columns:
            "".join(map(str, parts)).encode("utf-8")
        else:
            json.dumps([parts, canonical.columns], ensure_ascii=False, default=str).encode("utf-8")
    except (UnicodeError, ValueError, TypeError):
        raise RowRefused("broken_text") from None
    return canonical


def _add_template_args(row: CanonicalRow) -> None:
    """Put the columns ``chat_template_kwargs`` and ``documents`` into messages, as variables of the chat template."""
    if not row.prompt or isinstance(row.prompt, str):  # no template is applied
        return
    if args := template_args_in(*(row.columns.get(name) for name in TEMPLATE_COLUMNS)):
        first, *others = row.prompt
        row.prompt = [{**first, "template_args": {**first.get("template_args", {}), **args}}, *others]
    row.rendered_with = TEMPLATE_COLUMNS if "documents" in args else TEMPLATE_COLUMNS[:1]


def _others(row: Row, used: set[str]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in used}


def _label(row: Row, name: str, default: float, least: float = 0.0, most: float = LARGEST) -> float:
    value = row.get(name)
    if value is None or value == "":
        return default
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise RowRefused("bad_number") from None
    if not (math.isfinite(number) and least <= number <= most):
        raise RowRefused("bad_number")
    return number


def _instruction(row: Row) -> str:
    asked, given = text_of(row["instruction"], "empty_prompt"), row.get("input")
    if not isinstance(given, str | None):
        raise RowRefused("empty_prompt")
    return f"{asked}\n\n{given}" if given and given.strip() else asked


def _voted(row: Row, name: str) -> Row:
    """Convert votes on two completions to a pair; the one with more votes is chosen, a tie counts half for each."""
    votes = row[name] if name == "labels" else [row[name]]
    known = {"1": 1.0, "2": 0.0, "0": 0.5, "tie": 0.5}
    if (
        not isinstance(votes, list | tuple)
        or not votes
        or not all(isinstance(vote, str | int | float) and not isinstance(vote, bool) for vote in votes)
    ):
        raise RowRefused("bad_vote")
    spelt = [str(vote).strip().lower().removesuffix(".0") for vote in votes]
    if any(vote not in known for vote in spelt):
        raise RowRefused("bad_vote")
    share = sum(known[vote] for vote in spelt) / len(spelt)
    sides = ("completion_1", "completion_2") if share >= 0.5 else ("completion_2", "completion_1")
    return {"chosen": row[sides[0]], "rejected": row[sides[1]], "preference": max(share, 1 - share)}


def _ranked(row: Row, keep_tied: bool = False) -> tuple[Prompt, list[Any], list[int]]:
    values, ranks = row["completions"], row.get("ranks")
    if not isinstance(values, list | tuple) or len(values) < 2:
        raise RowRefused("single_completion")
    if len(values) > MOST_COMPLETIONS:
        raise RowRefused("too_many_completions")
    ranks = list(range(len(values))) if ranks is None else ranks
    if not isinstance(ranks, list | tuple) or len(ranks) != len(values):
        raise RowRefused("bad_number")
    if any(isinstance(r, bool) or not isinstance(r, int | float) or not abs(r) < math.inf for r in ranks):
        raise RowRefused("bad_number")
    prompt = prompt_of(row["prompt"])
    kept: list[tuple[Any, float]] = []
    for value, rank in sorted(zip(values, ranks, strict=True), key=lambda pair: pair[1]):
        completion = completion_of(value)
        if all(completion != other for other, _ in kept):
            kept.append((completion, rank))
    if len(kept) < 2:
        raise RowRefused("identical_completions")
    if len({rank for _, rank in kept}) == 1 and not keep_tied:
        raise RowRefused("all_tied")
    places = {rank: place for place, rank in enumerate(sorted({rank for _, rank in kept}))}
    return prompt, [completion for completion, _ in kept], [places[rank] for _, rank in kept]
