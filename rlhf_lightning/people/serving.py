"""Serve the page: who may use it, which requests are refused, and on which socket."""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf_lightning.errors import DataError, SettingError, StateError

if TYPE_CHECKING:
    from uvicorn import Server

OWNER = "owner"
"""Name of the account that may see the results where annotators have tokens."""

NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.@-]{0,62}[A-Za-z0-9])?")
RESERVED_NAMES = ("null", "none", "true", "false")
"""Names that a form or a config file gives to a missing value."""

LARGEST_BODY = 512 * 1024
"""Maximum bytes of a request: an edited completion with some room."""

MOST_CONNECTIONS = 256
"""Connections open at a time; further ones are closed."""

REQUEST_SECONDS = 15.0
"""Seconds within which the headers, and then the body, of a request must be complete."""

RESPONSE_SECONDS = 120.0
"""Seconds within which a request must be answered and its answer read."""

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
"""Security headers of every response. Even a text that got past the escaping could not run a script."""


class AccessPolicy:
    """Identify annotators by their cookie.

    On the loopback, annotators choose their name. Elsewhere they need a token, and only the owner sees the results.

    Args:
        tokens: token of each annotator and of the owner; None on the loopback.
    """

    def __init__(self, tokens: Mapping[str, str] | None = None) -> None:
        self.tokens = None if tokens is None else dict(tokens)

    def name_of(self, cookie: str | None) -> str | None:
        """Return the annotator of a cookie; None if it is unknown."""
        if not cookie:
            return None
        if self.tokens is None:
            return cookie if is_name(cookie) else None
        found = None
        for name, token in self.tokens.items():  # compare with all of them: the time taken must reveal nothing
            if hmac.compare_digest(token.encode(), cookie.encode()):
                found = name
        return found

    def sees_results(self, name: str | None) -> bool:
        """Whether models and annotators are shown by name to this person."""
        return self.tokens is None or name == OWNER


def is_name(name: str) -> bool:
    """Whether a text is a valid annotator name: letters, digits and ``_.@-``, at most 64."""
    return NAME.fullmatch(name) is not None and name.lower() not in RESERVED_NAMES


def is_loopback(host: str) -> bool:
    """Whether a server on this address can be reached from this machine only."""
    return host in LOOPBACK or host.startswith("127.")


def checked_names(host: str, annotators: str | None) -> list[str]:
    """Return the annotators who may use the page; an empty list where everybody on this machine may.

    Raises:
        SettingError: other machines can reach the page and no annotator is named, or a name is invalid.
    """
    names = [name.strip() for name in (annotators or "").split(",") if name.strip()]
    if not names and not is_loopback(host):
        raise SettingError(
            "nobody-named",
            f"host {host} lets other machines in: name who may label (annotators ann,bob), and each gets a link",
        )
    for name in names:
        if not is_name(name) or name == OWNER:
            reserved = ", ".join(map(repr, (OWNER, *RESERVED_NAMES)))
            raise SettingError(
                "invalid-name",
                f"invalid annotator name {name!r}: use letters, digits, '_', '.', '@', '-'; {reserved} are reserved",
            )
    return names


