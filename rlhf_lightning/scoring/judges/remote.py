"""A model behind an OpenAI-compatible server as judge and as critic.

What a server must offer: ``POST /v1/chat/completions`` with ``messages``, ``max_tokens``, ``temperature`` and ``seed``
(``/v1/completions`` with ``prompt`` where prompts are plain text). To judge by probabilities also ``logprobs: true``
and ``top_logprobs``, answered by ``choices[0].logprobs.content``: a list of ``{token, logprob, top_logprobs: [{token,
logprob}]}``, as OpenAI, vLLM, SGLang and llama.cpp give it. Without them ``read: text`` takes the letter it writes.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

import torch

from rlhf_lightning.errors import SettingError
from rlhf_lightning.functional.judging import option_logprobs
from rlhf_lightning.sampling.engines import SamplingSettings
from rlhf_lightning.sampling.json_server import JSONServer, ServerError
from rlhf_lightning.scoring.judges.judge import JudgeAnswer, Question, Written, no_answer
from rlhf_lightning.types import Message, Prompt

LETTER = re.compile(r"""^[\s("'*\[]*([AB])[\s)"'*\].:,]*$""")
"""A token, or a whole answer, that names a letter and says no more."""

PREFACE = re.compile(r"""^[\s("'*\[]*$""")
"""A token that may stand before the letter."""

TIE = re.compile(r"""^[\s("'*\[]*tie[\s)"'*\].:,]*$""", re.IGNORECASE)

ANSWER_TOKENS = 8
"""Tokens of an answer at most: brackets and marks before and after a letter."""

T = TypeVar("T")
U = TypeVar("U")


class ChatServer:
    """Requests to an OpenAI-compatible server, some at a time.

    Args:
        url: address without the route, such as ``http://host:8000``.
        model: name of the model on the server.
        requests: requests in flight at a time.
        timeout: of one request, seconds.
        retries: how often a request is made again after a lost connection, a time-out or a busy server.
        wait: before the first repetition, seconds.
        api_key: name of the environment variable that holds the server's key; None sends none.
    """

    def __init__(
        self, url: str, model: str, requests: int = 16, timeout: float = 120.0, retries: int = 4, wait: float = 1.0,
        api_key: str | None = None,
    ) -> None:  # fmt: skip
        if requests < 1:
            raise SettingError("setting-out-of-range", f"requests is {requests}: it must be at least 1 at a time")
        self.model, self.requests = model, requests
        self.server = JSONServer(url.rstrip("/").removesuffix("/v1"), timeout, retries, wait, api_key)

    def each(self, function: Callable[[T], U], items: Sequence[T]) -> list[U]:
        """Return a function's value of each item, requests side by side; the first failure ends all."""
        with ThreadPoolExecutor(max_workers=self.requests) as pool:
            waiting = [pool.submit(function, item) for item in items]
            try:
                return [one.result() for one in waiting]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # what is not on its way yet would wait in vain
                raise

    def complete(self, prompt: Prompt, settings: SamplingSettings, seed: int, **further: Any) -> dict[str, Any]:
        """Return the choice that answers a prompt.

        Raises:
            ServerError: the server cannot be reached, refuses, or answers without a choice.
        """
        route, said = ("/v1/completions", "prompt") if isinstance(prompt, str) else ("/v1/chat/completions", "messages")
        body = {
            "model": self.model, said: prompt, "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature, "top_p": settings.top_p, "seed": seed, **further,
        }  # fmt: skip
        answer = self.server.post(route, body)
        try:
            choice = answer["choices"][0]
            if not isinstance(text_of_choice(choice), str):
                raise TypeError("its text is none")
        except (KeyError, IndexError, TypeError) as error:
            said = self.server.shown(answer)
            raise ServerError(
                "server-answer-unusable", f"{self.server.url}{route} answered without a completion ({error!r}): {said}"
            ) from error
        return choice


def text_of_choice(choice: dict[str, Any]) -> Any:
    """Text of a choice, of a chat's or of a plain one; nothing said is an empty text."""
    return choice["text"] if "text" in choice else (choice["message"]["content"] or "")


class RemoteWriter:
    """Answers, criticises and revises with a model behind a server.

    The server draws with its own random numbers, from a seed for each episode: the same rows come again only as far as
    the server's seeds reach.

    Args:
        server: the server.
        settings: of the sampling.
        seed: of the sampling.
    """

    def __init__(self, server: ChatServer, settings: SamplingSettings, seed: int = 0) -> None:
        self.server, self.settings, self.seed, self.name = server, settings, seed, server.model

    def __call__(self, prompts: Sequence[Prompt], episodes: Sequence[int]) -> list[Written | None]:
        """Return a completion of each prompt."""
        return self.server.each(self._written, list(zip(prompts, episodes, strict=True)))

    def _written(self, asked: tuple[Prompt, int]) -> Written:
        prompt, episode = asked
        choice = self.server.complete(prompt, self.settings, _seed_of(self.seed, episode))
        return Written(text_of_choice(choice), choice.get("finish_reason") == "stop")


def _seed_of(seed: int, episode: int) -> int:
    """The server's seed of an episode, in [0, 2^31)."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{episode}".encode()).digest()[:4], "big") >> 1


class RemoteJudge:
    """A model behind an OpenAI-compatible server that is asked for a letter.

    Its answer's tokens are read up to the letter, marks before it allowed. Of the most probable tokens that the server
    names there, those that spell a letter are summed; a letter that is not among them is taken to be as probable as the
    least probable token that is, the most that it can be, and the answer is marked as bounded. Anything else than a
    letter is no answer.

    Args:
        url: address without the route, such as ``http://host:8000``.
        model: name of the model on the server.
        read: ``logprobs``, or ``text`` for a server that gives none: the letter that it writes counts 1, "tie" half.
        begin: begin the answer for the model, as a local judge's is: vLLM's and SGLang's ``continue_final_message``.
        top_logprobs: tokens whose probability is asked for at each place; OpenAI allows 20.
        reasoning_tokens: longest reasoning, tokens.
        requests: requests in flight at a time.
        timeout: of one request, seconds.
        retries: how often a request is made again after a lost connection, a time-out or a busy server.
        wait: before the first repetition, seconds.
        api_key: name of the environment variable that holds the server's key; None sends none.
        name: what labels say they come from; None is the model's name.
    """

    def __init__(
        self,
        url: str,
        model: str,
        read: Literal["logprobs", "text"] = "logprobs",
        begin: bool = False,
        top_logprobs: int = 20,
        reasoning_tokens: int = 512,
        requests: int = 16,
        timeout: float = 120.0,
        retries: int = 4,
        wait: float = 1.0,
        api_key: str | None = None,
        name: str | None = None,
    ) -> None:
        if read not in ("logprobs", "text"):
            raise SettingError("unknown-choice", f"read is {read!r}; choose 'logprobs' or 'text'")
        self.server = ChatServer(url, model, requests, timeout, retries, wait, api_key)
        self.read, self.begin, self.top_logprobs, self.name = read, begin, top_logprobs, name or model
        self.thinking = SamplingSettings(max_new_tokens=reasoning_tokens, temperature=0.0)
        self.answering = SamplingSettings(max_new_tokens=ANSWER_TOKENS, temperature=0.0)

    def __call__(self, questions: Sequence[Question]) -> list[JudgeAnswer]:
        """Answer the questions, some at a time.

        Raises:
            ServerError: the server cannot be reached, refuses, or gives no log-probabilities.
        """
        return self.server.each(self._answer, questions)

    def _answer(self, question: Question) -> JudgeAnswer:
        reasoning = self._reasoning(question) if question.reasons else ""
        further = {"logprobs": True, "top_logprobs": self.top_logprobs} if self.read == "logprobs" else {}
        messages, opened = self._asked(question, reasoning)
        choice = self.server.complete(messages, self.answering, 0, **further, **opened)
        if self.read == "text":
            return verdict_in(text_of_choice(choice))._replace(reasoning=reasoning)
        return self._probabilities(choice)._replace(reasoning=reasoning)

    def _reasoning(self, question: Question) -> str:
        messages = (
            question.reasoning_begun() if self.begin else _with_note(question.messages, question.wording.reasoning)
        )
        return text_of_choice(self.server.complete(messages, self.thinking, 0, **self._continued())).strip()

    def _asked(self, question: Question, reasoning: str) -> tuple[list[Message], dict[str, Any]]:
        """The turns that ask for the letter, and what tells the server to go on with the last one."""
        if self.begin:
            return question.begun(reasoning), self._continued()
        if not reasoning:
            return question.messages, {}
        said = [("assistant", reasoning), ("user", question.wording.conclusion)]
        return [*question.messages, *({"role": role, "content": text} for role, text in said)], {}

    def _continued(self) -> dict[str, Any]:
        return {"continue_final_message": True, "add_generation_prompt": False} if self.begin else {}

    def _probabilities(self, choice: dict[str, Any]) -> JudgeAnswer:
        try:
            places = [
                (place["token"], float(place["logprob"]), [(one["token"], float(one["logprob"])) for one in likely])
                for place in choice["logprobs"]["content"]
                for likely in [place["top_logprobs"]]
            ]
        except (KeyError, TypeError, ValueError) as error:
            url = self.server.server.url
            raise ServerError(
                "server-answer-unusable", f"{url} gives no top_logprobs of an answer ({error!r}); set read to text"
            ) from None
        return letters_in(places)


def _with_note(messages: list[Message], note: str) -> list[Message]:
    """The question with a line more, for a server that does not let an answer be begun."""
    return [*messages[:-1], {**messages[-1], "content": f"{messages[-1]['content']}\n\n{note}"}]


def letters_in(places: Sequence[tuple[str, float, Sequence[tuple[str, float]]]]) -> JudgeAnswer:
    """Return the log-probabilities of the letters from an answer's tokens.

    Args:
        places: of each token its text, its log-probability, and the most probable tokens in its place with theirs.
    """
    found: dict[str, list[float]] = {"A": [], "B": []}
    before = 0.0  # log-probability of the marks before the letter
    for token, logprob, likely in places:
        for text, value in likely:
            named = LETTER.match(text)
            if named:
                found[named.group(1)].append(before + value)
        if not PREFACE.match(token):
            if not (found["A"] or found["B"]):
                return no_answer("other_words")
            floor = before + min((value for _, value in likely), default=-math.inf)
            first, second = (_summed(found[letter] or [floor]) for letter in "AB")
            return JudgeAnswer(first, second, bounded=not (found["A"] and found["B"]))
        before += logprob
    return no_answer("empty")


def _summed(logprobs: list[float]) -> float:
    return float(option_logprobs(torch.tensor([logprobs], dtype=torch.float64)))


def verdict_in(text: str) -> JudgeAnswer:
    """Return the verdict of an answer in words, read strictly: a letter, or "tie", and nothing else."""
    named = LETTER.match(text)
    if named:
        return JudgeAnswer(0.0, -math.inf) if named.group(1) == "A" else JudgeAnswer(-math.inf, 0.0)
    if TIE.match(text):
        return JudgeAnswer(-math.log(2), -math.log(2))
    return no_answer("other_words" if text.strip() else "empty")
