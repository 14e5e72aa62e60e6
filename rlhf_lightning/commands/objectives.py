"""``rlhf objectives``, and the generator of the index of settings that this command and the help read."""

from __future__ import annotations

import importlib
import inspect
import re
import shutil
import sys
import textwrap
from argparse import SUPPRESS
from collections.abc import Mapping, Sequence
from json import dumps
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

from rlhf_lightning.atomic_files import write_text
from rlhf_lightning.commands.flag_index import GROUPS, INDEX, PARTS, REFUSED, index, is_stale, source_digests
from rlhf_lightning.commands.parsing import run_function
from rlhf_lightning.loading import shipped_classes
from rlhf_lightning.similar_names import hint_at


class Objective(NamedTuple):
    """A row of the list: class, family, paper, required data and models, first line of the docstring."""

    name: str
    family: str
    paper: str
    needs: str
    summary: str


FAMILIES = {
    "SFTModule": "demonstrations",
    "DPOModule": "preference pairs",
    "UnpairedModule": "completions judged alone",
    "RewardModule": "reward models",
    "OnlineDPOModule": "preferences on-policy",
    "NashMDModule": "preferences on-policy",
    "DivergenceObjective": "distillation",
    "OnPolicyDistillationModule": "distillation",
    "CriticFreeModule": "on-policy, without a critic",
    "PPOModule": "on-policy, with a critic",
}
"""Name of each family, by its base class."""

DATA = {
    "DemonstrationBatch": "demonstrations",
    "PreferenceBatch": "pairs",
    "RankedBatch": "rankings",
    "ProcessBatch": "judged steps",
    "UnpairedBatch": "judgements",
    "PromptBatch": "prompts",
}


TOOLS = {"plan": "rlhf_lightning.planning.plan", "loop": "rlhf_lightning.people.loop"}
"""Tools whose parsers import torch, and the modules whose ``tool_parser`` builds the parser; for `plan`, only its own
options."""


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    return run_function(objectives, argv, "rlhf objectives")


def objectives(name: str | None = None, json: str | None = None) -> int:
    """List the objectives with their papers and the data they need.

    Args:
        name: show the description of this class instead.
        json: also write the list to this file.
    """
    found = class_entries(objective_classes()) if is_stale() else index()["model"]
    if name is not None:
        if name not in found:
            hint = f"{hint_at(name, found)} `rlhf objectives` lists them all"
            print(f"rlhf objectives: there is no {name}; {hint}", file=sys.stderr)
            return 2
        entry = found[name]
        print(f"{name}  ({entry['paper']})\n\n{entry['doc']}\n\n`rlhf fit --model.help {name}` lists its settings.")
        return 0
    rows = [
        Objective(kind, entry["family"], entry["paper"], entry["needs"], _summary(entry["doc"]))
        for kind, entry in found.items()
        if entry["paper"]
    ]
    print(table(rows, shutil.get_terminal_size((100, 24)).columns))
    if json is not None:
        write_text(Path(json), dumps([row._asdict() for row in rows], indent=2) + "\n")
    return 0


def _summary(doc: str) -> str:
    return doc.partition("\n\n")[0].replace("\n", " ")


def table(rows: Sequence[Objective], width: int) -> str:
    """Return the list as text of at most ``width`` columns."""
    names = max(len(row.name) for row in rows)
    lines: list[str] = []
    for family in dict.fromkeys(row.family for row in rows):
        lines += ["", family]
        for row in rows:
            if row.family != family:
                continue
            indent = " " * (names + 4)
            lines += textwrap.wrap(
                row.summary, width, initial_indent=f"  {row.name:<{names}}  ", subsequent_indent=indent
            )
            facts = f"{row.paper}; needs {row.needs}"
            lines += textwrap.wrap(facts, width, initial_indent=indent, subsequent_indent=indent)
    count = f"{len(rows)} objectives. `rlhf objectives --name NAME` describes one, `rlhf verify NAME` tests it."
    return "\n".join([*lines, "", count]).lstrip("\n")


# -- from the classes -------------------------------------------------------------------------------------------------


def objective_classes() -> list[type[Any]]:
    """Return the objectives of the package: the classes of `rlhf_lightning.modules` that name a paper."""
    from rlhf_lightning.modules import AlignmentModule

    found = {
        name: kind for name, kind in shipped_classes("rlhf_lightning.modules", AlignmentModule).items() if kind.paper
    }
    order = list(FAMILIES.values())
    return sorted(found.values(), key=lambda kind: (order.index(family_of(kind)), len(kind.__mro__), kind.__name__))


def family_of(kind: type[Any]) -> str:
    """Return the family of a class."""
    return next((FAMILIES[base.__name__] for base in kind.__mro__ if base.__name__ in FAMILIES), "preference pairs")


def described(kind: type[Any]) -> Objective:
    """Return the row of a class."""
    needs = DATA.get(kind.batch_type.__name__, kind.batch_type.__name__)
    needs += ", reference" if kind.needs_reference else ""
    needs += "".join(f", {name}" for name in ("teacher", "scorer") if _requires(kind, name))
    return Objective(kind.__name__, family_of(kind), kind.paper, needs, _summary(inspect.getdoc(kind) or ""))


def _requires(kind: type[Any], name: str) -> bool:
    """Whether a class has a required argument of this name."""
    signatures = (inspect.signature(vars(base)["__init__"]) for base in kind.__mro__ if "__init__" in vars(base))
    found = next((signature.parameters[name] for signature in signatures if name in signature.parameters), None)
    return found is not None and found.default is inspect.Parameter.empty


