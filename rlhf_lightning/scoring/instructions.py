"""Instructions that a program can check by reading the completion: scores without a model.

In the manner of IFEval (Zhou et al., 2311.07911): each row of prompts names one of `CHECKS` in the column
``instruction`` and gives its arguments in ``arguments``; `with_instruction` writes such rows.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_lightning.errors import DataError, SettingError
from rlhf_lightning.scoring.scorer import Scorer, Scores, column
from rlhf_lightning.types import Prompt

WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
FENCE = re.compile(r"\A```[A-Za-z]*\s*(.*?)\s*(?:```)?\Z", re.DOTALL)

RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "at least": operator.ge,
    "less than": operator.lt,
    "at most": operator.le,
    "exactly": operator.eq,
}
"""Comparisons of a count with the asked number."""


def holds(relation: str, count: int, asked: int) -> bool:
    """Return whether a count stands in a relation to the asked number.

    Raises:
        SettingError: there is no such relation.
    """
    if relation not in RELATIONS:
        raise SettingError("unknown-choice", f"there is no relation {relation!r}; choose one of {', '.join(RELATIONS)}")
    return RELATIONS[relation](count, asked)


def words(text: str) -> list[str]:
    """Return the words of a text in lower case; apostrophes and hyphens join words."""
    return [word.lower() for word in WORD.findall(text)]


def sentences(text: str) -> list[str]:
    """Return the sentences of a text, split at full stops, question and exclamation marks."""
    return [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if WORD.search(part)]


def paragraphs(text: str) -> list[str]:
    """Return the parts of a text between empty lines."""
    return [part for part in re.split(r"\n\s*\n", text.strip()) if part.strip()]


def bullets(text: str) -> list[str]:
    """Return the lines that are bullet points: a hyphen or asterisk, a space, and text."""
    return re.findall(r"^[^\S\n]*[-*] +\S.*$", text, re.MULTILINE)


def highlights(text: str) -> list[str]:
    """Return the parts of a line between single or double asterisks."""
    found = re.findall(r"\*\*([^*\n]+)\*\*|\*([^*\n]+)\*", text)
    return [part for pair in found for part in pair if part.strip()]


def capital_words(text: str) -> list[str]:
    """Return the words that are written in capitals."""
    return [word for word in WORD.findall(text) if word.isupper()]


def divided(text: str, divider: str) -> list[str] | None:
    """Return the parts between dividers, which may open and close the text; None if two dividers enclose nothing."""
    first, *inner, last = ["", *text.split(divider), ""]
    parts = [part.strip() for part in inner]
    if any(not part for part in parts[1:-1]):
        return None
    return [part for part in [first, *parts, last] if part]


def occurrences(text: str, phrase: str, whole: bool) -> int:
    """Count a phrase without regard to case; with ``whole`` only where no word continues at either side."""
    pattern = rf"(?<!\w){re.escape(phrase)}(?!\w)" if whole else re.escape(phrase)
    return len(re.findall(pattern, text, re.IGNORECASE))


def is_json(text: str, fenced: bool = False) -> bool:
    """Return whether a text is JSON and nothing else; ``fenced`` allows a Markdown fence around it."""
    if fenced and (found := FENCE.match(text.strip())):
        text = found.group(1)
    try:
        json.loads(text, parse_constant=lambda name: float("nan"))
    except (ValueError, RecursionError):
        return False
    return True


def is_quoted(text: str) -> bool:
    """Return whether a text stands in double quotes."""
    text = text.strip()
    return len(text) > 2 and text[0] == text[-1] == '"'


def has_title(text: str) -> bool:
    """Return whether a text contains a title in double angular brackets."""
    return bool(re.search(r"<<[^<>\n]*\w[^<>\n]*>>", text))


def has_postscript(text: str, marker: str = "P.S.") -> bool:
    """Return whether a text contains a postscript: its marker, with or without spaces, and text after it."""
    letters = re.findall(r"\w", marker)
    return bool(re.search(r"\.[^\S\n]?".join(map(re.escape, letters)) + r"\.?\s*[^\s.]", text, re.IGNORECASE))


def begins(text: str, phrase: str) -> bool:
    """Return whether a text begins with a phrase, without regard to case and outer spaces."""
    return text.strip().lower().startswith(phrase.strip().lower())


def ends(text: str, phrase: str, ignored: str = '"') -> bool:
    """Return whether a text ends with a phrase and any ``ignored`` marks, without regard to case and outer spaces."""
    return text.strip().rstrip(ignored).lower().endswith(phrase.strip().rstrip(ignored).lower())


def contains_any(text: str, phrases: Sequence[str]) -> bool:
    """Return whether a text contains one of the phrases."""
    return any(phrase in text for phrase in phrases)


class Instruction(NamedTuple):
    """One kind of instruction.

    Attributes:
        text: the request, with the arguments' names in braces.
        kept: whether a completion keeps it, called with the completion and the arguments by name.
    """

    text: str
    kept: Callable[..., bool]


CHECKS: dict[str, Instruction] = {
    "at_most_words": Instruction(
        "Answer in at most {count} words.", lambda text, count: holds("at most", len(words(text)), count)
    ),
    "at_least_words": Instruction(
        "Answer in at least {count} words.", lambda text, count: holds("at least", len(words(text)), count)
    ),
    "sentences": Instruction("Answer in exactly {count} sentences.", lambda text, count: len(sentences(text)) == count),
    "paragraphs": Instruction(
        "Answer in exactly {count} paragraphs, with an empty line between them.",
        lambda text, count: len(paragraphs(text)) == count,
    ),
    "keyword": Instruction("Use the word {word!r}.", lambda text, word: occurrences(text, word, True) > 0),
    "keyword_times": Instruction(
        "Use the word {word!r} at least {count} times.",
        lambda text, word, count: occurrences(text, word, True) >= count,
    ),
    "forbidden": Instruction("Do not use the word {word!r}.", lambda text, word: not occurrences(text, word, True)),
    "lowercase": Instruction("Write everything in lower case.", lambda text: text == text.lower() != text.upper()),
    "uppercase": Instruction("Write everything in CAPITALS.", lambda text: text == text.upper() != text.lower()),
    "no_commas": Instruction("Do not use any comma.", lambda text: "," not in text),
    "starts_with": Instruction("Begin your answer with {phrase!r}.", begins),
    "ends_with": Instruction("End your answer with {phrase!r}.", lambda text, phrase: ends(text, phrase, ".!\"'")),
    "bullets": Instruction(
        "Answer with exactly {count} bullet points, each on a line that begins with '- '.",
        lambda text, count: len(bullets(text)) == count,
    ),
    "json": Instruction("Answer with valid JSON and nothing else.", is_json),
    "quoted": Instruction("Put your whole answer in double quotes.", is_quoted),
    "title": Instruction("Give your answer a title in double angular brackets, like <<title>>.", has_title),
    "postscript": Instruction("Add a postscript that begins with P.S.", has_postscript),
    "digits": Instruction("Use at least one number written in digits.", lambda text: bool(re.search(r"\d", text))),
    "no_digits": Instruction("Use no digits.", lambda text: not re.search(r"\d", text)),
    "question": Instruction("End your answer with a question.", lambda text: text.strip().endswith("?")),
}
"""Every instruction, by name. A completion without a letter or digit keeps none."""


def with_instruction(prompt: str, name: str, **arguments: Any) -> dict[str, Any]:
    """Return a row of prompts that asks for an instruction to be kept.

    Args:
        prompt: the request itself.
        name: key of `CHECKS`.
        arguments: arguments of the instruction.

    Raises:
        DataError: there is no such instruction.
    """
    asked = f"{prompt.strip()}\n\n{_instruction(name).text.format(**arguments)}"
    return {"prompt": [{"role": "user", "content": asked}], "instruction": name, "arguments": json.dumps(arguments)}


class InstructionScorer(Scorer):
    """1 where a completion keeps its row's instruction, else 0.

    The data needs the columns ``instruction`` (a key of `CHECKS`) and ``arguments`` (a mapping, or one as JSON). A row
    without an instruction has no score.
    """

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        names, arguments = (column(columns, name, self) for name in ("instruction", "arguments"))
        rows = zip(completions, names, arguments, strict=True)
        return [None if name is None else float(kept(text, name, given)) for text, name, given in rows]


def kept(completion: str, name: str, arguments: str | Mapping[str, Any] | None) -> bool:
    """Return whether a completion keeps an instruction.

    Raises:
        DataError: the instruction is unknown, or its arguments do not fit.
    """
    instruction = _instruction(name)
    try:
        given = json.loads(arguments) if isinstance(arguments, str) else dict(arguments or {})
        return bool(words(completion)) and bool(instruction.kept(completion, **given))
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError("wrong-arguments", f"the arguments of instruction {name!r} do not fit: {arguments}") from error


def _instruction(name: str) -> Instruction:
    if name not in CHECKS:
        raise DataError("unknown-instruction", f"there is no instruction {name!r}; choose one of {', '.join(CHECKS)}")
    return CHECKS[name]
