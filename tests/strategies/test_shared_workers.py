"""Rollout workers at addresses sample for all ranks: same episodes as in the ranks, with one copy of the policy."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_pool import RankPool
from small_server import started_worker

from rlhf_lightning.sampling import worker_process


def check_equal(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Check that the ranks of two runs drew the same episodes and ended with the same weights, bit for bit."""
    for one, other in zip(found, expected, strict=True):
        assert one["drawn"] and one["drawn"] == other["drawn"]
        assert all(torch.equal(weight, other["weights"][name]) for name, weight in one["weights"].items())


@pytest.mark.parametrize("settings", [{}, {"lora": {"r": 2}, "lag": 1, "sampler_correction": "sequence_truncate"}])
def test_ranks_share_workers(
    pool: RankPool, policy_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    loaded: list[str] = []
    load = worker_process.load_policy
    monkeypatch.setattr(worker_process, "load_policy", lambda *given: (loaded.append(given[0]), load(*given))[1])
    folder = tmp_path / "shared"

    def trained(*addresses: str) -> list[dict[str, Any]]:
        given = {"addresses": list(addresses), "shared_folder": str(folder)}
        engine = {"class_path": "WorkerEngine", "init_args": given} if addresses else None
        return pool.run(
            2, "train", name="GRPOModule", folder=policy_folder, strategy="ddp", updates=9, engine=engine, double=False,
            **settings,
        )  # fmt: skip

    with started_worker(folder) as silent:
        pass
    with started_worker(folder) as address:
        check_equal(trained(address), trained())
        assert len(loaded) == 1
        # Both ranks leave out a worker that does not answer; the other worker gets all parts.
        check_equal(trained(silent, address), trained(address, address))
        assert len(loaded) == 1
        assert not [path for path in folder.rglob("*") if path.is_file()]
