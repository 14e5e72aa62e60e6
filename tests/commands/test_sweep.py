"""Test `rlhf sweep`: arms and seeds, resuming after kills, status 75, named failures, and the SLURM script."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import refused

from rlhf_lightning.commands import sweep as room
from rlhf_lightning.commands.sweep import main, planned_runs, state_of

FAKE = """
import json, os, signal, sys, time
flags = dict(flag.lstrip("-").split("=", 1) for flag in sys.argv[1:] if "=" in flag)
if "model.bta" in flags:
    print("rlhf fit: unknown setting model.bta\\n`rlhf fit --help` lists the options.")
    sys.exit(2)
resumed = sys.argv[3] if sys.argv[2] == "--resume" else None
folder = resumed or os.path.join(flags["runs_folder"], flags["run_name"], "version_0")
os.makedirs(folder + "/checkpoints", exist_ok=True)
open(folder + "/config.yaml", "w").write(json.dumps(flags))
def end(status, code):
    record = {"subcommand": "fit", "sessions": [{"status": status}]}
    open(folder + "/manifest.json", "w").write(json.dumps(record))
    sys.exit(code)
if "slow" in folder and not resumed:
    signal.signal(signal.SIGTERM, lambda *_: end("preempted", 75))
    open(folder + "/waits", "w")
    time.sleep(60)
if "preempted" in folder and not resumed:
    end("preempted", 75)
if "broken" in folder and not os.path.exists("mended"):
    print("rlhf: the loss is not finite\\n`rlhf fit --help` lists the options.")
    end("failed", 1)
end("finished", 0)
"""


@pytest.fixture(autouse=True)
def fake_training(tmp_path, monkeypatch):
    """Replace `rlhf fit` by a script that behaves as the folder's name says: preempted, broken or slow."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "rlhf_lightning.py").write_text(FAKE)
    (tmp_path / "c.yaml").write_text("model: {beta: 1}\n")
    starter = tmp_path / "python"
    starter.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} {tmp_path}/fake/rlhf_lightning.py "$@"\n')
    starter.chmod(0o755)
    monkeypatch.setattr(room.sys, "executable", str(starter))
    monkeypatch.setattr("rlhf_lightning.runs.checkpoint_files.last_checkpoint", lambda run: run)


def status_of(name: str) -> str:
    return state_of(Path("s"), room.PlannedRun(name, {}, 0))[0]


def test_a_grid_runs_every_combination_with_every_seed():
    runs = planned_runs([("model.beta", ".1,.2"), ("model.loss", "[a, '0,1']")], 2)
    assert len(runs) == 8 and len({run.name for run in runs}) == 8
    assert runs[0].name == "beta=.1+loss=a/seed_0" and runs[1].settings == {"model.beta": ".1", "model.loss": "0,1"}
    assert [run.seed for run in runs] == [0] * 4 + [1] * 4
    assert [run.name for run in planned_runs([], 2)] == ["arm/seed_0", "arm/seed_1"]


@pytest.mark.parametrize(
    ("over", "draws", "code"),
    [("model.a=1..1.0001", 9, "range-too-narrow"), ("model.a=-1e400..1", 2, "bad-assignment"),
     ("model.a=1..1e400", 2, "bad-assignment"), ("model.a=-1e308..1e308", 2, "bad-assignment"),
     ("model.a=[]", 2, "bad-assignment"), ("model.a=0..1", 10**9, "too-many-runs")],
)  # fmt: skip
def test_invalid_ranges_are_refused(over, draws, code):
    with refused(code):
        planned_runs([tuple(over.split("=", 1))], 1, draws)


def test_random_arms_are_deterministic_and_more_draws_extend_them():
    over = [("model.lr", "log:1e-5..1e-3"), ("model.beta", "0..1"), ("model.kind", "a,b")]
    few, more = planned_runs(over, 1, 3), planned_runs(over, 1, 6)
    assert more[:3] == few and len({run.name for run in more}) == 6
    assert all(1e-5 <= float(run.settings["model.lr"]) <= 1e-3 for run in more)
    assert len(planned_runs([("model.kind", "a,b")], 1, 9)) == 2


@pytest.mark.parametrize(
    ("over", "code"),
    [("model.beta", "bad-assignment"), ("run_name=x", "bad-assignment"), ("model.beta=1,,2", "bad-assignment"),
     ("model.beta=0..1", "range-without-random"), ("model.a=x y,x;y", "ambiguous-arms"),
     ("model.a=[]", "bad-assignment"),
     ("model.a=" + ",".join(map(str, range(10_001))), "too-many-runs")],
)  # fmt: skip
def test_invalid_sweeps_are_refused(over, code):
    with refused(code):
        room.sweep("c.yaml", over=[over], out="s")


