"""Rendered text to ids, in bulk, and ids back to text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from rlhf_lightning.tokenization.facts import MOST_KEPT, Facts, end_token_ids, facts_of
from rlhf_lightning.tokenization.rendering import Rendered, Span, render_completion, render_prompt, render_steps
from rlhf_lightning.types import Message, Prompt


class Encoded(NamedTuple):
    """Ids of a rendered text.

    Attributes:
        ids: token ids.
        supervised: for each id whether a loss may look at it.
        escaped: whether a content spelt a control token, and was encoded as the characters it is made of.
    """

    ids: list[int]
    supervised: list[bool]
    escaped: bool = False


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Ids of a prompt: messages with the template's generation prompt; plain text after BOS, if there is one.

    A prompt whose last turn is the assistant's is left open, to be continued.
    """
    return encode_rendered(tokenizer, [render_prompt(tokenizer, prompt)])[0].ids


def encode_completion(
    tokenizer: PreTrainedTokenizerBase, completion: str | list[Message], prompt: Prompt
) -> tuple[list[int], list[bool]]:
    """Ids of a completion, end token included, and which of them a loss may look at.

    Args:
        tokenizer: the policy's tokenizer.
        completion: text, or the turns that follow the prompt: the assistant's, and possibly others between them.
        prompt: what it answers; decides between a chat template and plain text.

    Returns:
        ids, and a flag for each: True on the assistant's turns and their end tokens.
    """
    return encode_rendered(tokenizer, [render_completion(tokenizer, completion, prompt)])[0][:2]


def encode_steps(
    tokenizer: PreTrainedTokenizerBase, steps: Sequence[str], separator: str, prompt: Prompt
) -> tuple[list[int], list[bool]]:
    """Ids of a completion in steps, and for each id whether a step ends with it. See `render_steps` for arguments."""
    return joined_steps(encode_rendered(tokenizer, render_steps(tokenizer, steps, separator, prompt)))


def joined_steps(pieces: Sequence[Encoded]) -> tuple[list[int], list[bool]]:
    """Ids of a completion from those of its steps, and for each id whether a step ends with it."""
    ids = [index for piece in pieces for index in piece.ids]
    return ids, [place == len(piece.ids) - 1 for piece in pieces for place in range(len(piece.ids))]


def encode_rendered(tokenizer: PreTrainedTokenizerBase, rendered: Sequence[Rendered]) -> list[Encoded]:
    """Encode many rendered texts at once."""
    facts = facts_of(tokenizer)
    texts = [span.text for one in rendered for span in one.spans]
    encoded = iter(_encode(tokenizer, texts) if texts else [])
    return [_encoded(tokenizer, facts, one, [next(encoded) for _ in one.spans]) for one in rendered]


def _encoded(tokenizer: PreTrainedTokenizerBase, facts: Facts, one: Rendered, parts: list[list[int]]) -> Encoded:
    spans, escaped = one.spans, False
    if one.careful and not _as_written(tokenizer, facts, one, parts):
        spans, escaped = one.careful, True
        parts = [_literal(tokenizer, facts, s) if s.literal else _known(tokenizer, facts, s.text) for s in spans]
    ids = [index for part in parts for index in part]
    supervised = [span.supervised for part, span in zip(parts, spans, strict=True) for _ in part]
    if one.opening and tuple(ids[: len(one.opening)]) != one.opening:
        ids, supervised = [*one.opening, *ids], [False] * len(one.opening) + supervised
    if one.closing and tuple(ids[-len(one.closing) :]) != one.closing:
        ids, supervised = [*ids, *one.closing], supervised + [True] * len(one.closing)
    return Encoded(ids, supervised, escaped)


def completion_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of a completion up to its first end token, without special tokens."""
    ends = set(end_token_ids(tokenizer))
    kept = []
    for index in ids:
        if int(index) in ends:
            break
        kept.append(int(index))
    return tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def truncate(
    prompt_ids: list[int],
    completions: Sequence[list[int]],
    max_length: int | None,
    max_prompt_length: int | None = None,
    keep: int = 0,
) -> tuple[list[int], list[list[int]]]:
    """Cut a prompt and the completions that share it to ``max_length`` tokens each.

    The prompt loses its left end, so that its latest turn stays: beyond ``max_prompt_length``, and, when the row is too
    long, as much as the longest completion asks for but never below half of ``max_length`` (or ``max_prompt_length``).
    Completions then lose their right end, and with it the end token: what was cut off has not ended.

    Args:
        prompt_ids: ids of the prompt.
        completions: ids of each completion of that prompt.
        max_length: most tokens of prompt and completion together; None for no bound.
        max_prompt_length: most tokens of the prompt; None for no bound of its own.
        keep: ids at the very beginning of the prompt that stay in any case (BOS).
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


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _known(tokenizer: PreTrainedTokenizerBase, facts: Facts, text: str) -> list[int]:
    if text not in facts.encoded:
        if len(facts.encoded) >= MOST_KEPT:
            facts.encoded.clear()
        facts.encoded[text] = _encode(tokenizer, [text])[0] if text else []
    return facts.encoded[text]


def _as_written(tokenizer: PreTrainedTokenizerBase, facts: Facts, rendered: Rendered, parts: list[list[int]]) -> bool:
    """Whether the control tokens found are those the template wrote, so that no content was taken for one."""
    control = facts.control_ids
    found = [i for ids in parts for i in ids if i in control]
    written = [s.text for s in rendered.careful if not s.literal]
    if found != [i for text in written for i in _known(tokenizer, facts, text) if i in control]:
        return False
    if facts.unknown is None or not any(facts.unknown[1] in ids for ids in parts):
        return True
    return not any(facts.unknown[0] in span.text for span in rendered.careful if span.literal)


def _literal(tokenizer: PreTrainedTokenizerBase, facts: Facts, span: Span) -> list[int]:
    """Ids of a content, none of them a control token that its speaker may not say."""
    control = facts.guarded_ids if span.spoken else facts.control_ids
    (whole,) = _plainly(tokenizer, [span.text])
    if control.isdisjoint(whole):
        return whole
    # The tokenizer recognises a token that is not marked special, or has it as a word: but not its two parts.
    names = sorted((name for name, index in facts.control.items() if index in control), key=len, reverse=True)
    pieces = [piece for piece in re.split(f"({'|'.join(map(re.escape, names))})", span.text) if piece]
    parts = [part for piece in pieces for part in ((piece[:1], piece[1:]) if piece in facts.control else (piece,))]
    ids: list[int] = []
    for part, found in zip(parts, _plainly(tokenizer, parts), strict=True):
        if not control.isdisjoint(found):  # a spelling that is made equal to a token's, by case or by Unicode's forms
            found = [index for letter in _plainly(tokenizer, list(part)) for index in letter]
        ids += [index for index in found if index not in control]
    return ids


def _plainly(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, split_special_tokens=True, verbose=False
    )["input_ids"]
