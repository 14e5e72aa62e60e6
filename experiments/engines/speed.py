"""Measure tokens per second of the sampling engines, one after the other, on the same prompts.

    python experiments/engines/speed.py --model SmolLM2.gguf [--vllm_python .venv-vllm/bin/python] [--threads 1]

Each engine samples from the same prompts after a warm-up. The best repetition counts; all are shown. The vLLM row needs
an interpreter with vLLM, and is left out otherwise. Writes experiments/engines/speed.md.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import torch

from rlhf_lightning.evaluation.report import markdown_table, write_markdown
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.loading import LoadSettings
from rlhf_lightning.models.resolving import resolve_folder
from rlhf_lightning.models.roles import load_policy
from rlhf_lightning.sampling.engines import SamplingEngine, SamplingSettings
from rlhf_lightning.sampling.generate_engine import ContinuousBatchingEngine, GenerateEngine
from rlhf_lightning.sampling.remote_engine import RemoteEngine
from rlhf_lightning.sampling.slot_engine import SlotEngine
from rlhf_lightning.tokenization import encode_prompt, end_token_ids, load_tokenizer
from rlhf_lightning.worlds.assistant import AssistantWorld

HERE = Path(__file__).resolve().parent


@contextlib.contextmanager
def vllm(model: str, python: str, threads: int, log: str | Path, *flags: str) -> Iterator[str]:
    """Serve a model with ``rlhf serve-vllm`` on a free port; yield the address once the server answers."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "rlhf_lightning", "serve-vllm", resolve_folder(model), "--port", str(port)]
    command += ["--python", python, "--cpu", "true", "--threads", str(threads), "--restarts", "0", *flags]
    with Path(log).open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, process_group=0)
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise SystemExit(f"the server ended: see {log}")
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).read()
                break
            time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, 15)
        process.wait(60)


def measured(
    engine: SamplingEngine,
    policy: CausalLM,
    prompts: list[torch.Tensor],
    ends: list[int],
    arguments: argparse.Namespace,
) -> list[float]:
    """Return tokens per second of each repetition, after a warm-up on a few prompts."""
    settings = SamplingSettings(arguments.tokens, 1.0, batch_size=len(prompts))
    episodes = torch.arange(len(prompts))
    engine.sample(policy, prompts[:4], episodes[:4], settings, 1, ends)
    speeds = []
    for _ in range(arguments.repeats):
        began = time.perf_counter()
        drawn = engine.sample(policy, prompts, episodes, settings, 0, ends)
        speeds.append(sum(len(ids) for ids in drawn.ids) / (time.perf_counter() - began))
    return speeds


def main() -> None:
    """Measure every engine and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--vllm_python", default=".venv-vllm/bin/python")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--log", default="vllm.log")
    parser.add_argument("--page", default=str(HERE / "speed.md"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    load_before = os.getloadavg()[0]
    policy, tokenizer = load_policy(arguments.model, LoadSettings()), load_tokenizer(resolve_folder(arguments.model))
    policy.requires_grad_(False).eval()
    asked = AssistantWorld(0).prompts("train")[: arguments.prompts]
    prompts = [torch.tensor(encode_prompt(tokenizer, [{"role": "user", "content": text}])) for text in asked]
    ends = end_token_ids(tokenizer)
    engines: dict[str, SamplingEngine] = {
        "SlotEngine": SlotEngine(), "GenerateEngine": GenerateEngine(),
        "ContinuousBatchingEngine": ContinuousBatchingEngine(),
    }  # fmt: skip
    found = {name: measured(engine, policy, prompts, ends, arguments) for name, engine in engines.items()}
    if Path(arguments.vllm_python).is_file():
        with vllm(arguments.model, arguments.vllm_python, arguments.threads, arguments.log) as url:
            engine = RemoteEngine(url, "policy", sync_bound=None)
            found["RemoteEngine, vLLM"] = measured(engine, policy, prompts, ends, arguments)
    first = max(found["SlotEngine"])
    rows = [
        [name, f"{max(speeds):.0f}", f"{max(speeds) / first:.2f}", ", ".join(f"{one:.0f}" for one in speeds)]
        for name, speeds in found.items()
    ]
    table = markdown_table(["engine", "tokens/s, best", "of SlotEngine's", "each repetition"], rows)
    write_markdown(arguments.page, (
        "# Tokens per second of the engines\n\n"
        f"`python experiments/engines/speed.py` writes this page: {len(prompts)} prompts of the assistant world, up to "
        f"{arguments.tokens} tokens each, {Path(arguments.model).stem}, fp32, {arguments.threads} thread(s) on "
        f"{os.cpu_count()} {platform.machine()} cores. The load of the machine was {load_before:.1f} before and "
        f"{os.getloadavg()[0]:.1f} after, so compare the rows with each other and not with other pages.\n\n{table}\n"
    ))  # fmt: skip
    print(table)


if __name__ == "__main__":
    main()
