"""Test rollouts sampled several versions ahead: their policy, bit-identical resume, and resampling by a new worker."""

import json
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import refused
from small_server import BASE, serving, started_worker
from tiny_models import MetricsLog, quiet_trainer, weights_of
from torch import Tensor
from transformers import AutoTokenizer

from rlhf_lightning import modules
from rlhf_lightning.commands import rollout_worker
from rlhf_lightning.data import PromptDataModule
from rlhf_lightning.models.lora import LoraSettings
from rlhf_lightning.models.roles import load_policy
from rlhf_lightning.sampling import worker_engine, worker_process
from rlhf_lightning.sampling.hand_over import write_server_folder
from rlhf_lightning.sampling.own_logprobs import scored
from rlhf_lightning.sampling.remote_engine import RemoteEngine
from rlhf_lightning.sampling.worker_engine import WorkerEngine
from rlhf_lightning.types import Rollout

ROLLOUTS = 5


def lengths(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


class Recorded(modules.GRPOModule):
    """Records each rollout and the weights at its update."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.versions: list[dict[str, Tensor]] = []
        self.seen: list[Rollout] = []

    def learn(self, rollout: Rollout, batch: Any, meter: Any) -> float:
        self.versions.append({name: value.clone() for name, value in weights_of(self).items()})
        self.seen.append(rollout)
        return super().learn(rollout, batch, meter)


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": "say " + "abc" * n}) + "\n" for n in range(7)))
    return str(path)


def module_of(folder: str, **changes: Any) -> Recorded:
    settings = {"max_new_tokens": 6, "learning_rate": 1e-2, "lr_schedule": "constant", "kl_coef": 0.0, **changes}
    return Recorded(init_from=folder, scorer=lengths, **settings)


def data_of(prompts: str, tmp_path: Path, **changes: Any) -> PromptDataModule:
    settings = {"batch_size": 4, "samples_per_prompt": 2, "rollouts": ROLLOUTS, "cache_dir": str(tmp_path / "cache")}
    return PromptDataModule(prompts, **{**settings, **changes})


class Stop(pl.Callback):
    """Saves a checkpoint after some rollouts and ends the run there."""

    def __init__(self, rollouts: int, path: Path) -> None:
        self.rollouts, self.path = rollouts, path

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        if module.rollouts == self.rollouts:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def train(module: Recorded, data: PromptDataModule, callbacks: Any = (), ckpt_path: Any = None) -> Recorded:
    trainer = quiet_trainer(callbacks=list(callbacks))
    trainer.fit(module, data, ckpt_path=None if ckpt_path is None else str(ckpt_path))
    return module


def check_equal(one: Recorded, other: Recorded) -> None:
    """Check that two runs ended with the same bits."""
    for name, value in weights_of(one).items():
        assert torch.equal(value, weights_of(other)[name]), name


def check_versions(module: Recorded, lag: int) -> None:
    """Check that each rollout was sampled with the weights of ``lag`` rollouts earlier, not with those at its
    update.
    """
    assert len(module.seen) == ROLLOUTS
    for number, rollout in enumerate(module.seen):
        for version in {max(0, number - lag), number}:
            module.load_state_dict(module.versions[version], strict=False)
            own = scored(module.policy, rollout.sequences.prompts, rollout.sequences.completions, 1.0)
            gap = max(
                float((own[row] - rollout.behaviour_logprobs[row, : len(own[row])]).abs().max()) for row in range(4)
            )
            assert (gap < 1e-4) == (version == max(0, number - lag))


def test_rollouts_are_sampled_lag_versions_earlier(policy_folder: str, prompts: str, tmp_path: Path) -> None:
    module = train(module_of(policy_folder, lag=2, sampler_correction="token_truncate"), data_of(prompts, tmp_path))
    check_versions(module, 2)


@pytest.mark.parametrize("lora", [None, LoraSettings(r=4)])
def test_a_server_samples_ahead_with_the_current_weights(
    policy_folder: str, prompts: str, tmp_path: Path, lora: LoraSettings | None
) -> None:
    folder = tmp_path / "shared"
    if lora is None:
        policy = load_policy(policy_folder)
        write_server_folder(policy.model, AutoTokenizer.from_pretrained(policy_folder), folder)
    with serving(policy_folder if lora else str(folder)) as server:
        engine = RemoteEngine(server.url, BASE, str(folder))
        given = {"lag": 1, "engine": engine, "lora": lora, "sampler_correction": "sequence_truncate"}
        log = MetricsLog()
        module = train(module_of(policy_folder, **given), data_of(prompts, tmp_path), [log])
        assert log.rows[1]["invariant/sync_error"] < 1e-4 < log.rows[-1]["rollout/sampler_kl"]
        if lora:
            assert len(server.models) == 3  # two versions, and the backbone
    check_versions(module, 1)


def test_a_lagged_run_resumes_bit_identically(policy_folder: str, prompts: str, tmp_path: Path) -> None:
    settings = {"lag": 2, "sampler_correction": "sequence_truncate"}
    whole = train(module_of(policy_folder, **settings), data_of(prompts, tmp_path))
    path = tmp_path / "middle.ckpt"
    train(module_of(policy_folder, **settings), data_of(prompts, tmp_path), [Stop(2, path)])
    resumed = train(module_of(policy_folder, **settings), data_of(prompts, tmp_path), ckpt_path=path)
    assert len(resumed.seen) == ROLLOUTS - 2
    check_equal(whole, resumed)


class Kill(pl.Callback):
    """Kills the engine's worker while it samples a later rollout."""

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        if module.rollouts == 1:
            module.engine.workers[0].process.kill()


@pytest.mark.slow
def test_episodes_of_a_killed_worker_are_sampled_again(policy_folder: str, prompts: str, tmp_path: Path) -> None:
    settings = {"lag": 1, "sampler_correction": "token_truncate"}
    here = train(module_of(policy_folder, **settings), data_of(prompts, tmp_path))
    with pytest.warns(UserWarning, match="ended with status -9; a new one draws its episodes again"):
        there = train(module_of(policy_folder, engine=WorkerEngine(), **settings), data_of(prompts, tmp_path), [Kill()])
    check_equal(here, there)


@pytest.mark.slow
def test_workers_split_the_prompts_and_report_failures(policy_folder: str, prompts: str, tmp_path: Path) -> None:
    whole = train(module_of(policy_folder), data_of(prompts, tmp_path, rollouts=1))
    shared = train(module_of(policy_folder, engine=WorkerEngine(workers=2)), data_of(prompts, tmp_path, rollouts=1))
    for one, other in zip(whole.seen, shared.seen, strict=True):
        assert torch.equal(one.behaviour_logprobs.round(decimals=4), other.behaviour_logprobs.round(decimals=4))
    engine = WorkerEngine(device="nowhere")
    with refused("worker-failed", "a rollout worker", "failed: RuntimeError", "nowhere"):
        train(module_of(policy_folder, engine=engine), data_of(prompts, tmp_path, rollouts=1))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the times that trainer and worker wait for each other."""
    monkeypatch.setattr(rollout_worker, "HOLD_SECONDS", 0.001)  # so that trainers ask again
    monkeypatch.setattr(worker_engine, "ABSENT_SECONDS", 0.1)
    server = worker_engine.JSONServer
    monkeypatch.setattr(worker_engine, "JSONServer", lambda *args, **given: server(*args, **given, wait=0.01))


@pytest.mark.parametrize("lora", [None, LoraSettings(r=4)])
def test_a_worker_at_an_address_samples_the_same_episodes(
    policy_folder: str, prompts: str, tmp_path: Path, lora: LoraSettings | None, impatient: None, monkeypatch: Any
) -> None:
    settings = {"lag": 1, "sampler_correction": "token_truncate", "lora": lora}
    here = train(module_of(policy_folder, **settings), data_of(prompts, tmp_path))
    monkeypatch.setenv("WORKER_KEY", "k" * 20)
    folder = tmp_path / "shared"
    with started_worker(folder, "k" * 20) as address:
        engine = WorkerEngine(addresses=[address], shared_folder=str(folder), api_key="WORKER_KEY")
        there = train(module_of(policy_folder, engine=engine, **settings), data_of(prompts, tmp_path))
        check_equal(here, there)
        assert [path.suffix for path in folder.rglob("*") if path.is_file()] == []
        # The same worker serves a second run, with other trained weights and without a key.
        unkeyed = WorkerEngine(addresses=[address], shared_folder=str(folder))
        with refused("server-refused", "status 401", "API key"):
            train(module_of(policy_folder, engine=unkeyed, **settings), data_of(prompts, tmp_path))
        engine = WorkerEngine(addresses=[address], shared_folder=str(folder), api_key="WORKER_KEY")
        check_equal(here, train(module_of(policy_folder, engine=engine, **settings), data_of(prompts, tmp_path)))


def test_a_worker_loads_the_policy_again_only_if_weights_must_be_reset(
    policy_folder: str, prompts: str, tmp_path: Path, impatient: None, monkeypatch: Any
) -> None:
    loaded: list[str] = []
    load = worker_process.load_policy
    monkeypatch.setattr(worker_process, "load_policy", lambda *given: (loaded.append(given[0]), load(*given))[1])

    class TrainsEmbeddings(Recorded):
        def load_models(self) -> None:
            super().load_models()
            self.policy.model.model.layers.requires_grad_(False)

    settings = {"init_from": policy_folder, "scorer": lengths, "max_new_tokens": 6, "kl_coef": 0.0, "ppo_epochs": 1}
    with started_worker(tmp_path / "shared") as address:
        for kind, loads in ((Recorded, 1), (Recorded, 1), (TrainsEmbeddings, 2), (TrainsEmbeddings, 2), (Recorded, 2)):
            engine = WorkerEngine(addresses=[address], shared_folder=str(tmp_path / "shared"))
            data = data_of(prompts, tmp_path, rollouts=2)
            check_equal(train(kind(engine=engine, **settings), data), train(kind(**settings), data))
            assert len(loaded) == loads


def test_a_silent_address_is_left_out_until_it_answers(
    policy_folder: str, prompts: str, tmp_path: Path, impatient: None
) -> None:
    settings = {"lag": 1, "sampler_correction": "token_truncate"}

    def trained(*addresses: str) -> Recorded:
        engine = WorkerEngine(addresses=list(addresses), shared_folder=str(tmp_path / "shared"))
        return train(module_of(policy_folder, engine=engine, **settings), data_of(prompts, tmp_path))

    with started_worker(tmp_path / "shared") as silent:
        pass
    with started_worker(tmp_path / "shared") as address:
        both = trained(address, address)
        with pytest.warns(UserWarning, match="gave no answer in 3 attempts.*the next free worker draws its episodes"):
            check_equal(both, trained(silent, address))
    engine = WorkerEngine(addresses=[silent, silent], shared_folder=str(tmp_path / "shared"), timeout=3.0)
    with pytest.warns(UserWarning), refused("workers-late", "within 3 s", f"{silent}/sample gave no answer"):
        train(module_of(policy_folder, engine=engine, **settings), data_of(prompts, tmp_path))


@pytest.mark.slow
def test_a_worker_that_hangs_ends_the_run_at_the_time_limit(policy_folder: str, prompts: str, tmp_path: Path) -> None:
    engine = WorkerEngine(timeout=0.01)
    with refused("workers-late", "they are still sampling", "raise the engine's timeout"):
        train(module_of(policy_folder, engine=engine), data_of(prompts, tmp_path, rollouts=1))
    assert engine.workers[0].process.wait(30) == -9


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"workers": 0}, "setting-out-of-range"),
        ({"timeout": 0.0}, "setting-out-of-range"),
        ({"addresses": ["http://a:1"], "shared_folder": "x", "device": "cpu"}, "workers-and-addresses"),
        ({"addresses": ["http://a:1"]}, "no-shared-folder"),
        ({"addresses": [], "shared_folder": "x"}, "no-shared-folder"),
        ({"shared_folder": "x"}, "no-shared-folder"),
        ({"addresses": ["a:1"], "shared_folder": "x"}, "invalid-url"),
    ],
)
def test_invalid_worker_settings_are_refused(settings: dict[str, Any], code: str) -> None:
    with refused(code):
        WorkerEngine(**settings)


@pytest.mark.parametrize(
    ("settings", "data", "code"),
    [
        ({"reuse_behaviour_logprobs": True}, {}, "lag-reuses-logprobs"),
        ({"dynamic_sampling": True}, {}, "lag-needs-plain-sampling"),
        ({"baseline": "greedy"}, {}, "lag-needs-plain-sampling"),
        ({}, {"candidate_rounds": 2}, "lag-without-prompts"),
    ],
)
def test_settings_incompatible_with_lag_are_refused(
    policy_folder: str, prompts: str, tmp_path: Path, settings: Any, data: Any, code: str
) -> None:
    with refused(code, "lag"):
        train(module_of(policy_folder, lag=1, **settings), data_of(prompts, tmp_path, **data))


def test_lag_without_a_correction_warns(policy_folder: str, prompts: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="lag is 1, but nothing corrects"):
        train(module_of(policy_folder, lag=1), data_of(prompts, tmp_path, rollouts=1))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "lag is")
        train(
            module_of(policy_folder, lag=1, sampler_correction="token_truncate"), data_of(prompts, tmp_path, rollouts=1)
        )


def test_a_rollout_without_updates_is_not_an_error(policy_folder: str, prompts: str, tmp_path: Path) -> None:
    class LearnsOnce(Recorded):
        def learn(self, rollout: Rollout, batch: Any, meter: Any) -> float:
            return super().learn(rollout, batch, meter) if self.rollouts == 0 else 0.0

    settings = {"max_new_tokens": 6, "lr_schedule": "constant", "kl_coef": 0.0, "ppo_epochs": 1}
    module = train(LearnsOnce(init_from=policy_folder, scorer=lengths, **settings), data_of(prompts, tmp_path))
    assert module.rollouts == ROLLOUTS and module.updates == 1
