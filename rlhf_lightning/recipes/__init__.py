"""Recipes: the packaged YAML files, named ``recipe:dpo`` or ``recipe:hardware/fsdp`` wherever a config file is."""

from __future__ import annotations

import difflib
from pathlib import Path

from rlhf_lightning.errors import MissingError

FOLDER = Path(__file__).parent
PREFIX = "recipe:"


def recipe_names() -> list[str]:
    """Return the name of every recipe, such as ``dpo`` and ``hardware/fsdp``."""
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml"))


def resolve_recipe(config: str) -> str:
    """Return the path of the packaged file that ``recipe:NAME`` names; return any other config unchanged.

    Raises:
        MissingError: no recipe has that name.
    """
    if not config.startswith(PREFIX):
        return config
    name, names = config.removeprefix(PREFIX).removesuffix(".yaml"), recipe_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3) or [other for other in names if name in other][:3]
        hint = f"did you mean {' or '.join(near)}?" if near else f"the recipes are {', '.join(names)}"
        raise MissingError("unknown-recipe", f"there is no recipe {name!r}: {hint}")
    return str(FOLDER / f"{name}.yaml")
