"""Judges: questions and answers of a comparison, the fixed texts around them, and a simulated judge."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from rlhf_lightning.errors import ContractError, RlhfError
from rlhf_lightning.scoring.scorer import GoldReward, load_gold_reward
from rlhf_lightning.types import Message, Prompt


class ConstitutionError(RlhfError, ValueError):
    """An unusable constitution; the message says where the fault is."""


@dataclass(frozen=True)
class ComparingPrinciple:
    """A principle for comparing two answers."""

    id: str  # short name, unique in its list
    question: str  # asks which of two answers is better


COMPARISON = """\
Two answers to the end of a conversation are compared.

{conversation}

{question}

(A) {first}

(B) {second}

Which of them stands first and how long they are does not count. Name the better one by its letter alone: (A) or (B)."""


@dataclass(frozen=True)
class Wording:
    """Fixed texts around the principles, in the language of the constitution."""

    human: str = "Human"  # name of the user in a transcript
    assistant: str = "Assistant"  # name of the assistant
    system: str = "System"  # name of the instructions before a conversation
    critique_request: str = "Critique request"  # heads a request for a critique in plain text
    critique: str = "Critique"  # heads a critique
    revision_request: str = "Revision request"  # heads a request for a revision
    revision: str = "Revision"  # heads a revision
    # the question for a judge, with ``{conversation}``, ``{question}``, ``{first}`` and ``{second}`` once each
    comparison: str = COMPARISON
    answer: str = "The better answer is ("  # beginning of the judge's answer; the letter comes next
    reasoning: str = "Let us weigh them step by step:"  # beginning of the judge's reasoning
    # asks for the letter after reasoning, for judges whose answer cannot be prefilled
    conclusion: str = "Now name the better answer by its letter alone: (A) or (B)."
    # beginnings of critiques that refuse to criticise
    refusals: tuple[str, ...] = (
        "I'm sorry", "I am sorry", "Sorry", "I cannot", "I can't", "I can not", "I won't", "I will not", "I'm unable",
        "I am unable", "I'm not able", "I am not able", "As an AI", "As a language model", "Unfortunately, I",
    )  # fmt: skip
    # beginnings of revisions that describe themselves instead of answering
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


class Question(NamedTuple):
    """Two completions in the order in which they are shown, and the question about them.

    Attributes:
        prompt: the prompt of both completions.
        first: the completion shown as (A).
        second: the completion shown as (B).
        principle: the principle of the comparison.
        messages: the question as text, in turns that end with a user turn.
        wording: beginnings of answers and reasoning, and the speakers' names.
        reasons: whether the judge reasons before it answers.
    """

    prompt: Prompt
    first: str
    second: str
    principle: ComparingPrinciple
    messages: list[Message]
    wording: Wording
    reasons: bool = False

    def messages_with_answer(self, reasoning: str = "") -> list[Message]:
        """Return the question with a prefilled answer (after the reasoning, if any), so that the letter comes next."""
        said = f"{self.wording.reasoning} {reasoning.strip()}\n\n" if reasoning.strip() else ""
        return [*self.messages, {"role": "assistant", "content": said + self.wording.answer}]

    def messages_with_reasoning(self) -> list[Message]:
        """Return the question with the beginning of the reasoning prefilled."""
        return [*self.messages, {"role": "assistant", "content": self.wording.reasoning}]


class JudgeAnswer(NamedTuple):
    """A judge's answer to a question.

    Attributes:
        first_logprob: l_A, log-probability of naming (A), summed over its spellings.
        second_logprob: l_B, log-probability of naming (B). A judge that returns only a letter uses 0 and -infinity.
        reasoning: the text before the answer.
        failure: why there is no answer; empty if there is an answer. With a failure, ignore the log-probabilities.
        bounded: whether one of the log-probabilities is only an upper bound.
    """

    first_logprob: float
    second_logprob: float
    reasoning: str = ""
    failure: str = ""
    bounded: bool = False

    @property
    def mass(self) -> float:
        """Probability of naming either letter."""
        return math.exp(min(self.first_logprob, 0)) + math.exp(min(self.second_logprob, 0))


def no_answer(reason: str, reasoning: str = "") -> JudgeAnswer:
    """Return a missing answer with its reason."""
    return JudgeAnswer(-math.inf, -math.inf, reasoning, reason)


@runtime_checkable
class Judge(Protocol):
    """Interface of judges; no base class is needed.

    Attributes:
        name: source of the labels, stored with them.
    """

    name: str

    def __call__(self, questions: Sequence[Question]) -> Sequence[JudgeAnswer]:
        """Return an answer to each question, in order."""
        ...


class Pair(NamedTuple):
    """Two completions of a prompt to compare."""

    prompt: Prompt  # plain text or messages
    first: str | list[Message]  # a completion, plain text or messages
    second: str | list[Message]  # the other completion
    preference: float | None = None  # probability that people prefer the first; None if unknown
    columns: dict[str, Any] = {}  # other columns of the row


class Written(NamedTuple):
    """A text written by a model, and whether it ended with an end token."""

    text: str
    finished: bool


class Writer(Protocol):
    """Interface of models that continue prompts with text; no base class is needed.

    Attributes:
        name: source of the rows, stored with them.
    """

    name: str

    def __call__(self, prompts: Sequence[Prompt], episodes: Sequence[int]) -> Sequence[Written | None]:
        """Return a completion of each prompt, seeded by its episode number; None if the prompt is too long."""
        ...


class SimulatedJudge:
    """Judge with log-odds scale * (gold_reward(first) - gold_reward(second)) + position_bias + noise * normal for (A).

    The normal number of a pair is determined by (seed, prompt, the two completions, principle). In swapped order the
    judge makes the same error; only the position bias changes sides.

    Args:
        gold_reward: ``(prompt, completion) -> number``, or its import path, such as
            ``rlhf_lightning.worlds.hazards.harmlessness``.
        scale: log-odds per unit of gold reward; the true probability is sigmoid(scale * difference).
        position_bias: log-odds in favour of the first position.
        noise: standard deviation of the judge's error about a pair, log-odds.
        seed: seed of the noise.
        name: source of the labels.

    Raises:
        SettingError: the import path names no function.
    """

    def __init__(
        self,
        gold_reward: str | GoldReward,
        scale: float = 12.0,
        position_bias: float = 0.0,
        noise: float = 0.0,
        seed: int = 0,
        name: str = "simulated",
    ) -> None:
        self.gold_reward = load_gold_reward(gold_reward)
        self.scale, self.position_bias, self.noise, self.seed, self.name = scale, position_bias, noise, seed, name

    def __call__(self, questions: Sequence[Question]) -> list[JudgeAnswer]:
        """Answer the questions."""
        return [self._answer(question) for question in questions]

    def log_odds(self, question: Question) -> float:
        """Return the log-odds of (A) without the position bias."""
        first, second = (self.gold_reward(question.prompt, side) for side in (question.first, question.second))
        gap = first - second
        return self.scale * gap + self.noise * self._mistake(question)

    def _answer(self, question: Question) -> JudgeAnswer:
        odds = torch.tensor(self.log_odds(question) + self.position_bias, dtype=torch.float64)
        first, second = torch.nn.functional.logsigmoid(torch.stack([odds, -odds])).tolist()
        return JudgeAnswer(first, second)

    def _mistake(self, question: Question) -> float:
        """Return a standard normal number that changes sign with the order of the completions."""
        if not self.noise:
            return 0.0
        sides = sorted((question.first, question.second))
        key = json.dumps([self.seed, question.prompt, sides, question.principle.id])
        number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big")
        drawn = NormalDist().inv_cdf((number + 0.5) / 2**48)
        return drawn if question.first == sides[0] else -drawn


def checked_answers(judge: Judge, questions: Sequence[Question]) -> list[JudgeAnswer]:
    """Return a judge's answers; a log-probability that is NaN counts as no answer.

    Raises:
        ContractError: the number of answers is wrong, or a log-probability is not a number of at most 0.
    """
    answers = list(judge(questions))
    if len(answers) != len(questions):
        raise ContractError(
            "wrong-number",
            f"judge {judge.name} gave {len(answers)} answers to {len(questions)} questions; return one for each",
        )
    for answer in answers:
        values = () if answer.failure else (answer.first_logprob, answer.second_logprob)
        if any(isinstance(value, bool) or not isinstance(value, int | float) or value > 1e-3 for value in values):
            raise ContractError(
                "not-a-logprob",
                f"judge {judge.name} gave the log-probabilities {values!r}; each must be a number that is at most 0",
            )
    return answers


def first_paragraphs(text: str, wording: Wording) -> str:
    """Return a text up to the point where the writer of a plain transcript continued with another speaker."""
    heads = [wording.human, wording.assistant, wording.critique_request, wording.critique, wording.revision_request]
    heads.append(wording.revision)
    found = re.search(rf"\n[^\S\n]*(?:{'|'.join(map(re.escape, heads))})[^\S\n]*:", text)
    return text[: found.start()].rstrip() if found else text


def as_turns(prompt: Prompt) -> list[Message]:
    """Return a prompt as messages; plain text becomes a user turn."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]


def turn_text(turn: Message) -> str:
    """Return the content of a turn, followed by its tool calls as ``name({"argument": value})``."""
    calls = [call["function"] for call in turn.get("tool_calls") or ()]
    written = [f"{one['name']}({json.dumps(one['arguments'], ensure_ascii=False)})" for one in calls]
    return " ".join([str(turn["content"]), *written]).strip() if calls else str(turn["content"])


def as_text(messages: Sequence[Message], wording: Wording) -> str:
    """Return a conversation as a transcript that ends with the beginning of an assistant turn."""
    names = {"user": wording.human, "assistant": wording.assistant, "tool": "Tool"}
    said = [f"{names.get(turn['role'], wording.system)}: {turn_text(turn)}" for turn in messages]
    if messages and messages[-1]["role"] != "assistant":
        said.append(f"{wording.assistant}:")
    return "\n\n".join(said)
