"""Compare counted weights with those of real models."""

import pytest
import torch
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.lora import LoraSettings, add_lora
from rlhf_lightning.planning.memory import BF16, FP32, DecoderSizes, Pass, adapter_size
from rlhf_lightning.planning.setup import Parameter, quantized_bytes, skeleton, trained_share, weight_bytes


def real(scalar: bool, lora: LoraSettings | None, **changes) -> torch.nn.Module:
    kind = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    model = kind.from_config(tiny_config(**changes))
    return model if lora is None else add_lora(model, lora, "SEQ_CLS" if scalar else "CAUSAL_LM")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("lora", [None, LoraSettings(r=3), LoraSettings(r=2, targets=["q_proj", "v_proj"])])
@pytest.mark.parametrize("scalar", [False, True], ids=["policy", "reward model"])
def test_a_skeleton_has_the_weight_shapes_of_the_model(scalar, lora, tied):
    found = skeleton(tiny_config(tie_word_embeddings=tied), lora, scalar)
    model = real(scalar, lora, tie_word_embeddings=tied)
    assert sum(part.size for part in found.parameters) == sum(p.numel() for p in model.parameters())
    assert trained_share(found.parameters) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sorted(part.shape for part in found.parameters) == sorted(tuple(p.shape) for p in model.parameters())


def test_a_shared_critic_adds_a_head_and_a_continued_adapter_adds_a_frozen_copy():
    plain, valued = skeleton(tiny_config()), skeleton(tiny_config(), value_head=True)
    policy = CausalLM(real(False, None), value_head=True)
    assert trained_share(valued.parameters) == sum(p.numel() for p in policy.parameters())
    assert trained_share(valued.parameters) - trained_share(plain.parameters) == 33
    lora = LoraSettings(r=3)
    one, two = (skeleton(tiny_config(), lora, adapters=count) for count in (0, 1))
    assert sum(p.size for p in two.parameters) - sum(p.size for p in one.parameters) == trained_share(one.parameters)


def test_adapter_sizes_equal_those_of_the_real_adapter():
    block = DecoderSizes.of(tiny_config(num_hidden_layers=3, num_key_value_heads=1))
    found = skeleton(tiny_config(num_hidden_layers=3, num_key_value_heads=1), LoraSettings(r=5))
    assert trained_share(found.parameters) == 3 * adapter_size(block, Pass(rank=5))


def test_a_skeleton_allocates_nothing_and_quantises_block_matrices():
    found = skeleton(tiny_config(), LoraSettings(r=3))
    block = DecoderSizes.of(tiny_config())
    assert sum(part.size for part in found.parameters if part.matrix) == block.layers * block.matrices
    assert found.outside == 120 * 32 + 32  # the tied embedding and the last norm
    assert found.packs_rows


@pytest.mark.parametrize(("ranks", "share"), [(1, 10 * 7), (2, 5 * 7), (3, 4 * 7), (8, 2 * 7), (16, 7)])
def test_the_first_dimension_is_sharded_and_rounded_up(ranks, share):
    assert Parameter((10, 7), True, False).share(ranks) == share


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (96, 160), (33, 65)])
def test_quantised_bytes_equal_those_of_bitsandbytes(rows, columns):
    from bitsandbytes.functional import int8_vectorwise_quant, quantize_4bit

    weight = torch.randn(rows, columns)
    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    kept = (packed, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    assert quantized_bytes(rows * columns, "nf4", rows) == sum(t.numel() * t.element_size() for t in kept)
    codes, scales, _ = int8_vectorwise_quant(weight.half())
    assert quantized_bytes(rows * columns, "int8", rows) == sum(t.numel() * t.element_size() for t in (codes, scales))


def test_eight_billion_four_bit_weights_take_half_a_byte_each():
    count = 4096 * 14336
    assert quantized_bytes(count, "nf4", 4096) / count == pytest.approx(0.5 + 1 / 64 + 4 / (64 * 256), rel=1e-4)


def test_weight_bytes_by_dtype():
    parts = (Parameter((8, 4), True, False), Parameter((6, 64), False, True), Parameter((5,), False, False))
    assert weight_bytes(parts, FP32) == 4 * (32 + 384 + 5)
    assert weight_bytes(parts, BF16) == 4 * 32 + 2 * (384 + 5)
    assert weight_bytes(parts, BF16, "int8") == 4 * 32 + (384 + 4 * 6) + 2 * 5
    assert weight_bytes(parts, BF16, ranks=4) == 4 * (2 * 4) + 2 * (2 * 64 + 2)
