"""Import only modules that the user named from the working directory.

A console script does not search the working directory, where a user's own objective is. If the directory were on
``sys.path``, Python would also look there for every optional package that is not installed, next to models and data
from other people. So only modules that the user named are searched there, and the modules that these import.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Iterable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import ModuleType
from typing import Any

DOTTED = re.compile(r"(?<![\w./:-])([A-Za-z_]\w*)(?:\.[A-Za-z_]\w*)+(?![\w/:-])")
"""An import path in a text; the group is its top-level package."""


class WorkingDirectory:
    """A finder that is the last entry of ``sys.meta_path``.

    Attributes:
        typed: folder of each package that the user named.
        found: folder of each module that was found in a user's folder.
        looked_for: every module that was searched for in a user's folder, in order.
    """

    def __init__(self) -> None:
        self.typed: dict[str, str] = {}
        self.found: dict[str, str] = {}
        self.looked_for: list[str] = []

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a top-level module that the user named, or that a module found by this finder imports."""
        if path is not None:  # a submodule, found through its package
            return None
        folder = self.typed.get(name) or self.found.get(_importing_package())
        if not folder:
            return None
        self.looked_for.append(name)
        found = PathFinder.find_spec(name, [folder])
        if found is not None:
            self.found[name] = folder
        return found


FINDER = WorkingDirectory()


def _importing_package() -> str:
    """Return the top-level name of the module that requests the import."""
    frame = inspect.currentframe()
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if not module.startswith(("importlib", "_frozen_importlib")) and module != __name__:
            return module.partition(".")[0]
        frame = frame.f_back
    return ""


def install() -> None:
    """Search the user's folders last; forget the names of an earlier command."""
    FINDER.typed.clear()
    FINDER.found.clear()
    if FINDER not in sys.meta_path:
        sys.meta_path.append(FINDER)


def allow(path: str, folder: str | None = None) -> None:
    """Let the package of an import path that the user typed come from ``folder``, by default the working directory."""
    if FINDER not in sys.meta_path:
        sys.meta_path.append(FINDER)
    FINDER.typed.setdefault(path.partition(".")[0], folder or os.getcwd())


def allow_names_in(texts: Iterable[str]) -> None:
    """Allow every import path in texts that the user typed: values of options, and config files.

    File names are not import paths: ``pairs.jsonl`` is not a reason to look for ``pairs.py``.
    """
    for text in texts:
        for found in DOTTED.finditer(text):
            if not Path(found[0]).exists():
                allow(found[0])


class Carried:
    """Carry an object to another process that can import the same user modules."""

    def __init__(self, content: Any) -> None:
        self.content = content

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpacked, (dict(FINDER.found), bytes(ForkingPickler.dumps(self.content)))


def _unpacked(found: dict[str, str], content: bytes) -> Any:
    install()
    FINDER.typed.update(found)
    return ForkingPickler.loads(content)
