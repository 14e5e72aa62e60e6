"""Compare the estimates of `rlhf plan` with measured memory, and show its estimates for models too large for this
machine.

    python experiments/benchmarks/plan.py --model DIR --data PAIRS.jsonl [--measured LINES] --markdown plan.md

Writes plan.md. Runs stage.py twice for each case, with the default allocator and with an allocator without
fragmentation: two steps of 4 rows (PPO: two rollouts of 8 completions of 48 tokens, one epoch) in fp32 on the CPU.
`rlhf plan` gets the same command line, with the row lengths of the step that has the most cells. ``--measured`` reads
stage.py's lines from a file instead. Each line starts with the name of its case, followed by ", no holes" for the
second allocator.
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import stage
from folders import written

from rlhf_lightning.evaluation.report import markdown_table
from rlhf_lightning.planning import plan

HERE = Path(__file__).resolve().parent
CASES = {
    "SFT": ["sft", "--batch", "4"],
    "SFT, LoRA": ["sft", "--batch", "4", "--lora"],
    "reward model": ["reward", "--batch", "4"],
    "DPO": ["dpo", "--batch", "4", "--epochs", "1"],
    "DPO, LoRA": ["dpo", "--batch", "4", "--epochs", "1", "--lora"],
    "PPO, separate critic": ["ppo", "--batch", "8", "--epochs", "1"],
    "PPO, LoRA, shared critic": ["ppo", "--batch", "8", "--epochs", "1", "--lora", "--critic", "shared"],
}
STEPS, ROWS, LONGEST, NEW = 2, 64, 512, 48

FSDP_64 = ["--trainer.num_nodes", "8", "--trainer.strategy.data_parallel_size", "64"]
MACHINES = {
    "8 B, QLoRA, 1 GPU": ["Llama-3.1-8B", "8", "--config", "recipe:hardware/qlora_single_gpu"],
    "8 B, every weight, 8 GPUs": ["Llama-3.1-8B", "64", "--config", "recipe:hardware/fsdp"],
    "70 B, every weight, 64 GPUs": ["Llama-3.1-70B", "64", "--config", "recipe:hardware/multi_node", *FSDP_64],
}
STAGES = {
    "SFT": ["--model", "SFTModule", "--data", "SFTDataModule"],
    "reward model": ["--model", "RewardModule", "--data", "PreferenceDataModule"],
    "DPO": ["--model", "DPOModule", "--data", "PreferenceDataModule"],
    "PPO": ["--model", "PPOModule", "--data", "PromptDataModule", "--model.max_new_tokens", "1024"],
}


class Lengths(NamedTuple):
    """The largest of the measured steps, as rows of equal length."""

    prompt: int
    completion: int


def planned(flags: list[str], folder: Path) -> dict[str, Any]:
    """Return the estimates of `rlhf plan`."""
    file = folder / "plan.json"
    with contextlib.redirect_stdout(io.StringIO()):
        plan.main([*flags, "--json", str(file)])
    return json.loads(file.read_text())


def lengths(name: str, model: Path, data: Path, folder: Path) -> Lengths:
    """Return the cells and supervised tokens of the largest step, spread evenly over its rows, so that no row is
    padded.
    """
    from rlhf_lightning.data import PreferenceDataModule, PromptDataModule, SFTDataModule
    from rlhf_lightning.tokenization import load_tokenizer

    kinds = {"sft": (SFTDataModule, 4), "ppo": (PromptDataModule, 8)}
    kind, size = kinds.get(name, (PreferenceDataModule, 4))
    rows = stage.rows_of(argparse.Namespace(stage=name, data=data, rows=ROWS, model=model), folder)
    module = kind(str(rows), batch_size=size, max_length=LONGEST, shuffle=False, cache_dir=str(folder / "cache"))
    module.tokenizer = load_tokenizer(str(model))
    module.prepare_data()
    module.setup("validate")
    found = []
    for step in range(STEPS):
        prompts = [len(module.store.prompt(row)) for row in range(step * size, (step + 1) * size)]
        completions = [module.store.completions(row) for row in range(step * size, (step + 1) * size)]
        widths = [p + sum(len(ids) for ids, *_ in many) for p, many in zip(prompts, completions, strict=True)]
        supervised = sum(int(mask.sum()) for many in completions for _, mask, _ in many)
        each = max(len(completions[0]), 1)
        completion = -(-supervised // (size * each)) if supervised else NEW
        found.append(Lengths(-(-sum(widths) // size) - (each * completion if supervised else 0), completion))
    return max(found, key=sum)


def run_flags(case: list[str], model: Path, folder: Path) -> list[str]:
    """Return the flags of `rlhf plan` for a case of stage.py. With LoRA the reward model is an adapter too."""
    name, options = case[0], case[1:]
    module, datamodule = stage.STAGES[name]
    size = options[options.index("--batch") + 1]
    chosen = ["--model", module, "--data", datamodule, "--model.init_from", str(model), "--data.batch_size", size]
    chosen += ["--data.max_length", str(LONGEST), "--trainer.accelerator", "cpu"]
    if "--lora" in options:
        chosen += ["--model.lora.r", "16"]
    if name == "ppo":
        critic = options[options.index("--critic") + 1] if "--critic" in options else "separate"
        scorer = written("reward_adapter", folder / "reward", model) if "--lora" in options else model
        chosen += ["--model.scorer", str(scorer), "--model.critic", critic, "--model.max_new_tokens", str(NEW)]
    return chosen


def measured_lines(args: argparse.Namespace) -> dict[str, tuple[float, float | None]]:
    """Return the peak resident memory of each case, GB, with the default allocator and with one without
    fragmentation.
    """
    if args.measured is not None:
        lines = (line.partition("OURS ") for line in args.measured.read_text().splitlines() if "OURS " in line)
        peaks = {name.strip(): json.loads(line)["peak_rss_gb"] for name, _, line in lines}
        return {name: (peaks[name], peaks.get(f"{name}, no holes")) for name in CASES}
    further = ["--model", str(args.model), "--data", str(args.data), "--max-length", str(LONGEST)]
    further += ["--steps", str(STEPS), "--rows", str(ROWS), "--completion", str(NEW)]

    def peak(case: list[str], environment: dict[str, str]) -> float:
        command = [sys.executable, str(HERE / "stage.py"), *case, *further]
        shown = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment})
        line = next(line for line in shown.stdout.splitlines() if line.startswith("OURS "))
        return json.loads(line.removeprefix("OURS "))["peak_rss_gb"]

    return {name: (peak(case, {}), peak(case, NO_HOLES)) for name, case in CASES.items()}


NO_HOLES = {"MALLOC_MMAP_THRESHOLD_": "131072"}


def compared(args: argparse.Namespace, folder: Path) -> str:
    """Return the table of measured and estimated peaks."""
    rows, widest = [], {}
    for name, (peak, tight) in measured_lines(args).items():
        case = CASES[name]
        if case[0] not in widest:
            widest[case[0]] = lengths(case[0], args.model, args.data, folder)
        shape = widest[case[0]]
        flags = ["--plan.prompt_length", str(shape.prompt), "--plan.completion_length", str(shape.completion)]
        found = planned([*run_flags(case, args.model, folder), *flags], folder)
        parts = found["bytes"][found["peak_moment"]]
        most = found["peak_bytes"] / 1e9
        without = most - parts["allocator"] / 1e9
        cells = (
            [f"{tight:.2f}", f"{without:.2f}", f"{without / tight - 1:+.0%}"] if tight else ["", f"{without:.2f}", ""]
        )
        gb = [f"{parts.get(part, 0) / 1e9:.2f}" for part in PARTS]
        rows.append([name, f"{peak:.2f}", f"{most:.2f}", f"{most / peak - 1:+.0%}", *cells, *gb])
    header = ["", "measured", "planned", "error", "no holes: measured", "planned", "error", *PARTS]
    return markdown_table(header, rows)


PARTS = ("process", "weights", "optimizer", "gradients", "activations", "logits", "allocator")


def past_this_machine(folder: Path) -> str:
    """Return the table of estimates for runs that were not made."""
    rows = []
    for machine, (architecture, size, *overlay) in MACHINES.items():
        for name, flags in STAGES.items():
            lengths = ["--plan.prompt_length", "1024", "--plan.completion_length", "1024"]
            further = ["--data.batch_size", size, "--data.max_length", "2048", "--memory", "80"]
            critic = ["--model.critic", "shared"] if name == "PPO" and "QLoRA" in machine else []
            further += ["--data.max_tokens", "4096", *critic, "--model.activation_checkpointing", "true"]
            further += ["--plan.config", architecture]
            if name == "PPO":
                further += ["--model.sampling_batch_size", "8"]
            if "QLoRA" not in machine and name in ("DPO", "PPO"):
                further += ["--model.frozen_dtype", "bfloat16"]
            found = planned([*flags, *overlay, *lengths, *further], folder)
            parts = found["bytes"][found["peak_moment"]]
            gb = [f"{parts.get(part, 0) / 1e9:.1f}" for part in LARGE]
            gb.append(f"{sum(size for part, size in parts.items() if part not in LARGE) / 1e9:.1f}")
            work = f"{sum(found['flops_per_step'].values()) / 1e15:.2f}"
            peak = f"{found['peak_bytes'] / 1e9:.1f}"
            fits = "yes" if found["fits"] else "no"
            rows.append([machine, name, peak, found["peak_moment"], fits, *gb, f"{found['tokens_per_step']:,}", work])
    return markdown_table(
        ["", "stage", "peak", "when", "fits 80", *LARGE, "else", "tokens a step", "PFLOP a step"], rows
    )


LARGE = ("weights", "gathered weights", "gradients", "optimizer", "activations", "logits", "KV cache")


def main() -> None:
    """Write plan.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--measured", type=Path, default=None)
    parser.add_argument("--markdown", type=Path, required=True)
    args = parser.parse_args()
    args.model, args.data = args.model.resolve(), args.data.resolve()
    with tempfile.TemporaryDirectory() as folder:
        first, second = compared(args, Path(folder)), past_this_machine(Path(folder))
    args.markdown.write_text(PAGE.format(compared=first, past=second), encoding="utf-8")


