"""Test plans by value: micro-batches as in training, phases, ranks, and suggestions that make a run fit."""

import json
import math
from dataclasses import replace

import pytest
from conftest import refused

from rlhf_lightning.data.batching import BatchPlan
from rlhf_lightning.micro_batches import cut_micro_batches
from rlhf_lightning.models.lora import LoraSettings
from rlhf_lightning.planning.estimate import plan
from rlhf_lightning.planning.memory import BF16, FP32
from rlhf_lightning.planning.plan import remedies
from rlhf_lightning.planning.setup import Frozen, Machine, RolloutPlan, Rows, Setup, micro_batch
from rlhf_lightning.planning.setup_from_config import PUBLISHED, config_text, published
from rlhf_lightning.types import MicroBatchLimits

TINY = config_text(
    json.dumps(
        {
            "vocab_size": 120,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        }
    )
)
# By hand: 2 blocks of 4 * 32^2 + 3 * 32 * 48 weights and two norms, the embedding (tied with the head), the last norm.
POLICY = 2 * (4 * 32**2 + 3 * 32 * 48 + 64) + 120 * 32 + 32
ADAPTER = 2 * 16 * (4 * 64 + 3 * 80)
PAIRS = Rows(groups=8, completions=2, prompt=20, completion=10)
SFT = Setup(TINY, replace(PAIRS, completions=1), Machine())
DPO = replace(SFT, rows=PAIRS, frozen=(Frozen("reference", TINY, False, FP32),))
EPISODES = Rows(groups=8, completions=1, prompt=20, completion=10, parts_groups=True)
PPO = replace(
    SFT,
    rows=EPISODES,
    critic="separate",
    rollout=RolloutPlan(prompts=8, slots=None, updates=4),
    frozen=(Frozen("reference", TINY, False, FP32), Frozen("reward model", TINY, True, FP32, judges=False)),
)
LLAMA = Setup(config_text("Llama-3.1-8B"), Rows(groups=8, completions=1, prompt=512, completion=512), Machine(gpu=True))


def roles(setup: Setup) -> dict[str, tuple[int, int]]:
    return {role.name: (role.parameters, role.trained) for role in plan(setup).roles}


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("bounds", [{}, {"micro_batch_size": 3}, {"max_tokens": 95}, {"max_tokens": 10}])
def test_fixed_data_has_the_micro_batches_of_its_batch_plan(bounds, ranks):
    rows = Rows(groups=11, completions=1, prompt=20, completion=10, **bounds)
    batch = micro_batch(rows, ranks, packs_rows=True)
    real = BatchPlan([30] * 11, [10] * 11, batch_size=11, ranks=ranks, shuffle=False, limits=MicroBatchLimits(**bounds))
    shares = [real.step(0, rank).micro_batches for rank in range(ranks)]
    assert batch.passes == len(shares[0])
    assert batch.rows == max(len(group) for share in shares for group in share)
    assert (batch.width, batch.tokens, batch.masked) == (30, 10 * batch.rows, False)


@pytest.mark.parametrize("bounds", [{}, {"micro_batch_size": 3}, {"max_tokens": 95}, {"max_tokens": 10}])
def test_rollouts_have_the_micro_batches_of_the_module(bounds):
    batch = micro_batch(replace(EPISODES, groups=11, **bounds), 1, packs_rows=True)
    cuts = cut_micro_batches([30] * 11, MicroBatchLimits(**bounds))
    assert (batch.passes, batch.rows) == (len(cuts), max(map(len, cuts)))


def test_packed_prompts_are_counted_once():
    assert micro_batch(PAIRS, 1, True) == (8, 40, 160, True, 1)
    assert micro_batch(PAIRS, 1, False) == (16, 30, 160, False, 1)
    group = Rows(groups=2, completions=8, prompt=1000, completion=500, parts_groups=True)
    # 2,048 tokens fit two completions after the prompt, so each prompt is repeated four times.
    assert micro_batch(group, 1, True) == (8, 2000, 8000, True, 1)


