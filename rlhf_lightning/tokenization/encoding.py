"""Encode rendered text to ids in bulk, and decode ids back to text."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf_lightning.tokenization.continuation import Rendered, Span
from rlhf_lightning.tokenization.facts import Facts, end_token_ids, facts_of
from rlhf_lightning.tokenization.rendering import (
    render_completion,
    render_prompt,
    render_reply,
    render_steps,
)
from rlhf_lightning.tokenization.word_cache import word_cache_of
from rlhf_lightning.types import Message, Prompt

FEW = 64
"""Number of texts below which words are not looked up: finding out whether a tokenizer allows it takes some 0.1 s."""

JOINT = 32
"""Characters on each side of a text boundary that are encoded together to check whether the tokenizer merges them."""


class Encoded(NamedTuple):
    """Ids of a rendered text.

    Attributes:
        ids: token ids.
        supervised: for each id, whether it enters the loss.
        escaped: whether a content spelt a control token, which was encoded as plain characters.
        merges: whether the tokenizer would encode the text differently together with the preceding text.
        unknown: how many ids stand for text that the tokenizer does not know.
    """

    ids: list[int]
    supervised: list[bool]
    escaped: bool = False
    merges: bool = False
    unknown: int = 0


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Encode a prompt: messages with the template's generation prompt; plain text after BOS, if there is one.

    If the last turn is the assistant's, it is left open for continuation.
    """
    return encode_rendered(tokenizer, [render_prompt(tokenizer, prompt)])[0].ids


def encode_completion(
    tokenizer: PreTrainedTokenizerBase, completion: str | list[Message], prompt: Prompt
) -> tuple[list[int], list[bool]]:
    """Encode a completion, including its end token; return ids, and for each id whether it enters the loss.

    Args:
        tokenizer: the policy's tokenizer.
        completion: text, or the turns that follow the prompt: the assistant's, possibly with other turns between them.
        prompt: the prompt; it determines whether the chat template or plain text is used.
    """
    return encode_rendered(tokenizer, [render_completion(tokenizer, completion, prompt)])[0][:2]


def encode_reply(
    tokenizer: PreTrainedTokenizerBase, turn: Message, reply: str | Sequence[Message], ended: bool = True
) -> list[int]:
    """Encode an environment's reply to a sampled turn, up to the beginning of the assistant's next turn.

    Args:
        tokenizer: the policy's tokenizer.
        turn: the policy's turn as a message.
        reply: messages, or the continuation of a plain text.
        ended: whether the turn has its end token. After a turn that a stop string ended, the encoded messages begin
            with an end token.
    """
    first: list[int] = []
    if isinstance(reply, str):
        facts = facts_of(tokenizer)
        rendered = Rendered((Span(facts.guarded(reply), False),), tokenizer.eos_token)
    else:
        rendered = render_reply(tokenizer, turn, reply)
        if not ended:
            facts = facts_of(tokenizer)
            name = (facts.call_end if turn.get("tool_calls") else None) or facts.end_of_turn
            first = [facts.eos if name is None else facts.control[name]]
    return first + encode_rendered(tokenizer, [rendered])[0].ids


def encode_steps(
    tokenizer: PreTrainedTokenizerBase, steps: Sequence[str], separator: str, prompt: Prompt
) -> tuple[list[int], list[bool]]:
    """Encode a completion in steps; return ids and, for each id, whether it ends a step. See `render_steps`."""
    return joined_steps(encode_rendered(tokenizer, render_steps(tokenizer, steps, separator, prompt)))


def joined_steps(pieces: Sequence[Encoded]) -> tuple[list[int], list[bool]]:
    """Join the ids of steps; return them, and for each id whether it is the last of a step."""
    ids = [index for piece in pieces for index in piece.ids]
    return ids, [place == len(piece.ids) - 1 for piece in pieces for place in range(len(piece.ids))]


def encode_rendered(tokenizer: PreTrainedTokenizerBase, rendered: Sequence[Rendered]) -> list[Encoded]:
    """Encode many rendered texts at once."""
    facts = facts_of(tokenizer)
    pieces = [_pieces(facts, one) for one in rendered]
    texts = [(text, before) for one in pieces for text, before in one]
    with_joint = [place for place, one in enumerate(rendered) if _has_joint(facts, one)]
    starts = [rendered[place].before[-JOINT:] for place in with_joint]
    joints = [(before, before + pieces[place][0][0][:JOINT]) for place, before in zip(with_joint, starts, strict=True)]
    encoded = iter(_encode_after(tokenizer, facts, texts))
    alone = _encode(tokenizer, [text for pair in joints for text in pair])
    joint_ids = dict(zip(with_joint, zip(alone[::2], alone[1::2], strict=True), strict=True))
    done = []
    for place, one in enumerate(rendered):
        parts = [next(encoded) for _ in one.spans]
        merges = False
        if place in joint_ids:
            before, joint = joint_ids[place]
            merges = joint[: len(before)] != before or joint[len(before) : len(before) + 1] != parts[0][:1]
        done.append(_encoded(tokenizer, facts, one, pieces[place], parts, merges))
    return done