PAGE = """# What runs take, planned and measured

    python experiments/benchmarks/plan.py --model SMOLLM2_135M --data PAIRS.jsonl --markdown plan.md

## On the CPU

Peak resident memory in GB of two steps of SmolLM2-135M in fp32 (`stage.py`), 4 rows of real preference data, PPO 8
completions of 48 tokens, against `rlhf plan` with the lengths of the wider step; then what the plan's peak consists of.
Every peak is where the backward pass begins.

{compared}

`process` is an interpreter that has imported the stack. `allocator` is not a tensor but what glibc's heap keeps in
freed pieces that are too small for the next tensor, 0.2 of the activations where every weight trains and 0.3 with an
adapter. These two shares were fitted to the first columns. Nothing was fitted to those under "no holes": there
MALLOC_MMAP_THRESHOLD_=131072 is in the environment of run and plan, which takes the holes away from both.

## Past this machine

GB on the fullest rank at the peak, activations recomputed, prompts and completions of 1,024 tokens, at most 4,096 cells
a micro-batch, 8 (one GPU) or 64 rows a step; frozen models in bf16. QLoRA's PPO has a shared critic; its reward model
is a whole one in bf16. Nothing here was measured on a GPU: blocks that CUDA's allocator rounds up, and NCCL's buffers,
are not in it; 0.6 GB are set aside for a process.

{past}
"""


if __name__ == "__main__":
    main()
