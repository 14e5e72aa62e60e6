"""Run folders, manifests and exports."""

import json
import subprocess
from pathlib import Path
from threading import Thread

import pytest
import tiny_run
from conftest import refused
from tiny_run import BASIC, rows_of

from rlhf_lightning.commands.train import run
from rlhf_lightning.data.canonical import Report
from rlhf_lightning.runs import ModelExport, PredictionWriter
from rlhf_lightning.runs.manifest import describe_data, git_state
from rlhf_lightning.runs.run import checked_run_name, find_run, reserve_version


def test_version_numbers_increase_past_gaps():
    assert reserve_version(Path("runs"), "a").name == "version_0"
    (Path("runs") / "a" / "version_7").mkdir()
    (Path("runs") / "a" / "version_x").mkdir()
    assert reserve_version(Path("runs"), "a").name == "version_8"


def test_concurrent_runs_get_different_folders():
    found = []
    threads = [Thread(target=lambda: found.append(reserve_version(Path("runs"), "a"))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(int(path.name.removeprefix("version_")) for path in found) == list(range(16))


@pytest.mark.parametrize("name", ["..", "../x", "/x", "a//b", "a/", "a\\b", "a b", "", ".", "-rf", "a\n"])
def test_invalid_run_names_are_refused(name):
    with refused("invalid-run-name", "run_name is"):
        checked_run_name(name)


@pytest.mark.parametrize("name", ["dpo", "dpo/beta=0.1", "2026-01-31_a+b", "größe"])
def test_valid_run_names_are_accepted(name):
    assert checked_run_name(name) == name


def test_a_missing_run_is_refused_with_the_existing_names():
    reserve_version(Path("runs"), "dpo")
    with refused("unknown-run", "no run found at dop; the runs are runs/dpo"):
        find_run("dop")


def test_the_manifest_records_command_versions_and_data():
    cli = run(["fit", *BASIC, "--seed_everything", "7"])
    manifest = json.loads((cli.folder / "manifest.json").read_text())
    assert manifest["subcommand"] == "fit" and manifest["model"] == "tiny_run.SlopeModule" and manifest["seed"] == 7
    assert manifest["packages"]["torch"].startswith("2.") and {"lightning", "transformers"} <= set(manifest["packages"])
    assert manifest["data"] == {
        "class": "tiny_run.NumbersDataModule", "fingerprint": "numbers-16", "report": {"read": 16, "kept": 16},
    }  # fmt: skip
    assert manifest["parameters"] == {"total": 1, "trained": 1}
    (session,) = manifest["sessions"]
    assert session["command"].startswith("rlhf fit --model tiny_run.SlopeModule") and session["updates"] == 8
    assert session["status"] == "finished" and session["started"] <= session["ended"]


def test_the_manifest_records_why_a_run_ended(monkeypatch):
    monkeypatch.setattr(tiny_run.SlopeModule, "crash_at", 5)
    with pytest.raises(RuntimeError):
        run(["fit", *BASIC])
    (session,) = json.loads(Path("runs/slope/version_0/manifest.json").read_text())["sessions"]
    assert (session["status"], session["updates"]) == ("RuntimeError: the machine is gone", 5)


def test_environment_secrets_are_not_written(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    folder = run(["fit", *BASIC]).folder
    for path in folder.rglob("*"):
        if path.is_file():
            assert b"hf_verysecret" not in path.read_bytes()


def test_the_git_state_has_commit_branch_and_changes(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    assert git_state(tmp_path) is None
    git("init", "-b", "main")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "first")
    state = git_state(tmp_path)
    assert state["branch"] == "main" and len(state["commit"]) == 40 and state["changed_files"] == 0
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path)["changed_files"] == 1


def test_the_data_report_is_written_as_counts():
    class Data:
        report, fingerprint = Report(read=3, kept=2, dropped={"empty_prompt": 1}), "abc"

    described = describe_data(Data())
    assert described["report"]["dropped"] == {"empty_prompt": 1} and described["fingerprint"] == "abc"
    assert json.dumps(described)


def test_the_model_is_exported_during_and_after_training():
    folder = run(["fit", *BASIC, "--export.every_n_updates", "3"]).folder
    weights = [json.loads(path.read_text()) for path in sorted(folder.glob("exports/*/weight.json"))]
    assert [path.name for path in sorted((folder / "exports").iterdir())] == ["update_000003", "update_000006"]
    last = json.loads((folder / "model" / "weight.json").read_text())
    assert 0 < weights[0] < weights[1] < last


def test_export_can_be_switched_off():
    folder = run(["fit", *BASIC, "--export.enabled", "false", "--export.every_n_updates", "3"]).folder
    assert not (folder / "model").exists() and not (folder / "exports").exists()


def test_an_invalid_export_period_is_refused():
    with refused("setting-out-of-range", "export.every_n_updates is 0"):
        ModelExport(every_n_updates=0)


def test_rows_of_several_ranks_are_joined_in_order():
    """Two ranks wrote their parts; rank zero ends."""

    class Strategy:
        def barrier(self, name):
            pass

    class Rank:
        world_size, strategy = 2, Strategy()

        def __init__(self, number):
            self.global_rank, self.is_global_zero = number, number == 0

    writers = [PredictionWriter("out/rows.jsonl") for _ in range(2)]
    for number, writer in enumerate(writers):
        writer.on_predict_start(Rank(number), None)
        for batch in range(2):
            writer.on_predict_batch_end(Rank(number), None, [{"rank": number, "batch": batch}], None, batch)
        writer.on_predict_batch_end(Rank(number), None, None, None, 2)
    assert not Path("out/rows.jsonl").exists()
    writers[1].on_predict_end(Rank(1), None)
    writers[0].on_predict_end(Rank(0), None)
    assert [(row["rank"], row["batch"]) for row in rows_of(Path("out/rows.jsonl"))] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [path.name for path in Path("out").iterdir()] == ["rows.jsonl"]
