"""Sharded weights reach a server: the first rank gathers and sends them, and all ranks sample there."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rank_pool import RankPool
from small_server import BASE, SmallServer, serving
from transformers import AutoTokenizer

from rlhf_lightning.models.roles import load_policy
from rlhf_lightning.sampling.hand_over import write_server_folder

ROUTES = {"adapter": "/v1/load_lora_adapter", "folder": "/collective_rpc", "stream": "/update_weights"}
everywhere = pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
in_every_way = pytest.mark.parametrize("sent", list(ROUTES))


def write_shared(policy_folder: str, folder: Path) -> str:
    policy = load_policy(policy_folder)
    return str(write_server_folder(policy.model, AutoTokenizer.from_pretrained(policy_folder), folder))


@contextmanager
def served_run(policy_folder: str, folder: Path, strategy: str, sent: str) -> Iterator[tuple[SmallServer, Any]]:
    """Yield a server, and the settings of a run on two ranks that samples there."""
    with serving(write_shared(policy_folder, folder) if sent == "folder" else policy_folder) as server:
        given = {"url": server.url, "model": BASE, "sync_bound": 1e-4}
        path = "gloo_link.GlooEngine"
        if sent != "stream":
            path = "rlhf_lightning.sampling.remote_engine.RemoteEngine"
            given["shared_folder"] = str(folder)
        yield server, {
            "name": "GRPOModule", "folder": policy_folder, "strategy": strategy, "double": False,
            "lora": {"r": 2} if sent == "adapter" else None, "sampler_correction": "token_truncate",
            "engine": {"class_path": path, "init_args": given},
        }  # fmt: skip


def transfers(server: SmallServer, strategy: str, sent: str) -> float:
    """Return the number of weight transfers for each rank that sends."""
    each = 2 if (sent, strategy) == ("adapter", "ddp") else 1  # ranks of an unsharded adapter send it themselves
    return len(server.bodies(ROUTES[sent])) / each


@everywhere
@in_every_way
def test_a_server_samples_for_all_ranks(
    pool: RankPool, policy_folder: str, tmp_path: Path, strategy: str, sent: str
) -> None:
    with served_run(policy_folder, tmp_path / "shared", strategy, sent) as (server, run):
        found = pool.run(2, "train", updates=6, **run)
        assert transfers(server, strategy, sent) == 2
    for one in found:
        assert one["drawn"] and one["log"]["invariant/sync_error"] < 1e-4
        assert one["log"]["invariant/sampler"] < 1e-4


@everywhere
@in_every_way
def test_ranks_may_have_different_numbers_of_turns_and_no_prompt(
    pool: RankPool, policy_folder: str, tmp_path: Path, strategy: str, sent: str
) -> None:
    with served_run(policy_folder, tmp_path / "shared", strategy, sent) as (server, run):
        first, second = pool.run(2, "converse", **run)
        assert transfers(server, strategy, sent) == 2
    assert max(*first[0], *second[0]) < 1e-4
    assert max(map(max, first[1])) > 1 and second[1] == [[1], []]


def test_weights_are_replaced_after_the_last_rank_has_its_episodes(
    pool: RankPool, policy_folder: str, tmp_path: Path
) -> None:
    shared = write_shared(policy_folder, tmp_path / "shared")
    arrived = str(tmp_path / "arrived")
    assert pool.run(2, "hand_over_late", folder=policy_folder, shared=shared, arrived=arrived) == [[True], []]
