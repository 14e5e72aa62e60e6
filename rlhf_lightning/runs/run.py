"""The run folder: its files, its name, finding and locking it.

``runs/<name>/version_<n>/`` holds config.yaml, manifest.json, checkpoints/, samples.jsonl, model/ and loggers' files.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from pathlib import Path
from typing import IO, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from rlhf_lightning.atomic_files import AppendedFile
from rlhf_lightning.errors import ContractError, MissingError, SettingError, StateError, check_range
from rlhf_lightning.loading import read_record
from rlhf_lightning.training.module import AlignmentModule

CONFIG_FILE = "config.yaml"
MANIFEST_FILE = "manifest.json"
SAMPLES_FILE = "samples.jsonl"
PREDICTIONS_FILE = "predictions.jsonl"
SKIPPED_FILE = "skipped_updates.jsonl"
CHECKPOINTS_FOLDER = "checkpoints"
MODEL_FOLDER = "model"
EXPORTS_FOLDER = "exports"
RUNS_FOLDER = "runs"
LOCK_FILE = ".training"


class RunFolder:
    """The folder of one run, shared by all loggers and callbacks of a trainer.

    ``rlhf fit`` creates it before any logger. In Python code, ``RunFolder(path).attach(trainer)`` sets the folder;
    otherwise `run_folder` creates one on its first call.

    Args:
        path: the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.writes = False
        """Whether this process writes into the folder: rank zero, unless it is a rehearsal."""
        self.is_shared = False
        """Whether all ranks know the folder."""

    def attach(self, trainer: Trainer) -> RunFolder:
        """Make this the folder of a trainer, independent of its loggers, and return it."""
        trainer._rlhf_run_folder = self  # type: ignore[attr-defined]
        return self

    def share(self, trainer: Trainer) -> None:
        """Broadcast rank zero's path to every rank; all ranks call it together."""
        self.path = Path(trainer.strategy.broadcast(str(self.path)))
        self.writes = writes_files(trainer)
        self.is_shared = True

    @property
    def config(self) -> Path:
        """Every setting of the run, as YAML."""
        return self.path / CONFIG_FILE

    @property
    def manifest(self) -> Path:
        """Versions, code, command and data of the run, as JSON."""
        return self.path / MANIFEST_FILE

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / CHECKPOINTS_FOLDER

    @property
    def model(self) -> Path:
        """The Hugging Face folder of the trained model."""
        return self.path / MODEL_FOLDER

    @property
    def samples(self) -> AppendedFile:
        """The sampled completions."""
        return AppendedFile(self.path / SAMPLES_FILE)

    @property
    def skipped_updates(self) -> AppendedFile:
        """The training steps that had skipped updates."""
        return AppendedFile(self.path / SKIPPED_FILE)

    @property
    def predictions(self) -> Path:
        """The rows of `rlhf predict`."""
        return self.path / PREDICTIONS_FILE


def run_folder(trainer: Trainer) -> RunFolder:
    """Return the trainer's run folder, the same object for every callback; all ranks must make the first call together.

    Without an attached folder, it is the folder of a TensorBoard or CSV logger, or else a new version under
    ``default_root_dir/runs/<module>/``.
    """
    folder: RunFolder | None = getattr(trainer, "_rlhf_run_folder", None)
    if folder is None:
        folder = RunFolder(_unattached_folder(trainer)).attach(trainer)
    if not folder.is_shared:
        folder.share(trainer)
    return folder


def _unattached_folder(trainer: Trainer) -> Path:
    """Return the folder of a trainer without an attached one; the path is only used on rank zero."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger | CSVLogger):
            return Path(logger.log_dir)
    root = Path(trainer.default_root_dir)
    if not writes_files(trainer):
        return root
    return reserve_version(root / RUNS_FOLDER, module_run_name(type(trainer.lightning_module).__name__))


def module_run_name(class_name: str) -> str:
    """Return the default name of a module's runs: ``dpo`` for ``DPOModule``."""
    return class_name.removesuffix("Module").lower() or "run"


def is_rehearsal(trainer: Any) -> bool:
    """Whether this is ``fast_dev_run``, which writes no files."""
    return bool(trainer.fast_dev_run)


def writes_files(trainer: Trainer) -> bool:
    """Whether this process writes into the run folder: rank zero, unless it is a rehearsal."""
    return trainer.is_global_zero and not is_rehearsal(trainer)


def aligned(module: LightningModule) -> AlignmentModule:
    """Return the module as an AlignmentModule, from which callbacks read counters and settings.

    Raises:
        ContractError: ``no-alignment-module``.
    """
    if not isinstance(module, AlignmentModule):
        raise ContractError(
            "no-alignment-module",
            f"{type(module).__name__} is not an AlignmentModule: use Lightning's own callbacks with it, or derive it "
            "from a class of rlhf_lightning.modules",
        )
    return module


def updates_of(module: LightningModule) -> int:
    """Return the number of optimizer updates so far."""
    return aligned(module).updates


