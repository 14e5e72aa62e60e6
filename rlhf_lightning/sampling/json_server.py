"""Client for JSON over HTTP: retries, a hard time limit, a size limit, and no API key in any message."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import html
import http.client
import json
import math
import os
import re
import socket
import ssl
import threading
import time
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import Any, TypeVar

from rlhf_lightning.errors import RlhfError, SettingError, printable

BUSY = (408, 425, 429, 500, 502, 503, 504)
"""HTTP statuses after which the same request may succeed."""

LONGEST_WAIT = 60.0
"""Longest wait between two attempts, seconds."""

LONGEST_QUOTE = 500
"""Maximum length of a server's text in an error message, characters."""

LOST_AFTER = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 60_000}
"""Socket options that end a connection after 60 s of silence from the other host's kernel, so that a request is
repeated soon after a cut link or a crashed host, which close no connection. A busy server's kernel answers."""

LARGEST_ANSWER = 2**24
"""Maximum size of a response in bytes. Parsed JSON takes up to 30 times its size in memory."""

NO_VARIABLE = "is not the name of an environment variable that is set; put the key into one and give its name"
IN_AN_ADDRESS = (
    "contains a user or a password, which would be written down with the run's settings; put the key into an "
    "environment variable and name that in api_key"
)

T = TypeVar("T")
U = TypeVar("U")


class ServerError(RlhfError, RuntimeError):
    """The server cannot be reached, refuses a request, or returns an unusable response."""


class JSONServer:
    """Post JSON, read JSON, and retry requests that may succeed later.

    The API key is read from the environment, never appears in a message, and is sent only to this address: redirects
    are refused.

    Args:
        url: address without a route.
        timeout: time limit of one request, from its first byte to the last byte of the response, seconds.
        retries: number of retries of a request.
        wait: wait before the first retry, seconds; doubles up to a minute.
        api_key: name of the environment variable with the key; None sends none.

    Raises:
        SettingError: the address is invalid or contains a password, the variable is not set, or a number is out of
            range.
    """

    def __init__(
        self, url: str, timeout: float = 60.0, retries: int = 4, wait: float = 1.0, api_key: str | None = None
    ) -> None:
        if retries < 0 or timeout <= 0 or wait < 0:
            raise SettingError(
                "setting-out-of-range",
                f"retries is {retries}, timeout {timeout} and wait {wait}: timeout must be positive, "
                "retries and wait 0 or more",
            )
        if has_password(url):
            raise SettingError("key-in-address", f"url {IN_AN_ADDRESS}")
        parts = _parts(url)
        if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
            raise SettingError("invalid-url", f"the url {url!r} is invalid; give an address such as http://host:8000")
        self.url, self.timeout, self.retries, self.wait = url.rstrip("/"), timeout, retries, wait
        self.headers = {"Content-Type": "application/json"}
        self._key = "" if api_key is None else key_in(api_key)
        if self._key:
            self.headers["Authorization"] = f"Bearer {self._key}"
        self._opener = urllib.request.build_opener(_NoRedirect(), _BoundedHTTP(), _BoundedHTTPS())

    def post(self, route: str, body: Mapping[str, Any], retries: int | None = None) -> Any:
        """Return the server's response; a response that is not JSON is returned as text.

        Args:
            route: path of the request.
            body: sent as JSON.
            retries: number of retries of this request; None takes the server's.

        Raises:
            ServerError: the server refuses, cannot be reached in all attempts, or sends a too large response.
        """
        return self._answer(route, json.dumps(body, default=str).encode(), retries)

    def get(self, route: str) -> Any:
        """Return the server's response to a GET request, as `post` does."""
        return self._answer(route, None, None)

    def _answer(self, route: str, sent: bytes | None, retries: int | None) -> Any:
        retries, cause = self.retries if retries is None else retries, ""
        for attempt in range(retries + 1):
            if attempt:
                time.sleep(min(self.wait * 2 ** (attempt - 1), LONGEST_WAIT))
            try:
                status, text = self._exchange(route, sent)
            except (OSError, http.client.HTTPException) as error:
                cause = self.shown(str(error) or type(error).__name__)
                continue
            if status == 200:
                try:
                    return json.loads(text)
                except (ValueError, RecursionError):
                    return text
            if status not in BUSY:
                raise ServerError(
                    "server-refused", f"{self.url}{route} refused with status {status}: {self.shown(text)}"
                )
            cause = f"status {status}: {self.shown(text)}"
        raise ServerError(
            "server-silent", f"{self.url}{route} gave no answer in {retries + 1} attempts; the last: {cause}"
        )

    def _exchange(self, route: str, sent: bytes | None) -> tuple[int, str]:
        """Return status and text of a response, 200 for every success; raise TimeoutError at the time limit."""
        with _TimeLimit(self.timeout) as limit:
            request = _Request(self.url + route, sent, self.headers)
            request.limit = limit
            try:
                return 200, self._read(request)
            except urllib.error.HTTPError as error:
                return error.code, error.read(4 * LONGEST_QUOTE).decode(errors="replace")
            except (OSError, http.client.HTTPException):
                if limit.expired:
                    raise TimeoutError(f"the answer was not whole after {self.timeout:g} s") from None
                raise

    def _read(self, request: _Request) -> str:
        parts, size = [], 0
        with self._opener.open(request, timeout=self.timeout) as response:
            while part := response.read1(1 << 20):
                parts.append(part)
                size += len(part)
                if size > LARGEST_ANSWER:
                    raise ServerError(
                        "server-answer-too-large",
                        f"{request.full_url} sent more than {LARGEST_ANSWER >> 20} MiB in answer to one request; "
                        "ask for less at a time, or repair the server",
                    )
            if request.limit.expired or response.length:  # read1 treats a closed connection as the end
                raise http.client.IncompleteRead(b"", response.length)
        return b"".join(parts).decode(errors="replace")

    def shown(self, said: Any) -> str:
        """Return a server's text for an error message: one printable line, shortened, without the key."""
        text = said if isinstance(said, str) else json.dumps(said)
        text = " ".join(text[: 8 * LONGEST_QUOTE].split())
        return printable(redacted(text, self._key) if self._key else text)[:LONGEST_QUOTE]


