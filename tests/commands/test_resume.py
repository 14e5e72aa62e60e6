"""A run that is interrupted anywhere and resumed equals the uninterrupted run: samples, logs, exports."""

import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import refused
from tiny_run import BASIC, UPDATES, SlopeModule, events_of, scalars_of

from rlhf_lightning.cli import main as rlhf
from rlhf_lightning.commands.train import run
from rlhf_lightning.runs import ModelExport
from rlhf_lightning.runs.checkpoint_files import damage, last_checkpoint, link
from rlhf_lightning.runs.interruptions import PREEMPTED
from rlhf_lightning.runs.run import acquire_lock
from rlhf_lightning.training import checkpoint_state


class Gone(Exception):
    """Raised to stop a run in the middle."""


class DrawingModule(SlopeModule):
    """Adds draws of every generator to each gradient, and reads properties that make Lightning lose the
    data position.
    """

    def configure_optimizers(self) -> Any:
        assert self.trainer.estimated_stepping_batches > 0
        return super().configure_optimizers()

    def loss_sum(self, batch: Any, meter: Any) -> torch.Tensor:
        drawn = random.random() + float(np.random.rand()) + float(torch.rand(()))
        return super().loss_sum(batch, meter) + drawn * self.line.weight.sum()


@contextmanager
def at_call(monkeypatch: pytest.MonkeyPatch, hook: str, times: int, fault: Callable[[], None]) -> Iterator[None]:
    """Inject a fault when a hook is called for the ``times``-th time, before it does anything."""
    original, left = getattr(ModelExport, hook), [times]

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            fault()
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(ModelExport, hook, counted)
        yield


def ends_before(monkeypatch: pytest.MonkeyPatch, hook: str, times: int, argv: list[str]) -> bool:
    """Start a run that dies when a hook is called for the ``times``-th time; return whether it got that far."""

    def die() -> None:
        raise Gone

    with at_call(monkeypatch, hook, times, die):
        try:
            run(argv)
        except Gone:
            return True
    return False


def told_to_stop(monkeypatch: pytest.MonkeyPatch, hook: str, times: int, argv: list[str]) -> Any:
    """Start a run that gets SIGTERM when a hook is called for the ``times``-th time; return the exit status."""
    fault = partial(os.kill, os.getpid(), signal.SIGTERM)
    with at_call(monkeypatch, hook, times, fault), pytest.raises(SystemExit) as status:
        rlhf(argv)
    return status.value.code


def assert_same(whole: Path, resumed: Path) -> None:
    states = [torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (whole, resumed)]
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "progress", "callbacks"):
        assert repr(states[0][part]) == repr(states[1][part]), part
    assert (whole / "model" / "weight.json").read_text() == (resumed / "model" / "weight.json").read_text()
    one, other = (
        [tag for tag in events_of(run).Tags()["scalars"] if not tag.startswith("perf/")]  # perf/ metrics depend on time
        for run in (whole, resumed)
    )
    assert one == other and "vs_tokens/train/loss" in one
    for tag in one:
        assert scalars_of(whole, tag) == scalars_of(resumed, tag), tag
    assert (whole / "samples.jsonl").read_bytes() == (resumed / "samples.jsonl").read_bytes()