def class_entries(kinds: Sequence[type[Any]]) -> dict[str, Any]:
    """Return the index entries of classes (name, description, paper) without their settings."""
    from rlhf_lightning.commands.parsing import class_doc

    entries: dict[str, Any] = {}
    for kind in kinds:
        entries[kind.__name__] = {"doc": class_doc(kind), "paper": ""}
        if getattr(kind, "paper", ""):
            row = described(kind)
            entries[kind.__name__] |= {"paper": row.paper, "family": row.family, "needs": row.needs}
    return entries


def build_index() -> str:
    """Return the index of settings as JSON text, one entry per line."""
    from rlhf_lightning import data
    from rlhf_lightning.commands.messages import subclasses_of
    from rlhf_lightning.commands.parsing import PlainParser
    from rlhf_lightning.commands.train_settings import training_parser
    from rlhf_lightning.modules import AlignmentModule

    numbers: dict[tuple[str, str, str, str], int] = {}

    def numbered(parser: Any) -> list[int]:
        return [numbers.setdefault(row, len(numbers)) for row in parser_rows(parser)]

    shipped = {
        "model": objective_classes(),
        "data": [
            getattr(data, name) for name in sorted(data.__all__) if name in subclasses_of(data.AlignmentDataModule)
        ],
    }
    found: dict[str, dict[str, Any]] = {"run": numbered(training_parser())}  # type: ignore[dict-item]
    for part in PARTS:
        found[part] = class_entries(shipped[part])
        for kind in shipped[part]:
            parser = PlainParser(exit_on_error=False)
            parser.add_class_arguments(kind, fail_untyped=False)
            found[part][kind.__name__]["settings"] = numbered(parser)
    parsers = {name: importlib.import_module(module).tool_parser() for name, module in TOOLS.items()}
    tools = {name: {"doc": str(one.description), "settings": numbered(one)} for name, one in parsers.items()}
    rows = ",\n".join(dumps(row, ensure_ascii=False) for row in numbers)
    parts = ",\n".join(
        f'"{part}": {{\n' + ",\n".join(f"{dumps(name)}: {dumps(entry, ensure_ascii=False)}"
                                       for name, entry in found[part].items()) + "\n}"
        for part in PARTS
    )  # fmt: skip
    named = shipped_classes("rlhf_lightning.modules", AlignmentModule).keys() | {
        "AlignmentModule",
        "AlignmentDataModule",
    }
    bases = dumps(sorted(named - found["model"].keys()))
    sources = dumps(source_digests(), indent=0)
    further = f'"run": {dumps(found["run"])},\n"bases": {bases},\n"tools": {dumps(tools)},\n"sources": {sources}'
    return f'{{"settings": [\n{rows}\n],\n{further},\n{parts}\n}}\n'


def parser_rows(parser: Any) -> list[tuple[str, str, str, str]]:
    """Return name, type, default and help of a parser's options; fields of optional dataclasses are listed too."""
    from dataclasses import MISSING, fields, is_dataclass

    import docstring_parser

    from rlhf_lightning.compat import parser_actions, type_of_option

    rows = []
    for action in parser_actions(parser):
        name = str(action.dest)
        if name in GROUPS or name in REFUSED or name.endswith(".help") or action.default == SUPPRESS:
            continue
        hint = type_of_option(action) or type(action.default)
        default = "required" if action.required else written(action.default)
        rows.append((name, type_text(hint), default, plain_help(action.help or "")))
        for kind in (kind for kind in get_args(hint) if is_dataclass(kind)):
            helps = {one.arg_name: one.description for one in docstring_parser.parse(kind.__doc__ or "").params}
            for field in fields(kind):
                made = field.default if field.default_factory is MISSING else field.default_factory()
                value = "required" if made is MISSING else written(made)
                text = plain_help(helps.get(field.name) or "")
                rows.append((f"{name}.{field.name}", str(field.type).replace(" ", ""), value, text))
    return rows


def written(value: Any) -> str:
    """Return a default value in YAML notation."""
    if isinstance(value, Mapping | list | tuple | str | bool | int | float) or value is None:
        return dumps(value).strip('"')
    return str(value)


def type_text(hint: Any) -> str:
    """Return a type as help shows it: ``float``, ``int|null``, ``nf4|int8``."""
    if hint is type(None):
        return "null"
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    if hint in (str, int, float, bool, dict, list, tuple):
        return str(hint.__name__)
    if get_origin(hint) in (dict, list, tuple):
        return str(get_origin(hint).__name__)
    arguments = get_args(hint)
    if arguments and get_origin(hint).__name__ in ("Union", "UnionType"):
        return "|".join(dict.fromkeys("|".join(type_text(one) for one in arguments).split("|")))
    return "CLASS"


def plain_help(text: str) -> str:
    """Return the first paragraph of a help text without Sphinx markup."""
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"\1", " ".join(text.split("\n\n")[0].split()))
    return re.sub(r" ?Default: .*$", "", text.replace("``", "")).strip()


if __name__ == "__main__":
    INDEX.write_text(build_index(), encoding="utf-8")
    index.cache_clear()
    print(f"{INDEX}: {len(index()['settings'])} settings of {sum(len(index()[part]) for part in PARTS)} classes")
