"""Test servers that die, restart or stop answering: requests are repeated, and weights are sent again."""

import threading
import time
from pathlib import Path

import pytest
from conftest import refused
from engine_draws import PROMPTS, adapted, as_lists, change, close, draw
from small_server import BASE, SmallServer, serving

from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.roles import load_policy
from rlhf_lightning.sampling.own_logprobs import scored
from rlhf_lightning.sampling.remote_engine import RemoteEngine


def test_sampling_survives_a_server_restart(policy: CausalLM, policy_folder: str) -> None:
    def again() -> None:
        time.sleep(0.5)
        with serving(policy_folder, port=port):
            back.wait(60)

    with serving(policy_folder) as small:
        port = int(small.url.rpartition(":")[2])
        engine = RemoteEngine(small.url, BASE, retries=8, wait=0.1)
        before = draw(engine, policy)
    back = threading.Event()
    thread = threading.Thread(target=again)
    thread.start()
    after = draw(engine, policy)
    back.set()
    thread.join()
    assert [ids.tolist() for ids in before.ids] == [ids.tolist() for ids in after.ids]


def test_a_dead_server_fails_within_the_retry_limit(policy: CausalLM, policy_folder: str) -> None:
    with serving(policy_folder) as small:
        url = small.url
    started = time.monotonic()
    with refused("server-silent", "gave no answer in 3 attempts; the last: ", "refused"):
        draw(RemoteEngine(url, BASE, requests=2, retries=2, wait=0.05), policy)
    assert time.monotonic() - started < 2


def test_a_dead_server_is_dropped_with_a_warning(policy: CausalLM, policy_folder: str) -> None:
    expected = None
    with serving(policy_folder) as one, serving(policy_folder) as two:
        urls = [one.url, two.url]
        expected = draw(RemoteEngine(urls, BASE), policy)
        assert {len(server.bodies()) for server in (one, two)} <= {4, 5}
        engine = RemoteEngine([one.url, "http://127.0.0.1:1", two.url], BASE, retries=0)
        with pytest.warns(UserWarning, match="left out from now on, and its prompts go to 2 other servers"):
            found = draw(engine, policy)
        assert as_lists(found) == as_lists(expected) and [server.url for server in engine.servers] == urls
    with refused("server-silent", "gave no answer"):
        draw(engine, policy)


def test_a_restarted_server_gets_its_adapters_again(policy_folder: str, server: SmallServer, tmp_path: Path) -> None:
    model, engine = adapted(policy_folder), RemoteEngine(server.url, BASE, str(tmp_path / "adapters"))
    first = draw(engine, model)
    server.models = {BASE: server.models[BASE]}
    with pytest.warns(UserWarning, match="was started again"):
        assert as_lists(draw(engine, model)) == as_lists(first)
    server.models = {BASE: server.models[BASE]}
    change(model, 2)
    second = draw(engine, model)  # the version before is unknown to the server, and is not unloaded
    close(second.logprobs, scored(model, PROMPTS, second.ids, 0.9))
    with refused("server-refused", "404"):
        draw(RemoteEngine(server.url, "another", retries=0), load_policy(policy_folder).requires_grad_(False))


@pytest.mark.parametrize("restarted", [False, True])
def test_an_adapter_whose_registration_loses_its_response_is_served(
    policy_folder: str, server: SmallServer, tmp_path: Path, restarted: bool
) -> None:
    """The first response of each registration is lost, and the server may be restarted at that moment."""
    base = dict(server.models)

    def lost(route: str, count: int) -> bool:
        if route != "/v1/load_lora_adapter" or count % 2 == 0:
            return True
        server.models = base.copy() if restarted else server.models
        return False

    model, engine = adapted(policy_folder), RemoteEngine(server.url, BASE, str(tmp_path / "adapters"), wait=0.01)
    server.after = lost
    for seed in range(2):
        change(model, seed)
        drawn = draw(engine, model)
        close(drawn.logprobs, scored(model, PROMPTS, drawn.ids, 0.9))


def test_a_server_that_restarts_before_the_probe_gets_the_adapter_again(
    policy_folder: str, server: SmallServer, tmp_path: Path
) -> None:
    base = dict(server.models)

    def forget(route: str, count: int) -> bool:
        if route == "/v1/load_lora_adapter" and count < 3:
            server.models = base.copy()
        return True

    model, engine = adapted(policy_folder), RemoteEngine(server.url, BASE, str(tmp_path / "adapters"), wait=0.01)
    server.after = forget
    with pytest.warns(UserWarning, match="was started again"):
        drawn = draw(engine, model)
    close(drawn.logprobs, scored(model, PROMPTS, drawn.ids, 0.9))
    assert engine.sync_error is not None and engine.sync_error < 1e-4
    assert len(server.bodies("/v1/load_lora_adapter")) == 3


@pytest.mark.parametrize("lora", [True, False])
def test_a_server_that_is_silent_during_a_weight_update_is_left_out(
    policy_folder: str, tied: tuple[CausalLM, Path], tmp_path: Path, lora: bool
) -> None:
    model, folder = (adapted(policy_folder), tmp_path / "adapters") if lora else tied
    with serving(policy_folder if lora else str(folder)) as server:
        engine = RemoteEngine([server.url, "http://127.0.0.1:1"], BASE, str(folder), retries=1, wait=0.01)
        with pytest.warns(UserWarning, match="left out from now on, and its prompts go to 1 other servers"):
            drawn = draw(engine, model)
        close(drawn.logprobs, scored(model, PROMPTS, drawn.ids, 0.9))
