"""The progress of a run: a bar on a terminal, a line every ten seconds anywhere else."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from rlhf_lightning.compat import bar_is_enabled
from rlhf_lightning.runs.run import aligned, updates_of

SECONDS_BETWEEN_LINES = 10.0
COMPARED = ("loss", "reward_accuracy", "reward_margin", "score", "kl", "length", "eos_rate")
"""Metrics of a validation that compare objectives, where they are logged."""


class RunProgress(TQDMProgressBar):
    """Show loss, tokens per second and the remaining time of the whole run.

    Args:
        seconds: seconds between two lines where there is no terminal.
        clock: returns the time in seconds.
    """

    def __init__(self, seconds: float = SECONDS_BETWEEN_LINES, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self.seconds = seconds
        self.clock = clock
        self.on_terminal = sys.stdout.isatty()
        self._began = self._printed = clock()
        self._tokens_before = 0
        self._steps = 0

    @property
    def is_enabled(self) -> bool:
        """Whether bars are drawn."""
        return self.on_terminal and super().is_enabled

    @property
    def is_disabled(self) -> bool:
        """Whether bars are not drawn."""
        return not self.is_enabled

    def on_train_start(self, *args: Any) -> None:
        """Start the clock."""
        super().on_train_start(*args)
        module: Any = args[1]
        self._began = self._printed = self.clock()
        self._tokens_before, self._steps = aligned(module).tokens, 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step; print a line if one is due or the run is at its end."""
        self._steps += 1
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        total = steps_of_run(trainer)
        last = total is not None and self._step(trainer) >= total
        if last or self._is_due():
            self._line("training", self._step(trainer), total, self._figures(trainer, pl_module))

    def on_train_end(self, *args: Any) -> None:
        """Say so if a resumed run had reached its end already."""
        super().on_train_end(*args)
        trainer, module = args
        if not self._steps and trainer.ckpt_path is not None:
            self.print(
                f"nothing was left to train: the run had ended at update {updates_of(module)}; to continue it, raise "
                f"trainer.max_epochs (now {trainer.max_epochs}) or trainer.max_steps (now {trainer.max_steps})"
            )

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return the figures after the bar."""
        shown: dict[str, Any] = {**self._figures(trainer, pl_module), **trainer.progress_bar_metrics}
        return shown

    def _figures(self, trainer: Trainer, module: LightningModule) -> dict[str, str]:
        """Return the known ones of loss, speed and remaining time as text."""
        figures: dict[str, str] = {"update": str(updates_of(module))}
        for label, tag in (("loss", "train/loss"), ("score", "rollout/score"), ("KL", "rollout/kl")):
            value = trainer.callback_metrics.get(tag)
            if value is not None:
                figures[label] = f"{float(value):.4g}"
        seconds = self.clock() - self._began
        tokens = aligned(module).tokens - self._tokens_before
        if tokens and seconds > 0:
            figures["tokens/s"] = f"{tokens / seconds:,.0f}"
        figures["elapsed"] = clock_time(seconds)
        total = steps_of_run(trainer)
        if total is not None and self._steps:
            left = max(total - self._step(trainer), 0)
            figures["left"] = clock_time(seconds / self._steps * left)
        return figures

    def _step(self, trainer: Trainer) -> int:
        """Return the number of training steps, those before a resume included."""
        return trainer.fit_loop.total_batch_idx + 1

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Advance."""
        super().on_validation_batch_end(*args, **kwargs)
        self._evaluated("validation", args, kwargs)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the metrics of a validation during training that compare, in one line."""
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        names = dict.fromkeys((*aligned(pl_module).headline_metrics, *(f"val/{name}" for name in COMPARED)))
        values = {name: trainer.callback_metrics[name] for name in names if name in trainer.callback_metrics}
        shown = [f"{name} {float(value):.4g}" for name, value in values.items() if name.startswith("val/")]
        if shown:
            self.print(f"validation at update {updates_of(pl_module)}: {'  '.join(shown)}")

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Advance."""
        super().on_test_batch_end(*args, **kwargs)
        self._evaluated("test", args, kwargs)

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Advance."""
        super().on_predict_batch_end(*args, **kwargs)
        self._evaluated("prediction", args, kwargs)

    def _evaluated(self, what: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Print the progress of an evaluation when a line is due."""
        if not self._is_due():
            return
        trainer, index = args[0], kwargs.get("batch_idx", args[4] if len(args) > 4 else 0)
        batches = {"test": trainer.num_test_batches, "prediction": trainer.num_predict_batches}.get(
            what, trainer.num_val_batches
        )
        total = sum(batches) if isinstance(batches, list) else batches
        self._line(what, index + 1, None if math.isinf(total) else int(total), {})

    def _is_due(self) -> bool:
        return not self.on_terminal and bar_is_enabled(self) and self.clock() - self._printed >= self.seconds

    def _line(self, what: str, step: int, total: int | None, figures: dict[str, str]) -> None:
        if self.on_terminal or not bar_is_enabled(self):
            return
        self._printed = self.clock()
        share = f"{step}/{total} ({100 * step / total:.0f} %)" if total else str(step)
        print(f"{what} {share}  {'  '.join(f'{name} {value}' for name, value in figures.items())}".rstrip(), flush=True)

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        """Print without breaking the bar, and also where there is none."""
        if self.on_terminal:
            super().print(*args, sep=sep, **kwargs)
        elif bar_is_enabled(self):
            print(*args, sep=sep, **kwargs)


def steps_of_run(trainer: Trainer) -> int | None:
    """Return the training steps of the whole run; None if nothing bounds it.

    ``max_steps`` counts optimizer steps, and an on-policy training step takes several.
    """
    per_epoch, epochs = trainer.num_training_batches, trainer.max_epochs
    bounds = []
    if epochs is not None and epochs > 0 and not math.isinf(per_epoch):
        bounds.append(int(per_epoch) * epochs)
    if trainer.max_steps is not None and trainer.max_steps > 0:
        per_step = max(aligned(trainer.lightning_module).updates_per_step, 1)
        bounds.append(math.ceil(trainer.max_steps / per_step))
    return min(bounds) if bounds else None


def clock_time(seconds: float) -> str:
    """Return seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
