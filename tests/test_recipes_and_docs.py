"""Parse every YAML file and every command in README and docs with the parser that users run."""

import ast
import json
import re
import shlex
from inspect import signature
from pathlib import Path

import pytest
import yaml

from rlhf_lightning import cli, data, modules
from rlhf_lightning.commands import quickstart
from rlhf_lightning.commands.flags import with_underscores
from rlhf_lightning.commands.parsing import PlainParser
from rlhf_lightning.commands.train import RlhfCLI
from rlhf_lightning.loading import import_path, shipped_classes
from rlhf_lightning.recipes import resolve_recipe

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "rlhf_lightning" / "recipes"
OVERLAYS = sorted(path for room in ("hardware", "optimizer") for path in (RECIPES / room).glob("*.yaml"))
LOOPS = sorted(RECIPES.rglob("loop*.yaml"))
CONFIGS = [path for path in sorted(RECIPES.rglob("*.yaml")) if path not in [*OVERLAYS, *LOOPS]]
README = ROOT / "README.md"
GUIDES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
ROOMS = ("experiments", "tests", ".github")  # MkDocs checks the links of docs/, some into generated pages
# Settings taken from the previous stage or from the user; a file may leave them to the command line.
FROM_THE_USER = {"model": {"init_from": "a_model", "scorer": "a_reward_model"}, "data": {"source": "rows.jsonl"}}


class Accepted(BaseException):
    """Raised instead of running, once the whole command line has been parsed."""


@pytest.fixture(scope="module")
def train_parser():
    """Return the parser of `rlhf fit`, captured while it builds a trainer; building the parser is
    slower than using it.
    """

    class ParserAlone(RlhfCLI):
        def instantiate_classes(self):
            raise Accepted

        def parse_arguments(self, parser, args):
            parsers.append(parser)
            super().parse_arguments(parser, args)

    parsers = []
    with pytest.raises(Accepted):
        ParserAlone(["fit", "--config", str(CONFIGS[0]), *completed_by_the_user(CONFIGS[0])])
    return parsers[0]


@pytest.fixture
def accepted(train_parser, monkeypatch, capsys):
    """Return a function ``accepted(argv)`` that parses a command line of `rlhf` without running it."""

    def stop(*args, **kwargs):
        raise Accepted

    def stop_after_parsing(parser, *args, **kwargs):
        parse(parser, *args, **kwargs)
        raise Accepted

    parse = PlainParser.parse_args

    def check(argv):
        assert argv[0] in {**cli.TRAINING_COMMANDS, **cli.TOOL_COMMANDS}
        try:
            if argv[0] in cli.TRAINING_COMMANDS:
                if "--resume" in argv:  # puts the config of the resumed run first
                    argv = [argv[0], "--config", resolve_recipe("recipe:dpo"), *argv[1:]]
                train_parser.parse_args(with_underscores(argv))
                return
            monkeypatch.setattr(PlainParser, "parse_args", stop_after_parsing)
            monkeypatch.setattr(quickstart, "fresh_folder", stop)  # it parses its own arguments and would run
            status = cli.main(argv)
        except Accepted:
            return
        except SystemExit as end:
            status = end.code
        if status:  # `rlhf verify` parses its own arguments and runs, in seconds
            pytest.fail(f"rlhf {shlex.join(argv)} ended with {status}: {capsys.readouterr().err.strip()}")

    return check


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def completed_by_the_user(path: Path) -> list[str]:
    """Return flags for the settings that the file leaves open, according to its classes."""
    config = yaml.safe_load(path.read_text())
    flags = []
    for group, values in FROM_THE_USER.items():
        given = config.get(group, {}).get("init_args", {})
        for name, value in values.items():
            wanted = name != "scorer" or config["model"]["class_path"].split(".")[-1] == "PPOModule"
            if wanted and name not in given:
                flags += [f"--{group}.{name}", value]
    return flags


def test_recipe_folders_are_found():
    assert {path.parent.name for path in CONFIGS} >= {"recipes", "assistant"}


@pytest.mark.parametrize("path", CONFIGS, ids=relative)
def test_config_matches_the_signatures(path, accepted):
    accepted(["fit", "--config", str(path), *completed_by_the_user(path)])


@pytest.mark.parametrize("path", OVERLAYS, ids=relative)
def test_overlay_parses_on_top_of_a_config(path, accepted):
    base = RECIPES / "dpo.yaml"
    accepted(["fit", "--config", str(base), "--config", str(path), *completed_by_the_user(base)])


@pytest.mark.parametrize("path", LOOPS, ids=relative)
def test_loop_config_matches_the_signature_and_names_existing_files(path, accepted):
    accepted(["loop", "--config", str(path)])
    settings = yaml.safe_load(path.read_text())
    assert all(Path(resolve_recipe(settings[f"{stage}_config"])).is_file() for stage in ("reward", "policy"))


@pytest.mark.parametrize("path", [*CONFIGS, *OVERLAYS, *LOOPS], ids=relative)
def test_config_is_short(path):
    assert len(path.read_text().splitlines()) < 40


def test_the_config_check_detects_a_misspelt_setting(tmp_path, accepted):
    """The parsing check can fail."""
    text = (RECIPES / "dpo.yaml").read_text()
    path = tmp_path / "dpo.yaml"
    path.write_text(text.replace("learning_rate:", "learning_rat:"))
    assert path.read_text() != text
    with pytest.raises(pytest.fail.Exception, match="learning_rate"):
        accepted(["fit", "--config", str(path), *completed_by_the_user(path)])


