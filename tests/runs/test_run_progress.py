"""Test progress: plain lines without a terminal, and correct values."""

import re

import pytest
from lightning.pytorch import Trainer
from tiny_run import BASIC, NumbersDataModule, RolloutModule, SlopeModule

from rlhf_lightning.commands.train import run
from rlhf_lightning.modules import CriticFreeModule, DPOModule, GRPOModule, PPOModule, RLOOModule
from rlhf_lightning.runs import RunProgress
from rlhf_lightning.runs import progress as progress_module
from rlhf_lightning.runs.progress import clock_time


class Clock:
    """Each training step takes one second of simulated time."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def fit(module, seconds, **settings):
    clock = Clock()

    class Ticking(type(module)):
        def training_step(self, step, batch_idx):
            clock.now += 1.0
            super().training_step(step, batch_idx)

    module.__class__ = Ticking
    progress = RunProgress(seconds, clock)
    trainer = Trainer(
        logger=False, callbacks=[progress], enable_checkpointing=False, enable_model_summary=False, accelerator="cpu",
        num_sanity_val_steps=0, limit_val_batches=0, **{"max_epochs": 1, **settings},
    )  # fmt: skip
    trainer.fit(module, datamodule=NumbersDataModule())


def test_a_progress_line_is_printed_every_n_seconds(capsys):
    """Each step takes two tokens and one second: 2 tokens/s, and one second left per step."""
    fit(SlopeModule(learning_rate=0.1), seconds=3, max_epochs=2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("training")]
    assert [line.split()[1] for line in lines] == ["3/16", "6/16", "9/16", "12/16", "15/16", "16/16"]
    assert re.fullmatch(r"training 3/16 \(19 %\)  update 3  loss [\d.]+  tokens/s 2  elapsed 0:03  left 0:13", lines[0])
    assert lines[-1].endswith("left 0:00")


def test_a_long_run_prints_few_lines(capsys):
    fit(SlopeModule(learning_rate=0.1), seconds=60, max_epochs=20)
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("training")]) == 3


def test_max_steps_bounds_the_number_of_rollouts(capsys):
    """Three updates per rollout and at most 12 updates give four steps."""

    class Counted(RolloutModule):
        updates_per_step = 3

    fit(Counted(learning_rate=0.1), seconds=1, max_epochs=-1, max_steps=12)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("training")]
    assert [line.split()[1] for line in lines] == ["1/4", "2/4", "3/4", "4/4"]
    assert "update 6 " in lines[1]


def test_a_terminal_gets_one_line_updated_in_place(capsys, monkeypatch):
    """Other lines are printed above it; it is redrawn in place, and stays when the run ends."""
    monkeypatch.setattr(progress_module.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    run(["fit", *BASIC, "--trainer.max_epochs", "2"])
    shown = capsys.readouterr().out
    lines = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line).strip() for line in re.split(r"[\r\n]+", shown)]
    live = [line for line in lines if line.startswith("training")]
    assert "16/16 (100 %)" in live[-1] and "update 16" in live[-1] and "left 0:00" in live[-1]
    assert "\x1b[2K" in shown, "the line is erased before it is drawn again"
    assert [line for line in lines if line.startswith("validation at update 16: ")], "it does not break other lines"
    assert shown.rstrip().endswith("\x1b[?25h") or "\x1b[?25h" in shown, "the cursor is shown again"


def test_a_failed_run_restores_the_terminal(capsys, monkeypatch):
    monkeypatch.setattr(progress_module.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(SlopeModule, "crash_at", 3)
    with pytest.raises(RuntimeError, match="machine"):
        run(["fit", *BASIC])
    shown = capsys.readouterr().out
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1


def test_a_centred_loss_is_marked_as_near_zero_by_construction(capsys):
    class Centred(SlopeModule):
        has_centred_loss = True

    fit(Centred(learning_rate=0.1), seconds=3)
    assert re.search(r"loss [\d.e-]+ \(near 0 by construction\)", capsys.readouterr().out)


def test_objectives_with_centred_advantages_have_a_centred_loss():
    common = {"init_from": "unread", "scorer": len}
    assert GRPOModule(**common).has_centred_loss and RLOOModule(**common).has_centred_loss
    assert not CriticFreeModule(**common, baseline="greedy").has_centred_loss
    assert not PPOModule(**common).has_centred_loss and not DPOModule(init_from="unread").has_centred_loss


def test_enable_progress_bar_false_prints_no_progress(capsys):
    run(["fit", *BASIC, "--trainer.enable_progress_bar", "false"])
    assert "training" not in capsys.readouterr().out


def test_progress_of_a_resumed_run_continues(capsys):
    first = run(["fit", *BASIC])
    capsys.readouterr()
    run(["fit", "--resume", str(first.folder), "--trainer.max_epochs", "2"])
    assert "training 16/16 (100 %)  update 16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3599, "59:59"), (3661, "1:01:01")]
)
def test_seconds_are_shown_as_clock_time(seconds, shown):
    assert clock_time(seconds) == shown
