"""Every function of the package `functional` is tested in this folder; each file covers one topic."""

import ast
from pathlib import Path

import pytest

import rlhf_lightning.functional

ROOM = Path(rlhf_lightning.functional.__file__).parent
MODULES = sorted(path.stem for path in ROOM.glob("*.py") if path.stem != "__init__")
NAMED = {
    node.id
    for path in Path(__file__).parent.glob("test_*.py")
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.Name)
}


def public_functions(module):
    tree = ast.parse((ROOM / f"{module}.py").read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")}


@pytest.mark.parametrize("module", MODULES)
def test_each_public_function_is_used_by_a_test_module(module):
    assert public_functions(module) - NAMED == set()
