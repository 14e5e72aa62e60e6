"""Checkpoint files: atomic writes, checksums, links, and the search for the newest undamaged checkpoint.

A checkpoint is a zip file with a CRC-32 of each part or, if sharded, a folder with ``checksums.json``. A single rename
moves data and checksums to the final name together, so that a kill cannot separate them.
"""

from __future__ import annotations

import json
import lzma
import math
import os
import re
import shutil
import time
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.distributed.checkpoint.api import CheckpointException

from rlhf_lightning.atomic_files import move_into_place, write_text
from rlhf_lightning.errors import MissingError, RlhfError, SettingError, reason_of
from rlhf_lightning.runs.run import CHECKPOINTS_FOLDER

LAST_CHECKPOINT = "last.ckpt"
BEST_CHECKPOINT = "best.ckpt"
CHECKSUMS_FILE = "checksums.json"
SHARDED_INDEX = ".metadata"
"""The file in a sharded checkpoint's folder that lists its tensors."""
Mode = Literal["min", "max"]
DEFAULT_MONITORS: dict[str, Mode] = {"val/loss": "min", "val/score": "max"}
CHECKPOINT_NAME = re.compile(r"update_(\d+)\.ckpt")
CHUNK = 1 << 24


class CheckpointFailedError(RlhfError, OSError):
    """A checkpoint could not be written."""


class Checksum(NamedTuple):
    """Size in bytes and CRC-32 of a file."""

    size: int
    crc: int


def checkpoint_name(updates: int) -> str:
    """Return the file name of the checkpoint after this many updates."""
    return f"update_{updates:06d}.ckpt"


# -- writing ----------------------------------------------------------------------------------------------------------


def checksum(path: Path) -> Checksum:
    """Return a file's checksum; the file is read in chunks."""
    crc = size = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return Checksum(size, crc)


def gathered_checksums(folder: Path, rank: int) -> dict[str, Checksum]:
    """Return the checksums of all ranks' shards; each rank reads its own shards, which are still in the page cache."""
    mine = {file.name: checksum(file) for file in folder.glob(f"__{rank}_*.distcp")}
    everyone: list[Any] = [mine]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
    return {name: found for part in everyone for name, found in part.items()}


def seal(folder: Path, checksums: dict[str, Checksum]) -> None:
    """Write checksums.json into a sharded checkpoint's folder; missing checksums are computed."""
    rest = [file for file in folder.iterdir() if file.is_file() and file.name not in checksums]
    whole = checksums | {file.name: checksum(file) for file in rest}
    write_text(folder / CHECKSUMS_FILE, json.dumps(whole, sort_keys=True) + "\n")


def attempted(step: Callable[[], None]) -> str | None:
    """Run one step of writing a checkpoint; return the reason if it failed, else None.

    torch reports a full disk as a RuntimeError, and a failure on any rank as a CheckpointException.
    """
    try:
        step()
    except (OSError, CheckpointException) as error:
        return reason_of(error)
    except RuntimeError as error:
        if "write" not in str(error):
            raise
        return reason_of(error)
    return None


def replace_checkpoint(partial: Path, path: Path) -> None:
    """Rename a finished checkpoint into place.

    A folder cannot replace another folder atomically. So the old folder is renamed first, and ``last_checkpoint``
    restores it if the process is killed between the two renames.
    """
    aside = _aside(path)
    if path.is_dir():
        remove(aside)
        path.rename(aside)
    move_into_place(partial, path)
    remove(aside)


def link(target: Path, name: Path) -> None:
    """Atomically make ``name`` a hard link to ``target``, or a symbolic link if it is a sharded checkpoint."""
    partial = name.with_name(f".{name.name}.partial")
    remove(partial)
    if name.is_dir() and not name.is_symlink():  # not created by this function, so it may hold the user's files
        aside = name.with_name(f"{name.name}.{time.time_ns()}")
        name.rename(aside)
        print(
            f"{name} is a folder, where a link to a checkpoint is expected: it is renamed to {aside.name}", flush=True
        )
    try:
        if target.is_dir():
            partial.symlink_to(target.name)
        else:
            os.link(target, partial)
    except OSError:  # a file system without hard links
        shutil.copyfile(target, partial)
    os.replace(partial, name)
    remove(partial)  # if both names already link to the same file, rename keeps both


