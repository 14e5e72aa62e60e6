"""Terms that shape another score, to be added with `WeightedSum`: length and repetition. Each is 0 at best.

A completion that nears the token limit is DAPO's own to punish: `DAPOModule.overlong_buffer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_lightning import tokenization
from rlhf_lightning.errors import SettingError
from rlhf_lightning.scoring.checks import words
from rlhf_lightning.scoring.scorer import Scorer, Scores
from rlhf_lightning.types import Prompt


class LengthPenalty(Scorer):
    r"""-coef * max(|length - target| - tolerance, 0): a price on length, or a pull towards one.

    With ``target`` 0 every word or token costs ``coef``; a reward model that favours long answers is held back by it.
    0 within the tolerance of the target.

    Args:
        coef: score units per word or token.
        target: length that costs nothing.
        tolerance: how far from it costs nothing either.
        tokenizer: folder or hub id of the tokenizer that counts tokens; None counts words.
    """

    def __init__(self, coef: float = 0.01, target: int = 0, tolerance: int = 0, tokenizer: str | None = None) -> None:
        if target < 0 or tolerance < 0:
            raise SettingError(
                "setting-out-of-range", f"target is {target} and tolerance {tolerance}: each must be at least 0"
            )
        self.coef, self.target, self.tolerance, self.tokenizer_name = coef, target, tolerance, tokenizer

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """What counts tokens; loaded on first use."""
        assert self.tokenizer_name is not None
        return tokenization.load_tokenizer(self.tokenizer_name)

    def length(self, text: str) -> int:
        """Return the words or tokens of a text, without an end token."""
        if self.tokenizer_name is None:
            return len(words(text))
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        """Return one score per completion, 0 or below."""
        off = [abs(self.length(text) - self.target) - self.tolerance for text in completions]
        return [-self.coef * max(distance, 0) for distance in off]


class RepetitionPenalty(Scorer):
    r"""-coef * (1 - distinct n-grams / n-grams): the share of a completion's n-grams that it has said before.

    One less distinct-n (Li et al., 1510.03055), over words without regard to case and punctuation. 0 where every n-gram
    is new or there is none; close to -coef for one word said over and over.

    Args:
        n: words of an n-gram.
        coef: score of a text that only repeats itself, with the sign turned.
    """

    def __init__(self, n: int = 3, coef: float = 1.0) -> None:
        if n < 1:
            raise SettingError("setting-out-of-range", f"n is {n}: it must be at least 1 word")
        self.n, self.coef = n, coef

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        """Return one score per completion, between -coef and 0."""
        return [-self.coef * repeated_share(words(text), self.n) for text in completions]


def repeated_share(text: Sequence[str], n: int) -> float:
    """Return 1 - distinct n-grams / n-grams of a list of words; 0 where there is no n-gram."""
    grams = list(zip(*(text[start:] for start in range(n)), strict=False))
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0
