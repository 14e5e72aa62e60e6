"""``rlhf objectives``: list the objectives, found by walking the package."""

from __future__ import annotations

import inspect
import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_lightning.commands.parsing import run_function
from rlhf_lightning.loading import shipped_classes


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
    "GKDModule": "distillation",
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


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    return run_function(objectives, argv, "rlhf objectives")


def objectives(name: str | None = None, json: str | None = None) -> int:
    """List the objectives with their papers and the data they need.

    Args:
        name: show the description of one class instead.
        json: also write the list to this file.
    """
    found = objective_classes()
    if name is not None:
        kinds = {kind.__name__: kind for kind in found}
        if name not in kinds:
            print(f"rlhf objectives: there is no {name}: `rlhf objectives` lists them all", file=sys.stderr)
            return 2
        kind = kinds[name]
        print(f"{name}  ({kind.paper})\n\n{inspect.getdoc(kind)}\n\n`rlhf fit --model.help {name}` lists its settings.")
        return 0
    rows = [described(kind) for kind in found]
    print(table(rows, shutil.get_terminal_size((100, 24)).columns))
    if json is not None:
        _write(rows, Path(json))
    return 0


def _write(rows: Sequence[Objective], path: Path) -> None:
    path.write_text(json.dumps([row._asdict() for row in rows], indent=2) + "\n", encoding="utf-8")


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
    summary = (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ")
    return Objective(kind.__name__, family_of(kind), kind.paper, needs, summary)


def _requires(kind: type[Any], name: str) -> bool:
    """Whether a class has a required argument of this name."""
    signatures = (inspect.signature(vars(base)["__init__"]) for base in kind.__mro__ if "__init__" in vars(base))
    found = next((signature.parameters[name] for signature in signatures if name in signature.parameters), None)
    return found is not None and found.default is inspect.Parameter.empty


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
