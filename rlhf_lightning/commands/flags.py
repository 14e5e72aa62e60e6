"""The command line of a training command before it is parsed: options as written, their order, nested settings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import get_loader

from rlhf_lightning.errors import SettingError

OPEN_SETTINGS = ("scorer", "scorers", "engine")
"""Settings that take any object's description. The parser knows nothing of what is in it."""


def option_pairs(argv: Sequence[str]) -> list[tuple[str, str]]:
    """Return every option with its value, ``--name value`` and ``--name=value`` alike; ``-c`` is ``--config``."""
    found = []
    for position, argument in enumerate(argv):
        if argument.startswith("-"):
            name, equals, value = argument.partition("=")
            following = "".join(argv[position + 1 : position + 2])
            found.append(({"-c": "--config"}.get(name, name), value if equals else following))
    return found


def flags(argv: Sequence[str]) -> dict[str, str]:
    """Return the options of a command line as written; of a repeated one the first."""
    found: dict[str, str] = {}
    for name, value in option_pairs(argv):
        found.setdefault(name, value)
    return found


def configs_first(argv: Sequence[str]) -> list[str]:
    """Put the config files behind the command's name: flags win over them wherever they stand."""
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
    """A flag that reaches into an open setting: ``--model.scorer.init_args.limit 0.5``.

    Attributes:
        setting: the open setting, ``scorer``.
        path: keys in its description, ``("init_args", "limit")``.
        value: what is put there.
    """

    setting: str
    path: tuple[str, ...]
    value: Any


def split_nested(argv: Sequence[str]) -> tuple[list[str], list[NestedFlag]]:
    """Return a command line without the flags that reach into open settings, and those flags."""
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
    """Return a description, ``{"class_path": ..., "init_args": ...}``, with one value in it changed.

    Args:
        description: what the setting was: a description, a class's name, or None.
        flag: the change.

    Raises:
        SettingError: there is no class yet that could take the argument.
    """
    name = f"model.{flag.setting}"
    if flag.path == ("class_path",):
        same = isinstance(description, Mapping) and description.get("class_path") == flag.value
        return dict(description) if same else {"class_path": flag.value, "init_args": {}}
    if isinstance(description, str) and ("/" in description or Path(description).is_dir()):
        raise SettingError(
            "no-class-to-set", f"{name} is the folder {description}, which takes no arguments; name a class"
        )
    if description is None:
        raise SettingError("no-class-to-set", f"--{name}.{'.'.join(flag.path)} needs a class: give --{name} CLASS too")
    return _changed(_as_description(description), flag.path, flag.value)


def _as_description(value: Any) -> Any:
    return {"class_path": value, "init_args": {}} if isinstance(value, str) else value


def _changed(value: Any, path: tuple[str, ...], new: Any) -> Any:
    """Return nested dicts and lists with one value changed."""
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
    """Return each config file of a command line with the class and the arguments that it gives to ``part``."""
    found = []
    for name, file in option_pairs(argv):
        if name == "--config" and Path(file).is_file():
            read = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
            section = read.get(part) if isinstance(read, dict) else None
            if isinstance(section, dict) and isinstance(section.get("class_path"), str):
                found.append((file, section["class_path"], list(section.get("init_args") or {})))
    return found
