"""A hook of MkDocs: pages of reference generated from the package, so that they cannot disagree with it.

Read are commands/flag_index.json (a test compares it with the classes), the recipes, the pages of measured results,
metrics.yaml in this folder, and the help of each command.
"""

import contextlib
import html
import importlib
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import griffe
import yaml
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "rlhf_lightning"
NOTATION = "\n\nNotation: "
"""Begins the paragraph that ends the description of each objective of a family."""

ARXIV = re.compile(r"(?<![\d.])(\d{4}\.\d{5})(?!\d)")

API = {
    "Modules to subclass": [
        "training.module.AlignmentModule",
        "training.offline.OfflineModule",
        "training.rollout.RolloutModule",
        "training.on_policy.OnPolicyModule",
    ],
    "What travels": ["types"],
    "Data": ["data.datamodule.AlignmentDataModule", "data.batching"],
    "Scoring": ["scoring.scorer", "scoring.learned", "scoring.composition", "scoring.answers", "scoring.remote_scorer"],
    "Sampling": ["sampling.engines", "sampling.slot_engine"],
    "Functional": [f"functional.{path.stem}" for path in sorted((PACKAGE / "functional").glob("[a-z]*.py"))],
}
"""Names of the API page; those of ``modules`` stand with the objectives."""


class Rooms(griffe.Extension):
    """Add the folders without __init__.py, which griffe passes over inside of a package."""

    def on_module_instance(self, *, mod: griffe.Module, **kwargs: Any) -> None:
        """Add them as modules of the package before its own modules are read."""
        if mod.path == PACKAGE.name:
            for folder in sorted({path.parent for path in PACKAGE.glob("*/*.py")}):
                if not (folder / "__init__.py").exists():
                    mod.set_member(folder.name, griffe.Module(folder.name, filepath=[folder]))


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    for name, text in {
        "objectives": objectives(),
        "data": data_modules(),
        "settings": run_settings(),
        "metrics": metrics(),
        "commands": commands(),
        "papers": papers(),
        "api": api(),
    }.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def on_post_build(config: Any) -> None:
    """Write llms.txt: every page with its address and its first sentence, for readers that are programs."""
    site, lines = Path(config.site_dir), [f"# {config.site_name}", "", f"> {config.site_description}", ""]
    for page in sorted(site.rglob("index.html")):
        address = page.parent.relative_to(site).as_posix().removeprefix(".")
        text = page.read_text(encoding="utf-8")
        title = re.search(r"<h1[^>]*>(.*?)(?:<a |</h1>)", text, re.DOTALL)
        first = re.search(r"<h1.*?</h1>\s*<p>(.*?)</p>", text, re.DOTALL)
        if title:
            said = f": {_plain(first[1])}" if first else ""
            lines.append(f"- [{_plain(title[1])}]({(config.site_url or '/').rstrip('/')}/{address}){said}")
    (site / "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _plain(text: str) -> str:
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", text))).strip()


def _cell(text: str) -> str:
    """Return text as a cell of a table: literally, without Markdown's meaning of its characters."""
    shown = re.split(r"``?([^`]+)``?", text.replace("\n", " "))
    shown[1::2] = [f"`{part}`" for part in shown[1::2]]
    shown[::2] = [re.sub(r"([\\*_\[\]<>#|])", r"\\\1", part) for part in shown[::2]]
    return "".join(shown)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""  # Python-Markdown neither splits a row inside of code nor reads escapes there


def _index() -> dict[str, Any]:
    return json.loads((PACKAGE / "commands" / "flag_index.json").read_text(encoding="utf-8"))


def _settings(numbers: list[int], rows: list[list[str]]) -> list[str]:
    """Return a table of settings."""
    lines = ["| setting | type | default | |", "|---|---|---|---|"]
    for name, kind, default, said in (rows[number] for number in numbers):
        alternatives = _code(kind.replace("|", " | "))  # a line may break there
        lines.append(f"| `{name}` | {alternatives} | {_code(default)} | {_cell(said)} |")
    return [*lines, ""]


def _linked(paper: str) -> str:
    return ARXIV.sub(r"[\1](https://arxiv.org/abs/\1)", paper)


def _results(page: str) -> dict[str, dict[str, str]]:
    """Return the first table of a page of results by its first column."""
    lines = [line for line in (ROOT / page).read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    head, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(head, row, strict=False)) for row in rows[1:]}


