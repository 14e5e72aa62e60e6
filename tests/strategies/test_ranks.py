"""Gradients, weights, drawn episodes and metrics are the same on 1, 2 and 4 ranks, for every split into
micro-batches.
"""

import functools
from pathlib import Path
from typing import Any

import pytest
import rank_cases
import torch
from conftest import refused
from rank_pool import RankPool
from safetensors.torch import load_file

from rlhf_lightning import modules
from rlhf_lightning.runs.checkpoint_metadata import refused_checkpoint, sharded_metadata, weights_in

BASES = {
    "AlignmentModule",
    "OfflineModule",
    "OnPolicyModule",
    "RolloutModule",
    "SelfDistillationModule",  # below, with a text for its teacher
    "UnpairedModule",
}
TAUGHT = {"GKDModule", "OnPolicyDistillationModule"}
OBJECTIVES = sorted(name for name in modules.__all__ if name.endswith("Module") and name not in BASES | TAUGHT)
LORA = {"r": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "sft-lora": ("SFTModule", {"lora": LORA}),
    "sft-checkpointing": ("SFTModule", {"activation_checkpointing": True}),
    "reward-lora": ("RewardModule", {"lora": LORA}),
    "dpo": ("DPOModule", {}),
    "dpo-lora": ("DPOModule", {"lora": LORA}),
    "coupled": ("AOTModule", {}),
    "moving-reference": ("TRDPOModule", {"reference_every": 2, "lora": LORA}),
    "kto": ("KTOModule", {}),
    "ppo": ("PPOModule", {"whiten_rewards": True, "reward_slot": "after_eos", "missing_eos_score": None}),
    "ppo-shared": (
        "PPOModule",
        {"critic": "shared", "mini_batch_size": 3, "early_stop_kl": 1e-4, "kl_target": 0.1, "kl_horizon": 50},
    ),
    "ppo-pretraining": ("PPOModule", {"pretraining_coef": 2.0, "mini_batch_size": 3, "ppo_epochs": 1}),
    "ppo-lora": ("PPOModule", {"critic": "shared", "lora": LORA}),
    "grpo": ("GRPOModule", {"mini_batch_size": 3}),
    "whole-deviation": ("LitePPOModule", {}),
}


@functools.cache
def alone(name: str, folder: str, settings: str) -> dict[str, Any]:
    """The same training on one rank in one micro-batch."""
    return rank_cases.train(name, folder, "auto", **eval(settings))


def assert_equal(found: list[dict[str, Any]], expected: dict[str, Any], bound: float = 1e-9) -> None:
    """Compare every gradient and weight within a relative bound, and samples exactly.

    Metrics are logged in fp32, so they agree to 1e-6 at best, or to the bound if scores are already fp32.
    """
    for part in ("gradients", "weights"):
        assert found[0][part].keys() == expected[part].keys() and expected[part]
        for name, value in expected[part].items():
            difference = float((found[0][part][name] - value).norm())
            assert difference <= bound * float(value.norm()), f"{part} of {name}: {difference / float(value.norm())}"
    drawn: dict[int, list[int]] = {}
    for rank in found:
        drawn |= rank["drawn"]
    assert drawn == expected["drawn"]
    assert found[0]["log"] == pytest.approx(expected["log"], rel=max(bound, 1e-6), abs=max(bound, 1e-6))


def compare(
    pool: RankPool, name: str, folder: str, ranks: int, strategy: str, accumulation: int, **settings: Any
) -> None:
    expected = alone(name, folder, repr(settings))
    found = pool.run(ranks, "train", name=name, folder=folder, strategy=strategy, accumulation=accumulation, **settings)
    assert_equal(found, expected)


TURNS = {
    "grpo": ("GRPOModule", {"mini_batch_size": 3}),
    "turns": ("CriticFreeModule", {"credit": "turn", "gamma": 0.5, "advantage_scale": "batch"}),
    "ppo": ("PPOModule", {"turn_gamma": 0.5, "missing_eos_score": None}),
}


@pytest.mark.parametrize(("strategy", "accumulation"), [("fsdp", 4), ("ddp", 1)])
@pytest.mark.parametrize("family", TURNS)
def test_multi_turn_training_is_identical_on_two_ranks(
    pool: RankPool, policy_folder: str, family: str, strategy: str, accumulation: int
) -> None:
    name, settings = TURNS[family]
    compare(pool, name, policy_folder, 2, strategy, accumulation, engine="many_ends.ManyEnds", **settings)


MUON = {"class_path": "rlhf_lightning.training.muon.MuonAdamW", "init_args": {"lr": 1e-2, "weight_decay": 0.1}}


