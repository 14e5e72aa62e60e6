"""Every function of the room is tested where one would look for it."""

import ast
from pathlib import Path

import pytest

import rlhf_lightning.functional

ROOM = Path(rlhf_lightning.functional.__file__).parent
MODULES = sorted(path.stem for path in ROOM.glob("*.py") if path.stem != "__init__")


def public_functions(module):
    tree = ast.parse((ROOM / f"{module}.py").read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")}


@pytest.mark.parametrize("module", MODULES)
def test_each_public_function_is_used_by_the_test_module_of_its_name(module):
    text = (Path(__file__).parent / f"test_{module}.py").read_text()
    used = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    assert public_functions(module) - used == set()
