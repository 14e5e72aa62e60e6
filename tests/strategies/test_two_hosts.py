"""Two hosts, made of network namespaces: a run on both ends if the network fails, and resumes when it is back.

A rank that waits for another gives up after the strategy's ``timeout``; the run then ends on both hosts within
`ENDS_WITHIN` seconds of the cut.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import random_pairs, save_policy

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 30
"""Seconds for which a rank waits for another, as set in the strategy."""

ENDS_WITHIN = TIMEOUT + 60
"""Seconds after which no process may be left: the timeout, plus the exit on a slow machine."""

STEPS = 60
NEEDS_ROOT = pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.geteuid() != 0 or shutil.which("ip") is None,
    reason="network namespaces need Linux, root and iproute2",
)
pytestmark = [pytest.mark.drill, NEEDS_ROOT]

STRATEGY = json.dumps({
    "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
    "init_args": {
        "data_parallel_size": 2, "tensor_parallel_size": 1, "save_distributed_checkpoint": False,
        "timeout": f"0:00:{TIMEOUT}",
    },
})  # fmt: skip


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class TwoHosts:
    """Two namespaces joined by a veth pair, and the processes in them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.names = folder, [f"rlhf{os.getpid()}{side}" for side in "ab"]
        self.ends = [f"ve{os.getpid()}{side}" for side in "ab"]
        self.processes: list[subprocess.Popen[bytes]] = []
        self.port = 29500

    def join(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", self.ends[0], "type", "veth", "peer", "name", self.ends[1])
        for index, (name, end) in enumerate(zip(self.names, self.ends, strict=True)):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"10.213.7.{index + 1}/24", "dev", end)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", end, "up")

    def wire(self, state: str) -> None:
        ip("-n", self.names[0], "link", "set", self.ends[0], state)

    def start(self, *command: str) -> None:
        """Start one rank on each host."""
        self.port += 1
        for rank, (name, end) in enumerate(zip(self.names, self.ends, strict=True)):
            environment = os.environ | {
                "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))), "GLOO_SOCKET_IFNAME": end,
                "RLHF_CACHE": str(self.folder / "cache"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            }  # fmt: skip
            launcher = ["torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(rank)]
            launcher += ["--master-addr", "10.213.7.1", "--master-port", str(self.port), "-m", "rlhf_lightning"]
            with (self.folder / f"output_{rank}.txt").open("wb") as output:
                self.processes.append(
                    subprocess.Popen(
                        ["ip", "netns", "exec", name, sys.executable, "-m", *launcher, *command],
                        cwd=self.folder, env=environment, stdout=output, stderr=subprocess.STDOUT,
                    )
                )  # fmt: skip

    def ended(self, seconds: float) -> list[int]:
        """Wait for both hosts; return their exit statuses."""
        end = time.monotonic() + seconds
        statuses = [process.wait(max(end - time.monotonic(), 0.1)) for process in self.processes]
        self.processes.clear()
        return statuses

    def said(self, rank: int) -> str:
        return (self.folder / f"output_{rank}.txt").read_text(errors="replace")

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[TwoHosts]:
    hosts = TwoHosts(tmp_path)
    try:
        hosts.join()
        yield hosts
    finally:
        hosts.close()


def command_of(stage: str, folder: Path) -> list[str]:
    """A run of `STEPS` updates, with a checkpoint every fourth update."""
    pairs = random_pairs(2 * STEPS, seed=1)
    rows = [
        {
            name: " ".join(f"w{i}" for i in ids if i > 5)
            for name, ids in zip(("prompt", "chosen", "rejected"), pair, strict=True)
        }
        for pair in pairs
    ]
    keys = ("prompt", "chosen", "rejected") if stage == "dpo" else ("prompt",)
    (folder / "rows.jsonl").write_text("".join(json.dumps({key: row[key] for key in keys}) + "\n" for row in rows))
    own = ["--model", "DPOModule", "--data", "PreferenceDataModule"]
    if stage == "ppo":
        own = ["--model", "PPOModule", "--model.scorer", "rank_cases.low_words", "--model.max_new_tokens", "8",
               "--model.ppo_epochs", "1", "--data", "PromptDataModule", "--data.rollouts", str(STEPS)]  # fmt: skip
    return [
        "fit", *own, "--model.init_from", save_policy(folder / "policy"), "--model.learning_rate", "1e-4",
        "--data.source", str(folder / "rows.jsonl"), "--data.batch_size", "2", "--checkpoint.every_n_updates", "4",
        "--samples.prompts", "0", "--trainer.accelerator", "cpu", "--trainer.num_nodes", "2", "--trainer.devices", "1",
        "--trainer.strategy", STRATEGY,
    ]  # fmt: skip


def newest_update(run: Path) -> int:
    return max((int(path.stem.removeprefix("update_")) for path in run.glob("checkpoints/update_*.ckpt")), default=0)


@pytest.mark.parametrize("stage", ["dpo", "ppo"])
def test_a_run_on_two_hosts_fails_on_network_loss_and_resumes(hosts: TwoHosts, tmp_path: Path, stage: str) -> None:
    command = command_of(stage, tmp_path)
    hosts.start(*command, "--run_name", "whole")
    assert hosts.ended(300) == [0, 0], hosts.said(0)[-3000:] + hosts.said(1)[-3000:]

    hosts.start(*command, "--run_name", "cut")
    run, deadline = tmp_path / "runs" / "cut" / "version_0", time.monotonic() + 180
    while newest_update(run) < 8:
        assert time.monotonic() < deadline and all(process.poll() is None for process in hosts.processes), hosts.said(
            0
        ) + hosts.said(1)
        time.sleep(0.05)
    hosts.wire("down")
    cut = time.monotonic()
    statuses = hosts.ended(ENDS_WITHIN)
    print(f"{stage}: ended {time.monotonic() - cut:.1f} s after the cut, the ranks waiting {TIMEOUT} s")
    assert all(status != 0 for status in statuses)
    assert 8 <= newest_update(run) < STEPS
    for rank in (0, 1):
        assert "another rank does not respond" in hosts.said(rank) and "--resume" in hosts.said(rank)
        assert "Traceback" not in hosts.said(rank).partition("another rank")[0]

    hosts.wire("up")
    hosts.start("fit", "--resume", "runs/cut")
    assert hosts.ended(300) == [0, 0], hosts.said(0)[-3000:] + hosts.said(1)[-3000:]
    assert newest_update(run) == STEPS
    whole, resumed = (
        load_file(tmp_path / "runs" / name / "version_0" / "model" / "model.safetensors") for name in ("whole", "cut")
    )
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())
