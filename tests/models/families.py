"""Build every decoder family of the installed transformers in small, and compare our code paths with its own forward.

``python tests/models/families.py`` measures all of them and writes docs/families.md; arguments restrict the measurement
to the named families or columns.
"""

import copy
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import PAD, plain_logprobs, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)

from rlhf_lightning.errors import ModelError
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.export import export_policy
from rlhf_lightning.models.layout import packed_layout, padded_layout
from rlhf_lightning.models.loading import LoadSettings, load_reward_hf_model, prepare_for_training
from rlhf_lightning.models.lora import LoraSettings
from rlhf_lightning.models.packing import trees_of
from rlhf_lightning.models.roles import add_critic, load_policy, scalar_model
from rlhf_lightning.models.scalar_head import trunk
from rlhf_lightning.models.self_check import check_weights
from rlhf_lightning.models.small_copy import redraw, small_config
from rlhf_lightning.sampling.engines import SamplingSettings
from rlhf_lightning.sampling.slot_engine import SlotEngine
from rlhf_lightning.types import Sequences

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"
CLOSE = 1e-4
COLUMNS = (
    "padded", "packed", "prompt tree", "sampled alone", "in groups", "in refilled slots", "LoRA gradients",
    "reward head", "shared critic", "exported", "NF4",
)  # fmt: skip
QUICK = ("padded", "packed", "in groups")

_ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
_ALTERNATING = ["sliding_attention", "full_attention"]
COMPLETED: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3], "num_hidden_layers": 4},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(_ALTERNATING, _ROPE), "layer_types": _ALTERNATING * 20},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 1, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        "d_model": 64, "n_heads": 4, "n_layers": 2,
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gemma3n_text": {
        "num_kv_shared_layers": 2, "num_hidden_layers": 4, "layer_types": _ALTERNATING * 2,
        "activation_sparsity_pattern": [0.95, 0.0] * 2, "intermediate_size": 64,
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "nemotron": {"num_key_value_heads": 24},
    "reformer": {
        "is_decoder": True, "attn_layers": ["local", "local"], "num_hidden_layers": 2, "axial_pos_embds": False,
        "max_position_embeddings": 128,
    },
}  # fmt: skip
"""Settings for configs whose defaults are not enough to build a model."""

NOT_SMALL = {
    "blt": "its patcher, encoder and decoder have configs whose widths depend on each other",
    "dots3_note": "its per-layer heads must sum to each other",
    "dots3_note_text": "its per-layer heads must sum to each other",
    "gemma3n": "its vision tower needs timm",
    "gemma4_assistant": "its own defaults are refused by its config",
    "gemma4_unified_assistant": "it reads another model's keys and values",
    "prophetnet": "its own forward fails in transformers 5.23 (a sum with None)",
    "qwen4_exp": "its defaults lack the sizes of its n-gram tables",
    "qwen4_exp_text": "its defaults lack the sizes of its n-gram tables",
    "xmod": "its own forward needs a language that is set by hand",
    "musicgen": "it decodes audio tokens from a text encoder",
    "musicgen_melody": "it decodes audio tokens from a text encoder",
}

MATTER = (
    "llama", "qwen2", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "mistral", "ministral3",
    "mixtral", "gemma", "gemma2", "gemma3", "gemma3_text", "gemma4_text", "phi", "phi3", "gpt_oss", "deepseek_v3",
    "deepseek_v32", "glm4", "glm4_moe", "smollm3", "olmo2", "olmo3", "granite", "granitemoehybrid", "cohere2", "lfm2",
    "falcon_h1", "nemotron_h", "mamba", "mamba2", "bamba", "jamba", "gpt2", "gpt_neox", "stablelm", "falcon", "opt",
)  # fmt: skip
"""The most commonly trained families; the quick test measures these."""


def ids(*lengths: int) -> list[torch.Tensor]:
    draws = torch.Generator().manual_seed(11)
    return [torch.randint(6, 58, (length,), generator=draws) for length in lengths]


PROMPTS = ids(10, 6, 13)
COMPLETIONS = ids(7, 5, 8, 4, 9)
TREE = Sequences(
    tuple(PROMPTS),
    tuple(COMPLETIONS),
    (0, 1, 2, 0, 0),
    tuple(torch.ones(len(c), dtype=torch.bool) for c in COMPLETIONS),
)
ONE_EACH = Sequences(TREE.prompts, TREE.completions[:3], (0, 1, 2), TREE.supervised[:3])