DRAWING = ["fit", *BASIC, "--model", f"{__name__}.DrawingModule"]
OFTEN = ["--checkpoint.every_n_updates", "1", "--samples.every_n_updates", "3", "--trainer.log_every_n_steps", "3"]
BLIND = ["--trainer.limit_val_batches", "0"]
RUNS = {
    "validated": ["--trainer.max_epochs", "2"],
    "validated within epochs": ["--trainer.max_epochs", "2", "--trainer.val_check_interval", "3"],
    "not validated": ["--trainer.max_epochs", "3", *BLIND],
    "bounded by steps": ["--trainer.max_epochs", "-1", "--trainer.max_steps", str(UPDATES + 3), *BLIND],
    "rarely saved": [
        "--trainer.max_epochs", "2", "--checkpoint.every_n_updates", "5", "--checkpoint.after_validation", "false",
    ],
}  # fmt: skip
PLACES = [
    ("on_train_batch_end", 6), ("on_train_batch_end", UPDATES), ("on_train_batch_end", UPDATES + 1),
    ("on_validation_batch_end", 3), ("on_validation_end", 1), ("on_train_epoch_end", 1), ("on_train_epoch_start", 2),
    ("on_train_end", 1),
]  # fmt: skip


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_killed_at_any_hook_resumes_bit_identically(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = [*DRAWING, *OFTEN, *RUNS[kind]]
    whole, cut = run([*argv, "--run_name", "whole"]).folder, 0
    for number, (hook, times) in enumerate(PLACES):
        name = f"cut{number}"
        if ends_before(monkeypatch, hook, times, [*argv, "--run_name", name]):
            assert_same(whole, run(["fit", "--resume", f"runs/{name}"]).folder)
            cut += 1
    assert cut >= 4


def test_results_are_bit_identical_for_equal_seeds_only() -> None:
    folders = [run([*DRAWING, *OFTEN, "--run_name", name]).folder for name in ("one", "two")]
    assert_same(*folders)
    other = run([*DRAWING, *OFTEN, "--run_name", "other", "--seed_everything", "1"]).folder
    assert (other / "model" / "weight.json").read_text() != (folders[0] / "model" / "weight.json").read_text()


# -- damaged checkpoints ----------------------------------------------------------------------------------------------


def altered(file: Path) -> None:
    content = bytearray(file.read_bytes())
    place = content.index(b"learning_rate") if b"learning_rate" in content else len(content) // 3
    content[place : place + 4] = b"\0\0\0\0"
    file.write_bytes(content)


def cut_short(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def emptied(file: Path) -> None:
    os.truncate(file, 0)


@pytest.mark.parametrize("harm", [altered, cut_short, emptied])
def test_resume_skips_a_damaged_checkpoint_with_one_line(harm: Any, monkeypatch: Any, capsys: Any) -> None:
    argv = [*DRAWING, *OFTEN, "--trainer.max_epochs", "2"]
    whole = run([*argv, "--run_name", "whole"]).folder
    assert ends_before(monkeypatch, "on_train_batch_end", 6, [*argv, "--run_name", "cut"])
    folder = Path("runs/cut/version_0/checkpoints")
    harm(folder / "update_000005.ckpt")  # last.ckpt is the same file
    with pytest.raises(SystemExit) as status:
        rlhf(["fit", *argv[1:], "--ckpt_path", str(folder / "update_000005.ckpt")])
    assert status.value.code == 2 and "update_000005.ckpt is damaged: it" in capsys.readouterr().err
    resumed = run(["fit", "--resume", "runs/cut"])
    told = [line for line in capsys.readouterr().out.splitlines() if "damaged" in line]
    assert len(told) == 1 and told[0].startswith(f"damaged in {folder}: last.ckpt (it")
    assert told[0].endswith("; update_000004.ckpt is the newest complete checkpoint")
    assert_same(whole, resumed.folder)


def test_without_a_complete_checkpoint_resume_is_refused(monkeypatch: Any, capsys: Any) -> None:
    assert ends_before(monkeypatch, "on_train_batch_end", 6, [*DRAWING, *OFTEN, "--run_name", "cut"])
    for file in Path("runs/cut/version_0/checkpoints").glob("update*"):
        cut_short(file)
    assert rlhf(["fit", "--resume", "runs/cut"]) == 1
    assert "runs/cut/version_0 has no complete checkpoint to resume from: last.ckpt" in capsys.readouterr().err
    assert [path.name for path in Path("runs/cut").iterdir()] == ["version_0"]


def test_resuming_an_earlier_checkpoint_deletes_later_ones() -> None:
    first = run([*DRAWING, *OFTEN, "--checkpoint.keep_last", "null"]).folder
    earlier = str(first / "checkpoints" / "update_000003.ckpt")
    again = run(["fit", "--resume", str(first), "--ckpt_path", earlier, "--trainer.max_steps", "5"])
    names = sorted(path.name for path in (first / "checkpoints").glob("update*"))
    assert names == [f"update_00000{n}.ckpt" for n in range(1, 6)] and again.model.updates == 5
    assert [step for step, _ in scalars_of(first, "vs_episodes/train/loss")] == [6]
    assert (first / "checkpoints" / "last.ckpt").samefile(first / "checkpoints" / "update_000005.ckpt")


@pytest.mark.parametrize("chosen", [True, False], ids=["chosen", "killed before the link"])
def test_later_checkpoints_are_deleted_before_logs_are_truncated(chosen: bool, monkeypatch: Any) -> None:
    argv = [*DRAWING, *OFTEN, "--trainer.max_epochs", "2"]
    whole = run([*argv, "--run_name", "whole"]).folder
    assert ends_before(monkeypatch, "on_train_batch_end", 6, [*argv, "--run_name", "cut"])
    folder = Path("runs/cut/version_0/checkpoints")
    earlier = folder / "update_000004.ckpt"
    if chosen:
        resume = ["fit", "--resume", "runs/cut", "--ckpt_path", str(earlier)]
    else:
        link(earlier, folder / "last.ckpt")
        resume = ["fit", "--resume", "runs/cut"]
    assert ends_before(monkeypatch, "on_train_batch_end", 1, resume), "before it has a checkpoint of its own"
    assert last_checkpoint(folder.parent).samefile(earlier)
    assert sorted(path.name for path in folder.glob("update*")) == ["update_000004.ckpt"]
    assert_same(whole, run(["fit", "--resume", "runs/cut"]).folder)


def test_a_replaced_checkpoint_is_deleted_on_resume(monkeypatch: Any) -> None:
    """The run gets SIGTERM before a validation, then is killed between the following save and the
    update of the link.
    """
    argv = [*DRAWING, "--trainer.max_epochs", "2"]
    whole = run([*argv, "--run_name", "whole"]).folder
    told_to_stop(monkeypatch, "on_validation_batch_end", 1, [*argv, "--run_name", "cut"])
    folder = Path("runs/cut/version_0/checkpoints")
    with monkeypatch.context() as patched:
        resumed = []

        def gone(target: Path, name: Path) -> None:
            if resumed:
                raise Gone
            resumed.append(link(target, name))

        patched.setattr("rlhf_lightning.runs.checkpoint.link", gone)
        with pytest.raises(Gone):
            run(["fit", "--resume", "runs/cut"])
    update = folder / f"update_{UPDATES:06d}.ckpt"
    assert not update.samefile(folder / "last.ckpt")
    assert ends_before(monkeypatch, "on_validation_batch_end", 1, ["fit", "--resume", "runs/cut"])
    assert update.samefile(folder / "last.ckpt")
    assert_same(whole, run(["fit", "--resume", "runs/cut"]).folder)


def test_every_bit_flip_in_a_checkpoint_is_reported_as_damage(monkeypatch: Any) -> None:
    """Header bits describe the packing of a part; any change of them is reported as damage."""
    assert ends_before(monkeypatch, "on_train_batch_end", 2, [*DRAWING, *OFTEN, "--run_name", "cut"])
    file = last_checkpoint(Path("runs/cut/version_0"))
    content, places = file.read_bytes(), []
    for mark in (b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"):
        start = content.index(mark)
        places += range(start, min(start + 46, len(content)))
    told = set()
    for place in places:
        for bit in range(8):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            file.write_bytes(changed)
            told.add(damage(file))
    assert "it is truncated, or not a checkpoint" in told


def test_the_run_lock_admits_one_training_process(monkeypatch: Any, capsys: Any) -> None:
    assert ends_before(monkeypatch, "on_train_batch_end", 3, [*DRAWING, *OFTEN, "--run_name", "cut"])
    folder = Path("runs/cut/version_0")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    ready, wait = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _lock = acquire_lock(folder)
            os.write(ready[1], b"1")
            os.read(wait[0], 1)
        finally:
            os._exit(0)
    os.close(ready[1])
    assert os.read(ready[0], 1) == b"1"
    try:
        assert rlhf(["fit", "--resume", "runs/cut"]) == 1
    finally:
        os.write(wait[1], b"1")
        os.waitpid(child, 0)
    assert "run folder runs/cut/version_0 is locked by another training process" in capsys.readouterr().err
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".training"}
    assert after == {path: time for path, time in before.items() if path.name != ".training"}
    assert run(["fit", "--resume", "runs/cut/"]).model.updates == UPDATES


# -- told to stop -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hook", "times", "updates"),
    [("on_train_batch_end", 3, 3), ("on_train_batch_end", UPDATES, UPDATES), ("on_validation_batch_end", 2, UPDATES),
     ("on_validation_end", 1, UPDATES)],
)  # fmt: skip
def test_sigterm_saves_a_checkpoint_and_says_how_to_resume(
    hook: str, times: int, updates: int, monkeypatch: Any, capsys: Any
) -> None:
    argv = [*DRAWING, "--trainer.max_epochs", "2", "--samples.every_n_updates", "3"]
    whole = run([*argv, "--run_name", "whole"]).folder
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert told_to_stop(monkeypatch, hook, times, [*argv, "--run_name", "cut"]) == PREEMPTED == 75
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        f"SIGTERM: stopped after {updates} updates, runs/cut/version_0/checkpoints/update_{updates:06d}.ckpt is "
        "written; `rlhf fit --resume runs/cut/version_0` continues from it"
    )
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    manifest = json.loads(Path("runs/cut/version_0/manifest.json").read_text())
    assert manifest["sessions"][-1]["status"].startswith("PreemptedError: SIGTERM")
    assert_same(whole, run(["fit", "--resume", "runs/cut"]).folder)


