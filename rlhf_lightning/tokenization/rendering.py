"""Prompts and completions as text, cut where supervision changes.

The text of a prompt and its completion is the chat template's own rendering of the conversation. The prompt is rendered
with its generation prompt; the completion is what the rendering with the answer has after that. Where a template
renders earlier turns anew once the conversation continues (it drops old thoughts), every learned turn gets a prompt
of its own, see `render_turns`.

What spells a control token in a content is replaced by a guard before rendering (U+E000, a number, U+E001), so that
control tokens in the text are the template's own. `encoding` puts the spelling back, as plain characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from rlhf_lightning.errors import DataError
from rlhf_lightning.tokenization.facts import THOUGHT_KEYS, THOUGHT_TAGS, Facts, facts_of
from rlhf_lightning.tokenization.templates import TurnsRefused, apply_template
from rlhf_lightning.types import Message, Prompt

TAIL = 64
"""Characters of a prompt's end that are looked at to tell how its completion is encoded."""

MOST_TURNS = 256
"""Most learned turns of one conversation: each takes renderings of all that comes before it."""

GUARD = re.compile("\ue000([0-9]+)\ue001")


class Span(NamedTuple):
    """A piece of rendered text.

    Attributes:
        text: the text, with guards.
        supervised: whether a loss may look at it.
    """

    text: str
    supervised: bool = True


class Rendered(NamedTuple):
    """Text ready to be encoded.

    Attributes:
        spans: the text, cut where supervision changes; each span is encoded by itself.
        before: the end of the text that comes before it.
        closing: ids to append, supervised, unless the text ends with them.
        opening: ids to put in front, unless the text begins with them.
        last_turn: whether several turns could be learned, but only the last of them is.
        turns_cut: whether learned turns after the first `MOST_TURNS` are left out.
    """

    spans: tuple[Span, ...]
    before: str = ""
    closing: tuple[int, ...] = ()
    opening: tuple[int, ...] = ()
    last_turn: bool = False
    turns_cut: bool = False


class RenderedTurn(NamedTuple):
    """A learned turn, or several whose contexts agree, as a prompt and a completion.

    Attributes:
        context: the messages of the prompt.
        prompt: its text.
        completion: the text after it.
        weight: weight of the turns in the loss.
    """

    context: list[Message]
    prompt: Rendered
    completion: Rendered
    weight: float = 1.0


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, rendered: bool = False) -> Rendered:
    """Render a prompt, ready for `encode_rendered`; see `render_answers` for arguments and errors."""
    facts = facts_of(tokenizer)
    if isinstance(prompt, str):
        return Rendered((Span(prompt if rendered else guarded(facts, prompt)),), opening=facts.opening)
    return Rendered((Span(_Conversation(tokenizer, prompt).prompt(len(prompt))),))


def render_completion(
    tokenizer: PreTrainedTokenizerBase, completion: str | list[Message], prompt: Prompt, rendered: bool = False
) -> Rendered:
    """Render a completion, ready for `encode_rendered`; see `render_answers` for arguments and errors."""
    return render_answers(tokenizer, prompt, [completion], rendered)[1]


def render_answers(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    completions: Sequence[str | list[Message]],
    rendered: bool = False,
    last_turn_only: bool = False,
) -> list[Rendered]:
    """Render a prompt and the completions that answer it.

    Args:
        tokenizer: the policy's tokenizer.
        prompt: plain text or messages.
        completions: each is text, or the turns that follow the prompt.
        rendered: whether plain text was written by a chat template, so that control tokens in it are such.
        last_turn_only: whether only the last turn of the assistant is supervised.

    Returns:
        the prompt, then the completions.

    Raises:
        ChatTemplateError: if the template is missing or refuses the messages.
        DataError: if a completion is messages, and the prompt is not.
    """
    if not isinstance(prompt, str):
        asked = _Conversation(tokenizer, prompt).prompt(len(prompt))
        answers = [_answer(tokenizer, prompt, asked, completion, last_turn_only) for completion in completions]
        return [Rendered((Span(asked),)), *answers]
    facts, answers = facts_of(tokenizer), []
    for completion in completions:
        if not isinstance(completion, str):
            raise DataError(
                "prompt-not-messages",
                f"a completion of messages needs a prompt of messages, but the prompt is plain text: {prompt[:80]!r}",
            )
        text = completion if rendered else guarded(facts, completion, spoken=True)
        answers.append(Rendered((Span(text),), tail_of(facts, prompt), (facts.eos,)))
    return [render_prompt(tokenizer, prompt, rendered), *answers]


