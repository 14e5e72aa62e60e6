"""A command that gets a signal at any moment exits with 75 and a resumable run, or with a status other than 0 and 75.

Moments are counted in calls of Python functions by a trace function, so they do not depend on machine speed.
"""

import contextlib
import gc
import json
import multiprocessing.util
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from forked import forked
from jsonargparse._common import parser_context
from tiny_run import BASIC, UPDATES

from rlhf_lightning.cli import main as rlhf
from rlhf_lightning.cli import terminable
from rlhf_lightning.commands.parsing import in_copied_context
from rlhf_lightning.errors import TerminatedError
from rlhf_lightning.workers import in_forks

FIT = ["fit", *BASIC, "--checkpoint.every_n_updates", "3", "--trainer.enable_progress_bar", "false"]
RESUMABLE = 75
ENDINGS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
FIRST = 100
"""Calls before the signal handlers are installed; before that a signal has its default effect."""


class Moments:
    """Counts the calls of Python functions, and sends this process a signal at some of them.

    Args:
        signals: the calls, and the signal sent at each.
    """

    def __init__(self, signals: Sequence[tuple[int, int]] = ()) -> None:
        self.calls, self.signals = 0, dict(signals)
        if not signals:
            self.signals[-1] = 0

    def __call__(self, frame: Any, event: str, argument: Any) -> None:
        self.calls += 1
        if self.calls in self.signals:
            number = self.signals.pop(self.calls)
            if not self.signals:
                sys.settrace(None)  # the rest runs at full speed
            os.kill(os.getpid(), number)


def run_with(argv: list[str], signals: Sequence[tuple[int, int]] = ()) -> tuple[int, str, int]:
    """Run a command in a fork; return its status (negative: the signal that killed it), output, and number of calls."""

    def work() -> int:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a test run under nohup ignores this signal
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a script ignores this signal
        sys.stdin = open(os.devnull)  # noqa: SIM115 - pytest's own refuses to be read
        moments = Moments(signals)
        sys.settrace(moments)
        try:
            return rlhf(argv)
        finally:
            sys.settrace(None)
            Path("calls").write_text(str(moments.calls))

    Path("calls").unlink(missing_ok=True)
    status, said = forked(work, Path("said"))
    return status, said, int(Path("calls").read_text()) if Path("calls").exists() else 0


