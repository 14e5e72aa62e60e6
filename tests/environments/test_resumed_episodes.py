"""A run killed in the middle of an episode and resumed equals the uninterrupted run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_policy

TESTS = Path(__file__).resolve().parents[1]


def fit(folder: Path, *further: str, deadly: Path | None = None) -> int:
    """Train in a separate process; return its exit status."""
    environment = {
        **os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}", "DEADLY_REPLIES": str(deadly or ""),
        "RLHF_CACHE": str(folder / "cache"),
    }  # fmt: skip
    command = [sys.executable, "-m", "rlhf_lightning", "fit", *further]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode not in (0, -9):
        print(done.stdout[-3000:], done.stderr[-3000:])
    return done.returncode


def settings(folder: Path, name: str, rollouts: int) -> list[str]:
    return [
        "--model", "GRPOModule", "--model.init_from", str(folder / "policy"), "--model.scorer", "ZeroScorer",
        "--model.engine", '{"class_path": "many_ends.ManyEnds"}', "--model.max_new_tokens", "5",
        "--model.sampling_batch_size", "3", "--model.learning_rate", "1e-3", "--model.seed", "3",
        "--data", "PromptDataModule", "--data.source", "prompts.jsonl", "--data.batch_size", "8",
        "--data.samples_per_prompt", "4", "--data.rollouts", str(rollouts), "--data.max_turns", "3",
        "--data.environment", '{"class_path": "faulty_environment.Deadly"}',
        "--trainer.max_epochs", "1", "--checkpoint.every_n_updates", "1", "--run_name", name,
    ]  # fmt: skip


def state(folder: Path, name: str) -> dict[str, Any]:
    (run,) = (folder / "runs" / name).glob("version_*")
    kept = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    samples = (run / "samples.jsonl").read_text()
    return {"samples": samples, **{part: repr(kept[part]) for part in ("state_dict", "optimizer_states", "progress")}}


@pytest.mark.parametrize(
    ("kills", "rollouts"),
    [
        pytest.param([30, 25], 5, marks=pytest.mark.slow, id="two"),
        pytest.param([25 + 3 * number % 20 for number in range(20)], 30, marks=pytest.mark.drill, id="twenty"),
    ],
)
def test_a_run_killed_within_episodes_resumes_bit_identically(tmp_path: Path, kills: list[int], rollouts: int) -> None:
    """The process dies at its 25th reply or later, in its second rollout or later."""
    save_policy(tmp_path / "policy")
    rows = [{"prompt": f"w{10 + number} w{20 + number}"} for number in range(8)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert fit(tmp_path, *settings(tmp_path, "whole", rollouts)) == 0
    deadly = tmp_path / "left"
    resumed, killed = False, 0
    for left in kills:
        deadly.write_text(str(left))
        further = ["--resume", "runs/cut/version_0"] if resumed else settings(tmp_path, "cut", rollouts)
        status = fit(tmp_path, *further, deadly=deadly)
        resumed = (tmp_path / "runs/cut/version_0/checkpoints/last.ckpt").exists()
        assert status == -9
        killed += 1
    assert killed == len(kills) and fit(tmp_path, "--resume", "runs/cut/version_0") == 0
    assert state(tmp_path, "cut") == state(tmp_path, "whole")
