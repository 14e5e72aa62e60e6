"""The web server of the annotation page and of other commands: request filtering, time limits, and sockets."""

from __future__ import annotations

import asyncio
import hmac
import importlib.util
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

from rlhf_lightning.errors import StateError
from rlhf_lightning.loading import is_too_deep

if TYPE_CHECKING:
    from starlette.datastructures import Headers
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
    from uvicorn import Server

LARGEST_BODY = 512 * 1024
"""Maximum bytes of a request to the annotation page; enough for an edited completion."""

MOST_CONNECTIONS = 256
"""Maximum number of open connections; further connections are closed."""

REQUEST_SECONDS = 15.0
"""Time limit in seconds for the headers of a request, and again for its body."""

RESPONSE_SECONDS = 120.0
"""Time limit in seconds for answering a request and sending the response."""

LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")

HOST = re.compile(r"(?:[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?")

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "cache-control": "no-store",
}
"""Security headers of every response. They prevent scripts even in a text that was not escaped."""


def is_loopback(host: str) -> bool:
    """Whether a server on this address can only be reached from this machine."""
    return host in LOOPBACK or host.startswith("127.")


def require_web_server(what: str, extra: str, packages: Sequence[str] = ()) -> None:
    """Raise an error if a package of the web server is not installed.

    Args:
        what: the feature that needs the web server, for the message.
        extra: the extra of this package that installs it.
        packages: further required packages.
    """
    needed = ("starlette", "uvicorn", *packages)
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise StateError("missing-package", f"{what} needs {', '.join(missing)}: pip install 'rlhf-lightning[{extra}]'")


# ---- requests --------------------------------------------------------------------------------------------------------


class Guard:
    """ASGI middleware: refuse requests from other sites and too large requests; add `HEADERS` to every response.

    Args:
        app: the guarded application.
        any_host: whether any Host header is accepted. On a loopback address only the names of the loopback address are
            accepted, so that a web site whose name resolves to this machine cannot send requests (DNS rebinding).
        largest_body: maximum bytes of a request.
        refusal: makes the response to a refused request from message and status; None answers in plain text.
    """

    def __init__(
        self, app: ASGIApp, any_host: bool = False, largest_body: int = LARGEST_BODY,
        refusal: Callable[[str, int], Response] | None = None,
    ) -> None:  # fmt: skip
        self.app, self.any_host, self.largest_body, self.refusal = app, any_host, largest_body, refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        from starlette.datastructures import Headers, MutableHeaders
        from starlette.responses import PlainTextResponse

        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refused = self._refused(scope["method"], scope["scheme"], Headers(scope=scope))
        body = None
        if refused is None and scope["method"] == "POST":
            try:
                body = await asyncio.wait_for(_body_of(receive, self.largest_body), REQUEST_SECONDS)
            except TimeoutError:
                refused = 408, f"the request took more than {REQUEST_SECONDS:g} seconds to arrive"
            else:
                if body is None:
                    return
                if len(body) > self.largest_body:
                    refused = 413, f"a request has at most {self.largest_body:,} bytes"
        if refused is not None:
            status, message = refused
            response = (self.refusal or PlainTextResponse)(message, status)
            response.headers["connection"] = "close"
            await response(scope, receive, with_headers)
            return

        async def whole_body() -> Message:
            nonlocal body
            if body is None:
                return await receive()
            message, body = {"type": "http.request", "body": body, "more_body": False}, None
            return message

        await self.app(scope, whole_body, with_headers)

    def _refused(self, method: str, scheme: str, headers: Headers) -> tuple[int, str] | None:
        """Return status and message of a refusal; None if the request may pass."""
        host = headers.get("host", "")
        if HOST.fullmatch(host) is None:
            return 400, "the Host header is not a host name"
        if not self.any_host and re.sub(r":\d+$", "", host) not in LOOPBACK:
            return 421, "this server accepts only requests to localhost"
        if method in ("GET", "HEAD"):
            return None
        if method != "POST":
            return 405, "only GET and POST"
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if site not in (None, "same-origin") or (origin is not None and origin != f"{scheme}://{host}"):
            return 403, (
                "a cross-site request is refused; behind a TLS proxy, let the proxy set X-Forwarded-Proto and keep Host"
            )
        # Other sites cannot send this content type without a preflight request, and preflights are always refused.
        if headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            return 415, "a request is JSON: send the header Content-Type: application/json"
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.largest_body:
            return 413, f"a request has at most {self.largest_body:,} bytes"
        return None