def names() -> list[str]:
    """Every model type for which transformers has a causal language model."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def build(name: str, kind: Any, **changes: Any) -> Any:
    """Return a random small model of a family."""
    config = small_config(AutoConfig.for_model(name, **COMPLETED.get(name, {})), each=2 if name == "zamba" else 1)
    for key, value in changes.items():
        setattr(config, key, value)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = kind.from_config(config).float().eval()
        for module in model.modules():
            for key, weight in module.named_parameters(recurse=False):
                redraw(module, key, weight)
    return model


@torch.no_grad()
def distance(policy: CausalLM, sequences: Sequences, layout: Any) -> float:
    found = policy(layout).logprobs
    return max(
        float(
            (found[row, : len(completion)] - plain_logprobs(own(policy), TREE.prompts[parent], completion)).abs().max()
        )
        for row, (parent, completion) in enumerate(zip(sequences.parents, sequences.completions, strict=True))
    )


def own(policy: CausalLM) -> Any:
    return lambda batch: policy.model(input_ids=batch, use_cache=False)


@torch.no_grad()
def sampled(policy: CausalLM, prompts: list[torch.Tensor], slots: int | None = None) -> float:
    asked = SamplingSettings(max_new_tokens=10, batch_size=slots)
    drawn = SlotEngine().sample(policy, prompts, torch.arange(len(prompts)), asked, 3, [2, 7, 9, 30, 31])
    triples = zip(prompts, drawn.ids, drawn.logprobs, strict=True)
    return max(float((plain_logprobs(own(policy), p, i) - found).abs().max()) for p, i, found in triples)


def trained(policy: CausalLM) -> float:
    """Return 0 if every adapted layer of the text model gets a gradient; image layers and unselected experts are
    exempt.
    """
    policy(padded_layout(TREE)).logprobs.sum().backward()
    weights = [(key, w) for key, w in policy.model.named_parameters() if w.requires_grad and "lora_" in key]
    given = [key for key, w in weights if w.grad is not None and bool(w.grad.any())]
    assert given, "no adapted layer gets a gradient"
    return 0.0


def rewarded(name: str, folder: Path) -> float:
    config = AutoConfig.for_model(name, **COMPLETED.get(name, {}))
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        load_reward_hf_model(str(folder.with_name("whole")), LoadSettings())
    model = build(name, AutoModelForSequenceClassification, num_labels=1, pad_token_id=PAD)
    model.save_pretrained(folder)
    hf = load_reward_hf_model(str(folder), LoadSettings())
    prepare_for_training(hf)
    scalar = scalar_model(hf, LoadSettings()).eval()
    layout = packed_layout(TREE, list(trees_of(TREE))) if scalar.reads_trees else padded_layout(TREE)
    with torch.no_grad():
        whole = [torch.cat([TREE.prompts[p], c]) for p, c in zip(TREE.parents, TREE.completions, strict=True)]
        expected = torch.stack([hf(input_ids=one.unsqueeze(0)).logits[0, 0] for one in whole])
        return float((scalar(layout) - expected).abs().max())


def valued(policy: CausalLM, lora: LoraSettings) -> float:
    """Return the difference of a shared critic's values from its head applied to the hidden states of single
    sequences.
    """
    critic = add_critic(policy, lora)
    torch.nn.init.normal_(critic.score.weight)
    with torch.no_grad():
        values = critic(padded_layout(TREE), per_token=True)
        far = 0.0
        for row, (parent, completion) in enumerate(zip(TREE.parents, TREE.completions, strict=True)):
            whole = torch.cat([TREE.prompts[parent], completion]).unsqueeze(0)
            states = trunk(policy.model)(input_ids=whole, use_cache=False).last_hidden_state[0]
            before = len(TREE.prompts[parent]) - 1
            expected = critic.score(states[before : before + len(completion)]).squeeze(-1)
            far = max(far, float((values[row, : len(completion)] - expected).abs().max()))
    return far


def quantized(folder: Path, lora: LoraSettings) -> float:
    """Return the difference of an adapter on a 4-bit backbone from the model's own forward; check its gradients."""
    policy = load_policy(str(folder), LoadSettings(quantization="nf4"), lora)
    check_weights(policy)
    trained(policy)
    layout = packed_layout(ONE_EACH, list(trees_of(ONE_EACH))) if policy.reads_trees else padded_layout(ONE_EACH)
    return distance(policy.eval(), ONE_EACH, layout)


def reloaded(policy: CausalLM, folder: Path) -> float:
    """Return the difference of the exported folder, loaded by transformers, from the policy."""
    export_policy(policy, tiny_tokenizer(), folder)
    again = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    with torch.no_grad():
        whole = torch.cat([PROMPTS[0], COMPLETIONS[0]]).unsqueeze(0)
        return float(
            (again(input_ids=whole, use_cache=False).logits - policy.model(input_ids=whole, use_cache=False).logits)
            .abs()
            .max()
        )


def cell(measure: Callable[[], float]) -> str:
    """Return ``right``, the size of the error, or the code of a refusal."""
    try:
        found = measure()
    except ModelError as error:
        return f"refused ({error.code})"
    except Exception as error:
        return f"wrong: {type(error).__name__}: {error}".splitlines()[0][:120]
    return "right" if found <= CLOSE else f"wrong by {found:.1e}"


