import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from conftest import refused
from tiny_models import MetricsLog, demonstration_step, fit, prompt_step, random_rows
from torch import Tensor

from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.modules.sft import SFTModule

STEP = demonstration_step(random_rows(2, seed=1))


class RateKeeper:
    """Records the learning rate of each update."""

    def update(self, losses: Sequence[Callable[[], Tensor]], count: float | Tensor, *further: Any) -> float:
        self.__dict__.setdefault("rates", []).append(self.optimizers().param_groups[0]["lr"])  # type: ignore[attr-defined]
        return super().update(losses, count, *further)  # type: ignore[misc]


class KeepingSFTModule(RateKeeper, SFTModule):
    pass


class KeepingPPOModule(RateKeeper, PPOModule):
    pass


def rates(folder: str, steps: int = 4, settings: dict[str, Any] | None = None, **trainer: Any) -> list[float]:
    """Learning rates of the updates, in units of the peak."""
    module = KeepingSFTModule(init_from=folder, learning_rate=2e-4, **{"warmup": 0.0} | (settings or {}))
    fit(module, [STEP] * steps, **trainer)
    return [rate / 2e-4 for rate in module.rates]


def cosine(*progress: float) -> list[float]:
    return [(1 + math.cos(math.pi * x)) / 2 for x in progress]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"lr_schedule": "constant"}, [1, 1, 1, 1, 1, 1]),
        ({"lr_schedule": "linear"}, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ({"lr_schedule": "linear", "warmup": 2}, [1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4]),
        ({"lr_schedule": "linear", "warmup": 0.5}, [1 / 4, 2 / 4, 3 / 4, 1, 2 / 3, 1 / 3]),
        ({"lr_schedule": "constant", "warmup": 3}, [1 / 4, 2 / 4, 3 / 4, 1, 1, 1]),
        ({"lr_schedule": "cosine"}, cosine(0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6)),
        ({"lr_schedule": "cosine", "warmup": 2}, [1 / 3, 2 / 3, *cosine(0, 1 / 4, 2 / 4, 3 / 4)]),
    ],
)
def test_learning_rates_by_hand(policy_folder: str, settings: dict[str, Any], expected: list[float]) -> None:
    assert rates(policy_folder, 3, settings, max_epochs=2) == pytest.approx(expected, rel=1e-6)


def test_the_logged_learning_rate_is_the_used_one(policy_folder: str) -> None:
    logged = MetricsLog()
    module = KeepingSFTModule(init_from=policy_folder, learning_rate=2e-4, lr_schedule="linear", warmup=1)
    fit(module, [STEP] * 3, callbacks=[logged])
    assert logged.column("train/learning_rate") == pytest.approx(module.rates)


@pytest.mark.parametrize(
    ("trainer", "total"),
    [
        ({"max_epochs": 2}, 8),
        ({"max_epochs": 2, "limit_train_batches": 3}, 6),
        ({"max_epochs": 1, "limit_train_batches": 0.5}, 2),
        ({"max_epochs": 2, "max_steps": 5}, 5),
        ({"max_epochs": -1, "max_steps": 3}, 3),
    ],
)
def test_the_schedule_ends_with_the_run(policy_folder: str, trainer: dict[str, Any], total: int) -> None:
    found = rates(policy_folder, 4, {"lr_schedule": "linear"}, **trainer)
    assert found == pytest.approx([1 - update / total for update in range(total)], rel=1e-6)


def test_ppo_steps_the_schedule_at_each_update(policy_folder: str) -> None:
    module = KeepingPPOModule(
        init_from=policy_folder, scorer=lambda p, c: [0.0] * len(c), learning_rate=1e-4, max_new_tokens=2, ppo_epochs=2,
        mini_batch_size=3, missing_eos_score=None,
    )  # fmt: skip
    prompts = [prompt for prompt, _ in random_rows(8, seed=2)]
    fit(module, [prompt_step(prompts), prompt_step(prompts, first_episode=8)])
    assert module.updates_per_step == 6
    assert [rate / 1e-4 for rate in module.rates] == pytest.approx([1 - update / 12 for update in range(12)], rel=1e-6)


def test_a_schedule_without_an_end_is_refused_unless_it_is_constant(policy_folder: str) -> None:
    class StoppedSFTModule(SFTModule):
        def on_train_batch_end(self, *given: Any) -> None:
            super().on_train_batch_end(*given)
            self.trainer.should_stop = True

    with refused("endless-schedule", "lr_schedule='linear'"):
        fit(SFTModule(init_from=policy_folder, lr_schedule="linear"), [STEP], max_epochs=-1)
    module = StoppedSFTModule(init_from=policy_folder, lr_schedule="constant", warmup=0)
    fit(module, [STEP] * 2, max_epochs=-1)
    assert module.updates == 1
