"""Parsers with one-sentence errors; functions as commands; refusal of secrets."""

from __future__ import annotations

import contextvars
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Any, NoReturn, TypeVar

import docstring_parser
import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader, set_parsing_settings

from rlhf_lightning.commands.flags import with_underscores
from rlhf_lightning.commands.messages import explain
from rlhf_lightning.deprecation import current_settings
from rlhf_lightning.errors import SettingError, TerminatedError, printable
from rlhf_lightning.loading import refuse_large_yaml, refuse_repeated_keys, shipped_classes
from rlhf_lightning.quiet import silence_libraries
from rlhf_lightning.sampling.json_server import IN_AN_ADDRESS, NO_VARIABLE, has_password, names_variable

# The module builds scorers from class_path and init_args, and checkpoints store these; the parser must not build them.
set_parsing_settings(instantiate_subclass_spec_in_any=False)
_load_yaml = get_loader("yaml")

CLI = TypeVar("CLI")


LONG_VALUE = 100
"""Length in characters from which a value on the command line is checked like a config file."""


def in_copied_context(cli: Callable[[Sequence[str]], CLI], argv: Sequence[str]) -> CLI:
    """Run a LightningCLI in a copy of the context and return it.

    jsonargparse keeps its parser in a context variable, and with it the models and Adam's moments. In a copied context
    they are freed together with the result, before the next run in this process.
    """

    def inside() -> CLI:
        try:
            return cli(argv)
        except (KeyboardInterrupt, TerminatedError) as error:
            # A signal may leave jsonargparse's context managers open. Close them here: in another context each prints
            # that it cannot restore its variable.
            traceback.clear_frames(error.__traceback__)
            raise

    return contextvars.copy_context().run(inside)


def load_yaml(text: str) -> Any:
    """Read a config or value as jsonargparse does; refuse duplicate keys; resolve short names of shipped classes."""
    if len(text) > LONG_VALUE or "\n" in text:
        refuse_large_yaml(text)
    if "\n" in text:
        refuse_repeated_keys(text)
    found = current_settings(_load_yaml(text))
    return with_full_paths(found) if "class_path" in text else found


def with_full_paths(value: Any) -> Any:
    """Replace the short names of shipped scorers, engines and environments in settings by their import paths.

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
    from rlhf_lightning import environments, sampling, scoring
    from rlhf_lightning.sampling.engines import SamplingEngine
    from rlhf_lightning.scoring import Scorer
    from rlhf_lightning.types import Environment

    paths = {}
    for room, base in ((scoring, Scorer), (sampling, SamplingEngine), (environments, Environment)):
        for name, kind in shipped_classes(room.__name__, base).items():
            paths[name] = f"{room.__name__ if hasattr(room, name) else kind.__module__}.{name}"
    return paths


set_loader("yaml", load_yaml, (yaml.YAMLError,))

BOOLEANS = ("true", "false", "yes", "no")


class PlainParser(ArgumentParser):
    """A parser with one-sentence errors and without abbreviated options, so that a typo never becomes a setting."""

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
    """Call a command's function with the arguments of a command line; help comes from its signature and docstring.

    If the default of a parameter is a dataclass, each field becomes an option. A parameter of type ``Sequence[str]``
    takes one or more values; as an option it may be given several times.

    Args:
        function: the function; its parameters become options ``--name``.
        argv: the command line after the command's name.
        prog: name of the program in the help.
        positional: parameters that become positional arguments.
        without: fields of dataclasses that do not become options.
    """
    doc = docstring_parser.parse(inspect.getdoc(function) or "")
    description = "\n\n".join(filter(None, [doc.short_description, doc.long_description]))
    parser = PlainParser(prog=prog, description=description)
    helps = {entry.arg_name: entry.description for entry in doc.params}
    parameters = inspect.signature(function).parameters
    lists = [name for name, p in parameters.items() if p.annotation == Sequence[str]]
    for name in positional:
        needed = parameters[name].default is inspect.Parameter.empty
        many: dict[str, Any] = {"nargs": "+" if needed else "*"} if name in lists else {}
        parser.add_argument(name, type=str, help=helps.get(name), **many)
    groups: dict[str, Any] = {name: p.default for name, p in parameters.items() if is_dataclass(p.default)}
    parser.add_function_arguments(function, as_group=False, as_positional=False, skip={*positional, *groups, *lists})
    for name in lists:
        if name not in positional:
            help = helps.get(name)
            parser.add_argument(f"--{name}", type=str, nargs="+", action="extend", default=[], help=help)
    for default in groups.values():
        parser.add_class_arguments(type(default), as_group=False, skip=set(without))
        parser.set_defaults({field.name: getattr(default, field.name) for field in fields(default)
                             if field.name not in without})  # fmt: skip
    switches = [name for name, entry in parameters.items() if entry.default is False]
    given = parser.parse_args(_switched_on(with_underscores(argv), switches)).as_dict()
    if secret := written_secret({name: value for name, value in given.items() if name != "api_key"}):
        raise SettingError("written-secret", secret)
    silence_libraries()
    for name, default in groups.items():
        given[name] = replace(default, **{
            field.name: given.pop(field.name) for field in fields(default) if field.name in given
        })  # fmt: skip
    return function(**given) or 0


def _switched_on(argv: Sequence[str], switches: Sequence[str]) -> list[str]:
    """Rewrite ``--merge`` to ``--merge=true`` if no value follows."""
    names = {f"--{switch}" for switch in switches}
    following = [*argv[1:], ""][: len(argv)]
    return [
        f"{argument}=true" if argument in names and after.lower() not in BOOLEANS else argument
        for argument, after in zip(argv, following, strict=True)
    ]


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


def class_doc(kind: type[Any]) -> str:
    """Return the description of a class without its arguments, plus the notation paragraph of its or a base's file."""
    doc = re.split(r"\n\s*\nArgs:", inspect.getdoc(kind) or "")[0]
    files = (sys.modules[base.__module__].__doc__ or "" for base in kind.__mro__)
    parts = (part for text in files for part in text.strip().split("\n\n"))
    return "\n\n".join([doc, *[part for part in parts if part.startswith("Notation:")][:1]])
