"""Answer help, misspelt flags and names of other libraries from a generated index of all settings.

The index, flag_index.json, is read within a second. The parser needs ten seconds, because it imports torch and the
classes. ``python -m rlhf_lightning.commands.objectives`` generates the index; a test compares it with the classes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import textwrap
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from rlhf_lightning.commands.flags import config_settings, is_option, option_pairs, with_underscores
from rlhf_lightning.errors import printable
from rlhf_lightning.recipes import recipe_names
from rlhf_lightning.similar_names import nearest

INDEX = Path(__file__).with_name("flag_index.json")
PARTS = ("model", "data")
GROUPS = frozenset(
    ["config", "help", "print_config", *PARTS, "trainer", "checkpoint", "samples", "export", "predictions"]
)
"""Options that are not settings: options of the command, and the option for a YAML file of each group."""
REFUSED = ("trainer.accumulate_grad_batches", "trainer.gradient_clip_val", "trainer.gradient_clip_algorithm")
"""Trainer flags that the modules refuse; help leaves them out."""

ROOMS = ("modules", "data", "training", "runs", "people", "planning")
"""Packages whose files define settings."""

PAGES = Path(__file__).with_name("help_pages.yaml")
FOREIGN_NAMES = Path(__file__).with_name("foreign_names.yaml")


class Setting(NamedTuple):
    """A line of help: dotted name, type, default and description."""

    name: str
    type: str
    default: str
    help: str


class Answered(NamedTuple):
    """Exit status and text of a command line that was answered from the index."""

    status: int
    text: str


@lru_cache(maxsize=1)
def index() -> dict[str, Any]:
    """Return the index: ``settings`` is a list, to which ``run``, ``model`` and ``data`` refer by number."""
    found: dict[str, Any] = json.loads(INDEX.read_text(encoding="utf-8"))
    return found


def is_stale() -> bool:
    """Whether the sources name other classes or settings than they did when the index was generated."""
    return bool(index()["sources"] != source_digests())


_NAMED = re.compile(rb"^class (\w+)|(?:^    |^        (?=.*,$)|[(,] ?)(\w+): ", re.MULTILINE)
"""Matches what can be a class or a setting: an annotated name in a class or among the arguments of a function."""


def source_digests(package: Path = INDEX.parents[1]) -> dict[str, str]:
    """Return a digest of the names of classes and settings in each source file, by its path in the package.

    The times of files do not serve: git writes all files of a pull in any order. Digests of the whole files would
    change with every edit.
    """
    return {
        file.relative_to(package).as_posix(): hashlib.blake2b(
            b" ".join(b"".join(names) for names in _NAMED.findall(file.read_bytes())), digest_size=4
        ).hexdigest()
        for file in _sources(package)
    }


def _sources(package: Path = INDEX.parents[1]) -> list[Path]:
    """Return the files that define settings."""
    return [file for room in ROOMS for file in sorted(package.glob(f"{room}/*.py"))]


@lru_cache(maxsize=1)
def foreign_names() -> dict[str, dict[str, str]]:
    """Return ``settings`` and ``classes`` of other libraries, each with the name that replaces it here."""
    found: dict[str, dict[str, str]] = yaml.safe_load(FOREIGN_NAMES.read_text(encoding="utf-8"))
    return found


def class_entry(part: str, name: str) -> dict[str, Any] | None:
    """Return the entry of a shipped class by its short name or import path; None for other classes."""
    path, _, short = name.rpartition(".")
    entry: dict[str, Any] | None = index()[part].get(short)
    return entry if entry is not None and (not path or path.startswith("rlhf_lightning")) else None


def settings_of(numbers: Iterable[int], prefix: str = "") -> list[Setting]:
    """Return the settings of an entry; ``prefix`` is put before their names."""
    rows = index()["settings"]
    return [Setting(f"{prefix}{name}", *rest) for name, *rest in (rows[number] for number in numbers)]


@lru_cache(maxsize=1)
def all_names() -> frozenset[str]:
    """Return the dotted names of all settings of a run and of all shipped classes."""
    names = {setting.name for setting in settings_of(index()["run"])}
    for part in PARTS:
        names |= {s.name for entry in index()[part].values() for s in settings_of(entry["settings"], f"{part}.")}
    return frozenset(names | GROUPS)


def suggestion(name: str, known: Iterable[str], dashes: str = "--") -> str | None:
    """Return a hint at the setting that ``name`` probably means: a similar spelling, or another library's name."""
    known = set(known)
    tail = name.rpartition(".")[2]
    table = foreign_names()["settings"]
    key = name.replace(".init_args.", ".")
    for alias in (key, ".".join(key.split(".")[-2:]), tail):
        if alias in table and known & set(table[alias].split()):
            return "use " + " and ".join(f"{dashes}{target}" for target in table[alias].split() if target in known)
    group, _, inside = key.partition(".")
    groups = {one.partition(".")[0] for one in known if "." in one}
    if inside:
        group = group if group in groups else nearest(group, groups) or ""
        if group and inside.partition(".")[0] == "class_path":
            return f"the nearest is {dashes}{group}"
        below = {one.partition(".")[2]: one for one in known if one.startswith(f"{group}.")}
        near = inside if inside in below else nearest(inside, below)
        return f"the nearest is {dashes}{below[near]}" if near else None
    last = {one.rpartition(".")[2]: one for one in sorted(known, key=lambda one: -one.count("."))}
    near = name if name in last else nearest(name, last)
    return f"the nearest is {dashes}{last[near]}" if near else None


