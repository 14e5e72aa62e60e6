"""Time one stage through `rlhf fit`, with the flags and the output format of a peer's script.

    python experiments/benchmarks/stage.py {sft,reward,dpo,grpo,ppo} --model DIR --data ROWS.jsonl [--lora] ...

Runs the users' command with its defaults, except for the settings that the flags set, and prints ``OURS {json}``:
seconds of each optimizer step (on-policy: of each rollout with its updates), cumulative tokens, losses, and peak
resident memory. Tokens are counted without padding, with each prompt once per row; on-policy stages count sampled
tokens.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from folders import written
from lightning.pytorch import Callback, LightningModule, Trainer

STAGES = {
    "sft": ("SFTModule", "SFTDataModule"),
    "reward": ("RewardModule", "PreferenceDataModule"),
    "dpo": ("DPOModule", "PreferenceDataModule"),
    "grpo": ("GRPOModule", "PromptDataModule"),
    "ppo": ("PPOModule", "PromptDataModule"),
}
LONGEST_PPO_PROMPT = 96
"""Maximum prompt tokens; the peer's script drops longer prompts."""


class StepTimes(Callback):
    """Records seconds, tokens and loss of each training step.

    Args:
        out: JSON file to write when training ends.
    """

    def __init__(self, out: str) -> None:
        self.out = Path(out)
        self.record: dict[str, list[float]] = {"seconds": [], "tokens": [], "loss": [], "score": []}
        self.begun = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock. Reading the first batch is part of the first step."""
        self.begun = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the time, the tokens as a user counts them, and the logged metrics."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.record["seconds"].append(round(now - self.begun, 3))
        seen = sum(sum(part.sequences.lengths) for part in batch.micro_batches if hasattr(part, "sequences"))
        if not seen:  # a rollout: its completions were sampled within the step
            seen = int(pl_module.tokens) - int(self.record["tokens"][-1] if self.record["tokens"] else 0)
        self.record["tokens"].append(seen + (self.record["tokens"][-1] if self.record["tokens"] else 0))
        metrics = trainer.callback_metrics
        self.record["loss"].append(float(metrics["train/loss"]))
        if "rollout/score" in metrics:
            self.record["score"].append(float(metrics["rollout/score"]))
        self.begun = time.perf_counter()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        self.out.write_text(json.dumps(self.record))


def distinct_letters(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    """Score a completion by its number of distinct characters, the peer's toy score."""
    return [float(len(set(text))) for text in completions]


def rows_of(args: argparse.Namespace, scratch: Path) -> Path:
    """Return as many rows as the steps need, in the format of the stage."""
    with args.data.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in islice(lines, args.rows)]
    if args.stage == "sft" and "chosen" in rows[0]:
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    if args.stage in ("grpo", "ppo"):
        rows = [{"prompt": row["prompt"]} for row in rows]
    if args.stage == "ppo":
        from rlhf_lightning.tokenization import encode_prompt, load_tokenizer

        tokenizer = load_tokenizer(str(args.model))
        rows = [row for row in rows if len(encode_prompt(tokenizer, row["prompt"])) <= LONGEST_PPO_PROMPT]
    file = scratch / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def reward_folder(args: argparse.Namespace, scratch: Path) -> Path:
    """Return the folder of PPO's reward model, from which a separate critic also starts. With LoRA it is an adapter on
    the shared backbone.
    """
    if args.reward is not None:
        return args.reward.resolve()
    kind = "reward_adapter" if args.lora else "reward"
    return written(kind, scratch / "reward", args.model, args.quantization if args.lora else None)