def remove(path: Path) -> None:
    """Delete a checkpoint file or folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_others(folder: Path, kept: Iterable[str]) -> None:
    """Delete checkpoints that are not retained: superseded, partially written, or newer than the one resumed from."""
    names = {*kept, LAST_CHECKPOINT, BEST_CHECKPOINT}
    for path in folder.iterdir():
        ours = CHECKPOINT_NAME.fullmatch(path.name) or re.fullmatch(r"\..*\.ckpt\.(partial|old)", path.name)
        if ours and path.name not in names:
            remove(path)


class KeptCheckpoints:
    """The checkpoints of a run with their scores; decides which checkpoints are retained.

    Args:
        keep_last: number of newest checkpoints to keep; None keeps all.
        keep_best: number of best checkpoints to keep in addition.
        monitor: validation metric that ranks checkpoints; None means the first of `DEFAULT_MONITORS` that is logged.
        mode: which values of ``monitor`` are better; None is "min".
    """

    def __init__(self, keep_last: int | None, keep_best: int, monitor: str | None, mode: Mode | None) -> None:
        self.keep_last, self.keep_best, self.monitor, self.mode = keep_last, keep_best, monitor, mode
        self.saved: list[str] = []  # names, oldest first
        self.scores: dict[str, float] = {}  # monitored value of each validated checkpoint
        self.interim: str | None = None  # the checkpoint that exists only because the run was stopped early

    def score(self, metrics: Mapping[str, Any]) -> float | None:
        """Return the monitored value; the first validation determines which metric is monitored.

        Raises:
            SettingError: the named metric is not logged by validation.
        """
        if self.monitor is None:
            self.monitor = next((name for name in DEFAULT_MONITORS if name in metrics), None)
            if self.monitor is None:
                return None
            self.mode = self.mode or DEFAULT_MONITORS[self.monitor]
        if self.monitor not in metrics:
            known = ", ".join(sorted(name for name in metrics if name.startswith("val/"))) or "none"
            raise SettingError(
                "unknown-metric",
                f"checkpoint.monitor is {self.monitor!r}, which validation does not log; it logs {known}",
            )
        return float(metrics[self.monitor])

    def best(self, count: int) -> list[str]:
        """Return the names of the best checkpoints, best first; of equal checkpoints the older one comes first."""
        sign = -1 if self.mode == "max" else 1
        ranked = sorted((name for name in self.saved if name in self.scores), key=lambda name: sign * self.scores[name])
        return ranked[:count]

    def add(self, name: str, score: float | None, interim: bool) -> None:
        """Record a checkpoint, and drop checkpoints that are neither among the newest nor among the best.

        An interim checkpoint replaces no other and is dropped at the next save. The checkpoints that remain at the end
        therefore do not depend on when a run was stopped.
        """
        self.saved = [*(kept for kept in self.saved if kept not in (name, self.interim)), name]
        self.scores = {kept: score for kept, score in self.scores.items() if kept in self.saved and kept != name}
        self.interim = name if interim else None
        if score is not None and not math.isnan(score):
            self.scores[name] = score
        if self.keep_last is not None:
            lasting = [kept for kept in self.saved if kept != self.interim]
            self._keep({*lasting[-self.keep_last :], *self.best(self.keep_best), name})

    def _keep(self, names: Collection[str]) -> None:
        self.saved = [name for name in self.saved if name in names]
        self.scores = {name: score for name, score in self.scores.items() if name in names}

    def state_dict(self) -> dict[str, Any]:
        """Return the records as plain values."""
        return {
            "saved": list(self.saved), "scores": dict(self.scores), "interim": self.interim, "monitor": self.monitor,
            "mode": self.mode,
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any], folder: Path | None = None) -> None:
        """Restore the records of `state_dict`, except for files that the user deleted from the folder."""
        self.saved, self.scores, self.interim = list(state["saved"]), dict(state["scores"]), state["interim"]
        if folder is not None:
            # The last name is this checkpoint's, which rank zero may be restoring at this moment.
            self._keep([name for name in self.saved if name == self.saved[-1] or (folder / name).exists()])
        if self.monitor is None:
            self.monitor, self.mode = state["monitor"], state["mode"]
        elif self.monitor != state["monitor"]:
            self.scores = {}  # values of another metric


# -- finding ----------------------------------------------------------------------------------------------------------


def damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint's files; None if every checksum matches, or a folder has none."""
    if not path.is_dir():
        return _damage_of_file(path) if path.is_file() else "it is a pipe or a device"
    index = path / CHECKSUMS_FILE
    if not index.is_file():
        return None if (path / SHARDED_INDEX).is_file() else "it is a folder without a checkpoint"
    try:
        expected = {name: Checksum(*values) for name, values in json.loads(index.read_text(encoding="utf-8")).items()}
    except (ValueError, TypeError, AttributeError):
        return f"{CHECKSUMS_FILE} is damaged"
    for name, known in expected.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != known.size:
            return f"{name} has {file.stat().st_size} of {known.size} bytes"
        if checksum(file) != known:
            return f"{name} is damaged"
    return None


