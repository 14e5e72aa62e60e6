"""The arithmetic of memory, against what torch does: every figure is compared with the real model's."""

import pytest
import torch
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.layout import padded_layout, shared_layout
from rlhf_lightning.models.loading import LoadSettings, LoraSettings, add_lora, prepare_for_training
from rlhf_lightning.models.memory import (
    BF16,
    FP32,
    Block,
    Parameter,
    Pass,
    adapter_size,
    block_bytes,
    cache_bytes,
    cast_bytes,
    kept_bytes,
    quantized_bytes,
    skeleton,
    trained_share,
    weight_bytes,
)
from rlhf_lightning.models.scalar_head import hidden_states
from rlhf_lightning.types import Sequences

ROWS, WIDTH, RANK = 3, 20, 5
# No two sizes alike, so that none can stand in for another.
SIZES = {
    "vocab_size": 70,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
}


def sequences(shared: bool) -> Sequences:
    """Three rows of twenty cells: alone, or a prompt of four with two completions of eight behind it."""
    each, size = (2, 8) if shared else (1, 16)
    return Sequences(
        prompts=tuple(torch.arange(4) + row for row in range(ROWS)),
        completions=tuple(torch.arange(size) for _ in range(ROWS * each)),
        parents=tuple(row for row in range(ROWS) for _ in range(each)),
        supervised=tuple(torch.ones(size, dtype=torch.bool) for _ in range(ROWS * each)),
    )


def kept_by_autograd(how: Pass, targets: str | list[str], layers: int = 3) -> int:
    """Bytes of all storages that autograd holds after a forward pass, the weights' own left out."""
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
    layout = (shared_layout if how.masked else padded_layout)(sequences(how.masked))
    assert layout.input_ids.shape == (ROWS, WIDTH)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*policy.parameters(), *policy.buffers())}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    cast = torch.autocast("cpu", torch.bfloat16, enabled=how.autocast, cache_enabled=False)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), cast:
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
def test_activations_are_what_autograd_keeps(precision, rank, checkpointing, masked):
    how = Pass(rank=rank, checkpointing=checkpointing, masked=masked, **PRECISIONS[precision])
    block = Block.of(LlamaConfig(num_hidden_layers=3, **SIZES))
    assert kept_bytes(block, how, ROWS, WIDTH) == kept_by_autograd(how, "all-linear")


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "bf16 weights, mixed"])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["o_proj", "down_proj"], ["up_proj"]], ids="+".join)
def test_an_adapter_on_some_projections_keeps_their_inputs_alone(targets, precision):
    """Block for block; the first one, behind a frozen embedding, keeps less."""
    how = Pass(rank=RANK, targets=frozenset(targets), **PRECISIONS[precision])
    block = Block.of(LlamaConfig(**SIZES))
    one_more = kept_by_autograd(how, targets, layers=4) - kept_by_autograd(how, targets, layers=3)
    assert ROWS * WIDTH * block_bytes(block, how, WIDTH) + cast_bytes(block, how) == one_more


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
def test_attention_written_out_keeps_its_probabilities(precision):
    how = Pass(eager=True, **PRECISIONS[precision])
    block = Block.of(LlamaConfig(**SIZES))
    one_more = kept_by_autograd(how, "", layers=4) - kept_by_autograd(how, "", layers=3)
    assert ROWS * WIDTH * block_bytes(block, how, WIDTH) + cast_bytes(block, how) == one_more


# -- weights ----------------------------------------------------------------------------------------------------------


def real(scalar: bool, lora: LoraSettings | None, **changes) -> torch.nn.Module:
    kind = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    model = kind.from_config(tiny_config(**changes))
    return model if lora is None else add_lora(model, lora, "SEQ_CLS" if scalar else "CAUSAL_LM")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("lora", [None, LoraSettings(r=3), LoraSettings(r=2, targets=["q_proj", "v_proj"])])
