"""From principles to what a critic or a judge reads: turns for chat models, a transcript for plain ones."""

from __future__ import annotations

import re

from rlhf_lightning.constitution.principles import ComparisonExample, Constitution, RevisingPrinciple
from rlhf_lightning.scoring.judges.judge import ComparingPrinciple, Wording, as_text
from rlhf_lightning.types import Message, Prompt


def answered(prompt: Prompt, completion: str | list[Message]) -> Prompt:
    """A prompt and an answer to it as one text or conversation, in the prompt's own form."""
    if isinstance(prompt, str):
        return prompt + spaced(prompt, text_of(completion))
    turns = completion if isinstance(completion, list) else [_turn("assistant", completion)]
    if prompt and prompt[-1]["role"] == "assistant":  # left open, to be continued
        return [*prompt[:-1], _turn("assistant", prompt[-1]["content"] + turns[0]["content"]), *turns[1:]]
    return [*prompt, *turns]


def spaced(prompt: Prompt, completion: str) -> str:
    """A completion with the space that parts it from a plain prompt, where neither has one."""
    apart = not isinstance(prompt, str) or not prompt or prompt[-1].isspace() or completion[:1].isspace()
    return completion if apart else f" {completion}"


def text_of(completion: str | list[Message]) -> str:
    """A completion as one text: the content of its turns."""
    return completion if isinstance(completion, str) else "\n\n".join(turn["content"] for turn in completion)


def critique_prompt(
    constitution: Constitution, principle: RevisingPrinciple, prompt: Prompt, completion: str
) -> Prompt:
    """What a critic reads before the critique: examples, the conversation, the request."""
    wording, whole = constitution.wording, answered(prompt, completion)
    if isinstance(whole, str):
        opened = f"\n\n{wording.critique_request}: {principle.critique}\n\n{wording.critique}:"
        return _examples_in_text(constitution) + whole + opened
    return _after_examples(constitution, whole, with_critique=True) + [_turn("user", principle.critique)]


def revision_prompt(
    constitution: Constitution, principle: RevisingPrinciple, prompt: Prompt, completion: str, critique: str | None
) -> Prompt:
    """What a critic reads before the revision; without a critique the request for a revision follows the answer."""
    wording, whole = constitution.wording, answered(prompt, completion)
    if isinstance(whole, str):
        asked = f"\n\n{wording.revision_request}: {principle.revision}\n\n{wording.revision}:"
        if critique is None:
            return _examples_in_text(constitution, with_critique=False) + whole + asked
        return f"{critique_prompt(constitution, principle, prompt, completion)} {critique}{asked}"
    turns = _after_examples(constitution, whole, with_critique=critique is not None)
    if critique is not None:
        turns += [_turn("user", principle.critique), _turn("assistant", critique)]
    return [*turns, _turn("user", principle.revision)]


def comparison_messages(
    constitution: Constitution, principle: ComparingPrinciple, prompt: Prompt, first: str, second: str
) -> list[Message]:
    """What a judge is asked, in turns: examples with their answers, then the question at hand."""
    turns: list[Message] = []
    for example in constitution.comparison_examples:
        shown = constitution.comparing_principle(example.principle)
        turns.append(
            _turn("user", _question(constitution.wording, shown, example.prompt, example.first, example.second))
        )
        turns.append(_turn("assistant", _verdict(constitution.wording, example)))
    return [*turns, _turn("user", _question(constitution.wording, principle, prompt, first, second))]


def _question(wording: Wording, principle: ComparingPrinciple, prompt: Prompt, first: str, second: str) -> str:
    """The question with its places filled; what is filled in is never read for places itself."""
    values = {
        "conversation": _transcript(wording, prompt),
        "question": principle.question,
        "first": first.strip(),
        "second": second.strip(),
    }
    return re.sub(r"\{(\w+)\}", lambda place: values[place.group(1)], wording.comparison)


def _transcript(wording: Wording, prompt: Prompt) -> str:
    """A prompt as a transcript; plain text that is one already stays as it is."""
    if isinstance(prompt, str):
        told = re.search(rf"^\s*(?:Human|{re.escape(wording.human)}):", prompt)
        return prompt.strip() if told else f"{wording.human}: {prompt.strip()}"
    return as_text(prompt, wording).removesuffix(f"\n\n{wording.assistant}:")


def _verdict(wording: Wording, example: ComparisonExample) -> str:
    return f"{wording.answer}{example.answer}{')' if wording.answer.endswith('(') else ''}"


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _after_examples(constitution: Constitution, conversation: list[Message], with_critique: bool) -> list[Message]:
    """A conversation behind the examples' turns; instructions of its system stay in front."""
    shown: list[Message] = []
    for example in constitution.revision_examples:
        principle = constitution.revising_principle(example.principle)
        shown += [_turn("user", example.prompt), _turn("assistant", example.completion)]
        if with_critique:
            shown += [_turn("user", principle.critique), _turn("assistant", example.critique)]
        shown += [_turn("user", principle.revision), _turn("assistant", example.revision)]
    systems = next((place for place, turn in enumerate(conversation) if turn["role"] != "system"), 0)
    return [*conversation[:systems], *shown, *conversation[systems:]]


def _examples_in_text(constitution: Constitution, with_critique: bool = True) -> str:
    wording, parts = constitution.wording, []
    for example in constitution.revision_examples:
        principle = constitution.revising_principle(example.principle)
        said = [(wording.human, example.prompt), (wording.assistant, example.completion)]
        if with_critique:
            said += [(wording.critique_request, principle.critique), (wording.critique, example.critique)]
        said += [(wording.revision_request, principle.revision), (wording.revision, example.revision)]
        parts.append("\n\n".join(f"{head}: {text}" for head, text in said) + "\n\n---\n\n")
    return "".join(parts)