def test_preempted_runs_are_resumed_and_failed_runs_named(capsys):
    argv = ["c.yaml", "--over", "model.kind=fine,preempted,broken", "--seeds", "2", "--jobs", "2", "--out", "s"]
    assert main(argv) == 1
    said = capsys.readouterr().out
    assert "4 of 6 runs finished, 2 failed, 0 open" in said and "resuming kind=preempted/seed_0" in said
    assert "failed: kind=broken/seed_1, exit status 1: rlhf: the loss is not finite" in said
    Path("mended").touch()
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "6 of 6 runs finished" in said and "kind=fine" not in said.split("\n\n")[0]


def test_settings_that_the_first_run_refuses_stop_the_sweep(capsys):
    """The corrected sweep may take the folder, since nothing was trained."""
    argv = ["c.yaml", "--over", "model.kind=a,b", "--seeds", "2", "--out", "s", "--set"]
    assert main([*argv, "model.bta=1"]) == 1
    said = capsys.readouterr().out
    assert "0 of 4 runs finished, 1 failed, 3 open" in said and said.count("training") == 1
    assert "failed: kind=a/seed_0, exit status 2: rlhf fit: unknown setting model.bta" in said
    assert "no further run was started" in said and "the same command" not in said
    assert main([*argv, "model.beta=1"]) == 0
    assert main([*argv[:2], "model.kind=a,b,c", *argv[3:], "model.beta=1"]) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stopped_sweep_exits_with_75_and_continues(number, capfd):
    argv = ["c.yaml", "--over", "model.kind=slow,fine", "--out", "s"]
    sweep = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(main(argv)))
    sweep.start()
    deadline = time.monotonic() + 60
    while not Path("s/kind=slow/seed_0/version_0/waits").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(sweep.pid, number)
    sweep.join(60)
    assert sweep.exitcode == 75
    assert status_of("kind=slow/seed_0") == "interrupted" and status_of("kind=fine/seed_0") == "new"
    said = capfd.readouterr().out
    assert "interrupted: kind=slow/seed_0" in said and "not started: kind=fine/seed_0" in said
    assert main(argv) == 0
    assert "resuming kind=slow/seed_0" in capfd.readouterr().out


REAL = sys.executable


def test_a_run_locked_by_another_process_is_skipped(capsys):
    from rlhf_lightning.runs.run import acquire_lock

    folder = Path("s/kind=a/seed_0/version_0")
    (folder / "checkpoints").mkdir(parents=True)
    holder = subprocess.Popen(
        [REAL, "-c", "import fcntl, sys, time; f = open(sys.argv[1], 'wb'); fcntl.lockf(f, fcntl.LOCK_EX); "
         "print(1, flush=True); time.sleep(60)", str(folder / ".training")], stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout is not None
    holder.stdout.readline()
    holder.stdout.close()
    try:
        assert main(["c.yaml", "--over", "model.kind=a", "--out", "s"]) == 75
    finally:
        holder.kill()
        holder.wait()
    assert "runs in another process: kind=a/seed_0" in capsys.readouterr().out
    acquire_lock(folder).close()


def test_a_sweep_may_add_runs_but_not_change_its_config(capsys):
    assert main(["c.yaml", "--over", "model.kind=a", "--out", "s"]) == 0
    assert main(["c.yaml", "--over", "model.kind=a,b", "--seeds", "2", "--out", "s"]) == 0
    assert len(json.loads(Path("s/sweep.json").read_text())["runs"]) == 4
    Path("c.yaml").write_text("model: {beta: 2}\n")
    with refused("sweep-changed", "config_text"):
        main(["c.yaml", "--over", "model.kind=a", "--out", "s"])


def test_slurm_script_is_an_array_with_one_task_per_run(monkeypatch, capsys):
    monkeypatch.setattr(room.shutil, "which", lambda name: None)
    argv = ["c.yaml", "--over", "model.kind=a,b", "--seeds", "2", "--out", "s", "--slurm", "--sbatch", "gpus=1"]
    assert main(argv) == 0
    script = Path("s/sweep.sbatch").read_text()
    assert "#SBATCH --array=0-3" in script and "#SBATCH --gpus=1" in script and "--task" in script
    called = []
    monkeypatch.setattr(os, "execv", lambda path, command: called.append(command) or exit(0))
    with pytest.raises(SystemExit):
        main([*argv[:7], "--task", "3"])
    assert "--run_name=kind=b/seed_1" in called[0] and "--seed_everything=1" in called[0]
