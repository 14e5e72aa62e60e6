"""Test the metrics of speed: tokens per second, and the share of the device's peak."""

from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rank_cases import low_words
from tiny_models import VOCABULARY, demonstration_step, fit, prompt_step, random_rows, tiny_config

from rlhf_lightning.models.lora import LoraSettings
from rlhf_lightning.modules import GRPOModule, PPOModule, SFTModule
from rlhf_lightning.training import meter, module
from rlhf_lightning.types import Step

LAYER = 4 * 32 * 32 + 3 * 32 * 48
"""Weights of the matrices of a layer of `tiny_config`: four of the attention, three of the MLP."""


def test_flops_count_every_product_with_a_matrix(policy_folder: str) -> None:
    config = tiny_config()
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (2, 32, 48)
    head = VOCABULARY * 32  # tied to the embeddings, whose lookup multiplies nothing
    whole = SFTModule(init_from=policy_folder)
    whole.configure_model()
    assert whole.flops_per_token == 6 * (2 * LAYER + head)
    adapter = SFTModule(init_from=policy_folder, lora=LoraSettings(r=2))
    adapter.configure_model()
    low_rank = 2 * (2 * (4 * (32 + 32) + 3 * (32 + 48)))
    assert adapter.flops_per_token == 4 * (2 * LAYER + head) + 6 * low_rank


def test_speed_is_logged_in_total_and_per_device(policy_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = count(step=2.0)
    monkeypatch.setattr(meter.time, "perf_counter", lambda: next(seconds))
    monkeypatch.setattr(module, "peak_flops", lambda device, precision: 1e6)
    trained = SFTModule(init_from=policy_folder)
    logged: list[dict[str, float]] = []
    own = trained.performance
    monkeypatch.setattr(trained, "performance", lambda: logged.append(own()) or logged[-1])
    steps = [demonstration_step(random_rows(3, seed=seed), None) for seed in range(3)]
    trainer = fit(trained, steps, log_every_n_steps=1)
    read = [sum(sum(part.sequences.lengths) for part in step.micro_batches) for step in steps]
    assert logged[0] == {}  # the first step only starts the clock
    assert [one["perf/tokens_per_second"] for one in logged[1:]] == [step.tokens / 2 for step in steps[1:]]
    assert read[1] > steps[1].tokens  # products with the tokens of prompts are work, too
    shares = [one["perf/mfu"] for one in logged[1:]]
    assert shares == pytest.approx([count / 2 * trained.flops_per_token / 1e6 for count in read[1:]])
    assert [one["perf/trained_tokens_per_second_per_device"] for one in logged[1:]] == [n / 2 for n in read[1:]]
    monkeypatch.setattr(type(trainer), "world_size", 4)
    trained.tokens += 80
    assert own() == {"perf/tokens_per_second": 40, "perf/tokens_per_second_per_device": 10}


@pytest.mark.parametrize("critic", [False, True])
def test_on_policy_speed_counts_training_and_rollouts_separately(
    policy_folder: str, critic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each reading of the clock takes 2 s: collecting a rollout 2 s, and from one logged step to the next 6 s."""
    seconds = count(step=2.0)
    monkeypatch.setattr(meter, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    monkeypatch.setattr(module, "peak_flops", lambda device, precision: 1e6)
    settings: dict[str, Any] = {"scorer": low_words, "max_new_tokens": 5, "ppo_epochs": 3, "mini_batch_size": 2}
    trained: Any = (PPOModule if critic else GRPOModule)(init_from=policy_folder, **settings)
    logged: list[dict[str, float]] = []
    own = trained.performance
    monkeypatch.setattr(trained, "performance", lambda: logged.append(own()) or logged[-1])
    rollouts: list[Any] = []
    monkeypatch.setattr(trained, "on_rollout_end", lambda rollout, means: rollouts.append(rollout))
    prompts = [prompt for prompt, _ in random_rows(2, seed=1) for _ in range(2)]
    (batch,) = prompt_step(prompts).micro_batches
    batch = batch._replace(group=torch.arange(4) // 2)
    fit(
        trained, [Step((batch,), 4, 0), Step((batch._replace(episodes=batch.episodes + 4),), 4, 0)], log_every_n_steps=1
    )
    sampled = sum(map(len, rollouts[1].sequences.completions))
    read = 3 * (sampled + sum(map(len, prompts)))
    products = 6 * (2 * LAYER + VOCABULARY * 32) + critic * 6 * (2 * LAYER + 32)
    assert trained.flops_per_token == products
    assert logged == [{}, pytest.approx({
        "perf/tokens_per_second": sampled / 6,
        "perf/tokens_per_second_per_device": sampled / 6,
        "perf/trained_tokens_per_second_per_device": read / 6,
        "perf/mfu": read / 6 * products / 1e6,
        "perf/rollout_tokens_per_second_per_device": sampled / 2,
    })]  # fmt: skip


def test_the_peak_is_known_for_bf16_on_listed_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert meter.peak_flops(torch.device("cpu"), "bf16-mixed") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GH200 480GB")
    assert meter.peak_flops(torch.device("cuda"), "bf16-mixed") == 989e12
    assert meter.peak_flops(torch.device("cuda"), "32-true") is None
