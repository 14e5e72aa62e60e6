"""Rows of every supported form, read into one canonical row, or refused with a reason.

Demonstrations: ``messages``; ``prompt`` + ``completion``; ``input`` + ``output``; ``instruction`` (+ ``input``) +
``output``; ``text`` alone. Preferences: ``prompt`` + ``chosen`` + ``rejected``; ``chosen`` + ``rejected`` whose prompt
is what both begin with (turns in common, or a transcript of "Human:" and "Assistant:" turns); ``prompt`` +
``completions`` best first, or with ``ranks``; ``prompt`` + ``completion_1`` + ``completion_2`` + ``label`` (1 or 2 for
the better one, 0 or "tie") or ``labels`` (a list of such votes). Judged alone: a demonstration with ``label``, or a
preference, whose two completions become two rows. Judged step by step: ``prompt`` + ``completions``, the steps of one
completion, + ``labels``. Prompts: ``prompt``, or what the other forms have before the completion.
Text may be plain or conversational (a list of messages) everywhere.

``preference`` (probability that chosen is the better one), ``margin`` (rated strength) and ``weight`` (weight of the
row) are optional numbers. All other columns are handed on.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf_lightning.types import Message, Prompt

Row = Mapping[str, Any]

ROLES = {
    "user": "user", "human": "user", "system": "system", "developer": "developer", "tool": "tool",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant",
}  # fmt: skip
"""Roles known, and the role each is read as. No other passes: a role becomes part of the template's own text."""

REASONS = {
    "unreadable_line": "the line is not a JSON object in UTF-8",
    "broken_text": "the text holds half a surrogate pair, which no encoding can write",
    "missing_columns": "a column of its form is missing",
    "empty_prompt": "the prompt is empty or None",
    "empty_completion": "a completion is empty or None",
    "empty_turn": "a turn says nothing",
    "malformed_messages": "the messages are not a list of {role, content}",
    "unknown_role": "a role is none of " + ", ".join(sorted(set(ROLES.values()))),
    "no_user_turn": "the prompt has no user turn",
    "no_assistant_turn": "the conversation has no assistant turn",
    "prompts_differ": "chosen and rejected answer different prompts",
    "turns_do_not_alternate": "a transcript's turns do not alternate",
    "inline_role_marker": "a transcript's turn holds another role marker",
    "identical_completions": "chosen equals rejected",
    "bad_label": "the label is none of true, false, 1, 0 and -1",
    "bad_vote": "a vote on two completions is none of 1, 2, 0 and tie",
    "bad_step_labels": "the labels are not one number between 0 and 1, or null, for each step",
    "bad_number": "preference, margin, weight or a rank is no number in its range",
    "single_completion": "a ranked list needs two completions",
    "all_tied": "all completions of a ranked list have the same rank",
    "template_refuses": "the chat template refuses the turns",
    "nothing_supervised": "no supervised token is left after truncation",
}
"""What each reason for dropping a row means."""

LABELS = ("preference", "margin", "weight")


class RowRefused(Exception):
    """A row cannot be used; the message is a key of `REASONS`."""


@dataclass(slots=True)
class CanonicalRow:
    """A row of any form.

    Attributes:
        prompt: plain text or messages; None where the completion is the whole text.
        completions: answers to the prompt, each plain text or messages; none for a prompt alone; of a completion that
            was judged step by step its steps.
        ranks: rank of each completion, 0 is best.
        target: probability that the better ranked of two is better.
        margin: rated strength of the preference, 0 where unrated.
        weight: weight of the row.
        columns: the columns that are no part of the form; and the labels of steps, None where one was not judged.
    """

    prompt: Prompt | None
    completions: list[str | list[Message]] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    target: float = 1.0
    margin: float = 0.0
    weight: float = 1.0
    columns: dict[str, Any] = field(default_factory=dict)


Form = tuple[str, ...]
DEMONSTRATION_FORMS: tuple[Form, ...] = (
    ("messages",), ("prompt", "completion"), ("instruction", "output"), ("input", "output"), ("text",),
)  # fmt: skip
PREFERENCE_FORMS: tuple[Form, ...] = (
    ("prompt", "chosen", "rejected"), ("chosen", "rejected"), ("prompt", "completions"),
    ("prompt", "completion_1", "completion_2", "label"), ("prompt", "completion_1", "completion_2", "labels"),
)  # fmt: skip
UNPAIRED_FORMS: tuple[Form, ...] = (
    ("prompt", "completion", "label"), ("messages", "label"), *PREFERENCE_FORMS[:2],
)  # fmt: skip
PROCESS_FORMS: tuple[Form, ...] = (("prompt", "completions", "labels"),)
PROMPT_FORMS: tuple[Form, ...] = (("prompt",), ("messages",), ("chosen", "rejected"), ("instruction",), ("input",))


