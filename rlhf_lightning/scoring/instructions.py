"""Instructions whose keeping can be checked by reading the completion: scores that need no model.

In the manner of IFEval (Zhou et al., 2311.07911): each row of prompts names one of `CHECKS` in the column
``instruction`` and gives its arguments in ``arguments``; `with_instruction` writes such rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_lightning.errors import DataError
from rlhf_lightning.scoring import checks
from rlhf_lightning.scoring.checks import holds, words
from rlhf_lightning.scoring.scorer import Scorer, Scores, column
from rlhf_lightning.types import Prompt


class Instruction(NamedTuple):
    """One kind of instruction.

    Attributes:
        text: what is asked, with the arguments' names in braces.
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
    "sentences": Instruction(
        "Answer in exactly {count} sentences.", lambda text, count: len(checks.sentences(text)) == count
    ),
    "paragraphs": Instruction(
        "Answer in exactly {count} paragraphs, with an empty line between them.",
        lambda text, count: len(checks.paragraphs(text)) == count,
    ),
    "keyword": Instruction("Use the word {word!r}.", lambda text, word: checks.occurrences(text, word, True) > 0),
    "keyword_times": Instruction(
        "Use the word {word!r} at least {count} times.",
        lambda text, word, count: checks.occurrences(text, word, True) >= count,
    ),
    "forbidden": Instruction(
        "Do not use the word {word!r}.", lambda text, word: not checks.occurrences(text, word, True)
    ),
    "lowercase": Instruction("Write everything in lower case.", lambda text: text == text.lower() != text.upper()),
    "uppercase": Instruction("Write everything in CAPITALS.", lambda text: text == text.upper() != text.lower()),
    "no_commas": Instruction("Do not use any comma.", lambda text: "," not in text),
    "starts_with": Instruction("Begin your answer with {phrase!r}.", checks.begins),
    "ends_with": Instruction(
        "End your answer with {phrase!r}.", lambda text, phrase: checks.ends(text, phrase, ".!\"'")
    ),
    "bullets": Instruction(
        "Answer with exactly {count} bullet points, each on a line that begins with '- '.",
        lambda text, count: len(checks.bullets(text)) == count,
    ),
    "json": Instruction("Answer with valid JSON and nothing else.", checks.is_json),
    "quoted": Instruction("Put your whole answer in double quotes.", checks.is_quoted),
    "title": Instruction("Give your answer a title in double angular brackets, like <<title>>.", checks.has_title),
    "postscript": Instruction("Add a postscript that begins with P.S.", checks.has_postscript),
    "digits": Instruction("Use at least one number written in digits.", lambda text: bool(re.search(r"\d", text))),
    "no_digits": Instruction("Use no digits.", lambda text: not re.search(r"\d", text)),
    "question": Instruction("End your answer with a question.", lambda text: text.strip().endswith("?")),
}
"""Every instruction, by name. A completion without a letter or digit keeps none."""


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

    The data needs the columns ``instruction`` (a key of `CHECKS`) and ``arguments`` (a mapping, or one as JSON); a
    row without an instruction has no score.
    """

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        """Return one score per completion.

        Raises:
            ValueError: a column is missing, an instruction is unknown, or its arguments do not fit.
        """
        names, arguments = (column(columns, name, self) for name in ("instruction", "arguments"))
        rows = zip(completions, names, arguments, strict=True)
        return [None if name is None else float(kept(text, name, given)) for text, name, given in rows]


def kept(completion: str, name: str, arguments: str | Mapping[str, Any] | None) -> bool:
    """Return whether a completion keeps an instruction.

    Raises:
        DataError: the instruction is unknown, or its arguments do not fit.
    """
    if name not in CHECKS:
        raise DataError("unknown-instruction", f"there is no instruction {name!r}; choose one of {', '.join(CHECKS)}")
    given = json.loads(arguments) if isinstance(arguments, str) else dict(arguments or {})
    try:
        return bool(words(completion)) and bool(CHECKS[name].kept(completion, **given))
    except TypeError as error:
        raise DataError("wrong-arguments", f"the arguments of instruction {name!r} do not fit: {given}") from error
