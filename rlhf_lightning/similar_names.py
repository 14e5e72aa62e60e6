"""Hints for error messages: the known names that an unknown name probably means."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

ALIKE = 0.6
"""Likeness from which a known name is the one that was meant."""

VAGUELY_ALIKE = 0.5
"""Likeness from which a known name is worth showing; below it, names share only a few letters."""

FEW = 12
"""Largest number of names that a message lists in full."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the most similar known name, or None.

    Initials (``lr`` for ``learning_rate``), whole words (``epochs`` for ``max_epochs``, ``beta`` for ``model.beta``)
    and beginnings (``DPO`` for ``DPOModule``) count as similar too.
    """
    best = next(iter(_by_likeness(name, known)), None)
    return best if best is not None and _likeness(name, best) >= ALIKE else None


def hint_at(name: str, known: Iterable[str]) -> str:
    """Return a hint at known names: the one that was meant, all of a few, or up to three that resemble it of many."""
    names = _by_likeness(name, known)
    near = nearest(name, names)
    if near is not None:
        return f"did you mean {near}?"
    if len(names) <= FEW:
        return f"there are {', '.join(sorted(names))}." if names else "there are none."
    alike = [one for one in names[:3] if _likeness(name, one) >= VAGUELY_ALIKE]
    return f"the nearest of {len(names)}: {', '.join(alike)}." if alike else f"none of {len(names)} names resembles it."


def _by_likeness(name: str, known: Iterable[str]) -> list[str]:
    return sorted(set(known), key=lambda candidate: (-_likeness(name, candidate), candidate))


def _likeness(name: str, candidate: str) -> float:
    """Return how similar two names are, from 0 to 1."""
    short, long = name.lower().replace("_", ""), candidate.lower().replace("_", "")
    words, given = _words(candidate), _words(name)
    score = difflib.SequenceMatcher(None, short, long).ratio()
    if len(words) > 1 and short == "".join(word[:1] for word in words):
        score = max(score, 0.95)
    if set(given) < set(words) or (len(short) > 2 and long.startswith(short)):
        score = max(score, 0.8 + 0.1 * score)
    return score


def _words(name: str) -> list[str]:
    return re.split(r"[._/]", name.lower())