def stored_tokens(store: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the tokens of the annotators and of the owner from a file next to the store, so that links stay valid.

    The store itself may be handed on as data and holds no token.

    Raises:
        DataError: the file is not a mapping from names to different tokens of 16 characters or more.
    """
    file = store.with_name(f"{store.name}.tokens")
    known = _read_tokens(file) if file.is_file() else {}
    known |= {name: secrets.token_urlsafe(24) for name in (OWNER, *names) if name not in known}
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    with open(os.open(partial, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w", encoding="utf-8") as stream:
        json.dump(known, stream, indent=2)
    os.replace(partial, file)
    return {name: known[name] for name in (OWNER, *names)}


def _read_tokens(file: Path) -> dict[str, str]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _bad_tokens(file, f"it is not JSON ({type(error).__name__})") from None
    if not isinstance(found, dict):
        raise _bad_tokens(file, f"it holds a {type(found).__name__}")
    for name, token in found.items():
        if not isinstance(token, str) or not re.fullmatch(r"[\x21-\x7e]{16,}", token):
            raise _bad_tokens(file, f"the token of {name!r} is not a text of 16 ASCII characters or more")
    if len(set(found.values())) < len(found):
        raise _bad_tokens(file, "two names have the same token")
    return found


def _bad_tokens(file: Path, fault: str) -> DataError:
    return DataError(
        "bad-tokens-file",
        f"{file} must map names to tokens, but {fault}; restore it, or delete it: new links are made then, and the old "
        "ones stop working",
    )


def access_policy(store: Path, host: str, annotators: str | None) -> AccessPolicy:
    """Return the access policy of a store's page: anybody on this machine, or holders of a token.

    Raises:
        SettingError: see `checked_names`.
    """
    names = checked_names(host, annotators)
    return AccessPolicy(stored_tokens(store, names) if names else None)


# ---- requests --------------------------------------------------------------------------------------------------------


class Guard:
    """ASGI middleware: refuse requests that the page itself never sends; add `HEADERS` to every response.

    Args:
        app: the guarded application.
        any_host: whether any Host header is accepted. On the loopback only its own names are, so that a site whose name
            resolves to this machine reaches nothing.
    """

    def __init__(self, app: ASGIApp, any_host: bool = False) -> None:
        self.app, self.any_host = app, any_host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
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
                body = await asyncio.wait_for(_body_of(receive), REQUEST_SECONDS)
            except TimeoutError:
                refused = 408, f"the request took more than {REQUEST_SECONDS:g} seconds to arrive"
            else:
                if body is None:
                    return
                if len(body) > LARGEST_BODY:
                    refused = 413, f"a request has at most {LARGEST_BODY:,} bytes"
        if refused is not None:
            close = {"connection": "close"}
            await PlainTextResponse(refused[1], refused[0], close)(scope, receive, with_headers)
            return

        async def whole_body() -> Message:
            nonlocal body
            if body is None:
                return await receive()
            message, body = {"type": "http.request", "body": body, "more_body": False}, None
            return message

        await self.app(scope, whole_body, with_headers)

    def _refused(self, method: str, scheme: str, headers: Headers) -> tuple[int, str] | None:
        """Status and sentence of a refusal; None if the request may pass."""
        host = headers.get("host", "")
        if HOST.fullmatch(host) is None:
            return 400, "the Host header is not a host name"
        if not self.any_host and re.sub(r":\d+$", "", host) not in LOOPBACK:
            return 421, "this server answers to localhost alone"
        if method in ("GET", "HEAD"):
            return None
        if method != "POST":
            return 405, "only GET and POST"
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if site not in (None, "same-origin") or (origin is not None and origin != f"{scheme}://{host}"):
            return 403, (
                "a request from another site; behind a TLS proxy, let the proxy set X-Forwarded-Proto and keep Host"
            )
        # Forms of other sites cannot send this type without a preflight request, which is never allowed.
        if headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            return 415, "a request is JSON"
        if headers.get("content-length", "0").isdigit() and int(headers.get("content-length", "0")) > LARGEST_BODY:
            return 413, f"a request has at most {LARGEST_BODY:,} bytes"
        return None


async def _body_of(receive: Receive) -> bytes | None:
    """Read a request's body, up to a little more than `LARGEST_BODY`; None if the client went away."""
    body, more = b"", True
    while more and len(body) <= LARGEST_BODY:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


# ---- sockets ---------------------------------------------------------------------------------------------------------


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address.

    Raises:
        StateError: the address is not available.
    """
    bare = host.strip("[]")
    family = socket.AF_INET6 if ":" in bare else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((bare, port))
        made.listen(128)
    except OSError as error:
        made.close()
        raise StateError(
            "port-unavailable", f"cannot listen on {host}, port {port} ({error.strerror}): name another --port"
        ) from error
    return made


def print_urls(listening: socket.socket, host: str, access: AccessPolicy) -> None:
    """Print the address of the page, or the link of each annotator."""
    port = listening.getsockname()[1]
    shown = f"[{host}]" if ":" in host and not host.startswith("[") else host
    if shown in ("0.0.0.0", "[::]"):
        shown = socket.gethostname()
    base = f"http://{shown}:{port}"
    if access.tokens is None:
        print(f"label at {base}/   results at {base}/results   Ctrl+C stops; every label is kept", flush=True)
        return
    for name, token in access.tokens.items():
        print(f"{name:<16}{base}/enter?token={token}", flush=True)
    print(f"the owner's results: {base}/results   Ctrl+C stops; every label is kept", flush=True)


def make_server(app: ASGIApp) -> Server:
    """Return a server of the page, not yet running."""
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class BoundedProtocol(H11Protocol):
        """HTTP with a limit on connections and a timeout for the headers of each request."""

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
            due = self.waiting_since + (RESPONSE_SECONDS if busy else REQUEST_SECONDS)
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
def served(app: ASGIApp, listening: socket.socket) -> Iterator[int]:
    """Serve the page in a thread while the block runs; yield the port. The socket is closed at the end."""
    server = make_server(app)
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
