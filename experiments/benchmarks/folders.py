"""Write the model folders that a benchmark starts from, each in a separate process.

    python experiments/benchmarks/folders.py {scored,reward,reward_adapter,small} --out DIR [--model DIR] ...

``scored``: the model with a fresh score head and a pad token that ends no completion, as both sides of a comparison
load it. ``reward``: the same model as exported by our reward stage; PPO uses it as the reward model and as the critic's
initial weights. ``reward_adapter``: the same as an adapter on the model's own backbone. ``small``: a language model of
about a million random parameters with the assistant world's vocabulary, and ``prompts.jsonl`` next to its weights.

Separate processes are needed because peak resident memory never falls: a model loaded during preparation would be
counted as memory of the measured stage.
"""

import argparse
import json
import os
import subprocess
import sys
from itertools import cycle, islice
from pathlib import Path

HERE = Path(__file__).resolve().parent
SMALL = {"hidden_size": 128, "layers": 4, "heads": 4, "intermediate_size": 448}
SMALL_PROMPTS = 1024


def scored(out: Path, model: Path, **_: object) -> None:
    """Write the model with a fresh score head and a pad token that ends no completion."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from rlhf_lightning.tokenization import load_tokenizer

    tokenizer = load_tokenizer(model)
    torch.manual_seed(0)
    with_head = AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=1, dtype=torch.float32, pad_token_id=tokenizer.pad_token_id
    )
    with_head.save_pretrained(out)
    tokenizer.save_pretrained(out)


def reward(out: Path, model: Path, adapter: bool = False, quantization: str | None = None) -> None:
    """Write an untrained reward model: all weights, or an adapter on the model's backbone that changes nothing yet."""
    from rlhf_lightning.models.export import export_reward_model
    from rlhf_lightning.models.loading import LoadSettings, load_reward_hf_model
    from rlhf_lightning.models.lora import LoraSettings, add_lora
    from rlhf_lightning.models.scalar_head import ScalarModel
    from rlhf_lightning.tokenization import load_tokenizer

    tokenizer = load_tokenizer(str(model))
    settings = LoadSettings(quantization=quantization)  # type: ignore[arg-type]
    with_head = load_reward_hf_model(str(model), settings, pad_token_id=tokenizer.pad_token_id)
    if adapter:
        with_head = add_lora(with_head, LoraSettings(r=16, alpha=32), "SEQ_CLS")
    export_reward_model(ScalarModel(with_head), tokenizer, out, str(model))


def small(out: Path, **_: object) -> None:
    """Write the small language model with random weights, its tokenizer, and prompts."""
    import torch
    from transformers import AutoModelForCausalLM

    from rlhf_lightning.worlds._assistant_text import make_config, make_tokenizer
    from rlhf_lightning.worlds.assistant import AssistantWorld

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(make_config(**SMALL)).save_pretrained(out)
    make_tokenizer().save_pretrained(out)
    prompts = islice(cycle(AssistantWorld().prompts()), SMALL_PROMPTS)
    rows = ({"prompt": [{"role": "user", "content": prompt}]} for prompt in prompts)
    (out / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


WRITERS = {
    "scored": scored,
    "reward": reward,
    "reward_adapter": lambda out, **options: reward(out, adapter=True, **options),
    "small": small,
}


def written(kind: str, out: Path, model: Path | None = None, quantization: str | None = None) -> Path:
    """Return ``out`` after a separate process has written it; an existing folder is reused.

    Raises:
        SystemExit: the process failed; the message has the end of its output.
    """
    if any(out.glob("*.safetensors")):
        return out
    command = [sys.executable, str(Path(__file__).resolve()), kind, "--out", str(out)]
    command += [] if model is None else ["--model", str(model)]
    command += [] if quantization is None else ["--quantization", quantization]
    path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"the folder {kind} could not be written:\n{done.stderr[-2000:]}")
    return out


def main() -> None:
    """Write one folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=list(WRITERS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=None, help="model that the folder is made from")
    parser.add_argument("--quantization", default=None, help="of a reward adapter's backbone")
    args = parser.parse_args()
    if args.kind != "small" and args.model is None:
        parser.error(f"{args.kind} is made from a model: name it by --model")
    WRITERS[args.kind](args.out, model=args.model, quantization=args.quantization)


if __name__ == "__main__":
    main()
