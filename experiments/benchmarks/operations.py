"""Count the operations that PyTorch dispatches per layer, ours and those of plain transformers + peft on the same
shapes.

    python experiments/benchmarks/operations.py [--device cuda] [--only CASE ...] [--out operations.json]

The speed of small models is limited by how fast one CPU thread launches operations. Unlike time, the count is
independent of machine load. The count per layer is the difference between models of three and two layers.
``operations`` counts all calls below autograd; ``kernels`` leaves out views and allocations. With ``--device cuda`` the
profiler counts CUDA kernels instead. `tests/test_benchmarks.py` compares the ratios with operations.json.
"""

import argparse
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from compare import our_versions
from scaling import Point, update
from torch.utils._python_dispatch import TorchDispatchMode

HERE = Path(__file__).resolve().parent
VOCABULARY, LAYERS, RANK = 512, (2, 3), 8
NO_KERNEL = (
    "empty",
    "new_empty",
    "empty_like",
    "detach",
    "lift_fresh",
    "_unsafe_view",
    "_reshape_alias",
    "empty_strided",
)


class Form(NamedTuple):
    """How a model is trained: all weights or an adapter, and in which precision."""

    lora: bool = False
    mixed: bool = False
    quantization: str | None = None


FORMS = {
    "full": Form(),
    "lora": Form(lora=True),
    "lora_mixed": Form(lora=True, mixed=True),
    "qlora": Form(lora=True, quantization="nf4"),
}
ROWS = {"padded": Point(4, (8, 8, 8, 8), 1, VOCABULARY, None), "packed": Point(4, (3, 5, 9, 14), 1, VOCABULARY, None)}
"""Rows of equal length, which are not packed; and rows of different lengths, which plain transformers pads."""
CASES = [f"{form}/{rows}" for form in FORMS for rows in ROWS] + ["decode"]
GOALS = {"full/padded": ("layer", 1.0), "full/packed": ("layer", 1.0), "decode": ("step", 1.0)}
"""Maximum ratio of our kernels to those of plain transformers."""
LORA_GOAL = 1.5
"""Maximum ratio of kernels in a layer with adapters under autocast to kernels in the frozen layer."""


