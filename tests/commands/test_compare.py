"""Test `rlhf compare`: discovery and grouping of runs, curves over seeds, tests against the first arm,
a complete page.
"""

import json
import os
import re
import struct
from pathlib import Path

import pytest
import yaml
from conftest import refused
from torch.utils.tensorboard import SummaryWriter

from rlhf_lightning.commands.compare import main
from rlhf_lightning.errors import RlhfError
from rlhf_lightning.evaluation.run_curves import RunComparison, read_run, run_folders


def write_run(folder: Path, beta: float, seed: int, status: str = "finished", lr: float = 0.1, every: int = 1) -> Path:
    """Write a run whose score rises to 10 beta + seed, and whose completions contain markup."""
    folder.mkdir(parents=True)
    model = {"class_path": "PPOModule", "init_args": {"beta": beta, "lr": lr, "seed": seed}}
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed_everything": seed, "run_name": "x", "model": model}))
    record = {"subcommand": "fit", "sessions": [{"status": status}]}
    (folder / "manifest.json").write_text(json.dumps(record))
    sample = {"update": 10, "prompt": "ask", "completion": f"<script>{beta}</script>", "score": 1.0, "length": 3}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    writer = SummaryWriter(str(folder))
    for step in range(0, 11, every):
        writer.add_scalar("val/score", (10 * beta + seed) * step / 10, step)
        writer.add_scalar("rollout/score", step, step)
        writer.add_scalar("rollout/kl", step * beta, step)
        writer.add_scalar("vs_tokens/val/score", float(step), step * 100)
    writer.close()
    return folder


@pytest.fixture
def sweep(tmp_path):
    for beta in (0.1, 0.2):
        for seed in range(3):
            write_run(tmp_path / "s" / f"beta={beta}" / f"seed_{seed}" / "version_0", beta, seed, every=1 + seed % 2)
    return tmp_path / "s"


def test_a_report_has_final_values_tests_curves_and_samples_in_one_page(sweep, capsys):
    assert main([str(sweep), "--by", "model.beta"]) == 0
    said = capsys.readouterr().out
    assert "6 runs in 2 arms by model.beta; seeds per arm: 3, 3." in said
    report = json.loads(Path("comparison/report.json").read_text())
    assert report["arms"]["beta=0.1"]["finals"]["val/score"] == pytest.approx({"0": 1.0, "1": 2.0, "2": 3.0})
    assert report["tests"]["val/score"]["beta=0.2"]["mean"] == pytest.approx(1.0)
    page = Path("comparison/report.html").read_text()
    assert "&lt;script&gt;0.2" in page and "<script>0" not in page
    assert page.count("data:image/png;base64,") == 2 and not re.findall(r'(?:src|href)="(?!data:)', page)
    assert Path("comparison/report.md").read_text().count("![") == 2


def test_curves_are_means_over_seeds_on_shared_positions(sweep):
    comparison = RunComparison([read_run(folder) for folder in run_folders([str(sweep)])], ["model.beta"])
    curve = comparison.curve("beta=0.1", "val/score")
    assert curve.x.tolist() == list(range(11)) and curve.mean[-1] == pytest.approx(2.0)
    assert curve.low[-1] < 1 < 3 < curve.high[-1]
    assert RunComparison(comparison.runs, [], "tokens").curve("beta=0.2", "val/score").x[-1] == 1000
    assert comparison.frontier() == ("rollout/kl", "rollout/score")


def test_unfinished_runs_are_left_out_and_named(sweep, capsys):
    write_run(sweep / "beta=0.3" / "seed_0" / "version_0", 0.3, 0, "RuntimeError: out of memory")
    assert main([str(sweep)]) == 0
    said = capsys.readouterr().out
    assert "Left out, not finished:" in said and "out of memory" in said and "beta=0.3" not in said.split("## ")[1]
    assert main([str(sweep), "--unfinished"]) == 0
    said = capsys.readouterr().out
    assert "a single seed" in said and "nan" not in said


def test_two_runs_with_one_seed_in_an_arm_are_refused_with_what_differs(sweep):
    write_run(sweep / "other" / "version_0", 0.1, 0, lr=0.5)
    with refused("repeated-seed", "model.lr"):
        main([str(sweep), "--by", "model.beta"])


