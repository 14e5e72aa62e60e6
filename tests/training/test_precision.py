"""Trained weights are fp32 in every precision, and so is the arithmetic of the losses."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import refused
from lightning.pytorch.strategies import SingleDeviceStrategy
from tiny_models import (
    MetricsLog,
    demonstration_step,
    evaluate,
    fit,
    preference_step,
    prompt_step,
    random_pairs,
    random_rows,
    ranked_pairs,
    ranked_step,
    weights_of,
)
from torch import Tensor

from rlhf_lightning.models.loading import LoadSettings
from rlhf_lightning.models.lora import LoraSettings
from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.modules.reward import RewardModule
from rlhf_lightning.modules.sft import SFTModule
from rlhf_lightning.training.compatibility import settled_precision
from rlhf_lightning.types import Loss, PreferenceLogprobs

LORA = LoraSettings(r=4)
ROWS, PAIRS = random_rows(4, seed=1), random_pairs(4, seed=2)
PROMPTS = [prompt for prompt, _ in ROWS]


def low_words(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    return [sum(int(w[1:]) < 60 for w in text.split() if w[0] == "w") / 6 for text in completions]


class Precisions(pl.Callback):
    """Records the dtypes of the optimizer state, and torch's default dtype."""

    def __init__(self) -> None:
        self.moments: set[torch.dtype] = set()
        self.default: torch.dtype | None = None

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        states = trainer.optimizers[0].state.values()
        self.moments = {m.dtype for state in states for m in state.values() if m.dim()}
        self.default = torch.get_default_dtype()


class WatchedDPOModule(DPOModule):
    """Records the precision in which its loss is computed."""

    def preference_loss(self, logprobs: PreferenceLogprobs) -> Tensor | Loss:
        loss = super().preference_loss(logprobs)
        parts = (logprobs.policy_chosen_logprobs, logprobs.reference_chosen_logprobs, logprobs.margin, loss)
        self.seen = {part.dtype for part in parts if isinstance(part, Tensor)} | {torch.zeros(()).dtype}
        return loss


@pytest.mark.parametrize(
    ("settings", "precision", "frozen"),
    [
        ({}, "32-true", torch.float32),
        ({}, "bf16-mixed", torch.float32),
        ({}, "bf16-true", torch.bfloat16),
        ({"dtype": "bfloat16"}, "32-true", torch.bfloat16),
        ({"dtype": "bfloat16"}, "bf16-mixed", torch.bfloat16),
    ],
)
def test_adapters_are_trained_in_fp32_for_any_backbone_dtype(
    policy_folder: str, settings: dict[str, Any], precision: str, frozen: torch.dtype
) -> None:
    module = WatchedDPOModule(init_from=policy_folder, lora=LORA, learning_rate=5e-2, warmup=0, **settings)
    logged, watched = MetricsLog(), Precisions()
    trainer = fit(module, [preference_step(PAIRS)] * 3, callbacks=[logged, watched], precision=precision)
    assert trainer.precision == precision
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in module.parameters() if not p.requires_grad} == {frozen}
    assert watched.moments == module.seen == {torch.float32} and watched.default == torch.float32
    assert logged.column("train/reward_margin")[0] == 0.0
    assert logged.column("train/loss")[-1] < logged.column("train/loss")[0] - 0.05


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("critic", ["adapter", "shared", "separate"])
def test_ppo_keeps_its_invariants_and_its_critic_in_fp32(policy_folder: str, precision: Any, critic: str) -> None:
    module = PPOModule(
        low_words, init_from=policy_folder, lora=LORA, critic=critic, max_new_tokens=4, ppo_epochs=2,
        mini_batch_size=2, learning_rate=1e-2, missing_eos_score=None,
    )  # fmt: skip
    logged, watched = MetricsLog(), Precisions()
    steps = [prompt_step(PROMPTS, first_episode=4 * index) for index in range(2)]
    fit(module, steps, callbacks=[logged, watched], precision=precision)
    assert {p.dtype for p in module.parameters() if p.requires_grad} == watched.moments == {torch.float32}
    assert logged.rows[0]["rollout/kl"] == pytest.approx(0.0, abs=0.5) and logged.rows[0]["train/value_loss"] > 0
    assert logged.rows[1]["rollout/value"] != 0.0


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_sft_and_reward_models_learn_in_bf16(policy_folder: str, precision: Any) -> None:
    for module, step in (
        (SFTModule(init_from=policy_folder, lora=LORA, learning_rate=5e-2, warmup=0), demonstration_step(ROWS)),
        (RewardModule(init_from=policy_folder, lora=LORA, learning_rate=1e-2), ranked_step(ranked_pairs(PAIRS))),
    ):
        logged, watched = MetricsLog(), Precisions()
        fit(module, [step] * 6, callbacks=[logged, watched], precision=precision)  # type: ignore[arg-type]
        assert {p.dtype for p in module.parameters() if p.requires_grad} == watched.moments == {torch.float32}
        assert logged.column("train/loss")[-1] < 0.8 * logged.column("train/loss")[0]


def test_bf16_mixed_keeps_weights_and_moments_in_fp32(policy_folder: str) -> None:
    module, watched = SFTModule(init_from=policy_folder), Precisions()
    fit(module, [demonstration_step(ROWS)], callbacks=[watched], precision="bf16-mixed")
    assert {p.dtype for p in module.parameters()} == watched.moments == {torch.float32}


@pytest.mark.parametrize(("settings", "precision"), [({}, "bf16-true"), ({"dtype": "bfloat16"}, "32-true")])
def test_pure_bf16_full_fine_tuning_is_refused_with_the_remedy(
    policy_folder: str, settings: dict[str, Any], precision: Any
) -> None:
    module = SFTModule(init_from=policy_folder, **settings)
    with refused("bf16-training", "bf16-mixed", "set lora"):
        fit(module, [demonstration_step(ROWS)], precision=precision)
    assert not hasattr(module, "policy")  # before any weight was read
    assert evaluate(SFTModule(init_from=policy_folder, dtype="bfloat16"), [demonstration_step(ROWS)])["val/loss"] > 0


def test_updates_below_bf16_resolution_are_kept(policy_folder: str, tmp_path: Path) -> None:
    """A thousandth of a weight is below bf16's resolution: the exported weights must still include it."""
    module = SFTModule(init_from=policy_folder, lora=LORA, learning_rate=1e-5, lr_schedule="constant", warmup=0)
    module.configure_model()
    before = weights_of(module)
    fit(module, [demonstration_step(ROWS)] * 3, precision="bf16-true")
    drifted = [float((after - before[name]).abs().max()) for name, after in weights_of(module).items()]
    assert all(1e-6 < drift < 1e-4 for drift in drifted)


def test_quantised_weights_are_created_on_their_device() -> None:
    trainer: Any = SimpleNamespace(precision="32-true", strategy=SingleDeviceStrategy(torch.device("cpu")))
    settings = LoadSettings(quantization="nf4")
    assert settled_precision(trainer, settings, trains_adapter=True, fits=True) == settings