def test_muon_trains_identically_on_two_ranks(pool: RankPool, policy_folder: str) -> None:
    """Muon orthogonalises whole matrices, and each rank holds some of their rows."""
    compare(pool, "SFTModule", policy_folder, 2, "fsdp", 1, sgd=None, optimizer=MUON)


COMPILED = {
    "padded": ("SFTModule", {"pack_rows": False}),
    "packed": ("DPOModule", {"lora": LORA}),
    "rollouts": ("PPOModule", {"critic": "shared"}),
}


@pytest.mark.parametrize(("strategy", "accumulation"), [("fsdp", 4), ("ddp", 1)])
@pytest.mark.parametrize("family", COMPILED)
def test_compiled_layers_train_identically_on_two_ranks(
    pool: RankPool, policy_folder: str, family: str, strategy: str, accumulation: int
) -> None:
    """Compiled and sharded, against the same training on one rank without compilation."""
    name, settings = COMPILED[family]
    settings = {**settings, "updates": 2}  # the graphs are those of the first update
    expected = alone(name, policy_folder, repr(settings))
    given = {"name": name, "folder": policy_folder, "strategy": strategy, "accumulation": accumulation, **settings}
    assert_equal(pool.run(2, "train", compile_layers=True, **given), expected)


@pytest.mark.parametrize(("strategy", "accumulation"), [("fsdp", 4), ("ddp", 1)])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains_identically_on_two_ranks(
    pool: RankPool, policy_folder: str, name: str, strategy: str, accumulation: int
) -> None:
    compare(pool, name, policy_folder, 2, strategy, accumulation)


@pytest.mark.parametrize(("ranks", "strategy", "accumulation"), [(2, "fsdp", 4), (2, "ddp", 1), (4, "fsdp", 1)])
@pytest.mark.parametrize("name", sorted(TAUGHT))
def test_distillation_trains_identically_on_any_ranks(
    pool: RankPool, policy_folder: str, other_folder: str, name: str, ranks: int, strategy: str, accumulation: int
) -> None:
    compare(pool, name, policy_folder, ranks, strategy, accumulation, teacher=other_folder)


FOUR = [*((family, "fsdp", 4) for family in FAMILIES), *((family, "ddp", 1) for family in ("coupled", "kto", "grpo"))]
REST = [(2, "ddp", 4), (2, "fsdp", 1), (4, "ddp", 1), (4, "ddp", 4), (4, "fsdp", 1), (4, "fsdp", 4)]


@pytest.mark.parametrize(("family", "strategy", "accumulation"), FOUR)
def test_every_family_trains_identically_on_four_ranks(
    pool: RankPool, policy_folder: str, family: str, strategy: str, accumulation: int
) -> None:
    name, settings = FAMILIES[family]
    compare(pool, name, policy_folder, 4, strategy, accumulation, **settings)


@pytest.mark.drill
@pytest.mark.parametrize(("ranks", "strategy", "accumulation"), REST)
@pytest.mark.parametrize("family", [*FAMILIES, *OBJECTIVES])
def test_remaining_combinations_train_identically(
    pool: RankPool, policy_folder: str, family: str, ranks: int, strategy: str, accumulation: int
) -> None:
    name, settings = FAMILIES.get(family, (family, {}))
    compare(pool, name, policy_folder, ranks, strategy, accumulation, **settings)


