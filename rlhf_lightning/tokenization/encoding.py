"""Rendered text to ids, in bulk, and ids back to text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from rlhf_lightning.tokenization.facts import Facts, end_token_ids, facts_of
from rlhf_lightning.tokenization.rendering import Rendered, render_completion, render_prompt, render_steps
from rlhf_lightning.types import Message, Prompt


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Ids of a prompt: messages with the template's generation prompt; text as it stands, after BOS if there is one.

    A prompt whose last turn is the assistant's is left open, to be continued.
    """
    return encode_rendered(tokenizer, [render_prompt(tokenizer, prompt)])[0][0]


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
    return encode_rendered(tokenizer, [render_completion(tokenizer, completion, prompt)])[0]


def encode_steps(
    tokenizer: PreTrainedTokenizerBase, steps: Sequence[str], separator: str, prompt: Prompt
) -> tuple[list[int], list[bool]]:
    """Ids of a completion in steps, and for each id whether a step ends with it. See `render_steps` for arguments."""
    return joined_steps(encode_rendered(tokenizer, render_steps(tokenizer, steps, separator, prompt)))


def joined_steps(pieces: Sequence[tuple[list[int], list[bool]]]) -> tuple[list[int], list[bool]]:
    """Ids of a completion from those of its steps, and for each id whether a step ends with it."""
    ids = [index for piece, _ in pieces for index in piece]
    return ids, [place == len(piece) - 1 for piece, _ in pieces for place in range(len(piece))]


def encode_rendered(
    tokenizer: PreTrainedTokenizerBase, rendered: Sequence[Rendered]
) -> list[tuple[list[int], list[bool]]]:
    """Encode many rendered texts at once.

    Returns:
        for each text its ids, and for each id whether a loss may look at it.
    """
    facts = facts_of(tokenizer)
    texts = [span.text for one in rendered for span in one.spans]
    encoded = iter(_encode(tokenizer, texts) if texts else [])
    rows = []
    for one in rendered:
        parts = [(next(encoded), span.supervised) for span in one.spans]
        if one.careful and not _as_written(tokenizer, facts, one, parts):
            parts = [
                (_literal(tokenizer, facts, s.text) if s.literal else _known(tokenizer, facts, s.text), s.supervised)
                for s in one.careful
            ]
        ids = [index for part, _ in parts for index in part]
        supervised = [flag for part, flag in parts for _ in part]
        if one.opening and tuple(ids[: len(one.opening)]) != one.opening:
            ids, supervised = [*one.opening, *ids], [False] * len(one.opening) + supervised
        if one.closing and tuple(ids[-len(one.closing) :]) != one.closing:
            ids, supervised = [*ids, *one.closing], supervised + [True] * len(one.closing)
        rows.append((ids, supervised))
    return rows


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
        if len(facts.encoded) > 4096:  # a template that counts its turns writes ever new texts
            facts.encoded.clear()
        facts.encoded[text] = _encode(tokenizer, [text])[0] if text else []
    return facts.encoded[text]


def _as_written(
    tokenizer: PreTrainedTokenizerBase, facts: Facts, rendered: Rendered, parts: list[tuple[list[int], bool]]
) -> bool:
    """Whether the control tokens found are those the template wrote, so that no content was taken for one."""
    control = facts.control_ids
    found = [i for ids, _ in parts for i in ids if i in control]
    written = [s.text for s in rendered.careful if not s.literal]
    return found == [i for text in written for i in _known(tokenizer, facts, text) if i in control]


def _literal(tokenizer: PreTrainedTokenizerBase, facts: Facts, text: str) -> list[int]:
    """Ids of a content, none of them a control token."""
    marks = "|".join(re.escape(c) for c in sorted(facts.control, key=len, reverse=True))
    pieces = [piece for piece in re.split(f"({marks})", text) if piece] if marks else [text]
    control = facts.control_ids
    ids: list[int] = []
    for piece in pieces:
        found = _plainly(tokenizer, piece)
        if piece in facts.control and not control.isdisjoint(found):
            found = _plainly(tokenizer, piece[:1]) + _plainly(tokenizer, piece[1:])  # its halves are not recognised
        ids += [i for i in found if i not in control]
    return ids


def _plainly(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
