"""Import records of Argilla and Label Studio as items with judgements, and export a store in their formats.

Argilla records are the output of ``dataset.records.to_json`` (version 2): ``fields``, and ``responses`` by question.
Label Studio records are its JSON export: ``data``, and ``annotations`` with a ``result`` each. A record becomes an
item: one field is the prompt, two or more are completions. Supported answers are choices between two completions,
choices of the best of several, rankings, and ties. A skipped, discarded or cancelled answer is a judgement without
opinion.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from rlhf_lightning.data.canonical import RowRefused
from rlhf_lightning.data.feedback.database import items_of, judgements_of
from rlhf_lightning.data.feedback.records import (
    LONGEST_SECONDS,
    MOST_CANDIDATES,
    Answer,
    Candidate,
    Item,
    JudgementRefused,
    StoredJudgement,
    encoded,
    text_of,
)
from rlhf_lightning.data.turns import completion_of, prompt_of
from rlhf_lightning.errors import DataError
from rlhf_lightning.loading import is_too_deep
from rlhf_lightning.types import Prompt

Tool = Literal["argilla", "label-studio"]

PROMPT_FIELDS = ("prompt", "instruction", "question", "query", "input", "messages", "conversation", "context", "chat")
"""Field names that are recognised as the prompt."""

NUMBERED = re.compile(r"(.{1,100}?)[-_ ]?(\d{1,9}|[a-hA-H])")
"""Name of a completion field: ``completion_1``, ``response-2``, ``answerA``."""

TIES = {"tie", "equal", "same", "both", "draw", "both_good", "no_preference"}
BOTH_BAD = {"both_bad", "neither", "none", "bad"}
SIDES = {"left": 0, "right": 1, "first": 0, "second": 1}


class Imported(NamedTuple):
    """An item, and answers by annotator name; completions are numbered as in the item."""

    item: Item
    answers: list[tuple[str, Answer]]


def read_record(
    record: Any, tool: Tool, prompt: str | None = None, completions: Sequence[str] = ()
) -> Imported:  # fmt: skip
    """Read a record.

    Args:
        record: an Argilla record, or a Label Studio task.
        tool: the tool that wrote it.
        prompt: name of the prompt field; None searches `PROMPT_FIELDS`.
        completions: names of the completion fields; if empty, numbered fields of one name are used.

    Raises:
        DataError: the record lacks such fields, or an answer cannot be read.
    """
    part = "fields" if tool == "argilla" else "data"
    fields = record.get(part) if isinstance(record, Mapping) else None
    if not isinstance(fields, Mapping):
        raise DataError("not-a-record", f"a record has no {part}: export the records of {tool} as JSON")
    asked = prompt or next((name for name in PROMPT_FIELDS if name in fields), "")
    names = list(completions) or numbered(fields)
    missing = [name for name in (asked, *names) if name not in fields]
    if missing or not 2 <= len(names) <= MOST_CANDIDATES:
        raise DataError(
            "no-such-field",
            f"a record has the fields {', '.join(map(str, fields))}: name the prompt's with --prompt_field, and those "
            f"of 2 to {MOST_CANDIDATES} completions with --completion_fields",
        )
    others = {name: value for name, value in fields.items() if name not in (asked, *names)}
    metadata = record.get("metadata") if tool == "argilla" else None
    if not isinstance(metadata, Mapping | None) or is_too_deep([fields, metadata]):
        raise DataError("not-a-record", f"a record's metadata are no object, or its {part} are nested too deep")
    try:
        candidates = tuple(Candidate(completion_of(fields[name])) for name in names)
        item = Item(prompt_of(fields[asked]), candidates, {**others, **(metadata or {})})
        encoded([item.prompt, [one.completion for one in candidates], item.columns]).encode()
    except (RowRefused, UnicodeError) as error:
        raise DataError("unreadable-record", f"a record cannot be read: {error}") from None
    answers = list((_of_argilla if tool == "argilla" else _of_label_studio)(record, names))
    try:
        for _, answer in answers:
            answer.check(len(names))
    except JudgementRefused as error:
        raise DataError("unreadable-answer", f"an answer cannot be read: {error}") from None
    return Imported(item, answers)


def numbered(fields: Mapping[str, Any]) -> list[str]:
    """Return the largest set of numbered fields with the same name, in numerical order."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name in fields:
        if match := NUMBERED.fullmatch(name):
            found.setdefault(match[1], []).append((match[2].lower().rjust(9, "0"), name))
    most: list[tuple[str, str]] = max(found.values(), key=len) if found else []
    return [name for _, name in sorted(most)]