def test_sigterm_during_the_first_samples_leaves_a_resumable_run(monkeypatch: Any, capsys: Any) -> None:
    argv = [*DRAWING, "--trainer.max_epochs", "2", "--samples.every_n_updates", "3"]
    whole = run([*argv, "--run_name", "whole"]).folder
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    answer, told = SlopeModule.answer, iter([True])

    def tells(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(told, False):
            os.kill(os.getpid(), signal.SIGTERM)
        return answer(self, *args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as status:
        patched.setattr(SlopeModule, "answer", tells)
        rlhf([*argv, "--run_name", "cut"])
    assert status.value.code == PREEMPTED
    assert (
        capsys.readouterr()
        .out.splitlines()[-1]
        .startswith("SIGTERM: stopped after 0 updates, runs/cut/version_0/checkpoints/update_000000.ckpt is written")
    )
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert_same(whole, run(["fit", "--resume", "runs/cut"]).folder)


@pytest.mark.parametrize("further", [[], ["--checkpoint.after_validation", "false"]])
@pytest.mark.parametrize("updates", [1, 3, UPDATES - 1, UPDATES, UPDATES + 1, 2 * UPDATES - 1])
def test_an_early_stop_does_not_change_which_checkpoints_are_kept(
    updates: int, further: list[str], monkeypatch: Any
) -> None:
    argv = [*DRAWING, "--trainer.max_epochs", "2", "--trainer.val_check_interval", "4", *further]
    argv += ["--checkpoint.every_n_updates", "2"]
    whole = run([*argv, "--run_name", "whole"]).folder
    told_to_stop(monkeypatch, "on_train_batch_end", updates, [*argv, "--run_name", "cut"])
    stopped = Path("runs/cut/version_0/checkpoints")
    before = sorted(file.name for file in stopped.glob("update_*.ckpt"))
    assert f"update_{updates:06d}.ckpt" in before
    resumed = run(["fit", "--resume", "runs/cut"]).folder
    assert_same(whole, resumed)
    names = [sorted(file.name for file in (folder / "checkpoints").iterdir()) for folder in (whole, resumed)]
    assert names[0] == names[1]


def test_a_validation_missed_before_resume_runs_exactly_once(monkeypatch: Any) -> None:
    """The run gets SIGTERM before a validation, is resumed, and is killed after it: the checkpoint records the
    validation.
    """
    argv = [*DRAWING, "--trainer.max_epochs", "2", "--trainer.val_check_interval", "3"]
    whole = run([*argv, "--run_name", "whole"]).folder
    told_to_stop(monkeypatch, "on_validation_batch_end", 1, [*argv, "--run_name", "cut"])
    assert ends_before(monkeypatch, "on_train_batch_end", 1, ["fit", "--resume", "runs/cut"])
    assert_same(whole, run(["fit", "--resume", "runs/cut"]).folder)


def in_a_child(work: Any) -> int:
    """Run a function in a forked child, and return how the child ended."""
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_kills_the_run_immediately(second: signal.Signals, monkeypatch: Any) -> None:
    def told(self: Any, *args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), second)

    monkeypatch.setattr(ModelExport, "on_train_batch_end", told)
    assert in_a_child(lambda: run(DRAWING)) == -second


def test_a_signal_during_a_checkpoint_write_takes_effect_after_it(monkeypatch: Any) -> None:
    def told(self: Any, *args: Any, **kwargs: Any) -> None:
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ModelExport, "on_save_checkpoint", told)
    with pytest.raises(SystemExit):
        run([*DRAWING, *OFTEN])
    folder = Path("runs/drawing/version_0/checkpoints")
    assert last_checkpoint(folder.parent).samefile(folder / "update_000002.ckpt")
    assert not list(folder.glob(".*"))


