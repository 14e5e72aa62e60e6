"""How much memory a PPO step takes, by who shares whose backbone. Each arrangement runs in a process of its own.

    python experiments/benchmarks/roles_memory.py --model MODEL --out roles_memory.md

The reward model is an adapter that was drawn and not trained: memory does not depend on what it has learnt.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

EPISODES, NEW_TOKENS, EPOCHS = 8, 48, 4
SUBJECTS = ("bees", "tides", "bread", "chess", "trains", "glass", "owls", "maps")
LORA = ["--model.lora.r", "16", "--model.lora.alpha", "32"]
NF4 = ["--model.quantization", "nf4"]
ARRANGEMENTS: dict[str, tuple[str, list[str]]] = {
    "LoRA; critic apart, reward model apart": ("whole", [*LORA, "--model.critic", "separate"]),
    "LoRA; critic an adapter, reward model on the backbone": ("float32", [*LORA, "--model.critic", "adapter"]),
    "4-bit LoRA; critic an adapter, reward model on the backbone": (
        "nf4", [*LORA, *NF4, "--model.critic", "adapter"],
    ),
    "LoRA; critic a head, reward model on the backbone": ("float32", [*LORA, "--model.critic", "shared"]),
    "LoRA; critic apart, reward model on the backbone": ("float32", [*LORA, "--model.critic", "separate"]),
    "LoRA; critic an adapter, reward model apart": ("whole", [*LORA, "--model.critic", "adapter"]),
    "every weight; all roles apart": ("whole", ["--model.critic", "separate"]),
}  # fmt: skip
"""For each arrangement the reward model it takes, and its flags."""


def main() -> None:
    """Measure every arrangement and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder, .gguf file or hub id")
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--only", default="", help="arrangements whose name contains this")
    parser.add_argument("--measure", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        measure(options.measure)
        return
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        prompts = [{"prompt": f"Tell me in two sentences what a child should know about {s}."} for s in SUBJECTS]
        (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
        reward_models(options.model, root)
        rows = []
        for name, (reward, flags) in ARRANGEMENTS.items():
            if options.only in name:
                rows.append((name, in_a_process(options.model, root, reward, flags)))
                print(name, rows[-1][1], flush=True)
                options.out.write_text(table(rows))


def reward_models(model: str, root: Path) -> None:
    """Write a reward model three times: an adapter on the backbone, one on the backbone in 4 bits, whole weights."""
    from rlhf_lightning.models.export import export_reward_model
    from rlhf_lightning.models.loading import LoadSettings, LoraSettings, load_reward_hf_model
    from rlhf_lightning.models.scalar_head import ScalarModel
    from rlhf_lightning.modules import RewardModule

    for name, quantization in (("float32", None), ("nf4", "nf4")):
        module = RewardModule(init_from=model, lora=LoraSettings(r=16), quantization=quantization)  # type: ignore[arg-type]
        module.configure_model()
        module.export(root / name)
    whole = ScalarModel(load_reward_hf_model(str(root / "float32"), LoadSettings()))
    export_reward_model(whole, module.tokenizer, root / "whole", model)


def in_a_process(model: str, root: Path, reward: str, flags: list[str]) -> dict[str, Any]:
    """Run one arrangement from a fresh start; return what it measured."""
    settings = {
        "--model": "PPOModule", "--model.init_from": model, "--model.scorer": str(root / reward),
        "--model.max_new_tokens": NEW_TOKENS, "--model.ppo_epochs": EPOCHS, "--data": "PromptDataModule",
        "--data.source": str(root / "prompts.jsonl"), "--data.batch_size": EPISODES,
        "--runs_folder": str(root / "runs"), "--trainer.max_epochs": 1, "--data.eval_rows": 0,
        "--trainer.enable_progress_bar": "false",
    }  # fmt: skip
    argv = [str(part) for pair in settings.items() for part in pair] + flags
    command = [sys.executable, __file__, "--model", model, "--out", os.devnull, "--measure", "fit", *argv]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"exit {done.returncode}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(argv: list[str]) -> None:
    """Train one rollout; print peak memory, seconds, and the sizes of what the run leaves behind."""
    import torch

    from rlhf_lightning.commands.train import run

    began = time.monotonic()
    done = run(argv)
    seconds = time.monotonic() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert done.folder is not None
    policy = done.model.policy.model  # type: ignore[attr-defined]
    backbone = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    frozen = sum(p.untyped_storage().nbytes() for name, p in backbone.named_parameters() if "lora_" not in name)
    exported = sum(file.stat().st_size for file in (done.folder / "model").iterdir())
    checkpoint = (done.folder / "checkpoints" / "last.ckpt").stat().st_size
    facts = {"peak": peak, "seconds": seconds, "backbone": frozen / 2**20, "exported": exported / 2**20}
    print(json.dumps(facts | {"checkpoint": checkpoint / 2**20, "threads": torch.get_num_threads()}))


def table(rows: list[tuple[str, dict[str, Any]]]) -> str:
    """Return the results as a page."""
    lines = [
        "# Memory of a PPO step, by who shares whose backbone",
        "",
        f"One rollout of {EPISODES} episodes with up to {NEW_TOKENS} new tokens and {EPOCHS} epochs over it, all "
        f"{EPISODES} in one pass. Peak is the process's largest resident size, the libraries' own included; all sizes "
        "are MiB. LoRA is r = 16 on all linear layers. The folder is the exported policy's, its tokenizer included; "
        "the checkpoint holds the critic too. Written by `experiments/benchmarks/roles_memory.py`.",
        "",
        "| arrangement | peak | policy's backbone | exported folder | checkpoint |",
        "|---|---|---|---|---|",
    ]
    for name, facts in rows:
        cells = (f"{facts[column]:,.0f}" for column in ("peak", "backbone", "exported", "checkpoint"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
