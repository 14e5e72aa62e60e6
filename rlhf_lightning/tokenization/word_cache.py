"""Encode texts word by word, and look up words that were encoded before.

Most tokenizers cut a text before each space that separates two words, and encode the parts independently. The ids of a
text are then the ids of its words, each with the space before it. Looking a word up is several times as fast as
encoding it, and the words of a language repeat.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from itertools import chain, product
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers.normalizers import NFC
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.tokenization.facts import Facts, facts_of

MOST_CHARACTERS = 1 << 20
"""Characters of all words at which a cache is emptied; it takes some 40 times as many bytes."""

_VISIBLE = string.digits + string.ascii_letters + string.punctuation
_BREAK = re.compile(r" (?=[!-~])(?<=[!-~] )")


class WordCache:
    """The ids of words of one tokenizer. Threads may share it: a dictionary in use never loses words."""

    def __init__(self) -> None:
        self.ids: dict[str, list[int]] = {}
        self.characters = 0

    def encode(self, texts: Sequence[str], encode: Callable[[list[str]], list[list[int]]]) -> list[list[int]]:
        """Return the ids of each text; words that are not in the cache are encoded with ``encode``."""
        ids, words = self.ids, [words_of(text) for text in texts]
        new = list(set(chain.from_iterable(words)).difference(ids))
        ids.update(zip(new, encode(new), strict=True))
        self.characters += sum(map(len, new))
        if self.characters > MOST_CHARACTERS:
            self.ids, self.characters = {}, 0
        return [list(chain.from_iterable(map(ids.__getitem__, one))) for one in words]


def words_of(text: str) -> list[str]:
    """Cut a text before each single space between two visible ASCII characters."""
    first, *others = _BREAK.split(text)
    return [first, *[" " + word for word in others]]


_CACHES: WeakKeyDictionary[Facts, WordCache | None] = WeakKeyDictionary()


def word_cache_of(tokenizer: PreTrainedTokenizerBase) -> WordCache | None:
    """Return the cache of a tokenizer with a Rust backend; None if it does not encode words independently."""
    facts = facts_of(tokenizer)
    if facts not in _CACHES:
        backend: Any = tokenizer.backend_tokenizer
        _CACHES[facts] = WordCache() if _encodes_words_alone(backend) else None
    return _CACHES[facts]


def _encodes_words_alone(backend: Any) -> bool:
    """Return whether a tokenizer encodes each of `words_of` a text independently.

    Every step must act within a word. NFC composes no character with a space. The rules by which the pre-tokenizer cuts
    are tried on all pairs of characters that can enclose the space. The model encodes the parts one by one, always
    alike unless it drops merges at random.
    """
    added = backend.get_added_tokens_decoder().values()
    if any(token.rstrip or " " in token.content for token in added) or getattr(backend.model, "dropout", None):
        return False
    if backend.pre_tokenizer is None or not isinstance(backend.normalizer, NFC | None):
        return False
    for length, between in product((1, 2), " \n"):
        text = between.join(f"{one * length} {other * length}" for one in _VISIBLE for other in _VISIBLE)
        starts = {start for _, (start, _) in backend.pre_tokenizer.pre_tokenize_str(text)}
        if not starts.issuperset(found.start() for found in _BREAK.finditer(text)):
            return False
    return True
