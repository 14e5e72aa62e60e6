"""Render prompts and completions as text, split where supervision changes.

The text of a prompt and its completion is the chat template's own rendering of the conversation. The prompt is rendered
with its generation prompt. The completion is the rest of the rendering that includes the answer. Some templates rewrite
earlier turns once the conversation continues (they drop old thoughts); then every trained turn gets its own prompt, see
`render_turns`.

Spellings of control tokens in a content are replaced by guards before rendering (U+E000, a number, U+E001), so that
control tokens in the text are the template's own. `encoding` restores the spellings as plain characters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from rlhf_lightning.errors import DataError
from rlhf_lightning.tokenization.continuation import (
    MOST_TURNS,
    Rendered,
    RenderedConversation,
    Said,
    Span,
    chained,
)
from rlhf_lightning.tokenization.facts import facts_of
from rlhf_lightning.tokenization.templates import TurnsRefused
from rlhf_lightning.types import Message, Prompt


class RenderedTurn(NamedTuple):
    """A trained turn as a prompt and a completion, or several turns with consistent contexts.

    Attributes:
        context: the messages of the prompt.
        prompt: the prompt's text.
        completion: the text after the prompt.
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
        return Rendered((Span(prompt if rendered else facts.guarded(prompt)),), opening=facts.opening)
    return Rendered((Span(RenderedConversation(tokenizer, prompt).prompt(len(prompt))),))


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
        rendered: whether plain text was written by a chat template, so that control tokens in it are real.
        last_turn_only: whether only the last turn of the assistant is supervised.

    Raises:
        ChatTemplateError: the template is missing or refuses the messages.
        DataError: a completion is messages, but the prompt is plain text.
    """
    if not isinstance(prompt, str):
        asked = RenderedConversation(tokenizer, prompt).prompt(len(prompt))
        answers = [_answer(tokenizer, prompt, asked, completion, last_turn_only) for completion in completions]
        return [Rendered((Span(asked),)), *answers]
    facts, answers = facts_of(tokenizer), []
    for completion in completions:
        if not isinstance(completion, str):
            raise DataError(
                "prompt-not-messages",
                f"a completion of messages needs a prompt of messages, but the prompt is plain text: {prompt[:80]!r}",
            )
        text = completion if rendered else facts.guarded(completion, spoken=True)
        answers.append(Rendered((Span(text),), facts.tail_of(prompt), (facts.eos,)))
    return [render_prompt(tokenizer, prompt, rendered), *answers]


def render_turns(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], last_turn_only: bool = False, first: int = 0
) -> list[RenderedTurn]:
    """Render a conversation in which the assistant's turns are trained on, unless their ``weight`` is 0.

    The turns form one prompt and one completion if the template renders the conversation consistently at each of them
    and their weights are equal. Otherwise each trained turn has its own prompt. Trained turns after the first
    `MOST_TURNS` are left out.

    Args:
        tokenizer: the policy's tokenizer.
        turns: the conversation, at least up to the last trained turn.
        last_turn_only: whether to learn only the last trained turn.
        first: index of the first turn that may be learned; earlier turns are context.

    Raises:
        ChatTemplateError: the template is missing or refuses the messages.
    """
    learned = [place for place, turn in enumerate(turns) if place >= first and _is_learned(turn)]
    cut = len(learned) > MOST_TURNS and not last_turn_only
    learned = learned[-1:] if last_turn_only else learned[:MOST_TURNS]
    if not learned:
        return []
    conversation = RenderedConversation(tokenizer, turns)
    prompts = [conversation.prompt(place) for place in learned]
    said = [conversation.said(place, asked) for place, asked in zip(learned, prompts, strict=True)]
    weights = [float(turns[place].get("weight", 1)) for place in learned]
    spans = [[Span(one.text)] for one in said]
    ended = [one.ended for one in said]
    if len(set(weights)) == 1 and (whole := chained(prompts, said)) is not None:
        learned, prompts, spans, ended, weights = learned[:1], prompts[:1], [whole], ended[-1:], weights[:1]
    completions = [
        conversation.completion(*one)._replace(turns_cut=cut) for one in zip(prompts, spans, ended, strict=True)
    ]
    return [
        RenderedTurn(list(turns[:place]), Rendered((Span(asked),)), completion, weight)
        for place, asked, completion, weight in zip(learned, prompts, completions, weights, strict=True)
    ]


def render_steps(
    tokenizer: PreTrainedTokenizerBase, steps: Sequence[str], separator: str, prompt: Prompt, rendered: bool = False
) -> list[Rendered]:
    """Render a completion in steps, one piece per step, ready for `encode_rendered`.

    The concatenated ids of the pieces are the completion. Each step ends with the separator, the last step with the end
    of the completion. So the last id of a piece is the position at which its step is known to be complete.

    Args:
        tokenizer: the policy's tokenizer.
        steps: text of each step; a step that already ends with the separator gets no second one.
        separator: text between two steps.
        prompt: the prompt that the completion answers.
        rendered: whether plain text was written by a chat template, so that control tokens in it are real.

    Raises:
        ChatTemplateError: the template is missing or refuses the messages.
    """
    facts = facts_of(tokenizer)
    texts = [step.removesuffix(separator) for step in steps]
    texts = [f"{text}{separator}" for text in texts[:-1]] + texts[-1:]
    whole = render_completion(tokenizer, "".join(texts), prompt, rendered)
    if not (rendered and isinstance(prompt, str)):
        texts = [facts.guarded(text, spoken=True) for text in texts]
    text = "".join(span.text for span in whole.spans)
    content = "".join(texts)
    place = text.find(content)
    if place < 0:  # the template strips white space
        texts[0], texts[-1] = texts[0].lstrip(), texts[-1].rstrip()
        content = "".join(texts)
        place = text.find(content)
    if place < 0:
        raise TurnsRefused("turn-left-out", "the chat template rewrites a completion of steps; use another template")
    texts[0], texts[-1] = text[:place] + texts[0], texts[-1] + text[place + len(content) :]
    pieces, before = [], whole.before
    for piece in texts:
        pieces.append(Rendered((Span(piece),), before))
        before = facts.tail_of(before + piece)
    return [*pieces[:-1], pieces[-1]._replace(closing=whole.closing)]


def render_reply(tokenizer: PreTrainedTokenizerBase, turn: Message, replies: Sequence[Message]) -> Rendered:
    """Render the replies to a sampled turn, from the turn's end token up to the assistant's next turn.

    The earlier conversation is not rendered again, so that its tokens stay as sampled. Instead a short conversation of
    a question and the turn is rendered with and without the replies.

    Raises:
        ChatTemplateError: the template is missing or refuses the messages.
    """
    marked = {**turn, "content": "\ue003"}
    conversation = RenderedConversation(tokenizer, [{"role": "user", "content": "?"}, marked, *replies])
    alone, whole = conversation.text(2), conversation.text(len(replies) + 2, generation=True)
    if not whole.startswith(alone):  # the template rewrites an earlier turn, such as by dropping its thought
        before, mark, alone = alone.rpartition("\ue003")
        alone, whole = mark + alone, mark + whole.rpartition(mark)[2]
        if not before or not whole.startswith(alone):
            raise TurnsRefused("prompt-not-continued", "the chat template renders a turn differently after a reply")
    conversation.check_replies(whole, replies)
    ended = conversation.up_to_end(alone, "\ue003", bool(turn.get("tool_calls"))).text
    return Rendered((Span(whole[len(ended) :], False),), conversation.facts.end_of_turn or tokenizer.eos_token)


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
    conversation = RenderedConversation(tokenizer, turns)
    direct = len(before)
    learned = [place for place in range(direct, len(turns)) if _is_learned(turns[place])]
    if not learned:
        return conversation.completion(asked, [], True)
    if any(turns[place].get("weight", 1) != 1 for place in learned):
        raise TurnsRefused("bad-turn-weight", "a turn of this completion has a weight other than 0 and 1")

    def told(places: list[int]) -> tuple[list[str], list[Said]]:
        prompts = [asked if place == direct else conversation.prompt(place) for place in places]
        pairs = zip(places, prompts, strict=True)
        return prompts, [conversation.said(place, text, first if place == direct else None) for place, text in pairs]

    prompts, said = told(learned[-1:] if last_turn_only else learned[:MOST_TURNS])
    spans = chained(prompts, said)
    if spans is None:  # only the last turn has the same context as in use
        prompts, said = told(learned[-1:])
        spans = [Span(said[0].text)]
    if not prompts[0].startswith(asked):
        raise TurnsRefused("prompt-not-continued", "the chat template renders the prompt differently after an answer")
    spans = [Span(prompts[0][len(asked) :], False), *spans]
    made = conversation.completion(asked, spans, said[-1].ended, len(said) == 1 < len(learned))
    return made._replace(turns_cut=1 < len(said) < len(learned))


def _is_learned(turn: Message) -> bool:
    return turn["role"] == "assistant" and turn.get("weight", 1) != 0
