"""A new shipped objective needs only a class, a YAML file and a test; everything else discovers it."""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_lightning.loading import shipped_classes

PACKAGE = Path(__file__).resolve().parents[1] / "rlhf_lightning"
OBJECTIVE = '''"""DPO with a margin, as if it were shipped."""

from typing import Any, ClassVar

from rlhf_lightning.modules.dpo import DPOModule


class MarginDPOModule(DPOModule):
    """DPO whose sigmoid asks for a margin.

    Args:
        margin: what is asked for beyond a tie.
    """

    paper: ClassVar[str] = "arXiv 0000.00000"

    def __init__(self, margin: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.margin = margin
'''
RECIPE = """model:
  class_path: MarginDPOModule
  init_args: {init_from: nowhere, margin: 2.0}
data:
  class_path: PreferenceDataModule
  init_args: {source: rows.jsonl}
"""
SEEN = """
import sys
sys.path.insert(0, "experiments/objectives")
import rlhf_lightning
assert "torch" not in sys.modules, "importing the package must stay cheap"
from rlhf_lightning import MarginDPOModule
from rlhf_lightning import cli, modules
from rlhf_lightning.commands.objectives import described, objective_classes
from rlhf_lightning.verification.verify import find
import settings
assert "MarginDPOModule" in rlhf_lightning.__all__ and "MarginDPOModule" in modules.__all__
assert modules.MarginDPOModule is MarginDPOModule and MarginDPOModule in objective_classes()
assert described(MarginDPOModule).family == "preference pairs" and find("MarginDPOModule") is MarginDPOModule
assert [run.config for run in settings.runs() if run.objective == "MarginDPOModule"] == ["dpo"]
sys.exit(cli.main(["fit", "--config", "recipe:margin_dpo", "--print_config"]))
"""


def test_a_new_objective_appears_in_every_listing(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "rlhf_lightning", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(PACKAGE.parent / "experiments" / "objectives", tmp_path / "experiments" / "objectives")
    (tmp_path / "rlhf_lightning" / "modules" / "margin.py").write_text(OBJECTIVE)
    (tmp_path / "rlhf_lightning" / "recipes" / "margin_dpo.yaml").write_text(RECIPE)
    done = subprocess.run(
        [sys.executable, "-c", SEEN],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "MarginDPOModule" in done.stdout and "margin: 2.0" in done.stdout


@pytest.mark.parametrize("room", ["modules", "scoring"])
def test_exporting_files_are_type_checked(room: str) -> None:
    tree = ast.parse((PACKAGE / room / "__init__.py").read_text())
    read = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    base = __import__(f"rlhf_lightning.{room}", fromlist=["x"])
    kinds = shipped_classes(f"rlhf_lightning.{room}", base.Scorer if room == "scoring" else object)
    missing = {kind.__module__ for kind in kinds.values()} - read
    assert not missing, f"add a star import below TYPE_CHECKING in {room}/__init__.py: {sorted(missing)}"
    assert not [name for name in read if importlib.util.find_spec(name) is None], "a star import of a file that is gone"
    assert {name for name in base.__all__ if hasattr(base, name)} == set(base.__all__)
