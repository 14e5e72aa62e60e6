"""Test a project created from the template: its files, its names, and its own tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import refused

from rlhf_lightning.cli import main as rlhf
from rlhf_lightning.commands.init import write_project

FILES = {
    ".gitignore", "Makefile", "README.md", "pyproject.toml", "train.slurm", "mine/__init__.py", "mine/objective.py",
    "mine/scorer.py", "configs/sft.yaml", "configs/objective.yaml", "configs/online.yaml", "tests/test_project.py",
    "data/demonstrations.jsonl", "data/pairs_train.jsonl", "data/prompts_train.jsonl", "data/model/tokenizer.json",
}  # fmt: skip


def test_a_new_project_passes_its_own_tests(capsys: pytest.CaptureFixture[str]) -> None:
    assert rlhf(["init", "mine"]) == 0
    assert "make test" in capsys.readouterr().out
    written = {path.relative_to("mine").as_posix() for path in Path("mine").rglob("*") if path.is_file()}
    assert written >= FILES and not [name for name in written if name.endswith(".jinja") and name[:5] != "data/"]
    left = [name for name in written if not name.startswith("data/") and "{{" in Path("mine", name).read_text()]
    assert not left
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd="mine", env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "5 passed" in done.stdout, done.stdout[-3000:]
    assert not Path("mine/runs").exists()


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("my-project", "invalid-name", "my_project"),
        ("class", "invalid-name", "Python package"),
        ("3d", "invalid-name", "Python package"),
        ("torch", "invalid-name", "installed package"),
        ("json", "invalid-name", "installed package"),
        ("rlhf_lightning", "invalid-name", "installed package"),
        ("data", "invalid-name", "folder of the project"),
        ("..", "invalid-name", "Python package"),
        ("a\nb", "invalid-name", "a_b"),
        ("full", "folder-not-empty", "name another folder"),
    ],
)
def test_a_folder_that_cannot_be_a_project_is_refused(name: str, code: str, words: str) -> None:
    Path("full").mkdir()
    Path("full/file").write_text("mine")
    with refused(code, words):
        write_project(Path(name))
    assert not Path("my-project").exists()