def _of_argilla(record: Mapping[str, Any], names: Sequence[str]) -> Iterator[tuple[str, Answer]]:
    responses = record.get("responses") or {}
    if not isinstance(responses, Mapping):
        raise _unreadable(responses)
    seen = set()
    for many in responses.values():
        for one in many if isinstance(many, list) else [many]:
            if not isinstance(one, Mapping):
                raise _unreadable(one)
            user = _name(one.get("user_id"))
            skipped = one.get("status") == "discarded" or record.get("status") == "discarded"
            answer = Answer("skip") if skipped else _answer(one.get("value"), names)
            if answer is not None and user not in seen and one.get("status") != "draft":
                seen.add(user)  # a user's further answers do not concern the preference
                yield user, answer


def _of_label_studio(record: Mapping[str, Any], names: Sequence[str]) -> Iterator[tuple[str, Answer]]:
    annotations = record.get("annotations") or []
    for one in annotations if isinstance(annotations, list) else [annotations]:
        if not isinstance(one, Mapping) or not isinstance(one.get("result", []), list):
            raise _unreadable(one)
        who = one.get("completed_by")
        user = _name(who.get("email") or who.get("id") if isinstance(who, Mapping) else who)
        if one.get("was_cancelled"):
            yield user, Answer("skip")
            continue
        values = [result.get("value") for result in one.get("result", []) if isinstance(result, Mapping)]
        found = [answer for value in values if (answer := _answer(_plain(value), names)) is not None]
        if found:
            seconds = one.get("lead_time") or 0.0
            timed = isinstance(seconds, int | float) and 0 <= seconds <= LONGEST_SECONDS
            answer = found[0]
            yield user, Answer(answer.verdict, answer.ranks, seconds=float(seconds) if timed else 0.0)


def _plain(value: Any) -> Any:
    """Return the choice in a Label Studio value: of a pairwise, a choices or a ranker tag."""
    if not isinstance(value, Mapping):
        return None
    if "selected" in value:
        return value["selected"]
    if isinstance(value.get("choices"), list) and len(value["choices"]) == 1:
        return value["choices"][0]
    ranker = value.get("ranker")
    return next(iter(ranker.values()), None) if isinstance(ranker, Mapping) else ranker


def _answer(value: Any, names: Sequence[str]) -> Answer | None:
    """Read a choice or a ranking; None for other values, such as the answer to another question."""
    if isinstance(value, str):
        key = value.strip().lower().replace(" ", "_")
        if value in names or key in SIDES and len(names) == 2:
            best = names.index(value) if value in names else SIDES[key]
            return Answer("ranking", tuple(int(place != best) for place in range(len(names))))
        return Answer("tie") if key in TIES else Answer("both_bad") if key in BOTH_BAD else None
    if not isinstance(value, list) or not value:
        return None
    if all(isinstance(one, str) for one in value):
        value = [{"value": one, "rank": place} for place, one in enumerate(value)]
    if not all(isinstance(one, Mapping) and isinstance(one.get("value"), str) for one in value):
        return None
    given = {one["value"]: one.get("rank") for one in value}
    if set(given) != set(names) or not all(isinstance(rank, int | float) for rank in given.values()):
        return None
    if any(rank - rank != 0 for rank in given.values()):  # NaN or infinite
        return None
    levels = sorted(set(given.values()))
    return Answer("tie") if len(levels) == 1 else Answer("ranking", tuple(levels.index(given[one]) for one in names))


