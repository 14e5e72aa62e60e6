"""``rlhf verify``: run any objective, shipped or user-defined, through the contract of its family."""

from __future__ import annotations

import json
import math
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_lightning.atomic_files import refuse_special, write_text
from rlhf_lightning.commands.flags import with_underscores
from rlhf_lightning.commands.objectives import objective_classes
from rlhf_lightning.commands.parsing import usage_error
from rlhf_lightning.errors import RlhfError
from rlhf_lightning.evaluation.report import markdown_table
from rlhf_lightning.loading import read_yaml

HELD, FAILED, COULD_NOT_RUN, NO_TARGET = 0, 1, 2, 3
WRITTEN = {"json", "markdown", "report"}
FILES = (*sorted(WRITTEN), "foreign")
HELP = """usage: rlhf verify [my_objective.MyModule ...] [--model.SETTING VALUE ...] [options]

Check unmodified objectives in a small world where every completion is enumerated: padding, micro-batches and ranks,
loss inputs, gradients, labels, extreme values, and the converged policy. It is compared with the target that the class
declares or, for shipped classes, with an independent transcription of the paper.

  my_objective.MyModule  classes to verify: a module's path, or the name of a shipped class
  --all                  verify every shipped objective
  --model.SETTING VALUE  an argument of the class (of all of them)
  --foreign FILE:NAME    a loss of another project: trl:DPO, verl:Policy, or a function in a file of your own;
                         FILE alone takes every function with every listed value; --NAME VALUE are its settings
  --json FILE            write every check to a file
  --markdown FILE        write the table of all classes to a file
  --report FILE          write a page: the target, the path of training, each check with its number and bound

Exit status: 0 every check holds, 1 one failed, 2 one could not run, 3 every check holds and a class has no target."""


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    names, options, settings = split(with_underscores(argv))
    if "help" in options or not (names or options.keys() & {"all", "foreign"}):
        print(HELP)
        return HELD if "help" in options else COULD_NOT_RUN
    try:
        for name in WRITTEN & options.keys():
            refuse_special(Path(options[name]))
        named = [*([*objective_classes()] if "all" in options else []), *(find(name) for name in names)]
        kinds = [(kind, kind.__name__, settings) for kind in named]
        kinds += foreign(options["foreign"], settings) if "foreign" in options else []
    except RlhfError as error:
        print(f"rlhf verify: {error}", file=sys.stderr)
        return COULD_NOT_RUN
    from transformers.utils import logging as transformers_logging

    from rlhf_lightning.quiet import silence_libraries
    from rlhf_lightning.verification.contract import Verification, verify

    silence_libraries()
    transformers_logging.disable_progress_bar()
    done: list[Verification] = []
    status = HELD
    broken: dict[str, str] = {}
    for kind, title, own in kinds:
        try:
            found = verify(kind, own)._replace(name=title)
        except Exception as error:
            broken[title] = f"{type(error).__name__}: {error}{place_of(error)}"
            print(f"\n{title} could not be run: {broken[title]}", file=sys.stderr)
            status = COULD_NOT_RUN
            continue
        done.append(found)
        print(f"\n{report_of(found, brief=len(kinds) > 1)}", flush=True)
    if "json" in options:
        write_text(Path(options["json"]), json.dumps([plain(found) for found in done], indent=2) + "\n")
    if "markdown" in options:
        table = peers_table(done, broken) if "foreign" in options else page(done)
        write_text(Path(options["markdown"]), table)
    if "report" in options:
        write_report(Path(options["report"]), done)
    if status == HELD and any(found.failed for found in done):
        return FAILED
    return NO_TARGET if status == HELD and not all(found.has_target for found in done) else status


def place_of(error: BaseException) -> str:
    """Return the last line of a user's file that an error passed through; empty if there is none."""
    package = Path(__file__).parents[1]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    own = [frame for frame in frames if package not in Path(frame.filename).parents and "/" in frame.filename]
    return f" ({own[-1].filename}, line {own[-1].lineno}: {own[-1].line})" if own else ""


def split(argv: Sequence[str]) -> tuple[list[str], dict[str, str], dict[str, Any]]:
    """Return the class names, the options, and the settings of the classes."""
    names: list[str] = []
    options: dict[str, str] = {}
    settings: dict[str, Any] = {}
    words = iter(argv)
    of_adapter = any(word.partition("=")[0] == "--foreign" for word in argv)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if word in ("--help", "-h", "--all"):
            options[word.strip("-").replace("h", "help", 1) if word == "-h" else name] = ""
        elif word.startswith("--") and (name in FILES or name.startswith("model.") or of_adapter):
            given = value if equals else next(words, None)
            if given is None:
                usage_error("rlhf verify", f"--{name} needs a value")
            if name in FILES:
                options[name] = given
            else:
                settings[name.removeprefix("model.")] = read_yaml(given)
        elif word.startswith("-"):
            usage_error("rlhf verify", f"there is no option {word}: settings of the class are --model.NAME VALUE")
        else:
            names.append(word)
    return names, options, settings


