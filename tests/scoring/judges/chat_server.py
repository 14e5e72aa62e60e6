"""A small ASGI server with OpenAI's chat protocol, whose answers a test provides."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route


class ChatServer:
    """Records requests, and answers with the result of ``reply``."""

    def __init__(self, reply: Callable[[dict[str, Any]], Any]) -> None:
        self.reply = reply
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.busy = 0
        self.url = ""

    async def answer(self, request: Request) -> JSONResponse:
        body = await request.json()
        self.keys.append(request.headers.get("Authorization"))
        if self.busy:
            self.busy -= 1
            return JSONResponse({"error": "overloaded"}, 503)
        self.bodies.append(body)
        choice = self.reply(body)
        return JSONResponse({"object": "chat.completion", "model": body["model"], "choices": [choice]})


def place(token: str, logprob: float, **likely: float) -> dict[str, Any]:
    """Return a token of an answer with its likely tokens by name; ``_`` is a space and ``p`` an opening bracket."""
    named = [{"token": name, "logprob": value} for name, value in likely.items()] or [
        {"token": token, "logprob": logprob}
    ]
    return {"token": token, "logprob": logprob, "top_logprobs": named}


def said(text: str, places: list[dict[str, Any]] | None = None, reason: str = "stop") -> dict[str, Any]:
    """Return a choice of a chat completion."""
    logprobs = None if places is None else {"content": places}
    message = {"role": "assistant", "content": text}
    return {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": reason}


@contextmanager
def serving(reply: Callable[[dict[str, Any]], Any]) -> Iterator[ChatServer]:
    """Run a server in a thread of this process while the block runs."""
    chat = ChatServer(reply)
    routes = [Route(path, chat.answer, methods=["POST"]) for path in ("/v1/chat/completions", "/v1/completions")]
    config = uvicorn.Config(Starlette(routes=routes), port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    chat.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield chat
    finally:
        server.should_exit = True
        thread.join()