async def json_object(request: Request) -> dict[str, Any]:
    """Return the JSON object in a request's body; other bodies are refused with status 400."""
    from starlette.exceptions import HTTPException

    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise HTTPException(400, "the request is not JSON") from None
    if not isinstance(body, dict) or is_too_deep(body):
        raise HTTPException(400, "the request is not a JSON object, or is nested too deep")
    return body


def requiring_key(handler: Any, key: str | None) -> Any:
    """Return a route's handler that refuses requests without the key with status 401; None admits all requests."""
    from starlette.exceptions import HTTPException

    async def checked(request: Request) -> Any:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if key is not None and not hmac.compare_digest(given, key.encode()):
            raise HTTPException(401, "the request lacks the server's API key: Authorization: Bearer KEY")
        return await handler(request)

    return checked


async def _body_of(receive: Receive, largest: int) -> bytes | None:
    """Read a request's body, up to slightly more than ``largest`` bytes; None if the client disconnected."""
    parts, size, more = [], 0, True
    while more and size <= largest:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        more = message.get("more_body", False)
    return b"".join(parts)


# ---- sockets ---------------------------------------------------------------------------------------------------------


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address."""
    bare = host.strip("[]")
    family = socket.AF_INET6 if ":" in bare else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((bare, port))
        made.listen(128)
    except (OSError, OverflowError) as error:
        made.close()
        reason = getattr(error, "strerror", "ports are 0 to 65535")
        raise StateError(
            "port-unavailable", f"cannot listen on {host}, port {port} ({reason}): name another --port"
        ) from error
    return made


def base_url(listening: socket.socket, host: str) -> str:
    """Return the URL of a listening socket."""
    shown = f"[{host}]" if ":" in host and not host.startswith("[") else host
    if shown in ("0.0.0.0", "[::]"):
        shown = socket.gethostname()
    return f"http://{shown}:{listening.getsockname()[1]}"


def make_server(app: ASGIApp, response_seconds: float | None = None) -> Server:
    """Return a server for an application; it is not yet running.

    Args:
        app: the application.
        response_seconds: time limit of a response; None for `RESPONSE_SECONDS`.
    """
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    answer_within = RESPONSE_SECONDS if response_seconds is None else response_seconds

    class BoundedProtocol(H11Protocol):
        """HTTP protocol with a connection limit and a timeout for the headers of each request."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.waiting_since = self.loop.time()
            if len(self.connections) > MOST_CONNECTIONS:
                transport.abort()
            else:
                self.close_if_late()

        def on_response_complete(self) -> None:
            self.waiting_since = self.loop.time()
            super().on_response_complete()

        def close_if_late(self) -> None:
            """Close the connection if a request or its response is overdue."""
            if self.transport.is_closing():
                return
            busy = self.cycle is not None and not self.cycle.response_complete
            due = self.waiting_since + (answer_within if busy else REQUEST_SECONDS)
            if self.loop.time() >= due:
                self.transport.abort()
            else:
                self.loop.call_later(REQUEST_SECONDS / 4, self.close_if_late)

        def send_400_response(self, msg: str) -> None:
            lines = ["HTTP/1.1 400 Bad Request", "connection: close", "content-type: text/plain; charset=utf-8"]
            lines += [f"content-length: {len(msg)}", *(f"{name}: {value}" for name, value in HEADERS.items())]
            self.transport.write("\r\n".join([*lines, "", msg]).encode("ascii"))
            self.transport.close()

    config = uvicorn.Config(
        app, http=BoundedProtocol, ws="none", log_level="warning", access_log=False, lifespan="off", server_header=False
    )
    return uvicorn.Server(config)


@contextmanager
def served(app: ASGIApp, listening: socket.socket, response_seconds: float | None = None) -> Iterator[int]:
    """Serve an application in a thread while the block runs; yield the port. The socket is closed at the end."""
    server = make_server(app, response_seconds)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="page", daemon=True)
    with closing(listening):
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.005)
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(timeout=30)