@pytest.mark.parametrize("family", ["dpo", "coupled", "ppo-shared"])
@pytest.mark.parametrize(("ranks", "shares"), [(2, 1), (4, 2)])
def test_tensor_parallel_ranks_count_rows_once(
    pool: RankPool, policy_folder: str, family: str, ranks: int, shares: int
) -> None:
    name, settings = FAMILIES[family]
    sizes = {"data_parallel_size": shares, "tensor_parallel_size": ranks // shares}
    expected = alone(name, policy_folder, repr(settings))
    run = {"name": name, "folder": policy_folder, "strategy": "fsdp", "sharding": sizes, **settings}
    assert_equal(pool.run(ranks, "train", **run), expected)


def test_a_sharded_reward_model_gives_the_same_scores(pool: RankPool, policy_folder: str, reward_folder: str) -> None:
    settings = {"scorer": reward_folder, "max_tokens": 24, "missing_eos_score": None, "updates": 2}
    compare(pool, "PPOModule", policy_folder, 2, "fsdp", 1, **settings)


def test_an_undeclared_coupled_loss_depends_on_the_ranks(pool: RankPool, policy_folder: str) -> None:
    """The comparison above can fail."""
    with pytest.raises(AssertionError, match="gradients of"):
        compare(pool, "ForgetfulModule", policy_folder, 2, "ddp", 1)


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize(("strategy", "accumulation"), [("fsdp", 4), ("ddp", 1)])
@pytest.mark.parametrize("name", ["LookingDPOModule", "LookingMeanModule", "LookingGRPOModule"])
def test_data_columns_train_identically_on_two_ranks(
    pool: RankPool, policy_folder: str, name: str, strategy: str, accumulation: int, lora: Any
) -> None:
    compare(pool, name, policy_folder, 2, strategy, accumulation, lora=lora)


@pytest.mark.parametrize(("strategy", "accumulation"), [("fsdp", 4), ("ddp", 1)])
@pytest.mark.parametrize("teacher", ["policy", "ema", "other"])
def test_self_distillation_trains_identically_on_two_ranks(
    pool: RankPool, policy_folder: str, other_folder: str, teacher: str, strategy: str, accumulation: int
) -> None:
    settings: dict[str, Any] = {
        "scorer": "rank_cases.low_words_with_feedback", "context": ["{feedback} w40", "{solution}"], "success": 0.5,
        "teacher": other_folder if teacher == "other" else teacher, "ema_decay": 0.5, "mini_batch_size": 3,
    }  # fmt: skip
    compare(pool, "SelfDistillationModule", policy_folder, 2, strategy, accumulation, **settings)


USERS: dict[str, dict[str, Any]] = {
    "rebel.REBELModule": {},
    "vapo.VAPOModule": {"alpha": 0.5, "mini_batch_size": 3},
}


@pytest.mark.parametrize("name", USERS)
def test_user_objectives_train_identically_on_two_ranks(pool: RankPool, policy_folder: str, name: str) -> None:
    compare(pool, name, policy_folder, 2, "ddp", 1, scorer="rank_cases.low_words_at_a_cost", **USERS[name])


LIMIT = {"limit": 0.4, "learning_rate": 0.5}
CONSTRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "one-critic": ("PPOModule", {"constraints": {"cost": LIMIT}, "mini_batch_size": 3}),
    "critic-of-the-cost": ("PPOModule", {"constraints": {"cost": LIMIT}, "cost_critics": True, "mini_batch_size": 3}),
    "pid": ("RLOOModule", {"constraints": {"cost": LIMIT | {"method": "pid", "derivative": 2.0, "proportional": 1.0}}}),
    "gdpo": ("GRPOModule", {"parts": {"weights": {"low": 1.0, "cost": -0.5}, "normalize": "group_then_sum"}}),
    "whole-rollout": ("PPOModule", {"parts": {"weights": {"low": 1.0, "cost": -0.5}, "normalize": "batch"}}),
}


@pytest.mark.parametrize("case", CONSTRAINED)
def test_score_parts_and_multipliers_are_identical_on_two_ranks(pool: RankPool, policy_folder: str, case: str) -> None:
    name, settings = CONSTRAINED[case]
    settings = {"scorer": "rank_cases.low_words_at_a_cost", "updates": 7, **settings}
    found = pool.run(2, "train", name=name, folder=policy_folder, strategy="ddp", **settings)
    assert found[0]["multipliers"] == found[1]["multipliers"]
    expected = rank_cases.train(name, policy_folder, "auto", **settings)
    assert_equal(found, expected)
    for part, state in expected["multipliers"].items():
        assert state["value"] != 1.0
        assert found[0]["multipliers"][part] == pytest.approx(state, rel=1e-9)
    assert found[0]["log"]["rollout/score_cost_ci95"] == pytest.approx(expected["log"]["rollout/score_cost_ci95"])


def test_completion_lengths_differ_between_ranks(pool: RankPool, policy_folder: str) -> None:
    found = pool.run(2, "train", name="GRPOModule", folder=policy_folder, strategy="fsdp", updates=1)
    lengths = [sorted(len(ids) for ids in rank["drawn"].values()) for rank in found]
    assert lengths[0][-1] > lengths[0][0] and lengths[0] != lengths[1]


@pytest.mark.parametrize("counts", [(1, 5), (0, 3)])
def test_sharded_weights_give_bit_identical_samples(
    pool: RankPool, policy_folder: str, counts: tuple[int, int]
) -> None:
    prompts = [[f"w{20 + n} w{30 + rank}" for n in range(count)] for rank, count in enumerate(counts)]
    found = pool.run(2, "answer", folder=policy_folder, strategy="fsdp", prompts=prompts)
    for rank in (0, 1):
        assert found[rank] == rank_cases.answer(policy_folder, "auto", [prompts[rank]])


def test_the_reference_is_sharded(pool: RankPool, policy_folder: str) -> None:
    found = pool.run(2, "reference_left", folder=policy_folder, strategy="fsdp")
    total = found[0][1]
    assert sum(local for local, _ in found) == total and all(local < 0.6 * total for local, _ in found)


