"""Extract the final answer of a solution, read it as a number, and score right answers."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections import deque
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from rlhf_lightning.errors import PackageError, check_range
from rlhf_lightning.scoring.scorer import Measured, Scorer, Scores, column
from rlhf_lightning.types import Prompt
from rlhf_lightning.workers import Outcome, WorkerPool

LONGEST_ANSWER = 300
"""Maximum length of an answer in characters; longer texts do not count as answers."""

LONGEST_NUMERAL, LARGEST_EXPONENT = 60, 60

BOX = re.compile(r"\\(?:boxed|fbox)[ \t]{0,9}\{")
# A heading may also begin with ####, so an answer must begin like a number or be a single word.
HASHES = re.compile(r"####[ \t]*(?=[-+−–$€£¥(\\.\d*]|[^\s#]+[ \t]*$)([^\n]*)", re.MULTILINE)
STATED = re.compile(r"\banswer[ \t]{0,9}(?:is|=|:)[ \t]*:?([^\n]*)", re.IGNORECASE)
NUMERAL = r"(?:\d[\d,]*(?:\.\d*)?|\.\d+)"
LAST_NUMBER = re.compile(r"(?<![\w.])[-−–]?[$€£¥]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?%?")

THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d*)?")
FRAC = re.compile(r"\\frac\{([^{}]*)\}\{([^{}]*)\}|\\frac(\d)(\d)")
WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mathit|mbox|operatorname)\{([^{}]*)\}")
NOTHING = re.compile(r"\\(?:left|right|displaystyle|,|!|;|:|quad|qquad)(?![A-Za-z])|\^\{?\\circ\}?|\\?[$%]|[°€£¥~]")
VARIABLE = re.compile(r"\A[A-Za-z](?:_\w+)?\s*=\s*")
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
NO_UNIT = {"or", "and", "to", "not", "plus", "minus", "times", "pi", "x", "y", "z", "n", "i", *SCALES}
NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*(?:(?P<whole>\d+)\s+(?P<part>\d+)\s*/\s*(?P<parts>\d+)"
    rf"|(?P<top>{NUMERAL})\s*/\s*(?P<bottom>{NUMERAL})"
    rf"|(?P<plain>{NUMERAL})(?:\s*(?:[eE]|[x×*]\s*10\s*\^)\s*\{{?(?P<exponent>[-+]?\d+)\}}?)?)"
    rf"\s*(?P<scale>{'|'.join(SCALES)})?(?P<unit>[^\d=<>]*)\Z"
)


def final_answer(text: str, last_number: bool = False) -> str | None:
    r"""Return the final answer of a solution as it is written; None if it states none.

    The answer is the last of ``\boxed{...}``, ``#### ...`` and ``the answer is ...``, so if a solution corrects itself,
    the correction counts.

    Args:
        text: the solution.
        last_number: use the last number of a solution that states no answer.
    """
    stated = [found for pattern in (BOX, HASHES, STATED) if (found := _last(pattern, text))]
    if stated:
        last = max(stated, key=lambda found: found.start())
        answer = _braced(text, last.end()) if last.re is BOX else _sentence(last.group(1))
        return answer.strip() or None if answer else None
    found = _last(LAST_NUMBER, text) if last_number else None
    return found.group() if found and len(found.group()) <= LONGEST_ANSWER else None


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)


def _braced(text: str, start: int) -> str | None:
    """Return the text up to the matching closing brace; None if it is missing or too far away."""
    depth = 1
    for place in range(start, min(len(text), start + LONGEST_ANSWER + 1)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return text[start:place]
    return None


def _sentence(line: str) -> str | None:
    """Return the first sentence of a line without its full stop; a decimal point does not end a sentence."""
    answer = re.split(r"(?<=[^\s.])\.(?=\s|$)|\.\Z", line[: LONGEST_ANSWER + 1].strip(" \t*:"), maxsplit=1)[0]
    return answer.strip(" \t*`\"'") if len(answer) <= LONGEST_ANSWER else None


def normalized(answer: str) -> str:
    """Return an answer without LaTeX wrappers, currency, percent and degree signs, and superfluous spaces."""
    answer = answer[: LONGEST_ANSWER + 1].replace("−", "-").replace("–", "-").replace("\u00a0", " ")
    answer = WRAPPED.sub(r" \1 ", re.sub(r"\\[dtc]frac", r"\\frac", answer))
    answer = FRAC.sub(lambda m: f" ({m[1]})/({m[2]})" if m[1] is not None else f" {m[3]}/{m[4]}", answer)
    answer = answer.replace("\\(", "").replace("\\)", "").replace("\\[", "").replace("\\]", "")
    answer = VARIABLE.sub("", NOTHING.sub("", answer).strip())
    answer = answer.replace("\\times", "x").replace("\\cdot", "*")
    return re.sub(r"\s+", " ", answer).rstrip(" .*`\"'").lstrip(" *`\"'").lower()


def number(answer: str) -> Fraction | None:
    """Return an answer as a number; None if it is not exactly one number.

    Units, currency and percent signs are ignored: ``50%`` is 50. Thousands may have commas; fractions may be ``3/4``,
    ``1 1/2`` or LaTeX; ``2 million`` and ``3e8`` are understood.
    """
    if len(answer) > LONGEST_ANSWER:
        return None
    # Braces around a thousands comma or a whole numeral are LaTeX syntax; next to another numeral they mean a product.
    text = re.sub(r"(?<![\w.)}])[({]\s*([-+]?[\d.,]+)\s*[)}](?![\w({])", r"\1", normalized(answer).replace("{,}", ","))
    text = re.sub(r"\A([-+]?)\s*\((.*)\)\Z", r"\1\2", text)
    found = NUMBER.match(text)
    if found is None or not _is_unit(found["unit"]):
        return None
    value = _value(found)
    if value is None:
        return None
    value *= 10 ** SCALES[found["scale"]] if found["scale"] else 1
    return -value if found["sign"] == "-" else value


def _is_unit(text: str) -> bool:
    """Return whether the text after a number is a unit: words that do not change the number's value."""
    if NO_UNIT & set(re.findall(r"[^\W\d_]+", text)):
        return False
    return not re.search(r"[-+*!√π,;|&(){}\\]", re.sub(r"(?<=[^\W\d_])-(?=[^\W\d_])", "", text))


