"""Test deprecated settings, metrics and classes: they work, warn once, and are removed in the release they name."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from conftest import refused
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from packaging.version import Version
from tiny_run import NumbersDataModule, SlopeModule
from typing_extensions import deprecated

from rlhf_lightning import cli
from rlhf_lightning.deprecation import METRICS, SETTINGS, Deprecation, RlhfDeprecationWarning, current_settings
from rlhf_lightning.runs.checkpoint_metadata import checkpoint_hparams

ROOT = Path(__file__).resolve().parents[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
MESSAGE = r"\S+ is deprecated since [\d.]+ and will be removed in ([\d.]+): \S.*"
OLD = Deprecation("1.1", "1.2", "model.slope")


@deprecated(
    "OldSlopeModule is deprecated since 1.1 and will be removed in 1.2: use SlopeModule",
    category=RlhfDeprecationWarning,
)
class OldSlopeModule(SlopeModule):
    """The old name of a module."""


def removals(tree: ast.AST) -> dict[str, str]:
    """Return the releases that remove the deprecated functions and classes of a file, or "" for another message."""
    found = {}
    for node in ast.walk(tree):
        for call in getattr(node, "decorator_list", []):
            if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("deprecated"):
                match = re.fullmatch(MESSAGE, str(getattr(call.args[0], "value", "")))
                warns = [ast.unparse(one.value).endswith("RlhfDeprecationWarning") for one in call.keywords]
                found[node.name] = match[1] if match and warns == [True] else ""
    return found


def test_the_decorator_is_found():
    tree = ast.parse(Path(__file__).read_text() + "\n@deprecated('use B')\ndef a(): ...\n")
    assert removals(tree) == {"OldSlopeModule": "1.2", "a": ""}


def test_nothing_outlives_the_release_that_removes_it():
    due = {name: entry.removed_in for name, entry in {**SETTINGS, **METRICS}.items()}
    for path in (ROOT / "rlhf_lightning").rglob("*.py"):
        due |= removals(ast.parse(path.read_text()))
    assert not [name for name, release in due.items() if not release], f"the message is not of the form {MESSAGE}"
    assert not [name for name, release in due.items() if Version(release) <= Version(VERSION)], "remove these names"
    assert all(name.rpartition(".")[0] == (entry.use or name).rpartition(".")[0] for name, entry in SETTINGS.items())


def fitted(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    fixed = ["--data", "tiny_run.NumbersDataModule", "--trainer.accelerator", "cpu", "--samples.prompts", "0"]
    assert cli.main(["fit", *flags, *fixed, "--run_name", "old"]) == 0
    return tmp_path / "runs" / "old" / "version_0"


@pytest.mark.parametrize("given", ["flag", "file"])
def test_an_old_setting_sets_the_new_one(given, tmp_path, monkeypatch):
    monkeypatch.setitem(SETTINGS, "model.tilt", OLD)
    file = tmp_path / "old.yaml"
    file.write_text("model: {class_path: tiny_run.SlopeModule, init_args: {tilt: 1.5}}\n")
    flags = {"flag": ["--model", "tiny_run.SlopeModule", "--model.tilt", "1.5"], "file": ["--config", str(file)]}
    with pytest.warns(RlhfDeprecationWarning, match="model.tilt is deprecated since 1.1 and will be removed in 1.2"):
        folder = fitted(flags[given], tmp_path, monkeypatch)
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["init_args"]["slope"] == 1.5


def test_a_checkpoint_with_an_old_setting_sets_the_new_one(tmp_path, monkeypatch):
    monkeypatch.setitem(SETTINGS, "model.tilt", OLD)
    torch.save({"hyper_parameters": {"tilt": 1.5}}, tmp_path / "old.ckpt")
    with pytest.warns(RlhfDeprecationWarning):
        assert checkpoint_hparams(tmp_path / "old.ckpt") == {"slope": 1.5}


def test_both_names_at_once_are_refused(monkeypatch):
    monkeypatch.setitem(SETTINGS, "model.tilt", OLD)
    with pytest.warns(RlhfDeprecationWarning), refused("repeated-key", "model.slope"):
        current_settings({"model": {"init_args": {"tilt": 1, "slope": 2}}})


def test_a_setting_without_replacement_works_until_it_is_removed(monkeypatch):
    monkeypatch.setitem(SETTINGS, "model.tilt", Deprecation("1.1", "1.2"))
    config = {"model": {"init_args": {"tilt": 1}}, "trainer": {"max_steps": 1}}
    with pytest.warns(RlhfDeprecationWarning, match="it has no replacement"):
        assert current_settings(config) == config


def test_an_old_class_trains(tmp_path, monkeypatch):
    with pytest.warns(RlhfDeprecationWarning, match="use SlopeModule"):
        fitted(["--model", "test_deprecation.OldSlopeModule", "--model.slope", "1.5"], tmp_path, monkeypatch)


def test_a_renamed_metric_has_both_tags_and_warns_who_monitors_the_old_one(tmp_path, monkeypatch):
    monkeypatch.setitem(METRICS, "val/tilt", Deprecation("1.1", "1.2", "val/slope"))
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path,
        callbacks=[EarlyStopping("val/tilt")], use_distributed_sampler=False,
    )  # fmt: skip
    with pytest.warns(RlhfDeprecationWarning, match="val/tilt .* use val/slope"):
        trainer.fit(SlopeModule(), NumbersDataModule())
    assert trainer.callback_metrics["val/tilt"] == trainer.callback_metrics["val/slope"]


def test_a_command_shows_a_warning_once():
    program = (
        "from rlhf_lightning import cli, deprecation\n"
        "deprecation.SETTINGS['model.tilt'] = deprecation.Deprecation('1.1', '1.2', 'model.beta')\n"
        "cli.main(['fit', '--model', 'DPOModule', '--model.tilt', '1', '--model.tilt=2', '--help'])"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stderr.count("model.tilt is deprecated since 1.1 and will be removed in 1.2: use model.beta") == 1
