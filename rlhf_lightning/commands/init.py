"""``rlhf init``: create a project with its own objective, scorer, configurations, data and tests."""

from __future__ import annotations

import argparse
import importlib.util
import keyword
from collections.abc import Sequence
from pathlib import Path

from rlhf_lightning.errors import SettingError, StateError

TEMPLATES = Path(__file__).with_name("project")
FOLDERS = ("configs", "data", "runs", "tests")
"""Folders of a project; its package cannot have one of these names."""
SIZES = {"demonstrations": 2000, "pairs_train": 4000, "pairs_test": 400}


def main(argv: Sequence[str]) -> int:
    """Write the project and print the next steps."""
    parser = argparse.ArgumentParser("rlhf init", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder to make; its name is the name of the Python package")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data (default 0)")
    arguments = parser.parse_args(argv)
    folder = write_project(arguments.folder, arguments.seed)
    print(f"{folder}/ is ready; next:\n  cd {folder}\n  make test\n  make sft && make train\nREADME.md says more")
    return 0


def write_project(folder: Path, seed: int = 0) -> Path:
    """Write the template under the folder's name, and the data of a small text world."""
    name = folder.name
    if not name.isidentifier() or keyword.iskeyword(name) or not name.isascii():
        near = "".join(one if one.isascii() and one.isalnum() else "_" for one in name).strip("_") or "project"
        near = near if near.isidentifier() and not keyword.iskeyword(near) else f"my_{near}"
        raise SettingError(
            "invalid-name", f"{name!r} cannot name a Python package: use letters, digits and _, such as {near}"
        )
    installed = importlib.util.find_spec(name)
    if name in FOLDERS or (installed is not None and installed.origin is not None):
        raise SettingError(
            "invalid-name", f"{name!r} is an installed package or a folder of the project: choose another, as my_{name}"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StateError("folder-not-empty", f"{folder} exists already: name another folder, or empty this one")
    from rlhf_lightning.worlds.assistant import write_world  # slow to import: help must be fast

    for template in sorted(TEMPLATES.rglob("*.jinja")):
        path = template.relative_to(TEMPLATES).with_suffix("")
        parts = [{"package": name, "gitignore": ".gitignore"}.get(part, part) for part in path.parts]
        target = folder.joinpath(*parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(template.read_text(encoding="utf-8").replace("{{ name }}", name), encoding="utf-8")
    write_world(folder / "data", seed, **SIZES)
    return folder
