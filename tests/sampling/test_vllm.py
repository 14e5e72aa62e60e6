"""Test a real vLLM server: its log-probabilities, both ways to sync weights, and the errors that the probe detects."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from conftest import refused, smollm2_folder
from gloo_link import GlooEngine
from tiny_models import EOS, random_rows, save_policy

from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.loading import LoadSettings
from rlhf_lightning.models.lora import LoraSettings
from rlhf_lightning.models.roles import load_policy
from rlhf_lightning.sampling.engines import Completions, SamplingSettings
from rlhf_lightning.sampling.json_server import ServerError
from rlhf_lightning.sampling.own_logprobs import scored
from rlhf_lightning.sampling.remote_engine import RemoteEngine

PYTHON = os.environ.get("RLHF_VLLM_PYTHON", "")
TESTS = Path(__file__).resolve().parents[1]
PROMPTS = [torch.tensor(prompt) for prompt, _ in random_rows(9, seed=5, prompt=9)]
EPISODES = torch.arange(20, 29)

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON, reason="RLHF_VLLM_PYTHON names no interpreter: make test-vllm"),
]


@contextmanager
def serving(model: str, *flags: str, log: Path, python: str = PYTHON, cpu: bool = True) -> Iterator[str]:
    """Start ``rlhf serve-vllm`` on a free port; return the address when it responds."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "rlhf_lightning", "serve-vllm", model, "--port", str(port), "--python", python]
    command += ["--cpu", "true", "--threads", "1"] if cpu else []
    with log.open("w") as out:
        process = subprocess.Popen([*command, *flags], stdout=out, stderr=out, process_group=0)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2).read()
                break
            except OSError:
                time.sleep(1)
        yield url
    finally:
        os.killpg(process.pid, 15)
        process.wait(60)


def draw(engine: RemoteEngine, model: CausalLM, **settings: Any) -> Completions:
    chosen = SamplingSettings(**({"max_new_tokens": 12, "temperature": 0.9} | settings))
    return engine.sample(model, PROMPTS, EPISODES, chosen, 7, [EOS])


def gap(model: CausalLM, drawn: Completions) -> float:
    """Return the largest difference between the server's and the policy's log-probabilities."""
    own = scored(model, PROMPTS, drawn.ids, 0.9)
    return max(float((one - other).abs().max()) for one, other in zip(drawn.logprobs, own, strict=True))


def move(model: CausalLM, size: float) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("lora" not in name or "lora_B" in name):
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def test_vllm_samples_and_syncs_an_adapter(tmp_path: Path) -> None:
    folder = save_policy(tmp_path / "policy", hidden_size=64)
    model = load_policy(folder, lora=LoraSettings(r=4))
    with serving(folder, "--versions", "3", log=tmp_path / "server.log") as url:
        engine = RemoteEngine(url, "policy", str(tmp_path / "shared"))
        engine.prepare(folder, LoadSettings(), LoraSettings(r=4), versions=2)
        for version in range(4):
            first = draw(engine, model)
            assert gap(model, first) < 1e-4
            assert engine.sync_error is not None and engine.sync_error < 1e-4
            again = draw(engine, model)
            assert [ids.tolist() for ids in again.ids] == [ids.tolist() for ids in first.ids]
            print(f"adapter version {version}: {gap(model, first):.2e}, probe {engine.sync_error:.2e}")
            move(model, 0.1)
        served = urllib.request.urlopen(f"{url}/v1/models").read().decode()
        assert served.count("rlhf-default-") >= 2 and served.count('"id":"rlhf-default-') == 2
        adapters = engine.adapters
        assert adapters is not None
        hand_over = adapters.hand_over
        adapters.hand_over = lambda *given: (hand_over_name, True)  # type: ignore[method-assign]
        hand_over_name = adapters.loaded["default"][-1][1]  # planted: the version before
        with refused("stale-server", "weights before the last update"):
            draw(engine, model)
        adapters.hand_over = hand_over  # type: ignore[method-assign]


