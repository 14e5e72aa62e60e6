"""Test `rlhf rollout-worker`: who may use it, and which files and models it opens."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from starlette.testclient import TestClient

from rlhf_lightning.cli import main as rlhf
from rlhf_lightning.commands.rollout_worker import make_app
from rlhf_lightning.models.loading import LoadSettings
from rlhf_lightning.models.resolving import fingerprint
from rlhf_lightning.models.roles import load_policy
from rlhf_lightning.sampling.engines import SamplingSettings
from rlhf_lightning.sampling.slot_engine import sample
from rlhf_lightning.sampling.worker_process import JobRunner

SITE = "http://localhost:8100"
PROMPT = torch.tensor([7, 8, 9])


@pytest.fixture
def job(policy_folder: str, tmp_path: Path) -> dict[str, Any]:
    """Return a job that samples two completions with unchanged weights."""
    files = {name: str(tmp_path / f"{name}.safetensors") for name in ("weights", "prompts", "result")}
    save_file({}, files["weights"])
    given = {"ids": PROMPT.repeat(2), "counts": torch.tensor([3, 3]), "episodes": torch.tensor([0, 1])}
    given["starts"] = torch.zeros(2, dtype=torch.long)
    save_file(given, files["prompts"])
    loading = {"init_from": policy_folder, "settings": asdict(LoadSettings()), "lora": None, "device": "nowhere"}
    loading |= {"fingerprint": fingerprint(policy_folder), "run": "one"}
    settings = asdict(SamplingSettings(5))
    return {**files, "loading": loading, "settings": settings, "seed": 3, "ends": [1], "threads": 1, "autocast": None}


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    return TestClient(make_app(JobRunner(tmp_path, "cpu", ())), base_url=SITE)


def test_the_result_equals_own_samples(client: TestClient, job: dict[str, Any], policy_folder: str) -> None:
    from safetensors.torch import load_file

    assert client.get("/health").json() == {"status": "ok"}
    assert client.post("/sample", json=job).json() == {"done": True}
    own = sample(load_policy(policy_folder), [PROMPT] * 2, torch.arange(2), SamplingSettings(5), 3, [1])
    found = load_file(job["result"])
    assert torch.equal(found["ids"], torch.cat(own.ids)) and torch.equal(found["logprobs"], torch.cat(own.logprobs))


@pytest.mark.parametrize("name", ["weights", "prompts", "result"])
def test_files_outside_the_folder_are_refused(
    client: TestClient, job: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    outside = tmp_path_factory.mktemp("elsewhere") / "file.safetensors"
    link = Path(job[name]).with_name("link.safetensors")
    link.symlink_to(outside)
    for path in (outside, link, f"{Path(job[name]).parent}/../{outside.parent.name}/file.safetensors"):
        assert "outside of the worker's folder" in client.post("/sample", json={**job, name: str(path)}).json()["error"]
    assert not outside.exists()


def test_another_model_than_the_trainers_is_refused(client: TestClient, job: dict[str, Any]) -> None:
    changed = {**job, "loading": {**job["loading"], "fingerprint": "0"}}
    assert "has other weights on the worker's host" in client.post("/sample", json=changed).json()["error"]


def test_custom_code_needs_the_workers_consent(tmp_path: Path, job: dict[str, Any]) -> None:
    model = tmp_path / "custom"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}))
    (model / "own.py").write_text("raise SystemExit('executed')")
    settings = {**job["loading"]["settings"], "trust_remote_code": [str(model)]}
    answer = JobRunner(tmp_path, "cpu", ()).answer(
        {**job, "loading": {**job["loading"], "init_from": str(model), "settings": settings}}
    )
    assert "trust_remote_code" in answer["error"]


def test_malformed_jobs_get_an_error(client: TestClient, job: dict[str, Any]) -> None:
    for changed in ({}, {**job, "loading": 3}, {**job, "weights": 3}, {**job, "threads": 0}, {**job, "ends": None}):
        assert client.post("/sample", json=changed).json()["error"]
    assert client.post("/sample", content=b"[]", headers={"content-type": "application/json"}).status_code == 400


def test_only_trainers_with_access_may_send_jobs(tmp_path: Path, job: dict[str, Any]) -> None:
    client = TestClient(make_app(JobRunner(tmp_path, "cpu", ()), "secret" * 4), base_url=SITE)
    assert client.post("/sample", json=job).status_code == 401
    assert client.post("/sample", json=job, headers={"Authorization": "Bearer " + "secret" * 4}).json()["done"]
    local = TestClient(make_app(JobRunner(tmp_path, "cpu", ())), base_url="http://attacker.example:8100")
    assert local.post("/sample", json=job).status_code == 421


def test_rollout_worker_listens_on_the_loopback_unless_a_key_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Server:
        def run(self, sockets: Any) -> None:
            print(sockets[0].getsockname()[0])

    monkeypatch.setattr("rlhf_lightning.commands.web_server.make_server", lambda app: Server())
    argv = ["rollout-worker", str(tmp_path / "jobs"), "--port", "0", "--device", "cpu"]
    assert rlhf(argv) == 0 and (tmp_path / "jobs").is_dir()
    assert "rollout worker on cpu at http://127.0.0.1:" in (said := capsys.readouterr().out) and "\n127.0.0.1" in said
    assert rlhf([*argv, "--host", "0.0.0.0"]) == 1 and "--api_key" in capsys.readouterr().err
