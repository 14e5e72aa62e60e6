"""The OpenAI-compatible API of a policy: routes and request handling."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from rlhf_lightning.commands.completion_answers import AnswerWriter, Choice, error_body, event
from rlhf_lightning.commands.completion_requests import (
    Asked,
    BadRequest,
    RequestLimits,
    Text,
    encoded,
    read_request,
    shortened,
    token_ids,
)
from rlhf_lightning.commands.web_server import Guard, json_object, requiring_key
from rlhf_lightning.errors import RlhfError, StateError, is_out_of_memory
from rlhf_lightning.sampling.live_batch import LiveBatch, PromptScores, UnscoredPrompt

LARGEST_BODY = 8 * 2**20
"""Maximum bytes of a request; a prompt as a list of token ids takes about six bytes per token."""

MOST_WAITING = 2048
"""Maximum number of completions in progress or waiting; further requests are told to retry later."""


def make_app(api: Api, key: str | None = None) -> ASGIApp:
    """Return the web application.

    Args:
        api: answers the requests.
        key: key that requests must send as ``Authorization: Bearer KEY``; None if no key is needed.
    """

    def refusal(message: str, status: int, headers: Mapping[str, str] | None = None) -> Response:
        code = {401: "invalid_api_key", 404: "not_found", 429: "too_many_requests", 504: "timeout"}
        return JSONResponse(error_body(message, code.get(status, "bad-request"), status), status, headers)

    async def refused(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            return refusal(error.detail, error.status_code, error.headers)
        field = error.field if isinstance(error, BadRequest) else None
        status = 503 if isinstance(error, StateError) else 400
        return JSONResponse(error_body(str(error), getattr(error, "code", "bad-request"), status, field), status)

    async def failed(request: Request, error: Exception) -> Response:
        print(f"rlhf serve: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        memory = is_out_of_memory(error)
        said = (
            "out of memory: request fewer completions or tokens at a time"
            if memory
            else f"the server failed ({type(error).__name__})"
        )
        return JSONResponse(error_body(said, "out-of-memory" if memory else "failed", 500), 500)

    def with_key(handler: Any) -> Any:
        return requiring_key(handler, key)

    app = Starlette(
        routes=[
            Route("/health", api.health),
            Route("/v1/models", with_key(api.models)),
            Route("/v1/models/{name:path}", with_key(api.model)),
            Route("/v1/completions", with_key(api.complete), methods=["POST"]),
            Route("/v1/chat/completions", with_key(api.chat), methods=["POST"]),
            Route("/tokenize", with_key(api.tokenize), methods=["POST"]),
            Route("/tokenizer_info", with_key(api.tokenizer_info)),
            Route("/detokenize", with_key(api.detokenize), methods=["POST"]),
        ],
        exception_handlers={HTTPException: refused, RlhfError: refused, Exception: failed},
    )
    app.router.redirect_slashes = False
    return Guard(app, any_host=key is not None, largest_body=LARGEST_BODY, refusal=refusal)


class Api:
    """Answers requests from a policy.

    Args:
        batch: samples the completions.
        text: the tokenizer.
        name: name of the model in requests.
        limits: defaults and limits of requests.
        seed: determines the seeds of requests without a seed.
        timeout: time limit of a request, seconds.
    """

    def __init__(
        self, batch: LiveBatch, text: Text, name: str, limits: RequestLimits, seed: int = 0, timeout: float = 600.0
    ) -> None:
        self.batch, self.text, self.name, self.limits, self.timeout = batch, text, name, limits, timeout
        self.seed, self.requests, self.created, self.waiting = seed, itertools.count(), int(time.time()), 0

    async def health(self, request: Request) -> Response:
        """Report that the server is running."""
        return JSONResponse({"status": "ok"})

    async def models(self, request: Request) -> Response:
        """List the model."""
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        """Describe the model."""
        self._check_model(request.path_params["name"])
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "rlhf_lightning",
                "max_model_len": self.limits.longest}  # fmt: skip

    def _check_model(self, name: Any) -> None:
        if name is not None and name != self.name:
            raise HTTPException(404, f"there is no model {shortened(name)}; this server has {self.name!r}")

    async def tokenize(self, request: Request) -> Response:
        """Encode a prompt, or messages with the generation prompt."""
        ids = await run_in_threadpool(encoded, await json_object(request), self.text)
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": self.limits.longest})

    async def tokenizer_info(self, request: Request) -> Response:
        """Name the special tokens and the chat template."""
        found = self.text.tokenizer
        names = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template")
        return JSONResponse({name: getattr(found, name) for name in names})

    async def detokenize(self, request: Request) -> Response:
        """Decode token ids."""
        ids = token_ids((await json_object(request)).get("tokens"), "tokens", self.text.vocabulary)
        return JSONResponse({"prompt": self.text.decode(ids)})

    async def complete(self, request: Request) -> Response:
        """Complete prompts."""
        return await self._answer(request, False)

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        return await self._answer(request, True)

    async def _answer(self, request: Request, chat: bool) -> Response:
        body = await json_object(request)
        self._check_model(body.get("model"))
        asked = await run_in_threadpool(read_request, body, chat, self.text, self.limits)
        count = len(asked.prompts) * asked.n
        if self.waiting + count > MOST_WAITING:
            raise HTTPException(
                429, f"{self.waiting} completions are already queued: retry later", {"retry-after": "5"}
            )
        job = _Job(self, asked, AnswerWriter(asked, self.text, self.name))
        if asked.stream:
            return StreamingResponse(job.stream(), media_type="text/event-stream")
        return JSONResponse(await job.whole(request))

    def next_seed(self) -> int:
        """Return a seed for a request without one."""
        digest = hashlib.sha256(f"{self.seed}/{next(self.requests)}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1


class _Job:
    """A request in progress; must be created on the event loop."""

    def __init__(self, api: Api, asked: Asked, answer: AnswerWriter) -> None:
        self.api, self.asked, self.answer = api, asked, answer
        self.loop, self.changed = asyncio.get_running_loop(), asyncio.Event()
        seed = api.next_seed() if asked.seed is None else asked.seed
        self.count = len(asked.prompts) * asked.n
        self.choices = [
            Choice(asked, api.text, index, seed, self._notify) for index in range(self.count if asked.settings else 0)
        ]
        self.scores: list[Future[PromptScores]] = []
        if asked.prompt_top is not None:
            self.scores = [Future() for _ in asked.prompts]
        prompts = [
            UnscoredPrompt(ids, asked.prompt_top or 0, scores)
            for ids, scores in zip(asked.prompts, self.scores, strict=False)
        ]
        api.batch.submit(self.choices, prompts)
        api.waiting += self.count

    def _notify(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has stopped
            self.loop.call_soon_threadsafe(self.changed.set)

    def _close(self) -> None:
        """Cancel the completions that have not ended."""
        self.api.waiting -= self.count
        for choice in self.choices:
            choice.cancelled = True
        for score in self.scores:
            score.cancel()

    async def whole(self, request: Request) -> dict[str, Any]:
        """Return the answer when all completions have ended."""
        work, gone = asyncio.ensure_future(self._finished()), asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({work, gone}, timeout=self.api.timeout, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise HTTPException(
                    504, f"the request took more than {self.api.timeout:g} seconds: request fewer tokens or completions"
                )
            return self.answer.whole(self.choices, work.result())
        finally:
            work.cancel()
            gone.cancel()
            self._close()

    async def _finished(self) -> list[PromptScores]:
        while not all(choice.done for choice in self.choices):
            await self.changed.wait()
            self.changed.clear()
        for choice in self.choices:
            if choice.error is not None:
                raise choice.error
        return [await asyncio.wrap_future(score) for score in self.scores]

    async def stream(self) -> AsyncIterator[str]:
        """Yield the completions in chunks, as server-sent events."""
        until = self.loop.time() + self.api.timeout
        try:
            if self.asked.chat:
                yield self.answer.opening(self.choices)
            sent = {choice: (0, 0) for choice in self.choices}
            while sent:
                await asyncio.wait_for(self.changed.wait(), until - self.loop.time())
                self.changed.clear()
                for piece in self._new_pieces(sent):
                    yield self.answer.chunk([piece])
            if self.asked.usage_at_end:
                yield self.answer.chunk([], usage=self.answer.usage(self.choices))
            yield "data: [DONE]\n\n"
        except TimeoutError:
            yield event(error_body(f"the request took more than {self.api.timeout:g} seconds", "timeout", 504))
        except Exception as error:  # the status line is already sent, so the error goes into the stream
            print(f"rlhf serve: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            yield event(error_body(f"the server failed ({type(error).__name__})", "failed", 500))
        finally:
            self._close()

    def _new_pieces(self, sent: dict[Choice, tuple[int, int]]) -> Iterator[dict[str, Any]]:
        """Yield the new part of each completion; completions that have ended are removed from ``sent``."""
        for choice, (characters, told) in list(sent.items()):
            if choice.error is not None:
                raise choice.error
            finish, content, tokens = choice.finish, choice.steady, choice.tokens[told:]
            if finish is None and (self.asked.tools or len(content) <= characters):
                continue  # a tool call is parsed when its text is complete
            yield self.answer.piece(choice, finish, content[characters:], tokens)
            sent[choice] = (max(characters, len(content)), told + len(tokens))
            if finish is not None:
                del sent[choice]


async def _disconnected(request: Request) -> None:
    """Wait until the client disconnects."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
