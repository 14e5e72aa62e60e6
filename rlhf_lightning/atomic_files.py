"""Write files atomically, and truncate append-only files on resume."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_lightning.errors import SettingError


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path``; if the block succeeds, sync the file and rename it to ``path``."""
    refuse_special(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        move_into_place(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder next to ``folder``; if the block succeeds, it replaces ``folder``."""
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_special(path: Path) -> None:
    """Refuse to rename a file over a folder, a pipe or a device, such as ``/dev/null`` or ``/dev/stdout``.

    Raises:
        SettingError: ``not-a-file``.
    """
    try:
        special = str(path.absolute().parent) == "/dev" or not stat.S_ISREG(os.stat(path).st_mode)
        reason = "it is a folder, a pipe or a device"
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        special, reason = True, getattr(error, "strerror", "") or str(error)
    if special:
        raise SettingError("not-a-file", f"cannot write to {str(path)[:200]!r} ({reason}); name a file")


def write_text(path: Path, text: str) -> Path:
    """Write a file atomically and return its path."""
    with complete_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write each row as a JSON line; the file appears only when it is complete."""
    with complete_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def move_into_place(partial: Path, path: Path) -> None:
    """Sync a finished file or folder to disk and rename it over ``path``: readers see the old or the new version."""
    for file in [partial] if partial.is_file() else sorted(partial.rglob("*")):
        if file.is_file():
            sync(file)
    os.replace(partial, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some file systems refuse to sync a folder
            raise
    finally:
        os.close(descriptor)


class AppendedFile:
    """An append-only file that is truncated when the run resumes from an earlier checkpoint.

    A checkpoint records the file's ``length``. TensorBoard's event files, samples.jsonl and skipped_updates.jsonl are
    handled this way.

    Args:
        path: the file; it may be absent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def length(self) -> int:
        """Length in bytes; 0 if the file is absent."""
        return self.path.stat().st_size if self.path.is_file() else 0

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append rows as JSON lines."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def cut_back(self, length: int) -> None:
        """Truncate the file to ``length`` bytes; a file of length 0 is deleted."""
        if length == 0:
            self.path.unlink(missing_ok=True)
        elif self.length > length:
            os.truncate(self.path, length)