@pytest.mark.parametrize("name", ["SFTModule", "RewardModule", "DPOModule", "AOTModule", "KTOModule", "PPOModule"])
@pytest.mark.parametrize(("ranks", "strategy"), [(2, "fsdp"), (4, "ddp")])
def test_validation_metrics_cover_all_ranks(
    pool: RankPool, policy_folder: str, name: str, ranks: int, strategy: str
) -> None:
    expected = rank_cases.validate(name, policy_folder, "auto")
    for found in pool.run(ranks, "validate", name=name, folder=policy_folder, strategy=strategy):
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("name", "settings"), [("ExploringModule", {}), ("GRPOModule", {"baseline": "greedy"})])
def test_families_that_sample_twice_validate_without_a_prompt_on_a_rank(
    pool: RankPool, policy_folder: str, name: str, settings: dict[str, Any]
) -> None:
    case = {"name": name, "folder": policy_folder, "prompts": 1, **settings}
    expected = rank_cases.validate(strategy="auto", **case)
    for found in pool.run(2, "validate", strategy="fsdp", **case):
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", ["SFTModule", "PPOModule"])
def test_bf16_products_stay_close_to_fp32(pool: RankPool, policy_folder: str, name: str) -> None:
    settings = {"double": False, "updates": 2}
    expected = alone(name, policy_folder, repr(settings))
    found = pool.run(2, "train", name=name, folder=policy_folder, strategy="fsdp", precision="bf16-mixed", **settings)
    weights = found[0]["weights"]
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    for key, value in expected["weights"].items():
        torch.testing.assert_close(weights[key], value, rtol=0.05, atol=0.02)


# -- checkpoints and exports ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distributed", [False, True], ids=["full", "distributed"])
@pytest.mark.parametrize("family", ["sft-lora", "dpo", "moving-reference", "ppo-shared"])
def test_a_resumed_run_equals_an_uninterrupted_run(
    pool: RankPool, policy_folder: str, tmp_path: Path, family: str, distributed: bool
) -> None:
    name, settings = FAMILIES[family]
    path = tmp_path / "middle.ckpt"
    run = {"name": name, "folder": policy_folder, "strategy": "fsdp", "path": str(path), **settings}
    found = pool.run(2, "resume", sharding={"save_distributed_checkpoint": distributed}, **run)[0]
    assert path.is_dir() == distributed
    assert found["whole_counters"] == found["resumed_counters"]
    for weight, expected in found["whole"].items():
        assert torch.equal(found["resumed"][weight], expected)
    inside = weights_in(path)
    assert inside.keys() == found["whole"].keys()
    assert all(inside[weight].shape == found["whole"][weight].shape for weight in inside)


def test_a_sharded_checkpoint_is_read_without_running_code(tmp_path: Path) -> None:
    import pickle

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Path.cwd))
    with refused("unreadable-checkpoint", "as a sharded checkpoint of plain tensors: it names"):
        sharded_metadata(tmp_path)


def test_a_checkpoint_of_another_strategy_or_adapter_is_refused(
    pool: RankPool, policy_folder: str, tmp_path: Path
) -> None:
    run = {"name": "SFTModule", "folder": policy_folder, "strategy": "fsdp"}
    alone_path = str(tmp_path / "alone.ckpt")
    rank_cases.resume("SFTModule", policy_folder, alone_path, "auto")
    assert pool.run(2, "fails", path=alone_path, **run)[0].startswith("RuntimeError")
    message = refused_checkpoint(Path(alone_path), sharded=True, resumes=True)
    assert message is not None and "not written under ModelParallelStrategy" in message
    assert refused_checkpoint(Path(alone_path), sharded=False, resumes=True) is None
    path = str(tmp_path / "adapter.ckpt")
    sharding = {"save_distributed_checkpoint": False}
    pool.run(2, "resume", path=path, sharding=sharding, lora={"r": 2, "targets": ["q_proj"]}, **run)
    message = pool.run(2, "fails", path=path, lora={"r": 2, "targets": ["q_proj", "v_proj"]}, **run)[0]
    assert "4 trainable weights are missing" in message or "does not exist in the loaded checkpoint" in message


@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
@pytest.mark.parametrize("family", ["dpo", "sft-lora", "reward-lora"])
def test_a_run_on_several_ranks_exports_its_trained_weights(
    pool: RankPool, policy_folder: str, tmp_path: Path, family: str, strategy: str
) -> None:
    name, settings = FAMILIES[family]
    out = tmp_path / "model"
    run = {"name": name, "folder": policy_folder, "strategy": strategy, "out": str(out), **settings}
    trained = pool.run(2, "export", **run)[0]
    (file,) = out.glob("*.safetensors")
    written = load_file(file)
    assert len(written) == len(trained) and (out / "backbone.json").is_file()
    assert not list(tmp_path.glob("*.partial"))
    for key, weight in trained.items():
        inside = key.partition(".model.")[2].replace(".default", "").replace("modules_to_save.", "")
        assert torch.equal(written[inside], weight), key