def _value(found: re.Match[str]) -> Fraction | None:
    names = [name for name in ("whole", "part", "parts", "top", "bottom", "plain") if found[name] is not None]
    parts = {name: value for name in names if (value := _numeral(found[name])) is not None}
    if len(parts) < len(names):
        return None
    if "whole" in parts:
        return parts["whole"] + parts["part"] / parts["parts"] if parts["parts"] else None
    if "top" in parts:
        return parts["top"] / parts["bottom"] if parts["bottom"] else None
    exponent = found["exponent"] or "0"
    if len(exponent) > 4 or abs(int(exponent)) > LARGEST_EXPONENT:
        return None
    return parts["plain"] * Fraction(10) ** int(exponent)


def _numeral(text: str) -> Fraction | None:
    if len(text) > LONGEST_NUMERAL:
        return None
    if "," in text:
        if not THOUSANDS.fullmatch(text):
            return None
        text = text.replace(",", "")
    return Fraction(text.rstrip(".") or "0")


def same_answer(given: str, reference: str) -> bool:
    """Return whether two answers are equal: exactly as numbers if both are numbers, else as normalised text."""
    if len(given) > LONGEST_ANSWER:
        return False
    numbers = number(given), number(reference)
    if None not in numbers:
        return numbers[0] == numbers[1]
    texts = [re.sub(r"\s", "", normalized(text)) for text in (given, reference)]
    return numbers == (None, None) and bool(texts[0]) and texts[0] == texts[1]


