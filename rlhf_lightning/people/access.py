"""Who may use the page and from where: tokens, hosts, requests of other sites, sizes, and what browsers may run."""

from __future__ import annotations

import hmac
import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf_lightning.errors import SettingError

COOKIE = "annotator"
OWNER = "owner"
"""Who may see the results where annotators have tokens."""

LARGEST_BODY = 512 * 1024
"""Bytes of a request: an edited completion, and room."""

LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")

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
"""Sent with everything. Should a text ever get past the escaping, the browser still runs no script of its own."""

NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.@-]{0,62}[A-Za-z0-9])?")


class Door:
    """Knows annotators by their cookie.

    On the loopback an annotator is whoever they say they are; elsewhere whoever has a token, and the results are the
    owner's.

    Args:
        tokens: token of each annotator and of the owner; None on the loopback.
    """

    def __init__(self, tokens: Mapping[str, str] | None = None) -> None:
        self.tokens = None if tokens is None else dict(tokens)

    def name_of(self, cookie: str | None) -> str | None:
        """The annotator of a cookie; None for a stranger."""
        if not cookie:
            return None
        if self.tokens is None:
            return cookie if is_name(cookie) else None
        found = None
        for name, token in self.tokens.items():  # all of them: the time taken tells nothing
            if hmac.compare_digest(token.encode(), cookie.encode()):
                found = name
        return found

    def sees_results(self, name: str | None) -> bool:
        """Whether this is somebody to whom models and annotators are shown by name."""
        return self.tokens is None or name == OWNER


def is_name(name: str) -> bool:
    """Whether an annotator may be called so: letters, digits and ``_.@-``, at most 64."""
    return NAME.fullmatch(name) is not None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there."""
    return host in LOOPBACK or host.startswith("127.")


def named(host: str, annotators: str | None) -> list[str]:
    """The annotators who may come in; none where everybody on this machine may.

    Args:
        host: address that a server listens on.
        annotators: names, with commas between.

    Raises:
        SettingError: other machines could reach the page and nobody is named, or a name cannot be one.
    """
    names = [name.strip() for name in (annotators or "").split(",") if name.strip()]
    if not names and not is_loopback(host):
        raise SettingError(
            "nobody-named",
            f"host {host} lets other machines in: name who may label (annotators ann,bob), and each gets a link",
        )
    for name in names:
        if not is_name(name) or name == OWNER:
            raise SettingError(
                "invalid-name",
                f"invalid annotator name {name!r}: use letters, digits, '_', '.', '@', '-'; {OWNER!r} is reserved",
            )
    return names


def tokens_beside(store: Path, names: Sequence[str]) -> dict[str, str]:
    """Tokens of the annotators and of the owner, kept in a file beside the store so that links stay good.

    The store itself, which is handed on as data, holds none.
    """
    file = store.with_name(f"{store.name}.tokens")
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    known |= {name: secrets.token_urlsafe(24) for name in (OWNER, *names) if name not in known}
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    with open(os.open(partial, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w", encoding="utf-8") as stream:
        json.dump(known, stream, indent=2)
    os.replace(partial, file)
    return {name: known[name] for name in (OWNER, *names)}


class Guard:
    """Refuses what no annotator's own page would send, and adds `HEADERS` to every answer.

    Args:
        app: what is guarded.
        any_host: whether the server may be addressed by any name; on the loopback only by the loopback's, so that a
            site whose name is made to point there reaches nothing.
    """

    def __init__(self, app: ASGIApp, any_host: bool = False) -> None:
        self.app, self.any_host = app, any_host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        headers = Headers(scope=scope)
        refused = self._refused(scope["method"], headers)
        body, more = b"", scope["method"] == "POST" and refused is None
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if message["type"] == "http.disconnect":
                return
            if len(body) > LARGEST_BODY:
                refused, more = (413, f"a request has at most {LARGEST_BODY:,} bytes"), False
        if refused is not None:
            await PlainTextResponse(refused[1], refused[0])(scope, receive, with_headers)
            return
        sent = False

        async def whole_body() -> Message:
            nonlocal sent
            if sent or scope["method"] != "POST":
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, whole_body, with_headers)

    def _refused(self, method: str, headers: Headers) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if not self.any_host and _host_name(host) not in LOOPBACK:
            return 421, "this server answers to localhost alone"
        if method in ("GET", "HEAD"):
            return None
        if method != "POST":
            return 405, "only GET and POST"
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if site not in (None, "same-origin") or (origin is not None and urlsplit(origin).netloc != host):
            return 403, "a request from another site"
        # Forms of other sites cannot send this type without being asked for leave, which is never given.
        if headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            return 415, "a request is JSON"
        if headers.get("content-length", "0").isdigit() and int(headers.get("content-length", "0")) > LARGEST_BODY:
            return 413, f"a request has at most {LARGEST_BODY:,} bytes"
        return None


def _host_name(host: str) -> str:
    return host.rpartition(":")[0] if re.search(r":\d+$", host) else host
