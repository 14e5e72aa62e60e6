"""Sharded weights reach a server: the first rank gathers and sends them, and all ranks sample there."""

from pathlib import Path

import pytest
from rank_pool import RankPool
from small_server import BASE, serving
from transformers import AutoTokenizer

from rlhf_lightning.models.roles import load_policy
from rlhf_lightning.sampling.hand_over import write_server_folder


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("sent", ["adapter", "folder", "stream"])
def test_a_server_samples_for_all_ranks(
    pool: RankPool, policy_folder: str, tmp_path: Path, strategy: str, sent: str
) -> None:
    folder, lora = tmp_path / "shared", {"r": 2} if sent == "adapter" else None
    if sent == "folder":
        policy = load_policy(policy_folder)
        write_server_folder(policy.model, AutoTokenizer.from_pretrained(policy_folder), folder)
    with serving(str(folder) if sent == "folder" else policy_folder) as server:
        given = {"url": server.url, "model": BASE, "sync_bound": 1e-4}
        path = "gloo_link.GlooEngine"
        if sent != "stream":
            path = "rlhf_lightning.sampling.remote_engine.RemoteEngine"
            given["shared_folder"] = str(folder)
        found = pool.run(
            2, "train", name="GRPOModule", folder=policy_folder, strategy=strategy, updates=6, lora=lora,
            engine={"class_path": path, "init_args": given}, sampler_correction="token_truncate", double=False,
        )  # fmt: skip
        routes = {"adapter": "/v1/load_lora_adapter", "folder": "/collective_rpc", "stream": "/update_weights"}
        handed = server.bodies(routes[sent])
    each = 2 if lora and strategy == "ddp" else 1  # ranks of an unsharded adapter send it themselves
    assert len(handed) == 2 * each
    for one in found:
        assert one["drawn"] and one["log"]["invariant/sync_error"] < 1e-4
        assert one["log"]["invariant/sampler"] < 1e-4
