"""API keys stay in the environment: they appear in no file, no output line and no connection."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from score_server import ScoreServer
from small_server import BASE, serving

from rlhf_lightning.cli import main as rlhf

CANARY = "canary7f3a"
"""Part of every key."""

KEYS = {
    "HF_TOKEN": f"hf_{CANARY}hub", "OPENAI_API_KEY": f"sk-{CANARY}openai", "VLLM_API_KEY": f"{CANARY}vllm",
    "JUDGE_API_KEY": f"{CANARY}judge", "ANTHROPIC_API_KEY": f"{CANARY}other", "AWS_SECRET_ACCESS_KEY": f"{CANARY}aws",
}  # fmt: skip


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, key in KEYS.items():
        monkeypatch.setenv(name, key)


@pytest.fixture
def judge() -> Iterator[ScoreServer]:
    server = ScoreServer()
    server.start()
    yield server
    server.kill()


def config_of(policy: str, server: str, judge: str, **settings: Any) -> list[str]:
    """Return a config whose sampling engine and scorer are remote, each with a key."""
    Path("rows.jsonl").write_text('{"prompt": "a question"}\n' * 4)
    engine = {"class_path": "rlhf_lightning.sampling.remote_engine.RemoteEngine",
              "init_args": {"url": server, "model": BASE, "shared_folder": "adapters", "api_key": "VLLM_API_KEY",
                            "retries": 0}}  # fmt: skip
    scorer = {
        "class_path": "rlhf_lightning.scoring.RemoteScorer",
        "init_args": {"url": judge, "api_key": "JUDGE_API_KEY", "retries": 0},
    }
    arguments = {"init_from": policy, "engine": engine, "scorer": scorer, "max_new_tokens": 3,
                 "sampler_correction": "token_truncate",
                 "lora": {"r": 2}, **settings}  # fmt: skip
    data = {"source": "rows.jsonl", "samples_per_prompt": 2, "batch_size": 4, "rollouts": 2}
    config = {"model": {"class_path": "GRPOModule", "init_args": arguments},
              "data": {"class_path": "PromptDataModule", "init_args": data}}  # fmt: skip
    Path("grpo.yaml").write_text(json.dumps(config))
    return ["fit", "--config", "grpo.yaml", "--checkpoint.every_n_rollouts", "1"]


def files_with_keys(folder: Path) -> list[str]:
    found = [path for path in folder.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]
    return [str(path) for path in found]


def test_api_keys_reach_neither_files_nor_output(
    policy_folder: str, judge: ScoreServer, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with serving(policy_folder) as server:
        assert rlhf(config_of(policy_folder, server.url, judge.url)) == 0
        assert server.authorization == f"Bearer {KEYS['VLLM_API_KEY']}"  # type: ignore[attr-defined]
    run = tmp_path / "runs" / "grpo" / "version_0"
    for name in ("config.yaml", "manifest.json", "hparams.yaml", "samples.jsonl", "checkpoints/last.ckpt", "model"):
        assert (run / name).exists()
    assert "JUDGE_API_KEY" in (run / "config.yaml").read_text(), "the name of the variable is what is kept"
    said = capfd.readouterr()
    assert CANARY not in said.out + said.err and not files_with_keys(tmp_path)


def test_api_keys_do_not_appear_in_error_messages(
    policy_folder: str, judge: ScoreServer, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The judge refuses, and repeats the key of the request."""
    with serving(policy_folder) as server:
        command = config_of(policy_folder, server.url, judge.url)
        config = json.loads(Path("grpo.yaml").read_text())
        config["model"]["init_args"]["scorer"]["init_args"]["url"] = judge.url + "?refuse"
        Path("grpo.yaml").write_text(json.dumps(config))
        assert rlhf(command) == 1
    said = capfd.readouterr()
    assert "refused with status 401" in said.err and "Bearer ***" in said.err
    assert CANARY not in said.out + said.err and not files_with_keys(tmp_path)
    status = json.loads((tmp_path / "runs/grpo/version_0/manifest.json").read_text())["sessions"][0]["status"]
    assert status.startswith("ServerError")


@pytest.mark.parametrize("by", ["engine", "scorer"])
@pytest.mark.parametrize("place", ["api_key", "url"])
def test_a_key_given_as_its_variable_name_is_refused_before_any_file_is_written(
    place: str, by: str, policy_folder: str, judge: ScoreServer, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = config_of(policy_folder, "http://127.0.0.1:9", judge.url)
    config = json.loads(Path("grpo.yaml").read_text())
    for part in ("engine", "scorer"):
        value = KEYS["OPENAI_API_KEY"] if place == "api_key" else f"http://user:{CANARY}@127.0.0.1:9"
        config["model"]["init_args"][part]["init_args"][place] = value
    del config["model"]["init_args"]["engine" if by == "scorer" else "scorer"]
    config["model"]["init_args"].setdefault("scorer", "RepetitionPenalty")
    Path("grpo.yaml").write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        rlhf(command)
    said = capfd.readouterr()
    assert CANARY not in said.out + said.err and f"rlhf fit: model.{by}.{place} " in said.err
    assert files_with_keys(tmp_path) == [str(tmp_path / "grpo.yaml")]


def test_a_local_run_opens_no_network_connection(
    policy_folder: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With the Hub allowed and local models and data: no telemetry and no look-ups."""
    opened: list[Any] = []

    def refuse(*arguments: Any, **_: Any) -> Any:
        opened.append(arguments)
        raise OSError("no connection is to be opened")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    Path("pairs.jsonl").write_text(
        "".join(json.dumps({"prompt": f"a{n}", "chosen": "b", "rejected": "c"}) + "\n" for n in range(8))
    )
    common = ["--data.source", "pairs.jsonl", "--data.batch_size", "4", "--data.eval_rows", "2"]
    assert rlhf(["fit", "--model", "DPOModule", "--model.init_from", policy_folder, "--data", "PreferenceDataModule",
                 *common]) == 0  # fmt: skip
    ppo = ["--model", "PPOModule", "--model.scorer", "RepetitionPenalty", "--model.max_new_tokens", "3"]
    assert rlhf(["fit", *ppo, "--model.init_from", policy_folder, "--data", "PromptDataModule", *common]) == 0
    assert rlhf(["export", "runs/dpo", "--out", "exported"]) == 0
    assert rlhf(["generate", "--model", "exported", "--prompts", "pairs.jsonl", "--out", "answers.jsonl",
                 "--max-new-tokens", "3"]) == 0  # fmt: skip
    assert not opened
