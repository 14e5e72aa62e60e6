"""Show the progress of a run: one live line on a terminal, otherwise a printed line every ten seconds."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar as Bar
from rich.table import Table
from rich.text import Text

from rlhf_lightning.runs.run import aligned, updates_of

SECONDS_BETWEEN_LINES = 10.0
BAR_WIDTH = 20
COMPARED = ("loss", "reward_accuracy", "reward_margin", "score", "kl", "length", "eos_rate")
"""Validation metrics that are comparable between objectives; printed if they are logged."""


class RunProgress(ProgressBar):
    """Show loss, tokens per second, elapsed and remaining time of the whole run.

    Args:
        seconds: seconds between two lines without a terminal.
        clock: returns the time in seconds.
    """

    def __init__(self, seconds: float = SECONDS_BETWEEN_LINES, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self.seconds = seconds
        self.clock = clock
        self.on_terminal = sys.stdout.isatty()
        self._enabled = True
        self._live: Live | None = None
        self._training: Table | None = None
        self._began = self._printed = clock()
        self._tokens_before = 0
        self._steps = 0

    def enable(self) -> None:
        """Show progress."""
        self._enabled = True

    def disable(self) -> None:
        """Show nothing; Lightning calls this on all ranks except zero."""
        self._enabled = False

    def on_train_start(self, *args: Any) -> None:
        """Start the clock."""
        super().on_train_start(*args)
        module: Any = args[1]
        self._began = self._printed = self.clock()
        self._tokens_before, self._steps = aligned(module).tokens, 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step; print a line if it is time for one, or at the end of the run."""
        self._steps += 1
        total = steps_of_run(trainer)
        last = total is not None and self._step(trainer) >= total
        if last or self._is_due():
            figures = {**self._figures(trainer, pl_module), **_shown(trainer.progress_bar_metrics)}
            self._line("training", self._step(trainer), total, figures)

    def on_train_end(self, *args: Any) -> None:
        """Leave the last line on the screen; if a resumed run was already finished, say so."""
        self._release()
        trainer, module = args
        if not self._steps and trainer.ckpt_path is not None:
            self.print(
                f"nothing was left to train: the run had ended at update {updates_of(module)}; to continue it, raise "
                f"trainer.max_epochs (now {trainer.max_epochs}) or trainer.max_steps (now {trainer.max_steps})"
            )

    def _figures(self, trainer: Trainer, module: LightningModule) -> dict[str, str]:
        """Return loss, speed and remaining time as text, as far as they are known."""
        figures: dict[str, str] = {"update": str(updates_of(module))}
        for label, tag in (("loss", "train/loss"), ("score", "rollout/score"), ("KL", "rollout/kl")):
            value = trainer.callback_metrics.get(tag)
            if value is not None:
                figures[label] = f"{float(value):.4g}"
        if "loss" in figures and aligned(module).has_centred_loss:
            figures["loss"] += " (near 0 by construction)"
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
        """Return the number of training steps, including steps before a resume."""
        return trainer.fit_loop.total_batch_idx + 1

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Advance."""
        self._evaluated("validation", args, kwargs)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the comparable metrics of a validation during training in one line."""
        if trainer.state.fn == "validate":
            self._release()
        elif self._live is not None and self._training is not None:
            self._live.update(self._training)  # in place of the line of the validation
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        names = dict.fromkeys((*aligned(pl_module).headline_metrics, *(f"val/{name}" for name in COMPARED)))
        values = {name: trainer.callback_metrics[name] for name in names if name in trainer.callback_metrics}
        shown = [f"{name} {float(value):.4g}" for name, value in values.items() if name.startswith("val/")]
        if shown:
            self.print(f"validation at update {updates_of(pl_module)}: {'  '.join(shown)}")

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Advance."""
        self._evaluated("test", args, kwargs)

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Advance."""
        self._evaluated("prediction", args, kwargs)

    def _evaluated(self, what: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Print the progress of an evaluation if it is time for a line."""
        if not self._is_due():
            return
        trainer, index = args[0], kwargs.get("batch_idx", args[4] if len(args) > 4 else 0)
        batches = {"test": trainer.num_test_batches, "prediction": trainer.num_predict_batches}.get(
            what, trainer.num_val_batches
        )
        total = sum(batches) if isinstance(batches, list) else batches
        self._line(what, index + 1, None if math.isinf(total) else int(total), {})

    def on_test_end(self, *args: Any, **kwargs: Any) -> None:
        """Leave the last line on the screen."""
        self._release()

    def on_predict_end(self, *args: Any, **kwargs: Any) -> None:
        """Leave the last line on the screen."""
        self._release()

    def on_exception(self, *args: Any, **kwargs: Any) -> None:
        """Give the terminal back."""
        self._release()

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        """Give the terminal back."""
        self._release()

    def _is_due(self) -> bool:
        """Whether to draw: always on a terminal, which redraws a few times a second, else every ``seconds``."""
        return self._enabled and (self.on_terminal or self.clock() - self._printed >= self.seconds)

    def _line(self, what: str, step: int, total: int | None, figures: dict[str, str]) -> None:
        """Draw the live line, or print it if there is no terminal."""
        if not self._enabled:
            return
        self._printed = self.clock()
        share = f"{step}/{total} ({100 * step / total:.0f} %)" if total else str(step)
        shown = "  ".join(f"{name} {value}" for name, value in figures.items())
        if not self.on_terminal:
            print(f"{what} {share}  {shown}".rstrip(), flush=True)
            return
        if self._live is None:
            self._live = Live(console=Console(file=sys.stdout, force_terminal=True), refresh_per_second=4)
            self._live.start()
        line = Table.grid(padding=(0, 1))
        bar = [Bar(total=total, completed=step, width=BAR_WIDTH)] if total else []
        line.add_row(Text(f"{what} {share}", no_wrap=True), *bar, Text(shown, no_wrap=True, overflow="ellipsis"))
        self._training = line if what == "training" else self._training
        self._live.update(line)

    def _release(self) -> None:
        """Draw the live line for the last time."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print a line; a live line stays below it."""
        if self._enabled:
            print(*args, **kwargs)


def _shown(metrics: Any) -> dict[str, str]:
    """Return the metrics that a module logs with ``prog_bar=True`` as text."""
    return {name: f"{float(value):.4g}" for name, value in metrics.items()}


def steps_of_run(trainer: Trainer) -> int | None:
    """Return the number of training steps of the whole run; None if it has no limit.

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