def _pieces(facts: Facts, one: Rendered) -> list[tuple[str, str]]:
    """Return each span's text, and the end of the text that precedes it."""
    found, before = [], one.before
    for span in one.spans:
        found.append((span.text, before))
        if len(found) < len(one.spans):
            before = facts.tail_of(before + span.text)
    return found


def _has_joint(facts: Facts, one: Rendered) -> bool:
    """Return whether the tokenizer may merge a text with the preceding text."""
    first = one.spans[0].text if one.spans else ""
    if not first or not one.before or "\ue000" in one.before + first[:JOINT]:
        return False
    return not facts.written.search(one.before) and not facts.written.match(first)


def _encoded(
    tokenizer: PreTrainedTokenizerBase,
    facts: Facts,
    one: Rendered,
    pieces: list[tuple[str, str]],
    parts: list[list[int]],
    merges: bool,
) -> Encoded:
    escaped = False
    for place, (text, before) in enumerate(pieces):
        if "\ue000" in text or not _as_written(tokenizer, facts, text, parts[place]):
            parts[place], escaped = _carefully(tokenizer, facts, text, before), True
    ids, supervised = parts[0] if len(parts) == 1 else [index for part in parts for index in part], list[bool]()
    for part, span in zip(parts, one.spans, strict=True):
        supervised += [span.supervised] * len(part)
    if one.opening and tuple(ids[: len(one.opening)]) != one.opening:
        ids, supervised = [*one.opening, *ids], [False] * len(one.opening) + supervised
    if one.closing and tuple(ids[-len(one.closing) :]) != one.closing:
        ids, supervised = [*ids, *one.closing], supervised + [True] * len(one.closing)
    unknown = 0 if facts.unknown is None else ids.count(facts.unknown[1])
    return Encoded(ids, supervised, escaped, merges, unknown)


def completion_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], strings: bool = True) -> str:
    """Decode a completion up to its first end token, without special tokens but with thought tags.

    With ``strings``, the text also ends before the first stop string.
    """
    return completion_texts(tokenizer, [ids], strings)[0]


def completion_texts(
    tokenizer: PreTrainedTokenizerBase, completions: Iterable[Sequence[int]], strings: bool = True
) -> list[str]:
    """Decode each completion as `completion_text`; the tokenizer is examined once for all."""
    facts = facts_of(tokenizer)
    stops = facts.stop_strings if strings else ()
    ends, said = set(end_token_ids(tokenizer)), set(facts.speakable.values())
    special = set(tokenizer.all_special_ids)
    none_said = said.isdisjoint(special)
    dropped = set[int]() if none_said else (special | set(facts.control.values())) - said
    texts = []
    for ids in completions:
        kept = [index for index in takewhile(lambda index: index not in ends, map(int, ids)) if index not in dropped]
        text = tokenizer.decode(kept, skip_special_tokens=none_said, clean_up_tokenization_spaces=False)
        texts.append(_before(text, stops))
    return texts


def turn_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Decode a sampled turn up to its first end token, keeping all other control tokens: some mark tool calls."""
    ends = end_token_ids(tokenizer)
    kept = list(takewhile(lambda index: index not in ends, map(int, ids)))
    text = tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return _before(text, ends.strings)


def _before(text: str, stops: Sequence[str]) -> str:
    """Return a text up to the first occurrence of any stop string."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


