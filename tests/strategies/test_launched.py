"""`rlhf fit` started by torchrun on two ranks: one run folder, shards of a checkpoint, resuming and exporting them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import random_pairs, save_policy

from rlhf_lightning.commands.export import main as export

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.drill
STRATEGY = json.dumps({
    "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
    "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1, "save_distributed_checkpoint": True},
})  # fmt: skip


def launch(folder: Path, *command: str) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))), "OMP_NUM_THREADS": "1"}
    environment |= {"RLHF_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "rlhf_lightning", *command],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_a_run_on_two_ranks_writes_one_folder_resumes_and_exports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ("prompt", "chosen", "rejected")
    rows = [
        dict(zip(keys, (" ".join(f"w{i}" for i in ids if i > 5) for ids in pair), strict=True))
        for pair in random_pairs(20)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        "fit", "--model", "DPOModule", "--data", "PreferenceDataModule", "--model.init_from",
        save_policy(tmp_path / "policy"), "--data.source", str(tmp_path / "rows.jsonl"), "--data.batch_size", "3",
        "--data.eval_rows", "4", "--trainer.accelerator", "cpu", "--trainer.devices", "2",
        "--trainer.strategy", STRATEGY, "--model.lr_schedule", "constant", "--model.warmup", "0",
        "--model.learning_rate", "1e-3",
    ]  # fmt: skip
    output = launch(tmp_path, *command, "--run_name", "whole", "--trainer.max_epochs", "2")
    assert output.count("run: runs/whole/version_0") == 1
    launch(tmp_path, *command, "--run_name", "short", "--trainer.max_epochs", "1")
    run = tmp_path / "runs" / "short" / "version_0"
    assert [path.name for path in run.parent.iterdir()] == ["version_0"]
    assert (run / "checkpoints" / "last.ckpt").is_dir() and (run / "checkpoints" / "best.ckpt").is_symlink()
    samples = (run / "samples.jsonl").read_text().splitlines()
    assert len(samples) == len({(json.loads(row)["update"], json.loads(row)["prompt"]) for row in samples}) > 4

    launch(tmp_path, "fit", "--resume", "runs/short", "--trainer.max_epochs", "2")
    whole, resumed = (
        load_file(tmp_path / f"runs/{name}/version_0/model/model.safetensors") for name in ("whole", "short")
    )
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())
    monkeypatch.chdir(tmp_path)
    assert export(["runs/short", "--out", "exported"]) == 0
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert all(torch.equal(exported[name], weight) for name, weight in resumed.items())
