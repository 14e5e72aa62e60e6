"""What has to be found out about a tokenizer and its chat template, once for each."""

from __future__ import annotations

import contextlib
import hashlib
import re
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from rlhf_lightning.tokenization.sandbox import literal_text
from rlhf_lightning.tokenization.templates import ChatTemplateError, apply_template, template_of

MOST_KEPT = 4096
"""Scaffolds, and encoded pieces of them, that are kept: data may have ever new sequences of roles."""


class Facts:
    """What has been found out about one tokenizer and its chat template. Holds no reference to the tokenizer.

    Attributes:
        control: the control tokens and their ids: those marked special, and those that the chat template writes. No
            content is ever encoded as one.
        unknown: the unknown token and its id, unless a control token is in its place. It stands for text, and is no
            control token where a text does not spell it.
        speakable: control tokens that only the assistant's own turn may hold, such as ``<think>``: written by the
            template, but neither marked special nor part of what stands around a turn.
        end_of_turn: control token that ends a turn of the assistant's.
        kept_space: by role, whether the template keeps space at the left and at the right of a content.
        opening: ids that the tokenizer puts in front of a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.key = _identity(tokenizer)
        self.eos: int = tokenizer.eos_token_id
        self.scaffolds: dict[tuple[tuple[str, ...], bool], tuple[str | int, ...]] = {}
        self.encoded: dict[str, list[int]] = {}
        self.end_of_turn: str | None = None
        self.kept_space: dict[str, tuple[bool, bool]] = {}
        added = tokenizer.added_tokens_decoder
        unknown = tokenizer.unk_token_id if tokenizer.unk_token_id not in (self.eos, tokenizer.bos_token_id) else None
        self.unknown = None if unknown is None else (tokenizer.unk_token, unknown)
        special = {token.content: index for index, token in added.items() if token.special and index != unknown}
        named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
        self.control: dict[str, int] = {**{token: index for token, index in named if index != unknown}, **special}
        self.speakable: dict[str, int] = {}
        begin = tokenizer.bos_token_id
        plain = tokenizer("").input_ids
        self.opening: tuple[int, ...] = (begin,) if begin is not None and plain[:1] == [begin] else ()

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids of the control tokens."""
        return frozenset(self.control.values())

    @cached_property
    def guarded_ids(self) -> frozenset[int]:
        """Ids of the control tokens that the assistant's own turn may not hold either."""
        return self.control_ids - frozenset(self.speakable.values())

    @property
    def ends(self) -> tuple[int, ...]:
        """Ids that end a completion."""
        turn = None if self.end_of_turn is None else self.control[self.end_of_turn]
        return (self.eos,) if turn is None or turn == self.eos else (self.eos, turn)

    def read_template(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Find the template's turn markers, its end of turn, and where it trims contents."""
        roles = ("user", "assistant")
        written = _written(scaffold(tokenizer, self, (*roles, "user"))) + literal_text(template_of(tokenizer))
        around = _written(scaffold(tokenizer, self, ("user",), generation=True))
        last = scaffold(tokenizer, self, roles)[-1]
        for index, token in tokenizer.added_tokens_decoder.items():
            if token.content in self.control or token.content not in written or not _MARK.search(token.content):
                continue
            self.control[token.content] = index
            if token.content not in around and token.content not in str(last):
                self.speakable[token.content] = index
        found = [(last.find(c), c) for c in self.control if c in last] if isinstance(last, str) else []
        self.end_of_turn = min(found, default=(0, None), key=lambda place: (place[0], -len(place[1] or "")))[1]
        padded = [{"role": role, "content": f" \n\ue000{role}\ue001\n "} for role in roles]
        text = apply_template(tokenizer, padded, generation=False)
        for role in roles:
            self.kept_space[role] = (f" \n\ue000{role}" in text, f"{role}\ue001\n " in text)


_FACTS: WeakKeyDictionary[PreTrainedTokenizerBase, Facts] = WeakKeyDictionary()


_MARK = re.compile(r"[^\w\s]")
"""What an added token holds that is more than a word or a line break, and so may mark something."""


def _written(pieces: tuple[str | int, ...]) -> str:
    return "\0".join(piece for piece in pieces if isinstance(piece, str))


def _identity(tokenizer: PreTrainedTokenizerBase) -> tuple[Any, ...]:
    return (tokenizer.chat_template, len(tokenizer), tokenizer.eos_token, tokenizer.bos_token)


def facts_of(tokenizer: PreTrainedTokenizerBase) -> Facts:
    """What is known of a tokenizer, found out on first use and after a change."""
    facts = _FACTS.get(tokenizer)
    if facts is None or facts.key != _identity(tokenizer):
        facts = Facts(tokenizer)
        if tokenizer.chat_template:
            with contextlib.suppress(ChatTemplateError):  # raised again, with the turns it refuses, when it is used
                facts.read_template(tokenizer)
        _FACTS[tokenizer] = facts
    return facts


def scaffold(
    tokenizer: PreTrainedTokenizerBase, facts: Facts, roles: tuple[str, ...], generation: bool = False
) -> tuple[str | int, ...]:
    """What the template writes around the contents of turns with these roles: texts, and indices of contents."""
    known = facts.scaffolds.get((roles, generation))
    if known is None:
        marked = [{"role": role, "content": f"\ue000{i}\ue001"} for i, role in enumerate(roles)]
        pieces = re.split("\ue000([0-9]+)\ue001", apply_template(tokenizer, marked, generation))
        known = tuple(int(piece) if i % 2 else piece for i, piece in enumerate(pieces))
        if len(roles) <= 16:  # longer conversations rarely share their roles with another
            if len(facts.scaffolds) >= MOST_KEPT:
                facts.scaffolds.clear()
            facts.scaffolds[(roles, generation)] = known
    return known


def end_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end a completion: EOS, and the chat template's end of turn where that is another token."""
    return facts_of(tokenizer).ends


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that the tokenizer itself puts in front of a text: BOS, or none."""
    return facts_of(tokenizer).opening


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything that decides how text becomes ids: vocabulary, rules, special tokens and chat template."""
    digest = hashlib.blake2b(digest_size=16)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_padding()  # both are set anew by every call, and would otherwise be part of the text below
        backend.no_truncation()
        digest.update(backend.to_str().encode("utf-8", "surrogatepass"))
    else:
        digest.update(repr(sorted(tokenizer.get_vocab().items())).encode("utf-8", "surrogatepass"))
    digest.update(repr(sorted(tokenizer.special_tokens_map.items())).encode())
    digest.update(repr((tokenizer.chat_template, facts_of(tokenizer).opening)).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
