"""A small GRPO run with lag 1 and the processes that sample for it: what the drills of this folder disturb.

The run checks each rollout: all its episodes are there, and their log-probabilities are those of the weights that the
lag prescribes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_lightning.data import PromptDataModule
from rlhf_lightning.models.lora import LoraSettings
from rlhf_lightning.modules import GRPOModule
from rlhf_lightning.sampling.hand_over import write_server_folder
from rlhf_lightning.sampling.json_server import JSONServer
from rlhf_lightning.sampling.own_logprobs import scored
from rlhf_lightning.worlds.assistant import make_config, write_world

EPISODES = 64
"""Episodes of a rollout: 8 prompts with 8 completions of up to 48 tokens."""


def lengths(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    """Score completions by their number of characters, which takes no time."""
    return [float(len(text)) for text in completions]


def write_policy(world: Path) -> Path:
    """Write the prompts and a policy with random weights, unless they exist; return the policy's folder."""
    if not (world / "policy" / "config.json").exists():
        write_world(world, demonstrations=8, pairs_train=16, pairs_test=4)
        torch.manual_seed(0)
        # vLLM's attention on a CPU needs heads of 32, 64 or more dimensions.
        policy = AutoModelForCausalLM.from_config(make_config(hidden_size=64, heads=2))
        write_server_folder(policy, AutoTokenizer.from_pretrained(world / "model"), world / "policy")
    return world / "policy"


# -- the run ----------------------------------------------------------------------------------------------------------


class Checked(GRPOModule):
    """Compares each rollout with the weights that it must have been sampled from."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.versions: list[dict[str, torch.Tensor]] = []
        self.seen: list[list[str]] = []
        self.gaps: list[float] = []
        self.other_gaps: list[float] = []

    def learn(self, rollout: Any, batch: Any, meter: Any) -> float:
        """Record the completions, and their difference from the prescribed weights and from the next version."""
        own = {name: weight.detach().clone() for name, weight in self.policy.named_parameters() if weight.requires_grad}
        self.versions.append(own)
        self.gaps.append(self._gap(self.versions[max(len(self.seen) - self.lag, 0)], rollout))
        if self.seen:
            self.other_gaps.append(self._gap(own, rollout))
        self._set(own)
        ids = rollout.sequences.completions
        self.seen.append([hashlib.sha256(row.numpy().tobytes()).hexdigest()[:12] for row in ids])
        return super().learn(rollout, batch, meter)

    def _gap(self, weights: dict[str, torch.Tensor], rollout: Any) -> float:
        """Return the largest difference between the log-probabilities of weights and those of the engine, nats."""
        self._set(weights)
        found = scored(self.policy, rollout.sequences.prompts, rollout.sequences.completions, 1.0)
        pairs = zip(found, rollout.behaviour_logprobs.cpu(), strict=True)
        return max(float((one - other[: len(one)]).abs().max()) for one, other in pairs)

    @torch.no_grad()
    def _set(self, weights: dict[str, torch.Tensor]) -> None:
        for name, weight in self.policy.named_parameters():
            if name in weights:
                weight.copy_(weights[name])


class Ends(pl.Callback):
    """Records when each rollout was learned from."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Record the time."""
        self.times.append(time.monotonic())


