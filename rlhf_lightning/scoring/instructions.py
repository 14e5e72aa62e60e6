"""Score instructions that a program can check in the completion's text, without a model.

For `InstructionScorer` each row of prompts names an instruction in `CHECKS` in the column ``instruction`` and gives its
arguments in ``arguments``; `with_instruction` writes such rows. `IFEvalScorer` reads the rows of IFEval (Zhou et al.,
2311.07911) with 25 kinds of instructions, each implemented from its published definition. Two kinds ask for a language
and a letter case; only the case is checked. ``language:response_language`` needs a language detector and is never
checked. Sentences are split at punctuation, so counts of sentences and words can differ slightly from those of a
trained tokenizer.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from string import ascii_letters
from typing import Any, NamedTuple

from rlhf_lightning.errors import DataError, SettingError
from rlhf_lightning.scoring.scorer import Measured, Scorer, Scores, column
from rlhf_lightning.types import Prompt

WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")

RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "at least": operator.ge,
    "less than": operator.lt,
    "at most": operator.le,
    "exactly": operator.eq,
}
"""Comparisons of a count with the requested number."""


def holds(relation: str, count: int, asked: int) -> bool:
    """Return whether a count satisfies a relation to the requested number.

    Raises:
        SettingError: the relation is unknown.
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
    """Return the parts of lines between single or double asterisks."""
    found = re.findall(r"\*\*([^*\n]+)\*\*|\*([^*\n]+)\*", text)
    return [part for pair in found for part in pair if part.strip()]


def capital_words(text: str) -> list[str]:
    """Return the words that are written in capitals."""
    return [word for word in WORD.findall(text) if word.isupper()]


def divided(text: str, divider: str) -> list[str] | None:
    """Return the parts between dividers, which may begin and end the text; None if two dividers enclose nothing."""
    first, *inner, last = ["", *text.split(divider), ""]
    parts = [part.strip() for part in inner]
    if any(not part for part in parts[1:-1]):
        return None
    return [part for part in [first, *parts, last] if part]


def occurrences(text: str, phrase: str, whole: bool) -> int:
    """Count a phrase, ignoring case; with ``whole``, only as whole words."""
    pattern = rf"(?<!\w){re.escape(phrase)}(?!\w)" if whole else re.escape(phrase)
    return len(re.findall(pattern, text, re.IGNORECASE))


def is_json(text: str, fenced: bool = False) -> bool:
    """Return whether a text is JSON and nothing else; ``fenced`` allows a Markdown fence around it."""
    if fenced and text.lstrip().startswith("```"):
        text = text.strip()[3:].lstrip(ascii_letters).removesuffix("```").strip()
    try:
        json.loads(text, parse_constant=lambda name: float("nan"))
    except (ValueError, RecursionError):
        return False
    return True


def is_quoted(text: str) -> bool:
    """Return whether a text is enclosed in double quotes."""
    text = text.strip()
    return len(text) > 2 and text[0] == text[-1] == '"'


def has_title(text: str) -> bool:
    """Return whether a text contains a title in double angular brackets."""
    return bool(re.search(r"<<(?=[^<>\n]*\w)[^<>\n]*>>", text))


def has_postscript(text: str, marker: str = "P.S.") -> bool:
    """Return whether a text contains a postscript: the marker, with or without spaces, and text after it."""
    letters = re.findall(r"\w", marker)
    return bool(re.search(r"\.[^\S\n]?".join(map(re.escape, letters)) + r"\.?\s*[^\s.]", text, re.IGNORECASE))


def begins(text: str, phrase: str) -> bool:
    """Return whether a text begins with a phrase, ignoring case and outer spaces."""
    return text.strip().lower().startswith(phrase.strip().lower())


def ends(text: str, phrase: str, ignored: str = '"') -> bool:
    """Return whether a text ends with a phrase and any ``ignored`` marks, ignoring case and outer spaces."""
    return text.strip().rstrip(ignored).lower().endswith(phrase.strip().rstrip(ignored).lower())


class Instruction(NamedTuple):
    """Kind of instruction: its text and its check."""

    text: str  # the request, with the arguments' names in braces
    kept: Callable[..., bool]  # whether a completion follows it; called with the completion and the arguments by name


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
"""All instructions by name. A completion without a letter or digit follows none of them."""


def with_instruction(prompt: str, name: str, **arguments: Any) -> dict[str, Any]:
    """Return a row of prompts with an instruction added to the prompt.

    Args:
        prompt: the request itself.
        name: key of `CHECKS`.
        arguments: arguments of the instruction.

    Raises:
        DataError: the instruction is unknown.
    """
    asked = f"{prompt.strip()}\n\n{_instruction(name).text.format(**arguments)}"
    return {"prompt": [{"role": "user", "content": asked}], "instruction": name, "arguments": json.dumps(arguments)}


class InstructionScorer(Scorer):
    """Score 1 if a completion follows its row's instruction, else 0.

    The data needs the columns ``instruction`` (a key of `CHECKS`) and ``arguments`` (a mapping, or a mapping as JSON).
    A row without an instruction has no score.
    """

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        names, arguments = (column(columns, name, self) for name in ("instruction", "arguments"))
        rows = zip(completions, names, arguments, strict=True)
        return [None if name is None else float(kept(text, name, given)) for text, name, given in rows]


