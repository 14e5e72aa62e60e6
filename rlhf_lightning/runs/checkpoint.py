"""Write checkpoints by update and rollout counts; each is written completely or not at all."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from rlhf_lightning.compat import dump_checkpoint, epoch_is_done, validation_follows
from rlhf_lightning.errors import StateError, TerminatedError, check_range
from rlhf_lightning.runs.checkpoint_files import (
    BEST_CHECKPOINT,
    LAST_CHECKPOINT,
    CheckpointFailedError,
    KeptCheckpoints,
    attempted,
    checkpoint_name,
    gathered_checksums,
    link,
    remove,
    remove_others,
    replace_checkpoint,
    seal,
)
from rlhf_lightning.runs.interruptions import PreemptedError, StopSignal, exit_status, requeue
from rlhf_lightning.runs.run import aligned, check_period, is_rehearsal, passes_multiple, run_folder, updates_of
from rlhf_lightning.training.checkpoint_state import random_state, set_random_state

PENDING_VALIDATION = {
    "total": {"ready": 1, "started": 1, "processed": 0, "completed": 0},
    "current": {"ready": 0, "started": 0, "processed": 0, "completed": 0},
    "is_last_batch": False,
}
"""State of Lightning's validation loop after a kill in its first batch; with it, a resumed run restarts validation."""

Place = Literal["step", "before validation", "epoch's end"]
"""Where in Lightning's loops a checkpoint is written."""