def _recipes() -> dict[str, list[str]]:
    """Return the recipes of each class."""
    found: dict[str, list[str]] = {}
    for path in sorted((PACKAGE / "recipes").rglob("*.yaml")):
        model = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("model")
        if isinstance(model, dict) and "class_path" in model:
            name = path.relative_to(PACKAGE / "recipes").with_suffix("").as_posix()
            found.setdefault(model["class_path"].rpartition(".")[2], []).append(f"`recipe:{name}`")
    return found


def objectives() -> str:
    """Return the page of objectives: equation, target, paper, recipes, what was verified, gold reward, settings."""
    index, recipes = _index(), _recipes()
    verified, gold = _results("experiments/verification.md"), _results("experiments/objectives/assistant_world.md")
    entries = {name: entry for name, entry in index["model"].items() if entry["paper"]}
    shared = set.intersection(*(set(entry["settings"]) for entry in entries.values()))
    first = next(iter(entries.values()))
    lines = [
        "# Objectives", "",
        f"After this page you can choose among the {len(entries)} shipped objectives: each has its equation, paper, "
        "recipes and settings. What `rlhf verify` found is from `experiments/verification.md`. Gold rewards are the "
        "assistant world's, from "
        f"`experiments/objectives/assistant_world.md`; SFT reaches {gold['SFTModule']['gold reward']} there.", "",
        "## Settings of every objective", "",
        *_settings([number for number in first["settings"] if number in shared], index["settings"]),
    ]  # fmt: skip
    for family in dict.fromkeys(entry["family"] for entry in entries.values()):
        lines += [f"## {family[0].upper()}{family[1:]}", ""]
        members = {name: entry for name, entry in entries.items() if entry["family"] == family}
        notations = dict.fromkeys(entry["doc"].partition(NOTATION)[2] for entry in members.values())
        lines += [f"Notation: {_cell(notation)}\n" for notation in notations if notation]
        for name, entry in members.items():
            summary, _, body = entry["doc"].partition(NOTATION)[0].partition("\n\n")
            lines += [f"### {name}", "", _cell(summary), "", f"- paper: {_linked(entry['paper'])}"]
            lines += [f"- needs: {entry['needs']}"]
            lines += [f"- recipes: {', '.join(recipes[name])}"] if name in recipes else []
            if name in verified:
                row = verified[name]
                lines += [
                    f"- verified: {row['checks held']} checks, target {row['target']}, distance {row['distance']}"
                ]
            if name in gold:
                row = gold[name]
                lines += [f"- gold reward: {row['gold reward']} {row['95 % interval']}, KL {row['KL']}"]
            lines += ["", "```text", body, "```", ""]
            own = [number for number in entry["settings"] if number not in shared]
            lines += _settings(own, index["settings"]) if own else []
    return "\n".join(lines)


def data_modules() -> str:
    """Return the page of DataModules and their settings."""
    index = _index()
    entries = index["data"]
    shared = set.intersection(*(set(entry["settings"]) for entry in entries.values()))
    first = next(iter(entries.values()))
    lines = [
        "# DataModules",
        "",
        "After this page you can set every DataModule: `--data.NAME` on the command line, `data.init_args` in YAML.",
        "",
    ]
    lines += ["## Settings of every DataModule", ""]
    lines += _settings([number for number in first["settings"] if number in shared], index["settings"])
    for name, entry in entries.items():
        summary, _, body = entry["doc"].partition("\n\n")
        lines += [f"## {name}", "", _cell(summary), ""] + (["```text", body, "```", ""] if body else [])
        own = [number for number in entry["settings"] if number not in shared]
        lines += _settings(own, index["settings"]) if own else []
    return "\n".join(lines)


