"""Checkpoints keyed on updates and rollouts, written whole or not at all."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch.distributed.checkpoint.api import CheckpointException

from rlhf_lightning.compat import dump_checkpoint, epoch_is_done, validation_follows
from rlhf_lightning.errors import SettingError
from rlhf_lightning.runs.checkpoint_files import (
    BEST_CHECKPOINT,
    LAST_CHECKPOINT,
    CheckpointFailedError,
    Checksum,
    checkpoint_name,
    checksum,
    link,
    remove,
    remove_others,
    replace_checkpoint,
    seal,
)
from rlhf_lightning.runs.interruptions import PreemptedError, StopSignal, exit_status, requeue
from rlhf_lightning.runs.run import aligned, is_rehearsal, run_folder, updates_of
from rlhf_lightning.training.checkpoint_state import random_state, set_random_state

DEFAULT_MONITORS: dict[str, Literal["min", "max"]] = {"val/loss": "min", "val/score": "max"}

VALIDATION_TO_COME = {
    "total": {"ready": 1, "started": 1, "processed": 0, "completed": 0},
    "current": {"ready": 0, "started": 0, "processed": 0, "completed": 0},
    "is_last_batch": False,
}
"""Progress of Lightning's validation loop as after a kill in its first batch: it runs anew, from the first."""

Place = Literal["step", "before validation", "epoch's end"]
"""Where in Lightning's loops a checkpoint is written."""


