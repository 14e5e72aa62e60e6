"""Instructions whose keeping can be checked by reading the completion: scores that need no model.

In the manner of IFEval (Zhou et al., 2311.07911): each row of prompts names one of `CHECKS` in the column
``instruction`` and gives its arguments in ``arguments``; `with_instruction` writes such rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_lightning.scoring.base import Scorer
from rlhf_lightning.types import Prompt

WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


class Instruction(NamedTuple):
    """One kind of instruction.

    Attributes:
        text: what is asked, with the arguments' names in braces.
        kept: whether a completion keeps it, called with the completion and the arguments by name.
    """

    text: str
    kept: Callable[..., bool]


def words(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return [word.lower() for word in WORD.findall(text)]


def sentences(text: str) -> list[str]:
    """Return the sentences of a text: what ends in a full stop, question or exclamation mark, and what is left."""
    return [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if WORD.search(part)]


def paragraphs(text: str) -> list[str]:
    """Return the parts of a text that empty lines separate."""
    return [part for part in re.split(r"\n\s*\n", text.strip()) if part.strip()]


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=lambda name: float("nan"))
    except (ValueError, RecursionError):
        return False
    return True


CHECKS: dict[str, Instruction] = {
    "at_most_words": Instruction("Answer in at most {count} words.", lambda text, count: 0 < len(words(text)) <= count),
    "at_least_words": Instruction("Answer in at least {count} words.", lambda text, count: len(words(text)) >= count),
    "sentences": Instruction("Answer in exactly {count} sentences.", lambda text, count: len(sentences(text)) == count),
    "paragraphs": Instruction(
        "Answer in exactly {count} paragraphs, with an empty line between them.",
        lambda text, count: len(paragraphs(text)) == count,
    ),
    "keyword": Instruction("Use the word {word!r}.", lambda text, word: word.lower() in words(text)),
    "keyword_times": Instruction(
        "Use the word {word!r} at least {count} times.",
        lambda text, word, count: words(text).count(word.lower()) >= count,
    ),
    "forbidden": Instruction(
        "Do not use the word {word!r}.", lambda text, word: bool(words(text)) and word.lower() not in words(text)
    ),
    "lowercase": Instruction("Write everything in lower case.", lambda text: text == text.lower() != text.upper()),
    "uppercase": Instruction("Write everything in CAPITALS.", lambda text: text == text.upper() != text.lower()),
    "no_commas": Instruction("Do not use any comma.", lambda text: bool(words(text)) and "," not in text),
    "starts_with": Instruction(
        "Begin your answer with {phrase!r}.", lambda text, phrase: text.strip().lower().startswith(phrase.lower())
    ),
    "ends_with": Instruction(
        "End your answer with {phrase!r}.",
        lambda text, phrase: text.strip().rstrip(".!\"'").lower().endswith(phrase.rstrip(".!").lower()),
    ),
    "bullets": Instruction(
        "Answer with exactly {count} bullet points, each on a line that begins with '- '.",
        lambda text, count: len(re.findall(r"^\s*[-*] +\S", text, re.MULTILINE)) == count,
    ),
    "json": Instruction("Answer with valid JSON and nothing else.", _is_json),
    "quoted": Instruction(
        "Put your whole answer in double quotes.",
        lambda text: len(text.strip()) > 2 and text.strip()[0] == '"' and text.strip()[-1] == '"',
    ),
    "title": Instruction(
        "Give your answer a title in double angular brackets, like <<title>>.",
        lambda text: bool(re.search(r"<<[^<>\n]*\w[^<>\n]*>>", text)),
    ),
    "postscript": Instruction(
        "Add a postscript that begins with P.S.", lambda text: bool(re.search(r"P\.S\.\s*\S", text))
    ),
    "digits": Instruction("Use at least one number written in digits.", lambda text: bool(re.search(r"\d", text))),
    "no_digits": Instruction("Use no digits.", lambda text: bool(words(text)) and not re.search(r"\d", text)),
    "question": Instruction("End your answer with a question.", lambda text: text.strip().endswith("?")),
}
"""Every instruction, by name. An empty completion keeps none."""


def with_instruction(prompt: str, name: str, **arguments: Any) -> dict[str, Any]:
    """Return a row of prompts that asks for an instruction to be kept.

    Args:
        prompt: what is asked otherwise.
        name: key of `CHECKS`.
        arguments: of the instruction.

    Raises:
        KeyError: there is no such instruction.
    """
    asked = f"{prompt.strip()}\n\n{CHECKS[name].text.format(**arguments)}"
    return {
        "prompt": [{"role": "user", "content": asked}],
        "instruction": name,
        "arguments": json.dumps(arguments),
    }


class InstructionScorer(Scorer):
    """1 where a completion keeps its row's instruction, else 0.

    The data needs the columns ``instruction`` (a key of `CHECKS`) and ``arguments`` (a mapping, or one as JSON).
    """

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]
    ) -> Sequence[float]:
        """Return one score per completion.

        Raises:
            ValueError: a column is missing, an instruction is unknown, or its arguments do not fit.
        """
        missing = [name for name in ("instruction", "arguments") if name not in columns]
        if missing:
            raise ValueError(
                f"InstructionScorer needs the columns instruction and arguments of the data; {missing[0]} is missing"
            )
        rows = zip(completions, columns["instruction"], columns["arguments"], strict=True)
        return [float(kept(text, name, given)) for text, name, given in rows]


def kept(completion: str, name: str, arguments: str | Mapping[str, Any] | None) -> bool:
    """Return whether a completion keeps an instruction.

    Raises:
        ValueError: the instruction is unknown, or its arguments do not fit.
    """
    if name not in CHECKS:
        raise ValueError(f"there is no instruction {name!r}: {', '.join(CHECKS)}")
    given = json.loads(arguments) if isinstance(arguments, str) else dict(arguments or {})
    try:
        return bool(completion.strip()) and bool(CHECKS[name].kept(completion, **given))
    except TypeError as error:
        raise ValueError(f"the arguments of instruction {name!r} do not fit: {given}") from error