@pytest.mark.parametrize(
    ("setup", "expected"),
    [
        (SFT, {"policy": (POLICY, POLICY)}),
        (replace(SFT, lora=LoraSettings()), {"policy": (POLICY + ADAPTER, ADAPTER)}),
        (replace(SFT, scalar=True), {"reward model": (POLICY + 32, POLICY + 32)}),
        (replace(SFT, scalar=True, lora=LoraSettings()), {"reward model": (POLICY + 64 + ADAPTER, ADAPTER + 32)}),
        (DPO, {"policy": (POLICY, POLICY), "reference": (POLICY, 0)}),
        (
            PPO,
            {
                "policy": (POLICY, POLICY),
                "critic": (POLICY + 32, POLICY + 32),
                "reference": (POLICY, 0),
                "reward model": (POLICY + 32, 0),
            },
        ),
        (
            replace(PPO, lora=LoraSettings(), critic="shared", frozen=()),
            {"policy": (POLICY + ADAPTER + 33, ADAPTER + 33)},
        ),
        (
            replace(PPO, lora=LoraSettings(), critic="adapter", frozen=(), adapters=1),
            {"policy": (POLICY + 3 * ADAPTER + 32, 2 * ADAPTER + 32)},
        ),
    ],
)
def test_weights_of_each_role_by_hand(setup, expected):
    assert roles(setup) == expected


def test_memory_at_each_phase_by_hand():
    found = plan(replace(PPO, machine=Machine(process_bytes=7)))
    trained = 2 * POLICY + 32
    weights = 4 * (4 * POLICY + 64)
    assert list(found.moments) == ["sampling", "statistics", "backward begins", "backward ends", "update"]
    for parts in found.moments.values():
        assert (parts["weights"], parts["optimizer"], parts["process"]) == (weights, 8 * trained, 7)
    held = {name: parts.get("gradients", 0) for name, parts in found.moments.items()}
    tied = 4 * 120 * 32  # the embedding's part of a tied gradient, with the head's
    assert held == {
        "sampling": 4 * trained,
        "statistics": 4 * trained,
        "backward begins": 0,
        "backward ends": 4 * trained + tied,
        "update": 4 * trained,
    }
    assert found.moments["sampling"]["KV cache"] == 2 * 2 * 32 * 4 * 8 * 30
    assert found.peak == max(sum(parts.values()) for parts in found.moments.values())
    assert found.tokens == 80 and plan(DPO).tokens == 16 * 30


def test_with_accumulation_gradients_and_activations_coexist():
    one, two = plan(SFT), plan(replace(SFT, rows=replace(SFT.rows, max_tokens=120)))
    assert (one.micro_batch.passes, two.micro_batch.passes) == (1, 2)
    assert "gradients" not in one.moments["backward begins"]
    assert two.moments["backward begins"]["gradients"] == 4 * POLICY
    assert 2 * two.moments["backward begins"]["activations"] == pytest.approx(
        one.moments["backward begins"]["activations"], rel=0.05
    )


def test_fewer_sampling_slots_need_less_kv_cache():
    few = replace(PPO, rollout=RolloutPlan(prompts=8, slots=2, updates=4))
    assert 4 * plan(few).moments["sampling"]["KV cache"] == plan(PPO).moments["sampling"]["KV cache"]


def test_ddp_adds_buckets_and_fsdp_shards_replicated_state():
    eight = replace(LLAMA, machine=Machine(gpu=True, data_ranks=8, strategy="ddp", precision="bf16-mixed"))
    cut = replace(eight, machine=replace(eight.machine, strategy="sharded"))
    whole, parts = plan(eight).moments["update"], plan(cut).moments["update"]
    assert whole["gradient buckets"] == whole["gradients"] == 4 * 8_030_261_248
    # Every dimension divides by eight.
    assert {name: parts[name] * 8 for name in ("weights", "gradients", "optimizer")} == {
        name: whole[name] for name in ("weights", "gradients", "optimizer")
    }
    outside, block = 2 * 128256 * 4096 + 4096, (8_030_261_248 - 2 * 128256 * 4096 - 4096) // 32
    assert "gathered weights" not in parts
    assert plan(cut).moments["backward ends"]["gathered weights"] == outside * (2 + 2) + 2 * block * 2 + block * (2 + 4)


