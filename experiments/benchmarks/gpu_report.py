"""Measure training of models of published sizes on one GPU, most important cells first, and write gpu_report.md.

    python experiments/benchmarks/gpu_report.py [--seconds 540] [--peer-python PEER/bin/python --peer-script SCRIPT]
    python experiments/benchmarks/gpu_report.py --vllm-python VLLM/bin/python     # with vLLM in the rollouts cell
    python experiments/benchmarks/gpu_report.py --device cpu --smoke     # the same cells with a tiny model, for a test

No network is needed: weights are random. Each cell trains for a few steps on rows of equal length: by our command, by a
plain PyTorch + peft loop (SFT only), and by the peer's script if one is given, in turn. The rollouts cell samples
completions of equal length with each engine of this process, and with vLLM if it is installed here or its interpreter
is given. A cell takes at most ``--cell-seconds``; no cell starts
after ``--seconds``, and the next call continues with the first missing cell. Stored runs are valid while code, command
and versions stay the same (see compare.py). The page names the missing cells; ``--seconds 0`` only writes it.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Import no large packages here: a child process inherits the peak resident memory of its parent.
from cases import ALLOCATED, HALF, LIMIT, RESIDENT, Case, Goal, Suite
from compare import HERE, Bench, code_hash

SIZES = {
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
             "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True},
    "4B": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True},
    "8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False},
}  # fmt: skip
"""Dimensions of SmolLM2-135M and of the Qwen3 models. The latter are built as Llama models, without Qwen's
normalisation of queries and keys.
"""
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True}  # fmt: skip
CELLS = [
    ("sft_lora", "0.6B", 4096), ("dpo_lora", "0.6B", 4096), ("rollouts", "0.6B", 256), ("grpo_full", "0.6B", 512),
    ("ppo_lora", "0.6B", 512), ("sft_full", "0.6B", 4096), ("sft_full", "135M", 512), ("sft_lora", "135M", 512),
    ("dpo_lora", "135M", 512), ("reward_full", "0.6B", 512), ("sft_lora", "4B", 4096), ("sft_lora", "8B", 4096),
    ("sft_qlora", "8B", 4096), ("dpo_lora", "8B", 4096), ("sft_lora", "0.6B", 16384), ("sft_lora", "8B", 16384),
]  # fmt: skip
"""Stage and training mode, model size, tokens per row; most important first."""
BATCH_TOKENS = 65536
STEPS, WARM = 6, slice(2, None)
GRAPHS = json.dumps({"class_path": "SlotEngine", "init_args": {"cuda_graphs": True}})
ENGINES = {"slots": "SlotEngine", "slots with graphs": GRAPHS, "generate": "GenerateEngine",
           "continuous batching": "ContinuousBatchingEngine"}  # fmt: skip
"""Sides of the rollouts cell, and their engines."""
VLLM, VLLM_SCRIPT = "vLLM", HERE / "vllm_rollouts.py"


def cells(device: str, smoke: bool, has_peer: bool = False, has_vllm: bool = False) -> dict[str, Case]:
    """Return the cells as cases in the format of compare.py."""
    found = {}
    for name, size, length in CELLS:
        stage, _, kind = name.partition("_")
        if stage == "rollouts":
            found[f"{name}, {size}, {length} tokens"] = rollouts_cell(size, length, smoke, has_vllm)
            continue
        rolls, length_now = stage in ("grpo", "ppo"), 48 if smoke else length
        batch = 4 if smoke else (64 if rolls else max(BATCH_TOKENS // length, 2))
        steps = 3 if smoke else STEPS
        shared = ["--batch", str(batch), "--max-length", str(length_now), "--rows", str(batch * steps)]
        shared += ["--steps", str(steps), *(["--lora"] if kind.endswith("lora") else [])]
        own = ["--max-tokens", str(256 if smoke else 32768)]
        if rolls:
            shared += ["--completion", "8" if smoke else "128"]
            own += ["--group", "4"] if stage == "grpo" else ["--critic", "shared", "--epochs", "2"]
        settings = [] if device == "cpu" else ["trainer.accelerator=gpu", "trainer.precision=bf16-mixed"]
        settings += ["model.activation_checkpointing=true"] if length > 4096 or size in ("4B", "8B") else []
        quantized = ["--quantization", "nf4"] if kind == "qlora" else []
        own += [*quantized, *(["--set", *settings] if settings else [])]
        limit = (("--lora",) if "--lora" in shared else ()) if stage == "sft" and not quantized else None
        goal = Goal("", steps=slice(1, None) if smoke else WARM, share=None if limit is None else 0.0)
        found[f"{name}, {size}, {length} tokens"] = Case(
            stage, (goal,), tuple(shared), {"ours": tuple(own)}, limit, f"{'tiny' if smoke else size}:{length_now}",
            None if rolls else HALF, has_peer,
        )  # fmt: skip
    return found


def rollouts_cell(size: str, length: int, smoke: bool, has_vllm: bool) -> Case:
    """Return the cell that samples ``length`` tokens for each prompt with every engine, and with vLLM."""
    model, steps = ("tiny:48", 3) if smoke else (f"{size}:512", STEPS)
    flags = ("--batch", "4" if smoke else "64", "--length", "8" if smoke else str(length), "--steps", str(steps))
    sides = {side: ("--engine", engine) for side, engine in ENGINES.items()} | ({VLLM: ()} if has_vllm else {})
    goals = tuple(Goal(side, side, steps=slice(1, None) if smoke else WARM) for side in sides)
    return Case("rollouts", goals, flags, sides, model=model, has_peer=False)


class Report(Bench):
    """A comparison that writes models and rows when a cell needs them.

    Args:
        args: parsed arguments of the command line.
        cases: the cells.
    """

    def __init__(self, args: argparse.Namespace, cases: dict[str, Case]) -> None:
        super().__init__(args)
        self.suite = Suite(
            cases, RESIDENT if args.device == "cpu" else ALLOCATED, "gpu_report_bounds.md", "gpu_report.md"
        )
        self.cases = cases

    def model_of(self, case: Case, side: str) -> Path:
        """Return the folder with the cell's model, and rows of the cell's length."""
        size, _, length = case.model.partition(":")
        folder = self.folder / "folders" / size
        if not (folder / f"rows_{length}.jsonl").exists():
            script = [sys.executable, str(HERE / "gpu_report.py"), "--write", str(folder), "--size", size]
            output, failure = self.output_of([*script, "--length", length])
            if failure:
                raise SystemExit(f"{folder} could not be written: {failure}\n{output[-2000:]}")
        return folder

    def data_of(self, case: Case) -> Path:
        """Return the file of rows of the cell's length."""
        return self.model_of(case, "") / f"rows_{case.model.partition(':')[2]}.jsonl"

    def command(self, name: str, side: str) -> list[str]:
        """Return the command line of a side; the plain loop and the sampling of rollouts are in this file."""
        case = self.cases[name]
        script = [sys.executable, str(HERE / "gpu_report.py"), "--device", self.args.device]
        if side == VLLM:
            dtype = ["--dtype", "bfloat16" if self.args.device == "gpu" else "float32"]
            return [
                str(self.args.vllm_python),
                str(VLLM_SCRIPT),
                "--model",
                str(self.model_of(case, side)),
                *case.flags,
                *dtype,
            ]
        if case.stage == "rollouts":
            return [*script, "--sample", str(self.model_of(case, side)), *case.flags, *case.ours[side]]
        if side != LIMIT:
            return super().command(name, side)
        kept = dict(zip(case.flags, case.flags[1:], strict=False))
        loop = [*script, "--bare", str(self.model_of(case, side))]
        figures = ["--steps", kept["--steps"], "--batch", kept["--batch"], "--length", kept["--max-length"]]
        return [*loop, *figures, *(["--lora"] if "--lora" in case.flags else [])]

    def identity(self, name: str, side: str, command: list[str]) -> str:
        """Return what a run's figures depend on; vLLM's run depends on its script and its release alone."""
        if side != VLLM:
            return super().identity(name, side, command)
        known = [
            command[1:],
            self.args.threads,
            code_hash([VLLM_SCRIPT]),
            self.versions(self.args.vllm_python, ["vllm"]),
        ]
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]

    def pythons(self) -> Iterator[Path]:
        """Yield the interpreter of the peer's environment, if one is given."""
        if self.args.peer_script is not None:
            yield self.args.peer_python

    def report(self) -> bool:
        """Run the missing cells within the time limit; return whether all have run."""
        self.write()
        began = time.monotonic()
        for name, case in self.cases.items():
            for side in case.sides:
                if time.monotonic() - began > self.args.seconds:
                    return False
                if not self.kept(name).get(side):
                    self.run_once(name, side)
                    self.write()
        return True