def render_turns(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], last_turn_only: bool = False, first: int = 0
) -> list[RenderedTurn]:
    """Render a conversation whose turns of the assistant are learned, unless their ``weight`` is 0.

    Turns are one prompt and one completion where the template renders the conversation alike at every one of them, and
    their weights agree. Otherwise each learned turn has its own prompt. Turns after the first `MOST_TURNS` learned ones
    are left out.

    Args:
        tokenizer: the policy's tokenizer.
        turns: the conversation, up to the last learned turn or further.
        last_turn_only: whether only the last learned turn counts.
        first: number of the first turn that may be learned; those before it are context.

    Raises:
        ChatTemplateError: if the template is missing or refuses the messages.
    """
    learned = [place for place, turn in enumerate(turns) if place >= first and _is_learned(turn)]
    cut = len(learned) > MOST_TURNS and not last_turn_only
    learned = learned[-1:] if last_turn_only else learned[:MOST_TURNS]
    if not learned:
        return []
    conversation = _Conversation(tokenizer, turns)
    prompts = [conversation.prompt(place) for place in learned]
    said = [conversation.said(place, asked) for place, asked in zip(learned, prompts, strict=True)]
    weights = [float(turns[place].get("weight", 1)) for place in learned]
    if len(set(weights)) == 1 and (spans := _chained(prompts, said)) is not None:
        completion = conversation.completion(prompts[0], spans, said[-1].ended)._replace(turns_cut=cut)
        return [
            RenderedTurn(list(turns[: learned[0]]), Rendered((Span(prompts[0]),)), completion, weights[0]),
        ]
    return [
        RenderedTurn(
            list(turns[:place]),
            Rendered((Span(asked),)),
            conversation.completion(asked, [Span(one.text)], one.ended)._replace(turns_cut=cut),
            weight,
        )
        for place, asked, one, weight in zip(learned, prompts, said, weights, strict=True)
    ]


def render_steps(
    tokenizer: PreTrainedTokenizerBase, steps: Sequence[str], separator: str, prompt: Prompt, rendered: bool = False
) -> list[Rendered]:
    """Render a completion in steps, one piece a step, ready for `encode_rendered`.

    The ids of the pieces, one after the other, are the completion. Each step is followed by the separator, the last one
    by the end of the completion instead, so that the last id of a piece is where its step is known to be over.

    Args:
        tokenizer: the policy's tokenizer.
        steps: text of each step; one that ends with the separator already gets no second.
        separator: what stands between two steps.
        prompt: what the completion answers.
        rendered: whether plain text was written by a chat template, so that control tokens in it are such.

    Raises:
        ChatTemplateError: if the template is missing or refuses the messages.
    """
    facts = facts_of(tokenizer)
    texts = [step.removesuffix(separator) for step in steps]
    texts = [f"{text}{separator}" for text in texts[:-1]] + texts[-1:]
    whole = render_completion(tokenizer, "".join(texts), prompt, rendered)
    if not (rendered and isinstance(prompt, str)):
        texts = [guarded(facts, text, spoken=True) for text in texts]
    text = "".join(span.text for span in whole.spans)
    content = "".join(texts)
    place = text.find(content)
    if place < 0:  # the template trims what it is given
        texts[0], texts[-1] = texts[0].lstrip(), texts[-1].rstrip()
        content = "".join(texts)
        place = text.find(content)
    if place < 0:
        raise TurnsRefused("turn-left-out", "the chat template rewrites a completion of steps; use another template")
    texts[0], texts[-1] = text[:place] + texts[0], texts[-1] + text[place + len(content) :]
    pieces, before = [], whole.before
    for piece in texts:
        pieces.append(Rendered((Span(piece),), before))
        before = tail_of(facts, before + piece)
    return [*pieces[:-1], pieces[-1]._replace(closing=whole.closing)]