def run_settings() -> str:
    """Return the page of a run's settings: those of no module and no DataModule."""
    index = _index()
    groups: dict[str, list[int]] = {}
    for number in index["run"]:
        name = index["settings"][number][0]
        groups.setdefault(name.partition(".")[0] if "." in name else "run", []).append(number)
    lines = [
        "# Settings of a run",
        "",
        "After this page you can set the Trainer, checkpoints, samples and the export: all that belongs to no module "
        "and no DataModule.",
        "",
    ]
    for group, numbers in groups.items():
        lines += [f"## {group}", "", *_settings(numbers, index["settings"])]
    return "\n".join(lines)


def metrics() -> str:
    """Return the page of metrics, from metrics.yaml."""
    groups = yaml.safe_load(Path(__file__).with_name("metrics.yaml").read_text(encoding="utf-8"))
    lines = [
        "# Metrics",
        "",
        "After this page you can read every tag that a run logs: its meaning, unit, and healthy values.",
        "",
    ]
    for group, found in groups.items():
        lines += [
            f"## {group}",
            "",
            found.pop("about", ""),
            "",
            "| tag | meaning | unit | healthy |",
            "|---|---|---|---|",
        ]
        for tag, (meaning, unit, healthy) in found.items():
            lines.append(f"| `{tag}` | {_cell(meaning)} | {_cell(unit)} | {_cell(healthy)} |")
        lines.append("")
    return "\n".join(lines)


def commands() -> str:
    """Return the page of commands: what ``rlhf COMMAND --help`` prints."""
    from rlhf_lightning.cli import TOOL_COMMANDS, TRAINING_COMMANDS

    lines = [
        "# Commands",
        "",
        "After this page you know every command and its options, as `rlhf COMMAND --help` prints them.",
        "",
    ]
    width, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), "110"
    for name, command in {**TRAINING_COMMANDS, **TOOL_COMMANDS}.items():
        printed, main = io.StringIO(), importlib.import_module(command.module).main
        given = [name, "--help"] if name in TRAINING_COMMANDS else ["--help"]
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            main(given)
        lines += [f"## rlhf {name}", "", f"{command.help[0].upper()}{command.help[1:]}.", ""]
        shown = printed.getvalue().replace(" \b", "")  # on a terminal, jsonargparse's backspace deletes the space
        lines += ["```text", shown.strip(), "```", ""]
    if width is None:
        del os.environ["COLUMNS"]
    else:
        os.environ["COLUMNS"] = width
    return "\n".join(lines)


def papers() -> str:
    """Return the index of papers: the objectives of each, and the files whose text cites its number."""
    named: dict[str, str] = {}
    classes: dict[str, list[str]] = {}
    for name, entry in _index()["model"].items():
        for number in ARXIV.findall(entry["paper"]):
            text = next(part for part in re.split(r"; ", entry["paper"]) if number in part)
            named.setdefault(number, text)
            classes.setdefault(number, []).append(f"[{name}](objectives.md#{name.lower()})")
    files: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for number in dict.fromkeys(ARXIV.findall(path.read_text(encoding="utf-8"))):
            files.setdefault(number, []).append(path.relative_to(PACKAGE).as_posix())
    lines = ["# Papers", "", "After this page you can find the objectives and files of a paper, by its number.", ""]
    lines += ["| paper | objectives | files |", "|---|---|---|"]
    for number in sorted(files.keys() | classes.keys()):
        link = f"[{number}](https://arxiv.org/abs/{number})"
        text = named.get(number, "").replace(f"arXiv {number}", "").strip(" ,")
        where = ", ".join(f"`{name}`" for name in files.get(number, []))
        lines.append(f"| {link} {_cell(text)} | {', '.join(classes.get(number, []))} | {where} |")
    return "\n".join([*lines, ""])


def api() -> str:
    """Return the page of public names; mkdocstrings fills it."""
    lines = [
        "# API",
        "",
        "After this page you know the public names for subclasses and scripts. Objectives and DataModules have pages "
        "of their own.",
        "",
    ]
    for title, names in API.items():
        lines += [f"## {title}", ""]
        for name in names:
            lines += [f"::: rlhf_lightning.{name}", ""]
    return "\n".join(lines)
