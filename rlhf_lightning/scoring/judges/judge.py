"""The seam between comparisons and whoever decides them: a judge answers questions, whatever it is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from rlhf_lightning.errors import SettingError
from rlhf_lightning.loading import load
from rlhf_lightning.scoring.judges.wording import ComparingPrinciple, Wording
from rlhf_lightning.types import Message, Prompt


class Question(NamedTuple):
    """Two completions in the order in which they are shown, and how a language model is asked about them.

    Attributes:
        prompt: what both answer.
        first: the completion shown as (A).
        second: the completion shown as (B).
        principle: what they are compared by.
        messages: the question in words, as turns that end with the user's.
        wording: what answers and reasoning begin with, and how speakers are called.
        reasons: whether the judge reasons before it answers.
    """

    prompt: Prompt
    first: str
    second: str
    principle: ComparingPrinciple
    messages: list[Message]
    wording: Wording
    reasons: bool = False

    def begun(self, reasoning: str = "") -> list[Message]:
        """The question with the answer begun, after the reasoning if any: the letter is the next thing said."""
        said = f"{self.wording.reasoning} {reasoning.strip()}\n\n" if reasoning.strip() else ""
        return [*self.messages, {"role": "assistant", "content": said + self.wording.answer}]

    def reasoning_begun(self) -> list[Message]:
        """The question with the reasoning begun."""
        return [*self.messages, {"role": "assistant", "content": self.wording.reasoning}]


class JudgeAnswer(NamedTuple):
    """What a judge says to a question.

    Attributes:
        first_logprob: l_A, log-probability that it names (A), all its spellings together.
        second_logprob: l_B, that it names (B). A judge that only names one says 0 and minus infinity.
        reasoning: what it said before it answered.
        failure: why it gave no answer; empty where it gave one. The log-probabilities mean nothing then.
        bounded: whether one of the log-probabilities is only known to be no larger than this.
    """

    first_logprob: float
    second_logprob: float
    reasoning: str = ""
    failure: str = ""
    bounded: bool = False

    @property
    def mass(self) -> float:
        """Probability that either letter is named."""
        return math.exp(min(self.first_logprob, 0)) + math.exp(min(self.second_logprob, 0))


def no_answer(reason: str, reasoning: str = "") -> JudgeAnswer:
    """Return the answer of a judge that gave none."""
    return JudgeAnswer(-math.inf, -math.inf, reasoning, reason)


@runtime_checkable
class Judge(Protocol):
    """Anything that answers questions; no base class is needed.

    Attributes:
        name: what labels say they come from.
    """

    name: str

    def __call__(self, questions: Sequence[Question]) -> Sequence[JudgeAnswer]:
        """Return an answer to each question, in their order."""
        ...


class Pair(NamedTuple):
    """Two completions of a prompt to be compared.

    Attributes:
        prompt: plain text or messages.
        first: a completion, plain text or messages.
        second: the other.
        preference: probability that the first is better according to people; None where nobody said.
        columns: further columns of the row.
    """

    prompt: Prompt
    first: str | list[Message]
    second: str | list[Message]
    preference: float | None = None
    columns: dict[str, Any] = {}


class Written(NamedTuple):
    """A text that a model wrote.

    Attributes:
        text: the text.
        finished: whether it ended by itself.
    """

    text: str
    finished: bool


class Writer(Protocol):
    """Anything that continues prompts with text; no base class is needed.

    Attributes:
        name: what rows say they come from.
    """

    name: str

    def __call__(self, prompts: Sequence[Prompt], episodes: Sequence[int]) -> Sequence[Written | None]:
        """Return a completion of each prompt, drawn with its episode's random numbers; None where it is too long."""
        ...


def load_judge(spec: str | Judge, arguments: Mapping[str, Any] | None = None) -> Judge:
    """Return the judge that ``spec`` names.

    Args:
        spec: a judge; a model's folder, .gguf file or hub id (`LocalJudge`); the address of an OpenAI-compatible server
            (`RemoteJudge`, which needs the argument ``model``); the name of a class of this room; or the import path of
            a class, such as ``my_judge.MyJudge``, whose objects answer a sequence of questions.
        arguments: of the class.

    Raises:
        SettingError: see `loading.load`.
    """
    from rlhf_lightning.scoring.judges.local import LocalJudge
    from rlhf_lightning.scoring.judges.remote import RemoteJudge
    from rlhf_lightning.scoring.judges.simulated_judge import SimulatedJudge

    shipped = {kind.__name__: kind for kind in (LocalJudge, RemoteJudge, SimulatedJudge)}
    given = dict(arguments or {})
    if isinstance(spec, str) and spec not in shipped:
        if spec.startswith(("http://", "https://")):
            spec, given = "RemoteJudge", {"url": spec, **given}
        elif Path(spec).expanduser().exists() or "/" in spec or spec.endswith(".gguf"):
            spec, given = "LocalJudge", {"model": spec, **given}
    made = load({"class_path": spec, "init_args": given} if isinstance(spec, str) else spec, Callable, shipped, "judge")
    if not isinstance(getattr(made, "name", None), str):
        raise SettingError("wrong-kind", f"judge {spec!r} has no name: labels say which judge they come from")
    return made