def render_reply(tokenizer: PreTrainedTokenizerBase, turn: Message, replies: Sequence[Message]) -> Rendered:
    """Render what follows a sampled turn of the assistant, after its end token, up to the assistant's next turn.

    The conversation before is not rendered again, so that its tokens stay as they were sampled: a short conversation of
    a question and the turn is rendered without the replies and with them.

    Raises:
        ChatTemplateError: if the template is missing or refuses the messages.
    """
    marked = {**turn, "content": "\ue003"}
    conversation = _Conversation(tokenizer, [{"role": "user", "content": "?"}, marked, *replies])
    alone, whole = conversation.text(2), conversation.text(len(replies) + 2, generation=True)
    if not whole.startswith(alone):  # an earlier turn is rendered otherwise: its thought is gone
        before, mark, alone = alone.rpartition("\ue003")
        alone, whole = mark + alone, mark + whole.rpartition(mark)[2]
        if not before or not whole.startswith(alone):
            raise TurnsRefused(
                "prompt-not-continued", "the chat template renders a turn otherwise once it was replied to"
            )
    conversation.check_replies(whole, replies)
    ended = conversation.up_to_end(alone, "\ue003", bool(turn.get("tool_calls"))).text
    return Rendered((Span(whole[len(ended) :], False),), conversation.facts.end_of_turn or tokenizer.eos_token)


def guarded(facts: Facts, text: str, spoken: bool = False) -> str:
    """Replace what spells a control token by its guard; the assistant's words (``spoken``) may hold thought tags."""
    return facts.guards[spoken].sub(lambda found: f"\ue000{facts.spellings.index(found[0])}\ue001", text)


def restored(facts: Facts, text: str) -> str:
    """Put the spellings back that `guarded` replaced."""
    return GUARD.sub(lambda found: facts.spellings[int(found[1])], text) if "\ue000" in text else text


def tail_of(facts: Facts, text: str) -> str:
    """Return the end of a text: what stands after its last control token, or the token itself at the very end."""
    tail = text[-TAIL:]
    marks = list(facts.written.finditer(tail))
    return tail[marks[-1].end() :] or marks[-1][0] if marks else tail


class _Said(NamedTuple):
    """Text of a turn after its prompt, up to its end token, and whether it has one."""

    text: str
    ended: bool


