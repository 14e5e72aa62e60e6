"""Access control of the annotation page (names on the loopback, tokens elsewhere), its URLs and instructions."""

from __future__ import annotations

import hmac
import json
import re
import secrets
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlhf_lightning.atomic_files import complete_file
from rlhf_lightning.commands.web_server import base_url, is_loopback, require_web_server
from rlhf_lightning.errors import DataError, MissingError, SettingError

OWNER = "owner"
"""Name of the account that may see the results, if annotators have tokens."""

NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.@-]{0,62}[A-Za-z0-9])?")
RESERVED_NAMES = ("null", "none", "true", "false")
"""Names that would be confused with a missing value of a form or a config file."""


class AccessPolicy:
    """Identify annotators by their cookie.

    On the loopback, annotators choose their name. Elsewhere they need a token, and only the owner sees the results.

    Args:
        tokens: token of each annotator and of the owner; None on the loopback.
    """

    def __init__(self, tokens: Mapping[str, str] | None = None) -> None:
        self.tokens = None if tokens is None else dict(tokens)

    def name_of(self, cookie: str | None) -> str | None:
        """Return the annotator of a cookie; None if the cookie is unknown."""
        if not cookie:
            return None
        if self.tokens is None:
            return cookie if is_name(cookie) else None
        found = None
        for name, token in self.tokens.items():  # compare with all tokens, against timing attacks
            if hmac.compare_digest(token.encode(), cookie.encode()):
                found = name
        return found

    def sees_results(self, name: str | None) -> bool:
        """Whether this person may see the results, with the names of models and annotators."""
        return self.tokens is None or name == OWNER


def is_name(name: str) -> bool:
    """Whether a text is a valid annotator name: letters, digits and ``_.@-``, at most 64."""
    return NAME.fullmatch(name) is not None and name.lower() not in RESERVED_NAMES


def checked_names(host: str, annotators: str | None) -> list[str]:
    """Return the annotators who may use the page; an empty list if everybody on this machine may use it."""
    names = [name.strip() for name in (annotators or "").split(",") if name.strip()]
    if not names and not is_loopback(host):
        raise SettingError(
            "nobody-named",
            f"host {host} accepts connections from other machines: name the annotators "
            "(annotators ann,bob); each gets a link",
        )
    for name in names:
        if not is_name(name) or name == OWNER:
            reserved = ", ".join(map(repr, (OWNER, *RESERVED_NAMES)))
            raise SettingError(
                "invalid-name",
                f"invalid annotator name {name!r}: use letters, digits, '_', '.', '@', '-'; {reserved} are reserved",
            )
    return names


def require_page() -> None:
    """Raise an error if a package that the page needs is not installed; see `require_web_server`."""
    require_web_server("the page", "annotate", ["markdown_it"])


def read_instructions(path: Path) -> str:
    """Return the text of a file of instructions."""
    if not path.is_file():
        raise MissingError("no-file", f"there is no file {path}: --instructions takes a Markdown file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError("not-text", f"{path} is not UTF-8 text ({error.reason}): write a Markdown file") from None


def stored_tokens(store: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the tokens of the annotators and of the owner, stored in a file next to the store so links stay valid.

    The store itself may be shared as data, so it holds no token.

    Raises:
        DataError: the file is not a mapping from names to different tokens of 16 characters or more.
    """
    file = store.with_name(f"{store.name}.tokens")
    known = _read_tokens(file) if file.is_file() else {}
    known |= {name: secrets.token_urlsafe(24) for name in (OWNER, *names) if name not in known}
    with complete_file(file) as partial:
        partial.touch(0o600)
        partial.write_text(json.dumps(known, indent=2), encoding="utf-8")
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
    """Return the access policy of a store's page: everybody on this machine, or holders of a token.

    Raises:
        SettingError: see `checked_names`.
    """
    names = checked_names(host, annotators)
    return AccessPolicy(stored_tokens(store, names) if names else None)


def print_urls(listening: socket.socket, host: str, access: AccessPolicy) -> None:
    """Print the address of the page, or the link of each annotator."""
    base = base_url(listening, host)
    if access.tokens is None:
        print(f"label at {base}/   results at {base}/results   Ctrl+C stops; every label is kept", flush=True)
        return
    for name, token in access.tokens.items():
        print(f"{name:<16}{base}/enter?token={token}", flush=True)
    print(f"the owner's results: {base}/results   Ctrl+C stops; every label is kept", flush=True)
