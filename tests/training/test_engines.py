"""Train on samples of a server whose log-probabilities differ from the trainer's."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused
from small_server import BASE, serving
from tiny_models import MetricsLog, fit, prompt_step, random_rows, within

from rlhf_lightning import modules
from rlhf_lightning.models.lora import LoraSettings
from rlhf_lightning.sampling.generate_engine import GenerateEngine
from rlhf_lightning.sampling.remote_engine import RemoteEngine
from rlhf_lightning.sampling.slot_engine import SlotEngine
from rlhf_lightning.types import Loss, PolicyLogprobs

PROMPTS = [prompt for prompt, _ in random_rows(3, seed=4) for _ in range(2)]


def lengths(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def settings_of(folder: str, **changes: Any) -> dict[str, Any]:
    defaults = {"max_new_tokens": 8, "learning_rate": 1e-2, "lr_schedule": "constant"}
    return {"init_from": folder, "scorer": lengths, "lora": LoraSettings(r=4), **defaults, **changes}


class RecordedGRPO(modules.GRPOModule):
    """Records the inputs and outputs of each policy loss."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seen: list[tuple[PolicyLogprobs, torch.Tensor]] = []

    def policy_loss(self, logprobs: PolicyLogprobs) -> Any:
        loss = super().policy_loss(logprobs)
        self.seen.append((logprobs, loss.values if isinstance(loss, Loss) else loss))
        return loss