# -- answers ----------------------------------------------------------------------------------------------------------


def quick_answer(argv: Sequence[str]) -> Answered | None:
    """Answer a command line that asks for help or has a wrong flag; return None if the command must run.

    Args:
        argv: the command line of a training command, `rlhf plan` or `rlhf loop`, starting with the command's name.
    """
    command, rest = argv[0], with_underscores(argv[1:])
    pairs = option_pairs(rest)
    options = dict(reversed(pairs))
    if wrong := next(filter(None, (wrong_config(value) for name, value in pairs if name == "--config")), None):
        return refusal(command, wrong)
    for part in PARTS:
        entry = class_entry(part, options.get(f"--{part}.help", ""))
        if entry is not None:
            return Answered(0, class_page(part, options[f"--{part}.help"], entry))
    chosen = {part: chosen_class(rest, part) for part in PARTS}
    asked = options.get("--help", options.get("-h"))
    if asked is not None:
        return help_answer(command, asked, chosen)
    if command == "loop":
        sentences = [wrong_tool_option(command, name) for name, _ in pairs]
    else:
        sentences = [*(wrong_class(*item) for item in chosen.items()), *(wrong_form(*pair) for pair in pairs)]
        sentences += [wrong_form(argument, "") for argument in rest] + [stray_value(command, argv[1:])]
        sentences += [wrong_option(name, chosen, names_of_tool(command)) for name, _ in pairs]
    wrong = next(filter(None, sentences), None)
    if not rest and command != "loop":
        wrong = "missing: --model CLASS and --data CLASS, or a --config file such as recipe:dpo"
    elif wrong is None or is_stale():
        return None
    return refusal(command, wrong)


def refusal(command: str, sentence: str) -> Answered:
    """Return the answer to a wrong command line."""
    return Answered(2, f"rlhf {command}: {printable(sentence)}\n`rlhf {command} --help` lists the options.")


def wrong_config(file: str) -> str | None:
    """Return an error message if a config file is another kind of file, or a folder; else None."""
    path = Path(file)
    if os.path.isdir(file):
        return f"--config takes a YAML file, and {file} is a folder; a run's is {path / 'config.yaml'}"
    if path.suffix == ".py":
        return f"--config takes a YAML file; give a class of {file} as --model {path.stem}.CLASS"
    if is_data_file(file) and path.suffix != ".json":
        return f"--config takes a YAML file; give the data as --data.source {file}"
    return None


def names_of_tool(command: str) -> set[str]:
    """Return the options of a tool that are not settings of a run."""
    return {one.name for one in settings_of(index()["tools"].get(command, {}).get("settings", ()))}


