"""Pickles that run code when they are loaded. Each creates a file, so that a test can detect the execution."""

import pickle
from pathlib import Path
from typing import Any


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def calling(module: str, name: str, *arguments: Any) -> bytes:
    """Return a pickle that calls ``module.name``; the name may contain dots, as protocol 4 allows."""
    return (
        b"\x80\x04" + b"".join(_text(part) for part in (module, name)) + b"\x93"
        + b"(" + b"".join(_plain(argument) for argument in arguments) + b"tR."
    )  # fmt: skip


def by_attribute(module: str, holder: str, name: str, *arguments: Any) -> bytes:
    """Return a pickle that calls ``getattr(module.holder, name)``."""
    return (
        b"\x80\x04" + _text("builtins") + _text("getattr") + b"\x93"
        + b"(" + _text(module) + _text(holder) + b"\x93" + _text(name) + b"tR"
        + b"(" + b"".join(_plain(argument) for argument in arguments) + b"tR."
    )  # fmt: skip


def _text(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def _plain(value: Any) -> bytes:
    return pickle.dumps(value, protocol=4)[2:-1].replace(b"\x94", b"")