def form_of(row: Row, forms: tuple[Form, ...]) -> Form:
    """The first of the forms whose columns the row has."""
    for form in forms:
        if all(column in row for column in form):
            return form
    raise RowRefused("missing_columns")


def check_columns(found: Iterable[str], forms: tuple[Form, ...], where: str) -> None:
    """Raise if no form's columns are among those found, naming them and the nearest match."""
    found = list(dict.fromkeys(found))
    if any(set(form) <= set(found) for form in forms):
        return
    missing = {column for form in forms for column in form} - set(found)
    near = {c: m[0] for c in found if (m := difflib.get_close_matches(c, missing, n=1, cutoff=0.6))}
    hint = "".join(f" Did you mean {wanted!r} by {column!r}?" for column, wanted in near.items())
    accepted = "; ".join(" + ".join(form) for form in forms)
    raise ValueError(
        f"{where} has the columns {', '.join(map(repr, found)) or 'none'}, and none of the accepted forms: {accepted}."
        f"{hint} Rename columns with the argument columns, e.g. columns: {{question: prompt}}."
    )


def demonstration(row: Row, as_chat: bool = False) -> CanonicalRow:
    """A prompt and the completion to imitate."""
    form = form_of(row, DEMONSTRATION_FORMS)
    used = {*form, *LABELS}
    prompt: Prompt | None
    completion: str | list[Message]
    if form == ("messages",):
        prompt, completion = _parted(_messages(row["messages"]))
    elif form == ("text",):
        prompt, completion = None, _text(row["text"], "empty_completion")
    elif form == ("instruction", "output"):
        used.add("input")
        prompt, completion = _instruction(row), _completion(row["output"])
    else:
        prompt, completion = _prompt(row[form[0]]), _completion(row[form[1]])
    if prompt is not None:
        prompt, (completion,) = _one_style(prompt, [completion], as_chat)
    return CanonicalRow(prompt, [completion], [0], weight=_label(row, "weight", 1.0), columns=_others(row, used))


def preference_with_ties(row: Row, as_chat: bool = False) -> CanonicalRow:
    """A preference, or a ranked list that is all ties, for objectives that learn from those too."""
    return preference(row, as_chat, keep_tied=True)


def preference(row: Row, as_chat: bool = False, keep_tied: bool = False) -> CanonicalRow:
    """A prompt and two or more completions with their ranks."""
    form = form_of(row, PREFERENCE_FORMS)
    used = {*form, *LABELS}
    if "completion_1" in form:
        row = {**row, **_voted(row, form[-1])}
        form = ("prompt", "chosen", "rejected")
    if form == ("prompt", "completions"):
        used.add("ranks")
        prompt, completions, ranks = _ranked(row, keep_tied)
    else:
        prompt, completions = _pair(row, "prompt" in form)
        ranks = [0, 1]
    prompt, completions = _one_style(prompt, completions, as_chat)
    if len(completions) == 2 and completions[0] == completions[1]:
        raise RowRefused("identical_completions")
    return CanonicalRow(
        prompt, completions, ranks,
        target=_label(row, "preference", 1.0, most=1.0) if len(completions) == 2 else 1.0,
        margin=_label(row, "margin", 0.0, least=-math.inf),
        weight=_label(row, "weight", 1.0),
        columns=_others(row, used),
    )  # fmt: skip


def unpaired(row: Row, as_chat: bool = False) -> CanonicalRow:
    """A prompt and completions that are good (rank 0) or bad (rank 1): one with its label, or a pair's two."""
    form = form_of(row, UNPAIRED_FORMS)
    if "label" not in form:
        return preference(row, as_chat)
    demonstrated = demonstration({name: value for name, value in row.items() if name != "label"}, as_chat)
    demonstrated.ranks = [0 if _judgement(row["label"]) else 1]
    return demonstrated


def _judgement(value: Any) -> bool:
    known = {"true": True, "1": True, "false": False, "0": False, "-1": False}
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip().lower()
    if text not in known:
        raise RowRefused("bad_label")
    return known[text]


