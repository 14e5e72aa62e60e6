"""The words around a comparison: principles, the question a judge reads, and conversations as transcripts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_lightning.errors import RlhfError
from rlhf_lightning.types import Message


class ConstitutionError(RlhfError, ValueError):
    """A constitution that cannot be used; the message says where it is wrong."""


@dataclass(frozen=True)
class ComparingPrinciple:
    """A principle to compare two answers by.

    Attributes:
        id: short name, unique in its list.
        question: asks which of two answers is better.
    """

    id: str
    question: str


COMPARISON = """\
Two answers to the end of a conversation are compared.

{conversation}

{question}

(A) {first}

(B) {second}

Which of them stands first and how long they are does not count. Name the better one by its letter alone: (A) or (B)."""


@dataclass(frozen=True)
class Wording:
    """What is said around the principles, in the language of the constitution.

    Attributes:
        human: name of the user in a transcript.
        assistant: name of the assistant.
        system: name of the instructions before a conversation.
        critique_request: heads a request for a critique in plain text.
        critique: heads a critique.
        revision_request: heads a request for a revision.
        revision: heads a revision.
        comparison: the question that a judge is asked, with ``{conversation}``, ``{question}``, ``{first}`` and
            ``{second}`` once each.
        answer: what the judge's answer begins with: the letter is the next thing said.
        reasoning: what the judge's reasoning begins with.
        conclusion: asks for the letter after reasoning, where the answer cannot be begun for the judge.
        refusals: what a critique begins with that refuses to be one.
        meta: what a revision begins with that talks about itself instead of answering.
    """

    human: str = "Human"
    assistant: str = "Assistant"
    system: str = "System"
    critique_request: str = "Critique request"
    critique: str = "Critique"
    revision_request: str = "Revision request"
    revision: str = "Revision"
    comparison: str = COMPARISON
    answer: str = "The better answer is ("
    reasoning: str = "Let us weigh them step by step:"
    conclusion: str = "Now name the better answer by its letter alone: (A) or (B)."
    refusals: tuple[str, ...] = (
        "I'm sorry", "I am sorry", "Sorry", "I cannot", "I can't", "I can not", "I won't", "I will not", "I'm unable",
        "I am unable", "I'm not able", "I am not able", "As an AI", "As a language model", "Unfortunately, I",
    )  # fmt: skip
    meta: tuple[str, ...] = (
        "Revision:", "Revised", "Rewritten", "Critique:", "Here is", "Here's", "Here are the", "Sure, here",
        "Certainly! Here", "The revised", "My revised", "My revision", "The rewritten", "I have revised",
        "I have rewritten", "I've revised", "I revised", "I rewrote", "(A)", "(B)",
    )  # fmt: skip

    def __post_init__(self) -> None:
        found = re.findall(r"\{(\w*)\}", self.comparison)
        if sorted(found) != ["conversation", "first", "question", "second"]:
            raise ConstitutionError(
                "wording-places",
                "wording.comparison must hold {conversation}, {question}, {first} and {second} exactly "
                "once each, and no other placeholder",
            )


def first_paragraphs(text: str, wording: Wording) -> str:
    """What was written before the writer of a plain transcript went on with somebody else's part."""
    heads = [wording.human, wording.assistant, wording.critique_request, wording.critique, wording.revision_request]
    heads.append(wording.revision)
    found = re.search(rf"\n\s*(?:{'|'.join(map(re.escape, heads))})\s*:", text)
    return text[: found.start()] if found else text


def as_text(messages: Sequence[Message], wording: Wording) -> str:
    """A conversation as a transcript; a last turn of the assistant is left open, or opened."""
    names = {"user": wording.human, "assistant": wording.assistant}
    said = [f"{names.get(turn['role'], wording.system)}: {turn['content']}" for turn in messages]
    if messages and messages[-1]["role"] != "assistant":
        said.append(f"{wording.assistant}:")
    return "\n\n".join(said)
