"""IFEval: 25 kinds of instructions that a program can check (Zhou et al., 2311.07911).

Written from the published definition of each kind. Two kinds ask for a language and a case: only the case is checked.
``language:response_language`` needs a language detector and is never checked. Sentences are split at their marks, so
counts of sentences and words can differ slightly from programs that use a trained tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from rlhf_lightning.errors import DataError
from rlhf_lightning.scoring import instructions as checks
from rlhf_lightning.scoring.instructions import holds
from rlhf_lightning.scoring.scorer import Measured, Scorer, Scores, column
from rlhf_lightning.types import Prompt

CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def _letters(text: str, letter: str, let_relation: str, let_frequency: int) -> bool:
    return holds(let_relation, text.lower().count(letter.lower()), let_frequency)


def _paragraph_count(text: str, num_paragraphs: int) -> bool:
    parts = checks.divided(text, "***")
    return parts is not None and len(parts) == num_paragraphs


def _nth_paragraph(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = checks.paragraphs(text)
    if len(parts) != num_paragraphs or not 1 <= nth_paragraph <= num_paragraphs:
        return False
    first = re.match(r"\W*([^\W_][\w'’-]*)", parts[nth_paragraph - 1])
    return first is not None and first[1].lower() == first_word.lower()


def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", text)) >= num_sections


def _two_responses(text: str) -> bool:
    parts = checks.divided(text, "******")
    return parts is not None and len(parts) == 2 and parts[0] != parts[1]


INSTRUCTIONS: dict[str, Callable[..., bool]] = {
    "keywords:existence": lambda text, keywords: all(checks.occurrences(text, word, False) for word in keywords),
    "keywords:frequency": lambda text, keyword, relation, frequency: holds(
        relation, checks.occurrences(text, keyword.strip(), False), frequency
    ),
    "keywords:forbidden_words": lambda text, forbidden_words: (
        not any(checks.occurrences(text, word, True) for word in forbidden_words)
    ),
    "keywords:letter_frequency": _letters,
    "length_constraints:number_sentences": lambda text, relation, num_sentences: holds(
        relation, len(checks.sentences(text)), num_sentences
    ),
    "length_constraints:number_paragraphs": _paragraph_count,
    "length_constraints:number_words": lambda text, relation, num_words: holds(
        relation, len(re.findall(r"\w+", text)), num_words
    ),
    "length_constraints:nth_paragraph_first_word": _nth_paragraph,
    "detectable_content:number_placeholders": lambda text, num_placeholders: (
        len(re.findall(r"\[[^\[\]\n]*\]", text)) >= num_placeholders
    ),
    "detectable_content:postscript": lambda text, postscript_marker: checks.has_postscript(text, postscript_marker),
    "detectable_format:number_bullet_lists": lambda text, num_bullets: len(checks.bullets(text)) == num_bullets,
    "detectable_format:constrained_response": lambda text: checks.contains_any(text, CONSTRAINED),
    "detectable_format:number_highlighted_sections": lambda text, num_highlights: (
        len(checks.highlights(text)) >= num_highlights
    ),
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": lambda text: checks.is_json(text, fenced=True),
    "detectable_format:title": checks.has_title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": lambda text, prompt_to_repeat: checks.begins(text, prompt_to_repeat),
    "startend:end_checker": lambda text, end_phrase: checks.ends(text, end_phrase),
    "startend:quotation": checks.is_quoted,
    "change_case:capital_word_frequency": lambda text, capital_relation, capital_frequency: holds(
        capital_relation, len(checks.capital_words(text)), capital_frequency
    ),
    "change_case:english_capital": str.isupper,
    "change_case:english_lowercase": str.islower,
    "punctuation:no_comma": lambda text: "," not in text,
}
"""Checked kinds by their published ids: functions of the completion and the kind's own arguments."""


def follows(completion: str, instruction_id: str, arguments: Mapping[str, Any] | None = None) -> bool | None:
    """Return whether a completion follows an instruction; None if that kind cannot be checked.

    Args:
        completion: the text; a blank one follows nothing.
        instruction_id: such as ``punctuation:no_comma``.
        arguments: the instruction's arguments by their published names; None values count as left out.

    Raises:
        DataError: the arguments do not fit the kind.
    """
    check = INSTRUCTIONS.get(instruction_id)
    if check is None:
        return None
    given = {name: value for name, value in (arguments or {}).items() if value is not None}
    try:
        return bool(completion.strip()) and bool(check(completion, **given))
    except (TypeError, AttributeError) as error:
        raise DataError(
            "wrong-arguments", f"the arguments of {instruction_id} do not fit: {given} ({error})"
        ) from error


class IFEvalScorer(Scorer):
    """The share of a row's instructions that its completion follows (instruction-level accuracy of a row).

    The data needs IFEval's columns ``instruction_id_list`` and ``kwargs``: a list of ids, and a list of mappings of the
    same length (each may be JSON or null). Kinds that cannot be checked are left out and counted in the metric
    ``unchecked_instructions``; a row of such kinds alone has no score.

    Args:
        strict: 1 where every checked instruction is followed, else 0 (prompt-level accuracy).
    """

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self._measured = Measured("unchecked_instructions")

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        ids, arguments = (map(_read, column(columns, name, self)) for name in ("instruction_id_list", "kwargs"))
        followed = [
            [follows(text, name, given) for name, given in zip(names, many, strict=True)]
            for text, names, many in zip(completions, ids, arguments, strict=True)
        ]
        self._measured.add("unchecked_instructions", [float(row.count(None)) for row in followed])
        return [self._score([found for found in row if found is not None]) for row in followed]

    def _score(self, checked: Sequence[bool]) -> float | None:
        if not checked:
            return None
        return float(all(checked)) if self.strict else sum(checked) / len(checked)

    def take_metrics(self) -> dict[str, Tensor]:
        return self._measured.take()


def _read(value: Any) -> list[Any]:
    return json.loads(value) if isinstance(value, str) else list(value or ())