def each(function: Callable[[T], U], items: Iterable[T], requests: int) -> Iterator[U]:
    """Yield a function's value for each item in order, ``requests`` at a time; the first failure cancels the rest."""
    with ThreadPoolExecutor(max_workers=requests) as pool:
        waiting = [pool.submit(function, item) for item in items]
        try:
            for future in waiting:
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # leaving the pool would wait for requests not yet sent
            raise


def request_seed(seed: int, episode: int, start: int = 0) -> int:
    """Return the seed sent to a server for an episode, in [0, 2^31); ``start`` differs between the episode's turns."""
    address = f"{seed}/{episode}/{start}" if start else f"{seed}/{episode}"
    return int.from_bytes(hashlib.sha256(address.encode()).digest()[:4], "big") >> 1


def named_id(token: str) -> int:
    """Return the id in a token's name such as ``token_id:17``; a token's text is refused, even digits."""
    if (found := re.fullmatch("token_id:([0-9]{1,9})", token)) is None:
        raise ValueError("a token without its id")
    return int(found[1])


def finite(value: Any) -> float:
    """Return a number from a server's response.

    Raises:
        ValueError: the value is not a finite JSON number; the message does not repeat it.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"a {type(value).__name__} where a number belongs")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError("a number that is not finite")
    return number


# -- time limit -------------------------------------------------------------------------------------------------------


class _TimeLimit:
    """Shut down a request's connection at the time limit, even if headers and body arrive slowly."""

    def __init__(self, seconds: float) -> None:
        self.expired = False
        self._socket: socket.socket | None = None
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.daemon = True

    def __enter__(self) -> _TimeLimit:
        self._timer.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._timer.cancel()
        if self._socket is not None:
            self._socket.close()

    def watch(self, connection: socket.socket) -> None:
        self._socket = connection.dup()  # TLS takes over the original's file descriptor
        if self.expired:
            self._expire()

    def _expire(self) -> None:
        self.expired = True
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)


class _Request(urllib.request.Request):
    limit: _TimeLimit