# -- another number of ranks ------------------------------------------------------------------------------------------


class Module(torch.nn.Module):
    """The parts of a module that random number handling needs."""

    device_mesh = None

    def __init__(self, ranks: int, rank: int, dropout: float) -> None:
        super().__init__()
        self.global_rank, self.device, self.drop = rank, torch.device("cpu"), torch.nn.Dropout(dropout)
        self.trainer = SimpleNamespace(world_size=ranks, fit_loop=SimpleNamespace(_combined_loader_states_to_load=[]))

    def resume(self) -> None:
        """Start a run from a checkpoint written by 2 ranks."""
        module: Any = self
        state = checkpoint_state.ResumeState()
        state.restore(module, {"random": [checkpoint_state.random_state(self.device) for _ in range(2)]})
        state.begin(module, seed=0, updates=7)


def test_random_states_of_new_ranks_differ() -> None:
    drawn = set()
    for rank in range(4):
        Module(4, rank, 0.0).resume()
        drawn.add((random.random(), float(np.random.rand()), float(torch.rand(()))))
    assert len({numbers[0] for numbers in drawn}) == len({numbers[2] for numbers in drawn}) == 4


def test_with_dropout_another_world_size_is_refused_on_resume() -> None:
    with refused("another-world-size", "was written by 2 ranks and this run has 4"):
        Module(4, 0, 0.1).resume()
    Module(2, 0, 0.1).resume()