def spread(calls: int, count: int) -> list[int]:
    return [FIRST + (calls - FIRST) * place // count for place in range(count)]


def half_made(folder: str = ".") -> list[str]:
    """Return run folders without a manifest, and partial files."""
    runs = [path for path in Path(folder).glob("runs/*/version_*") if not (path / "manifest.json").is_file()]
    return [str(path) for path in (*runs, *Path(folder).rglob("*.partial"), *Path(folder).rglob(".training"))]


def resumes(name: str) -> None:
    status, said, _ = run_with(["fit", "--resume", f"runs/{name}"])
    assert status == 0, said
    manifest = json.loads(Path(f"runs/{name}/version_0/manifest.json").read_text())
    assert manifest["sessions"][-1]["status"] == "finished" and manifest["sessions"][-1]["updates"] == UPDATES
    assert Path(f"runs/{name}/version_0/model/weight.json").is_file()


_calls: dict[tuple[str, ...], int] = {}


def count_of(argv: list[str]) -> int:
    known = tuple(argv[:-1])  # without the name of the run
    if known not in _calls:
        status, said, _calls[known] = run_with(argv)
        assert status == 0, said
    return _calls[known]


@pytest.mark.parametrize("count", [5, pytest.param(60, marks=pytest.mark.slow)])
def test_sigterm_at_any_call_of_fit_exits_75_or_143(count: int) -> None:
    calls, ended = count_of([*FIT, "--run_name", "whole"]), set()
    for number, moment in enumerate(spread(calls, count)):
        status, said, _ = run_with([*FIT, "--run_name", f"cut{number}"], [(moment, signal.SIGTERM)])
        ended.add(status)
        assert status in (RESUMABLE, 128 + signal.SIGTERM), (moment, calls, status, said)
        assert "Traceback" not in said and not half_made(), (moment, half_made(), said)
        if status == RESUMABLE:
            resumes(f"cut{number}")
    assert count < 60 or RESUMABLE in ended


@pytest.mark.parametrize("count", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_ctrl_c_at_any_call_of_fit_exits_130(count: int) -> None:
    calls = count_of([*FIT, "--run_name", "whole"])
    for number, moment in enumerate(spread(calls, count)):
        status, said, _ = run_with([*FIT, "--run_name", f"cut{number}"], [(moment, signal.SIGINT)])
        assert status == 130 and "Traceback" not in said and not half_made(), (moment, status, half_made(), said)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("count", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_two_signals_never_exit_0(count: int, second: int) -> None:
    calls = count_of([*FIT, "--run_name", "whole"])
    for number, moment in enumerate(spread(calls, count)):
        blows = [(moment, signal.SIGTERM), (moment + 150, second)]
        status, said, _ = run_with([*FIT, "--run_name", f"cut{number}"], blows)
        assert status != 0, (moment, said)
        if status == RESUMABLE:
            resumes(f"cut{number}")


def test_a_signal_during_the_last_export_does_not_exit_0(monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny_run import SlopeModule

    export = SlopeModule.export

    def told(self: Any, folder: Any) -> Any:
        if not Path("told").exists():
            Path("told").touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return export(self, folder)

    monkeypatch.setattr(SlopeModule, "export", told)
    status, said, _ = run_with([*FIT, "--run_name", "last"])
    assert status == RESUMABLE and Path("told").exists(), said
    resumes("last")


def test_sigterm_while_data_is_read_leaves_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny_run import NumbersDataModule

    monkeypatch.setattr(NumbersDataModule, "prepare_data", lambda self: os.kill(os.getpid(), signal.SIGTERM))
    status, said, _ = run_with(FIT)
    assert status == 128 + signal.SIGTERM and "rlhf: ended by SIGTERM" in said
    assert not list(Path("runs").rglob("*"))


def test_ctrl_c_names_the_checkpoint_that_remains(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_lightning.runs import ModelExport

    def interrupted(self: Any, trainer: Any, *_: Any) -> None:
        if trainer.lightning_module.updates == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(ModelExport, "on_train_batch_end", interrupted)
    status, said, _ = run_with([*FIT, "--run_name", "cut"])
    assert status == 130
    assert "update_000003.ckpt is complete: `rlhf fit --resume runs/cut/version_0` continues from it" in said


@pytest.mark.parametrize("command", ["generate", "audit", "chat", "validate", "export", "best-of-n"])
def test_other_commands_exit_with_the_signal_status_and_leave_no_partial_file(
    command: str, policy_folder: str, reward_folder: str
) -> None:
    Path("prompts.jsonl").write_text('{"prompt": "a b"}\n' * 6)
    Path("pairs.jsonl").write_text('{"prompt": "a", "chosen": "b c", "rejected": "c"}\n' * 6)
    if command in ("validate", "export"):
        assert run_with([*FIT, "--run_name", "done"])[0] == 0
    few = ["--max_new_tokens", "3"]
    argv = {
        "generate": ["--model", policy_folder, "--prompts", "prompts.jsonl", "--out", "out.jsonl", *few],
        "audit": ["pairs.jsonl", "--json", "report.json"],
        "chat": [policy_folder, *few],
        "validate": ["runs/done"],
        "export": ["runs/done", "--out", "exported", "--import", "tiny_run"],
        "best-of-n": ["--model", policy_folder, "--prompts", "prompts.jsonl", "--out", "out.jsonl", "--scorer",
                      reward_folder, "--n", "2", *few],
    }[command]  # fmt: skip
    status, said, calls = run_with([command, *argv])
    assert status == 0, said
    for moment, number in product(spread(calls, 2), ENDINGS):
        for made in ("out.jsonl", "report.json"):
            Path(made).unlink(missing_ok=True)
        shutil.rmtree("exported", ignore_errors=True)
        status, said, _ = run_with([command, *argv], [(moment, number)])
        assert status == 128 + number and "Traceback" not in said, (moment, number, status, said)
        journals = {"out.jsonl.partial"} if command == "best-of-n" else set()
        assert not set(half_made()) - journals, (moment, number)


def test_an_interrupted_predict_leaves_no_rows_and_suggests_no_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny_run import SlopeModule

    predict = SlopeModule.predict_step

    def stopped_later(self: Any, step: Any, batch_idx: int) -> Any:
        if batch_idx == 1:
            os.kill(os.getpid(), signal.SIGHUP)
        return predict(self, step, batch_idx)

    assert run_with([*FIT, "--run_name", "done"])[0] == 0
    monkeypatch.setattr(SlopeModule, "predict_step", stopped_later)
    status, said, _ = run_with(["predict", "runs/done"])
    assert status == 128 + signal.SIGHUP and not half_made(), said
    assert "--resume" not in said


def test_a_forked_audit_exits_with_the_signal_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_lightning.workers.ALONE", 1)
    monkeypatch.setattr("rlhf_lightning.data.audit.CHUNK", 4)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    Path("pairs.jsonl").write_text('{"prompt": "a", "chosen": "b c", "rejected": "c"}\n' * 400)
    argv = ["audit", "pairs.jsonl", "--json", "report.json"]
    status, said, calls = run_with(argv)
    assert status == 0 and json.loads(Path("report.json").read_text())[0]["read"] == 400, said
    Path("report.json").unlink()
    for moment, number in product(spread(calls, 5)[1:], (signal.SIGTERM, signal.SIGINT)):
        status, said, _ = run_with(argv, [(moment, number)])
        assert status == 128 + number and "Traceback" not in said, (moment, number, calls, status, said)
        assert not Path("report.json").exists()


def test_annotate_exits_with_the_signal_status(monkeypatch: pytest.MonkeyPatch) -> None:
    import uvicorn  # noqa: F401 - imported here, and not again in each fork

    from rlhf_lightning.people import serving

    Path("pairs.jsonl").write_text('{"prompt": "a", "chosen": "b c", "rejected": "c"}\n' * 3)
    argv = ["annotate", "--store", "feedback.db", "--pairs", "pairs.jsonl", "--port", "0"]
    with monkeypatch.context() as patched:
        patched.setattr(serving, "print_urls", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        status, said, calls = run_with(argv)
    assert status == 130, said
    for moment, number in product((*spread(calls, 3), calls + 400), ENDINGS):
        Path("feedback.db").unlink(missing_ok=True)
        status, said, _ = run_with(argv, [(moment, number)])
        assert status == 128 + number and "Traceback" not in said, (moment, number, calls, status, said)
        assert not half_made(), (moment, number)
        status, said, _ = run_with(["annotate", "export", "--store", "feedback.db", "--out", "labels.jsonl"])
        assert status == 1 and ("there is no feedback store" in said or "has no labels" in said), said


def test_serve_exits_with_the_signal_status(policy_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import uvicorn  # noqa: F401 - imported here, and not again in each fork

    from rlhf_lightning.commands import web_server

    argv = ["serve", policy_folder, "--port", "0", "--max_new_tokens", "4"]
    with monkeypatch.context() as patched:
        patched.setattr(web_server, "base_url", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        status, said, calls = run_with(argv)
    assert status == 130, said
    for moment, number in product(spread(calls, 3), ENDINGS):
        status, said, _ = run_with(argv, [(moment, number)])
        assert status == 128 + number and "Traceback" not in said, (moment, number, calls, status, said)

    def soon(*_: Any) -> str:
        threading.Timer(1.0, os.kill, (os.getpid(), number)).start()
        return "here"

    monkeypatch.setattr(web_server, "base_url", soon)
    for number in ENDINGS:
        status, said, _ = run_with(argv)
        assert status == 128 + number and "here/v1" in said and "Traceback" not in said, (number, status, said)


@pytest.mark.parametrize("number", ENDINGS)
@pytest.mark.parametrize("moment", [300, 30_000, 600_000])
def test_a_signal_during_quickstart_never_exits_0(moment: int, number: int) -> None:
    status, said, calls = run_with(["quickstart", "--out", "quick"], [(moment, number)])
    training = status == RESUMABLE and number == signal.SIGTERM
    assert training or status == 128 + number, (moment, calls, status, said)
    assert "Traceback" not in said and not half_made("quick"), half_made("quick")


def test_signal_handlers_are_restored_and_forked_workers_still_die() -> None:
    before = signal.getsignal(signal.SIGTERM)
    received: list[int] = []
    with pytest.raises(TerminatedError), terminable(received):
        assert forked(lambda: os.kill(os.getpid(), signal.SIGTERM), Path("said"))[0] == -signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before and received == [signal.SIGTERM]


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGTERM, TerminatedError), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_in_a_destructor_still_ends_the_command(
    number: int, raised: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    printed: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)

    class Dying:
        def __del__(self) -> None:
            os.kill(os.getpid(), number)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with pytest.raises(raised), terminable([]):
            [Dying()].clear()
            time.sleep(10)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not printed


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), TerminatedError(signal.SIGTERM)])
def test_a_signal_closes_the_parsers_context_managers_in_their_own_context(
    raised: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)

    def left_open(argv: Any) -> None:
        manager = parser_context(parent_parser=None)
        manager.__enter__()
        raise raised

    with pytest.raises(type(raised)) as caught:
        in_copied_context(left_open, [])
    caught.value.__traceback__ = None
    del caught
    gc.collect()
    assert not printed


@pytest.mark.parametrize(("raised", "status"), [(KeyboardInterrupt(), 130), (TerminatedError(signal.SIGTERM), 143)])
def test_an_error_after_a_signal_exits_with_the_signal_status(
    raised: BaseException, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf_lightning.commands import objectives

    def released(argv: Any) -> int:
        try:
            raise raised
        finally:
            raise RuntimeError("release unlocked lock")

    monkeypatch.setattr(objectives, "main", released)
    assert rlhf(["objectives"]) == status


def test_a_signal_suppressed_by_a_library_does_not_exit_0(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_lightning.commands import objectives

    def suppresses(argv: Any) -> int:
        with contextlib.suppress(BaseException):  # as careless code does
            os.kill(os.getpid(), signal.SIGTERM)
        return 0

    monkeypatch.setattr(objectives, "main", suppresses)
    assert run_with(["objectives"])[0] == 128 + signal.SIGTERM


def test_a_fork_ignores_ctrl_c_from_its_first_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_lightning.workers.ALONE", 1)

    def work() -> int:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
        multiprocessing.util.register_after_fork(work, lambda _: os.kill(os.getpid(), signal.SIGINT))
        assert list(in_forks(str, range(8), 2)) == [str(number) for number in range(8)]
        return 0

    status, said = forked(work, Path("said.txt"))
    assert status == 0 and "Traceback" not in said, said
