"""Write manifest.json: versions, code, command and data, so that a run can be repeated."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from rlhf_lightning.atomic_files import write_text
from rlhf_lightning.compat import attached_datamodule
from rlhf_lightning.runs.loggers import tracked_runs
from rlhf_lightning.runs.run import aligned, run_folder, updates_of

PACKAGES = "rlhf-lightning torch lightning transformers tokenizers datasets peft torchmetrics numpy".split()


class RunManifest(Callback):
    """Write manifest.json: package versions, Python, git state, command line, seed, data fingerprint and report, times.

    A resumed run has one entry per session. Environment variables are not recorded, because they may hold secrets.

    Args:
        command: the command line; None means this process's command line.
    """

    def __init__(self, command: Sequence[str] | None = None) -> None:
        super().__init__()
        self.command = list(sys.argv if command is None else command)
        self.path: Path | None = None
        self.record: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the manifest after the data is read."""
        folder = run_folder(trainer)
        if not folder.writes:
            return
        self.path = path = folder.manifest
        earlier = earlier_record(path)
        self.record = {
            "subcommand": earlier.get("subcommand", trainer.state.fn.value if trainer.state.fn else stage),
            "model": f"{type(pl_module).__module__}.{type(pl_module).__name__}",
            "seed": int(os.environ["PL_GLOBAL_SEED"]) if os.environ.get("PL_GLOBAL_SEED", "").isdigit() else None,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "packages": package_versions(),
            "git": git_state(Path.cwd()),
            "data": describe_data(attached_datamodule(trainer)),
            "chat_template": describe_template(pl_module),
            "tracked_runs": earlier.get("tracked_runs", {}),
            "sessions": [*earlier.get("sessions", []), self._session(trainer)],
        }
        self._write()

    def _session(self, trainer: Trainer) -> dict[str, Any]:
        return {
            "command": shlex.join(self.command),
            "ranks": trainer.world_size,
            "started": now(),
            "ended": None,
            "status": "running",
            "resumed_from": None if trainer.ckpt_path is None else str(trainer.ckpt_path),
        }

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the ids of the trackers' runs; record and print the number of parameters."""
        if not trainer.is_global_zero:
            return
        total = sum(parameter.numel() for parameter in pl_module.parameters())
        trained = sum(parameter.numel() for parameter in pl_module.parameters() if parameter.requires_grad)
        print(f"{type(pl_module).__name__}: {total:,} parameters, {trained:,} trainable")
        if self.path is not None:
            self.record["parameters"] = {"total": total, "trained": trained}
            self.record["tracked_runs"] = tracked_runs(trainer.loggers)
            self._write()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Record that the run finished."""
        self._end(pl_module, "finished")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Record why the run ended; if the disk is full, the original error is still raised."""
        with contextlib.suppress(OSError):
            self._end(pl_module, f"{type(exception).__name__}: {exception}"[:500])

    def _end(self, module: LightningModule, status: str) -> None:
        if self.path is not None and self.record:
            self.record["sessions"][-1].update(status=status, ended=now(), updates=updates_of(module))
            self._write()

    def _write(self) -> None:
        assert self.path is not None
        write_text(self.path, json.dumps(self.record, indent=2, default=str, ensure_ascii=False) + "\n")


def earlier_record(path: Path) -> dict[str, Any]:
    """Return the manifest that a resumed run continues; rename a damaged manifest, so that it cannot block the run."""
    if not path.exists() and not path.is_symlink():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (ValueError, RecursionError, OSError):
        found = None
    if isinstance(found, dict) and isinstance(found.get("sessions", []), list):
        return found
    aside = path.with_name(f"damaged.{time.time_ns()}.{path.name}")
    path.rename(aside)
    print(f"{path} was damaged: it is renamed to {aside.name}, and a new one is started", flush=True)
    return {}


def now() -> str:
    """Return the current UTC time to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@cache
def package_versions() -> dict[str, str]:
    """Return the installed versions of the packages that affect results, read once per process."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return commit, branch and number of changed files; None outside a repository or without git."""

    def git(*arguments: str) -> str:
        result = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
        return result.stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "branch": git("rev-parse", "--abbrev-ref", "HEAD"),
            "changed_files": len(git("status", "--porcelain", "--untracked-files=no").splitlines()),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def describe_data(datamodule: Any) -> dict[str, Any] | None:
    """Return the fingerprints of the data and its feedback stores, and the report of kept and dropped rows."""
    if datamodule is None:
        return None
    report = getattr(datamodule, "report", None)
    as_dict = getattr(report, "to_dict", None)
    return {
        "class": f"{type(datamodule).__module__}.{type(datamodule).__name__}",
        "fingerprint": getattr(datamodule, "fingerprint", None),
        "report": as_dict() if callable(as_dict) else report,
        **({"snapshots": snapshots} if (snapshots := getattr(datamodule, "snapshots", None)) else {}),
    }


def describe_template(module: LightningModule) -> str | None:
    """Return the hash of the tokenizer's chat template, or None."""
    tokenizer = aligned(module).tokenizer
    template = None if tokenizer is None else tokenizer.chat_template
    return None if template is None else hashlib.sha256(str(template).encode()).hexdigest()[:16]
