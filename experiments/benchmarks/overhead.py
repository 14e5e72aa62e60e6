"""Measure the overhead of `rlhf fit` over plain optimizer steps: Lightning's loop, logging and data loading.

    python experiments/benchmarks/overhead.py [--steps 50] [--turns 5]

A model of about a million parameters takes SFT steps on the embedded world's demonstrations. The command is timed from
outside as the difference of two runs of different length, which removes the start-up time. The bare loop runs over the
same prepared batches: forward, loss, backward, clip, AdamW. Both alternate; medians are reported.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from folders import written

BATCH, WARM = 16, 10


def demonstrations(folder: Path, count: int) -> Path:
    """Write demonstrations of the embedded world."""
    from rlhf_lightning.worlds.assistant import AssistantWorld

    world, file = AssistantWorld(), folder / "rows.jsonl"
    with file.open("w", encoding="utf-8") as lines:
        for row in world.demonstrations(count):
            lines.write(json.dumps(row) + "\n")
    return file


def by_command(model: Path, rows: Path, folder: Path, steps: int) -> float:
    """Return the seconds of one `rlhf fit` run."""
    from rlhf_lightning.commands import train

    began = time.perf_counter()
    train.run([
        "fit", "--model", "SFTModule", "--data", "SFTDataModule", "--model.init_from", str(model),
        "--data.source", str(rows), "--data.batch_size", str(BATCH), "--trainer.max_steps", str(steps),
        "--trainer.accelerator", "cpu", "--runs_folder", str(folder / "runs"),
    ])  # fmt: skip
    return time.perf_counter() - began


def bare(model: Path, rows: Path, steps: int) -> float:
    """Return the seconds of the same number of steps in a bare loop."""
    from rlhf_lightning.data import SFTDataModule
    from rlhf_lightning.models.layout import lay_out
    from rlhf_lightning.models.roles import load_policy
    from rlhf_lightning.tokenization import load_tokenizer

    data = SFTDataModule(str(rows), batch_size=BATCH)
    data.tokenizer = load_tokenizer(str(model))
    data.prepare_data()
    data.setup("fit")
    policy = load_policy(str(model)).train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-5, fused=True)
    batches = [step for step, _ in zip(data.train_dataloader(), range(WARM + steps), strict=False)]
    laid_out = [([lay_out(part.sequences, True) for part in step.micro_batches], step.tokens) for step in batches]
    began = 0.0
    for index, (layouts, tokens) in enumerate(laid_out):
        if index == WARM:
            began = time.perf_counter()
        optimizer.zero_grad()
        for layout in layouts:
            logprobs = policy(layout).logprobs
            (-torch.where(layout.completion_mask, logprobs, 0.0).sum() / tokens).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
    return time.perf_counter() - began


def main() -> None:
    """Time both and print the overhead of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, rows = written("small", folder / "small"), demonstrations(folder, (WARM + args.steps) * BATCH)
        os.environ["RLHF_CACHE"] = str(folder / "cache")
        by_command(model, rows, folder, WARM)
        found = []
        for _ in range(args.turns):
            short, long = (by_command(model, rows, folder, steps) for steps in (WARM, WARM + args.steps))
            found.append((long - short, bare(model, rows, args.steps)))
    command, plain = (median(part) for part in zip(*found, strict=True))
    line = {
        "steps": args.steps,
        "seconds_command": [round(a, 2) for a, _ in found],
        "seconds_bare": [round(b, 2) for _, b in found],
        "share_lost": round(1 - plain / command, 3),
        "threads": torch.get_num_threads(),
    }
    print("OVERHEAD " + json.dumps(line))


if __name__ == "__main__":
    sys.exit(main())