class MathAnswerScorer(Scorer):
    r"""Score 1 if the final answer of a completion equals the reference, else 0 (Cobbe et al., 2110.14168).

    Only the final answer counts: the last of ``\boxed{...}``, ``#### ...`` and ``the answer is ...``. Numbers are
    compared exactly, as fractions; units, currency and percent signs, thousands commas and LaTeX wrappers are ignored.
    Other answers are compared as text. There is no symbolic algebra: a parser that evaluates untrusted text
    (``10**10**10``) can hang or run code, and GSM8K, SVAMP and similar data sets do not need it. A completion without
    an answer scores 0; a row without a reference has no score.

    The data needs a column of reference answers: a number, a text, or a whole solution that ends with ``#### 42``.

    Args:
        answer_column: name of the column of reference answers.
        last_number: use the last number of a completion that states no answer; a random number then matches easily.
    """

    def __init__(self, answer_column: str = "answer", last_number: bool = False) -> None:
        self.answer_column, self.last_number = answer_column, last_number

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        answers = column(columns, self.answer_column, self)
        return [self._score(text, answer) for text, answer in zip(completions, answers, strict=True)]

    def _score(self, completion: str, reference: Any) -> float | None:
        text = "" if reference is None else str(reference).strip()
        expected = final_answer(text) or text
        if not expected:
            return None
        given = final_answer(completion, self.last_number)
        return float(given is not None and same_answer(given, expected))


class MathVerifyScorer(MathAnswerScorer):
    r"""Score 1 if the final answer of a completion equals the reference mathematically, else 0.

    Answers that `MathAnswerScorer` accepts score 1. All others are read as LaTeX by math-verify and compared with
    SymPy: ``2x+1`` and ``1+2x``, ``\frac{\pi}{2}`` and ``\pi/2``, sets, intervals, matrices. SymPy may hang on a
    malicious answer, so each comparison runs in a process that is killed at the time limit; the answer then scores 0.
    Plain text is never evaluated as Python. A reference that cannot be read is compared as text.

    Needs ``pip install 'rlhf-lightning[math]'``. Metrics: ``score_timed_out`` and ``score_failed``, as shares of the
    completions.

    Args:
        answer_column: name of the column of reference answers.
        last_number: use the last number of a completion that states no answer.
        seconds: time limit of one comparison.
        workers: number of processes.
    """

    def __init__(
        self, answer_column: str = "answer", last_number: bool = False, seconds: float = 5.0, workers: int = 2
    ) -> None:
        super().__init__(answer_column, last_number)
        check_range(seconds > 0 and workers >= 1, "each must be positive", seconds=seconds, workers=workers)
        if importlib.util.find_spec("math_verify") is None:
            raise PackageError(
                "missing-package", "MathVerifyScorer needs math-verify: pip install 'rlhf-lightning[math]'"
            )
        self._pool = WorkerPool(answer_verifier, None, seconds, workers)
        self.measured = Measured("score_failed", "score_timed_out")

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        scores = list(super().__call__(prompts, completions, **columns))
        answers = column(columns, self.answer_column, self)
        asked: list[int] = []
        pairs: list[tuple[str, str]] = []
        for place, (text, answer) in enumerate(zip(completions, answers, strict=True)):
            given = final_answer(text, self.last_number) if scores[place] == 0.0 else None
            if given is not None and len(given) <= LONGEST_ANSWER:
                asked.append(place)
                pairs.append((final_answer(str(answer)) or str(answer).strip(), given))
        outcomes = self._pool.outcomes(pairs)
        for kind, name in (("failed", "score_failed"), ("timed_out", "score_timed_out")):
            found = {place for place, outcome in zip(asked, outcomes, strict=True) if outcome[0] == kind}
            self.measured.add(name, [float(place in found) for place in range(len(completions))])
        for place, (kind, value) in zip(asked, outcomes, strict=True):
            scores[place] = float(kind == "done" and value == 1.0)
        return scores


def answer_verifier(_: None) -> Callable[[tuple[str, str]], Outcome]:
    """Return a function that compares a reference with an answer by math-verify; runs in worker processes.

    Importing SymPy and the first comparison take seconds. They are done at the start of the process, outside the time
    limit.
    """
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    latex = [math_verify.LatexExtractionConfig()]  # other forms are evaluated as Python

    def parsed(answer: str) -> list[Any]:
        text = answer.strip().strip("$").removeprefix("\\(").removesuffix("\\)")
        return math_verify.parse(f"${text}$", latex, fallback_mode="no_fallback", parsing_timeout=None)

    def compare(pair: tuple[str, str]) -> Outcome:
        try:
            expected, given = map(parsed, pair)
            equal = bool(expected) and bool(given) and math_verify.verify(expected, given, timeout_seconds=None)
        except Exception as error:  # SymPy may raise anything
            return "failed", f"{type(error).__name__}: {error}"
        return "done", float(equal)

    compare(("x+1", "1+x"))
    return compare
