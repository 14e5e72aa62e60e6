"""Extract an assistant's turn after its prompt from the chat template's rendering of the conversation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from rlhf_lightning.tokenization.facts import THOUGHT_KEYS, THOUGHT_TAGS, any_of, facts_of
from rlhf_lightning.tokenization.templates import TurnsRefused, apply_template
from rlhf_lightning.types import Message

MOST_TURNS = 256
"""Maximum number of trained turns of a conversation: each needs renderings of everything before it."""


class Span(NamedTuple):
    """A part of a rendered text.

    Attributes:
        text: the text, with guards.
        supervised: whether its tokens enter the loss.
    """

    text: str
    supervised: bool = True


class Rendered(NamedTuple):
    """Text ready to be encoded.

    Attributes:
        spans: the text, split where supervision changes; each span is encoded separately.
        before: the end of the preceding text.
        closing: ids to append, supervised, unless the text ends with them.
        opening: ids to prepend, unless the text begins with them.
        last_turn: whether only the last of several assistant turns is trained on.
        turns_cut: whether trained turns after the first `MOST_TURNS` are left out.
    """

    spans: tuple[Span, ...]
    before: str = ""
    closing: tuple[int, ...] = ()
    opening: tuple[int, ...] = ()
    last_turn: bool = False
    turns_cut: bool = False


class Said(NamedTuple):
    """Text of a turn after its prompt, up to its end token, and whether the turn has an end token."""

    text: str
    ended: bool


class RenderedConversation:
    """Renders prefixes of a conversation, with guards."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message]) -> None:
        self.tokenizer, self.facts, self.turns = tokenizer, facts_of(tokenizer), turns
        self.tools = next((turn["tools"] for turn in turns if turn.get("tools")), None)
        self.args: dict[str, Any] = next((turn["template_args"] for turn in turns if turn.get("template_args")), {})
        self.real = [self.facts.for_template(turn) for turn in turns]
        self.safe = [self.facts.guarded_values(turn, turn["role"] == "assistant") for turn in self.real]
        self.safe_tools = self.facts.guarded_values(self.tools, False)
        self.safe_args = self.facts.guarded_values(self.args, False)
        self.is_safe = (self.safe, self.safe_tools, self.safe_args) == (self.real, self.tools, self.args)
        self.written_turns = {} if self.args else self.facts.written_turns
        self._check_context()

    def text(self, stop: int, generation: bool = False, open_turn: bool = False) -> str:
        """Render the first ``stop`` turns."""
        written = apply_template(self.tokenizer, self.real[:stop], generation, open_turn, self.tools, self.args)
        if self.is_safe:
            return written
        text = apply_template(self.tokenizer, self.safe[:stop], generation, open_turn, self.safe_tools, self.safe_args)
        if self.facts.restored(text) != written:
            raise TurnsRefused(
                "control-token-read",
                "a turn spells a control token, and the chat template does something else for it; remove it",
            )
        return text

    def prompt(self, stop: int) -> str:
        """Render the first ``stop`` turns as a prompt; if the last turn is the assistant's, it is left open."""
        opened = stop > 0 and self.turns[stop - 1]["role"] == "assistant" and stop == len(self.turns)
        text = self.text(stop, generation=not opened, open_turn=opened)
        self._check_turns(text, stop)
        return text.rstrip() if opened and self.facts.trims_right else text

    def said(self, place: int, asked: str, message: Message | None = None) -> Said:
        """Return the text that the assistant's turn at ``place`` adds to its prompt.

        If the prompt already holds the beginning of the turn, ``message`` is the rest of the turn.
        """
        self._check_order(place)
        whole = self.text(place + 1)
        text = whole[len(asked) :] if whole.startswith(asked) else self._after_rewriting(place, asked, whole)
        message = message or self.turns[place]
        self._check_answer(self.facts.restored(text), message)
        content = self.facts.guarded(message["content"], spoken=True)
        return self.up_to_end(text, content, bool(message.get("tool_calls")))

    def completion(self, asked: str, spans: Sequence[Span], ended: bool, last_turn: bool = False) -> Rendered:
        """Return the spans after a prompt as a `Rendered`."""
        kept = tuple(span for span in spans if span.text)
        closing = () if ended else (self.facts.eos,)
        return Rendered(kept, self.facts.tail_of(asked), closing, last_turn=last_turn)

    def check_replies(self, text: str, replies: Sequence[Message]) -> None:
        """Refuse a rendering that leaves out the content of a reply."""
        text = self.facts.restored(text)
        for turn in replies:
            if str(turn["content"]).strip() not in text:
                raise _left_out(turn["role"])

    def up_to_end(self, text: str, content: str, calls: bool) -> Said:
        """Cut the rendering of a turn after its end token; with ``calls``, tool calls follow its content."""
        facts = self.facts
        ends = frozenset(name for name in (facts.end_of_turn, facts.call_end, self.tokenizer.eos_token) if name)
        said = text.rfind(content.strip()) + len(content.strip()) if content.strip() in text else 0
        if said and not calls and (end_mark := _pattern_of(ends).search(text, said)):
            return Said(text[: end_mark.end()], True)  # sampling stops before anything that a template writes here
        run = re.compile(rf"(?:{'|'.join(map(re.escape, ends))})(?:\s|{'|'.join(map(re.escape, ends))})*\Z")
        if (found := run.search(text)) is not None:
            first = next(name for name in sorted(ends, key=len, reverse=True) if found[0].startswith(name))
            return Said(text[: found.start()] + first, True)
        bare = text.rstrip()
        if any(bare.endswith(name) for name in facts.control if name not in facts.speakable):
            return Said(bare, True)
        end = max(text.rfind(content) + len(content), len(bare)) if content in text else len(bare)
        return Said(text[:end], False)

    def _after_rewriting(self, place: int, asked: str, whole: str) -> str:
        """Return the text that a turn adds to its prompt, for a template that rewrites an answered prompt."""
        base = self.text(place)
        opening = asked[len(base) :] if asked.startswith(base) else ""
        tags = next((pair for pair in THOUGHT_TAGS if pair[0] in opening), None)
        header = opening.partition(tags[0])[0] if tags else opening
        marked = RenderedConversation(self.tokenizer, [*self.turns[:place], {"role": "assistant", "content": "\ue003"}])
        before = marked.text(place + 1).partition("\ue003")[0]
        for mark in (header, header.rstrip()):
            start = before.rfind(mark) + len(mark)
            if mark and start >= len(mark) and whole.startswith(before[:start]):
                self._check_merged(place, before[start:])
                return self._after_opening(asked, header, tags, whole[start:], self.turns[place])
        raise TurnsRefused(
            "prompt-not-continued",
            "the chat template renders an answer so that it does not continue the generation prompt",
        )

    def _check_merged(self, place: int, between: str) -> None:
        """Refuse a template that merges two turns of the assistant: the first would be learned twice."""
        earlier = self.turns[place - 1] if place else None
        if (
            earlier is not None
            and earlier["role"] == "assistant"
            and earlier["content"].strip() in self.facts.restored(between)
        ):
            raise TurnsRefused(
                "turns-merged",
                "the chat template merges two consecutive assistant turns; join them",
            )

    def _after_opening(self, asked: str, header: str, tags: tuple[str, str] | None, turn: str, message: Message) -> str:
        """Return a turn's text after its generation prompt; that prompt may open or close a thought."""
        if tags is None:
            return turn.lstrip() if asked[-1:].isspace() else turn
        opened, closed = tags
        thought, mark, answer = turn.rpartition(closed)
        if closed in asked[asked.rindex(header) + len(header) :]:  # the prompt contains a complete, empty thought
            if thought.replace(opened, "").strip():
                raise TurnsRefused(
                    "thought-closed", "the generation prompt closes the thinking block, but the turn has a thought"
                )
            return answer if mark else turn
        if mark:
            return thought.partition(opened)[2].lstrip() + closed + answer
        thought = _thought_of(message, tags)
        return f"{self.facts.guarded(thought, spoken=True)}\n{closed}\n\n{turn.lstrip()}"

    def _check_turns(self, text: str, stop: int) -> None:
        text, written = self.facts.restored(text), self._written(stop)
        first = next((place for place, turn in enumerate(self.turns) if turn["role"] == "user"), 0)
        for place, turn in enumerate(self.turns[:stop]):
            if turn["role"] == "assistant" and place < first and written and place not in written:
                raise _left_out("assistant")
            if turn["role"] not in ("user", "system", "developer"):
                continue
            if turn["content"].strip() not in text or (written and place not in written):
                raise _left_out(turn["role"])
        names = [(tool.get("function") or tool).get("name") for tool in self.tools or ()]
        if not all(str(name) in text for name in names):
            raise TurnsRefused(
                "tools-left-out",
                "the chat template leaves out the descriptions of tools; use a template that renders them",
            )

    def _check_answer(self, text: str, message: Message) -> None:
        thought = next((message[name] for name in THOUGHT_KEYS if message.get(name)), "")
        *thoughts, answer = _between_tags(message["content"])
        if answer.strip() not in text:
            raise _left_out("assistant")
        if not all(one.strip() in text for one in (*thoughts, thought)):
            raise TurnsRefused("thought-left-out", "the chat template leaves out the thought of a trained turn")

    def _check_order(self, place: int) -> None:
        """Refuse a template that writes other turns after the answer: they would be learned as part of it."""
        written = self._written(place + 1)
        if place in written and written[-1] != place:
            raise TurnsRefused(
                "turn-after-answer",
                "the chat template writes earlier turns after the answer, which would be trained on; use another "
                "template",
            )

    def _written(self, stop: int) -> tuple[int, ...]:
        """Return which of the first ``stop`` turns the template writes, by index and in its order.

        Empty if the template refuses test turns with these roles.
        """
        roles = tuple(turn["role"] for turn in self.turns[:stop])
        if roles not in self.written_turns:
            marked = [{"role": role, "content": f"\ue003{number}\ue003"} for number, role in enumerate(roles)]
            written = ""
            with suppress(TurnsRefused):  # turns with test contents may not form a valid conversation
                given = [self.facts.for_template(turn) for turn in marked]
                written = apply_template(self.tokenizer, given, False, tools=self.tools, variables=self.args)
            self.written_turns[roles] = tuple(map(int, re.findall("\ue003([0-9]+)\ue003", written)))
        return self.written_turns[roles]

    def _check_context(self) -> None:
        """Check that the template writes tool calls, tool results and documents, by rendering them with marks."""
        turns: list[Message] = []
        marks: list[tuple[str, str]] = []

        def mark(kind: str) -> str:
            marks.append((kind, f"\ue003{len(marks)}\ue003"))
            return marks[-1][1]

        for turn in self.real:
            if turn["role"] == "tool":
                result = mark("result")
                turn = {**turn, "content": [{"type": "text", "text": result}] if self.facts.parts else result}
            if calls := turn.get("tool_calls"):
                functions = [{**call["function"], "name": call["function"]["name"] + mark("call")} for call in calls]
                both = zip(calls, functions, strict=True)
                turn = {**turn, "tool_calls": [{**call, "function": function} for call, function in both]}
            turns.append(turn)
        documents = []
        for one in self.args.get("documents", ()):
            texts = [name for name in ("text", "contents", "content", *one) if isinstance(one.get(name), str)]
            documents.append({**one, **{name: mark("document") for name in texts[:1]}})
        args = {**self.args, "documents": documents} if documents else self.args
        written = apply_template(self.tokenizer, turns, False, tools=self.tools, variables=args) if marks else ""
        missing = {kind for kind, text in marks if text not in written}
        if "call" in missing:
            raise TurnsRefused(
                "tool-calls-left-out", "the chat template leaves out tool calls; use a template that renders them"
            )
        if "document" in missing:
            raise TurnsRefused(
                "documents-left-out", "the chat template leaves out documents; use a template that renders them"
            )
        if missing:
            raise _left_out("tool")


_pattern_of = lru_cache(maxsize=64)(any_of)
_TAGS = any_of(tag for pair in THOUGHT_TAGS for tag in pair)


def _left_out(role: str) -> TurnsRefused:
    sentence = f"the chat template leaves out a turn of the role {role!r}; use a template that renders it"
    return TurnsRefused("turn-left-out", sentence)


def chained(prompts: Sequence[str], said: Sequence[Said]) -> list[Span] | None:
    """Return the spans of all turns in one rendering; None if a later prompt renders an earlier turn differently."""
    spans, text = [Span(said[0].text)], prompts[0] + said[0].text
    if not all(one.ended for one in said[:-1]):  # the end of such a turn would not be learned
        return None
    for asked, one in zip(prompts[1:], said[1:], strict=True):
        if not asked.startswith(text):
            return None
        spans += [Span(asked[len(text) :], False), Span(one.text)]
        text = asked + one.text
    return spans


def _thought_of(message: Message, tags: tuple[str, str]) -> str:
    named = next((message[name] for name in THOUGHT_KEYS if message.get(name)), None)
    return (named or message["content"].rpartition(tags[1])[0].rpartition(tags[0])[2]).strip()


def _between_tags(text: str) -> list[str]:
    return _TAGS.split(text)