@pytest.mark.parametrize("scalar", [False, True], ids=["policy", "reward model"])
def test_a_skeleton_has_the_real_models_weights(scalar, lora, tied):
    found = skeleton(tiny_config(tie_word_embeddings=tied), lora, scalar)
    model = real(scalar, lora, tie_word_embeddings=tied)
    assert sum(part.size for part in found.parameters) == sum(p.numel() for p in model.parameters())
    assert trained_share(found.parameters) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sorted(part.shape for part in found.parameters) == sorted(tuple(p.shape) for p in model.parameters())


def test_a_shared_critic_adds_a_head_with_its_bias_and_a_kept_start_another_adapter():
    plain, valued = skeleton(tiny_config()), skeleton(tiny_config(), value_head=True)
    policy = CausalLM(real(False, None), value_head=True)
    assert trained_share(valued.parameters) == sum(p.numel() for p in policy.parameters())
    assert trained_share(valued.parameters) - trained_share(plain.parameters) == 33
    lora = LoraSettings(r=3)
    one, two = (skeleton(tiny_config(), lora, adapters=count) for count in (0, 1))
    assert sum(p.size for p in two.parameters) - sum(p.size for p in one.parameters) == trained_share(one.parameters)


def test_an_adapters_size_is_that_of_the_real_one():
    block = Block.of(LlamaConfig(num_hidden_layers=3, **SIZES))
    found = skeleton(LlamaConfig(num_hidden_layers=3, **SIZES), LoraSettings(r=RANK))
    assert trained_share(found.parameters) == 3 * adapter_size(block, Pass(rank=RANK))


def test_nothing_is_allocated_for_a_skeleton_and_quantisation_takes_the_blocks_matrices():
    found = skeleton(tiny_config(), LoraSettings(r=3))
    block = Block.of(tiny_config())
    assert sum(part.size for part in found.parameters if part.matrix) == block.layers * block.matrices
    assert found.outside == 120 * 32 + 32  # the tied embedding and the last norm
    assert found.shares_prompts


@pytest.mark.parametrize(("ranks", "share"), [(1, 10 * 7), (2, 5 * 7), (3, 4 * 7), (8, 2 * 7), (16, 7)])
def test_the_first_dimension_is_dealt_to_ranks_and_rounded_up(ranks, share):
    assert Parameter((10, 7), True, False).share(ranks) == share


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (96, 160), (33, 65)])
def test_quantised_bytes_are_those_that_bitsandbytes_keeps(rows, columns):
    from bitsandbytes.functional import int8_vectorwise_quant, quantize_4bit

    weight = torch.randn(rows, columns)
    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    kept = (packed, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    assert quantized_bytes(rows * columns, "nf4", rows) == sum(t.numel() * t.element_size() for t in kept)
    codes, scales, _ = int8_vectorwise_quant(weight.half())
    assert quantized_bytes(rows * columns, "int8", rows) == sum(t.numel() * t.element_size() for t in (codes, scales))


def test_weights_of_eight_billion_in_four_bits_take_half_a_byte_each():
    count = 4096 * 14336
    assert quantized_bytes(count, "nf4", 4096) / count == pytest.approx(0.5 + 1 / 64 + 4 / (64 * 256), rel=1e-4)


def test_bytes_of_weights_by_precision():
    parts = (Parameter((8, 4), True, False), Parameter((6, 64), False, True), Parameter((5,), False, False))
    assert weight_bytes(parts, FP32) == 4 * (32 + 384 + 5)
    assert weight_bytes(parts, BF16) == 4 * 32 + 2 * (384 + 5)
    assert weight_bytes(parts, BF16, "int8") == 4 * 32 + (384 + 4 * 6) + 2 * 5
    assert weight_bytes(parts, BF16, ranks=4) == 4 * (2 * 4) + 2 * (2 * 64 + 2)


def test_a_cache_holds_keys_and_values_of_every_layer():
    from transformers import DynamicCache

    config = LlamaConfig(num_hidden_layers=3, **SIZES)
    cache = DynamicCache(config=config)
    with torch.no_grad():
        AutoModelForCausalLM.from_config(config)(torch.zeros(ROWS, WIDTH, dtype=torch.long), past_key_values=cache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes(Block.of(config), ROWS, WIDTH, FP32) == held
