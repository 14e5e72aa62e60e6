"""Command lines: flags as written, parsers whose errors are one sentence, functions as commands."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import docstring_parser
import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader, set_parsing_settings

from rlhf_lightning.commands.messages import explain
from rlhf_lightning.errors import SettingError, printable
from rlhf_lightning.loading import refuse_repeated_keys, shipped_classes
from rlhf_lightning.recipes import resolve_recipe
from rlhf_lightning.sampling.json_server import IN_AN_ADDRESS, NO_VARIABLE, has_password, names_variable

# The module makes scorers from class_path and init_args, and checkpoints store these; the parser must not.
set_parsing_settings(instantiate_subclass_spec_in_any=False)
_load_yaml = get_loader("yaml")


def load_yaml(text: str) -> Any:
    """Read a config or a value as jsonargparse does, each key of a config once, scorers and engines by short names."""
    if "\n" in text:
        refuse_repeated_keys(text)
    found = _load_yaml(text)
    return with_full_paths(found) if "class_path" in text else found


def with_full_paths(value: Any) -> Any:
    """Return settings with the import paths of shipped scorers and engines in the place of their short names.

    jsonargparse resolves short names of modules and DataModules, but not those of classes within an open setting.
    """
    if isinstance(value, list):
        return [with_full_paths(item) for item in value]
    if not isinstance(value, dict):
        return value
    found = {key: with_full_paths(item) for key, item in value.items()}
    name = found.get("class_path")
    if isinstance(name, str) and name.isidentifier() and name in (paths := _short_paths()):
        found["class_path"] = paths[name]
    return found


@cache
def _short_paths() -> dict[str, str]:
    from rlhf_lightning.sampling.engines import SamplingEngine
    from rlhf_lightning.scoring import Scorer

    scorers = {name: f"rlhf_lightning.scoring.{name}" for name in shipped_classes("rlhf_lightning.scoring", Scorer)}
    engines = shipped_classes("rlhf_lightning.sampling", SamplingEngine)
    return scorers | {name: f"{kind.__module__}.{name}" for name, kind in engines.items()}


set_loader("yaml", load_yaml, (yaml.YAMLError,))

BOOLEANS = ("true", "false", "yes", "no")


class PlainParser(ArgumentParser):
    """A parser with one-sentence errors and without abbreviated options: a typo must not become a setting."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and the remedy, and exit with status 2."""
        if not self.exit_on_error or os.environ.get("RLHF_DEBUG"):
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        usage_error(parser.prog.replace(" [options]", ""), explain(message, parser))


def usage_error(prog: str, sentence: str) -> NoReturn:
    """Print what is wrong with a command line and exit with status 2."""
    print(f"{prog}: {printable(sentence)}\n`{prog} --help` lists the options.", file=sys.stderr)
    raise SystemExit(2)


def run_function(
    function: Callable[..., int | None],
    argv: Sequence[str],
    prog: str,
    positional: Sequence[str] = (),
    without: Sequence[str] = (),
) -> int:
    """Call a command's function with the arguments of a command line; its signature and docstring are the help.

    A parameter whose default is a dataclass becomes one option for each field.

    Args:
        function: its parameters become options ``--name``.
        argv: the command line after the command's name.
        prog: name of the program in the help.
        positional: parameters that are positional arguments.
        without: fields of dataclasses that are not options.
    """
    doc = docstring_parser.parse(inspect.getdoc(function) or "")
    description = "\n\n".join(filter(None, [doc.short_description, doc.long_description]))
    parser = PlainParser(prog=prog, description=description)
    helps = {entry.arg_name: entry.description for entry in doc.params}
    for name in positional:
        parser.add_argument(name, type=str, help=helps.get(name))
    parameters = inspect.signature(function).parameters
    groups: dict[str, Any] = {name: p.default for name, p in parameters.items() if is_dataclass(p.default)}
    parser.add_function_arguments(function, as_group=False, as_positional=False, skip={*positional, *groups})
    for default in groups.values():
        parser.add_class_arguments(type(default), as_group=False, skip=set(without))
        parser.set_defaults({field.name: getattr(default, field.name) for field in fields(default)
                             if field.name not in without})  # fmt: skip
    switches = [name for name, entry in parameters.items() if entry.default is False]
    given = parser.parse_args(_switched_on(with_underscores(argv), switches)).as_dict()
    for name, default in groups.items():
        given[name] = replace(default, **{
            field.name: given.pop(field.name) for field in fields(default) if field.name in given
        })  # fmt: skip
    return function(**given) or 0