class _Conversation:
    """Renders the beginnings of a conversation, guarded."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message]) -> None:
        self.tokenizer, self.facts, self.turns = tokenizer, facts_of(tokenizer), turns
        self.tools = turns[0].get("tools") if turns else None
        self.real = [self.facts.for_template(turn) for turn in turns]
        self.safe = [_guarded_values(self.facts, turn, turn["role"] == "assistant") for turn in self.real]
        self.safe_tools = _guarded_values(self.facts, self.tools, False)
        self.is_safe = self.safe == self.real and self.safe_tools == self.tools
        self._check_calls()

    def text(self, stop: int, generation: bool = False, open_turn: bool = False) -> str:
        """Render the first turns."""
        written = apply_template(self.tokenizer, self.real[:stop], generation, open_turn, self.tools)
        if self.is_safe:
            return written
        text = apply_template(self.tokenizer, self.safe[:stop], generation, open_turn, self.safe_tools)
        if restored(self.facts, text) != written:
            raise TurnsRefused(
                "control-token-read",
                "a turn spells a control token, and the chat template does something else for it; remove it",
            )
        return text

    def prompt(self, stop: int) -> str:
        """Render the first turns as a prompt; a last turn of the assistant is left open."""
        opened = stop > 0 and self.turns[stop - 1]["role"] == "assistant" and stop == len(self.turns)
        text = self.text(stop, generation=not opened, open_turn=opened)
        self._check_turns(text, stop)
        return text.rstrip() if opened and self.facts.trims_right else text

    def said(self, place: int, asked: str, message: Message | None = None) -> _Said:
        """Return what the assistant's turn at a place adds to its prompt.

        ``message`` is what of the turn is not part of the prompt, if the prompt has its beginning.
        """
        self._check_order(place)
        whole = self.text(place + 1)
        text = whole[len(asked) :] if whole.startswith(asked) else self._after_rewriting(place, asked, whole)
        message = message or self.turns[place]
        self._check_answer(restored(self.facts, text), message)
        content = guarded(self.facts, message["content"], spoken=True)
        return self.up_to_end(text, content, bool(message.get("tool_calls")))

    def completion(self, asked: str, spans: Sequence[Span], ended: bool, last_turn: bool = False) -> Rendered:
        """Put the spans after a prompt into a `Rendered`."""
        kept = tuple(span for span in spans if span.text)
        closing = () if ended else (self.facts.eos,)
        return Rendered(kept, tail_of(self.facts, asked), closing, last_turn=last_turn)

    def check_replies(self, text: str, replies: Sequence[Message]) -> None:
        """Refuse a rendering that leaves out the content of a reply."""
        text = restored(self.facts, text)
        for turn in replies:
            if str(turn["content"]).strip() not in text:
                raise TurnsRefused(
                    "turn-left-out",
                    f"the chat template leaves out a reply of the role {turn['role']!r}; use another template",
                )

    def up_to_end(self, text: str, content: str, calls: bool) -> _Said:
        """Return a rendering of a turn up to its end token; with ``calls`` tool calls follow its content."""
        facts = self.facts
        ends = {name for name in (facts.end_of_turn, facts.call_end, self.tokenizer.eos_token) if name}
        said = text.rfind(content.strip()) + len(content.strip()) if content.strip() in text else 0
        if said and not calls and (end_mark := _any_of(ends).search(text, said)):
            return _Said(text[: end_mark.end()], True)  # what a template writes after an end is never sampled
        run = re.compile(rf"(?:{'|'.join(map(re.escape, ends))})(?:\s|{'|'.join(map(re.escape, ends))})*\Z")
        if (found := run.search(text)) is not None:
            first = next(name for name in sorted(ends, key=len, reverse=True) if found[0].startswith(name))
            return _Said(text[: found.start()] + first, True)
        bare = text.rstrip()
        if any(bare.endswith(name) for name in facts.control if name not in facts.speakable):
            return _Said(bare, True)
        end = max(text.rfind(content) + len(content), len(bare)) if content in text else len(bare)
        return _Said(text[:end], False)

    def _after_rewriting(self, place: int, asked: str, whole: str) -> str:
        """Return what a turn adds to its prompt where the template renders the prompt otherwise once it is answered."""
        base = self.text(place)
        opening = asked[len(base) :] if asked.startswith(base) else ""
        tags = next((pair for pair in THOUGHT_TAGS if pair[0] in opening), None)
        header = opening.partition(tags[0])[0] if tags else opening
        marked = _Conversation(self.tokenizer, [*self.turns[:place], {"role": "assistant", "content": "\ue003"}])
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
        """Refuse a template that writes two turns of the assistant as one: the first would be learned twice."""
        earlier = self.turns[place - 1] if place else None
        if (
            earlier is not None
            and earlier["role"] == "assistant"
            and earlier["content"].strip() in restored(self.facts, between)
        ):
            raise TurnsRefused(
                "turns-merged",
                "the chat template merges two turns of the assistant, which follow each other; join them",
            )

    def _after_opening(self, asked: str, header: str, tags: tuple[str, str] | None, turn: str, message: Message) -> str:
        """Return a turn's text after its generation prompt, which may have opened or closed a thought."""
        if tags is None:
            return turn.lstrip() if asked[-1:].isspace() else turn
        opened, closed = tags
        thought, mark, answer = turn.rpartition(closed)
        if closed in asked[asked.rindex(header) + len(header) :]:  # the prompt has a whole thought, an empty one
            if thought.replace(opened, "").strip():
                raise TurnsRefused("thought-closed", "the generation prompt closes the thought that a turn has")
            return answer if mark else turn
        if mark:
            return thought.partition(opened)[2].lstrip() + closed + answer
        thought = _thought_of(message, tags)
        return f"{guarded(self.facts, thought, spoken=True)}\n{closed}\n\n{turn.lstrip()}"

    def _check_turns(self, text: str, stop: int) -> None:
        text = restored(self.facts, text)
        for turn in self.turns[:stop]:
            if turn["role"] in ("user", "system", "developer") and turn["content"].strip() not in text:
                raise TurnsRefused(
                    "turn-left-out",
                    f"the chat template leaves out a turn of the role {turn['role']!r}; use a template that renders it",
                )
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
            raise TurnsRefused(
                "turn-left-out",
                "the chat template leaves out a turn of the role 'assistant'; use a template that renders it",
            )
        if not all(one.strip() in text for one in (*thoughts, thought)):
            raise TurnsRefused("thought-left-out", "the chat template leaves out the thought of a learned turn")

    def _check_order(self, place: int) -> None:
        """Refuse a template that writes other turns after the answer: they would be learned with it."""
        roles = tuple(turn["role"] for turn in self.turns[: place + 1])
        if roles not in self.facts.answer_is_last:
            marked = [{"role": role, "content": f"\ue003{number}\ue003"} for number, role in enumerate(roles)]
            try:
                given = [self.facts.for_template(turn) for turn in marked]
                written = apply_template(self.tokenizer, given, False, tools=self.tools)
            except TurnsRefused:  # the roles alone may make no conversation
                written = ""
            after = written.rpartition(f"\ue003{place}\ue003")[2]
            self.facts.answer_is_last[roles] = "\ue003" not in after or f"\ue003{place}\ue003" not in written
        if not self.facts.answer_is_last[roles]:
            raise TurnsRefused(
                "turn-after-answer",
                "the chat template writes earlier turns after the answer, which would be learned; use another template",
            )

    def _check_calls(self) -> None:
        """Render the conversation with marked names of functions: a template may ignore tool calls."""
        marked, count = [], 0
        for turn in self.real:
            if calls := turn.get("tool_calls"):
                names = [f"{call['function']['name']}\ue003{count + place}\ue003" for place, call in enumerate(calls)]
                both = zip(calls, names, strict=True)
                count += len(calls)
                turn = {**turn, "tool_calls": [{**c, "function": {**c["function"], "name": n}} for c, n in both]}
            marked.append(turn)
        if not count:
            return
        written = apply_template(self.tokenizer, marked, False, tools=self.tools)
        if not all(f"\ue003{place}\ue003" in written for place in range(count)):
            raise TurnsRefused(
                "tool-calls-left-out", "the chat template leaves out tool calls; use a template that renders them"
            )