def truncate(
    prompt_ids: list[int],
    completions: Sequence[list[int]],
    max_length: int | None,
    max_prompt_length: int | None = None,
    keep: int = 0,
) -> tuple[list[int], list[list[int]]]:
    """Truncate a prompt and the completions that share it to ``max_length`` tokens each.

    The prompt is truncated on the left, so that its latest turn stays. It is cut to ``max_prompt_length``. If the
    row is still too long, it is cut further to make room for the longest completion, but not below half of
    ``max_length`` (or below ``max_prompt_length``). Completions are then truncated on the right, which removes the end
    token: a truncated completion has not ended.

    Args:
        prompt_ids: ids of the prompt.
        completions: ids of each completion of that prompt.
        max_length: maximum tokens of prompt and completion together; None for no limit.
        max_prompt_length: maximum tokens of the prompt; None for no separate limit.
        keep: number of ids at the beginning of the prompt that always stay (BOS).
    """
    prompt = len(prompt_ids) if max_prompt_length is None else min(len(prompt_ids), max_prompt_length)
    if max_length is not None:
        longest = max((len(c) for c in completions), default=0)
        floor = max(max_length // 2, 1) if max_prompt_length is None else min(max_prompt_length, max_length - 1)
        prompt = min(prompt, max(max_length - longest, floor))
        completions = [c[: max_length - prompt] for c in completions]
    if prompt < len(prompt_ids):
        keep = min(keep, prompt - 1)
        prompt_ids = prompt_ids[:keep] + prompt_ids[len(prompt_ids) - prompt + keep :]
    return prompt_ids, list(completions)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], split: bool = False) -> list[list[int]]:
    if not texts:
        return []
    kind: Any = type(tokenizer)
    if _is_plain(kind):  # gives the same ids, and skips offsets and masks, which are not used
        backend: Any = tokenizer.backend_tokenizer
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        backend.encode_special_tokens = literal = split or tokenizer.split_special_tokens
        encode = lambda some: [one.ids for one in backend.encode_batch_fast(some, add_special_tokens=False)]
        words = None if literal or len(texts) < FEW else word_cache_of(tokenizer)
        return encode(texts) if words is None else words.encode(texts, encode)
    settings = {"split_special_tokens": True} if split else {}
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False, **settings)
    return encoded["input_ids"]


@functools.cache
def _is_plain(kind: type) -> bool:
    """Return whether a tokenizer class encodes with its backend alone."""
    base: Any = PreTrainedTokenizerFast
    return issubclass(kind, base) and all(getattr(kind, name) is getattr(base, name) for name in _ENCODING)


_ENCODING = ("__call__", "_encode_plus", "backend_tokenizer")
_PROCESS = os.getpid()


@contextmanager
def all_cores() -> Iterator[None]:
    """Let tokenizers encode a batch on all cores, except in a forked process, where their thread pool would hang."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    if os.getpid() != _PROCESS:
        yield
        return
    os.environ[name] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _encode_after(
    tokenizer: PreTrainedTokenizerBase, facts: Facts, texts: Sequence[tuple[str, str]], split: bool = False
) -> list[list[int]]:
    """Encode texts separately, without the space that some tokenizers put before a first word."""
    if not facts.anchor:
        return _encode(tokenizer, [text for text, _ in texts], split)
    anchored = [
        bool(text and before) and not (facts.spaced_after_control and facts.written.fullmatch(before))
        for text, before in texts
    ]
    found = _encode(
        tokenizer, ["\n" + text if put else text for (text, _), put in zip(texts, anchored, strict=True)], split
    )
    size = len(facts.anchor)
    for place, (text, _) in enumerate(texts):
        if anchored[place]:
            begins = tuple(found[place][:size]) == facts.anchor
            found[place] = found[place][size:] if begins else _encode(tokenizer, [text], split)[0]
    return found


def _as_written(tokenizer: PreTrainedTokenizerBase, facts: Facts, text: str, ids: list[int]) -> bool:
    """Return whether the control tokens in the ids are those written in the text, so that no content became one."""
    if facts.unknown is not None and facts.unknown[0] in text:
        return False
    control = facts.control_ids
    found = [] if control.isdisjoint(ids) else [index for index in ids if index in control]
    return found == [facts.control[name.strip()] for name in facts.written.findall(text)]


def _carefully(tokenizer: PreTrainedTokenizerBase, facts: Facts, text: str, before: str) -> list[int]:
    """Encode a text piece by piece: written control tokens as such, guards as the plain characters they stand for."""
    ids: list[int] = []
    place = 0
    for found in [*facts.written.finditer(text), None]:
        plain = facts.restored(text[place : found.start() if found else len(text)])
        if plain:
            ids += _literal(tokenizer, facts, plain, before)
        if found:
            ids.append(facts.control[found[0].strip()])
            place, before = found.end(), found[0]
    return ids


def _literal(tokenizer: PreTrainedTokenizerBase, facts: Facts, text: str, before: str = "") -> list[int]:
    """Encode a text so that none of its ids is a control token."""
    control = facts.control_ids
    (whole,) = _encode_after(tokenizer, facts, [(text, before)], split=True)
    if control.isdisjoint(whole):
        return whole
    # The token is in the vocabulary as a word or a non-special added token, so it is encoded in two parts.
    names = sorted(facts.control, key=len, reverse=True)
    pieces = [piece for piece in re.split(f"({'|'.join(map(re.escape, names))})", text) if piece]
    parts = [part for piece in pieces for part in ((piece[:1], piece[1:]) if piece in facts.control else (piece,))]
    ids: list[int] = []
    for part, found in zip(parts, _encode(tokenizer, parts, split=True), strict=True):
        if not control.isdisjoint(found):  # a spelling that the tokenizer normalises (case, Unicode) to a control token
            found = [index for letter in _encode(tokenizer, list(part), split=True) for index in letter]
        ids += [index for index in found if index not in control]
    return ids
