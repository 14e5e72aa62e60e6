"""Text to token ids: one way for every stage, so that what is trained is what is sampled.

A prompt and its completion are encoded apart and joined (``ids = prompt ids ++ completion ids``), which is what the
policy sees when it answers: it continues the prompt's ids and never re-encodes them. A conversation is rendered by the
tokenizer's chat template; its text already carries the BOS token, so nothing is added to it.

What a completion ends with: the template's end-of-turn token for messages, EOS for plain text. Whatever a template
writes after it (often a line break) is no part of the completion, since a sampled completion stops at its end token.

Text is data, never control: a special-token string inside a message is encoded as the plain characters it is made of.
Plain-text prompts and completions stand as they are, since they may have been rendered by a template before.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf_lightning.types import Message, Prompt

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '### ' + message['role'] | capitalize + ':\n' + message['content'] }}"
    "{{ eos_token + '\n\n' if message['role'] == 'assistant' else '\n\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)
CHAT_TEMPLATES = {"chatml": CHATML, "plain": PLAIN}
"""Templates that ship with the package. ``default`` is ``chatml`` where its two tokens are known, else ``plain``."""

PAD_CANDIDATES = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>")


class ChatTemplateError(ValueError):
    """The chat template cannot render these messages, or there is none."""


class Span(NamedTuple):
    """A piece of rendered text; ``literal`` text is somebody's content, in which no control token may be recognised."""

    text: str
    supervised: bool = True
    literal: bool = False


class Rendered(NamedTuple):
    """Text ready to be encoded.

    Attributes:
        spans: the text, cut where supervision changes; each span is encoded by itself.
        careful: the same text with the contents cut out as literal spans; empty for plain text. Used when encoding
            ``spans`` finds other control tokens than the template wrote.
        closing: ids to append, supervised, unless the text ends with them.
        opening: ids to put in front, unless the text begins with them.
    """

    spans: tuple[Span, ...]
    careful: tuple[Span, ...] = ()
    closing: tuple[int, ...] = ()
    opening: tuple[int, ...] = ()