def process(row: Row, as_chat: bool = False) -> CanonicalRow:
    """A prompt and the steps of one completion, each with its label: right or wrong, or the probability of right."""
    form = form_of(row, PROCESS_FORMS)
    steps, labels = row["completions"], row["labels"]
    if not isinstance(steps, list | tuple) or not steps:
        raise RowRefused("empty_completion")
    if not isinstance(labels, list | tuple) or len(labels) != len(steps):
        raise RowRefused("bad_step_labels")
    texts = [_text(step, "empty_completion") for step in steps]
    found, _ = _one_style(_prompt(row["prompt"]), [], as_chat)
    columns = {**_others(row, {*form, *LABELS}), "labels": [_step_label(label) for label in labels]}
    return CanonicalRow(found, list(texts), [0], weight=_label(row, "weight", 1.0), columns=columns)


def _step_label(value: Any) -> float | None:
    if value is None:
        return None
    if not isinstance(value, bool | int | float) or not 0 <= value <= 1:
        raise RowRefused("bad_step_labels")
    return float(value)


def prompt(row: Row, as_chat: bool = False) -> CanonicalRow:
    """A prompt alone; further columns are handed on to the scorer."""
    form = form_of(row, PROMPT_FORMS)
    used = {*form}
    if form == ("messages",):
        turns = _messages(row["messages"])
        while turns and turns[-1]["role"] == "assistant":
            turns = turns[:-1]
        found: Prompt = _with_user(turns)
    elif form == ("chosen", "rejected"):
        found, _ = _pair(row, False)
    elif form == ("instruction",):
        used.add("input")
        found = _instruction(row)
    else:
        found = _prompt(row[form[0]])
    found, _ = _one_style(found, [], as_chat)
    # A scorer is called with the prompts and the completions sampled for them, and with the columns by their names.
    return CanonicalRow(found, columns=_others(row, used | {"prompts", "completions"}))


Reader = Callable[[Row, bool], CanonicalRow]


def _others(row: Row, used: set[str]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in used}


def _label(row: Row, name: str, default: float, least: float = 0.0, most: float = math.inf) -> float:
    value = row.get(name)
    if value is None or value == "":
        return default
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise RowRefused("bad_number") from None
    if not (math.isfinite(number) and least <= number <= most):
        raise RowRefused("bad_number")
    return number


def _text(value: Any, reason: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise RowRefused(reason)
    return value


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list | tuple) or not value:
        raise RowRefused("malformed_messages")
    turns = []
    for turn in value:
        if not isinstance(turn, Mapping):
            raise RowRefused("malformed_messages")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if isinstance(content, list):  # parts, of which only text can be learned from
            texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
            content = "".join(map(str, texts)) if all(isinstance(text, str) for text in texts) else content
        if not isinstance(role, str) or not (content is None or isinstance(content, str)):
            raise RowRefused("malformed_messages")
        if role.lower() not in ROLES:
            raise RowRefused("unknown_role")
        if content is None or not content.strip():
            if ROLES[role.lower()] == "system":
                continue  # an empty system prompt says nothing, and is often a mere placeholder
            raise RowRefused("empty_turn")
        turns.append({"role": ROLES[role.lower()], "content": content})
    return turns


def _with_user(turns: list[Message]) -> list[Message]:
    if not any(turn["role"] == "user" for turn in turns):
        raise RowRefused("no_user_turn")
    return turns


def _prompt(value: Any) -> Prompt:
    if isinstance(value, list | tuple) and value:
        return _with_user(_messages(value))
    return _text(value, "empty_prompt")


def _completion(value: Any) -> str | list[Message]:
    if isinstance(value, list | tuple) and value:
        turns = _messages(value)
        while turns and turns[-1]["role"] != "assistant":
            turns.pop()
        if not turns:
            raise RowRefused("no_assistant_turn")
        return turns
    return _text(value, "empty_completion")


def _instruction(row: Row) -> str:
    parts = [_text(row["instruction"], "empty_prompt"), row.get("input")]
    return "\n\n".join(part for part in parts if isinstance(part, str) and part.strip())


def _parted(turns: list[Message]) -> tuple[list[Message], list[Message]]:
    """The turns before the first of the assistant, and the rest up to its last."""
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not answers:
        raise RowRefused("no_assistant_turn")
    return _with_user(turns[: answers[0]]), turns[answers[0] : answers[-1] + 1]


def _one_style(prompt: Prompt, completions: list[Any], as_chat: bool) -> tuple[Prompt, list[Any]]:
    """Make the prompt messages if a completion is, or if asked to; completions of messages begin with the assistant."""
    turned = [c for c in completions if isinstance(c, list)]
    if isinstance(prompt, str) and (as_chat or turned):
        prompt = [{"role": "user", "content": prompt}]
    if any(c[0]["role"] != "assistant" for c in turned):
        raise RowRefused("prompts_differ")
    return prompt, completions