# -- run in separate processes ----------------------------------------------------------------------------------------


def write_folder(folder: Path, size: str, length: int) -> None:
    """Write a bf16 model with random weights, and rows of ``length`` tokens: prompt, chosen and rejected."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from rlhf_lightning.worlds._assistant_text import make_tokenizer

    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    if not any(folder.glob("*.safetensors")):
        torch.manual_seed(0)
        sizes = TINY if size == "tiny" else SIZES[size]
        config = LlamaConfig(max_position_embeddings=32768, eos_token_id=tokenizer.eos_token_id, **sizes)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    known = set(tokenizer.all_special_tokens)
    words = [word.strip("Ġ▁ ") for word in tokenizer.get_vocab() if word not in known]
    words = sorted(word for word in words if word.isalpha())
    draws = torch.Generator().manual_seed(0)
    with (folder / f"rows_{length}.jsonl").open("w", encoding="utf-8") as lines:
        for _ in range(512 if length <= 512 else 96):
            picks = torch.randint(len(words), (2 * length,), generator=draws).tolist()
            text = [words[pick] for pick in picks]
            short = max(min(length // 4, 64 if length <= 512 else length), 4)  # PPO's prompts have at most 96 tokens
            row = {"prompt": " ".join(text[:short])}
            row |= {"chosen": " ".join(text[short:length]), "rejected": " ".join(text[length + short :])}
            lines.write(json.dumps(row) + "\n")


def bare(args: argparse.Namespace) -> None:
    """Train with a plain loop on random tokens without padding, and print a line of figures."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    device = "cuda" if args.device == "gpu" else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(args.bare, dtype=torch.float32).to(device).train()
    if args.lora:
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, seconds = torch.optim.AdamW(trained, lr=1e-5, fused=True), []
    passes = 1 if args.batch * args.length <= 32768 else args.batch * args.length // 32768
    for _ in range(args.steps):
        began = time.perf_counter()
        for _ in range(passes):
            ids = torch.randint(5, model.config.vocab_size, (max(args.batch // passes, 1), args.length), device=device)
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss / passes
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(round(time.perf_counter() - began, 3))
    tokens = [args.batch * args.length * (step + 1) for step in range(args.steps)]
    line = {"seconds": seconds, "tokens": tokens, "loss": [float(loss.detach())] * args.steps, "shared_prompt": False}
    print("LIMIT " + json.dumps(line | peaks()))


def sample(args: argparse.Namespace) -> None:
    """Sample completions of equal length with one engine, a few times, and print a line of figures."""
    import torch

    from rlhf_lightning.models.roles import load_policy
    from rlhf_lightning.sampling.engines import SamplingSettings
    from rlhf_lightning.sampling.slot_engine import load_engine
    from rlhf_lightning.tokenization import end_token_ids, load_tokenizer

    device = "cuda" if args.device == "gpu" else "cpu"
    model = load_policy(str(args.sample)).to(device).eval()
    engine = load_engine(json.loads(args.engine) if args.engine.startswith("{") else args.engine)
    ends, draws = end_token_ids(load_tokenizer(str(args.sample))), torch.Generator().manual_seed(0)
    prompts = [torch.randint(5, 500, (16 + row,), generator=draws) for row in range(args.batch)]
    seconds, tokens = [], [0]
    for step in range(args.steps):
        began, episodes = time.perf_counter(), torch.arange(args.batch) + step * args.batch
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            drawn = engine.sample(model, prompts, episodes, SamplingSettings(args.length), 0, ends)
        seconds.append(round(time.perf_counter() - began, 3))
        tokens.append(tokens[-1] + sum(map(len, drawn.ids)))
    line = {"seconds": seconds, "tokens": tokens[1:], "loss": [], "batch": args.batch}
    print("OURS " + json.dumps(line | peaks()))


def peaks() -> dict[str, float]:
    """Return the peak memory of this process, and of the GPU if there is one."""
    import resource

    import torch

    found = {"peak_rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 3)}
    if torch.cuda.is_available():
        found["peak_gpu_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
    return found


def measure(args: argparse.Namespace) -> None:
    """Run the missing cells."""
    args.runs = (args.runs or Path("runs") / ("gpu_report_smoke" if args.smoke else "gpu_report")).absolute()
    args.out = args.out or (args.runs / "gpu_report.md" if args.smoke else HERE / "gpu_report.md")
    args.time_limit, args.repeats, args.ppo_python, args.conversations = args.cell_seconds, 1, None, None
    args.limit_script = HERE / "gpu_report.py"
    if args.vllm_python is None and importlib.util.find_spec("vllm") is not None:
        args.vllm_python = Path(sys.executable)
    wanted = cells(args.device, args.smoke, args.peer_script is not None, args.vllm_python is not None)
    if args.only:
        wanted = {name: case for name, case in wanted.items() if name.startswith(tuple(args.only))}
    done = Report(args, wanted).report()
    print("all cells have run" if done else "time is over: call again for the missing cells, which the page names")


def main() -> None:
    """Run the cells, or a part of one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and short rows, to test the report itself")
    parser.add_argument("--seconds", type=float, default=450, help="no cell begins later")
    parser.add_argument("--cell-seconds", type=int, default=90)
    parser.add_argument("--only", nargs="+", default=None, metavar="STAGE", help="cells whose names begin so")
    parser.add_argument("--peer-python", type=Path, default=Path(sys.executable))
    parser.add_argument("--peer-script", type=Path, default=None)
    parser.add_argument("--vllm-python", type=Path, default=None, help="interpreter of an environment with vLLM")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--runs", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=None)
    for hidden in ("--write", "--bare", "--sample"):
        parser.add_argument(hidden, type=Path, default=None, help=argparse.SUPPRESS)
    for name in ("--size", "--engine"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    for number in ("--length", "--batch", "--steps"):
        parser.add_argument(number, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--lora", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write is not None:
        write_folder(args.write, args.size, args.length)
    elif args.bare is not None:
        bare(args)
    elif args.sample is not None:
        sample(args)
    else:
        measure(args)


if __name__ == "__main__":
    main()