class _Facts:
    """What has been found out about one tokenizer and its chat template. Holds no reference to the tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.key = _identity(tokenizer)
        self.scaffolds: dict[tuple[tuple[str, ...], bool], tuple[str | int, ...]] = {}
        self.encoded: dict[str, list[int]] = {}
        self.end_of_turn: str | None = None
        self.kept_space: dict[str, tuple[bool, bool]] = {}
        added = tokenizer.added_tokens_decoder
        self.control = {token.content: index for index, token in added.items() if token.special}
        begin = tokenizer.bos_token_id
        plain = tokenizer("").input_ids
        self.opening: tuple[int, ...] = (begin,) if begin is not None and plain[:1] == [begin] else ()

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids of the control tokens."""
        return frozenset(self.control.values())

    def read_template(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Find the template's turn markers, its end of turn, and where it trims contents."""
        roles = ("user", "assistant")
        pieces = [p for p in _scaffold(tokenizer, self, (*roles, "user")) if isinstance(p, str)]
        for token in tokenizer.added_tokens_decoder.values():
            if any(token.content in piece for piece in pieces):
                self.control.setdefault(token.content, tokenizer.convert_tokens_to_ids(token.content))
        last = _scaffold(tokenizer, self, roles)[-1]
        found = [(last.find(c), c) for c in self.control if c in last] if isinstance(last, str) else []
        self.end_of_turn = min(found, default=(0, None), key=lambda place: (place[0], -len(place[1] or "")))[1]
        padded = [{"role": role, "content": f" \n\ue000{role}\ue001\n "} for role in roles]
        text = _apply(tokenizer, padded, generation=False)
        for role in roles:
            self.kept_space[role] = (f" \n\ue000{role}" in text, f"{role}\ue001\n " in text)


_FACTS: WeakKeyDictionary[PreTrainedTokenizerBase, _Facts] = WeakKeyDictionary()


def _identity(tokenizer: PreTrainedTokenizerBase) -> tuple[Any, ...]:
    return (tokenizer.chat_template, len(tokenizer), tokenizer.eos_token, tokenizer.bos_token)


def _facts(tokenizer: PreTrainedTokenizerBase) -> _Facts:
    facts = _FACTS.get(tokenizer)
    if facts is None or facts.key != _identity(tokenizer):
        facts = _Facts(tokenizer)
        if tokenizer.chat_template:
            with contextlib.suppress(ChatTemplateError):  # raised again, with the turns it refuses, when it is used
                facts.read_template(tokenizer)
        _FACTS[tokenizer] = facts
    return facts


def load_tokenizer(
    name_or_folder: str | Path, chat_template: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load a tokenizer that has a pad token of its own and, if asked for, a chat template.

    The pad token is the tokenizer's own unless a completion may end with it; else the first of ``<pad>``, ``<|pad|>``,
    ``[PAD]``, ``<|finetune_right_pad_id|>``, ``<|endoftext|>`` and the unknown token that is in the vocabulary and ends
    no completion; else ``<|pad|>`` is added. Masks come from lengths, so its id never reaches a loss.

    Args:
        name_or_folder: name on the Hugging Face Hub, or a folder.
        chat_template: text of a Jinja template, path of a ``.jinja`` file, or the name of a shipped one: ``chatml``,
            ``plain``, or ``default``, which is the first of those two that the vocabulary allows. None keeps the
            tokenizer's own.
        trust_remote_code: run the Python code that the tokenizer brings along, if any.

    Raises:
        FileNotFoundError: if there is no tokenizer under that name.
        ValueError: if the template is not found, or there is no EOS token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name_or_folder), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"The tokenizer {str(name_or_folder)!r} needs Python code of its own, which is run only where it is "
                f"named: --model.trust_remote_code {name_or_folder}"
            ) from error
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"No tokenizer in {str(name_or_folder)!r} ({reason}); give a Hub name or a folder with tokenizer.json."
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"The tokenizer {str(name_or_folder)!r} has no EOS token, so a completion could not end.")
    if chat_template is not None:
        tokenizer.chat_template = _template_text(tokenizer, chat_template)
    _ensure_pad(tokenizer)
    return tokenizer


def _template_text(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> str:
    vocabulary = tokenizer.get_vocab()
    if chat_template == "default":
        chat_template = "chatml" if {"<|im_start|>", "<|im_end|>"} <= vocabulary.keys() else "plain"
    if chat_template in CHAT_TEMPLATES:
        if chat_template == "chatml" and not {"<|im_start|>", "<|im_end|>"} <= vocabulary.keys():
            raise ValueError("chat_template 'chatml' needs <|im_start|> and <|im_end|> in the vocabulary: use 'plain'.")
        text = CHAT_TEMPLATES[chat_template]
        return text if tokenizer.bos_token else text.replace("{{ bos_token }}", "")
    if "{" in chat_template:
        return chat_template
    if not Path(chat_template).is_file():
        raise ValueError(
            f"chat_template {chat_template!r} is neither a Jinja text, nor a file, nor one of "
            f"{', '.join(['default', *CHAT_TEMPLATES])}."
        )
    return Path(chat_template).read_text(encoding="utf-8")


def _ensure_pad(tokenizer: PreTrainedTokenizerBase) -> None:
    ends = set(end_token_ids(tokenizer))
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in ends:
        return
    vocabulary = tokenizer.get_vocab()
    for candidate in (*PAD_CANDIDATES, tokenizer.unk_token):
        if candidate is not None and vocabulary.get(candidate, tokenizer.eos_token_id) not in ends:
            tokenizer.pad_token = candidate
            return
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})