def step_of_groups() -> Any:
    step = prompt_step(PROMPTS)
    batch = step.micro_batches[0]
    return within([step._replace(micro_batches=(batch._replace(group=torch.arange(6) // 2),))], 6)[0]


def test_samples_of_a_server_are_weighted_by_its_logprobs(policy_folder: str, tmp_path: Path) -> None:
    with serving(policy_folder, noise=0.01) as server:
        engine = RemoteEngine(server.url, BASE, str(tmp_path / "adapters"), sync_bound=None)
        log = MetricsLog()
        module = RecordedGRPO(
            **settings_of(
                policy_folder, engine=engine, sampler_correction="token_truncate", sampler_high=1.05, kl_coef=0.0
            )
        )
        fit(module, [step_of_groups(), step_of_groups()], callbacks=[log])
        loaded = server.bodies("/v1/load_lora_adapter")
    assert len(loaded) == 2  # the second rollout is sampled from the adapter after the first update
    for logprobs, values in module.seen:
        mask, sampler = logprobs.completion_mask, logprobs.behaviour_logprobs
        assert sampler is not None
        ratio = (logprobs.old_logprobs - sampler).exp()
        assert float((ratio - 1)[mask].abs().max()) > 1e-3
        expected = -logprobs.advantages * ratio.clamp(max=1.05)
        torch.testing.assert_close(values[mask], expected[mask], atol=1e-5, rtol=1e-4)
        assert float(ratio[mask].max()) > 1.05 or float(ratio[mask].min()) < 0.95


class RecordedPPO(modules.PPOModule):
    """Records the inputs of each policy loss."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seen: list[PolicyLogprobs] = []

    def policy_loss(self, logprobs: PolicyLogprobs) -> Any:
        self.seen.append(logprobs)
        return super().policy_loss(logprobs)


@pytest.mark.parametrize(
    ("correction", "bounds"),
    [
        ("token_mask", {"sampler_low": 0.99, "sampler_high": 1.01}),
        ("geometric_mask", {"sampler_low": 0.9999, "sampler_high": 1.0001}),
        ("sequence_mask", {"sampler_high": 1.0}),
    ],
)
def test_ppo_trains_from_a_server_and_counts_masked_tokens(
    policy_folder: str, tmp_path: Path, correction: str, bounds: dict[str, float]
) -> None:
    with serving(policy_folder, noise=0.01) as server:
        engine = RemoteEngine(server.url, BASE, str(tmp_path / "adapters"), sync_bound=None)
        log = MetricsLog()
        module = RecordedPPO(**settings_of(policy_folder, engine=engine, sampler_correction=correction, **bounds))
        fit(module, [step_of_groups()], callbacks=[log])
    (row,), first = log.rows, module.seen[0]
    weight = module.sampler_weight(first)
    assert weight is not None and first.behaviour_logprobs is not None
    mask, delta = first.completion_mask, first.old_logprobs - first.behaviour_logprobs
    left_out = float((weight == 0)[mask].double().mean())
    assert 0 < left_out <= 1 and row["rollout/sampler_masked"] == pytest.approx(left_out, abs=1e-6)
    kl = (delta.exp() - 1 - delta)[mask].mean()
    assert row["rollout/sampler_kl"] == pytest.approx(float(kl), rel=1e-3)
    kept = weight[mask].double()
    share = float(kept.sum() ** 2 / (len(kept) * (kept**2).sum().clamp_min(1e-30)))
    assert row["rollout/sampler_effective_share"] == pytest.approx(share, abs=1e-5)
    if correction != "token_mask":
        assert row["rollout/sampler_rejected"] == pytest.approx(
            float(((weight == 0) | ~mask).all(-1).double().mean()), abs=1e-6
        )


@pytest.mark.parametrize("name", ["GRPOModule", "PPOModule"])
def test_bypass_uses_the_engines_logprobs_as_old_logprobs(policy_folder: str, tmp_path: Path, name: str) -> None:
    with serving(policy_folder, noise=0.01) as server:
        engine = RemoteEngine(server.url, BASE, str(tmp_path / "adapters"), sync_bound=None)
        log = MetricsLog()
        kind = {"GRPOModule": RecordedGRPO, "PPOModule": RecordedPPO}[name]
        fit(
            kind(**settings_of(policy_folder, engine=engine, sampler_correction="bypass")),
            [step_of_groups()],
            callbacks=[log],
        )
    assert log.rows[0]["invariant/ratio"] > 1e-4 and "rollout/sampler_kl" not in log.rows[0]
    assert log.rows[0]["invariant/sampler"] == 0 and "rollout/entropy" not in log.rows[0]


class Nucleus(SlotEngine):
    """A user's engine that samples from a subset of the vocabulary."""

    exact = False

    def complete(self, model: Any, request: Any) -> Any:
        drawn = super().complete(model, request._replace(settings=replace(request.settings, top_p=0.7)))
        return drawn._replace(logprobs=tuple(row - math.log(0.7) for row in drawn.logprobs))


def test_an_engine_with_truncated_sampling_is_detected(policy_folder: str) -> None:
    prompts = PROMPTS * 10
    step = prompt_step(prompts)
    batch = step.micro_batches[0]
    step = within([step._replace(micro_batches=(batch._replace(group=torch.arange(60) // 2),))], 60)[0]
    given = settings_of(policy_folder, engine=Nucleus(), sampler_correction="token_truncate")
    with refused("invariant-support", "truncated distribution (top_p, top_k, min_p)"):
        fit(modules.GRPOModule(**given), [step])


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("GRPOModule", "set model.sampler_correction"),
        ("PPOModule", "set model.sampler_correction"),
        ("OnlineDPOModule", "does not correct for them: leave engine out"),  # it has no such setting
    ],
)
def test_an_inexact_engine_without_correction_is_refused(policy_folder: str, name: str, remedy: str) -> None:
    engine = RemoteEngine("http://127.0.0.1:1", BASE)
    module = getattr(modules, name)(**settings_of(policy_folder, engine=engine))
    with refused("uncorrected-engine", remedy):
        fit(module, [step_of_groups()])


def test_an_engine_without_logprobs_is_refused(policy_folder: str) -> None:
    engine = RemoteEngine("http://127.0.0.1:1", BASE, tokenizer=policy_folder)
    module = modules.GRPOModule(**settings_of(policy_folder, engine=engine, sampler_correction="token_truncate"))
    with refused("engine-without-logprobs", "does not report log-probabilities"):
        fit(module, [step_of_groups()])


def test_training_with_generate_engine_equals_slot_engine(policy_folder: str) -> None:
    found = []
    for engine in (None, GenerateEngine(), {"class_path": "rlhf_lightning.sampling.generate_engine.GenerateEngine"}):
        module = modules.GRPOModule(**settings_of(policy_folder, engine=engine))
        fit(module, [step_of_groups()])
        found.append({key: value for key, value in module.state_dict().items() if "lora_B" in key})
    assert all(math.isclose(float(weight.norm()), float(found[0][key].norm()), rel_tol=1e-4)
               for other in found[1:] for key, weight in other.items())  # fmt: skip