def check_period(name: str, value: int | None) -> None:
    """Refuse a period that is neither null nor positive.

    Raises:
        SettingError: ``setting-out-of-range``.
    """
    check_range(value is None or value >= 1, "give a positive number, or null to turn it off", **{name: value})


def passes_multiple(before: int, now: int, period: int | None) -> bool:
    """Whether a counter reached or passed a multiple of the period; False if the period is None."""
    return period is not None and now // period > before // period


def checked_run_name(name: str) -> str:
    """Return a run's name if it stays inside the runs folder.

    Raises:
        SettingError: the name is absolute, too long, contains "..", has characters that are unsafe in file names, or
            looks like a version folder.
    """
    parts = name.split("/")
    if re.fullmatch(r"version_\d+", parts[-1]):
        raise SettingError(
            "invalid-run-name",
            f"run_name is {name!r}, but each run gets the next version number of its name: leave out {parts[-1]}, or "
            "continue that run with --resume",
        )
    if not all(re.fullmatch(r"[\w][\w.\-=+]{0,199}", part) for part in parts):
        raise SettingError(
            "invalid-run-name",
            f"run_name is {name!r}: use letters, digits, '_', '-', '.', '=' and '+' (and '/' between groups of runs) "
            "for a name inside the runs folder, at most 200 characters each",
        )
    return name


def reserve_version(runs: Path, name: str) -> Path:
    """Create and return the next ``version_<n>`` folder of a run's name; concurrent runs get different folders.

    Raises:
        SettingError: the name leads out of the runs folder, possibly through a link.
    """
    parent = runs / checked_run_name(name)
    if not parent.resolve().is_relative_to(runs.resolve()):
        raise SettingError(
            "invalid-run-name",
            f"run_name is {name!r}, but {parent} is a symlink that leaves {runs}: choose another name",
        )
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except (NotADirectoryError, FileExistsError) as error:
        raise SettingError(
            "not-a-folder", f"{runs / name} cannot be made, since a file is in its place: choose another --runs_folder"
        ) from error
    version = max((number for number, _ in versions(parent)), default=-1) + 1
    while True:
        folder = parent / f"version_{version}"
        try:
            folder.mkdir()
        except FileExistsError:
            version += 1
        else:
            return folder


def acquire_lock(folder: Path) -> IO[bytes]:
    """Lock a run folder against other training processes until `release_lock` or the end of this process.

    Raises:
        StateError: another process holds the lock.
    """
    path = folder / LOCK_FILE
    lock = path.open("wb")
    if sys.platform == "win32":
        return lock
    import fcntl

    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not inherited by workers of a killed run
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return lock  # the file system does not support locks
        lock.close()
        raise StateError(
            "run-folder-locked",
            f"run folder {folder} is locked by another training process; wait for it to finish, or start a new run",
        ) from None
    if not path.exists() or not os.path.samestat(os.fstat(lock.fileno()), path.stat()):
        lock.close()  # another process has just released the lock and deleted the file
        return acquire_lock(folder)
    return lock


def release_lock(lock: IO[bytes]) -> None:
    """Release the lock of `acquire_lock`."""
    if sys.platform != "win32":  # Windows cannot delete an open file
        Path(lock.name).unlink(missing_ok=True)
    lock.close()


def versions(parent: Path) -> list[tuple[int, Path]]:
    """Return the version folders of a run's name with their numbers, in order."""
    folders = [path for path in parent.glob("version_*") if path.is_dir()]
    return sorted((int(match.group(1)), path) for path in folders if (match := _version(path)))


def _version(path: Path) -> re.Match[str] | None:
    return re.fullmatch(r"version_(\d+)", path.name)


def find_run(name: str, runs: str = "runs") -> Path:
    """Return the version folder named by ``--resume``: a version, or the latest training run of a name.

    Raises:
        MissingError: there is no such run.
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
    found = [folder for folder in Path(runs).rglob("version_*") if _version(folder)]
    known = sorted({str(folder.parent) for folder in found if not any(map(_version, folder.parents))})
    hint = f"the runs are {', '.join(known[:8])}" if known else f"{runs}/ has no runs"
    raise MissingError("unknown-run", f"no run found at {name}; {hint}")


def status_of(folder: Path) -> str | None:
    """Return the status of a run's last session; None if its manifest names none.

    Raises:
        DataError: the manifest is damaged.
    """
    manifest = folder / MANIFEST_FILE
    sessions = read_record(manifest).get("sessions") if manifest.is_file() else None
    last = sessions[-1] if isinstance(sessions, list) and sessions else None
    return str(last["status"]) if isinstance(last, dict) and "status" in last else None


def _was_trained(folder: Path) -> bool:
    """Whether a version is a training run and not an evaluation under the same name."""
    if (folder / CHECKPOINTS_FOLDER).is_dir():
        return True
    manifest = folder / MANIFEST_FILE
    return manifest.is_file() and read_record(manifest).get("subcommand") == "fit"