class RunCheckpoint(Checkpoint):
    """Save the run after a number of updates or rollouts, after each validation, and at the end of each epoch.

    Lightning's ModelCheckpoint counts optimizer steps (one rollout takes many) and never saves by time under manual
    optimization. Here every training step ends with all updates of its rollout done and no gradient left, so a
    checkpoint between two steps is complete. ``checkpoints/`` holds ``update_<n>.ckpt``, and ``last.ckpt`` and
    ``best.ckpt`` as links. A file gets its final name only after it is complete and synced to disk.

    On SIGTERM, and under SLURM on the signal before the time limit, the run finishes its step, saves and exits with
    status 75. A second signal ends it immediately.

    Args:
        every_n_updates: save every this many optimizer updates.
        every_n_rollouts: save every this many rollouts (on-policy modules).
        after_validation: save after each validation, so that the best checkpoint can be kept.
        keep_last: number of newest checkpoints to keep; null keeps all.
        keep_best: number of best checkpoints by ``monitor`` to keep in addition.
        monitor: validation metric that ranks checkpoints; null uses val/loss (min), else val/score (max).
        mode: "min" or "max": which values of ``monitor`` are better; null means "min" for a metric that you name.
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
        said = {"checkpoint.keep_last": keep_last}
        check_range(keep_last is None or keep_last >= 1, "give 1 or more, or null to keep all", **said)
        check_period("checkpoint.every_n_updates", every_n_updates)
        check_period("checkpoint.every_n_rollouts", every_n_rollouts)
        self.every_n_updates = every_n_updates
        self.every_n_rollouts = every_n_rollouts
        self.after_validation = after_validation
        self.kept = KeptCheckpoints(keep_last, keep_best, monitor, mode)
        self.folder: Path | None = None
        self._at: dict[str, int] = {"updates": 0, "rollouts": 0}  # the counters at the last save
        self._saved_at: int | None = None
        self._due = self._stopping = False  # a save, or the stop, waits for this step's validation or epoch end
        self._started = False
        self._identity: tuple[int, int] | None = None  # of the run folder when training began
        self._random: dict[str, Any] = {}  # random state when validation began
        self._signal = StopSignal()

    @property
    def best_model_path(self) -> str:
        """The best checkpoint so far; empty before the first validated checkpoint. Lightning reads this attribute."""
        best = self.kept.best(1)
        return str(self.folder / best[0]) if best and self.folder else ""

    @property
    def last_model_path(self) -> str:
        """The newest checkpoint; empty before the first checkpoint."""
        return str(self.folder / self.kept.saved[-1]) if self.kept.saved and self.folder else ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the run folder."""
        self.folder = run_folder(trainer).checkpoints

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Delete checkpoints newer than the loaded one, before curves and samples are truncated to it.

        Newer checkpoints exist if a kill came while the last checkpoint was renamed, or if the user chose an earlier
        checkpoint. After the truncation, the log records up to a newer checkpoint would be missing.
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
            # The same update was saved twice, before and after a validation: the file under the name is the later one.
            # Other ranks may still be reading the loaded file, so it keeps its own name too.
            link(loaded, own)
        self.load_state_dict(state)
        self._update_links(own.name)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start listening for signals now, because the first samples may take long."""
        if not is_rehearsal(trainer):
            self._signal.listen(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the caller's signal handlers, and name the checkpoint from which the interrupted run can resume."""
        self._signal.stop_listening()
        interrupted = isinstance(exception, KeyboardInterrupt | TerminatedError)
        trains = trainer.state.fn == TrainerFn.FITTING
        if interrupted and trains and self.kept.saved and self.folder is not None and trainer.is_global_zero:
            print(
                f"{self.last_model_path} is complete: `rlhf fit --resume {self.folder.parent}` continues from it",
                flush=True,
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting (after a resume, from the resumed counts); stop if a signal came in the meantime."""
        self._at, self._started = self._counters(pl_module), True
        self._identity = self._folder_identity()
        updates = updates_of(pl_module)
        # The loaded checkpoint must not be written again, because that would lose its score.
        self._saved_at = updates if updates and checkpoint_name(updates) in self.kept.saved else None
        self._stopping |= self._signal.asked(trainer)
        if self._stopping:
            self.save(trainer, pl_module)
            self._stop_if_told(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when the period has passed or the run was told to stop.

        If a validation or an epoch end follows this step, the checkpoint waits for it. A run that resumed from an
        earlier checkpoint would skip the validation or the epoch end.
        """
        self._refuse_deleted_folder(trainer)
        now = self._counters(pl_module)
        for name, period in (("updates", self.every_n_updates), ("rollouts", self.every_n_rollouts)):
            self._due |= passes_multiple(self._at[name], now[name], period)
        self._stopping |= self._signal.asked(trainer)
        if validation_follows(trainer) or epoch_is_done(trainer):
            return
        if self._due or self._stopping:
            self.save(trainer, pl_module)
        self._stop_if_told(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """If told to stop, stop before a validation; it runs after the resume."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._random = random_state(pl_module.device)
            self._stop_before_validation(trainer, pl_module)

    def _stop_before_validation(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._stopping:
            set_random_state(self._random, pl_module.device)
            self.save(trainer, pl_module, place="before validation")
            self._stop_if_told(trainer, pl_module)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """If told to stop, stop in the middle of a validation, which may be long; it runs again after the resume."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._stopping |= self._signal.asked(trainer)
            self._stop_before_validation(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save with the score of the validation that just ended."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and (self.after_validation or self._due):
            self.save(trainer, pl_module, self.kept.score(trainer.callback_metrics))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, unless the validation after the same update already saved."""
        self._stopping |= self._signal.asked(trainer)
        self.save(trainer, pl_module, place="epoch's end")
        self._stop_if_told(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop if the signal came after the last checkpoint; the resumed run does the work that follows training."""
        self._stopping |= self._signal.asked(trainer)
        self._stop_if_told(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the caller's signal handlers; a signal that came at the end of training still takes effect."""
        self._signal.stop_listening()
        self._stopping |= self._signal.received is not None
        self._stop_if_told(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the training-end hooks if the run was killed after its last step; on resume Lightning skips them."""
        if not self._started and trainer.ckpt_path is not None:
            pl_module.to(trainer.strategy.root_device)
            callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
            for callback in callbacks:
                callback.on_train_start(trainer, pl_module)
            for callback in callbacks:
                callback.on_train_end(trainer, pl_module)

    def _stop_if_told(self, trainer: Trainer, module: LightningModule) -> None:
        """Raise PreemptedError if the run was told to stop; call only after its checkpoint is written."""
        if not self._stopping:
            return
        received = self._signal.received
        sentence = (
            f"{self._signal.name()}: stopped after {updates_of(module)} updates, {self.last_model_path} is written; "
            f"`rlhf fit --resume {self.folder and self.folder.parent}` continues from it"
        )
        if trainer.is_global_zero:
            print(sentence, flush=True)
        requeue(trainer, received)
        raise PreemptedError(sentence, exit_status(trainer))

    # -- writing ------------------------------------------------------------------------------------------------------

    def save(
        self, trainer: Trainer, module: LightningModule, score: float | None = None, place: Place = "step"
    ) -> None:
        """Write a checkpoint of the current state; all ranks call it together.

        Args:
            trainer: the trainer.
            module: the module.
            score: value of ``monitor`` for these weights; None if they were not validated.
            place: where a run continues that resumes from the checkpoint.

        Raises:
            CheckpointFailedError: the checkpoint could not be written. Earlier checkpoints are unchanged.
        """
        self._refuse_deleted_folder(trainer)
        updates = updates_of(module)
        if is_rehearsal(trainer) or (updates == self._saved_at and score is None):
            return
        assert self.folder is not None
        before = self.state_dict()
        name = checkpoint_name(updates)
        # The lists are part of the checkpoint, so they change before it is written; files are deleted only afterwards.
        self.kept.add(name, score, interim=self._stopping and not self._due and place != "epoch's end")
        half = self.folder / f".{name}.partial"
        steps = (
            partial(self._prepare, trainer, half),
            partial(self._write, trainer, half, place),
            partial(self._seal, trainer, half),
            partial(self._rename, trainer, half, name),
        )
        for step in steps:
            reason = attempted(step)
            # Checked after each step, so that no rank waits in a collective of the next step for a failed rank.
            if trainer.strategy.reduce_boolean_decision(reason is not None, all=False):
                self.kept.restore(before)
                if trainer.is_global_zero:
                    remove(half)
                raise CheckpointFailedError(
                    "checkpoint-not-written", self._failure_message(name, reason or "another rank prints the reason")
                )
        self._saved_at, self._at, self._due = updates, self._counters(module), False

    def _folder_identity(self) -> tuple[int, int] | None:
        """Return device and inode of the run folder; None if it does not exist."""
        try:
            found = self.folder.parent.stat() if self.folder is not None else None
        except OSError:
            return None
        return None if found is None else (found.st_dev, found.st_ino)

    def _refuse_deleted_folder(self, trainer: Trainer) -> None:
        """End a run whose folder was deleted, because its config, curves and checkpoints cannot be recreated.

        Raises:
            StateError: ``run-folder-deleted``.
        """
        if trainer.is_global_zero and self._identity not in (None, self._folder_identity()):
            assert self.folder is not None
            raise StateError(
                "run-folder-deleted",
                f"the run folder {self.folder.parent} was deleted, moved or replaced while the run was training; "
                "restore it, and `rlhf fit --resume` continues from its last checkpoint, or start a new run",
            )

    def _prepare(self, trainer: Trainer, half: Path) -> None:
        """Create the folder and flush the loggers, because the checkpoint records the lengths of their files."""
        if trainer.is_global_zero:
            half.parent.mkdir(parents=True, exist_ok=True)
            remove(half)
            for logger in trainer.loggers:
                logger.save()

    def _write(self, trainer: Trainer, half: Path, place: Place) -> None:
        # trainer.save_checkpoint has a barrier. On a rank that fails, it would pair with a later collective.
        state = dump_checkpoint(trainer)
        patch_loop_state(state["loops"]["fit_loop"], place)
        trainer.strategy.save_checkpoint(state, half)

    def _seal(self, trainer: Trainer, half: Path) -> None:
        """Write checksums into the folder of a sharded checkpoint."""
        if half.is_dir():
            checksums = gathered_checksums(half, trainer.global_rank)
            if trainer.is_global_zero:
                seal(half, checksums)

    def _rename(self, trainer: Trainer, half: Path, name: str) -> None:
        assert self.folder is not None
        if trainer.is_global_zero:
            replace_checkpoint(half, self.folder / name)
            self._update_links(name)

    def _update_links(self, last: str) -> None:
        """Point the links to the newest and the best checkpoint, and delete checkpoints that are not retained."""
        assert self.folder is not None
        link(self.folder / last, self.folder / LAST_CHECKPOINT)
        best = self.kept.best(1)
        if best:
            link(self.folder / best[0], self.folder / BEST_CHECKPOINT)
        else:
            remove(self.folder / BEST_CHECKPOINT)
        remove_others(self.folder, self.kept.saved)

    def _failure_message(self, name: str, reason: str) -> str:
        assert self.folder is not None
        failed = f"the checkpoint {self.folder / name} could not be written ({reason})"
        if not self.kept.saved:
            return f"{failed}, and there is no earlier one"
        resume = f"`rlhf fit --resume {self.folder.parent}`"
        return f"{failed}; {self.last_model_path} is complete: free some space, and {resume} continues from it"

    def _counters(self, module: LightningModule) -> dict[str, int]:
        return {"updates": updates_of(module), "rollouts": aligned(module).rollouts}

    def state_dict(self) -> dict[str, Any]:
        """Return names and scores of the checkpoints as plain values, which can be loaded without unpickling."""
        return self.kept.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the records of the resumed run."""
        self.kept.restore(state_dict, self.folder)


def patch_loop_state(loop: dict[str, Any], place: Place) -> None:
    """Change the state of Lightning's loops in a checkpoint so that a resumed run continues at the right place.

    Three things go wrong with Lightning's own state. A validation that was due is skipped. In a run limited by
    ``max_steps``, the end of an epoch is mistaken for its middle, and one more batch is trained. And the flag of a due
    validation would trigger again at the next validation, unless started batches are counted as completed.
    """
    if place == "before validation":
        loop["epoch_loop.val_loop.batch_progress"] = PENDING_VALIDATION
    else:
        validated = loop["epoch_loop.val_loop.batch_progress"]["total"]
        validated.update(dict.fromkeys(validated, validated["ready"]))
    if place == "epoch's end":
        for count in loop["epoch_progress"].values():
            count["completed"] = count["processed"]
        batches = loop["epoch_loop.batch_progress"]
        batches["current"], batches["is_last_batch"] = dict.fromkeys(batches["current"], 0), False