def find(name: str) -> type[Any]:
    """Return the class with an import path, or the shipped class with a short name.

    Raises:
        SettingError: see `loading.load_class`.
    """
    from rlhf_lightning.loading import load_class
    from rlhf_lightning.modules import AlignmentModule

    return load_class(name, AlignmentModule, {kind.__name__: kind for kind in objective_classes()}, "objective")


def foreign(spec: str, settings: dict[str, Any]) -> list[tuple[type[Any], str, dict[str, Any]]]:
    """Return the classes of adapters, their titles, and their settings.

    Raises:
        RlhfError: see `foreign.adapters`.
    """
    from rlhf_lightning.verification.foreign import adapters, class_of

    project = spec.partition(":")[0]
    return [(class_of(one), f"{project}:{one.title}", one.base_settings) for one in adapters(spec, settings)]


def report_of(found: Any, brief: bool) -> str:
    """Return the table of a class; if ``brief``, one line and the checks that failed."""
    failed = [check for check in found.checks if not (check.held or check.meant)]
    lines = [f"{found.name}: {len(found.checks)} checks, {verdict_of(found)}, {found.seconds:.1f} s"]
    shown = [check for check in found.checks if not brief or not check.held]
    rows = [
        [check.name, f"{check.measured:.3g}", f"{'>=' if check.least else '<='} {check.bound:.3g}", word_for(check)]
        for check in shown
    ]
    if rows:
        lines.append(markdown_table(["check", "measured", "bound", "pass"], rows))
    lines += [f"  {word_of_mistakes(found)}: {words}" for words in found.mistakes]
    lines += [f"  {check.name}: {check.advice}" for check in failed]
    lines += [f"  note: {words}" for words in found.notes]
    if not brief:
        lines.append(rest_of(found))
    return "\n".join(lines)


def verdict_of(found: Any) -> str:
    """Say whether all checks hold."""
    verdict = "all hold" if not found.failed else f"{len(found.failed)} FAILED"
    return verdict + ("" if found.has_target else ", no target")


def word_of_mistakes(found: Any) -> str:
    """Return the label for known mistakes: if no check fails, another method may differ in the same way."""
    if found.failed:
        return "mistake"
    return "it differs from the shipped class" if found.has_target else "possible mistake"


def word_for(check: Any) -> str:
    """Return the table entry of a check: yes, NO, or the reason why the failure is intended."""
    if check.held:
        return "yes"
    if not check.meant:
        return "NO"
    return f"{'none' if check.name == 'target' else 'meant'}: {check.meant}"


def rest_of(found: Any) -> str:
    """Describe the converged policy and its target."""
    end = found.convergence
    if end is None:
        return ""
    where = f"training converges to gold reward {end.gold_after:.3f} (reference {end.gold_before:.3f}), KL {end.kl:.3f}"
    where += end.law
    if end.target is None:
        return f"{where}; there is no target to compare with"
    known = {"declared": "declared by the class", "transcription": "transcribed from the paper"}
    return f"{where}; target: {known.get(end.source, end.source)}, distance {end.distance:.2g}"


def write_report(path: Path, done: Sequence[Any]) -> None:
    """Write the page of ``--report``: the target, the training path, and each check with its value and bound."""
    from rlhf_lightning.evaluation.report import write_page

    classes = [
        {
            "name": found.name,
            "verdict": verdict_of(found),
            "count": len(found.checks),
            "seconds": found.seconds,
            "target": rest_of(found) or "it was not trained",
            "mistakes": [f"{word_of_mistakes(found)}: {words}" for words in found.mistakes],
            "notes": found.notes,
            "checks": [
                {
                    "name": check.name,
                    "measured": f"{check.measured:.3g}",
                    "bound": f"{'>=' if check.least else '<='} {check.bound:.3g}",
                    "word": word_for(check),
                    "failed": not (check.held or check.meant),
                    "advice": "" if check.held else check.advice,
                }
                for check in found.checks
            ],
            **path_of(found),
        }
        for found in done
    ]
    write_page(path, "verify.html.jinja", title="Verification of objectives", notes=[], classes=classes)


