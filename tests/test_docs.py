"""Build the documentation offline with strict links, and run the tutorials."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import smollm2_folder

from rlhf_lightning.commands import train
from rlhf_lightning.worlds.assistant import write_world

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = (
    "first-run", "stages", "sft-on-your-data", "reward-model", "ppo", "dpo", "is-it-better", "grpo", "own-objective",
    "tools", "constraint", "reward-hacking", "labels", "constitutional-ai", "resume", "memory", "elsewhere",
)  # fmt: skip
"""Tutorials in reading order; later ones use files of earlier ones."""
VLLM = Path(os.environ.get("RLHF_VLLM_PYTHON", "")).parents[1:2]
"""The environment with vLLM; empty if there is none."""
WITH_VLLM = pytest.param("vllm", marks=[
    pytest.mark.vllm, pytest.mark.skipif(not VLLM, reason="RLHF_VLLM_PYTHON names no interpreter: make test-vllm"),
])  # fmt: skip
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
LEFT_BEHIND = {
    "first-run": "runs/quickstart/report.md",
    "stages": "runs/dpo_beta_0.2/version_0/model",
    "sft-on-your-data": "runs/my_sft/version_0/model",
    "reward-model": "best.jsonl",
    "ppo": "over_optimised/report.md",
    "dpo": "comparison/report.md",
    "is-it-better": "policies/best_of_n.png",
    "grpo": "runs/brief/version_0/model",
    "own-objective": "runs/offset",
    "tools": "episodes.jsonl",
    "constraint": "limits/report.md",
    "reward-hacking": "unseen_prompts/report.html",
    "labels": "runs/from_labels/version_0/model",
    "constitutional-ai": "runs/ai_reward/version_0/model",
    "resume": "runs/stopped/version_0/model",
    "memory": "merged/config.json",
    "elsewhere": "dpo_model/config.json",
    "vllm": "runs/with_lag/version_0/model",
}
"""Files that exist after each tutorial."""


def test_pages_build_with_strict_links(tmp_path):
    pytest.importorskip("mkdocs", reason="the docs extra is not installed")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) > len(TUTORIALS)
    one_page = re.sub(r"<[^>]+>", "", (tmp_path / "ppo-on-one-page" / "index.html").read_text())
    assert "def ppo_update(" in one_page, "the page of PPO does not show the file's code"
    assert not [page for page in pages if "\\|" in page.read_text()], "a table shows the escape of its separator"
    assert not [page for page in pages if "\b" in page.read_text()], "a page shows a terminal's control character"
    first = re.compile(r"<h1.*?</h1>\s*<p>After this page you ", re.DOTALL)
    assert not [page for page in tmp_path.rglob("index.html") if not first.search(page.read_text())]
    foreign = r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)"'
    assert not [found for page in pages for found in re.findall(foreign, page.read_text())]


def blocks_of(page: str) -> list[tuple[str, str]]:
    """Return every fenced block of a tutorial as (info string, text)."""
    text = (ROOT / "docs" / "tutorials" / f"{page}.md").read_text()
    return re.findall(r"^```(\w+[^\n]*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_every_tutorial_is_listed():
    assert {path.stem for path in (ROOT / "docs" / "tutorials").glob("*.md")} == {*TUTORIALS, *WITH_VLLM.values}


def without_numbers(text: str) -> list[str]:
    """Return the output lines with every number replaced by #, because numbers differ between machines."""
    return [" ".join(re.sub(r"-?[\d.]+(e-\d+)?", "#", line).split()) for line in text.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """Return an empty folder and a function that runs one shell line in it."""
    folder = tmp_path_factory.mktemp("reader")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RLHF_CACHE": str(folder / "cache"), "COLUMNS": "120"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    for place in VLLM:
        (folder / ".venv-vllm").symlink_to(place)

    def run(line: str) -> str:
        command = re.sub(r"\brlhf(?= )", f"{shlex.quote(sys.executable)} -m rlhf_lightning", line)
        if SMOLLM2 in command:
            command = command.replace(SMOLLM2, str(smollm2_folder()))
        done = subprocess.run(
            command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout + done.stderr

    return folder, run


@pytest.mark.slow
@pytest.mark.parametrize("page", [*TUTORIALS, WITH_VLLM])
def test_tutorial_commands_give_the_shown_output(page, reader):
    folder, run = reader
    printed = ""
    for kind, text in blocks_of(page):
        if titled := re.fullmatch(r'\w+ title="([\w.]+)"', kind):
            (folder / titled[1]).write_text(text)
        elif kind == "bash":
            for line in text.replace("\\\n", " ").splitlines():
                printed += run(line)
        elif kind == "text":
            made = without_numbers(printed)
            missing = [line for line in without_numbers(text) if line != "..." and line not in made]
            assert not missing, f"{page} shows what its commands do not print: {missing}"
    assert (folder / LEFT_BEHIND[page]).exists()


def test_the_architecture_page_lists_every_room():
    page = (ROOT / "docs" / "architecture.md").read_text()
    rooms = {path.stem for path in (ROOT / "rlhf_lightning").iterdir() if path.suffix in ("", ".py")}
    hidden = {"__init__", "__main__", "__pycache__", "cli", "py"}
    named = set(re.findall(r"`(\w+)/?`", page))
    assert {room for room in rooms - hidden if not room.startswith(".")} <= named


def functions_called(argv: list[str]) -> list[tuple[str, str]]:
    """Run a command in process; return the called package functions as (file, qualified name), in order
    of first call.
    """
    called: dict[tuple[str, str], None] = {}
    package = f"{ROOT / 'rlhf_lightning'}{os.sep}"

    def note(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(package):
            called[(frame.f_code.co_filename[len(package) :], frame.f_code.co_qualname)] = None

    sys.setprofile(note)
    try:
        train.run(argv)
    finally:
        sys.setprofile(None)
    return list(called)


@pytest.mark.parametrize(
    ("heading", "flags"),
    [
        ("One batch of DPO", "--config recipe:dpo --data.source world/pairs_train.jsonl"),
        (
            "One rollout of PPO",
            "--config recipe:ppo --data.source world/prompts_train.jsonl --data.rollouts 1 --model.mini_batch_size 4"
            " --model.scorer lengths.score --model.max_new_tokens 4",
        ),
    ],
    ids=["dpo", "ppo"],
)
def test_the_architecture_page_traces_the_real_calls(heading, flags, tmp_path, monkeypatch):
    section = (ROOT / "docs" / "architecture.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    shown = re.findall(r"^\| `([\w/]+\.py)` \| `([\w.]+)` \|", section, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    write_world(tmp_path / "world", demonstrations=8, pairs_train=16, pairs_test=4)
    (tmp_path / "lengths.py").write_text(
        "def score(prompts, completions, **columns):\n    return [float(len(text)) for text in completions]\n"
    )
    common = """--model.init_from world/model --model.from_scratch true --data.batch_size 4 --data.eval_rows 4
        --data.cache_dir cache --trainer.max_epochs 1 --trainer.max_steps 1 --trainer.accelerator cpu
        --trainer.enable_checkpointing false --samples.prompts 0 --model.self_check false"""
    called = functions_called(["fit", *flags.split(), *common.split()])
    missing = [step for step in shown if step not in called]
    assert shown and not missing, f"the page names functions that the run does not call: {missing}"
    assert shown == sorted(shown, key=called.index), "the page's order is not the order of the run"