class Counting(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.views: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        self.operations[name] += 1
        aliases = [value.alias_info for value in func._schema.returns]
        if name in NO_KERNEL or any(alias is not None and not alias.is_write for alias in aliases):
            self.views.add(name)
        return func(*args, **(kwargs or {}))

    @property
    def counts(self) -> Counter[str]:
        """Return the number of operations, and the number of those that compute."""
        kernels = sum(count for name, count in self.operations.items() if name not in self.views)
        return Counter(operations=self.operations.total(), kernels=kernels)


class Kernels:
    """Counts CUDA kernels with the profiler."""

    def __enter__(self) -> "Kernels":
        from torch.profiler import ProfilerActivity, profile

        self.profile = profile(activities=[ProfilerActivity.CUDA])
        self.profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.cuda.synchronize()
        self.profile.__exit__(*error)

    @property
    def counts(self) -> Counter[str]:
        """Return the number of kernels, including copies and fills."""
        found = sum(event.count for event in self.profile.key_averages() if event.device_time_total)
        return Counter(operations=found, kernels=found)


def counter(device: str) -> Any:
    """Return the counter for a device."""
    return Kernels() if device == "cuda" else Counting()


# -- models -----------------------------------------------------------------------------------------------------------


def write_model(folder: Path, layers: int) -> str:
    """Write a tiny Llama with random weights and a tokenizer; return the folder."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from rlhf_lightning.worlds._assistant_text import make_tokenizer

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def bare_model(source: str, form: Form, device: str) -> Any:
    """Load a model with transformers, with peft's adapter if the form has one."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    further: dict[str, Any] = {}
    if form.quantization:
        further["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **further)
    if form.lora:
        model = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    return model.to(device).train()


def autocast(form: Form, device: str) -> AbstractContextManager[Any]:
    """Return a bf16 autocast context if the form uses mixed precision."""
    return torch.autocast(device, torch.bfloat16) if form.mixed else nullcontext()


# -- one update -------------------------------------------------------------------------------------------------------


def ours(source: str, form: Form, point: Point, device: str) -> Counter[str]:
    """Count the operations of the third update of an SFT run."""
    from lightning.pytorch import Callback, Trainer
    from torch.utils.data import DataLoader

    from rlhf_lightning.models.lora import LoraSettings
    from rlhf_lightning.modules.sft import SFTModule

    class Count(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            self.counting = counter(device)
            self.counting.__enter__()

        def on_train_batch_end(self, *args: Any) -> None:
            self.counting.__exit__(None, None, None)

    count = Count()
    lora = LoraSettings(r=RANK) if form.lora else None
    module = SFTModule(init_from=source, lora=lora, quantization=form.quantization)  # type: ignore[arg-type]
    trainer = Trainer(
        max_steps=3, callbacks=[count], accelerator="gpu" if device == "cuda" else "cpu", devices=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, precision="bf16-mixed" if form.mixed else "32-true",
    )  # fmt: skip
    steps: Any = [update(point)] * 3
    trainer.fit(module, DataLoader(steps, batch_size=None))
    return count.counting.counts


def bare(source: str, form: Form, point: Point, device: str) -> Counter[str]:
    """Count the operations of the third update in a plain loop: forward, loss, backward, clip, AdamW."""
    model, width = bare_model(source, form, device), point.prompt + max(point.completions)
    lengths = torch.tensor([point.prompt + size for size in point.completions])
    mask = torch.arange(width) < lengths.unsqueeze(-1)
    ids = torch.randint(5, VOCABULARY, mask.shape) * mask
    labels = ids.masked_fill(~mask | (torch.arange(width) < point.prompt), -100)
    batch = {"input_ids": ids.to(device), "attention_mask": mask.long().to(device), "labels": labels.to(device)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    for _ in range(3):
        with counter(device) as counting:
            with autocast(form, device):
                loss = model(**batch, use_cache=False).loss
            loss.backward()
            float(torch.nn.utils.clip_grad_norm_(trained, 1.0))
            optimizer.step()
            optimizer.zero_grad()
    return counting.counts


def frozen(source: str, device: str) -> Counter[str]:
    """Count a forward and a backward pass through a frozen model under autocast, up to the gradient of its input."""
    model = bare_model(source, Form(), device).requires_grad_(False)
    states = torch.randn(4, 12, model.config.hidden_size, device=device).requires_grad_()
    for _ in range(2):
        with counter(device) as counting:
            with torch.autocast(device, torch.bfloat16):
                out = model.base_model(inputs_embeds=states, use_cache=False).last_hidden_state
            out.sum().backward()
    return counting.counts


# -- one token --------------------------------------------------------------------------------------------------------

PROMPTS = (5, 7, 7, 9)
SHORT, LONG = 4, 12


def our_decoding(source: str, tokens: int, device: str) -> Counter[str]:
    """Count the operations of sampling a few completions of equal length with `SlotEngine`."""
    from rlhf_lightning.models.roles import load_policy
    from rlhf_lightning.sampling.engines import SamplingSettings
    from rlhf_lightning.sampling.slot_engine import SlotEngine

    model = load_policy(source).to(device)
    prompts = [torch.arange(6, 6 + count) for count in PROMPTS]
    settings, episodes = SamplingSettings(tokens), torch.arange(len(prompts))
    for _ in range(2):  # the first run checks how the model decodes
        with counter(device) as counting:
            SlotEngine().sample(model, prompts, episodes, settings, 0, [])
    return counting.counts


def bare_decoding(source: str, tokens: int, device: str) -> Counter[str]:
    """Count the operations of ``generate`` with left-padded prompts, plus log-probabilities."""
    model, width = bare_model(source, Form(), device).eval(), max(PROMPTS)
    mask = torch.arange(width) >= width - torch.tensor(PROMPTS).unsqueeze(-1)
    ids = torch.randint(5, VOCABULARY, mask.shape) * mask
    with counter(device) as counting:
        drawn = model.generate(
            input_ids=ids.to(device), attention_mask=mask.long().to(device), do_sample=True, top_k=0, top_p=1.0,
            max_new_tokens=tokens, pad_token_id=0, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        model.compute_transition_scores(drawn.sequences, drawn.logits, normalize_logits=True)
    return counting.counts


# -- cases ------------------------------------------------------------------------------------------------------------

Counts = dict[str, dict[str, float]]


def per_layer(count: Callable[[str], Counter[str]], sources: tuple[str, str], unit: str, of: float = 1) -> Counts:
    """Return the counts of a two-layer model (named ``unit``) and of a single layer."""
    small, large = count(sources[0]), count(sources[1])
    layer = {name: (large[name] - small[name]) / of for name in small}
    return {unit: {name: small[name] / of for name in small}, "layer": layer}


def per_token(decoding: Callable[[str, int, str], Counter[str]], device: str) -> Callable[[str], Counter[str]]:
    """Return the counts per token after the first tokens."""

    def count(source: str) -> Counter[str]:
        short, long = decoding(source, SHORT, device), decoding(source, LONG, device)
        return Counter({name: long[name] - short[name] for name in long})

    return count


def measured(case: str, sources: tuple[str, str], device: str = "cpu") -> dict[str, Counts]:
    """Return the counts of both sides of a case."""
    if case == "decode":
        sides, unit, of = (per_token(our_decoding, device), per_token(bare_decoding, device)), "step", LONG - SHORT
    else:
        form, point = FORMS[case.partition("/")[0]], ROWS[case.partition("/")[2]]
        sides, unit, of = tuple(lambda s, f=f: f(s, form, point, device) for f in (ours, bare)), "update", 1
    return {name: per_layer(side, sources, unit, of) for name, side in zip(("ours", "bare"), sides, strict=True)}


def ratios(found: dict[str, Counts]) -> dict[str, float]:
    """Return the ratios of our counts to those of plain transformers, keyed ``UNIT operations`` and
    ``UNIT kernels``.
    """
    return {
        f"{unit} {name}": round(count / found["bare"][unit][name], 3)
        for unit, counts in found["ours"].items()
        for name, count in counts.items()
    }


def written_models(folder: Path) -> tuple[str, str]:
    """Write the models of two and three layers."""
    few, more = (write_model(folder / f"layers_{count}", count) for count in LAYERS)
    return few, more


def main() -> None:
    """Count all cases and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--out", type=Path, default=None, help="default: operations.json next to this script")
    args = parser.parse_args()
    out = args.out or HERE / ("operations.json" if args.device == "cpu" else "operations_cuda.json")
    cases: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        sources = written_models(Path(folder))
        for case in args.only:
            found = measured(case, sources, args.device)
            cases[case] = {**found, "ratio": ratios(found)}
            goal = "{} at most {}".format(*GOALS[case]) if case in GOALS else ""
            print(case, cases[case]["ratio"], goal, flush=True)
        record: dict[str, Any] = {"versions": our_versions(), "cases": cases}
        if "lora_mixed/padded" in cases:
            below = per_layer(lambda source: frozen(source, args.device), sources, "trunk")
            adapted = cases["lora_mixed/padded"]
            record["frozen_mixed"] = below
            record["lora_over_frozen"] = {
                side: round(adapted[side]["layer"]["kernels"] / below["layer"]["kernels"], 3)
                for side in ("ours", "bare")
            }
            print("lora_mixed layer over the frozen layer:", record["lora_over_frozen"], f"at most {LORA_GOAL}")
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
