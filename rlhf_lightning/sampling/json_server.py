"""A client of servers that speak JSON over HTTP: patient where that may help, bounded, and silent about its key."""

from __future__ import annotations

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

from rlhf_lightning.errors import RlhfError, SettingError

BUSY = (408, 425, 429, 500, 502, 503, 504)
"""HTTP statuses after which the same request may succeed."""

LONGEST_WAIT = 60.0
"""Seconds between two attempts at most."""

LONGEST_QUOTE = 500
"""Characters of a server's words that an error repeats."""


NO_VARIABLE = "is no name of an environment variable that is set: put the key into one and give its name"
IN_AN_ADDRESS = (
    "has a user or a password in it, and would be written down with the run's settings: put the key into an "
    "environment variable and name that in api_key"
)


class ServerError(RlhfError, RuntimeError):
    """The server cannot be reached, refuses a request, or answers with what is no answer to it."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected request would carry the key to an address that nobody named."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class JSONServer:
    """Sends JSON and reads JSON, again where that may help.

    The key is read from the environment, is in no message, and goes to the named address alone: redirects are refused.

    Args:
        url: address without a route.
        timeout: of one request from its first byte to its answer's last, seconds.
        retries: repetitions of a request.
        wait: before the first repetition, seconds; doubles up to a minute.
        api_key: name of the environment variable with the key; None sends none.

    Raises:
        SettingError: the address is no http(s) address or has a password in it, the variable is not set, or a number is
            out of range.
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
        parts = urllib.parse.urlsplit(url)
        if has_password(url):
            raise SettingError("key-in-address", f"url {IN_AN_ADDRESS}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SettingError("invalid-url", f"the url {url!r} is invalid; give an address such as http://host:8000")
        self.url, self.timeout, self.retries, self.wait = url.rstrip("/"), timeout, retries, wait
        self.headers = {"Content-Type": "application/json"}
        self._key = "" if api_key is None else _key_in(api_key)
        if self._key:
            self.headers["Authorization"] = f"Bearer {self._key}"
        self._opener = urllib.request.build_opener(_NoRedirect())

    def post(self, route: str, body: Mapping[str, Any]) -> Any:
        """Return what the server answers; a text that is no JSON as it is.

        Raises:
            ServerError: it refuses, or cannot be reached however often it is tried.
        """
        sent = json.dumps(body, default=str).encode()
        cause = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(self.wait * 2 ** (attempt - 1), LONGEST_WAIT))
            try:
                text = self._answer(urllib.request.Request(self.url + route, sent, self.headers))
            except urllib.error.HTTPError as error:
                said = self.shown(error.read(4 * LONGEST_QUOTE).decode(errors="replace"))
                if error.code not in BUSY:
                    raise ServerError(
                        "server-refused", f"{self.url}{route} refused with status {error.code}: {said}"
                    ) from None
                cause = f"status {error.code}: {said}"
            except (OSError, http.client.HTTPException) as error:
                cause = self.shown(str(error) or type(error).__name__)
            else:
                try:
                    return json.loads(text)
                except ValueError:
                    return text
        raise ServerError(
            "server-silent", f"{self.url}{route} gave no answer in {self.retries + 1} attempts; the last: {cause}"
        )

    def _answer(self, request: urllib.request.Request) -> str:
        """Return the text of an answer that comes within the time-out, however slowly it trickles."""
        deadline, parts = time.monotonic() + self.timeout, []
        with self._opener.open(request, timeout=self.timeout) as response:
            while part := response.read1(1 << 20):
                parts.append(part)
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the answer was not whole after {self.timeout:g} s")
        return b"".join(parts).decode(errors="replace")

    def shown(self, said: Any) -> str:
        """Return some words of a server for an error message, in one line and without the key."""
        text = " ".join((said if isinstance(said, str) else json.dumps(said)).split())
        return (text.replace(self._key, "***") if self._key else text)[:LONGEST_QUOTE]


def _key_in(variable: str) -> str:
    """Return the key in an environment variable.

    Raises:
        SettingError: it is not set, or is no name of one: somebody put the key itself there.
    """
    if not names_variable(variable):
        raise SettingError("no-such-variable", f"api_key {NO_VARIABLE}")
    if not os.environ.get(variable):
        raise SettingError(
            "no-such-variable", f"api_key names the environment variable {variable}, which is not set; export it first"
        )
    return os.environ[variable]


def names_variable(text: str) -> bool:
    """Whether a text is the name of an environment variable, one that is set or that looks like one: no key does."""
    return text in os.environ or re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", text) is not None


def has_password(url: str) -> bool:
    """Whether an address has a user or a password in it."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:
        return False
    return bool(parts.netloc) and (parts.username is not None or parts.password is not None)