def settings(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Return the flags of `rlhf fit`: the peer's settings if both sides have the setting, our defaults otherwise."""
    chosen: dict[str, Any] = {
        "model.init_from": args.model,
        "model.learning_rate": args.lr,
        "model.lr_schedule": "linear",
        "model.warmup": 0,
        "model.max_grad_norm": 1.0,
        "model.adam_eps": 1e-8,
        "data.source": rows_of(args, scratch),
        "data.batch_size": args.batch,
        "data.shuffle": "false",
        "runs_folder": scratch / "runs",
        "export.enabled": "false",
        "samples.prompts": 0,
        "trainer.enable_checkpointing": "false",
        "trainer.accelerator": "cpu",
        "trainer.callbacks": json.dumps(
            [{"class_path": "stage.StepTimes", "init_args": {"out": str(scratch / "record.json")}}]
        ),
    }
    if args.lora:
        chosen |= {"model.lora.r": 16, "model.lora.alpha": 32}
    if args.quantization:
        chosen["model.quantization"] = args.quantization
    if args.stage in ("grpo", "ppo"):
        chosen |= {
            "data.rollouts": args.steps,
            "data.max_prompt_length": args.max_length,
            "model.max_new_tokens": args.completion,
            "model.kl_coef": 0.05,
            "model.scorer": "stage.distinct_letters",
        }
    else:
        chosen |= {"data.max_length": args.max_length, "trainer.max_steps": args.steps}
        chosen |= {"trainer.max_epochs": args.epochs if args.stage == "dpo" else 1}
    if args.max_tokens:
        chosen["data.max_tokens"] = args.max_tokens
    if args.stage == "grpo":
        chosen["data.samples_per_prompt"] = args.group
    if args.stage == "ppo":
        chosen |= {
            "model.ppo_epochs": args.epochs,
            "model.critic": args.critic,
            "model.scorer": reward_folder(args, scratch),
            "model.missing_eos_score": "null",
        }
    if args.no_sharing:
        chosen["model.pack_rows"] = "false"
    if args.stage == "dpo":
        chosen["model.cache_reference"] = "true"
    return chosen | dict(further.split("=", 1) for further in args.set)


def main() -> None:
    """Run the stage and print its line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=4, help="rows a step; completions for grpo; episodes for ppo")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--completion", type=int, default=48, help="new tokens for grpo and ppo")
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=4, help="passes over a rollout (ppo) or over the rows (dpo)")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--critic", default="separate", help="PPO's: separate, shared, adapter")
    parser.add_argument("--max-tokens", type=int, default=None, help="cells of a micro-batch (default: the whole step)")
    parser.add_argument("--no-sharing", action="store_true", help="forward a prompt again for each completion")
    parser.add_argument("--reward", type=Path, default=None, help="PPO's reward model (default: an untrained one)")
    parser.add_argument("--quantization", default=None, help="of a LoRA's backbone: nf4, int8")
    parser.add_argument("--set", nargs="*", default=[], metavar="FLAG=VALUE", help="further flags of `rlhf fit`")
    args = parser.parse_args()
    args.model, args.data = args.model.resolve(), args.data.resolve()

    from rlhf_lightning.commands import train

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        os.environ["RLHF_CACHE"] = str(scratch / "cache")  # an empty cache, as in a first run
        module, datamodule = STAGES[args.stage]
        flags = [part for name, value in settings(args, scratch).items() for part in (f"--{name}", str(value))]
        train.run(["fit", "--model", module, "--data", datamodule, *flags])
        record = json.loads((scratch / "record.json").read_text())
    warm = record["seconds"][1:]
    tokens = record["tokens"]
    line = {
        "stage": args.stage,
        "lora": args.lora,
        "batch": args.batch,
        "seconds": record["seconds"],
        "seconds_warm": round(sum(warm), 3),
        "tokens": tokens,
        "tokens_per_second": round((tokens[-1] - tokens[0]) / sum(warm), 1) if warm else None,
        "loss": record["loss"],
        "score": record["score"],
        "peak_rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 3),
    }
    if torch.cuda.is_available():
        line["peak_gpu_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
    print("OURS " + json.dumps(line))


if __name__ == "__main__":
    main()
