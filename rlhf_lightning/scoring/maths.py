"""Answers that can be verified: 1 where a solution ends with the right one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf_lightning.scoring.answers import final_answer, same_answer
from rlhf_lightning.scoring.scorer import Scorer, Scores, column
from rlhf_lightning.types import Prompt


class MathAnswerScorer(Scorer):
    r"""1 where the final answer of a completion equals the reference, else 0 (Cobbe et al., 2110.14168).

    Only the final answer counts: the last of ``\boxed{...}``, ``#### ...`` and ``the answer is ...``. Numbers are
    compared exactly, as fractions; units, currency and percent signs, thousands commas and LaTeX around them do not
    matter. Other answers are compared as text: there is no symbolic algebra, because a parser that evaluates what an
    untrusted completion says (``10**10**10``) can hang or be talked into running code, and the numeric answers of
    GSM8K, SVAMP and their kin never need it. A completion without an answer scores 0, and a row without a reference
    has no score.

    The data needs a column of reference answers: a number, a text, or a whole solution that ends with ``#### 42``.

    Args:
        answer_column: name of that column.
        last_number: take the last number of a completion that states no answer; convenient for models that were never
            told how to state one, and easily satisfied by a lucky number.
    """

    def __init__(self, answer_column: str = "answer", last_number: bool = False) -> None:
        self.answer_column, self.last_number = answer_column, last_number

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        """Return 1, 0, or None for each completion.

        Raises:
            ValueError: the column is missing.
        """
        answers = column(columns, self.answer_column, self)
        return [self._score(text, answer) for text, answer in zip(completions, answers, strict=True)]

    def _score(self, completion: str, reference: Any) -> float | None:
        text = "" if reference is None else str(reference).strip()
        expected = final_answer(text) or text
        if not expected:
            return None
        given = final_answer(completion, self.last_number)
        return float(given is not None and same_answer(given, expected))
