"""An installed wheel works from an empty folder: recipes, commands, and a small run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from commands.conftest import save
from transformers import LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Return the folder into which a wheel of this checkout was installed."""
    folder, pip = tmp_path_factory.mktemp("wheel"), [sys.executable, "-m", "pip", "-q"]
    source = folder / "source"  # setuptools would leave build/ in the checkout
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "rlhf_lightning"):
        (source / name).symlink_to(ROOT / name)
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder / "dist", source], check=True, timeout=300
    )
    (wheel,) = (folder / "dist").glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True, timeout=300)
    return folder / "site"


@pytest.fixture
def rlhf(site, tmp_path):
    """Return a function that runs ``rlhf`` of the wheel in an empty folder, without the checkout on its path."""
    (tmp_path / "empty").mkdir()

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, "-P", "-m", "rlhf_lightning", *arguments], cwd=tmp_path / "empty", env=environment,
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip

    return call


def test_every_recipe_is_in_the_wheel(site):
    packaged = {path.relative_to(site) for path in (site / "rlhf_lightning" / "recipes").rglob("*.yaml")}
    assert packaged == {path.relative_to(ROOT) for path in (ROOT / "rlhf_lightning" / "recipes").rglob("*.yaml")}
    data = {path.relative_to(ROOT) for path in (ROOT / "rlhf_lightning").rglob("*")
            if path.is_file() and path.suffix not in (".py", ".pyc")}  # fmt: skip
    assert not [path for path in data if not (site / path).is_file()]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("quickstart", "--help"), "usage: rlhf quickstart"),
        (("objectives",), "DPOModule"),
        (("loop", "--config", "recipe:labels/loop", "--help"), "usage: rlhf loop"),
        (("plan", "--help"), "rlhf plan"),
        (("fit", "--help"), "recipe:dpo"),
    ],
)
def test_commands_run_from_the_wheel(rlhf, arguments, told):
    done = rlhf(*arguments)
    assert done.returncode == 0, done.stderr
    assert told in done.stdout


def test_recipes_are_found_and_unknown_ones_refused_in_one_sentence(rlhf):
    printed = rlhf("fit", "--config", "recipe:dpo", "--print_config")
    assert printed.returncode == 0, printed.stderr
    assert yaml.safe_load(printed.stdout)["model"]["class_path"].endswith("DPOModule")
    wrong = rlhf("fit", "--config", "recipe:dop")
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1] == "rlhf: there is no recipe 'dop': did you mean dpo?"


def test_a_recipe_trains(rlhf, tmp_path):
    start = save(tmp_path / "model", LlamaForCausalLM)
    rows = [{"prompt": f"ask {n}", "chosen": "yes", "rejected": "no"} for n in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = rlhf(
        "fit", "--config", "recipe:dpo", "--model.init_from", start, "--data.source", str(tmp_path / "pairs.jsonl"),
        "--data.eval_rows", "1", "--trainer.max_steps", "1", "--trainer.accelerator", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "empty" / "runs" / "dpo" / "version_0"
    assert (folder / "model" / "adapter_config.json").is_file() and (folder / "config.yaml").is_file()
