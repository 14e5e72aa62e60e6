"""Turn jsonargparse's errors into one sentence that says what is wrong and names the closest valid name."""

from __future__ import annotations

import ast
import functools
import inspect
import os
import re
import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from rlhf_lightning.commands.flag_index import PARTS, all_names, foreign_names, suggestion
from rlhf_lightning.compat import parser_actions, type_of_option
from rlhf_lightning.loading import import_path
from rlhf_lightning.recipes import PREFIX, recipe_names
from rlhf_lightning.similar_names import hint_at, nearest

HEADER_KEY = re.compile(r'^Parser key "([^"]+)"')
TYPE_NAMES = {"NoneType": "null", "int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
TYPE_NAMES |= {
    "list": "a list such as '[a, b]'",
    "dict": "a mapping such as '{a: b}'",
    "tuple": "a list such as '[a, b]'",
}
CLASS = re.compile(r"given class_path '([^']+)'")


def parameters_of(class_path: str) -> list[str]:
    """Return the names of a class's arguments, including those passed on through ``**kwargs``."""
    return list(defaults_of(class_path))


def defaults_of(class_path: str) -> dict[str, Any]:
    """Return the arguments of a class with their defaults, including those passed on through ``**kwargs``."""
    probe = ArgumentParser(exit_on_error=False)
    try:
        names = probe.add_class_arguments(import_path(class_path), fail_untyped=False)
        return {name: probe.get_default(name) for name in names}
    except Exception:  # the parser refuses such a class later, with its own message
        return {}


def own_settings(written: str, chosen: str) -> set[str]:
    """Return the settings that two modules have in common by name only: their definitions or defaults differ.

    Settings that name an object and default to null, such as ``scorer``, belong to the run and are left out.
    """
    from rlhf_lightning.training.module import AlignmentModule  # imports torch, which help must not wait for

    known = {kind.__name__: kind for kind in subclasses_of(AlignmentModule).values()}
    kinds = [known[path] if path in known else import_path(path) for path in (written, chosen)]
    base = next(kind for kind in kinds[1].__mro__ if issubclass(kinds[0], kind))
    below = [kind for path in kinds for kind in path.__mro__ if not issubclass(base, kind)]
    own = {name for kind in below for name in inspect.signature(kind).parameters if "__init__" in vars(kind)}
    before, now = (defaults_of(f"{kind.__module__}.{kind.__qualname__}") for kind in kinds)
    own -= inspect.signature(AlignmentModule).parameters.keys()
    both = before.keys() & now.keys()
    return {name for name in both if before[name] != now[name] or (name in own and now[name] is not None)}


def subclasses_of(base: type) -> dict[str, type]:
    """Return the imported concrete subclasses of a class by name."""
    found: dict[str, type] = {}
    children: list[type] = base.__subclasses__()
    for child in children:
        if not inspect.isabstract(child) and not child.__name__.startswith("_"):
            found[child.__name__] = child
        found.update(subclasses_of(child))
    return found


def explain(message: str, parser: Any = None) -> str:
    """Return one sentence for an error message of jsonargparse; ``parser`` knows the valid names."""
    header = HEADER_KEY.match(message)
    key = header.group(1) if header else ""
    class_path = found.group(1) if (found := CLASS.search(message)) else ""
    for rule in (_wrong_optimizer, _wrong_option, _wrong_argument, _missing, _wrong_class, _wrong_value, _wrong_file):
        sentence = rule(message, key, class_path, parser)
        if sentence:
            return sentence
    return _tidied(message)


def _wrong_optimizer(message: str, key: str, class_path: str, parser: Any) -> str | None:
    """Explain an optimizer or a scheduler that cannot be imported."""
    found = re.search(r'Parser key "(optimizer|lr_scheduler)"', message)
    given = re.search(r"Given value: (\w[^\n]*)", message)
    if not found or not given or "Expected a dot import path string" not in message:
        return None
    example = {"optimizer": "torch.optim.AdamW", "lr_scheduler": "torch.optim.lr_scheduler.LinearLR"}[found.group(1)]
    near = nearest(given.group(1), vars(sys.modules["torch.optim"])) if found.group(1) == "optimizer" else None
    return (
        f"model.{found.group(1)}: there is no class {given.group(1).strip()}; give its path, such as "
        f"{f'torch.optim.{near}' if near else example}"
    )


def _wrong_option(message: str, key: str, class_path: str, parser: Any) -> str | None:
    """Explain an unknown option or key of a YAML file."""
    found = re.search(r"unrecognized arguments: (.+)", message, re.DOTALL)
    if found:
        given = found.group(1).split()[0]
        known = {action.dest: action.option_strings for action in parser_actions(parser)}
        if not given.startswith("-"):
            option = next((name for name in ("model", "models", "name", "config") if known.get(name)), None)
            example = f": a value follows an option, such as --{option} {given}" if option else ""
            return f"unexpected argument {given!r}{example}"
        name, dashes = given.lstrip("-").partition("=")[0], "--"
        if known.get(name) == []:
            return f"the {name} is given without --{name}, right after the command"
    else:
        found = re.search(r"does not accept option '([^']+)'", message)
        if not found:
            return None
        name, dashes = found.group(1), ""
    hint = suggestion(name, known_keys(parser), dashes)
    return f"there is no setting {dashes}{name}" + (f"; {hint}" if hint else "")


def known_keys(parser: Any) -> list[str]:
    """Return the dotted settings of a parser, including arguments of shipped and imported modules and DataModules."""
    keys: list[str] = []
    for action in parser_actions(parser):
        if not isinstance(action.dest, str) or action.dest in ("help", "print_config") or action.dest.endswith(".help"):
            continue
        keys.append(action.dest)
        base = _base_class(action) if action.dest in PARTS else None
        keys += all_names() if base is not None else ()
        for child in subclasses_of(base).values() if base is not None else ():
            if not child.__module__.startswith("rlhf_lightning."):
                keys += [f"{action.dest}.{name}" for name in _names_of(child)]
    return keys


@functools.cache  # a process may import hundreds of classes, and refuse many settings
def _names_of(kind: type) -> list[str]:
    """Return the names of a class's arguments."""
    return parameters_of(f"{kind.__module__}.{kind.__qualname__}")


def _base_class(action: Any) -> type | None:
    """Return the base class of an option that takes a class; else None."""
    hint = type_of_option(action)
    candidates = [hint, *getattr(hint, "__args__", ())]
    return next((c for c in candidates if inspect.isclass(c) and c.__module__ not in ("builtins", "types")), None)


def _wrong_argument(message: str, key: str, class_path: str, parser: Any) -> str | None:
    """Explain an argument that the chosen class does not have."""
    found = re.search(r"Option '([^']+)' is not accepted", message)
    if found and found.group(1).partition(".")[0] in PARTS:
        return f"{found.group(1)} is a setting of `rlhf fit`: this command takes another config file"
    if not found or not class_path:
        return None
    name, known, short = found.group(1), parameters_of(class_path), class_path.rpartition(".")[2]
    if name == "class_path":
        given = re.search(r"'class_path': '([^']+)'", message)
        short = given.group(1).rpartition(".")[2] if given else short
        return f"{key}: put the arguments of {short} under init_args, next to class_path"
    hint = suggestion(f"{key}.{name}", [f"{key}.{one}" for one in known], "")
    hint = hint or f"it takes {', '.join(known) or 'none'}"
    return f"{key}.{name} is not an argument of {short}; {hint}"


def _missing(message: str, key: str, class_path: str, parser: Any) -> str | None:
    """Explain a missing required argument."""
    found = re.search(r"the following arguments are required: ([^\n]+)", message)
    if not found:
        return None
    names = [name.strip() for name in found.group(1).split(",")]
    if class_path:
        flags = ", ".join(f"--{key}.{name}" for name in names)
        return f"{class_path.rpartition('.')[2]} needs {flags}"
    names = [re.sub(r"^(fit|validate|test|predict)\.", "", name) for name in names]
    options = {action.dest: action.option_strings for action in parser_actions(parser)}
    asked = ", ".join(f"--{name}" if options.get(name, True) else name.upper() for name in names)
    classes = {"model", "data"} & {name for name in names if options.get(name, True)}
    hint = "; give a class as in --model DPOModule, or a --config file" if classes else ""
    return f"missing: {asked}{hint}"


def _wrong_class(message: str, key: str, class_path: str, parser: Any) -> str | None:
    """Explain a class that cannot be found, imported or used here."""
    given = found.group(1).strip() if (found := re.search(r"Given value: ([^\n]+)", message)) else class_path
    if found := re.fullmatch(r'Parser key "[^"]+":\s+Expected a dot import path string: (.+)', message):
        return f"{key}: there is no class {found.group(1)}; give its import path, as my_module.{found.group(1)}"
    if "Expected a dot import path string" in message and "Given value type: <class 'str'>" in message:
        base = next((_base_class(a) for a in parser_actions(parser) if a.dest == key), None)
        known = sorted(subclasses_of(base)) if base else []
        theirs = foreign_names()["classes"].get(given)
        hint = f"did you mean {theirs}?" if theirs else hint_at(given, known)
        own = f"Write your own class with its module, as my_objective.{given}"
        return f"{key}: there is no class {given}; {hint} {own}"
    if class_path and (found := re.search(r"(No module named [^\n]+|cannot import name [^\n]+)", message)):
        return f"{key}: {class_path} cannot be imported from {os.getcwd()}: {found.group(1).strip()}"
    if class_path and (found := re.search(r"module '([^']+)' has no attribute '([^']+)'", message)):
        module, name = found.groups()
        near = nearest(name, [n for n, value in vars(sys.modules[module]).items() if inspect.isclass(value)])
        return f"{key}: {module} has no class {name}" + (f"; the nearest is {module}.{near}" if near else "")
    if found := re.search(r"does not correspond to a subclass of (\w+)", message):
        return f"{key}: {given} is not a subclass of {found.group(1)}"
    if found := re.search(r"Expected an instantiatable class, but (\S*) ?is abstract", message):
        name = found.group(1) or given
        if name == given and (lacking := _abstract_methods(given)):
            return f"{key}: {name} is abstract: it must define {', '.join(lacking)}"
        return f"{key}: {name.rpartition('.')[2]} is an abstract base class; choose a class with --{key} CLASS"
    return None


def _abstract_methods(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    return sorted(getattr(getattr(sys.modules.get(module), name, None), "__abstractmethods__", ()))


def _wrong_value(message: str, key: str, class_path: str, parser: Any) -> str | None:
    """Explain a value of the wrong type."""
    inner = re.search(r'Parser key "([^"]+)":\s+(?:Expected|Does not)', message[1:])
    if inner:
        key = f"{key}.{inner.group(1)}" if key else inner.group(1)
    value = re.search(r"Got value: ([^\n]*)", message) or re.search(r"Given value: ([^\n]*)", message)
    part = message[inner.start() + 1 :] if inner else message
    below = re.findall(r'Parser key "([^"]+)":', part)[1:]
    if len(below) == 1:  # a setting of a group, such as lora
        key, part = f"{key}.{below[0]}", part[part.rindex("Parser key") :]
    expected = [_type_name(name) for name in re.findall(r"Expected an? ([^\n]+?)(?:\. Got value|\n|$)", part)]
    if not value or not expected or not key:
        return None
    given = value.group(1).strip()
    wrapped = re.fullmatch(r"NestedArg\(key='[^']*', val=(.*)\)", given)
    given = wrapped.group(1) if wrapped else given
    if sentence := _wrong_description(key, given):
        return sentence
    kinds = list(dict.fromkeys(kind for kind in expected if kind))
    if inner and kinds[-1:] == ["null"] and "Subtypes" not in part:
        kinds = kinds[:-1]
    return f"{key} must be {' or '.join(kinds)}, not {given}"


def _wrong_description(key: str, given: str) -> str | None:
    """Explain what is wrong with a class that was given as a mapping, or inside a list."""
    try:
        value = ast.literal_eval(given)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None
    for one in value if isinstance(value, list) else [value]:
        if not isinstance(one, dict) or "class_path" not in one:
            continue
        if not isinstance(one["class_path"], str):
            return f"{key}: class_path is {one['class_path']!r}: give the name or the import path of a class"
        if not isinstance(one.get("init_args", {}), dict | None):
            name, value = one["class_path"], one["init_args"]
            return f"{key}: init_args of {name} must be a mapping such as '{{a: b}}', not {value!r}"
        for name, inner in (one.get("init_args") or {}).items():
            if sentence := _wrong_description(f"{key}.{name}", repr(inner)):
                return sentence
    return None


def _type_name(expected: str) -> str:
    """Return a type as a user writes it."""
    if found := re.fullmatch(r"<class '([^']+)'>", expected.strip()):
        name = found.group(1).rpartition(".")[2]
        return TYPE_NAMES.get(name, name)
    if found := re.fullmatch(r"typing\.Literal\[(.*)\]", expected.strip()):
        return f"one of {found.group(1)}"
    return expected.strip()


def _wrong_file(message: str, key: str, class_path: str, parser: Any) -> str | None:
    """Explain a config file that is missing or is not YAML."""
    if found := re.search(r"File does not exist: '([^']+)'", message):
        name = Path(found.group(1)).stem
        return f"there is no file {found.group(1)}" + (
            f"; {PREFIX}{name} is packaged" if name in recipe_names() else ""
        )
    if "Unexpected config:" in message:
        return "a config file is empty or is not a mapping of settings, such as `model: {class_path: DPOModule}`"
    if found := re.search(r"Problems parsing config: (.+)", message, re.DOTALL):
        return f"invalid YAML in the config file: {' '.join(found.group(1).split())}"
    return None


def _tidied(message: str) -> str:
    """Join the lines of any other message, and remove the parser's internals."""
    internal = ("Given value", "Subtypes:", "Does not validate", "Errors:", "Expected a <class 'NoneType'>")
    lines = [line.strip(" -") for line in message.splitlines()]
    return "; ".join(line for line in lines if line and not line.startswith(internal))
