"""Process command lines as text, before parsing: options, config files, and flags inside nested settings."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_lightning.deprecation import current_flag, current_settings
from rlhf_lightning.errors import SettingError
from rlhf_lightning.loading import read_yaml
from rlhf_lightning.recipes import resolve_recipe

OPEN_SETTINGS = ("scorer", "scorers", "engine")
"""Settings that can be any object, so the parser does not know their arguments."""


def with_underscores(argv: Sequence[str]) -> list[str]:
    """Rewrite ``--max-new-tokens`` to ``--max_new_tokens``, old names to new ones, and ``recipe:NAME`` to its path.

    Raises:
        MissingError: the recipe does not exist.
    """

    def rewritten(argument: str) -> str:
        if not argument.startswith("--"):
            return resolve_recipe(argument)
        name, equals, value = argument[2:].partition("=")
        return f"--{current_flag(name.replace('-', '_'))}{equals}{resolve_recipe(value)}"

    joined: list[str] = []
    for argument in argv:
        if re.fullmatch(r"-[\d.]+e[-+]?\d+", argument, re.IGNORECASE) and joined and joined[-1].startswith("--"):
            joined[-1] += f"={argument}"  # otherwise the parser reads -1e-5 as an option
        else:
            joined.append(argument)
    return [rewritten(argument) for argument in joined]


def is_option(argument: str) -> bool:
    """Whether an argument is an option; a negative number is the value of one."""
    return argument.startswith("-") and not re.fullmatch(r"-[\d.]+", argument)


def option_pairs(argv: Sequence[str]) -> list[tuple[str, str]]:
    """Return every option with its value, from ``--name value`` and ``--name=value``; ``-c`` is ``--config``."""
    found = []
    for position, argument in enumerate(argv):
        if is_option(argument):
            name, equals, value = argument.partition("=")
            following = "".join(argv[position + 1 : position + 2])
            found.append(({"-c": "--config"}.get(name, name), value if equals else following))
    return found


def flags(argv: Sequence[str]) -> dict[str, str]:
    """Return the options of a command line as text; a repeated option has its first value."""
    found: dict[str, str] = {}
    for name, value in option_pairs(argv):
        found.setdefault(name, value)
    return found


def configs_first(argv: Sequence[str]) -> list[str]:
    """Move the config files to the front, so that flags override them in any order."""
    configs: list[str] = []
    rest: list[str] = []
    arguments = iter(argv[1:])
    for argument in arguments:
        if argument in ("--config", "-c"):
            configs += [argument, *([value] if (value := next(arguments, None)) is not None else [])]
        elif argument.startswith(("--config=", "-c=")):
            configs.append(argument)
        else:
            rest.append(argument)
    return [*argv[:1], *configs, *rest]


class NestedFlag(NamedTuple):
    """A flag that sets a key inside an open setting: ``--model.scorer.init_args.limit 0.5``."""

    setting: str  # the open setting, ``scorer``
    path: tuple[str, ...]  # keys in its description, ``("init_args", "limit")``
    value: Any  # the new value


def split_nested(argv: Sequence[str]) -> tuple[list[str], list[NestedFlag]]:
    """Separate the flags that set keys inside open settings from the rest of a command line."""
    from jsonargparse import get_loader  # slow to import

    pattern = re.compile(rf"--model\.(?:init_args\.)?({'|'.join(OPEN_SETTINGS)})\.([^=]+)(?:=(.*))?", re.DOTALL)
    rest: list[str] = []
    nested: list[NestedFlag] = []
    arguments = iter(argv)
    for argument in arguments:
        match = pattern.fullmatch(argument)
        if match is None or match[2] == "help":
            rest.append(argument)
            continue
        text = match[3] if match[3] is not None else next(arguments, "")
        path = tuple(match[2].split("."))
        path = path if path[0] in ("class_path", "init_args") else ("init_args", *path)
        nested.append(NestedFlag(match[1], path, get_loader("yaml")(text)))
    return rest, nested


def put_nested(description: Any, flag: NestedFlag) -> dict[str, Any]:
    """Apply a flag to a description ``{"class_path": ..., "init_args": ...}`` or a class name; return the result."""
    name = f"model.{flag.setting}"
    if flag.path == ("class_path",):
        same = isinstance(description, Mapping) and description.get("class_path") == flag.value
        return dict(description) if same else {"class_path": flag.value, "init_args": {}}
    if isinstance(description, str) and ("/" in description or os.path.isdir(description)):
        raise SettingError(
            "no-class-to-set", f"{name} is set to the folder {description}, which takes no arguments; give a class"
        )
    if description is None:
        raise SettingError("no-class-to-set", f"--{name}.{'.'.join(flag.path)} needs a class: give --{name} CLASS too")
    return _changed(_as_description(description), flag.path, flag.value)


def _as_description(value: Any) -> Any:
    return {"class_path": value, "init_args": {}} if isinstance(value, str) else value


def _changed(value: Any, path: tuple[str, ...], new: Any) -> Any:
    if not path:
        return new
    key, rest = path[0], path[1:]
    if isinstance(value, list) and key.isdecimal() and int(key) < len(value):
        return [_changed(item, rest, new) if place == int(key) else item for place, item in enumerate(value)]
    if key == "init_args":
        value = _as_description(value)
    found = dict(value) if isinstance(value, Mapping) else {}
    return {**found, key: _changed(found.get(key), rest, new)}


def config_settings(argv: Sequence[str], part: str) -> list[tuple[str, str, list[str]]]:
    """Return each config file, with the class and the argument names in its section ``part``."""
    found = []
    for name, file in option_pairs(argv):
        if name == "--config" and os.path.isfile(file):
            try:
                read = current_settings(read_yaml(Path(file).read_text(encoding="utf-8")))
            except UnicodeDecodeError as error:
                raise SettingError("invalid-config", f"{file} is not a text in UTF-8: {error}") from error
            section = read.get(part) if isinstance(read, dict) else None
            if isinstance(section, dict) and isinstance(section.get("class_path"), str):
                settings = section.get("init_args")
                found.append((file, section["class_path"], list(settings) if isinstance(settings, dict) else []))
    return found
