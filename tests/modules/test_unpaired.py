"""Objectives on rows judged alone: worked numbers, the reference point of the whole step, and a plain computation."""

import math
from typing import Any

import pytest
import torch
from tiny_models import MetricsLog, assert_same, fit, gradients_of_step, plain_logprobs, random_rows, sequences
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_lightning.models.lora import LoraSettings
from rlhf_lightning.modules import BCOModule, KTOModule
from rlhf_lightning.modules.unpaired import UnpairedModule
from rlhf_lightning.types import Step, UnpairedBatch, UnpairedLogprobs

ROWS = random_rows(6, seed=71)
LABELS = [True, False, False, True, True, False]


def step_of(micro: int | None = None, weights: list[float] | None = None) -> Step[UnpairedBatch]:
    """Row i's mismatched completion is row i - 1's."""
    weights = weights or [1.0] * len(ROWS)
    size = micro or len(ROWS)
    batches = []
    for start in range(0, len(ROWS), size):
        part = range(start, min(start + size, len(ROWS)))
        mismatched = sequences([(ROWS[i][0], ROWS[i - 1][1]) for i in part])
        batches.append(
            UnpairedBatch(
                sequences([ROWS[i] for i in part]),
                mismatched,
                torch.tensor([LABELS[i] for i in part]),
                torch.tensor([weights[i] for i in part]),
            )
        )
    return Step(tuple(batches), len(ROWS), sum(len(c) for _, c in ROWS))


def logprobs(ratios: list[float], desirable: list[bool], point: float) -> UnpairedLogprobs:
    tokens = torch.tensor(ratios, dtype=torch.float64)[:, None] * torch.tensor([0.5, 0.5], dtype=torch.float64)
    ones = torch.ones(len(ratios), dtype=torch.float64)
    return UnpairedLogprobs(
        tokens - 1, torch.full_like(tokens, -1.0), torch.ones_like(tokens, dtype=torch.bool),
        torch.tensor(desirable), ones, torch.tensor(point, dtype=torch.float64),
    )  # fmt: skip


CHOSEN, REJECTED = [0.5, -0.2, 0.4], [-0.2, 0.4, -0.5]


def test_kto_losses_by_hand() -> None:
    module = KTOModule(init_from="nowhere")
    point = module.reference_point(torch.zeros(3), torch.tensor([0.3, -0.1, 0.4]))
    assert float(point) == pytest.approx(0.2)
    both = logprobs(CHOSEN + REJECTED, [True] * 3 + [False] * 3, 0.2)
    losses = module.unpaired_loss(both)
    assert isinstance(losses, Tensor)
    assert float(losses[:3].mean()) == pytest.approx(0.49916647, abs=5e-9)
    assert float(losses[3:].mean()) == pytest.approx(0.49250277, abs=5e-9)
    assert float(losses.mean()) == pytest.approx(0.49583462, abs=5e-9)
    weighted = KTOModule(init_from="nowhere", desirable_weight=1.33).unpaired_loss(both)
    assert isinstance(weighted, Tensor)
    assert float(weighted.mean()) == pytest.approx(0.57819708, abs=5e-9)
    assert float(module.reference_point(torch.zeros(2), torch.tensor([-0.3, 0.1]))) == 0.0


def test_bco_equals_the_two_halves_of_the_pair_loss() -> None:
    module = BCOModule(init_from="nowhere", beta=0.1)
    delta = module.reference_point(torch.tensor(CHOSEN + REJECTED), torch.zeros(0))
    assert float(delta) == pytest.approx(0.00666667, abs=1e-8)
    losses = module.unpaired_loss(logprobs(CHOSEN + REJECTED, [True] * 3 + [False] * 3, float(delta)))
    assert isinstance(losses, Tensor)
    assert 2 * float(losses.mean()) == pytest.approx(1.36999155, abs=5e-8)


@pytest.mark.parametrize(("kind", "value"), [(KTOModule, 0.5), (BCOModule, math.log(2))])
@pytest.mark.parametrize("lora", [None, LoraSettings(r=4)])
def test_loss_at_the_reference_has_its_declared_value(
    policy_folder: str, kind: type[UnpairedModule], value: float, lora: Any
) -> None:
    logged = MetricsLog()
    fit(kind(init_from=policy_folder, lora=lora), [step_of(2)], callbacks=[logged])
    assert logged.rows[0]["train/loss"] == pytest.approx(value, abs=1e-6)
    assert logged.rows[0]["train/reference_point"] == pytest.approx(0.0, abs=1e-6)


def moved(kind: type[UnpairedModule], folder: str) -> UnpairedModule:
    """A module whose policy has left its reference."""
    return kind(init_from=folder, beta=0.3, learning_rate=3e-3, warmup=0, lr_schedule="constant", max_grad_norm=None)


@pytest.mark.parametrize("kind", [KTOModule, BCOModule])
def test_gradients_do_not_depend_on_micro_batches(policy_folder: str, kind: type[UnpairedModule]) -> None:
    def gradients(micro: int | None) -> dict[str, Tensor]:
        module = moved(kind, policy_folder)
        fit(module, [step_of()] * 3)
        module.trainer = None  # type: ignore[assignment]
        return gradients_of_step(module, step_of(micro, [1, 2, 1, 0.5, 1, 1]))

    whole = gradients(None)
    assert_same(gradients(1), whole, rtol=1e-4, atol=1e-6)
    assert_same(gradients(4), whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [KTOModule, BCOModule])
def test_the_loss_of_a_step_equals_plain_transformers(
    policy_folder: str, kind: type[UnpairedModule], tmp_path: Any
) -> None:
    module, logged = moved(kind, policy_folder), MetricsLog()
    fit(module, [step_of()] * 3)
    exported = module.export(tmp_path / "model")
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (exported, policy_folder)
    )

    @torch.no_grad()
    def ratio(prompt: Any, completion: Any) -> float:
        both = (plain_logprobs(model, prompt, completion).sum() for model in (policy, reference))
        return float(next(both) - next(both))

    ratios = [ratio(*row) for row in ROWS]
    mismatched = [ratio(ROWS[i][0], ROWS[i - 1][1]) for i in range(len(ROWS))]

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    if kind is KTOModule:
        point = max(0.0, sum(mismatched) / 6)
        losses = [
            1 - sigmoid(0.3 * ((a - point) if good else (point - a))) for a, good in zip(ratios, LABELS, strict=True)
        ]
    else:
        point = 0.3 * sum(ratios) / 6
        losses = [-math.log(sigmoid((0.3 * a - point) * (1 if g else -1))) for a, g in zip(ratios, LABELS, strict=True)]
    fit(module, [step_of(2)], callbacks=[logged])
    assert logged.rows[0]["train/reference_point"] == pytest.approx(point, rel=1e-3, abs=1e-6)
    assert logged.rows[0]["train/loss"] == pytest.approx(sum(losses) / 6, rel=1e-5)
