"""What can be read off a text: the predicates and counts that every check of instructions is made of."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Sequence

from rlhf_lightning.errors import SettingError

WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
FENCE = re.compile(r"\A```[A-Za-z]*\s*(.*?)\s*(?:```)?\Z", re.DOTALL)

RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "at least": operator.ge,
    "less than": operator.lt,
    "at most": operator.le,
    "exactly": operator.eq,
}
"""How a count is compared with what was asked for."""


def holds(relation: str, count: int, asked: int) -> bool:
    """Return whether a count stands in a relation to what was asked for.

    Raises:
        SettingError: there is no such relation.
    """
    if relation not in RELATIONS:
        raise SettingError("unknown-choice", f"there is no relation {relation!r}; choose one of {', '.join(RELATIONS)}")
    return RELATIONS[relation](count, asked)


# -- parts of a text --------------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """Return the words of a text in lower case; what an apostrophe or a hyphen joins is one word."""
    return [word.lower() for word in WORD.findall(text)]


def sentences(text: str) -> list[str]:
    """Return the sentences of a text: what ends in a full stop, question or exclamation mark, and what is left."""
    return [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if WORD.search(part)]


def paragraphs(text: str) -> list[str]:
    """Return the parts of a text that empty lines separate."""
    return [part for part in re.split(r"\n\s*\n", text.strip()) if part.strip()]


def bullets(text: str) -> list[str]:
    """Return the lines of a text that are bullet points: a hyphen or asterisk, a space, and something."""
    return re.findall(r"^[^\S\n]*[-*] +\S.*$", text, re.MULTILINE)


def highlights(text: str) -> list[str]:
    """Return what stands between single or double asterisks on one line."""
    found = re.findall(r"\*\*([^*\n]+)\*\*|\*([^*\n]+)\*", text)
    return [part for pair in found for part in pair if part.strip()]


def capital_words(text: str) -> list[str]:
    """Return the words of a text that are written in capitals."""
    return [word for word in WORD.findall(text) if word.isupper()]


def divided(text: str, divider: str) -> list[str] | None:
    """Return the parts that a divider separates; None where two dividers have nothing between them.

    A divider may open and close the text.
    """
    first, *inner, last = ["", *text.split(divider), ""]
    parts = [part.strip() for part in inner]
    if any(not part for part in parts[1:-1]):
        return None
    return [part for part in [first, *parts, last] if part]


# -- predicates -------------------------------------------------------------------------------------------------------


def occurrences(text: str, phrase: str, whole: bool) -> int:
    """Return how often a phrase occurs, without regard to case.

    Args:
        text: where to look.
        phrase: what to look for, as it stands.
        whole: count it only where no word goes on at either side.
    """
    pattern = rf"(?<!\w){re.escape(phrase)}(?!\w)" if whole else re.escape(phrase)
    return len(re.findall(pattern, text, re.IGNORECASE))


def is_json(text: str, fenced: bool = False) -> bool:
    """Return whether a text is JSON and nothing else; with ``fenced`` a markdown fence around it is no fault."""
    if fenced and (found := FENCE.match(text.strip())):
        text = found.group(1)
    try:
        json.loads(text, parse_constant=lambda name: float("nan"))
    except (ValueError, RecursionError):
        return False
    return True


def is_quoted(text: str) -> bool:
    """Return whether a text is something between double quotes."""
    text = text.strip()
    return len(text) > 2 and text[0] == text[-1] == '"'


def has_title(text: str) -> bool:
    """Return whether a text holds a title in double angular brackets."""
    return bool(re.search(r"<<[^<>\n]*\w[^<>\n]*>>", text))


def has_postscript(text: str, marker: str = "P.S.") -> bool:
    """Return whether a text holds a postscript: its marker, spaces between the letters or not, and something after."""
    letters = re.findall(r"\w", marker)
    return bool(re.search(r"\.[^\S\n]?".join(map(re.escape, letters)) + r"\.?\s*[^\s.]", text, re.IGNORECASE))


def begins(text: str, phrase: str) -> bool:
    """Return whether a text begins with a phrase, without regard to case and outer spaces."""
    return text.strip().lower().startswith(phrase.strip().lower())


def ends(text: str, phrase: str, ignored: str = '"') -> bool:
    """Return whether a text ends with a phrase, without regard to case, outer spaces and closing marks.

    Args:
        text: what should end so.
        phrase: the ending.
        ignored: marks that may follow the phrase.
    """
    return text.strip().rstrip(ignored).lower().endswith(phrase.strip().rstrip(ignored).lower())


def contains_any(text: str, phrases: Sequence[str]) -> bool:
    """Return whether a text holds one of the phrases as it stands."""
    return any(phrase in text for phrase in phrases)