def readme_commands() -> list[str]:
    """Return every command in the bash blocks of README and docs, with continued lines joined, without comments and
    output.
    """
    said = "\n".join(guide.read_text() for guide in GUIDES)
    blocks = re.findall(r"^```bash\n(.*?)^```", said, re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [command for line in lines if (command := re.sub(r"\s+#.*| *^#.*", "", line).strip())]


def test_readme_shows_commands():
    assert any(command.startswith("make quickstart") for command in readme_commands())
    assert any(command.startswith("rlhf fit") for command in readme_commands())


@pytest.mark.parametrize("command", readme_commands())
def test_readme_command_exists(command, accepted, monkeypatch):
    monkeypatch.chdir(ROOT)
    for part in command.split("&&"):
        program, *arguments = shlex.split(part)
        if program == "cd":
            monkeypatch.chdir(arguments[0])
            monkeypatch.syspath_prepend(str(Path.cwd()))
        elif program == "rlhf":
            accepted(without_placeholders(arguments))
        elif program == "make":
            targets = [argument for argument in arguments if "=" not in argument]
            assert targets and set(targets) <= makefile_targets()
        elif program == "python" and arguments[0] == "-c":
            compile(arguments[1], command, "exec")
        elif program == "python":
            assert (Path.cwd() / arguments[0]).is_file()
        else:
            assert program in {"tensorboard", "source", "pip", "git", "curl", "export", "lm_eval", "inspect"}, (
                f"teach this test what {program} is"
            )


def makefile_targets() -> set[str]:
    rules = re.findall(r"^([a-z][\w -]*):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return {target for rule in rules for target in rule.split()}


def without_placeholders(arguments: list[str]) -> list[str]:
    """Replace placeholders such as ``runs/sft/.../model``; the parser accepts any path."""
    return [argument.replace("...", "version_0") for argument in arguments]


PAGES = sorted({*GUIDES, *ROOT.glob("*.md"), *(page for room in ROOMS for page in (ROOT / room).rglob("*.md"))})


@pytest.mark.parametrize("guide", PAGES, ids=relative)
def test_links_resolve(guide):
    missing = [path for path in re.findall(r"\]\(([^)#:]+)\)", guide.read_text()) if not (guide.parent / path).exists()]
    assert not missing


def classes_in(settings) -> list[tuple[str, dict]]:
    """Return every (class_path, init_args) of nested settings."""
    if isinstance(settings, list):
        return [found for value in settings for found in classes_in(value)]
    if not isinstance(settings, dict):
        return []
    own = [(settings["class_path"], settings.get("init_args", {}))] if "class_path" in settings else []
    return own + [found for value in settings.values() for found in classes_in(value)]


def shipped(name: str):
    """Return the class of a short name or of an import path; None for those that a page's reader writes."""
    if "." in name:
        return None if name.startswith("my_") else import_path(name)
    rooms = ("modules", "data", "scoring", "sampling", "environments")
    return next(found[name] for room in rooms if name in (found := shipped_classes(f"rlhf_lightning.{room}", object)))


TESTED_ELSEWHERE = ("extending.md", "conformance.md")  # by test_extending.py and verification/test_foreign.py
BLOCKS = [
    pytest.param(kind, text, id=f"{guide.stem}-{number}")
    for guide in GUIDES
    if guide.name not in TESTED_ELSEWHERE
    for number, (kind, text) in enumerate(
        re.findall(r"^```(python|yaml|json)\b.*\n((?:.*\n)*?)```", guide.read_text(), re.MULTILINE)
    )
]


@pytest.mark.parametrize(("kind", "text"), BLOCKS)
def test_code_blocks_of_a_guide_parse(kind, text):
    if kind == "json":
        assert all(json.loads(line) for line in text.splitlines())
    elif kind == "yaml":
        for name, arguments in classes_in(yaml.safe_load(text)):
            known = {argument for base in getattr(shipped(name), "__mro__", ()) for argument in parameters(base)}
            assert not known or set(arguments) <= known, f"{name} takes no {sorted(set(arguments) - known)}"
    else:
        tree = ast.parse(text)
        imports = [part for part in tree.body if isinstance(part, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), "guide", "exec"), {})


def parameters(kind) -> list[str]:
    return list(signature(kind.__init__).parameters)


def settings_of(room) -> set[str]:
    """Return the argument names of all classes that a room exports, including inherited arguments."""
    classes = [found for found in vars(room).values() if isinstance(found, type)]
    names = {name for found in classes for base in found.__mro__ for name in signature(base.__init__).parameters}
    return {name for name in names if not name.startswith("_")}


@pytest.mark.parametrize("guide", GUIDES, ids=relative)
def test_names_in_a_guide_exist(guide):
    text = guide.read_text()
    for group, room in (("model", modules), ("data", data)):
        named = set(re.findall(rf"`(?:--)?{group}\.([a-z_]+)", text))
        assert named <= settings_of(room), f"no class has {sorted(named - settings_of(room))}"
    classes = set(re.findall(r"`([A-Z][A-Za-z]+Module)`", text))
    assert not {name for name in classes if not hasattr(modules, name) and not hasattr(data, name)} - NOT_OURS
    assert all(Path(resolve_recipe(name)).is_file() for name in re.findall(r"recipe:[a-z_/]*[a-z_]", text))


NOT_OURS = {
    "LightningModule",
    "LightningDataModule",
    "DataModule",
    "OffsetDPOModule",
    "OnPolicyModule",
    "RolloutModule",
}
