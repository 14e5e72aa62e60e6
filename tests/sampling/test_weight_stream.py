"""Test weights that are streamed to a server, with gloo in place of NCCL, and a server that sleeps meanwhile."""

import pytest
import torch
from conftest import refused
from gloo_link import GlooEngine, Receiver
from small_server import BASE, serving
from tiny_models import EOS, random_rows

from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.loading import LoadSettings
from rlhf_lightning.models.roles import load_policy
from rlhf_lightning.sampling.engines import Completions, SamplingSettings
from rlhf_lightning.sampling.own_logprobs import scored
from rlhf_lightning.sampling.remote_engine import RemoteEngine

PROMPTS = [torch.tensor(prompt) for prompt, _ in random_rows(5, seed=5, prompt=9)]


def draw(engine: RemoteEngine, model: CausalLM) -> Completions:
    return engine.sample(model, PROMPTS, torch.arange(5), SamplingSettings(8, 0.9), 7, [EOS])


def nudge(model: CausalLM) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def test_streamed_weights_are_those_that_sample(policy_folder: str) -> None:
    model = load_policy(policy_folder)
    with serving(policy_folder) as one, serving(policy_folder) as two:
        engine = GlooEngine([one.url, two.url], BASE)
        for _ in range(3):
            drawn = draw(engine, model)
            own = scored(model, PROMPTS, drawn.ids, 0.9)
            for found, expected in zip(drawn.logprobs, own, strict=True):
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
            draw(engine, model)  # unchanged weights are not sent again
            nudge(model)
        for server in (one, two):
            control = [route for route, _ in server.requests if route not in ("/v1/completions", "/weight_info")]
            update = ["/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_prefix_cache"]
            opened = ["/get_world_size", "/shutdown_weight_transfer_engine", "/init_weight_transfer_engine"]
            assert control == [*opened, *3 * ["/pause", *update, "/resume"]]
            names = server.bodies("/update_weights")[0]["update_info"]["names"]
            assert names == list(model.model.state_dict())


def test_a_resumed_trainer_connects_again(policy_folder: str) -> None:
    model = load_policy(policy_folder)
    with serving(policy_folder) as server:
        for _ in range(2):
            draw(GlooEngine(server.url, BASE), model)
            nudge(model)
        assert len(server.bodies("/update_weights")) == 2


def test_a_tensor_that_is_not_loaded_is_detected(policy_folder: str) -> None:
    model = load_policy(policy_folder)
    with serving(policy_folder) as server:
        engine = GlooEngine(server.url, BASE)
        draw(engine, model)
        server.receiver.lost = next(name for name in model.model.state_dict() if "down_proj" in name)
        nudge(model)
        with refused("server-disagrees"):
            draw(engine, model)


def test_a_server_that_was_started_again_ends_the_run(policy_folder: str) -> None:
    model = load_policy(policy_folder)
    with serving(policy_folder) as server:
        engine = GlooEngine(server.url, BASE)
        draw(engine, model)
        server.receiver = Receiver()  # as after a restart
        with refused("stale-server", "'default'", "'rlhf-1'"):
            draw(engine, model)
        nudge(model)
        with refused("server-refused", "/update_weights", "init_weight_transfer_engine"):
            draw(engine, model)


def test_a_server_sleeps_while_the_policy_trains(policy_folder: str) -> None:
    model = load_policy(policy_folder)
    with serving(policy_folder) as server:
        engine = GlooEngine(server.url, BASE, sleep=True)
        draw(engine, model)
        assert server.asleep
        nudge(model)
        draw(engine, model)
        routes = [route for route, _ in server.requests]
        assert routes.count("/wake_up") == routes.count("/sleep") == 2 and routes[0] == "/wake_up"
        with refused("sleep-with-lag", "lag 1"):
            engine.prepare(policy_folder, LoadSettings(), None, versions=2)


def test_transfers_that_cannot_work_are_refused(policy_folder: str) -> None:
    with refused("transfer-and-folder", "shared_folder"):
        RemoteEngine("http://127.0.0.1:1", BASE, "folder", transfer="nccl")
    with serving(policy_folder) as server:
        for transfer, code in (("nccl", "nccl-without-gpu"), ("ipc", "ipc-needs-one-gpu")):
            with refused(code, "cpu"):
                draw(RemoteEngine(server.url, BASE, transfer=transfer), load_policy(policy_folder))  # type: ignore[arg-type]
        assert not server.bodies("/pause")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_update_is_noticed(policy_folder: str, dtype: torch.dtype) -> None:
    """The hash of the weights sees the smallest change of one weight."""
    model = load_policy(policy_folder)
    model.to(dtype)
    with serving(policy_folder) as server:
        engine = GlooEngine(server.url, BASE, sync_bound=None)
        for _ in range(3):
            draw(engine, model)
            with torch.no_grad():
                last = list(model.parameters())[-1].view(-1)
                last[0] = torch.nextafter(last[0], torch.tensor(float("inf"), dtype=dtype))
        assert len(server.bodies("/update_weights")) == 3