def path_of(found: Any) -> dict[str, Any]:
    """Return the training path as two lines of an SVG image, 550 wide and 150 high."""
    path: tuple[Any, ...] = () if found.convergence is None else found.convergence.path
    values = [value for _, gold, kl in path for value in (gold, kl) if math.isfinite(value)]
    if len(path) < 2 or not values:
        return {"lines": [], "updates": 0, "low": 0.0, "high": 0.0}
    low, high, updates = min(values), max(values), path[-1][0]
    lines = []
    for place, (name, mark, dashes) in enumerate((("gold reward", "solid", "none"), ("KL, nats", "dashed", "6 4")), 1):
        points = [
            f"{70 + 550 * point[0] / updates:.1f},{170 - 150 * (point[place] - low) / max(high - low, 1e-9):.1f}"
            for point in path
            if math.isfinite(point[place])
        ]
        lines.append({"name": name, "mark": mark, "dashes": dashes, "points": " ".join(points)})
    return {"lines": lines, "updates": updates, "low": low, "high": high}


def plain(found: Any) -> dict[str, Any]:
    """Return a verification result as plain Python types."""
    end = found.convergence
    reached = None
    if end is not None:
        distance = None if math.isnan(end.distance) else end.distance
        reached = {"target": end.source, "distance": distance, "gold_before": end.gold_before,
                   "gold_after": end.gold_after, "kl": end.kl}  # fmt: skip
    return {
        "name": found.name,
        "held": found.held,
        "seconds": round(found.seconds, 2),
        "control": found.control,
        "settings": {name: value for name, value in found.settings.items() if not callable(value)},
        "mistakes": found.mistakes,
        "notes": found.notes,
        "checks": [check._asdict() for check in found.checks],
        "convergence": reached,
    }


def peers_table(done: Sequence[Any], broken: Mapping[str, str]) -> str:
    """Return the table of other projects' losses, and remarks on those that fail."""
    rows, said = [], []
    for found in done:
        shipped = found.compared_with or "none"
        failed = found.failed
        same = next((check for check in found.checks if check.name == "as shipped"), None)
        residual = "" if same is None else f"{same.measured:.1e}"
        held = f"{sum(check.held for check in found.checks)} of {len(found.checks)}"
        fails = ", ".join(check.name for check in failed) or ("-" if found.has_target else "- (no target is known)")
        rows.append([found.name, held, shipped, residual, fails])
        said += [f"- `{found.name}`, {check.name} ({check.measured:.3g}): {check.advice}" for check in failed]
        said += [f"- `{found.name}`: {words}" for words in found.mistakes if failed]
    rows += [[title, "-", "-", "-", "could not run"] for title in broken]
    said += [f"- `{title}` could not run: {words}" for title, words in broken.items()]
    header = ["loss", "checks held", "compared with", "largest difference", "fails"]
    return "\n".join([markdown_table(header, rows), "", *said, ""])


def page(done: Sequence[Any]) -> str:
    """Return the Markdown page with the table of all classes."""
    rows = []
    for found in done:
        end = found.convergence
        distance = "" if math.isnan(end.distance) else f"{end.distance:.1e}"
        held = f"{sum(check.held for check in found.checks)} of {len(found.checks)}"
        golds = f"{end.gold_before:.3f} to {end.gold_after:.3f}"
        rows.append(
            [found.name, held, end.source or "none", distance, golds, f"{found.control:+.3f}", f"{found.seconds:.1f}"]
        )
    header = ["objective", "checks held", "target", "distance", "gold reward", "control", "s"]
    return (
        "# Verification\n\n"
        "`rlhf verify --all --markdown experiments/verification.md`. Every objective, unmodified, in a world of 2 "
        "prompts and 7 completions each, in fp64.\n\n"
        "- Target: the policy that minimises the objective, in closed form as the class declares it, or by an "
        "independent optimiser on a transcription of the paper's formula; for losses with flat minima the excess loss "
        "is measured instead.\n"
        "- Distance: total variation, largest over prompts; the bound is 1e-3.\n"
        "- Gold reward: expected reward of the reference and of the converged policy.\n"
        "- Control: gold reward after a short run on true labels or scores, minus the same on uninformative ones.\n"
        "- s: CPU seconds of checking, without start-up.\n\n"
        f"{markdown_table(header, rows)}\n{chances(done)}"
    )


def chances(done: Sequence[Any]) -> str:
    """Return the table of the checks that draw random samples, with their power; empty without such checks."""
    rows = [
        [found.name, check.name, f"{check.measured:.3g}", f"{check.bound:.3g}", f"{check.power:.3g}"]
        for found in done
        for check in found.checks
        if check.power is not None
    ]
    if not rows:
        return ""
    said = (
        "\n## Checks that draw samples\n\nAll other checks are exact. Power: what the check would measure with the "
        "mistake that it is for (another model or temperature samples, all steps learn on the same source). `same "
        "twice` compares ten calls, since two calls with dropout agree on a third of the seeds.\n\n"
    )
    return f"{said}{markdown_table(['objective', 'check', 'measured', 'bound', 'power'], rows)}\n"