def wrong_tool_option(command: str, option: str) -> str | None:
    """Return an error message for a wrong option of a tool without settings of a run; None if it is known."""
    name, known = option.lstrip("-"), names_of_tool(command) | {"config", "help", "print_config"}
    if name.endswith("help") or any(name == one or name.startswith(f"{one}.") for one in known):
        return None
    hint = suggestion(name, known)
    return f"there is no setting {option}" + (f"; {hint}" if hint else "")


def stray_value(command: str, argv: Sequence[str]) -> str | None:
    """Return an error message, with a suggestion, for a value that follows no option; None if there is none."""
    expected, option, before = command in ("validate", "test", "predict"), "", ""  # these take the evaluated run
    for argument in argv:
        name, equals, value = argument.partition("=")
        if is_option(argument):
            expected, option, before = not equals, name, value
        elif expected:
            expected, before = False, argument
        elif equals and name.lstrip("+~").replace(".", "").isidentifier():
            return f"unexpected argument {argument!r}: a setting is written --{name.lstrip('+~')}={value}"
        elif takes_list(option):
            return f"unexpected argument {argument!r}: a list is written {option} '[{before}, {argument}]'"
        else:
            return f"unexpected argument {argument!r}: a value follows an option, such as {option_for(argument)}"
    return None


def takes_list(option: str) -> bool:
    """Whether an option of a run or of a shipped class can be a list."""
    name = option.lstrip("-")
    part, _, inside = name.partition(".")
    name = inside if part in PARTS else name
    return any(row[0] == name and "list" in row[1] for row in index()["settings"])


def option_for(value: str) -> str:
    """Suggest an option for a value that was given without one."""
    for part in PARTS:
        if class_entry(part, value) is not None:
            return f"--{part} {value}"
    if value in recipe_names():
        return f"--config recipe:{value}"
    if os.path.isdir(value) and (any(Path(value).glob("version_*")) or (Path(value) / "manifest.json").is_file()):
        return f"--resume {value}"
    if is_data_file(value):
        return f"--data.source {value}"
    return f"--model.init_from {value}" if os.path.isdir(value) else f"--config {value}"


def chosen_class(argv: Sequence[str], part: str) -> str:
    """Return the class that flags or config files choose for a part; "" for none."""
    flags = [value for name, value in option_pairs(argv) if name in (f"--{part}", f"--{part}.class_path")]
    return (flags or [kind for _, kind, _ in config_settings(argv, part)] or [""])[-1]


def wrong_class(part: str, name: str) -> str | None:
    """Return an error message for a wrong class name; None for shipped classes and for possible classes of the user."""
    if place := misplaced(part, name):
        return place
    if not name or "." in name or class_entry(part, name) is not None or name in index()["bases"]:
        return None
    if any(f"class {name}(" in file.read_text(encoding="utf-8") for file in _sources()):  # newer than the index
        return None
    near = foreign_names()["classes"].get(name) or nearest(name, index()[part])
    hint = f"did you mean {near}?" if near else NOT_FOUND[part]
    return f"{part}: there is no class {name}; {hint} Write your own class with its module, as my_objective.{name}"


NOT_FOUND = {
    "model": "`rlhf objectives` lists them, and give the model to start from as --model.init_from.",
    "data": "the nearest are SFTDataModule, PreferenceDataModule and PromptDataModule.",
}


def misplaced(part: str, name: str) -> str | None:
    """Return an error message if a model or a file was given as a class; it names the right option."""
    if Path(name).suffix in (".yaml", ".yml"):  # probably a file with the settings of a class
        return None
    if part == "model" and name and ("/" in name or os.path.isdir(name)):
        return (
            f"--model takes an objective, such as DPOModule; give the model to start from as --model.init_from {name}"
        )
    if part == "data" and (is_data_file(name) or "/" in name):
        return f"--data takes a DataModule, such as PreferenceDataModule; give the data as --data.source {name}"
    return None