class _Connection(http.client.HTTPConnection):
    def __init__(self, *args: Any, limit: _TimeLimit, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.limit = limit

    def connect(self) -> None:
        super().connect()
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in LOST_AFTER.items():
            if hasattr(socket, name):  # each system has some of them
                self.sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self.limit.watch(self.sock)


class _TLSConnection(http.client.HTTPSConnection, _Connection):
    """HTTPS connection with a time limit from before the handshake: ``connect`` calls `_Connection.connect` first."""


class _BoundedHTTP(urllib.request.HTTPHandler):
    def http_open(self, req: Any) -> Any:
        return self.do_open(partial(_Connection, limit=req.limit), req)


class _BoundedHTTPS(urllib.request.HTTPSHandler):
    @cached_property
    def tls(self) -> ssl.SSLContext:
        return ssl.create_default_context()

    def https_open(self, req: Any) -> Any:
        return self.do_open(partial(_TLSConnection, limit=req.limit), req, context=self.tls)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuse redirects, which would send the key to another address."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


# -- keys -------------------------------------------------------------------------------------------------------------

ESCAPE = re.compile(r"\\u([0-9a-fA-F]{4})|\\x([0-9a-fA-F]{2})")
TOKEN = re.compile(r"[\w.*+/=%~:@•…-]+")
MASKED = re.compile(r"\*\*|•|…|\w\.\.+\w")
"""A word that the server already masked, such as ``sk-proj-****abcd``."""

FRAGMENT = 5
"""Minimum length of a part of a key that is masked, in bytes of the key."""


def redacted(text: str, key: str) -> str:
    """Return a text with ``***`` in place of each word that contains a part of a key.

    Parts are found in plain form, reversed, in hexadecimal, base64 or base32, within HTML, URL or JSON escapes, in any
    case, and with other characters between their letters.
    """
    for _ in range(2):
        text = ESCAPE.sub(lambda found: chr(int(found[1] or found[2], 16)), html.unescape(urllib.parse.unquote(text)))
    text = unicodedata.normalize("NFKC", text)
    places = [place for place, character in enumerate(text) if character.isalnum()]
    letters = "".join(text[place].lower()[0] for place in places)
    hits: set[int] = set()
    for size, parts in _fragments(key).items():
        for start in range(len(letters) - size + 1):
            if letters[start : start + size] in parts:
                hits.update(places[start : start + size])

    def masked(word: re.Match[str]) -> str:
        return "***" if MASKED.search(word[0]) or not hits.isdisjoint(range(*word.span())) else word[0]

    return TOKEN.sub(masked, text.replace(key, "***")) if not hits else TOKEN.sub(masked, text)


def _fragments(key: str) -> dict[int, set[str]]:
    """Return the letters and digits of every part of a key and of its encodings, by length."""
    raw = key.encode()
    spelt = [(key, FRAGMENT), (key[::-1], FRAGMENT), (raw.hex(), 2 * FRAGMENT)]
    spelt += [(base64.b64encode(raw[start:]).decode(), 8) for start in range(3)]
    spelt += [(base64.b32encode(raw[start:]).decode(), 8) for start in range(5)]
    found: dict[int, set[str]] = {}
    for text, length in spelt:
        letters = "".join(character for character in text.lower() if character.isalnum())
        size = min(length, len(letters))
        if size:
            found.setdefault(size, set()).update(letters[at : at + size] for at in range(len(letters) - size + 1))
    return found


def key_in(variable: str) -> str:
    """Return the key in an environment variable; refuse a text that may be the key itself, without repeating it."""
    if not names_variable(variable):
        raise SettingError("no-such-variable", f"api_key {NO_VARIABLE}")
    if not os.environ.get(variable):
        raise SettingError(
            "no-such-variable", f"api_key names the environment variable {variable}, which is not set; export it first"
        )
    return os.environ[variable]


def names_variable(text: str) -> bool:
    """Return whether a text is the name of a set environment variable, or looks like a name and not like a key."""
    return text in os.environ or re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", text) is not None


def _parts(url: str) -> urllib.parse.SplitResult | None:
    try:
        return urllib.parse.urlsplit(url)
    except ValueError:
        return None


def has_password(url: str) -> bool:
    """Return whether an address contains a user or a password."""
    parts = _parts(url)
    return parts is not None and bool(parts.netloc) and (parts.username, parts.password) != (None, None)