def _name(user: Any) -> str:
    """Return an annotator name with only letters, digits and ``_.@-``."""
    text = re.sub(r"[^A-Za-z0-9_.@-]", "-", str("unknown" if user is None else user))[:64].strip("_.@-")
    return text or "unknown"


def _unreadable(value: Any) -> DataError:
    return DataError(
        "unreadable-answer", f"an answer cannot be read: found a {type(value).__name__}, expected an object"
    )


# ---- writing ---------------------------------------------------------------------------------------------------------


def records_of(connection: sqlite3.Connection, tool: Tool, upto: int, annotators: Sequence[str] | None = None) -> list[
    dict[str, Any]
]:  # fmt: skip
    """Return the items of a store with the judgements that were valid at row ``upto``, excluding hidden repeats."""
    judged: dict[int, list[StoredJudgement]] = {}
    for one in judgements_of(connection, upto):
        if not one.repeat and (annotators is None or one.annotator in annotators):
            judged.setdefault(one.item, []).append(one)
    write = _argilla_record if tool == "argilla" else _label_studio_task
    return [write(item, judged.get(item.id, [])) for item in items_of(connection)]


def _names(item: Item) -> list[str]:
    return [f"completion_{place}" for place in range(1, len(item.candidates) + 1)]


def _fields(item: Item) -> dict[str, Any]:
    return {"prompt": item.prompt, **dict(zip(_names(item), (one.text for one in item.candidates), strict=True))}


def _choice(one: StoredJudgement, names: Sequence[str]) -> Any:
    """Return a judgement as a completion name, a ranking, ``tie`` or ``both_bad``."""
    if one.ranks is None:
        return one.verdict
    if len(names) == 2:
        return names[one.ranks.index(0)]
    return [{"value": name, "rank": rank + 1} for name, rank in zip(names, one.ranks, strict=True)]


def _argilla_record(item: Item, judged: Sequence[StoredJudgement]) -> dict[str, Any]:
    names = _names(item)
    responses = [
        {"value": None if one.verdict == "skip" else _choice(one, names), "user_id": one.annotator,
         "status": "discarded" if one.verdict == "skip" else "submitted"}
        for one in judged
    ]  # fmt: skip
    status = "completed" if any(one.verdict != "skip" for one in judged) else "pending"
    return {"id": str(item.id), "status": status, "fields": _fields(item), "metadata": item.columns,
            "responses": {"preference": responses} if responses else {}, "suggestions": {}, "vectors": {}}  # fmt: skip


def _label_studio_task(item: Item, judged: Sequence[StoredJudgement]) -> dict[str, Any]:
    names = _names(item)
    fields = {**_fields(item), "prompt": _as_one_text(item.prompt)}  # Label Studio's templates show plain text
    annotations = []
    for one in judged:
        choice = _choice(one, names)
        result: dict[str, Any] = {"from_name": "preference", "to_name": ",".join(names)}
        if isinstance(choice, list):
            ordered = [entry["value"] for entry in sorted(choice, key=lambda entry: entry["rank"])]
            tied = len({entry["rank"] for entry in choice}) < len(choice)
            result |= {"type": "ranker", "value": {"ranker": {"_": choice if tied else ordered}}}
        elif choice in names:
            result |= {"type": "pairwise", "value": {"selected": ("left", "right")[names.index(choice)]}}
        else:
            result |= {"type": "choices", "value": {"choices": [choice]}}
        skipped = one.verdict == "skip"
        annotations.append({"completed_by": one.annotator, "created_at": one.judged, "lead_time": one.seconds,
                            "was_cancelled": skipped, "result": [] if skipped else [result]})  # fmt: skip
    return {"id": item.id, "data": {**item.columns, **fields}, "annotations": annotations}


def _as_one_text(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    return text_of(prompt) if len(prompt) == 1 else "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
