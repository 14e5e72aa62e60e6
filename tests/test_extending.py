"""Check docs/extending.md: all names exist, the examples run, and every overridable method is listed."""

import ast
import inspect
import re
import textwrap
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningModule

from rlhf_lightning import data, types
from rlhf_lightning.commands.objectives import objective_classes
from rlhf_lightning.training.module import AlignmentModule

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
EXAMPLES = re.findall(r'^```python title="([\w/]+\.py)"\n(.*?)^```', PAGE, re.S | re.M)
PROSE = re.sub(r"^```.*?^```", "", PAGE, flags=re.S | re.M)
CLASSES = {base for kind in objective_classes() for base in kind.__mro__ if base.__module__.startswith("rlhf_")}


def public_methods() -> dict[str, list[Any]]:
    """Return public methods and properties of the module classes with their definitions, except Lightning's hooks."""
    found: dict[str, list[Any]] = {}
    for base in sorted(CLASSES, key=lambda kind: kind.__name__):
        for name, value in vars(base).items():
            method = inspect.isfunction(value) or isinstance(value, property | cached_property)
            if method and not name.startswith("_") and not hasattr(LightningModule, name):
                found.setdefault(name, []).append(value)
    return found


METHODS = public_methods()


def test_the_extending_page_names_every_public_method():
    named = set(re.findall(r"`(\w+)[`(]", PROSE))
    assert sorted(set(METHODS) - named) == []


@pytest.mark.parametrize(("name", "arguments"), re.findall(r"`(\w+)\(([\w, ]*)\)`", PROSE))
def test_documented_signatures_match_the_code(name: str, arguments: str):
    if name == "Judgement":
        assert arguments.split(", ") == list(types.Judgement._fields)
        return
    definitions = METHODS.get(name) or [getattr(AlignmentModule, name, None) or getattr(data.PromptDataModule, name)]
    given = [one for one in arguments.split(", ") if one]
    for one in definitions:
        if not inspect.isfunction(one):
            continue
        parameters = list(inspect.signature(one).parameters.values())[1:]
        if [p.name for p in parameters if p.kind is not p.VAR_KEYWORD] == given:
            return
    pytest.fail(f"{name} takes {[str(inspect.signature(one)) for one in definitions if inspect.isfunction(one)]}")


def test_every_documented_name_exists():
    """Names in code font must be methods, attributes or classes of the package, or fields of its tuples."""
    known = {*METHODS, *dir(AlignmentModule), *vars(types), *vars(data), *(kind.__name__ for kind in CLASSES)}
    known |= {name for kind in CLASSES for name in dir(kind)}
    known |= {field for kind in vars(types).values() for field in getattr(kind, "_fields", ())}
    known |= {name for kind in CLASSES for name in inspect.signature(kind.__init__).parameters}
    known |= set(dir(types.Environment)) | set(dir(data.PromptDataModule))
    # names from the text or from other packages
    further = {"kl", "chosen_kl", "rejected_kl", "class_path", "TokenOutputs", "Judgements"}
    for name in re.findall(r"`([A-Za-z_]+(?:\.\w+)*)`", PROSE):
        last = name.split(".")[-1]
        assert last in known | further or name == "torch.optim", name


@pytest.mark.parametrize(("file", "text"), EXAMPLES, ids=[file for file, _ in EXAMPLES])
def test_examples_are_copied_from_existing_files(file: str, text: str):
    path = ROOT / file if "/" in file else ROOT / "experiments" / "objectives_of_users" / file
    lines = [line.strip() for line in path.read_text().splitlines()]
    wanted = [line.strip() for line in textwrap.dedent(text).splitlines()]
    assert any(lines[start : start + len(wanted)] == wanted for start in range(len(lines))), file
    ast.parse(textwrap.dedent(f"def _():\n{textwrap.indent(textwrap.dedent(text), '    ')}"))