def _answer(
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[Message],
    asked: str,
    completion: str | list[Message],
    last_turn_only: bool,
) -> Rendered:
    answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    before, first = list(prompt), answer[0]
    if prompt and prompt[-1]["role"] == "assistant":
        begun = before.pop()
        answer = [{**begun, **first, "content": begun["content"] + first["content"]}, *answer[1:]]
    turns = [*before, *answer]
    conversation = _Conversation(tokenizer, turns)
    direct = len(before)
    learned = [place for place in range(direct, len(turns)) if _is_learned(turns[place])]
    places = _bounded(learned, last_turn_only)
    if not places:
        return conversation.completion(asked, [], True)
    prompts = [asked if place == direct else conversation.prompt(place) for place in places]
    said = [
        conversation.said(place, text, first if place == direct else None)
        for place, text in zip(places, prompts, strict=True)
    ]
    spans = _chained(prompts, said)
    if spans is None:  # only the last turn has the context that it has in use
        spans, prompts, places = [Span(said[-1].text)], prompts[-1:], places[-1:]
    if not prompts[0].startswith(asked):
        raise TurnsRefused(
            "prompt-not-continued", "the chat template renders the prompt otherwise once it was answered"
        )
    spans = [Span(prompts[0][len(asked) :], False), *spans]
    return conversation.completion(asked, spans, said[-1].ended, len(places) < len(learned))


def _bounded(learned: list[int], last_turn_only: bool) -> list[int]:
    if last_turn_only:
        return learned[-1:]
    if len(learned) > MOST_TURNS:
        raise TurnsRefused(
            "too-many-turns",
            f"{len(learned):,} turns are learned in one conversation, and at most {MOST_TURNS} can be; set "
            "last_turn_only, or cut the conversation",
        )
    return learned


def _is_learned(turn: Message) -> bool:
    return turn["role"] == "assistant" and turn.get("weight", 1) != 0


def _chained(prompts: Sequence[str], said: Sequence[_Said]) -> list[Span] | None:
    """Return the spans of turns in one rendering; None if a later prompt has an earlier turn otherwise."""
    spans, text = [Span(said[0].text)], prompts[0] + said[0].text
    if not all(one.ended for one in said[:-1]):  # their end would not be learned
        return None
    for asked, one in zip(prompts[1:], said[1:], strict=True):
        if not asked.startswith(text):
            return None
        spans += [Span(asked[len(text) :], False), Span(one.text)]
        text = asked + one.text
    return spans


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))


def _thought_of(message: Message, tags: tuple[str, str]) -> str:
    named = next((message[name] for name in THOUGHT_KEYS if message.get(name)), None)
    return (named or message["content"].rpartition(tags[1])[0].rpartition(tags[0])[2]).strip()


def _between_tags(text: str) -> list[str]:
    tags = "|".join(re.escape(tag) for pair in THOUGHT_TAGS for tag in pair)
    return re.split(tags, text)


def _guarded_values(facts: Facts, value: Any, spoken: bool) -> Any:
    """Guard every text in a message or a description of tools; its role stays."""
    if isinstance(value, str):
        return guarded(facts, value, spoken)
    if isinstance(value, list | tuple):
        return [_guarded_values(facts, one, spoken) for one in value]
    if isinstance(value, dict):
        return {
            guarded(facts, name): one if name == "role" else _guarded_values(facts, one, spoken)
            for name, one in value.items()
        }
    return value
