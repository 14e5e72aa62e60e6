"""Prompts and completions as text that is cut where supervision changes, and where somebody's content begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from rlhf_lightning.errors import DataError
from rlhf_lightning.tokenization.facts import Facts, facts_of, scaffold
from rlhf_lightning.tokenization.templates import TurnsRefused, apply_template
from rlhf_lightning.types import Message, Prompt


class Span(NamedTuple):
    """A piece of rendered text.

    Attributes:
        text: the text.
        supervised: whether a loss may look at it.
        literal: whether it is somebody's content, in which no control token may be recognised.
        spoken: whether that somebody is the assistant, who may say what the template lets only the assistant say.
    """

    text: str
    supervised: bool = True
    literal: bool = False
    spoken: bool = False


class Rendered(NamedTuple):
    """Text ready to be encoded.

    Attributes:
        spans: the text, cut where supervision changes; each span is encoded by itself.
        careful: the same text with the contents cut out as literal spans. Used when encoding ``spans`` finds other
            control tokens than the template wrote. Empty where all control tokens are to be recognised.
        closing: ids to append, supervised, unless the text ends with them.
        opening: ids to put in front, unless the text begins with them.
    """

    spans: tuple[Span, ...]
    careful: tuple[Span, ...] = ()
    closing: tuple[int, ...] = ()
    opening: tuple[int, ...] = ()


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, rendered: bool = False) -> Rendered:
    """Text of a prompt, ready for `encode_rendered`.

    Args:
        tokenizer: the policy's tokenizer.
        prompt: plain text or messages.
        rendered: whether plain text was written by a chat template, so that control tokens in it are such.

    Raises:
        ChatTemplateError: if the template is missing or refuses the messages.
    """
    facts = facts_of(tokenizer)
    if isinstance(prompt, str):
        return Rendered((Span(prompt),), () if rendered else (Span(prompt, literal=True),), opening=facts.opening)
    open_turn = bool(prompt) and prompt[-1]["role"] == "assistant"
    text = apply_template(tokenizer, prompt, generation=not open_turn, open_turn=open_turn)
    roles = tuple(message["role"] for message in prompt)
    pieces = scaffold(tokenizer, facts, roles, generation=not open_turn)
    if open_turn:
        text = text if facts.kept_space.get("assistant", (True, True))[1] else text.rstrip()
        pieces = pieces[:-1]
    careful = [_content(facts, prompt[p]) if isinstance(p, int) else Span(p) for p in pieces]
    return Rendered((Span(text),), tuple(careful))


def render_completion(
    tokenizer: PreTrainedTokenizerBase, completion: str | list[Message], prompt: Prompt, rendered: bool = False
) -> Rendered:
    """Text of a completion, ready for `encode_rendered`.

    Args:
        tokenizer: the policy's tokenizer.
        completion: text, or the turns that follow the prompt.
        prompt: what it answers; decides between a chat template and plain text.
        rendered: whether plain text was written by a chat template, so that control tokens in it are such.

    Raises:
        ChatTemplateError: if the template is missing or refuses the messages.
    """
    closing = (tokenizer.eos_token_id,)
    if isinstance(prompt, str):
        if not isinstance(completion, str):
            raise DataError(
                "prompt-not-messages",
                f"a completion of messages needs a prompt of messages, but the prompt is plain text: {prompt[:80]!r}",
            )
        careful = () if rendered else (Span(completion, literal=True, spoken=True),)
        return Rendered((Span(completion),), careful, closing=closing)
    answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    facts = facts_of(tokenizer)
    before = prompt[:-1] if prompt and prompt[-1]["role"] == "assistant" else prompt
    roles = tuple(message["role"] for message in [*before, *answer])
    pieces = scaffold(tokenizer, facts, roles)
    if len(before) not in pieces:
        raise TurnsRefused(
            "turn-left-out",
            f"the chat template leaves out a turn of the role {answer[0]['role']!r}; use a template that renders it",
        )
    start = pieces.index(len(before))
    spans: list[Span] = []
    if len(before) == len(prompt) and start > 0:
        # Some templates open the assistant's turn with more than the generation prompt: the policy has to write that.
        opened, full = scaffold(tokenizer, facts, roles[: len(before)], generation=True)[-1], pieces[start - 1]
        if isinstance(opened, str) and isinstance(full, str) and full.startswith(opened):
            spans.append(Span(full[len(opened) :]))
    ended = False
    for piece in pieces[start:]:
        if isinstance(piece, int):
            message = answer[piece - len(before)]
            supervised, ended = message["role"] == "assistant", False
            spans.append(_content(facts, message)._replace(supervised=supervised))
            continue
        end = piece.find(facts.end_of_turn) if facts.end_of_turn else -1
        cut = end + len(facts.end_of_turn or "") if supervised and end >= 0 else 0
        spans += [Span(piece[:cut], True), Span(piece[cut:], False)]
        ended = cut > 0
    while spans and not spans[-1].supervised:
        spans.pop()
    return Rendered(_joined(spans), tuple(s for s in spans if s.text or s.literal), closing=() if ended else closing)


def render_steps(
    tokenizer: PreTrainedTokenizerBase, steps: Sequence[str], separator: str, prompt: Prompt, rendered: bool = False
) -> list[Rendered]:
    """Text of a completion in steps, one piece a step, ready for `encode_rendered`.

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
    texts = [step.removesuffix(separator) for step in steps]
    texts = [f"{text}{separator}" for text in texts[:-1]] + texts[-1:]
    whole = render_completion(tokenizer, "".join(texts), prompt)
    careful = whole.careful
    place = next(index for index, span in enumerate(careful) if span.literal)
    if not "".join(texts).startswith(careful[place].text):  # the template strips what it is given
        texts[0] = texts[0].lstrip()
    if not "".join(texts).endswith(careful[place].text):
        texts[-1] = texts[-1].rstrip()
    pieces = [[careful[place]._replace(text=text)] for text in texts]
    pieces[0] = [*careful[:place], *pieces[0]]
    pieces[-1] = [*pieces[-1], *careful[place + 1 :]]
    literal = not (rendered and isinstance(prompt, str))
    done = [Rendered(tuple(spans), tuple(spans) if literal else ()) for spans in pieces]
    return [*done[:-1], done[-1]._replace(closing=whole.closing)]


def _content(facts: Facts, message: Message) -> Span:
    left, right = facts.kept_space.get(message["role"], (True, True))
    text = message["content"] if left else message["content"].lstrip()
    return Span(text if right else text.rstrip(), literal=True, spoken=message["role"] == "assistant")


def _joined(spans: Sequence[Span]) -> tuple[Span, ...]:
    joined: list[Span] = []
    for span in spans:
        if joined and joined[-1].supervised == span.supervised:
            joined[-1] = Span(joined[-1].text + span.text, span.supervised)
        elif span.text:
            joined.append(Span(span.text, span.supervised))
    return tuple(joined)
