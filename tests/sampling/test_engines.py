"""Test engines other than SlotEngine: transformers' generate, and a server with different log-probabilities."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import refused
from engine_draws import ENDS, EPISODES, PROMPTS, adapted, as_lists, change, close, draw
from small_server import BASE, SmallServer, serving
from tiny_models import EOS, VOCABULARY
from transformers import AutoTokenizer
from transformers.utils.import_utils import is_serve_available

from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.loading import LoadSettings
from rlhf_lightning.models.lora import LoraSettings
from rlhf_lightning.models.roles import load_policy
from rlhf_lightning.sampling.decoding import Mixture
from rlhf_lightning.sampling.engines import SamplingEngine, SamplingSettings
from rlhf_lightning.sampling.generate_engine import ContinuousBatchingEngine, GenerateEngine
from rlhf_lightning.sampling.hand_over import Probe
from rlhf_lightning.sampling.own_logprobs import scored
from rlhf_lightning.sampling.remote_engine import RemoteEngine
from rlhf_lightning.sampling.slot_engine import SlotEngine, load_engine

# -- generate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"batch_size": 4}, {"temperature": 0.0}, {"top_p": 0.6, "top_k": 20}, {"max_new_tokens": 1}]
)
def test_generate_engine_equals_slot_engine(policy: CausalLM, settings: dict[str, Any]) -> None:
    ours, theirs = draw(SlotEngine(), policy, **settings), draw(GenerateEngine(), policy, **settings)
    assert as_lists(theirs) == as_lists(ours) and torch.equal(theirs.finished, ours.finished)
    close(theirs.logprobs, ours.logprobs)


def test_generate_engine_uses_the_adapter_and_ignores_the_generation_config(policy_folder: str) -> None:
    model = adapted(policy_folder)
    own = model.model.get_base_model().generation_config
    own.repetition_penalty, own.min_new_tokens = 5.0, 10
    assert as_lists(draw(GenerateEngine(), model)) == as_lists(draw(SlotEngine(), model))
    assert model.model.get_base_model().generation_config is own


@pytest.mark.parametrize("engine", [GenerateEngine(), RemoteEngine("http://127.0.0.1:1", BASE)])
def test_engines_without_mixtures_refuse_them(policy: CausalLM, engine: SamplingEngine) -> None:
    mixture = Mixture(lambda: nullcontext(policy), lambda own, theirs: own)
    with refused("mixture-needs-slots", "one model, and a mixture", "use the SlotEngine"):
        engine.sample(policy, PROMPTS, EPISODES, SamplingSettings(2), 0, ENDS, mixture=mixture)


@pytest.mark.parametrize("engine", [SlotEngine(), GenerateEngine(), RemoteEngine("http://127.0.0.1:1", BASE)])
def test_every_engine_refuses_an_empty_prompt(policy: CausalLM, engine: SamplingEngine) -> None:
    with refused("empty-prompt", "a prompt is empty"):
        engine.sample(policy, [torch.zeros(0, dtype=torch.long)], EPISODES[:1], SamplingSettings(2), 0, ENDS)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"max_new_tokens": 1}])
def test_continuous_batching_samples_have_the_policys_logprobs(policy_folder: str, settings: dict[str, Any]) -> None:
    model = adapted(policy_folder)
    kernel = model.model.config._attn_implementation
    drawn = draw(ContinuousBatchingEngine(), model, **settings)
    close(drawn.logprobs, scored(model, PROMPTS, drawn.ids, settings.get("temperature", 0.9) or 1.0))
    assert drawn.finished.tolist() == [ids[-1] in ENDS for ids in as_lists(drawn)]
    assert model.model.config._attn_implementation == kernel and not ContinuousBatchingEngine.exact
    again = draw(ContinuousBatchingEngine(), model, **settings)
    assert as_lists(again) == as_lists(drawn)
    if settings == {"temperature": 0.0}:
        assert as_lists(drawn) == as_lists(draw(SlotEngine(), model, **settings))


# -- a server ---------------------------------------------------------------------------------------------------------


def test_samples_of_a_server_have_the_policys_logprobs(policy: CausalLM, server: SmallServer) -> None:
    engine = RemoteEngine(server.url + "/v1/", BASE)
    drawn = draw(engine, policy)
    close(drawn.logprobs, scored(policy, PROMPTS, drawn.ids, 0.9))
    assert drawn.finished.tolist() == [ids[-1] in ENDS for ids in as_lists(drawn)]
    assert len({len(ids) for ids in drawn.ids}) > 3 and not engine.exact and engine.reports_logprobs
    greedy = draw(engine, policy, temperature=0.0)
    assert as_lists(greedy) == as_lists(draw(SlotEngine(), policy, temperature=0.0))


def test_each_episode_is_one_request_with_its_own_seed(policy: CausalLM, server: SmallServer) -> None:
    engine = RemoteEngine(server.url, BASE, requests=3)
    first = draw(engine, policy, top_p=0.8, top_k=30)
    bodies = server.bodies()
    assert sorted(body["prompt"] for body in bodies) == sorted(prompt.tolist() for prompt in PROMPTS)
    assert len({body["seed"] for body in bodies}) == 9 and all(0 <= body["seed"] < 2**31 for body in bodies)
    fixed = {"model": BASE, "max_tokens": 12, "temperature": 0.9, "top_p": 0.8, "top_k": 30, "logprobs": 1}
    assert all(fixed.items() <= body.items() and body["stop_token_ids"] == list(ENDS) for body in bodies)
    assert as_lists(draw(engine, policy, top_p=0.8, top_k=30)) == as_lists(first)
    seen: list[int] = []
    engine.sample(policy, PROMPTS, -1 - EPISODES, SamplingSettings(2), 7, ENDS, on_progress=seen.append)
    assert sum(seen) == 9 and len({body["seed"] for body in server.bodies()}) == 18


def test_requests_to_a_busy_server_are_retried(policy: CausalLM, server: SmallServer) -> None:
    server.busy = 3
    drawn = draw(RemoteEngine(server.url, BASE, requests=1, wait=0.01), policy)
    assert len(server.bodies()) == 12 and len(drawn.ids) == 9
    server.busy = 3
    with refused("server-silent", "gave no answer in 2 attempts; the last: status 503: ", "overloaded"):
        draw(RemoteEngine(server.url, BASE, requests=1, retries=1, wait=0.01), policy)


def test_a_missing_server_or_model_is_refused(policy: CausalLM, server: SmallServer) -> None:
    with refused("server-silent", "127.0.0.1:1/v1/completions gave no answer in 1 attempts"):
        draw(RemoteEngine("http://127.0.0.1:1", BASE, retries=0), policy)
    with refused("server-refused", "refused with status 404: ", "does not exist"):
        draw(RemoteEngine(server.url, "another"), policy)


def test_the_api_key_is_read_from_the_environment(
    policy: CausalLM, server: SmallServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMALL_SERVER_KEY", "abc")
    draw(RemoteEngine(server.url, BASE, api_key="SMALL_SERVER_KEY"), policy)
    assert server.authorization == "Bearer abc"  # type: ignore[attr-defined]
    monkeypatch.delenv("SMALL_SERVER_KEY")
    with refused("no-such-variable", "SMALL_SERVER_KEY, which is not set"):
        RemoteEngine(server.url, BASE, api_key="SMALL_SERVER_KEY")


def spoilt(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    def spoil(answer: dict[str, Any]) -> dict[str, Any]:
        answer["choices"][0].update(changes)
        return answer

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda answer: "hello", "answered without the token ids and log-probabilities"),
        (spoilt(logprobs=None), "set tokenizer"),
        (spoilt(logprobs={"token_logprobs": [-1.0], "tokens": ["x"]}, token_ids=None), "answered without the token"),
        (spoilt(token_ids=[40, 41]), "with 2 tokens and"),
        (spoilt(logprobs={"token_logprobs": [float("nan")]}, token_ids=[40]), "log-probabilities"),
        (spoilt(logprobs={"token_logprobs": [-1.0] * 2}, token_ids=[EOS, 40]), "continued after an end token"),
        (
            spoilt(logprobs={"token_logprobs": [-1.0]}, token_ids=[40], finish_reason="stop"),
            "stopped without one of the end tokens",
        ),
    ],
)
def test_malformed_completions_are_refused(
    policy: CausalLM, server: SmallServer, spoil: Callable[[dict[str, Any]], Any], message: str
) -> None:
    server.spoil = spoil
    with refused("server-answer-unusable", message):
        draw(RemoteEngine(server.url, BASE), policy, max_new_tokens=6)


@pytest.mark.parametrize(
    "ids", [[-1], [10**9], [2**70], [VOCABULARY], [7.9], [True], ["7"], [None], [[7]], "7", {"0": 7}, 7]
)
@pytest.mark.parametrize("named", [False, True])
def test_token_ids_outside_the_vocabulary_are_refused(
    policy: CausalLM, server: SmallServer, ids: Any, named: bool
) -> None:
    """The invalid id is given as an id or as a token name."""
    table: dict[str, Any] = {"token_logprobs": [-1.0]}
    if named:
        table["tokens"] = [f"token_id:{token}" for token in ids] if isinstance(ids, list) else ids
        if ids == ["7"]:
            table["tokens"] = ["7"]  # the token's text, not its id
    server.spoil = spoilt(logprobs=table, token_ids=None if named else ids)
    with refused("server-answer-unusable", server.url):
        draw(RemoteEngine(server.url, BASE), policy, max_new_tokens=6)


@pytest.mark.parametrize("value", [1e400, float("nan"), -1e400, 10**400, True, "-1", None, [-1.0], 0.5])
def test_invalid_logprobs_are_refused(policy: CausalLM, server: SmallServer, value: Any) -> None:
    server.spoil = spoilt(logprobs={"token_logprobs": [value]}, token_ids=[40])
    with refused("server-answer-unusable", server.url):
        draw(RemoteEngine(server.url, BASE), policy, max_new_tokens=6)


def test_token_ids_are_also_read_from_token_names(policy: CausalLM, server: SmallServer) -> None:
    expected = as_lists(draw(RemoteEngine(server.url, BASE), policy))
    server.spoil = spoilt(token_ids=None)
    assert as_lists(draw(RemoteEngine(server.url, BASE), policy)) == expected


# -- adapters ---------------------------------------------------------------------------------------------------------


def test_a_changed_adapter_is_sent_to_the_server(policy_folder: str, server: SmallServer, tmp_path: Path) -> None:
    model, engine = adapted(policy_folder), RemoteEngine(server.url, BASE, str(tmp_path / "adapters"))
    first = draw(engine, model)
    close(first.logprobs, scored(model, PROMPTS, first.ids, 0.9))
    assert as_lists(draw(engine, model)) == as_lists(first)
    assert len(server.bodies("/v1/load_lora_adapter")) == 1 and not server.bodies("/v1/unload_lora_adapter")
    change(model, 2)
    second = draw(engine, model)
    assert as_lists(second) != as_lists(first)
    close(second.logprobs, scored(model, PROMPTS, second.ids, 0.9))
    old = server.bodies("/v1/load_lora_adapter")[0]["lora_name"]
    assert [body["lora_name"] for body in server.bodies("/v1/unload_lora_adapter")] == [old]
    assert old not in server.models and len(list((tmp_path / "adapters").iterdir())) == 1
    with model.as_reference():
        reference = draw(engine, model)
        close(reference.logprobs, scored(model, PROMPTS, reference.ids, 0.9))
    assert server.bodies()[-1]["model"] == BASE


def test_weights_that_cannot_be_synced_are_refused(policy_folder: str, server: SmallServer, tmp_path: Path) -> None:
    with refused("no-shared-folder", "train an adapter (lora)"):
        draw(RemoteEngine(server.url, BASE), load_policy(policy_folder))
    with refused("no-shared-folder", "shared_folder", "that the server reads too"):
        draw(RemoteEngine(server.url, BASE), adapted(policy_folder))
    with refused("no-server-folder", "rlhf serve-vllm MODEL --folder"):
        draw(RemoteEngine(server.url, BASE, str(tmp_path)), load_policy(policy_folder))


def test_adapter_versions_stay_registered_while_needed(policy_folder: str, server: SmallServer, tmp_path: Path) -> None:
    model, engine = adapted(policy_folder), RemoteEngine(server.url, BASE, str(tmp_path / "adapters"))
    engine.prepare(policy_folder, LoadSettings(), LoraSettings(r=4), versions=3)
    for seed in range(4):
        change(model, seed)
        draw(engine, model)
        change(model, 0)
        draw(engine, model)  # the first version again, which is still there
    loaded = [body["lora_name"] for body in server.bodies("/v1/load_lora_adapter")]
    assert len(loaded) == 5 and len(server.models) == 4  # three versions and the backbone
    assert [body["lora_name"] for body in server.bodies("/v1/unload_lora_adapter")] == loaded[:2]


# -- full weights, and the probe --------------------------------------------------------------------------------------


def nudge(model: CausalLM, size: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def test_full_weights_are_synced_with_an_untied_head(tied: tuple[CausalLM, Path]) -> None:
    model, folder = tied
    with serving(str(folder)) as server:
        engine = RemoteEngine(server.url, BASE, str(folder))
        for _ in range(2):
            drawn = draw(engine, model)
            close(drawn.logprobs, scored(model, PROMPTS, drawn.ids, 0.9))
            assert engine.sync_error is not None and engine.sync_error < 1e-4
            nudge(model)
        draw(engine, model)
        draw(engine, model)
        assert len(server.bodies("/collective_rpc")) == 3  # the last sample used the previous weights
        order = [route for route, _ in server.requests if route in ("/pause", "/collective_rpc", "/resume")]
        assert order[:3] == ["/pause", "/collective_rpc", "/resume"]
        with refused("server-holds-policy", "a frozen model was to be sampled from"):
            draw(engine, load_policy(str(folder)).requires_grad_(False))


@pytest.mark.parametrize("size", [1e-4, 0.05])
def test_a_server_with_stale_weights_is_detected(tied: tuple[CausalLM, Path], size: float) -> None:
    """The probe detects an update of any size, even if the log-probabilities differ by far less than its bound."""
    model, folder = tied
    with serving(str(folder)) as server:
        engine = RemoteEngine(server.url, BASE, str(folder), sync_bound=10.0)
        draw(engine, model)
        server.deaf = True
        nudge(model, size)
        with refused("stale-server", "answers with the weights before the last update"):
            draw(engine, model)


def test_a_stale_adapter_or_another_model_is_detected(policy_folder: str, server: SmallServer, tmp_path: Path) -> None:
    model, engine = adapted(policy_folder), RemoteEngine(server.url, BASE, str(tmp_path / "adapters"))
    draw(engine, model)
    server.deaf = True
    change(model, 2)
    with refused("stale-server", "weights before"):
        draw(engine, model)
    with serving(policy_folder, noise=0.3) as other:
        with refused("server-disagrees", "bound 0.05", "another model"):
            draw(RemoteEngine(other.url, BASE, str(tmp_path / "more")), model)
        assert draw(RemoteEngine(other.url, BASE, str(tmp_path / "more"), sync_bound=None), model).ids


@pytest.mark.parametrize(
    "choices",
    [
        [], [(0, "token_id:7")], [(0, "token_id:7"), (2, "token_id:7")], [(0, "token_id:7"), (-1, "token_id:7")],
        [(0, "token_id:7"), (1, "7")], [(0, "token_id:7"), (1, "token_id:90")],
        [(0, "token_id:7"), (1e400, "token_id:7")],
    ],
)  # fmt: skip
def test_an_incomplete_probe_response_is_refused(choices: list[tuple[Any, str]]) -> None:
    answer = {"choices": [{"index": at, "logprobs": {"top_logprobs": [{name: -1.0}]}} for at, name in choices]}
    server: Any = SimpleNamespace(url="http://host", shown=str)
    with refused("server-answer-unusable", "http://host answered the probe"):
        Probe(0.1, sequences=2).read(server, answer, torch.zeros(2, 3), 90)


# -- servers that know text alone -------------------------------------------------------------------------------------


def check_text_server(url: str, name: str, policy: CausalLM, folder: str) -> None:
    """Check that a server's greedy completions and the log-probabilities of its samples equal the policy's."""
    engine = RemoteEngine(url, name, tokenizer=folder, requests=2, timeout=60)
    greedy = draw(engine, policy, (EOS,), temperature=0.0)
    expected = draw(SlotEngine(), policy, (EOS,), temperature=0.0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    said = [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected.ids]
    assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in greedy.ids] == said
    drawn = draw(engine, policy, (EOS,))
    close(drawn.logprobs, scored(policy, PROMPTS, drawn.ids, 0.9))
    assert as_lists(drawn) != as_lists(greedy) and not engine.reports_logprobs


def test_a_server_that_takes_text_prompts_works(policy: CausalLM, policy_folder: str) -> None:
    with serving(policy_folder, text=True) as server:
        check_text_server(server.url, BASE, policy, policy_folder)


def test_a_prompt_whose_text_tokenizes_differently_is_refused(policy: CausalLM, policy_folder: str) -> None:
    with serving(policy_folder, text=True) as server:
        engine = RemoteEngine(server.url, BASE, tokenizer=policy_folder)
        engine.tokenizer.add_tokens(["w40 w41"])  # type: ignore[union-attr]
        with refused("prompt-text-differs", "to other tokens"):
            engine.sample(policy, [torch.tensor([40, 41])], EPISODES[:1], SamplingSettings(2), 0, (EOS,))


@pytest.mark.drill
def test_a_transformers_server_works(policy: CausalLM, policy_folder: str) -> None:
    """Use ``transformers serve`` if its packages are installed, here or at RLHF_SERVE_PYTHON; otherwise an equivalent
    small server.
    """
    python = os.environ.get("RLHF_SERVE_PYTHON") or (sys.executable if is_serve_available() else None)
    command = None if python is None else shutil.which("transformers", path=str(Path(python).parent))
    if command is None:
        with serving(policy_folder, text=True) as server:
            check_text_server(server.url, BASE, policy, policy_folder)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    where = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    process = subprocess.Popen([command, "serve", policy_folder, *where])
    try:
        url, limit = f"http://127.0.0.1:{port}", time.monotonic() + 300
        while process.poll() is None and time.monotonic() < limit:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        check_text_server(url, policy_folder, policy, policy_folder)
    finally:
        process.terminate()
        process.wait(30)


# -- configuration ----------------------------------------------------------------------------------------------------


def test_engines_load_from_class_path_and_init_args() -> None:
    path = "rlhf_lightning.sampling.remote_engine.RemoteEngine"
    made = load_engine({"class_path": path, "init_args": {"url": "http://host:8000/v1", "model": "m"}})
    assert isinstance(made, RemoteEngine) and made.servers[0].url == "http://host:8000"
    assert isinstance(load_engine(None), SlotEngine) and load_engine(made) is made
    assert isinstance(load_engine("GenerateEngine"), GenerateEngine)
    with refused("wrong-arguments", "missing a required argument: 'model'"):
        load_engine({"class_path": path, "init_args": {"url": "x"}})
    with refused("wrong-kind", "SamplingEngine"):
        load_engine({"class_path": "pathlib.Path"})
    with refused("setting-out-of-range", "requests is 0: it must be at least 1"):
        RemoteEngine("x", "m", requests=0)