def _switched_on(argv: Sequence[str], switches: Sequence[str]) -> list[str]:
    """Rewrite ``--merge`` to ``--merge=true`` where no value follows."""
    names = {f"--{switch}" for switch in switches}
    following = [*argv[1:], ""][: len(argv)]
    return [
        f"{argument}=true" if argument in names and after.lower() not in BOOLEANS else argument
        for argument, after in zip(argv, following, strict=True)
    ]


def with_underscores(argv: Sequence[str]) -> list[str]:
    """Rewrite ``--max-new-tokens`` to ``--max_new_tokens`` and ``recipe:NAME`` to the path of the packaged file.

    Raises:
        MissingError: the recipe does not exist.
    """

    def rewritten(argument: str) -> str:
        if not argument.startswith("--"):
            return resolve_recipe(argument)
        name, equals, value = argument[2:].partition("=")
        return f"--{name.replace('-', '_')}{equals}{resolve_recipe(value)}"

    return [rewritten(argument) for argument in argv]


def written_secret(settings: Any, where: str = "") -> str | None:
    """Return a sentence about the first setting that contains a secret, without the secret; None if none does."""
    for setting, value in _texts(settings, where):
        if setting.rpartition(".")[2] == "api_key" and not names_variable(value):
            return f"{setting} {NO_VARIABLE}"
        if has_password(value):
            return f"{setting} {IN_AN_ADDRESS}"
    return None


def _texts(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """Yield every string in the settings with its dotted name."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            name = where if key == "init_args" else f"{where}.{key}".lstrip(".")
            yield from _texts(item, name)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item, where)
    elif isinstance(value, str):
        yield where, value


OPEN_SETTINGS = ("scorer", "scorers", "engine")
"""Settings that describe any object; the parser does not know their arguments."""


def option_pairs(argv: Sequence[str]) -> list[tuple[str, str]]:
    """Return every option with its value, from ``--name value`` and ``--name=value``; ``-c`` is ``--config``."""
    found = []
    for position, argument in enumerate(argv):
        if argument.startswith("-"):
            name, equals, value = argument.partition("=")
            following = "".join(argv[position + 1 : position + 2])
            found.append(({"-c": "--config"}.get(name, name), value if equals else following))
    return found


def flags(argv: Sequence[str]) -> dict[str, str]:
    """Return the options of a command line as text; the first of a repeated option."""
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
    """A flag that sets a key inside an open setting: ``--model.scorer.init_args.limit 0.5``.

    Attributes:
        setting: the open setting, ``scorer``.
        path: keys in its description, ``("init_args", "limit")``.
        value: the new value.
    """

    setting: str
    path: tuple[str, ...]
    value: Any


def split_nested(argv: Sequence[str]) -> tuple[list[str], list[NestedFlag]]:
    """Separate the flags that reach into open settings from the rest of a command line."""
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
    """Return a description ``{"class_path": ..., "init_args": ...}`` (or a class name) changed by a flag.

    Raises:
        SettingError: ``no-class-to-set``.
    """
    name = f"model.{flag.setting}"
    if flag.path == ("class_path",):
        same = isinstance(description, Mapping) and description.get("class_path") == flag.value
        return dict(description) if same else {"class_path": flag.value, "init_args": {}}
    if isinstance(description, str) and ("/" in description or Path(description).is_dir()):
        raise SettingError(
            "no-class-to-set", f"{name} is the folder {description}, which has no arguments; give a class"
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
    """Return each config file of a command line with the class and the argument names in its section ``part``."""
    found = []
    for name, file in option_pairs(argv):
        if name == "--config" and Path(file).is_file():
            read = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
            section = read.get(part) if isinstance(read, dict) else None
            if isinstance(section, dict) and isinstance(section.get("class_path"), str):
                found.append((file, section["class_path"], list(section.get("init_args") or {})))
    return found
