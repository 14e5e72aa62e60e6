"""Facts about a tokenizer and its chat template that must be found by experiment, once for each tokenizer."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import product
from typing import Any, Literal
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from rlhf_lightning.tokenization.sandbox import literal_text, shared_time
from rlhf_lightning.tokenization.templates import (
    PINNED_DATE,
    ChatTemplateError,
    TurnsRefused,
    apply_template,
    template_args_of,
    template_of,
)
from rlhf_lightning.types import Message

THOUGHT_TAGS = (("<think>", "</think>"), ("<thinking>", "</thinking>"), ("[THINK]", "[/THINK]"))
"""Pairs of texts that open and close a thought."""

THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys under which templates look for the thought (reasoning) of a turn."""

STOP_TOKENS, STOP_STRINGS = "stop_tokens", "stop_strings"
"""Keys in tokenizer_config.json for further tokens and for strings that end a completion."""


class Ends(tuple[int, ...]):
    """Ids of the tokens that end a completion, and strings that end it.

    Attributes:
        strings: the stop strings, searched in the decoded completion with its control tokens. A completion ends with
            the token that completes a stop string.
    """

    strings: tuple[str, ...] = ()
    _tokenizer: PreTrainedTokenizerBase
    _window: int

    @classmethod
    def of(cls, ids: Sequence[int], strings: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Ends:
        """Return an `Ends` of ids and stop strings."""
        made = cls(ids)
        made.strings, made._tokenizer = tuple(strings), tokenizer
        # Each token has at least one byte, and a character at most four bytes.
        made._window = max((len(text.encode()) for text in strings), default=0) + 4
        return made

    def _in(self, ids: Sequence[int]) -> bool:
        text = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return any(one in text for one in self.strings)

    def completed(self, ids: Sequence[int]) -> bool:
        """Return whether the last token of a completion completes a stop string."""
        return bool(self.strings) and self._in(ids[-self._window :])

    def stop(self, ids: Sequence[int]) -> int | None:
        """Return the number of tokens up to the one that completes a stop string; None if no string is complete."""
        if not self.strings or not self._in(ids):
            return None
        return bisect_left(range(len(ids) + 1), True, key=lambda count: self._in(ids[:count]))


TAIL = 64
"""Number of characters at a prompt's end that may influence how its completion is encoded."""

GUARD = re.compile("\ue000([0-9]+)\ue001")

OWN_KEYS = ("weight", "tools", "template_args")
"""Keys of a message that are not passed to templates."""

_CALL = {"type": "function", "id": "call00001", "function": {"name": "\ue000call\ue001", "arguments": {"a": "\ue000b"}}}
_TOOL = {
    "type": "function",
    "function": {
        "name": "\ue000call\ue001",
        "description": "d",
        "parameters": {"type": "object", "properties": {"a": {"type": "string", "description": "d"}}, "required": []},
    },
}


class Facts:
    """Facts about one tokenizer and its chat template. Holds no reference to the tokenizer.

    Attributes:
        control: the control tokens and their ids: tokens marked special, and tokens that the chat template writes.
            Content is never encoded as a control token.
        unknown: the unknown token and its id, unless it is also a control token. It stands for text.
        speakable: control tokens that the assistant's own turn may hold, such as ``<think>``: thought tags, and tokens
            of the template that are neither marked special nor delimit turns.
        end_of_turn: control token that ends a turn of the assistant.
        call_end: control token that ends a turn of the assistant with tool calls.
        trims_right: whether the template strips space at the end of the assistant's content.
        opening: ids that the tokenizer prepends to a text.
        anchor: ids of a text that is put before a continuation while encoding it, for tokenizers that would otherwise
            begin it with a space; empty for other tokenizers.
        spaced_after_control: whether such a tokenizer also begins the text after a control token with a space.
        parts: whether the template accepts contents only as lists of parts.
        reads_thoughts: whether the template reads the thought of a turn from `THOUGHT_KEYS`.
        moves_thoughts: whether a thought in the content must be moved to those keys.
        thinks: whether the template knows thought tags.
        calls: how the template reads tool calls: arguments as an object or as JSON text, and whether a call without
            text has null content; None if it ignores tool calls.
        dated: whether the template writes a date.
        stops: ids of further tokens that end a completion.
        stop_strings: strings that end a completion.
        written_turns: for a sequence of roles, the indices of the turns that the template writes, in its order.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.key = _identity(tokenizer)
        self.settled = False
        self.eos: int = tokenizer.eos_token_id
        self.end_of_turn: str | None = None
        self.call_end: str | None = None
        self.trims_right = False
        self.parts = False
        self.reads_thoughts = self.moves_thoughts = self.thinks = False
        self.calls: tuple[Literal["object", "text"], bool] | None = None
        self.dated = False
        self.written_turns: dict[tuple[str, ...], tuple[int, ...]] = {}
        vocabulary = tokenizer.get_vocab() if tokenizer.init_kwargs.get(STOP_TOKENS) else {}
        stops = tokenizer.init_kwargs.get(STOP_TOKENS, ())
        self.stops = tuple(vocabulary[name] for name in stops if name in vocabulary)
        self.stop_strings = tuple(tokenizer.init_kwargs.get(STOP_STRINGS, ()))
        added = tokenizer.added_tokens_decoder
        unknown = tokenizer.unk_token_id if tokenizer.unk_token_id not in (self.eos, tokenizer.bos_token_id) else None
        self.unknown = None if unknown is None else (tokenizer.unk_token, unknown)
        special = {token.content: index for index, token in added.items() if token.special and index != unknown}
        named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
        self.control: dict[str, int] = {**{token: index for token, index in named if index != unknown}, **special}
        self.speakable: dict[str, int] = {}
        self.spaces = {token.content: (token.lstrip, token.rstrip) for token in added.values()}
        begin = tokenizer.bos_token_id
        plain = tokenizer("").input_ids
        self.opening: tuple[int, ...] = (begin,) if begin is not None and plain[:1] == [begin] else ()
        self._find_space_marks(tokenizer)

    # ---- the tokenizer ----------------------------------------------------------------------------------------------

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids of the control tokens."""
        return frozenset(self.control.values())

    @cached_property
    def guarded_ids(self) -> frozenset[int]:
        """Ids of the control tokens that not even the assistant's own turn may hold."""
        return self.control_ids - frozenset(self.speakable.values())

    @cached_property
    def spellings(self) -> list[str]:
        """Texts that are guarded in contents: control tokens, the unknown token, and the guard's own mark."""
        unknown = [] if self.unknown is None else [self.unknown[0]]
        return sorted({*self.control, *unknown, "\ue000"}, key=lambda text: (-len(text), text))

    @cached_property
    def guards(self) -> tuple[re.Pattern[str], re.Pattern[str]]:
        """Two patterns of forbidden spellings: one for any content, one for the assistant's content."""
        spoken = [text for text in self.spellings if text not in self.speakable]
        return any_of(self.spellings), any_of(spoken)

    @cached_property
    def written(self) -> re.Pattern[str]:
        """Pattern of control tokens in rendered text, including spaces that the tokenizer strips around them."""
        names = sorted(self.control, key=len, reverse=True)
        spaces = [self.spaces.get(name, (False, False)) for name in names]
        marks = [
            (r"\s*" if left else "") + re.escape(name) + (r"\s*" if right else "")
            for name, (left, right) in zip(names, spaces, strict=True)
        ]
        return re.compile("|".join(marks) or r"(?!)")

    def guarded(self, text: str, spoken: bool = False) -> str:
        """Replace spellings of control tokens by guards; with ``spoken``, speakable ones (thought tags) stay."""
        return self.guards[spoken].sub(lambda found: f"\ue000{self.spellings.index(found[0])}\ue001", text)

    def guarded_values(self, value: Any, spoken: bool) -> Any:
        """Guard every text in a message or a tool description, except roles."""
        if isinstance(value, str):
            return self.guarded(value, spoken)
        if isinstance(value, list | tuple):
            return [self.guarded_values(one, spoken) for one in value]
        if isinstance(value, dict):
            return {
                self.guarded(name): one if name == "role" else self.guarded_values(one, spoken)
                for name, one in value.items()
            }
        return value

    def restored(self, text: str) -> str:
        """Restore the spellings that `guarded` replaced."""
        return GUARD.sub(lambda found: self.spellings[int(found[1])], text) if "\ue000" in text else text

    def tail_of(self, text: str) -> str:
        """Return the end of a text: the part after its last control token, or that token if it is at the very end."""
        tail = text[-TAIL:]
        marks = list(self.written.finditer(tail))
        return tail[marks[-1].end() :] or marks[-1][0] if marks else tail

    @property
    def ends(self) -> tuple[int, ...]:
        """Ids that end a completion: EOS, the ends of turns (also of turns with tool calls), and stop tokens."""
        turns = [self.control[name] for name in (self.end_of_turn, self.call_end) if name is not None]
        return tuple(dict.fromkeys([self.eos, *turns, *self.stops]))

    def _find_space_marks(self, tokenizer: PreTrainedTokenizerBase) -> None:
        def encode(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

        alone, mark, both, after = encode("a"), encode("\n"), encode("\na"), encode(f"{tokenizer.eos_token}a")
        spaced = both[: len(mark)] == mark and both[len(mark) :] != alone
        self.anchor: tuple[int, ...] = tuple(mark) if spaced else ()
        self.spaced_after_control = after[1:] == alone

    # ---- the chat template ------------------------------------------------------------------------------------------

    def for_template(self, message: Message) -> Message:
        """Return a message in the form that the template reads."""
        made = {name: value for name, value in message.items() if name not in OWN_KEYS}
        thought = next((made.pop(name) for name in THOUGHT_KEYS if made.get(name)), None)
        content = made["content"]
        if thought is None and self.moves_thoughts and message["role"] == "assistant":
            thought, content = thought_and_answer(content)
        if thought is not None and self.reads_thoughts:
            made.update(dict.fromkeys(THOUGHT_KEYS, thought))
        elif thought is not None and self.thinks:
            opened, closed = THOUGHT_TAGS[0]
            content = f"{opened}\n{thought}\n{closed}\n\n{content}"
        if calls := made.get("tool_calls"):
            form, null = self.calls or ("object", False)
            made["tool_calls"] = [_call_in(form, call) for call in calls]
            content = None if null and content == "" else content
        made["content"] = [{"type": "text", "text": content or ""}] if self.parts else content
        return made

    def read_template(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Find out what the template writes and reads."""
        self._read_contents(tokenizer)
        asked = self._write(tokenizer, _turns("user"), generation=True)
        told = self._write(tokenizer, _turns("user", "assistant", "user"))
        last = self._write(tokenizer, _turns("user", "assistant")).rpartition("\ue000assistant\ue001")[2]
        source = literal_text(template_of(tokenizer))
        self._read_markers(tokenizer, told + source, asked, last)
        found = [(last.find(c), c) for c in self.control if c in last]
        self.end_of_turn = min(found, default=(0, None), key=lambda place: (place[0], -len(place[1] or "")))[1]
        self.dated = "strftime_now" in template_of(tokenizer)
        self._read_thoughts(tokenizer, source)
        self._read_calls(tokenizer)

    def _write(self, tokenizer: PreTrainedTokenizerBase, messages: list[Message], generation: bool = False) -> str:
        given = [{**m, "content": [{"type": "text", "text": m["content"]}]} if self.parts else m for m in messages]
        return apply_template(tokenizer, given, generation)

    def _read_contents(self, tokenizer: PreTrainedTokenizerBase) -> None:
        padded = [{"role": role, "content": f"\ue000{role}\ue001\n "} for role in ("user", "assistant")]
        for self.parts in (False, True):
            with contextlib.suppress(TurnsRefused):
                text = self._write(tokenizer, padded)
                if all(f"\ue000{role}\ue001" in text for role in ("user", "assistant")):
                    self.trims_right = "assistant\ue001\n " not in text
                    return
        self.parts = False

    def _read_markers(self, tokenizer: PreTrainedTokenizerBase, written: str, asked: str, last: str) -> None:
        around = asked.rpartition("\ue000user\ue001")
        tags = {tag for pair in THOUGHT_TAGS for tag in pair}
        for index, token in tokenizer.added_tokens_decoder.items():
            name = token.content
            if name not in written or not _MARK.search(name):
                continue
            if name in tags or (name not in self.control and name not in around[0] + around[2] and name not in last):
                self.speakable[name] = index
            self.control[name] = index

    def _read_thoughts(self, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
        self.thinks = any(tag in source for pair in THOUGHT_TAGS for tag in pair)
        opened, closed = THOUGHT_TAGS[0]
        (told,) = _turns("assistant")
        named = {**told, **dict.fromkeys(THOUGHT_KEYS, "\ue000thought")}
        inside = {**told, "content": f"{opened}\n\ue000thought\n{closed}\n\n{told['content']}"}
        with contextlib.suppress(TurnsRefused):
            text = self._write(tokenizer, [*_turns("user"), named])
            self.reads_thoughts = "\ue000thought" in text
            other = self._write(tokenizer, [*_turns("user"), inside])
            self.moves_thoughts = self.reads_thoughts and other.count(opened) != text.count(opened)

    def _read_calls(self, tokenizer: PreTrainedTokenizerBase) -> None:
        forms: tuple[Literal["object", "text"], ...] = ("object", "text")
        for form, null, count in product(forms, (False, True), (2, 1)):
            calls = [_call_in(form, _CALL)] * count
            call = {"role": "assistant", "content": None if null else "", "tool_calls": calls}
            with contextlib.suppress(TurnsRefused):
                text = apply_template(tokenizer, [*_turns("user"), call], False, tools=[_TOOL])
                said = text.rpartition("\ue000user\ue001")[2]
                if "\ue000call\ue001" in said and "\ue000b" in said and '\\"' not in said:
                    self.calls = (form, null)
                    names = [n for n in self.control if n not in self.speakable and said.rstrip().endswith(n)]
                    self.call_end = max((n for n in names if said.count(n) == 1), key=len, default=None)
                    return


def thought_and_answer(content: str) -> tuple[str | None, str]:
    """Split a content into the thought at its beginning and the rest; without exactly one thought it is None."""
    for opened, closed in THOUGHT_TAGS:
        thought, found, answer = content.partition(closed)
        thought = thought.lstrip().removeprefix(opened)
        if found and closed not in answer and opened not in thought + answer:
            return thought.strip(), answer.lstrip()
    return None, content


_FACTS: WeakKeyDictionary[PreTrainedTokenizerBase, Facts] = WeakKeyDictionary()

_MARK = re.compile(r"[^\w\s]")
"""Matches added tokens that are more than a word or white space, and so may be markers."""


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of the texts, longest first."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))


def _turns(*roles: str) -> list[Message]:
    return [{"role": role, "content": f"\ue000{role}\ue001"} for role in roles]


def _call_in(form: Literal["object", "text"], call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    if form == "text" and not isinstance(function["arguments"], str):
        function = {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
    return {**call, "function": function}


def _identity(tokenizer: PreTrainedTokenizerBase) -> tuple[Any, ...]:
    args = template_args_of(tokenizer)
    written = json.dumps(args, sort_keys=True, default=str) if args else ""
    stops = tuple(tuple(tokenizer.init_kwargs.get(name, ())) for name in (STOP_TOKENS, STOP_STRINGS))
    return (tokenizer.chat_template, len(tokenizer), tokenizer.eos_token, tokenizer.bos_token, stops, written)


def facts_of(tokenizer: PreTrainedTokenizerBase) -> Facts:
    """Return the facts about a tokenizer, found on first use and again after a change."""
    facts = _FACTS.get(tokenizer)
    if facts is None or not (facts.settled or facts.key == _identity(tokenizer)):
        facts = Facts(tokenizer)
        if tokenizer.chat_template:
            # A refusal is raised again, with the refused turns, when the template is used.
            with contextlib.suppress(ChatTemplateError), shared_time():
                facts.read_template(tokenizer)
        _FACTS[tokenizer] = facts
    return facts


@contextlib.contextmanager
def settled(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Assume that the tokenizer does not change inside the block: checking costs more than rendering a short text."""
    facts = facts_of(tokenizer)
    before, facts.settled = facts.settled, True
    try:
        yield
    finally:
        facts.settled = before


def end_token_ids(tokenizer: PreTrainedTokenizerBase) -> Ends:
    """Return everything that ends a completion: EOS, the template's ends of turns, stop tokens and stop strings."""
    facts = facts_of(tokenizer)
    return Ends.of(facts.ends, facts.stop_strings, tokenizer)


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids that the tokenizer itself prepends to a text: BOS, or none."""
    return facts_of(tokenizer).opening


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash everything that determines how text becomes ids: vocabulary, rules, special tokens, template, arguments."""
    digest = hashlib.blake2b(digest_size=16)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_padding()  # padding and truncation are set by every call, and would otherwise change the hash
        backend.no_truncation()
        digest.update(backend.to_str().encode("utf-8", "surrogatepass"))
    else:
        digest.update(repr(sorted(tokenizer.get_vocab().items())).encode("utf-8", "surrogatepass"))
    digest.update(repr(sorted(tokenizer.special_tokens_map.items())).encode())
    facts = facts_of(tokenizer)
    decided = (tokenizer.chat_template, facts.opening, facts.key[-1], PINNED_DATE if facts.dated else None)
    digest.update(repr(decided).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
