"""Load objects that a user named (short name, import path or ``{class_path, init_args}``), and check settings.

Importing a path runs its module's code, so only names that the user typed are loaded. Names in a checkpoint must pass
`runs.checkpoint_metadata.own_code` first. An object's type is checked before it is called.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import pkgutil
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from rlhf_lightning import working_directory
from rlhf_lightning.errors import DataError, MissingError, RlhfError, SettingError
from rlhf_lightning.similar_names import hint_at, nearest


def _text_of(path: Path, errors: str = "strict") -> str:
    if path.exists() and not path.is_file():
        raise DataError("not-a-file", f"{path} is a folder, a pipe or a device: put a file there, or remove it")
    return path.read_text(encoding="utf-8", errors=errors)


def read_record(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file written by this package.

    Raises:
        DataError: ``invalid-json``: the file is damaged.
    """
    try:
        found = json.loads(_text_of(path))
        if isinstance(found, dict):
            return found
        reason = f"it holds a {type(found).__name__} instead of an object"
    except (ValueError, RecursionError) as error:
        reason = str(error)
    raise DataError("invalid-json", f"{path} is damaged ({reason}); restore it from a copy, or delete it")


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects in the lines of a file written by this package.

    Raises:
        DataError: ``invalid-json``: a line is damaged.
    """
    rows = []
    # Not splitlines(): texts may hold U+2028 and other line separators that JSON does not escape.
    for number, line in enumerate(_text_of(path, "surrogateescape").split("\n"), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
            reason = "" if not rows or isinstance(rows[-1], dict) else "it is not an object"
        except (ValueError, RecursionError) as error:
            reason = str(error)
        if reason:
            raise DataError("invalid-json", f"line {number} of {path} is damaged ({reason}); delete the line")
    return rows


SCALARS = (str, int, float, type(None))
"""JSON values that hold no other values. Checking for these types first is faster than checking for a Mapping."""

DEEPEST = 64
"""Maximum nesting depth of JSON in a row, a request or a call. Recursion would fail well below depth 1000."""


def is_too_deep(value: Any) -> bool:
    """Return whether lists and objects are nested more than `DEEPEST` levels deep."""
    layer: list[Any] = [[value]]
    for _ in range(DEEPEST + 1):
        layer = [
            inner
            for outer in layer
            for inner in (outer if isinstance(outer, list | tuple) else outer.values())
            if not isinstance(inner, SCALARS) and isinstance(inner, dict | list | tuple | Mapping)
        ]
        if not layer:
            return False
    return True


def load(spec: Any, base: Any, shipped: Mapping[str, Any], what: str) -> Any:
    """Return the object that ``spec`` describes.

    Args:
        spec: a finished object; a class; a short name in ``shipped``; the import path, such as ``my_file.MyClass``, of
            an object or of a class without required arguments; or ``{"class_path": NAME, "init_args": {...}}`` as a
            dict or jsonargparse's Namespace.
        base: required class of the result; `collections.abc.Callable` for any callable.
        shipped: classes and functions by short name.
        what: noun for error messages, such as ``scorer``.

    Raises:
        SettingError: ``unknown-name`` (with the nearest name), ``not-importable``, ``wrong-kind`` or
            ``wrong-arguments``.
    """
    from jsonargparse import Namespace  # slow to import, and this module serves help that must be fast

    name: Any
    arguments: Mapping[str, Any] = {}
    if isinstance(spec, Namespace):
        spec = spec.as_dict()
    if isinstance(spec, Mapping):
        unknown = set(spec) - {"class_path", "init_args"}
        name, arguments = spec.get("class_path"), spec.get("init_args") or {}
        if unknown or not isinstance(name, str) or not isinstance(arguments, Mapping):
            raise SettingError(
                "wrong-arguments", f"a {what} is written {{class_path: NAME, init_args: {{...}}}}; found {dict(spec)}"
            )
        found = _found(name, shipped, what)
    elif isinstance(spec, str):
        name, found = spec, _found(spec, shipped, what)
    else:
        name, found = getattr(spec, "__qualname__", type(spec).__name__), spec
    _check_kind(found, base, name, what, of_class=isinstance(found, type))
    if isinstance(found, type):
        return _made(found, arguments, name, what)
    if arguments:
        raise SettingError("wrong-arguments", f"{what} {name!r} is not a class: remove init_args {sorted(arguments)}")
    return found


def load_class(name: str, base: type, shipped: Mapping[str, Any], what: str) -> Any:
    """Return the subclass of ``base`` with a short name or an import path, without instantiating it.

    Raises:
        SettingError: ``unknown-name``, ``not-importable`` or ``wrong-kind``.
    """
    found = _found(name, shipped, what)
    _check_kind(found, base, name, what, of_class=True)
    return found


def import_path(path: str, what: str = "object") -> Any:
    """Import the object at a dotted path that the user typed; the working directory is searched as well.

    Raises:
        SettingError: ``not-importable``.
    """
    module_name, _, attribute = path.rpartition(".")
    working_directory.allow(module_name)
    module = _imported(module_name, f"{what} {path!r}")
    if not hasattr(module, attribute):
        near = nearest(attribute, (name for name in vars(module) if not name.startswith("_")))
        hint = f"; did you mean {module_name}.{near}?" if near else ""
        raise SettingError(
            "not-importable", f"{what} {path!r} cannot be imported: {module_name} has no {attribute}{hint}"
        )
    return getattr(module, attribute)


def import_user_module(name: str) -> str:
    """Import a user's module, given by name or .py file, and return its name.

    Raises:
        MissingError: ``no-file``.
        SettingError: ``not-importable``.
    """
    path = Path(name)
    if path.suffix == ".py":
        if not path.is_file():
            raise MissingError("no-file", f"there is no file {name}")
        name = path.stem
        working_directory.allow(name, str(path.parent.resolve()))
    else:
        working_directory.allow(name)
    _imported(name, f"module {name!r}")
    return name


def _imported(name: str, said: str) -> ModuleType:
    """Import a module that a user named; ``said`` is how error messages refer to it."""
    try:
        return importlib.import_module(name)
    except RlhfError:
        raise
    except SystemExit as error:
        raise SettingError(
            "not-importable",
            f"module {name!r} calls sys.exit({error.code!r}) when it is imported; put its script part under "
            "if __name__ == '__main__'",
        ) from error
    except Exception as error:
        installed = ("<", sys.prefix, sys.base_prefix)  # "<": frames of the import system, which have no file
        frames = [f for f in traceback.extract_tb(error.__traceback__)[1:] if not f.filename.startswith(installed)]
        where = "".join(f" in {f.filename}, line {f.lineno}" for f in frames[-1:])
        foreseen = isinstance(error, ModuleNotFoundError | SyntaxError) or not frames
        raised = "" if foreseen else f" ({type(error).__name__}{where})"
        raise SettingError("not-importable", f"{said} cannot be imported: {error}{raised}") from error


def shipped_classes(room: str, base: Any) -> dict[str, Any]:
    """Return the public classes defined in the files of a package that inherit from ``base``, by name."""
    found = {}
    for entry in pkgutil.iter_modules(importlib.import_module(room).__path__):
        if entry.ispkg:
            continue
        module = importlib.import_module(f"{room}.{entry.name}")
        for name, kind in vars(module).items():
            own = isinstance(kind, type) and kind.__module__ == module.__name__ and not name.startswith("_")
            if own and issubclass(kind, base):
                found[name] = kind
    return found


def cache_folder(folder: str | None = None) -> Path:
    """Return the folder of cached models, checks and encoded rows: ``folder``, $RLHF_CACHE, or the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlhf_lightning"
    return Path(folder or os.environ.get("RLHF_CACHE") or default).expanduser()


