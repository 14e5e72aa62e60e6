"""Measure the package at one or more git revisions: size, indirection, and the cost of adding an objective.

    python experiments/architecture/measure.py [REVISION ...]

Each revision is extracted from git, so the working tree is never changed. ``frames`` counts the Python frames between
``training_step`` and an objective's loss function, measured in a short run on the assistant world.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PROBE = """
import json, os, sys, tempfile, traceback
from pathlib import Path
from rlhf_lightning.commands import train
from rlhf_lightning.modules import DPOModule, GRPOModule
from rlhf_lightning.worlds.assistant import write_world

found = {}

def depth(name):
    stack = [frame for frame in traceback.extract_stack() if "rlhf_lightning" in frame.filename]
    start = max(place for place, frame in enumerate(stack) if frame.name == "training_step")
    found[name] = max(found.get(name, 0), len(stack) - start)  # checks call the loss from nearer places

POINT = "pair_loss" if hasattr(DPOModule, "pair_loss") else "preference_loss"

def watched(base, name, label):
    def loss(self, *given):
        depth(label)
        return getattr(base, name)(self, *given)
    return type("Watched" + base.__name__, (base,), {name: loss, "__module__": "probe"})

def score(prompts, completions, **columns):
    return [float(len(text) % 3) for text in completions]

sys.modules["probe"] = module = type(sys)("probe")
module.WatchedDPOModule = watched(DPOModule, POINT, "dpo")
module.WatchedGRPOModule = watched(GRPOModule, "policy_loss", "grpo")
module.score = score
os.chdir(tempfile.mkdtemp())
write_world(Path("world"), demonstrations=8, pairs_train=16, pairs_test=4)
common = ["--model.init_from", "world/model", "--model.from_scratch", "true", "--trainer.max_steps", "1",
          "--trainer.enable_checkpointing", "false", "--samples.prompts", "0", "--trainer.accelerator", "cpu"]
train.run(["fit", "--model", "probe.WatchedDPOModule", "--data", "PreferenceDataModule", "--data.source",
           "world/pairs_train.jsonl", "--data.batch_size", "4", *common])
train.run(["fit", "--model", "probe.WatchedGRPOModule", "--model.scorer", "probe.score", "--model.max_new_tokens", "4",
           "--data", "PromptDataModule", "--data.source", "world/prompts_train.jsonl", "--data.batch_size", "4",
           "--data.samples_per_prompt", "2", "--data.rollouts", "1", *common])
print("FRAMES", json.dumps(found))
"""

# Files that held the preference objectives in any revision. A file that is missing from a revision counts 0.
PREFERENCE = ("dpo", "preference", "sided_preference", "adaptive_preference", "reference_free")
FORMULAS = ("preference", "reference_free", "adaptive_preference")


def extracted(revision: str, folder: Path) -> Path:
    """Extract the files of a revision into a folder and return the folder."""
    archive = subprocess.run(["git", "archive", revision], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return folder


def code_lines(text: str) -> int:
    """Count lines of code, excluding blank lines, comments and docstrings."""
    lines = {number for number, line in enumerate(text.splitlines(), 1) if line.strip() and line.strip()[0] != "#"}
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                lines -= set(range(statement.lineno, (statement.end_lineno or 0) + 1))
    return len(lines)


def private_overrides(package: Path) -> int:
    """Count methods with a leading underscore that override a method of a base class in another file."""
    classes: dict[str, tuple[Path, list[str], set[str]]] = {}
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases = [ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases]
                named = {entry.name for entry in node.body if isinstance(entry, ast.FunctionDef)}
                classes[node.name] = (path, bases, {name for name in named if name[0] == "_" and name[:2] != "__"})

    def inherited(name: str, path: Path) -> set[str]:
        found: set[str] = set()
        for base in classes.get(name, (path, [], set()))[1]:
            if base in classes and base != name:
                found |= (classes[base][2] if classes[base][0] != path else set()) | inherited(base, path)
        return found

    return sum(len(own & inherited(name, path)) for name, (path, _, own) in classes.items())


def places(root: Path) -> int:
    """Count the files that mention one shipped objective, excluding pages of results."""
    kinds = {".py", ".yaml", ".md", ".toml"}
    return sum(
        "EXOModule" in path.read_text(errors="ignore")
        for folder in ("rlhf_lightning", "experiments", "tests", "README.md")
        for path in ([root / folder] if (root / folder).is_file() else (root / folder).rglob("*"))
        if path.is_file() and path.suffix in kinds and path.parent.name not in ("architecture", "results")
        and not (path.suffix == ".md" and path.name != "README.md")
    )  # fmt: skip


def measured(revision: str) -> dict[str, int]:
    """Return the figures of a revision, keyed by name."""
    with tempfile.TemporaryDirectory() as folder:
        root = extracted(revision, Path(folder))
        package = root / "rlhf_lightning"
        texts = {path.relative_to(package).as_posix(): path.read_text() for path in package.rglob("*.py")}
        done = subprocess.run(
            [sys.executable, "-c", PROBE], capture_output=True, text=True, check=False, cwd=root,
            env={**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip
        said = [line for line in done.stdout.splitlines() if line.startswith("FRAMES ")]
        if not said:
            raise SystemExit(f"the short run at {revision} failed:\n{done.stderr[-2000:]}")
        frames = json.loads(said[-1].removeprefix("FRAMES "))
        objectives = [*(f"modules/{name}.py" for name in PREFERENCE), *(f"functional/{name}.py" for name in FORMULAS)]
        return {
            "files": len(texts),
            "lines": sum(len(text.splitlines()) for text in texts.values()),
            "lines of code": sum(code_lines(text) for text in texts.values()),
            "frames from training_step to the loss, DPO": frames["dpo"],
            "frames from training_step to the loss, GRPO": frames["grpo"],
            "private methods overridden across files": private_overrides(package),
            "files that name one shipped objective": places(root),
            "lines of the preference objectives": sum(len(texts.get(name, "").splitlines()) for name in objectives),
        }


def main() -> int:
    """Print a table with one column per revision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revisions", nargs="*", default=["HEAD"])
    arguments = parser.parse_args()
    columns = [measured(revision) for revision in arguments.revisions]
    print(f"| | {' | '.join(arguments.revisions)} |\n|---|{'---:|' * len(columns)}")
    for name in columns[0]:
        print(f"| {name} | {' | '.join(f'{column[name]:,}' for column in columns)} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