def is_data_file(name: str) -> bool:
    """Whether a name looks like a data file."""
    return Path(name).suffix.lower() in (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt")


def wrong_form(argument: str, value: str) -> str | None:
    """Return an error message for an option with one hyphen, or for a settings group with a single value; else None."""
    name = argument.lstrip("-").partition("=")[0]
    if argument.startswith("-") and not argument.startswith("--") and name.replace("-", "_") in all_names():
        return f"an option begins with two hyphens: --{name}"
    if argument == "--model.lora" and not value.startswith(("{", "null")) and not os.path.isfile(value):
        rank = value if value.isdecimal() else "16"
        return f"model.lora is a group of settings: give --model.lora.r {rank}, or '{{r: {rank}}}'"
    return None


def wrong_option(option: str, chosen: dict[str, str], further: Collection[str] = ()) -> str | None:
    """Return an error message for a wrong option; None if it is known or a user's class may know it.

    Args:
        option: the option with its hyphens.
        chosen: the classes of `PARTS`, "" for none.
        further: options of the command in addition to the settings of a run.
    """
    if not option.startswith("--"):
        return None
    name = option[2:].rstrip("+").replace(".init_args.", ".")
    part, _, inside = name.partition(".")
    known = all_names().union(further)
    if name.endswith("help") or inside == "class_path":
        return None
    if part in PARTS and inside:
        entry = class_entry(part, chosen[part]) if chosen[part] else None
        if chosen[part] and entry is None:
            return None
        names = known if entry is None else {s.name for s in settings_of(entry["settings"], f"{part}.")}
        if any(name == one or name.startswith(f"{one}.") for one in names):
            return None
        if entry is not None:
            elsewhere = {one for one in known if not one.startswith(f"{part}.")}
            hint = suggestion(name, names) or suggestion(inside, elsewhere)
            hint = hint or f"`rlhf fit --{part}.help {chosen[part]}` lists its arguments"
            return f"--{name} is not an argument of {chosen[part].rpartition('.')[2]}; {hint}"
    elif name in known or any(name.startswith(f"{one}.") for one in known - GROUPS):
        return None
    hint = suggestion(name, known)
    return f"there is no setting --{name}" + (f"; {hint}" if hint else "")


# -- help -------------------------------------------------------------------------------------------------------------


def help_answer(command: str, asked: str, chosen: dict[str, str]) -> Answered | None:
    """Return the page that ``--help [GROUP]`` asks for; None if the parser must print it."""
    if asked and not asked.startswith("-"):
        found = [s for s in settings_of(index()["run"]) if s.name.startswith(f"{asked}.")]
        return Answered(0, lines_of(found)) if found else None
    entries = {part: class_entry(part, kind) for part, kind in chosen.items() if kind}
    if any(entry is None for entry in entries.values()):
        return None
    pages = [class_page(part, chosen[part], entry, brief=True) for part, entry in entries.items() if entry is not None]
    return Answered(0, "\n\n".join(pages) or command_page(command))


def command_page(command: str) -> str:
    """Return the page of ``rlhf COMMAND --help``."""
    pages: dict[str, str] = yaml.safe_load(PAGES.read_text(encoding="utf-8"))
    entry = index()["tools"].get(command, {"doc": "", "settings": ()})
    page = pages.get(command, pages["run"])
    return page.format(command=command, about=entry["doc"], settings=lines_of(settings_of(entry["settings"])))


def class_page(part: str, name: str, entry: dict[str, Any], brief: bool = False) -> str:
    """Return the help of a shipped class: its description, paper and settings."""
    short = name.rpartition(".")[2]
    about = entry["doc"].partition("\n\n")[0] if brief else entry["doc"]
    rows = settings_of(entry["settings"], f"{part}.")
    needed = "".join(f" --{one.name} VALUE" for one in rows if one.default == "required")
    other = "data" if part == "model" else "model"
    usage = f"usage: rlhf fit --{part} {short}{needed} [--{part}.SETTING VALUE ...] --{other} CLASS ..."
    title = f"{short}: {entry['paper']}; needs {entry['needs']}" if entry["paper"] else short
    return "\n\n".join([usage, title, about, lines_of(rows)])


def lines_of(settings: Sequence[Setting]) -> str:
    """Return settings as help text, with one paragraph each."""
    width = min(shutil.get_terminal_size((120, 24)).columns, 120)
    lines = []
    for one in settings:
        default = "required" if one.default == "required" else f"default {one.default}"
        lines.append(f"  --{one.name} {one.type}  ({default})")
        lines += textwrap.wrap(one.help, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)