def read_yaml(text: str) -> Any:
    """Parse YAML text to plain values, within the limits of `refuse_large_yaml`."""
    refuse_large_yaml(text)
    return yaml.safe_load(text)


def read_config(path: Path) -> dict[str, Any]:
    """Return the settings in a config file.

    Raises:
        SettingError: ``yaml-too-large``, or ``invalid-config``: the file is not YAML, or not a mapping.
    """
    try:
        found = read_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise SettingError("invalid-config", f"{path} is invalid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise SettingError("invalid-config", f"{path} is not a mapping of settings, such as `model: ...`")
    return found


def flat_settings(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a config to the command line's names: model.beta for model.init_args.beta."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = prefix if key == "init_args" else f"{prefix}.{key}".lstrip(".")
        if isinstance(value, Mapping) and value:
            flat |= flat_settings(value, name)
        else:
            flat[name] = value
    return flat


YAML_CHARACTERS, YAML_DEPTH, YAML_VALUES = 1_000_000, 64, 1_000_000
"""Limits of a config: characters, nesting depth, and values after expanding aliases."""


def refuse_large_yaml(text: str) -> None:
    """Refuse YAML that is too long, too deeply nested, or too large once aliases are expanded: parsers hang or crash.

    Raises:
        SettingError: ``yaml-too-large``.
    """
    if len(text) > YAML_CHARACTERS:
        raise SettingError(
            "yaml-too-large", f"a config has {len(text):,} characters; at most {YAML_CHARACTERS:,} are read"
        )
    sizes: dict[str, int] = {}
    opened: list[tuple[str | None, int]] = [(None, 0)]
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        size, anchor = 0, getattr(event, "anchor", None)
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append((anchor, 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = opened.pop()
            sizes[anchor or ""] = size
        elif isinstance(event, yaml.AliasEvent):
            size = sizes.get(str(anchor), YAML_VALUES + 1)  # an alias inside its own anchor is infinite
        elif isinstance(event, yaml.ScalarEvent):
            size = 1
        opened[-1] = (opened[-1][0], opened[-1][1] + size)
        if len(opened) > YAML_DEPTH or opened[-1][1] > YAML_VALUES:
            many = f"more than {YAML_DEPTH} levels" if len(opened) > YAML_DEPTH else f"more than {YAML_VALUES:,} values"
            raise SettingError("yaml-too-large", f"a config has {many}, aliases written out: write a smaller one")


def refuse_repeated_keys(text: str) -> None:
    """Refuse YAML in which a mapping repeats a key: the parser would silently keep only the last value.

    Raises:
        SettingError: ``repeated-key``.
    """
    nodes, seen = [yaml.compose(text, Loader=yaml.SafeLoader)], set()
    while nodes:
        node = nodes.pop()
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        if isinstance(node, yaml.MappingNode):
            nodes += [value for _, value in node.value]
            counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            if twice := [key for key, count in counts.items() if count > 1]:
                line = node.start_mark.line + 1
                raise SettingError(
                    "repeated-key", f"the key {twice[0]!r} stands twice in the mapping at line {line}: remove one"
                )


# -- settings ---------------------------------------------------------------------------------------------------------


def check_ranges(kind: type, settings: Mapping[str, Any]) -> None:
    """Refuse settings outside the ranges that a class and its base classes declare.

    Args:
        kind: class whose ``ranges`` map names of settings to intervals, such as "(0, inf)" or "[0, 0.5)".
        settings: values by name; only numbers and tuples of numbers are checked.

    Raises:
        SettingError: ``setting-out-of-range``: a value lies outside its interval, or is NaN.
    """
    ranges: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        ranges |= vars(base).get("ranges", {})
    for name, interval in ranges.items():
        value = settings.get(name)
        numbers = value if isinstance(value, list | tuple) else [value]
        if not all(_within(number, interval) for number in numbers if isinstance(number, int | float)):
            where = f"{name} of {kind.__name__} is {value}"
            raise SettingError("setting-out-of-range", f"{where}: it must lie in {interval}")


def _within(value: float, interval: str) -> bool:
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high)


def refuse_contradictions(contradictions: Mapping[str, tuple[bool, str]]) -> None:
    """Refuse contradictory settings; each error code maps to (whether the contradiction holds, the error's sentence).

    Raises:
        SettingError: with the code of the first contradiction.
    """
    for code, (contradicts, sentence) in contradictions.items():
        if contradicts:
            raise SettingError(code, sentence)


# -- names ------------------------------------------------------------------------------------------------------------


def _found(name: str, shipped: Mapping[str, Any], what: str) -> Any:
    if name in shipped:
        return shipped[name]
    if "." in name:
        return import_path(name, what)
    usable = sorted(key for key, kind in shipped.items() if not inspect.isabstract(kind))
    own = f"Your own has its module before it: my_file.{name}"
    hint = hint_at(name, usable) if usable else ""
    if ":" in name:
        hint, own = f"a dot comes before a name: {name.replace(':', '.')}", ""
    elif name.isidentifier() and importlib.util.find_spec(name) is not None:
        hint, own = f"{name} is a module: name what is in it, such as {name}.score", ""
    raise SettingError("unknown-name", f"there is no {what} {name!r}; {' '.join(filter(None, (hint, own)))}")


def _check_kind(found: Any, base: Any, name: str, what: str, of_class: bool) -> None:
    if of_class and isinstance(found, type) and issubclass(found, base):
        return
    if not of_class and isinstance(found, base):
        return
    is_now = "a class" if isinstance(found, type) else f"a {type(found).__name__}"
    needed = f"a subclass of {base.__module__}.{base.__qualname__}"
    if base is Callable:
        needed = "a function, or a class whose objects can be called"
    raise SettingError("wrong-kind", f"{what} {name!r} is {is_now}; it must be {needed}")


def _made(kind: type, arguments: Mapping[str, Any], name: str, what: str) -> Any:
    if lacking := sorted(getattr(kind, "__abstractmethods__", ())):
        raise SettingError("wrong-kind", f"{what} {name!r} is abstract: it must define {', '.join(lacking)}")
    try:
        inspect.signature(kind).bind(**arguments)
        return kind(**arguments)
    except TypeError as error:
        takes = ", ".join(inspect.signature(kind).parameters)
        hint = f"; it takes {takes}" if takes else "; it takes no arguments"
        raise SettingError("wrong-arguments", f"{what} {name!r} cannot be made: {error}{hint}") from error