def _voted(row: Row, name: str) -> Row:
    """Votes on two completions as a pair, the one with more votes chosen; a tie is half a vote for each."""
    votes = row[name] if name == "labels" else [row[name]]
    known = {"1": 1.0, "2": 0.0, "0": 0.5, "tie": 0.5}
    if not isinstance(votes, list | tuple) or not votes or any(isinstance(vote, bool) for vote in votes):
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
    ranks = list(range(len(values))) if ranks is None else ranks
    if not isinstance(ranks, list | tuple) or len(ranks) != len(values):
        raise RowRefused("bad_number")
    if any(isinstance(r, bool) or not isinstance(r, int | float) or not math.isfinite(r) for r in ranks):
        raise RowRefused("bad_number")
    prompt = _prompt(row["prompt"])
    kept: list[tuple[Any, float]] = []
    for value, rank in sorted(zip(values, ranks, strict=True), key=lambda pair: pair[1]):
        completion = _completion(value)
        if all(completion != other for other, _ in kept):
            kept.append((completion, rank))
    if len(kept) < 2:
        raise RowRefused("identical_completions")
    if len({rank for _, rank in kept}) == 1 and not keep_tied:
        raise RowRefused("all_tied")
    places = {rank: place for place, rank in enumerate(sorted({rank for _, rank in kept}))}
    return prompt, [completion for completion, _ in kept], [places[rank] for _, rank in kept]


def _pair(row: Row, explicit: bool) -> tuple[Prompt, list[Any]]:
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, list) and isinstance(rejected, list):
        both = [_messages(chosen), _messages(rejected)]
        if explicit and all(turns and turns[0]["role"] == "assistant" for turns in both):
            return _prompt(row["prompt"]), [_completion(turns) for turns in both]
        return _common_turns(*both)  # some sets repeat the prompt in both columns
    if explicit:
        return _prompt(row["prompt"]), [_completion(chosen), _completion(rejected)]
    texts = [_text(chosen, "empty_completion"), _text(rejected, "empty_completion")]
    if any(_MARKER.search("\n\n" + text.lstrip()) for text in texts):
        return _transcripts(*texts)
    return _common_text(*texts)


def _common_turns(chosen: list[Message], rejected: list[Message]) -> tuple[Prompt, list[Any]]:
    if chosen == rejected:
        raise RowRefused("identical_completions")
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if same is None or any(turns[same]["role"] != "assistant" for turns in (chosen, rejected)):
        raise RowRefused("prompts_differ")
    return _with_user(chosen[:same]), [_completion(chosen[same:]), _completion(rejected[same:])]


def _common_text(chosen: str, rejected: str) -> tuple[Prompt, list[Any]]:
    if chosen == rejected:
        raise RowRefused("identical_completions")
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if same is None:
        same = min(len(chosen), len(rejected))
    if same and chosen[same - 1] == " ":
        same -= 1  # the space belongs to the word after it
    prompt = _text(chosen[:same], "empty_prompt")
    return prompt, [_text(chosen[same:], "empty_completion"), _text(rejected[same:], "empty_completion")]


_MARKER = re.compile(r"\n\n(Human|Assistant):")
_INLINE = re.compile(r"\b(Human|Assistant) ?:")


def _transcripts(chosen: str, rejected: str) -> tuple[Prompt, list[Any]]:
    """Turns of two whole transcripts that share all but their last turn."""
    both = []
    for text in (chosen, rejected):
        head, *rest = _MARKER.split("\n\n" + text.lstrip())
        if head.strip():
            raise RowRefused("no_user_turn")
        roles = {"Human": "user", "Assistant": "assistant"}
        pairs = zip(rest[::2], rest[1::2], strict=True)
        both.append([{"role": roles[role], "content": content.strip()} for role, content in pairs])
    turns = both[0] + both[1]
    if any(not turn["content"] for turn in turns):
        raise RowRefused("empty_turn")
    if both[0][:-1] != both[1][:-1]:
        raise RowRefused("prompts_differ")
    for one in both:
        if [turn["role"] for turn in one] != ["user", "assistant"] * (len(one) // 2) or not one:
            raise RowRefused("turns_do_not_alternate")
    if any(_INLINE.search(turn["content"]) for turn in turns):
        raise RowRefused("inline_role_marker")
    return both[0][:-1], [[both[0][-1]], [both[1][-1]]]