def _damage_of_file(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as parts:
            broken = parts.testzip()
    # After a flipped bit a part may also claim to be compressed, encrypted or of another size.
    except (zipfile.BadZipFile, EOFError, ValueError, RuntimeError, zlib.error, lzma.LZMAError, OSError):
        return "it is truncated, or not a checkpoint"
    return None if broken is None else f"its part {broken} is damaged"


def last_checkpoint(run: Path) -> Path:
    """Return the newest undamaged checkpoint of a run, and print which checkpoints are damaged.

    Raises:
        MissingError: the run has no undamaged checkpoint.
    """
    folder = run / CHECKPOINTS_FOLDER
    _restore_replaced(folder)
    numbered = [path for path in folder.glob("update_*.ckpt") if CHECKPOINT_NAME.fullmatch(path.name)]
    candidates = [folder / LAST_CHECKPOINT, *sorted(numbered, key=_number, reverse=True)]
    reasons: list[str] = []
    seen: list[Path] = []
    for path in candidates:
        if not path.exists() or any(path.samefile(other) for other in seen):
            continue
        seen.append(path)
        reason = damage(path)
        if reason is None:
            _warn(folder, reasons, path)
            return path
        reasons.append(f"{path.name} ({reason})")
    if reasons:
        raise MissingError("no-checkpoint", f"{run} has no complete checkpoint to resume from: {', '.join(reasons)}")
    raise MissingError("no-checkpoint", f"{run} has no checkpoint to resume from: {folder} has no .ckpt file")


@rank_zero_only
def _warn(folder: Path, reasons: list[str], path: Path) -> None:
    if reasons:
        print(f"damaged in {folder}: {', '.join(reasons)}; {path.name} is the newest complete checkpoint", flush=True)


def _restore_replaced(folder: Path) -> None:
    """Undo the first rename of `replace_checkpoint` if a kill prevented the second."""
    for aside in folder.glob(".update_*.ckpt.old"):
        path = folder / aside.name.removeprefix(".").removesuffix(".old")
        if not path.exists():
            try:
                aside.rename(path)
            except FileNotFoundError:  # another rank renamed it first
                continue


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _number(path: Path) -> int:
    match = CHECKPOINT_NAME.fullmatch(path.name)
    return int(match.group(1)) if match else -1
