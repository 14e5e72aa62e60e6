"""A run is one folder: where it is, what is in it, and how files come into it whole or not at all.

``runs/<name>/version_<n>/`` holds config.yaml, manifest.json, TensorBoard events, checkpoints/, samples.jsonl, model/.
"""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

CONFIG_FILE = "config.yaml"
MANIFEST_FILE = "manifest.json"
SAMPLES_FILE = "samples.jsonl"
PREDICTIONS_FILE = "predictions.jsonl"
SKIPPED_FILE = "skipped_updates.jsonl"
CHECKPOINTS_FOLDER = "checkpoints"
MODEL_FOLDER = "model"
LOCK_FILE = ".training"


def run_folder(trainer: Trainer) -> Path:
    """Return the run's folder, the same on every rank; all ranks must ask together."""
    if trainer.loggers and isinstance(trainer.loggers[0], TensorBoardLogger | CSVLogger):
        return Path(trainer.log_dir or trainer.default_root_dir)
    return Path(trainer.strategy.broadcast(str(trainer.default_root_dir)))


def is_rehearsal(trainer: Any) -> bool:
    """Whether this is ``fast_dev_run``, which leaves nothing behind."""
    return bool(trainer.fast_dev_run)


def writes_files(trainer: Trainer) -> bool:
    """Whether this process writes into the run folder: rank zero, unless it is a rehearsal."""
    return trainer.is_global_zero and not is_rehearsal(trainer)


def updates_of(module: LightningModule) -> int:
    """Return the number of optimizer updates so far; a module without the counter goes by the trainer's steps."""
    updates = getattr(module, "updates", None)
    return int(module.trainer.global_step if updates is None else updates)


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


def append_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append rows to a JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def checked_run_name(name: str) -> str:
    """Return a run's name if it stays inside the runs folder.

    Raises:
        ValueError: the name is absolute, climbs out with "..", or has characters that trouble file systems.
    """
    parts = name.split("/")
    if not all(re.fullmatch(r"[\w][\w.\-=+]*", part) for part in parts):
        raise ValueError(
            f"run_name is {name!r}: it must be made of letters, digits, '_', '-', '.', '=' and '+' "
            "(and '/' between groups of runs), and stay inside the runs folder"
        )
    return name


def reserve_version(runs: Path, name: str) -> Path:
    """Create and return the next ``version_<n>`` folder of a run's name; two runs that start together get two.

    Raises:
        ValueError: the name leaves the runs folder, by itself or through a link.
    """
    parent = runs / checked_run_name(name)
    if not parent.resolve().is_relative_to(runs.resolve()):
        raise ValueError(f"run_name is {name!r}, and {parent} is a link that leaves {runs}: choose another name")
    parent.mkdir(parents=True, exist_ok=True)
    version = max((number for number, _ in versions(parent)), default=-1) + 1
    while True:
        folder = parent / f"version_{version}"
        try:
            folder.mkdir()
        except FileExistsError:
            version += 1
        else:
            return folder


def hold(folder: Path) -> IO[bytes]:
    """Keep other processes from training in a run's folder, until `let_go` or the end of this process.

    Raises:
        ValueError: another process trains there.
    """
    path = folder / LOCK_FILE
    lock = path.open("wb")
    if sys.platform == "win32":
        return lock
    import fcntl

    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not inherited by the workers of a killed run
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return lock  # a file system without locks
        lock.close()
        raise ValueError(
            f"another process trains in {folder}, and two would write the same files: wait until it has ended, or "
            "start a new run"
        ) from None
    if not path.exists() or not os.path.samestat(os.fstat(lock.fileno()), path.stat()):
        lock.close()  # who held it has just let it go, and its file is no longer the one that others find
        return hold(folder)
    return lock


def let_go(lock: IO[bytes]) -> None:
    """Let other processes train in the folder that `hold` has kept."""
    if sys.platform != "win32":  # where a file that is open cannot be deleted
        Path(lock.name).unlink(missing_ok=True)
    lock.close()


def versions(parent: Path) -> list[tuple[int, Path]]:
    """Return the version folders of a run's name with their numbers, in order."""
    folders = [path for path in parent.glob("version_*") if path.is_dir()]
    return sorted((int(match.group(1)), path) for path in folders if (match := _version(path)))


def _version(path: Path) -> re.Match[str] | None:
    return re.fullmatch(r"version_(\d+)", path.name)


def find_run(name: str, runs: str = "runs") -> Path:
    """Return the version folder that ``--resume`` names: a version, or a run whose latest training is meant.

    Raises:
        FileNotFoundError: there is no such run.
    """
    given = Path(name).expanduser()
    for path in (given, Path(runs) / name):
        if _version(path) and path.is_dir():
            return path
        trained = [folder for _, folder in versions(path) if _was_trained(folder)]
        if trained:
            return trained[-1]
        if (path / CONFIG_FILE).is_file():
            return path
    known = sorted({str(folder.parent) for folder in Path(runs).rglob("version_*") if _version(folder)})
    hint = f"; there are {', '.join(known[:8])}" if known else f"; {runs}/ holds none"
    raise FileNotFoundError(f"there is no run to resume at {name}{hint}")


def _was_trained(folder: Path) -> bool:
    """Whether a version is a training run, rather than an evaluation that shares its name."""
    if (folder / CHECKPOINTS_FOLDER).is_dir():
        return True
    manifest = folder / MANIFEST_FILE
    return manifest.is_file() and json.loads(manifest.read_text(encoding="utf-8")).get("subcommand") == "fit"
