"""A model on an OpenAI-compatible server as judge and as writer.

The server needs ``POST /v1/chat/completions`` with ``messages``, ``max_tokens``, ``temperature`` and ``seed``
(``/v1/completions`` with ``prompt`` for plain text). Judging by probabilities also needs ``logprobs: true`` and
``top_logprobs``. The response then has ``choices[0].logprobs.content``, a list of ``{token, logprob, top_logprobs:
[{token, logprob}]}``, as with OpenAI, vLLM, SGLang and llama.cpp. Without them, use ``read: text`` to read the letter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import torch

from rlhf_lightning.errors import check_choice, check_range
from rlhf_lightning.functional.judging import option_logprobs
from rlhf_lightning.sampling.engines import SamplingSettings
from rlhf_lightning.sampling.json_server import JSONServer, ServerError, each, finite, request_seed
from rlhf_lightning.scoring.judges.judge import JudgeAnswer, Question, Written, no_answer
from rlhf_lightning.types import Message, Prompt

LETTER = re.compile(r"""^[\s("'*\[]*([AB])[\s)"'*\].:,]*$""")
"""A token, or a whole answer, that consists of a letter and punctuation."""

PREFACE = re.compile(r"""^[\s("'*\[]*$""")
"""A token that may precede the letter."""

TIE = re.compile(r"""^[\s("'*\[]*tie[\s)"'*\].:,]*$""", re.IGNORECASE)

ANSWER_TOKENS = 8
"""Maximum number of tokens in an answer: a letter with brackets and marks around it."""


class ChatServer:
    """Send requests to an OpenAI-compatible server.

    Args:
        url: address without the route, such as ``http://host:8000``.
        model: name of the model on the server.
        requests: number of concurrent requests.
        timeout: time limit of one request, seconds.
        retries: retries of a request after a lost connection, a timeout or a busy server.
        wait: wait before the first retry, seconds.
        api_key: name of the environment variable with the server's API key; null sends none.
    """

    def __init__(
        self, url: str, model: str, requests: int = 16, timeout: float = 120.0, retries: int = 4, wait: float = 1.0,
        api_key: str | None = None,
    ) -> None:  # fmt: skip
        check_range(requests >= 1, "it must be at least 1", requests=requests)
        self.model, self.requests = model, requests
        self.server = JSONServer(url.rstrip("/").removesuffix("/v1"), timeout, retries, wait, api_key)

    def complete(self, prompt: Prompt, settings: SamplingSettings, seed: int, **further: Any) -> dict[str, Any]:
        """Return the server's first choice for a prompt.

        Raises:
            ServerError: the server cannot be reached, refuses, or returns no choice.
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
                raise TypeError("the text is missing")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise ServerError(
                "server-answer-unusable",
                f"{self.server.url}{route} answered without a completion: {self.server.shown(answer)}",
            ) from None
        return choice


def text_of_choice(choice: dict[str, Any]) -> Any:
    """Return the text of a chat choice or of a plain choice; null counts as empty."""
    return choice["text"] if "text" in choice else (choice["message"]["content"] or "")


class RemoteWriter:
    """Answer, criticise and revise with a model on a server.

    The server uses its own random numbers, with a seed per episode, so results are as reproducible as the server's
    seeded sampling.

    Args:
        server: the server.
        settings: sampling settings.
        seed: seed of the sampling.
    """

    def __init__(self, server: ChatServer, settings: SamplingSettings, seed: int = 0) -> None:
        self.server, self.settings, self.seed, self.name = server, settings, seed, server.model

    def __call__(self, prompts: Sequence[Prompt], episodes: Sequence[int]) -> list[Written | None]:
        """Return a completion of each prompt."""
        return list(each(self._written, zip(prompts, episodes, strict=True), self.server.requests))

    def _written(self, asked: tuple[Prompt, int]) -> Written:
        prompt, episode = asked
        choice = self.server.complete(prompt, self.settings, request_seed(self.seed, episode))
        return Written(text_of_choice(choice), choice.get("finish_reason") == "stop")


class RemoteJudge:
    """Model on an OpenAI-compatible server that is asked for a letter.

    The answer's tokens are read up to the letter, which marks may precede. At that position the probabilities of the
    most probable tokens that spell a letter are summed. A letter that is missing from the reported tokens gets the
    probability of the least probable of them as an upper bound, and the answer is marked as bounded. An answer without
    a letter counts as missing.

    Args:
        url: address without the route, such as ``http://host:8000``.
        model: name of the model on the server.
        read: ``logprobs``, or ``text`` for a server without them: the written letter counts 1, "tie" counts half.
        begin: prefill the answer, as for a local judge, with ``continue_final_message`` of vLLM and SGLang.
        top_logprobs: number of most probable tokens to request at each position; OpenAI allows 20.
        reasoning_tokens: maximum length of the reasoning, tokens.
        requests: number of concurrent requests.
        timeout: time limit of one request, seconds.
        retries: retries of a request after a lost connection, a timeout or a busy server.
        wait: wait before the first retry, seconds.
        api_key: name of the environment variable with the server's API key; null sends none.
        name: source of the labels; null uses the model's name.
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
        check_choice(("logprobs", "text"), read=read)
        self.server = ChatServer(url, model, requests, timeout, retries, wait, api_key)
        self.read, self.begin, self.top_logprobs, self.name = read, begin, top_logprobs, name or model
        self.thinking = SamplingSettings(max_new_tokens=reasoning_tokens, temperature=0.0)
        self.answering = SamplingSettings(max_new_tokens=ANSWER_TOKENS, temperature=0.0)

    def __call__(self, questions: Sequence[Question]) -> list[JudgeAnswer]:
        """Answer the questions.

        Raises:
            ServerError: the server cannot be reached, refuses, or returns no usable log-probabilities.
        """
        return list(each(self._answer, questions, self.server.requests))

    def _answer(self, question: Question) -> JudgeAnswer:
        reasoning = self._reasoning(question) if question.reasons else ""
        further = {"logprobs": True, "top_logprobs": self.top_logprobs} if self.read == "logprobs" else {}
        messages, opened = self._asked(question, reasoning)
        choice = self.server.complete(messages, self.answering, 0, **further, **opened)
        if self.read == "text":
            return verdict_in(text_of_choice(choice))._replace(reasoning=reasoning)
        return self._probabilities(choice)._replace(reasoning=reasoning)

    def _reasoning(self, question: Question) -> str:
        messages = question.messages_with_reasoning()
        if not self.begin:  # the server cannot prefill the answer, so the question ends with its beginning
            last = question.messages[-1]
            content = f"{last['content']}\n\n{question.wording.reasoning}"
            messages = [*question.messages[:-1], {**last, "content": content}]
        return text_of_choice(self.server.complete(messages, self.thinking, 0, **self._continued())).strip()

    def _asked(self, question: Question, reasoning: str) -> tuple[list[Message], dict[str, Any]]:
        """Return the turns that ask for the letter, and the arguments that make the server continue the last turn."""
        if self.begin:
            return question.messages_with_answer(reasoning), self._continued()
        if not reasoning:
            return question.messages, {}
        said = [("assistant", reasoning), ("user", question.wording.conclusion)]
        return [*question.messages, *({"role": role, "content": text} for role, text in said)], {}

    def _continued(self) -> dict[str, Any]:
        return {"continue_final_message": True, "add_generation_prompt": False} if self.begin else {}

    def _probabilities(self, choice: dict[str, Any]) -> JudgeAnswer:
        try:
            places = [
                (*_token_logprob(place), [_token_logprob(one) for one in place["top_logprobs"]])
                for place in choice["logprobs"]["content"]
            ]
        except (KeyError, TypeError, ValueError) as error:
            why = f"{error}" if type(error) is ValueError else type(error).__name__
            raise ServerError(
                "server-answer-unusable",
                f"{self.server.server.url} gives no usable top_logprobs of an answer ({why}); set read to text",
            ) from None
        return letters_in(places)


def _token_logprob(entry: dict[str, Any]) -> tuple[str, float]:
    token, value = entry["token"], finite(entry["logprob"])
    if not isinstance(token, str) or value > 1e-3:
        raise ValueError("a token that is not text" if value <= 1e-3 else "a log-probability above 0")
    return token, value


def letters_in(places: Sequence[tuple[str, float, Sequence[tuple[str, float]]]]) -> JudgeAnswer:
    """Return the log-probabilities of the letters from an answer's tokens.

    Args:
        places: for each token its text, its log-probability, and the most probable tokens at its position with theirs.
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
    """Return the verdict of an answer in words; it must be a letter or "tie" and nothing else."""
    named = LETTER.match(text)
    if named:
        return JudgeAnswer(0.0, -math.inf) if named.group(1) == "A" else JudgeAnswer(-math.inf, 0.0)
    if TIE.match(text):
        return JudgeAnswer(-math.log(2), -math.log(2))
    return no_answer("other_words" if text.strip() else "empty")