def test_sharded_sizes_equal_those_of_the_real_strategy():
    """torch's FSDP2 shards the real model over three ranks; a fake process group replaces the other ranks."""
    import torch.distributed as dist
    from tiny_models import tiny_config
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformers import AutoModelForCausalLM

    from rlhf_lightning.models.causal_lm import CausalLM
    from rlhf_lightning.models.sharding import shard
    from rlhf_lightning.planning.setup import skeleton, trained_share

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=3)
    try:
        mesh = init_device_mesh("cpu", (3, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
        policy = CausalLM(AutoModelForCausalLM.from_config(tiny_config()))
        shard(policy, mesh)
        held = sum(parameter.to_local().numel() for parameter in policy.parameters())
    finally:
        dist.destroy_process_group()
    assert trained_share(skeleton(tiny_config()).parameters, 3) == held


def test_a_step_takes_six_flops_per_weight_and_token():
    """Two FLOPs forward and four backward per weight and token; attention and head separately (Kaplan et al. 2020)."""
    rows = Rows(groups=4, completions=1, prompt=1, completion=1023)
    found = sum(plan(replace(LLAMA, rows=rows)).flops.values())
    matrices = 8_030_261_248 - 128256 * 4096 - 65 * 4096
    attention = 6 * 4096 * 1024 * 32
    again = 2 * 128256 * 4096  # the head's logits, computed again in the backward pass
    assert found == pytest.approx(4 * 1024 * (6 * matrices + attention + again), rel=0.002)


def test_lora_saves_weight_gradients_and_checkpointing_adds_a_forward():
    full, lora, again = (
        plan(setup).flops["learning"]
        for setup in (LLAMA, replace(LLAMA, lora=LoraSettings()), replace(LLAMA, checkpointing=True))
    )
    assert 0.64 < lora / full < 0.72 and 1.28 < again / full < 1.34


# -- what would help --------------------------------------------------------------------------------------------------


def test_every_suggested_single_change_fits():
    limit = 30 * 10**9
    setup = replace(LLAMA, lora=LoraSettings(), bytes=BF16, machine=Machine(gpu=True, precision="bf16-mixed"))
    assert plan(setup).peak > limit
    found = remedies(setup, limit)
    assert ("--model.activation_checkpointing true",) in [one.flags for one in found]
    for one in found:
        assert one.peak == plan(one.setup).peak <= limit and len(one.flags) == 1
    assert len({one.flags[0].split()[0] for one in found}) == len(found)


def test_if_no_single_change_fits_several_are_combined():
    setup = replace(LLAMA, machine=Machine(gpu=True))
    (found,) = remedies(setup, 24 * 10**9)
    assert len(found.flags) > 1 and found.peak <= 24 * 10**9


def test_suggested_ranks_have_hosts_devices_and_mesh():
    setup = replace(LLAMA, machine=Machine(gpu=True, data_ranks=8, strategy="sharded", precision="bf16-mixed"))
    flags = [one.flags[0] for one in remedies(setup, plan(setup).peak - 1)]
    assert "--trainer.devices 8 --trainer.num_nodes 2 --trainer.strategy.data_parallel_size 16" in flags
    four = replace(setup, machine=replace(setup.machine, data_ranks=2))
    flags = [one.flags[0] for one in remedies(four, plan(four).peak - 1)]
    assert "--trainer.devices 4 --trainer.strategy.data_parallel_size 4" in flags


def test_a_plan_that_cannot_fit_reports_the_shortfall():
    (found,) = remedies(replace(LLAMA, machine=Machine(gpu=True)), 10**9)
    assert found.peak > 10**9


# -- architectures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("Llama-3.1-8B", 8_030_261_248),
        ("meta-llama/Llama-3.1-70B-Instruct", 70_553_706_496),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400),
        ("meta-llama/Llama-3.2-3B", 3_212_749_824),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008),
        ("HuggingFaceTB/SmolLM2-360M", 361_821_120),
        ("HuggingFaceTB/SmolLM2-1.7B", 1_711_376_384),
        ("Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304),
    ],
)
def test_published_architectures_have_their_published_numbers_of_weights(name, count):
    assert roles(replace(SFT, config=config_text(name)))["policy"] == (count, count)


def test_unknown_architecture_names_are_refused():
    assert published("somebody/else") is None and len(PUBLISHED) == 8


def test_a_model_config_is_read_from_text_file_or_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "hidden_size": 64}))
    assert json.loads(config_text(str(tmp_path)))["model_type"] == "qwen2"
    assert config_text(str(tmp_path)) == config_text(str(tmp_path / "config.json"))
    assert json.loads(config_text('{"hidden_size": 8}')) == {"hidden_size": 8, "model_type": "llama"}
    with refused("invalid-json", "is not JSON"):
        config_text("{")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    record = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path)}
    (adapter / "adapter_config.json").write_text(json.dumps(record))
    assert config_text(str(adapter)) == config_text(str(tmp_path))


def test_an_unknown_model_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with refused("no-model", "missing/model are unknown", "--plan.config"):
        config_text("missing/model")


def test_four_bit_backbones_take_half_a_byte_per_weight():
    setup = replace(LLAMA, lora=LoraSettings(), bytes=BF16, quantization="nf4")
    (role,) = plan(setup).roles
    quantised = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    others = 2 * (8_030_261_248 - quantised)
    adapter = 4 * role.trained
    assert role.bytes == pytest.approx(quantised * (0.5 + 1 / 64 + 4 / (64 * 256)) + others + adapter, rel=1e-4)
    assert math.isclose(role.bytes / 1e9, 5.86, abs_tol=0.1)
