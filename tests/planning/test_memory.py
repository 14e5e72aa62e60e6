"""Compare every value of the memory estimate with the real model in torch."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from rlhf_lightning.models import packing
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.layout import packed_layout, padded_layout
from rlhf_lightning.models.loading import LoadSettings, prepare_for_training
from rlhf_lightning.models.lora import LoraSettings, add_lora
from rlhf_lightning.models.scalar_head import hidden_states
from rlhf_lightning.planning.memory import (
    BF16,
    FP32,
    DecoderSizes,
    Pass,
    block_bytes,
    cache_bytes,
    cast_bytes,
    kept_bytes,
)
from rlhf_lightning.types import Sequences

ROWS, WIDTH, RANK = 3, 20, 5
# All sizes differ, so that a mix-up is detected.
SIZES = {
    "vocab_size": 70,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
}


def sequences(shared: bool) -> Sequences:
    """Three rows of twenty tokens: single sequences, or a prompt of four with two completions of eight."""
    each, size = (2, 8) if shared else (1, 16)
    return Sequences(
        prompts=tuple(torch.arange(4) + row for row in range(ROWS)),
        completions=tuple(torch.arange(size) for _ in range(ROWS * each)),
        parents=tuple(row for row in range(ROWS) for _ in range(each)),
        supervised=tuple(torch.ones(size, dtype=torch.bool) for _ in range(ROWS * each)),
    )


def kept_by_autograd(how: Pass, targets: str | list[str], layers: int = 3) -> int:
    """Return the bytes of all storages that autograd saves after a forward pass, excluding the weights."""
    config = LlamaConfig(num_hidden_layers=layers, **SIZES)
    kind = "eager" if how.eager else "sdpa"
    dtype = torch.bfloat16 if how.weight_bytes == BF16 else torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=kind)
    prepare_for_training(model, LoadSettings(activation_checkpointing=how.checkpointing))
    if how.rank is not None:
        model = add_lora(model, LoraSettings(r=how.rank, targets=targets), "CAUSAL_LM")
        if how.adapter_bytes == BF16:
            model = model.to(torch.bfloat16)
    policy = CausalLM(model).train()
    rows = sequences(how.masked)
    each = len(rows.completions) // ROWS
    trees = [range(row * each, (row + 1) * each) for row in range(ROWS)]
    layout = packed_layout(rows, trees) if how.masked else padded_layout(rows)
    assert layout.input_ids.numel() == ROWS * WIDTH
    own = {tensor.untyped_storage().data_ptr() for tensor in (*policy.parameters(), *policy.buffers())}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    cast = torch.autocast("cpu", torch.bfloat16, enabled=how.autocast, cache_enabled=False)
    saved = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with pytest.MonkeyPatch.context() as patch, saved, cast:
        patch.setattr(packing, "SMALL", WIDTH)  # a block for each tree, as for trees of usual size
        states = hidden_states(policy.model, layout)
    assert states.requires_grad
    return sum(found.values())


PRECISIONS = {
    "fp32": {},
    "bf16-mixed": {"autocast": True},
    "bf16 weights": {"weight_bytes": BF16},
    "bf16 weights, mixed": {"weight_bytes": BF16, "autocast": True},
    "bf16 weights and adapter, mixed": {"weight_bytes": BF16, "adapter_bytes": BF16, "autocast": True},
}


@pytest.mark.parametrize("masked", [False, True], ids=["rows", "trees"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("rank", [None, RANK], ids=["full", "lora"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_activation_estimates_equal_what_autograd_saves(precision, rank, checkpointing, masked):
    how = Pass(rank=rank, checkpointing=checkpointing, masked=masked, **PRECISIONS[precision])
    block = DecoderSizes.of(LlamaConfig(num_hidden_layers=3, **SIZES))
    assert kept_bytes(block, how, ROWS, WIDTH) == kept_by_autograd(how, "all-linear")


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "bf16 weights, mixed"])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["o_proj", "down_proj"], ["up_proj"]], ids="+".join)
def test_lora_saves_only_inputs_of_adapted_projections(targets, precision):
    """Compare block by block; the first block, after a frozen embedding, saves less."""
    how = Pass(rank=RANK, targets=frozenset(targets), **PRECISIONS[precision])
    block = DecoderSizes.of(LlamaConfig(**SIZES))
    one_more = kept_by_autograd(how, targets, layers=4) - kept_by_autograd(how, targets, layers=3)
    assert ROWS * WIDTH * block_bytes(block, how, WIDTH) + cast_bytes(block, how) == one_more


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
def test_eager_attention_saves_its_probabilities(precision):
    how = Pass(eager=True, **PRECISIONS[precision])
    block = DecoderSizes.of(LlamaConfig(**SIZES))
    one_more = kept_by_autograd(how, "", layers=4) - kept_by_autograd(how, "", layers=3)
    assert ROWS * WIDTH * block_bytes(block, how, WIDTH) + cast_bytes(block, how) == one_more


def test_kv_cache_size_by_hand():
    from transformers import DynamicCache

    config = LlamaConfig(num_hidden_layers=3, **SIZES)
    cache = DynamicCache(config=config)
    with torch.no_grad():
        AutoModelForCausalLM.from_config(config)(torch.zeros(ROWS, WIDTH, dtype=torch.long), past_key_values=cache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes(DecoderSizes.of(config), ROWS, WIDTH, FP32) == held