def kept(completion: str, name: str, arguments: str | Mapping[str, Any] | None) -> bool:
    """Return whether a completion follows an instruction.

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


# -- IFEval -----------------------------------------------------------------------------------------------------------

CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def _letters(text: str, letter: str, let_relation: str, let_frequency: int) -> bool:
    return holds(let_relation, text.lower().count(letter.lower()), let_frequency)


def _paragraph_count(text: str, num_paragraphs: int) -> bool:
    parts = divided(text, "***")
    return parts is not None and len(parts) == num_paragraphs


def _nth_paragraph(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = paragraphs(text)
    if len(parts) != num_paragraphs or not 1 <= nth_paragraph <= num_paragraphs:
        return False
    first = re.match(r"\W*([^\W_][\w'’-]*)", parts[nth_paragraph - 1])
    return first is not None and first[1].lower() == first_word.lower()


def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", text)) >= num_sections


def _two_responses(text: str) -> bool:
    parts = divided(text, "******")
    return parts is not None and len(parts) == 2 and parts[0] != parts[1]


INSTRUCTIONS: dict[str, Callable[..., bool]] = {
    "keywords:existence": lambda text, keywords: all(occurrences(text, word, False) for word in keywords),
    "keywords:frequency": lambda text, keyword, relation, frequency: holds(
        relation, occurrences(text, keyword.strip(), False), frequency
    ),
    "keywords:forbidden_words": lambda text, forbidden_words: (
        not any(occurrences(text, word, True) for word in forbidden_words)
    ),
    "keywords:letter_frequency": _letters,
    "length_constraints:number_sentences": lambda text, relation, num_sentences: holds(
        relation, len(sentences(text)), num_sentences
    ),
    "length_constraints:number_paragraphs": _paragraph_count,
    "length_constraints:number_words": lambda text, relation, num_words: holds(
        relation, len(re.findall(r"\w+", text)), num_words
    ),
    "length_constraints:nth_paragraph_first_word": _nth_paragraph,
    "detectable_content:number_placeholders": lambda text, num_placeholders: (
        len(re.findall(r"\[[^\[\]\n]*\]", text)) >= num_placeholders
    ),
    "detectable_content:postscript": lambda text, postscript_marker: has_postscript(text, postscript_marker),
    "detectable_format:number_bullet_lists": lambda text, num_bullets: len(bullets(text)) == num_bullets,
    "detectable_format:constrained_response": lambda text: any(phrase in text for phrase in CONSTRAINED),
    "detectable_format:number_highlighted_sections": lambda text, num_highlights: (
        len(highlights(text)) >= num_highlights
    ),
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": lambda text: is_json(text, fenced=True),
    "detectable_format:title": has_title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": lambda text, prompt_to_repeat: begins(text, prompt_to_repeat),
    "startend:end_checker": lambda text, end_phrase: ends(text, end_phrase),
    "startend:quotation": is_quoted,
    "change_case:capital_word_frequency": lambda text, capital_relation, capital_frequency: holds(
        capital_relation, len(capital_words(text)), capital_frequency
    ),
    "change_case:english_capital": str.isupper,
    "change_case:english_lowercase": str.islower,
    "punctuation:no_comma": lambda text: "," not in text,
}
"""Checked kinds by their published ids: functions of the completion and the kind's own arguments."""


def follows(completion: str, instruction_id: str, arguments: Mapping[str, Any] | None = None) -> bool | None:
    """Return whether a completion follows an instruction; None if this kind cannot be checked.

    Args:
        completion: the text; a blank text follows no instruction.
        instruction_id: such as ``punctuation:no_comma``.
        arguments: the instruction's arguments by their published names; None values are ignored.

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
    """Share of a row's instructions that its completion follows (instruction-level accuracy of a row).

    The data needs IFEval's columns ``instruction_id_list`` and ``kwargs``: a list of ids, and a list of mappings of the
    same length (each may be JSON or null). Kinds that cannot be checked are left out and counted in the metric
    ``unchecked_instructions``. A row with only such kinds has no score.

    Args:
        strict: score 1 if every checked instruction is followed, else 0 (prompt-level accuracy).
    """

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self.measured = Measured("unchecked_instructions")

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        ids, arguments = (map(_read, column(columns, name, self)) for name in ("instruction_id_list", "kwargs"))
        followed = [
            [follows(text, name, given) for name, given in zip(names, many, strict=True)]
            for text, names, many in zip(completions, ids, arguments, strict=True)
        ]
        self.measured.add("unchecked_instructions", [float(row.count(None)) for row in followed])
        return [self._score([found for found in row if found is not None]) for row in followed]

    def _score(self, checked: Sequence[bool]) -> float | None:
        if not checked:
            return None
        return float(all(checked)) if self.strict else sum(checked) / len(checked)


def _read(value: Any) -> list[Any]:
    return json.loads(value) if isinstance(value, str) else list(value or ())