@pytest.mark.parametrize("tied", [False, True])
def test_vllm_samples_and_syncs_full_weights(tmp_path: Path, tied: bool) -> None:
    folder, shared = save_policy(tmp_path / "policy", hidden_size=64, tie_word_embeddings=tied), tmp_path / "shared"
    model = load_policy(folder)
    ties = model.model.get_output_embeddings().weight is model.model.get_input_embeddings().weight
    assert ties == tied
    with serving(folder, "--folder", str(shared), log=tmp_path / "server.log") as url:
        engine = RemoteEngine(url, "policy", str(shared))
        for version in range(3):
            started = time.monotonic()
            drawn = draw(engine, model)
            took = time.monotonic() - started
            assert gap(model, drawn) < 1e-4 and engine.sync_error is not None and engine.sync_error < 1e-4
            print(f"full, tied {tied}, version {version}: {gap(model, drawn):.2e}, {took:.1f} s")
            move(model, 0.05)
        assert engine.weights is not None
        post = engine.servers[0].post
        engine.servers[0].post = lambda route, body: (  # type: ignore[method-assign]
            {} if route == "/collective_rpc" else post(route, body)
        )
        with refused("stale-server", "weights before the last update"):
            draw(engine, model)


@pytest.mark.parametrize("tied", [False, True])
def test_vllm_receives_streamed_weights(tmp_path: Path, tied: bool) -> None:
    """vLLM's own routes and reload, with gloo in place of NCCL, which has no CPU version."""
    folder = save_policy(tmp_path / "policy", hidden_size=64, tie_word_embeddings=tied)
    model, python = load_policy(folder), tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={TESTS / "vllm_gloo"} exec {PYTHON} "$@"\n')
    python.chmod(0o755)
    flags = ["--transfer", "nccl", "--arguments=--worker-extension-cls gloo_weights.Extension"]
    with serving(folder, *flags, log=tmp_path / "server.log", python=str(python)) as url:
        engine = GlooEngine(url, "policy")
        for version in range(4):
            if version == 3:
                engine = GlooEngine(url, "policy")  # as of a resumed run
            started = time.monotonic()
            drawn = draw(engine, model)
            took = time.monotonic() - started
            print(f"streamed, tied {tied}, version {version}: {gap(model, drawn):.2e}, {took:.1f} s")
            assert gap(model, drawn) < 1e-4
            move(model, 0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("transfer", ["nccl", "ipc"])
def test_vllm_receives_weights_from_gpu_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transfer: Literal["nccl", "ipc"]
) -> None:
    needed = {"nccl": 2, "ipc": 1}[transfer]
    if torch.cuda.device_count() < needed:
        pytest.skip(f"{transfer} needs {needed} GPU(s)")
    folder = save_policy(tmp_path / "policy", hidden_size=64)
    model, asleep = load_policy(folder).to("cuda:0"), transfer == "ipc"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", str(needed - 1))
    flags = ["--transfer", transfer, "--sleep", str(asleep).lower(), "--arguments=--gpu-memory-utilization 0.3"]
    with serving(folder, *flags, log=tmp_path / "server.log", cpu=False) as url:
        engine = RemoteEngine(url, "policy", transfer=transfer, sleep=asleep)
        for _ in range(3):
            drawn = draw(engine, model)
            assert gap(model, drawn) < 1e-3 and engine.sync_error is not None and engine.sync_error < 1e-3
            move(model, 0.05)


@pytest.mark.real
@pytest.mark.parametrize("untied", [True, False])
def test_vllm_serves_smollm2_with_tied_and_untied_head(tmp_path: Path, untied: bool) -> None:
    """A server started without ``--folder`` ties the head: it reloads the head, or the run stops."""
    folder = tmp_path / "policy"
    shutil.copytree(smollm2_folder(), folder)
    model = load_policy(str(folder), LoadSettings(self_check=False))
    shared = tmp_path / "shared" if untied else folder
    with serving(str(folder), *(["--folder", str(shared)] if untied else []), log=tmp_path / "server.log") as url:
        engine = RemoteEngine(url, "policy", str(shared), timeout=1200)
        drawn = draw(engine, model)
        print(f"SmolLM2, untied {untied}: {gap(model, drawn):.2e}, probe {engine.sync_error:.2e}")
        assert gap(model, drawn) < 1e-3
        with torch.no_grad():
            model.model.get_output_embeddings().weight.mul_(1.05)
        started = time.monotonic()
        try:
            drawn = draw(engine, model)
            print(f"SmolLM2 after an update: {gap(model, drawn):.2e}, probe {engine.sync_error:.2e}")
            assert gap(model, drawn) < 1e-3
        except ServerError as refusal:  # a tied head may be stale, but this must be detected
            assert not untied and refusal.code in ("server-disagrees", "stale-server")
            print(refusal)
        print(f"hand-over, probe and rollout: {time.monotonic() - started:.1f} s")