def run(world: Path, engine: Any, rollouts: int, lora: bool = False, callbacks: Any = ()) -> dict[str, Any]:
    """Train; return a digest of the final weights, hashes of each rollout's completions, and measurements.

    ``seconds`` is the median time of a rollout. ``gap`` is the largest difference between the log-probabilities that
    episodes were sampled with and those of the weights that the lag prescribes; ``other_gap`` is the smallest such
    difference of a rollout from the next version of the weights.
    """
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    module = Checked(
        init_from=str(world / "policy"), scorer=lengths, engine=engine, lag=1, max_new_tokens=48, kl_coef=0.0,
        sampler_correction="sequence_truncate", learning_rate=1e-3, lora=LoraSettings(r=4) if lora else None,
    )  # fmt: skip
    data = PromptDataModule(
        str(world / "prompts_train.jsonl"), batch_size=EPISODES, samples_per_prompt=8, rollouts=rollouts,
        cache_dir=str(world / "cache"),
    )  # fmt: skip
    ends = Ends()
    pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[ends, *callbacks],
    ).fit(module, data)  # fmt: skip
    digest = hashlib.sha256()
    for name, weight in sorted(module.policy.state_dict().items()):
        digest.update(name.encode() + weight.contiguous().numpy().tobytes())
    steps = sorted(later - earlier for earlier, later in zip(ends.times[1:], ends.times[2:], strict=False))
    return {
        "weights": digest.hexdigest(), "seen": module.seen, "gap": max(module.gaps),
        "other_gap": min(module.other_gaps), "ends": ends.times, "seconds": steps[len(steps) // 2] if steps else 0.0,
    }  # fmt: skip


class Compared(NamedTuple):
    """A disturbed run compared with an undisturbed one.

    Attributes:
        lost: episodes that are missing.
        equal: share of equal completions.
        bits: whether all completions and the final weights are equal.
    """

    lost: int
    equal: float
    bits: bool


def compared(found: dict[str, Any], whole: dict[str, Any], rollouts: int) -> Compared:
    """Compare two runs."""
    drawn = sum(len(rows) for rows in found["seen"])
    pairs = zip(sum(found["seen"], []), sum(whole["seen"], []), strict=False)
    equal = sum(one == other for one, other in pairs) / (rollouts * EPISODES)
    bits = all(found[name] == whole[name] for name in ("weights", "seen"))
    return Compared(rollouts * EPISODES - drawn, equal, bits)


# -- processes that sample --------------------------------------------------------------------------------------------


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Service:
    """A command of this package that answers at an address, such as a rollout worker or a server.

    Args:
        command: the command with its flags.
        log: file for its output.
        host: address that it listens on.
        prefix: command that starts it, such as ``ip netns exec NAME``.
    """

    def __init__(self, command: list[str], log: Path, host: str = "127.0.0.1", prefix: tuple[str, ...] = ()) -> None:
        self.port, self.log = free_port(), log
        self.url = f"http://{host}:{self.port}"
        where = ["--host", host, "--port", str(self.port)]
        self.command = [*prefix, sys.executable, "-m", "rlhf_lightning", *command, *where]
        self.start()

    def start(self) -> None:
        """Start the process; `kill` ends it."""
        with self.log.open("a") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, process_group=0)

    def kill(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Ask the process to end; the second time, ``rlhf serve-vllm`` kills its server."""
        while self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)

    def descendants(self) -> list[int]:
        """Return the process ids of its children, their children, and so on."""
        found, rest = [], [self.process.pid]
        while rest:
            with contextlib.suppress(OSError):
                own = [int(pid) for pid in Path(f"/proc/{rest[0]}/task/{rest[0]}/children").read_text().split()]
                found, rest = found + own, rest + own
            rest = rest[1:]
        return found


def answers(url: str) -> bool:
    """Return whether a service answers."""
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
        return bool(answer.status == 200)
    return False


def wait_for(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    """Wait until a condition holds.

    Raises:
        TimeoutError: it does not hold in time.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"nothing answers after {seconds:g} s")
        time.sleep(0.2)


def vllm_command(policy: Path, python: str, *flags: str) -> list[str]:
    """Return the command of a vLLM server on the CPU for an adapter."""
    command = ["serve-vllm", str(policy), "--python", python, "--cpu", "true", "--threads", "1", "--versions", "3"]
    return [*command, "--lora_rank", "8", "--restarts", "1000", *flags]


# -- what a run waits for ---------------------------------------------------------------------------------------------


def watch(server: JSONServer, busy: list[str], before: Callable[[str], None] = lambda kind: None) -> None:
    """Keep the kinds of a server's open requests in a list; ``before`` is called with the kind of each request."""
    post = server.post

    def watched(route: str, body: Any) -> Any:
        probe = body.get("logprobs", 1) > 1
        kind = "sampling" if route in ("/sample", "/v1/completions") and not probe else "weight update"
        before(kind)
        busy.append(kind)
        try:
            return post(route, body)
        finally:
            busy.remove(kind)

    server.post = watched  # type: ignore[method-assign]


def write_result(path: Path, result: Any) -> None:
    """Write a result as JSON, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result) + "\n")
    partial.replace(path)


def read_result(path: Path) -> Any:
    """Read a result."""
    return json.loads(path.read_text())
