"""Combine an adapter, ranks, layouts, memory-saving options and interruptions: the result equals the plain run's."""

import functools
from pathlib import Path
from typing import Any

import pytest
import rank_cases
import torch
from rank_pool import RankPool

OBJECTIVES: dict[str, dict[str, Any]] = {
    "DPOModule": {},
    "PPOModule": {"critic": "shared", "mini_batch_size": 4, "ppo_epochs": 2},
    "GRPOModule": {"mini_batch_size": 4, "ppo_epochs": 2},
}
SAVINGS: dict[str, dict[str, Any]] = {"chunked-head": {"chunk_tokens": 3}, "token-budget": {}}
BUDGET: dict[str, dict[str, Any]] = {
    "DPOModule": {"accumulation": 4},  # its rows were split by the DataModule
    "PPOModule": {"max_tokens": 24},
    "GRPOModule": {"max_tokens": 24},
}
LORA = {"r": 2}


@functools.cache
def plain(name: str, folder: str) -> dict[str, torch.Tensor]:
    """Train in one process and one micro-batch, unpacked and without interruption."""
    return rank_cases.together(name, folder, "auto", None, lora=LORA, pack_rows=False, **OBJECTIVES[name])


@pytest.mark.parametrize("interrupted", [False, True], ids=["straight", "resumed"])
@pytest.mark.parametrize("saving", SAVINGS)
@pytest.mark.parametrize("pack_rows", [False, True], ids=["padded", "shared"])
@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_combined_features_equal_the_plain_run(
    pool: RankPool, policy_folder: str, tmp_path: Path, name: str, strategy: str, pack_rows: bool, saving: str,
    interrupted: bool,
) -> None:  # fmt: skip
    settings = {**OBJECTIVES[name], **SAVINGS[saving], **(BUDGET[name] if saving == "token-budget" else {})}
    found = pool.run(
        2, "together", name=name, folder=policy_folder, strategy=strategy, lora=LORA, pack_rows=pack_rows,
        path=str(tmp_path / "middle.ckpt") if interrupted else None, **settings,
    )  # fmt: skip
    expected = plain(name, policy_folder)
    assert found[0].keys() == expected.keys() and any("lora" in weight for weight in expected)
    for weight, value in expected.items():
        difference = float((found[0][weight] - value).norm())
        assert difference <= 1e-6 * float(value.norm()), f"{weight}: {difference / float(value.norm())}"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_plain_run_changes_the_weights(policy_folder: str, name: str) -> None:
    """A comparison of unchanged weights would show nothing."""
    begun = rank_cases.together(name, policy_folder, "auto", None, steps=1, lora=LORA, **OBJECTIVES[name])
    for weight, value in plain(name, policy_folder).items():
        assert float((value - begun[weight]).norm()) > 1e-4, weight