def end_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end a completion: EOS, and the chat template's end of turn where that is another token."""
    ids = [tokenizer.eos_token_id]
    facts = _facts(tokenizer)
    if facts.end_of_turn is not None and facts.control[facts.end_of_turn] not in ids:
        ids.append(facts.control[facts.end_of_turn])
    return tuple(ids)


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that the tokenizer itself puts in front of a text: BOS, or none."""
    return _facts(tokenizer).opening


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
    digest.update(repr((tokenizer.chat_template, _facts(tokenizer).opening)).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


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


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> Rendered:
    """Text of a prompt, ready for `encode_rendered`.

    Raises:
        ChatTemplateError: if the template is missing or refuses the messages.
    """
    facts = _facts(tokenizer)
    if isinstance(prompt, str):
        return Rendered((Span(prompt),), opening=facts.opening)
    open_turn = bool(prompt) and prompt[-1]["role"] == "assistant"
    text = _apply(tokenizer, prompt, generation=not open_turn, open_turn=open_turn)
    roles = tuple(message["role"] for message in prompt)
    pieces = _scaffold(tokenizer, facts, roles, generation=not open_turn)
    if open_turn:
        pieces = pieces[:-1]
    careful = [_content(facts, prompt[p]) if isinstance(p, int) else Span(p) for p in pieces]
    return Rendered((Span(text),), tuple(careful))


def render_completion(tokenizer: PreTrainedTokenizerBase, completion: str | list[Message], prompt: Prompt) -> Rendered:
    """Text of a completion, ready for `encode_rendered`. See `encode_completion` for the arguments.

    Raises:
        ChatTemplateError: if the template is missing or refuses the messages.
    """
    closing = (tokenizer.eos_token_id,)
    if isinstance(prompt, str):
        if not isinstance(completion, str):
            raise ValueError("A completion of messages needs a prompt of messages, not plain text.")
        return Rendered((Span(completion),), closing=closing)
    answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    facts = _facts(tokenizer)
    before = prompt[:-1] if prompt and prompt[-1]["role"] == "assistant" else prompt
    roles = tuple(message["role"] for message in [*before, *answer])
    pieces = _scaffold(tokenizer, facts, roles)
    if len(before) not in pieces:
        raise ChatTemplateError(f"The chat template leaves out a turn of the role {answer[0]['role']!r}.")
    start = pieces.index(len(before))
    careful: list[Span] = []
    if len(before) == len(prompt) and start > 0:
        # Some templates open the assistant's turn with more than the generation prompt: the policy has to write that.
        opened, full = _scaffold(tokenizer, facts, roles[: len(before)], generation=True)[-1], pieces[start - 1]
        if isinstance(opened, str) and isinstance(full, str) and full.startswith(opened):
            careful.append(Span(full[len(opened) :]))
    ended = False
    for piece in pieces[start:]:
        if isinstance(piece, int):
            message = answer[piece - len(before)]
            supervised, ended = message["role"] == "assistant", False
            careful.append(_content(facts, message)._replace(supervised=supervised))
            continue
        end = piece.find(facts.end_of_turn) if facts.end_of_turn else -1
        cut = end + len(facts.end_of_turn or "") if supervised and end >= 0 else 0
        careful += [Span(piece[:cut], True), Span(piece[cut:], False)]
        ended = cut > 0
    while careful and not careful[-1].supervised:
        careful.pop()
    return Rendered(_joined(careful), tuple(s for s in careful if s.text), closing=() if ended else closing)


def render_steps(
    tokenizer: PreTrainedTokenizerBase, steps: Sequence[str], separator: str, prompt: Prompt
) -> list[Rendered]:
    """Text of a completion in steps, one piece a step, ready for `encode_rendered`.

    The ids of the pieces, one after the other, are the completion. Each step is followed by the separator, the last one
    by the end of the completion instead, so that the last id of a piece is where its step is known to be over.

    Args:
        tokenizer: the policy's tokenizer.
        steps: text of each step; one that ends with the separator already gets no second.
        separator: what stands between two steps.
        prompt: what the completion answers.

    Raises:
        ChatTemplateError: if the template is missing or refuses the messages.
    """
    texts = [step.removesuffix(separator) for step in steps]
    texts = [f"{text}{separator}" for text in texts[:-1]] + texts[-1:]
    whole = render_completion(tokenizer, "".join(texts), prompt)
    careful = whole.careful or whole.spans
    place = next(index for index, span in enumerate(careful) if span.literal or not whole.careful)
    if not "".join(texts).startswith(careful[place].text):  # the template strips what it is given
        texts[0] = texts[0].lstrip()
    if not "".join(texts).endswith(careful[place].text):
        texts[-1] = texts[-1].rstrip()
    pieces = [[careful[place]._replace(text=text)] for text in texts]
    pieces[0] = [*careful[:place], *pieces[0]]
    pieces[-1] = [*pieces[-1], *careful[place + 1 :]]
    rendered = [Rendered(tuple(spans), tuple(spans) if whole.careful else ()) for spans in pieces]
    return [*rendered[:-1], rendered[-1]._replace(closing=whole.closing)]


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
    facts = _facts(tokenizer)
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


def _apply(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], generation: bool, open_turn: bool = False
) -> str:
    if not tokenizer.chat_template:
        raise ChatTemplateError(
            f"The tokenizer {tokenizer.name_or_path!r} has no chat template, and this data is conversational "
            "(messages): give chat_template the text of a Jinja template, the path of a .jinja file, or 'default'."
        )
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=generation, continue_final_message=open_turn
        )
    except Exception as error:  # a template is a stranger's program: it may raise anything
        roles = ", ".join(message["role"] for message in messages[:8])
        raise ChatTemplateError(f"The chat template refuses the turns ({roles}): {error}") from error


def _scaffold(
    tokenizer: PreTrainedTokenizerBase, facts: _Facts, roles: tuple[str, ...], generation: bool = False
) -> tuple[str | int, ...]:
    """What the template writes around the contents of turns with these roles: texts, and indices of contents."""
    known = facts.scaffolds.get((roles, generation))
    if known is None:
        marked = [{"role": role, "content": f"\ue000{i}\ue001"} for i, role in enumerate(roles)]
        pieces = re.split("\ue000([0-9]+)\ue001", _apply(tokenizer, marked, generation))
        known = tuple(int(piece) if i % 2 else piece for i, piece in enumerate(pieces))
        if len(roles) <= 16:  # longer conversations rarely share their roles with another
            facts.scaffolds[(roles, generation)] = known
    return known


def _content(facts: _Facts, message: Message) -> Span:
    left, right = facts.kept_space.get(message["role"], (True, True))
    text = message["content"] if left else message["content"].lstrip()
    return Span(text if right else text.rstrip(), literal=True)


def _joined(spans: Sequence[Span]) -> tuple[Span, ...]:
    joined: list[Span] = []
    for span in spans:
        if joined and joined[-1].supervised == span.supervised:
            joined[-1] = Span(joined[-1].text + span.text, span.supervised)
        elif span.text:
            joined.append(Span(span.text, span.supervised))
    return tuple(joined)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _known(tokenizer: PreTrainedTokenizerBase, facts: _Facts, text: str) -> list[int]:
    if text not in facts.encoded:
        if len(facts.encoded) > 4096:  # a template that counts its turns writes ever new texts
            facts.encoded.clear()
        facts.encoded[text] = _encode(tokenizer, [text])[0] if text else []
    return facts.encoded[text]


def _as_written(
    tokenizer: PreTrainedTokenizerBase, facts: _Facts, rendered: Rendered, parts: list[tuple[list[int], bool]]
) -> bool:
    """Whether the control tokens found are those the template wrote, so that no content was taken for one."""
    control = facts.control_ids
    found = [i for ids, _ in parts for i in ids if i in control]
    written = [s.text for s in rendered.careful if not s.literal]
    return found == [i for text in written for i in _known(tokenizer, facts, text) if i in control]


def _literal(tokenizer: PreTrainedTokenizerBase, facts: _Facts, text: str) -> list[int]:
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