def test_arms_that_differ_in_many_settings_are_named_by_their_runs(tmp_path, capsys):
    for name in ("first", "second"):
        for seed in range(2):
            run = write_run(tmp_path / name / f"seed_{seed}" / "version_0", 0.1, seed)
            model = {"class_path": f"{name}.Module", "init_args": {f"setting_{number}": name for number in range(11)}}
            config = {"seed_everything": seed, "run_name": f"{name}/seed_{seed}", "model": model}
            (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert main([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "4 runs in 2 arms by the 12 settings that differ; seeds per arm: 2, 2." in said
    assert "losses of different objectives cannot be compared" in said
    assert set(json.loads(Path("comparison/report.json").read_text())["arms"]) == {"first", "second"}
    assert main([str(tmp_path), "--by", "model.setting_1"]) == 0
    assert set(json.loads(Path("comparison/report.json").read_text())["arms"]) == {
        "setting_1=first",
        "setting_1=second",
    }


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--by", "beta"], ("unknown-setting", "did you mean model.beta?")),
     (["--metrics", "val/scor"], ("unknown-metric", "did you mean val/score?")),
     (["--over", "episodes"], ("unknown-metric",))],
)  # fmt: skip
def test_metrics_and_settings_that_no_run_has_are_refused(sweep, flags, words):
    with refused(*words):
        main([str(sweep), *flags])


def test_metrics_may_be_separated_by_commas(sweep, capsys):
    assert main([str(sweep), "--metrics", "val/score,rollout/kl"]) == 0
    said = capsys.readouterr().out
    assert "val/score" in said and "rollout/kl" in said


def test_folders_without_runs_or_events_are_refused(tmp_path):
    with refused("unknown-run"):
        main([str(tmp_path)])
    (tmp_path / "version_0").mkdir()
    (tmp_path / "version_0" / "config.yaml").write_text("a: 1\n")
    with refused("no-events"):
        main([str(tmp_path / "version_0")])


def damaged(folder: Path, file: str, content: str | bytes | None) -> list[str]:
    """Return the command on a run with a damaged file; None replaces the file by a pipe."""
    run = write_run(folder / "run" / "version_0", 0.1, 0)
    place = next(run.glob("events*")) if file == "events" else run / file
    place.unlink()
    if content is None:
        os.mkfifo(place)
    else:
        place.write_bytes(content.encode() if isinstance(content, str) else content)
    return [str(run)]


def record_of(length: int) -> bytes:
    """Return the start of a TensorBoard record with the given length field."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    head = struct.pack("<Q", length)
    return head + struct.pack("<I", masked_crc32c(head)) + b"x"


SAMPLE = {"update": 1, "prompt": "q", "completion": "a", "score": 1.0}


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("samples.jsonl", "[1]"), ("samples.jsonl", "7\n"), ("samples.jsonl", "{}"), ("samples.jsonl", "[" * 5000),
        *(("samples.jsonl", json.dumps({**SAMPLE, name: value})) for name, value in (
            ("update", "x"), ("prompt", 7), ("prompt", [1]), ("prompt", [{"role": "user"}]), ("completion", None),
            ("score", "high"), ("score", [1]))),
        ("config.yaml", "[1]"), ("config.yaml", "seed_everything: x"), ("config.yaml", "seed_everything: [1]"),
        ("config.yaml", "a: [" * 100), ("manifest.json", "[]"), ("manifest.json", "{"), ("config.yaml", None),
        ("events", b"nonsense"), ("events", None), ("events", record_of(2**62)), ("events", record_of(2**40)),
    ],
)  # fmt: skip
def test_damaged_run_folders_are_refused(tmp_path: Path, file: str, content: str | bytes | None) -> None:
    with pytest.raises(RlhfError):
        main(damaged(tmp_path, file, content))


@pytest.mark.parametrize(
    ("file", "content"),
    [("manifest.json", json.dumps({"sessions": sessions})) for sessions in (7, [], [7], [{}], [{"status": {"a": 1}}])],
)
def test_a_run_without_status_in_its_manifest_is_unfinished(tmp_path: Path, file: str, content: str) -> None:
    with refused("no-finished-run"):
        main(damaged(tmp_path, file, content))


def test_markup_in_run_texts_is_escaped(tmp_path: Path) -> None:
    """Markup, formulas, line ends that JSON keeps, and long names appear as text in the page, tables and plots."""
    evil = "<img src=x onerror=alert(1)> $\\frac$ \u2028 \x85 | `"
    for seed, loss in enumerate([evil, "<b>" * 2000]):
        run = write_run(tmp_path / f"run{seed}" / "version_0", 0.1, seed)
        model = {"class_path": evil, "init_args": {"loss": loss, evil: [evil]}}
        (run / "config.yaml").write_text(yaml.safe_dump({"seed_everything": seed, "model": model}))
        lines = [json.dumps({**SAMPLE, "prompt": prompt, "completion": evil, "score": float("nan")}, ensure_ascii=False)
                 for prompt in (evil, [{"role": evil, "content": evil}])]  # fmt: skip
        (run / "samples.jsonl").write_text("\n".join(lines) + "\n")
        writer = SummaryWriter(str(run))
        writer.add_scalar("val/$\\frac$<img>", float("nan"), 0)
        writer.add_scalar("val/$\\frac$<img>", float("inf"), 1)
        writer.close()
    assert main([str(tmp_path)]) == 0
    page = Path("comparison/report.html").read_text()
    assert "<img src=x" not in page and "&lt;img src=x" in page and page.count("<img") == 2 and "<b><b>" not in page


def test_each_arm_is_a_tensorboard_run_with_settings_and_final_means(sweep):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    for _ in range(2):  # the second comparison replaces the arms of the first
        assert main([str(sweep), "--by", "model.beta"]) == 0
    first, second = sorted(Path("comparison/tensorboard").iterdir())
    events = EventAccumulator(str(first)).Reload()
    assert events.Scalars("val/score")[0].value == pytest.approx(2.0)  # final values 1, 2, 3
    low, high = (events.Scalars(f"val/score ({end})")[0].value for end in ("low", "high"))
    assert (low + high) / 2 == pytest.approx(2.0) and high - low == pytest.approx(2 * 4.303 / 3**0.5, rel=1e-3)
    assert events.Scalars("mean/val/score")[-1].value == pytest.approx(2.0)
    start = HParamsPluginData.FromString(events.PluginTagToContent("hparams")["_hparams_/session_start_info"])
    shown = {name: value.string_value or value.number_value for name, value in start.session_start_info.hparams.items()}
    assert shown == {"model.beta": "0.1", "seeds": 3.0} and "0.2" in second.name
