"""Checkpoints keyed on updates and rollouts, written whole or not at all."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from rlhf_lightning.callbacks.run import (
    CHECKPOINTS_FOLDER,
    LAST_CHECKPOINT,
    is_rehearsal,
    move_into_place,
    run_folder,
    updates_of,
)

BEST_CHECKPOINT = "best.ckpt"
DEFAULT_MONITORS: dict[str, Literal["min", "max"]] = {"val/loss": "min", "val/score": "max"}


class RunCheckpoint(Checkpoint):
    """Save the run every so many updates or rollouts, after each validation, and at the end of each epoch.

    Lightning's ModelCheckpoint counts optimizer steps, of which one rollout takes many, and never saves by time under
    manual optimization. Here a training step is whole when it ends (all updates of a rollout, no gradient left over),
    so a checkpoint between two steps needs nothing else. ``checkpoints/`` holds ``update_<n>.ckpt``, ``last.ckpt`` and
    ``best.ckpt`` (links to two of them). A file appears under its name only when it is complete and on the disk.

    Args:
        every_n_updates: save once this many further optimizer updates are done.
        every_n_rollouts: save once this many further rollouts are done; for on-policy modules.
        after_validation: save after each validation, so that the best can be kept.
        keep_last: how many of the newest are kept; null keeps all.
        keep_best: how many of the best by ``monitor`` are kept beside those.
        monitor: the validation metric that ranks checkpoints; null takes val/loss (less is better), or where that is
            not logged val/score (more is better).
        mode: whether less ("min") or more ("max") of ``monitor`` is better; null is "min" for a metric you name.
    """

    def __init__(
        self,
        every_n_updates: int | None = None,
        every_n_rollouts: int | None = None,
        after_validation: bool = True,
        keep_last: int | None = 2,
        keep_best: int = 1,
        monitor: str | None = None,
        mode: Literal["min", "max"] | None = None,
    ) -> None:
        super().__init__()
        if keep_last is not None and keep_last < 1:
            raise ValueError(f"checkpoint.keep_last is {keep_last}: at least the newest must be kept (null keeps all)")
        for name, value in (("every_n_updates", every_n_updates), ("every_n_rollouts", every_n_rollouts)):
            if value is not None and value < 1:
                raise ValueError(f"checkpoint.{name} is {value}: give a positive number, or null to save without it")
        self.every_n_updates = every_n_updates
        self.every_n_rollouts = every_n_rollouts
        self.after_validation = after_validation
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.monitor = monitor
        self.mode = mode
        self.folder: Path | None = None
        self.saved: list[str] = []  # names of the files kept, oldest first
        self.scores: dict[str, float] = {}  # of those, the ones that were validated
        self._at: dict[str, int] = {"updates": 0, "rollouts": 0}  # the counters at the last save
        self._saved_at: int | None = None

    @property
    def best_model_path(self) -> str:
        """The best checkpoint so far; empty before any was validated. Lightning asks for it by this name."""
        best = self._best(1)
        return str(self.folder / best[0]) if best and self.folder else ""

    @property
    def last_model_path(self) -> str:
        """The newest checkpoint; empty before the first."""
        return str(self.folder / self.saved[-1]) if self.saved and self.folder else ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder."""
        self.folder = run_folder(trainer) / CHECKPOINTS_FOLDER

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from where training starts, which after a resume is not zero."""
        self._at = self._counters(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when a multiple of the period was reached or passed."""
        now = self._counters(pl_module)
        for name, period in (("updates", self.every_n_updates), ("rollouts", self.every_n_rollouts)):
            if period is not None and now[name] // period > self._at[name] // period:
                self.save(trainer, pl_module)
                return

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save with the score of the validation that just ended."""
        if self.after_validation and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.save(trainer, pl_module, self._score(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save where training stands, unless validation just did."""
        self.save(trainer, pl_module)

    def save(self, trainer: Trainer, module: LightningModule, score: float | None = None) -> None:
        """Write a checkpoint of now; all ranks call it together.

        Args:
            trainer: the trainer.
            module: the module.
            score: value of ``monitor`` for these weights; None where they were not validated.
        """
        updates = updates_of(module)
        if is_rehearsal(trainer) or (updates == self._saved_at and score is None):
            return
        assert self.folder is not None
        self._saved_at, self._at = updates, self._counters(module)
        name = f"update_{updates:06d}.ckpt"
        self.saved = [*(kept for kept in self.saved if kept != name), name]
        self.scores.pop(name, None)
        if score is not None and not math.isnan(score):
            self.scores[name] = score
        # The lists are part of the checkpoint, so they change before it is written and files go only afterwards.
        dropped = self._forget()
        partial = self.folder / f".{name}.partial"
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            _remove(partial)
        try:
            trainer.save_checkpoint(partial, weights_only=False)
        except BaseException:
            _remove(partial)
            raise
        if trainer.is_global_zero:
            move_into_place(partial, self.folder / name)
            _link(self.folder / name, self.folder / LAST_CHECKPOINT)
            for best in self._best(1):
                _link(self.folder / best, self.folder / BEST_CHECKPOINT)
            for old in dropped:
                _remove(self.folder / old)
        trainer.strategy.barrier("checkpoint")

    def state_dict(self) -> dict[str, Any]:
        """Return names and scores of the checkpoints, plain so that they load without unpickling."""
        return {"saved": list(self.saved), "scores": dict(self.scores), "monitor": self.monitor, "mode": self.mode}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the bookkeeping of the run that is continued."""
        self.saved, self.scores = list(state_dict["saved"]), dict(state_dict["scores"])
        if self.monitor is None:
            self.monitor, self.mode = state_dict["monitor"], state_dict["mode"]
        elif self.monitor != state_dict["monitor"]:
            self.scores = {}  # of another metric, so they rank nothing here

    def _counters(self, module: LightningModule) -> dict[str, int]:
        return {"updates": updates_of(module), "rollouts": int(getattr(module, "rollouts", 0) or 0)}

    def _score(self, trainer: Trainer) -> float | None:
        """Return the monitored value, and settle what is monitored when validation first runs.

        Raises:
            ValueError: a metric was named that validation does not log.
        """
        if self.monitor is None:
            for name, mode in DEFAULT_MONITORS.items():
                if name in trainer.callback_metrics:
                    self.monitor, self.mode = name, self.mode or mode
                    break
            else:
                return None
        found = trainer.callback_metrics.get(self.monitor)
        if found is None:
            known = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val/"))) or "none"
            raise ValueError(f"checkpoint.monitor is {self.monitor!r}, which validation does not log; it logs {known}")
        return float(found)

    def _best(self, count: int) -> list[str]:
        """Return the names of the best checkpoints, best first; of equals the older."""
        sign = -1 if self.mode == "max" else 1
        ranked = sorted((name for name in self.saved if name in self.scores), key=lambda name: sign * self.scores[name])
        return ranked[:count]

    def _forget(self) -> list[str]:
        """Drop what is neither among the newest nor the best from the lists, and return it."""
        if self.keep_last is None:
            return []
        kept = {*self.saved[-self.keep_last :], *self._best(self.keep_best)}
        dropped = [name for name in self.saved if name not in kept]
        self.saved = [name for name in self.saved if name in kept]
        self.scores = {name: score for name, score in self.scores.items() if name in kept}
        return dropped


def _link(target: Path, name: Path) -> None:
    """Make ``name`` the same file as ``target`` in one step, or for a sharded checkpoint, a folder, point to it."""
    partial = name.with_name(f".{name.name}.partial")
    _remove(partial)
    try:
        if target.is_dir():
            partial.symlink_to(target.name)
        else:
            os.link(target, partial)
    except OSError:  # a file system without hard links
        shutil.copyfile(target, partial)
    os.replace(partial, name)
    _remove(partial)  # renaming between two names of one file leaves both


def _remove(path: Path) -> None:
    """Delete a checkpoint, file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