def measure(name: str, folder: Path, columns: tuple[str, ...] = COLUMNS) -> dict[str, str]:
    """Return every column of a family, and ``path``: its forward and decoding methods."""
    if name in NOT_SMALL:
        return {"path": f"not built small: {NOT_SMALL[name]}"}
    build(name, AutoModelForCausalLM).save_pretrained(folder / "whole")
    try:
        policy = load_policy(str(folder / "whole")).eval()
    except ModelError as error:
        return {"path": f"refused ({error.code})"}
    lora = LoraSettings(r=2, alpha=4)

    def adapted() -> CausalLM:
        return load_policy(str(folder / "whole"), lora=lora)

    measured: Mapping[str, Callable[[], float]] = {
        "padded": lambda: distance(policy, TREE, padded_layout(TREE)),
        "packed": lambda: distance(policy, ONE_EACH, packed_layout(ONE_EACH, list(trees_of(ONE_EACH)))),
        "prompt tree": lambda: distance(policy, TREE, packed_layout(TREE, list(trees_of(TREE)))),
        "sampled alone": lambda: sampled(policy, PROMPTS[:1]),
        "in groups": lambda: sampled(policy, [PROMPTS[p] for p in (0, 0, 1, 1, 2)]),
        "in refilled slots": lambda: sampled(policy, [PROMPTS[p] for p in (0, 0, 1, 1, 2)], 2),
        "LoRA gradients": lambda: trained(adapted()),
        "reward head": lambda: rewarded(name, folder / "reward"),
        "shared critic": lambda: valued(adapted(), lora),
        "exported": lambda: reloaded(copy.deepcopy(policy), folder / "exported"),
        "NF4": lambda: quantized(folder / "whole", lora),
    }
    found = {}
    for column in columns:
        unused = column in ("packed", "prompt tree") and not policy.reads_trees
        found[column] = "padded instead" if unused else cell(measured[column])
    rows = "packed" if policy.reads_trees else "padded" if policy.pads_rows else "one length at a time"
    return {"path": f"{rows}, {policy.logits_path}, {policy.decoding}", **found}


def partly_refused(found: Mapping[str, str]) -> bool:
    """Whether a loaded family is right except for one refused column, not counting the reward head."""
    refused = any(value.startswith("refused") for column, value in found.items() if column != "reward head")
    return refused and not found["path"].startswith("refused") and not wrong(found)


def wrong(found: Mapping[str, str]) -> list[str]:
    return [f"{column}: {value}" for column, value in found.items() if value.startswith("wrong")]


# -- the page ---------------------------------------------------------------------------------------------------------

HEAD = """# Families

After this page you know which model families train and sample here, and by which path.
`python tests/models/families.py` wrote it with transformers {version}: each of its {count} causal families was built
small, with windows, chunks and selections of a few tokens, saved, and loaded as a stage loads it. Log-probabilities,
scores and values were compared with the family's own `forward` of each sequence alone, to 1e-4.

**{right} of the {built} families that can be built small are right in every column (a reward head is refused where
transformers has no class for it); {partly} are right in some columns and refused in others; {refused} are refused in
one sentence; {wrong} are wrong.** No list of families decides: a model is checked against itself when it is
loaded, whatever its name (see [Extending](extending.md) for models of your own).

The path is: rows packed or padded (or sequences of one length at a time); logits from the LM head's weight (`product`),
the model's own head (`head`) or its own forward (`forward`); decoding in refilled `slots`, in `batches` that start
together, in batches of `equal` lengths, or `uncached`. The last column is an adapter on a backbone of 4 bits.

"""


def page(table: Mapping[str, Mapping[str, str]]) -> str:
    """Return the page of measured families."""
    built = {n: f for n, f in table.items() if not f["path"].startswith("not built")}
    refused = sum(f["path"].startswith("refused") for f in built.values())
    faulty = sum(bool(wrong(f)) for f in built.values())
    partly = sum(partly_refused(f) for f in built.values())
    head = HEAD.format(
        version=transformers.__version__, count=len(table), built=len(built), refused=refused, wrong=faulty,
        partly=partly, right=len(built) - refused - faulty - partly,
    )  # fmt: skip
    lines = ["| family | path | " + " | ".join(COLUMNS) + " |", "|" + "---|" * (2 + len(COLUMNS))]
    for name, found in sorted(table.items()):
        lines.append(f"| {name} | " + " | ".join(str(found.get(c, "")) for c in ("path", *COLUMNS)) + " |")
    return head + "\n".join(lines).replace("| right ", "| ✓ ") + "\n"


def main() -> None:
    kept = Path(tempfile.gettempdir()) / "rlhf_families.json"
    columns = tuple(one for one in COLUMNS if one in sys.argv[1:]) or COLUMNS
    asked = [one for one in sys.argv[1:] if one not in COLUMNS]
    table = json.loads(kept.read_text()) if kept.is_file() and sys.argv[1:] else {}
    for name in asked or names():
        started, folder = time.time(), Path(tempfile.mkdtemp())
        try:
            found, before = measure(name, folder, columns), table.get(name, {})
            table[name] = {
                **before,
                **found,
                "path": found["path"] if "in refilled slots" in columns else before["path"],
            }
        except Exception as error:
            table[name] = {"path": f"wrong: {type(error).__name__}: {error}".splitlines()[0][:120]}
        shutil.rmtree(folder)
        print(f"{name} [{time.time() - started:.1f} s]", table[name]["path"], wrong(table[name]), flush=True)
        kept.write_text(json.dumps(table))
    if set(table) == set(names()):
        PAGE.write_text(page(table))


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    main()
