"""How files come into a run folder: whole or not at all, or appended while training and cut back on resume."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, sync it and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        move_into_place(partial, path)
    except OSError:  # a full disk
        partial.unlink(missing_ok=True)
        raise


def move_into_place(partial: Path, path: Path) -> None:
    """Sync a finished file or folder to the disk and rename it over ``path``; readers see the old or the new, whole."""
    for file in [partial] if partial.is_file() else sorted(partial.rglob("*")):
        if file.is_file():
            sync(file)
    os.replace(partial, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some file systems refuse to sync a folder
            raise
    finally:
        os.close(descriptor)


class AppendedFile:
    """A file that only grows while a run trains, and is cut back when the run resumes from an earlier checkpoint.

    A checkpoint keeps the ``length`` at its time. Event files of TensorBoard, samples.jsonl and skipped_updates.jsonl
    are of this kind.

    Args:
        path: the file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def length(self) -> int:
        """Length in bytes; 0 without a file."""
        return self.path.stat().st_size if self.path.is_file() else 0

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append rows as JSON lines."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def cut_back(self, length: int) -> None:
        """Drop everything after the first ``length`` bytes; a file of length 0 is deleted."""
        if length == 0:
            self.path.unlink(missing_ok=True)
        elif self.length > length:
            os.truncate(self.path, length)
