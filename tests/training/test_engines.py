"""Learning from samples of a server whose numbers are not the trainer's."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused
from small_server import BASE, serving
from tiny_models import MetricsLog, fit, prompt_step, random_rows, within

from rlhf_lightning import modules
from rlhf_lightning.models.loading import LoraSettings
from rlhf_lightning.sampling.generate_engine import GenerateEngine
from rlhf_lightning.sampling.remote_engine import RemoteEngine
from rlhf_lightning.types import Loss, PolicyLogprobs

PROMPTS = [prompt for prompt, _ in random_rows(3, seed=4) for _ in range(2)]


def lengths(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def settings_of(folder: str, **changes: Any) -> dict[str, Any]:
    defaults = {"max_new_tokens": 8, "learning_rate": 1e-2, "lr_schedule": "constant"}
    return {"init_from": folder, "scorer": lengths, "lora": LoraSettings(r=4), **defaults, **changes}


class RecordedGRPO(modules.GRPOModule):
    """Keeps what each policy loss was given, and what came of it."""

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


def test_samples_of_a_server_are_weighed_by_what_it_drew_with(policy_folder: str, tmp_path: Path) -> None:
    with serving(policy_folder, noise=0.01) as server:
        engine = RemoteEngine(server.url, BASE, str(tmp_path / "adapters"))
        log = MetricsLog()
        module = RecordedGRPO(
            **settings_of(
                policy_folder, engine=engine, sampler_correction="token_truncate", sampler_high=1.05, kl_coef=0.0
            )
        )
        fit(module, [step_of_groups(), step_of_groups()], callbacks=[log])
        loaded = server.bodies("/v1/load_lora_adapter")
    assert len(loaded) == 2  # the second rollout is of the adapter that the first has changed
    for logprobs, values in module.seen:
        mask, sampler = logprobs.completion_mask, logprobs.behaviour_logprobs
        assert sampler is not None
        ratio = (logprobs.old_logprobs - sampler).exp()
        assert float((ratio - 1)[mask].abs().max()) > 1e-3
        expected = -logprobs.advantages * ratio.clamp(max=1.05)
        torch.testing.assert_close(values[mask], expected[mask], atol=1e-5, rtol=1e-4)
        assert float(ratio[mask].max()) > 1.05 or float(ratio[mask].min()) < 0.95


@pytest.mark.parametrize(("name", "settings"), [("GRPOModule", {}), ("PPOModule", {}), ("OnlineDPOModule", {})])
def test_without_a_correction_such_an_engine_is_refused(
    policy_folder: str, name: str, settings: dict[str, Any]
) -> None:
    engine = RemoteEngine("http://127.0.0.1:1", BASE)
    module = getattr(modules, name)(**settings_of(policy_folder, engine=engine, **settings))
    with pytest.raises(ValueError, match=r"does not correct for them: set model.sampler_correction"):
        fit(module, [step_of_groups()])


def test_a_server_that_reports_no_logprobs_teaches_nothing(policy_folder: str) -> None:
    engine = RemoteEngine("http://127.0.0.1:1", BASE, tokenizer=policy_folder)
    module = modules.GRPOModule(**settings_of(policy_folder, engine=engine, sampler_correction="token_truncate"))
    with refused("engine-without-logprobs", "does not report log-probabilities"):
        fit(module, [step_of_groups()])


def test_generate_trains_what_the_slots_train(policy_folder: str) -> None:
    found = []
    for engine in (None, GenerateEngine(), {"class_path": "rlhf_lightning.sampling.generate_engine.GenerateEngine"}):
        module = modules.GRPOModule(**settings_of(policy_folder, engine=engine))
        fit(module, [step_of_groups()])
        found.append({key: value for key, value in module.state_dict().items() if "lora_B" in key})
    assert all(math.isclose(float(weight.norm()), float(found[0][key].norm()), rel_tol=1e-4)
               for other in found[1:] for key, weight in other.items())  # fmt: skip