class RunCheckpoint(Checkpoint):
    """Save the run every so many updates or rollouts, after each validation, and at the end of each epoch.

    Lightning's ModelCheckpoint counts optimizer steps, of which one rollout takes many, and never saves by time under
    manual optimization. Here a training step is whole when it ends (all updates of a rollout, no gradient left over),
    so a checkpoint between two steps needs nothing else. ``checkpoints/`` holds ``update_<n>.ckpt``, ``last.ckpt`` and
    ``best.ckpt`` (links to two of them). A file appears under its name only when it is complete and on the disk.

    On SIGTERM, and under SLURM on the signal before the end of its time, the run finishes its step, saves and ends with
    exit status 75; a second signal ends it at once.

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
            raise SettingError(
                "setting-out-of-range", f"checkpoint.keep_last is {keep_last}: give 1 or more, or null to keep all"
            )
        for name, value in (("every_n_updates", every_n_updates), ("every_n_rollouts", every_n_rollouts)):
            if value is not None and value < 1:
                raise SettingError(
                    "setting-out-of-range",
                    f"checkpoint.{name} is {value}: give a positive number, or null to turn it off",
                )
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
        self.interim: str | None = None  # the one that only an end before its time has made
        self._at: dict[str, int] = {"updates": 0, "rollouts": 0}  # the counters at the last save
        self._saved_at: int | None = None
        self._due = self._stopping = False  # a checkpoint, or the end, waits for what belongs to this step
        self._started = False
        self._random: dict[str, Any] = {}  # where random numbers stood when validation began
        self._signal = StopSignal()

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
        self.folder = run_folder(trainer).checkpoints

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Give up what lies behind the checkpoint that is resumed from, before curves and samples are cut back to it.

        A kill while the last checkpoint was put in place, or the user's wish, may have left later ones; resumed from
        after that, they would lack what was cut off.
        """
        assert self.folder is not None
        loaded = Path(str(trainer.ckpt_path)).resolve()
        if loaded.parent != self.folder.resolve() or not trainer.is_global_zero:
            return
        state = checkpoint["callbacks"].get(self.state_key)
        if state is None:
            return
        own = self.folder / state["saved"][-1]
        if loaded.is_file() and not (own.exists() and own.samefile(loaded)):
            # Saved twice at the same update, the second time behind a validation: what is under the name now is later.
            # Other ranks may still be reading what was loaded, so its own name is left as it is.
            link(loaded, own)
        self.load_state_dict(state)
        self._point(own.name)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen for signals from here on: the first samples may take long."""
        self._signal.listen_early()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the caller's signal handler back."""
        self._signal.stop_listening()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from where training starts, which after a resume is not zero; stop if told to meanwhile."""
        self._at, self._started = self._counters(pl_module), True
        updates = updates_of(pl_module)
        # Of the checkpoint that is resumed from nothing is to be written anew, least of all without its score.
        self._saved_at = updates if updates and checkpoint_name(updates) in self.saved else None
        self._signal.listen(trainer)
        self._stopping |= self._signal.asked(trainer)
        if self._stopping:
            self.save(trainer, pl_module)
            self._stop_if_told(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when a multiple of the period was reached or passed, or the run was told to stop.

        Where validation follows it belongs to this step, and so does what an epoch does at its end: a run that resumed
        from a checkpoint before them would leave them out. So the checkpoint waits.
        """
        now = self._counters(pl_module)
        for name, period in (("updates", self.every_n_updates), ("rollouts", self.every_n_rollouts)):
            self._due |= period is not None and now[name] // period > self._at[name] // period
        self._stopping |= self._signal.asked(trainer)
        if validation_follows(trainer) or epoch_is_done(trainer):
            return
        if self._due or self._stopping:
            self.save(trainer, pl_module)
        self._stop_if_told(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop before a validation; it runs when the run is resumed."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._random = random_state(pl_module.device)
            self._stop_before_validation(trainer, pl_module)

    def _stop_before_validation(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._stopping:
            set_random_state(self._random, pl_module.device)
            self.save(trainer, pl_module, place="before validation")
            self._stop_if_told(trainer, pl_module)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """Stop in the middle of a validation, which may be long; all of it runs when the run is resumed."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._stopping |= self._signal.asked(trainer)
            self._stop_before_validation(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save with the score of the validation that just ended."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and (self.after_validation or self._due):
            self.save(trainer, pl_module, self._score(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save where training stands, unless validation just did."""
        self._stopping |= self._signal.asked(trainer)
        self.save(trainer, pl_module, place="epoch's end")
        self._stop_if_told(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give a run that was killed behind its last step the end that it did not get: Lightning leaves that out."""
        if not self._started and trainer.ckpt_path is not None:
            pl_module.to(trainer.strategy.root_device)
            callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
            for callback in callbacks:
                callback.on_train_start(trainer, pl_module)
            for callback in callbacks:
                callback.on_train_end(trainer, pl_module)

    def _stop_if_told(self, trainer: Trainer, module: LightningModule) -> None:
        """End the run if it was told to; its checkpoint is written.

        Raises:
            PreemptedError: it was.
        """
        if not self._stopping:
            return
        received = self._signal.received
        sentence = (
            f"{self._signal.name()}: stopped after {updates_of(module)} updates, {self.last_model_path} is written; "
            f"`rlhf fit --resume {self.folder and self.folder.parent}` goes on from it"
        )
        if trainer.is_global_zero:
            print(sentence, flush=True)
        requeue(trainer, received)
        raise PreemptedError(sentence, exit_status(trainer))

    # -- writing ------------------------------------------------------------------------------------------------------

    def save(
        self, trainer: Trainer, module: LightningModule, score: float | None = None, place: Place = "step"
    ) -> None:
        """Write a checkpoint of now; all ranks call it together.

        Args:
            trainer: the trainer.
            module: the module.
            score: value of ``monitor`` for these weights; None where they were not validated.
            place: where a run that resumes from it goes on: behind this step, with its validation, or with the next
                epoch.

        Raises:
            CheckpointFailedError: it could not be written. The ones before are as they were.
        """
        updates = updates_of(module)
        if is_rehearsal(trainer) or (updates == self._saved_at and score is None):
            return
        assert self.folder is not None
        before = (list(self.saved), dict(self.scores), self.interim)
        name = checkpoint_name(updates)
        # The lists are part of the checkpoint, so they change before it is written and files go only afterwards.
        self._remember(name, score, interim=self._stopping and not self._due and place != "epoch's end")
        half = self.folder / f".{name}.partial"
        steps = (
            partial(self._prepare, trainer, half),
            partial(self._write, trainer, half, place),
            partial(self._seal, trainer, half),
            partial(self._place, trainer, half, name),
        )
        for step in steps:
            reason = attempted(step)
            # After each, so that no rank waits in the next one's collectives for another whose disk is full.
            if trainer.strategy.reduce_boolean_decision(reason is not None, all=False):
                self.saved, self.scores, self.interim = before
                if trainer.is_global_zero:
                    remove(half)
                raise CheckpointFailedError(
                    "checkpoint-not-written", self._failure_message(name, reason or "another rank says why")
                )
        self._saved_at, self._at, self._due = updates, self._counters(module), False

    def _prepare(self, trainer: Trainer, half: Path) -> None:
        """Make room, and write out what was logged before: the checkpoint says how much that is."""
        if trainer.is_global_zero:
            half.parent.mkdir(parents=True, exist_ok=True)
            remove(half)
            for logger in trainer.loggers:
                logger.save()

    def _write(self, trainer: Trainer, half: Path, place: Place) -> None:
        """Write the files of a checkpoint under another name."""
        # Not trainer.save_checkpoint, whose barrier is another collective than the one that follows a failure.
        state = dump_checkpoint(trainer)
        patch_loop_state(state["loops"]["fit_loop"], place)
        trainer.strategy.save_checkpoint(state, half)

    def _seal(self, trainer: Trainer, half: Path) -> None:
        """Put checksums into a sharded checkpoint's folder."""
        if half.is_dir():
            checksums = gathered_checksums(half, trainer.global_rank)
            if trainer.is_global_zero:
                seal(half, checksums)

    def _place(self, trainer: Trainer, half: Path, name: str) -> None:
        """Give a checkpoint its name, and put the folder in order."""
        assert self.folder is not None
        if trainer.is_global_zero:
            replace_checkpoint(half, self.folder / name)
            self._point(name)

    def _point(self, last: str) -> None:
        """Point the links to the newest and the best, and delete what is not kept."""
        assert self.folder is not None
        link(self.folder / last, self.folder / LAST_CHECKPOINT)
        best = self._best(1)
        if best:
            link(self.folder / best[0], self.folder / BEST_CHECKPOINT)
        else:
            remove(self.folder / BEST_CHECKPOINT)
        remove_others(self.folder, self.saved)

    def _failure_message(self, name: str, reason: str) -> str:
        """Return that a checkpoint was not written, and which one is whole."""
        assert self.folder is not None
        failed = f"the checkpoint {self.folder / name} could not be written ({reason})"
        if not self.saved:
            return f"{failed}, and there is none before it"
        resume = f"`rlhf fit --resume {self.folder.parent}`"
        return f"{failed}; {self.last_model_path} is whole: make room, and {resume} goes on from it"

    def state_dict(self) -> dict[str, Any]:
        """Return names and scores of the checkpoints, plain so that they load without unpickling."""
        return {
            "saved": list(self.saved), "scores": dict(self.scores), "interim": self.interim, "monitor": self.monitor,
            "mode": self.mode,
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the bookkeeping of the run that is continued."""
        self.saved, self.scores = list(state_dict["saved"]), dict(state_dict["scores"])
        self.interim = state_dict["interim"]
        if self.folder is not None:  # somebody may have tidied up
            # The last one is this checkpoint, which rank zero may be giving back its name just now.
            self.saved = [name for name in self.saved if name == self.saved[-1] or (self.folder / name).exists()]
            self.scores = {name: score for name, score in self.scores.items() if name in self.saved}
        if self.monitor is None:
            self.monitor, self.mode = state_dict["monitor"], state_dict["mode"]
        elif self.monitor != state_dict["monitor"]:
            self.scores = {}  # of another metric, so they rank nothing here

    def _counters(self, module: LightningModule) -> dict[str, int]:
        return {"updates": updates_of(module), "rollouts": aligned(module).rollouts}

    def _score(self, trainer: Trainer) -> float | None:
        """Return the monitored value, and settle what is monitored when validation first runs.

        Raises:
            SettingError: a metric was named that validation does not log.
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
            raise SettingError(
                "unknown-metric",
                f"checkpoint.monitor is {self.monitor!r}, which validation does not log; it logs {known}",
            )
        return float(found)

    def _best(self, count: int) -> list[str]:
        """Return the names of the best checkpoints, best first; of equals the older."""
        sign = -1 if self.mode == "max" else 1
        ranked = sorted((name for name in self.saved if name in self.scores), key=lambda name: sign * self.scores[name])
        return ranked[:count]

    def _remember(self, name: str, score: float | None, interim: bool) -> None:
        """Put a checkpoint on the lists, and drop from them what is neither among the newest nor the best.

        One that only an end before its time has made drives out none and goes with the next: which are kept in the end
        does not depend on when a run was told to stop.
        """
        self.saved = [*(kept for kept in self.saved if kept not in (name, self.interim)), name]
        self.scores = {kept: score for kept, score in self.scores.items() if kept in self.saved and kept != name}
        self.interim = name if interim else None
        if score is not None and not math.isnan(score):
            self.scores[name] = score
        if self.keep_last is None:
            return
        lasting = [kept for kept in self.saved if kept != self.interim]
        kept = {*lasting[-self.keep_last :], *self._best(self.keep_best), name}
        self.saved = [name for name in self.saved if name in kept]
        self.scores = {name: score for name, score in self.scores.items() if name in kept}


def attempted(step: Callable[[], None]) -> str | None:
    """Do a step of writing a checkpoint; return why it did not work, None where it did.

    torch says of a full disk what it says of everything, and a failure on any rank by an exception of its own.
    """
    try:
        step()
    except (OSError, CheckpointException) as error:
        return next(iter(str(error).strip().splitlines()), type(error).__name__)
    except RuntimeError as error:
        if "write" not in str(error):
            raise
        return str(error).strip().splitlines()[0]
    return None


def gathered_checksums(folder: Path, rank: int) -> dict[str, Checksum]:
    """Return the checksums of all ranks' shards: each rank reads what it wrote, which is in memory still."""
    mine = {file.name: checksum(file) for file in folder.glob(f"__{rank}_*.distcp")}
    everyone: list[Any] = [mine]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
    return {name: found for part in everyone for name, found in part.items()}


def patch_loop_state(loop: dict[str, Any], place: Place) -> None:
    """Change the state of Lightning's loops, as it is in a checkpoint, so that a resumed run goes on where it should.

    Of itself Lightning leaves out a validation that was to come, and where ``max_steps`` bounds a run it takes the end
    of an epoch for its middle and trains on one more batch of it. A validation that was to come leaves a mark that
    never goes: it is taken for the next one's too, unless what was begun is counted as done.
    """
    if place == "before validation":
        loop["epoch_loop.val_loop.batch_progress"] = VALIDATION_TO_COME
    else:
        validated = loop["epoch_loop.val_loop.batch_progress"]["total"]
        validated.update(dict.fromkeys(validated, validated["ready"]))
    if place == "epoch's end":
        for count in loop["epoch_progress"].values():
            count["completed"] = count["processed"]
        batches = loop["epoch_loop.batch_progress"]
        batches["current"], batches["is_last_batch"] = dict.fromkeys(batches["current"], 0), False
