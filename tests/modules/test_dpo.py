import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import (
    MetricsLog,
    evaluate,
    fit,
    plain_logprobs,
    preference_step,
    random_pairs,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_lightning.models.lora import LoraSettings
from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.types import Loss, PreferenceLogprobs

PAIRS = random_pairs(6, seed=51)


@pytest.fixture(scope="module")
def trained(policy_folder: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[DPOModule, Any, Any]:
    """A module after a few updates, its policy as plain transformers reads it, and the plain reference."""
    module = DPOModule(init_from=policy_folder, beta=0.3, learning_rate=2e-3, warmup=0)
    fit(module, [preference_step(PAIRS, 4)] * 4)
    exported = module.export(tmp_path_factory.mktemp("dpo") / "model")
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (exported, policy_folder)
    )
    return module, policy, reference


def log_ratios(policy: Any, reference: Any) -> tuple[list[float], list[float]]:
    """log policy / reference of each chosen and of each rejected completion, by hand."""
    with torch.no_grad():
        chosen, rejected = (
            [
                float(
                    plain_logprobs(policy, pair[0], pair[side]).sum()
                    - plain_logprobs(reference, pair[0], pair[side]).sum()
                )
                for pair in PAIRS
            ]
            for side in (1, 2)
        )
    return chosen, rejected


@pytest.mark.parametrize("lora", [None, LoraSettings(r=4)])
def test_before_any_update_the_loss_is_log_2_exactly(policy_folder: str, lora: LoraSettings | None) -> None:
    logged = MetricsLog()
    fit(DPOModule(init_from=policy_folder, lora=lora), [preference_step(PAIRS, 2)], callbacks=[logged])
    first = logged.rows[0]
    assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-7)
    for name in ("chosen_reward", "rejected_reward", "reward_margin"):
        assert first[f"train/{name}"] == 0.0
    assert first["train/reward_accuracy"] == 0.5  # ties count half


def test_validation_metrics_match_the_formula(trained: tuple[DPOModule, Any, Any]) -> None:
    module, policy, reference = trained
    metrics = evaluate(module, [preference_step(PAIRS[:4], 3), preference_step(PAIRS[4:])])
    chosen, rejected = log_ratios(policy, reference)
    margins = [0.3 * (c - r) for c, r in zip(chosen, rejected, strict=True)]
    assert max(margins) > 0.5
    assert metrics["val/loss"] == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / 6, abs=1e-5)
    assert metrics["val/reward_margin"] == pytest.approx(sum(margins) / 6, abs=1e-4)
    assert metrics["val/chosen_reward"] == pytest.approx(0.3 * sum(chosen) / 6, abs=1e-4)
    assert metrics["val/rejected_reward"] == pytest.approx(0.3 * sum(rejected) / 6, abs=1e-4)
    assert metrics["val/reward_accuracy"] == pytest.approx(sum(m > 0 for m in margins) / 6)
    with torch.no_grad():
        logprobs = [float(plain_logprobs(policy, p, c).sum()) for p, c, _ in PAIRS]
    assert metrics["val/chosen_logprob"] == pytest.approx(sum(logprobs) / 6, rel=1e-5)
    lengths = [len(c) - len(r) for _, c, r in PAIRS]
    assert metrics["val/length_difference"] == pytest.approx(sum(lengths) / 6)


def test_soft_labels_and_label_smoothing_mix_both_losses(trained: tuple[DPOModule, Any, Any]) -> None:
    module, policy, reference = trained
    targets = [1.0, 0.0, 0.5, 0.8, 0.3, 1.0]
    module.label_smoothing = 0.1
    try:
        found = evaluate(module, [preference_step(PAIRS, target=targets)])["val/loss"]
    finally:
        module.label_smoothing = 0.0
    total = 0.0
    for target, chosen, rejected in zip(targets, *log_ratios(policy, reference), strict=True):
        margin, p = 0.3 * (chosen - rejected), 0.9 * target + 0.1 * (1 - target)
        total += p * math.log1p(math.exp(-margin)) + (1 - p) * math.log1p(math.exp(margin))
    assert found == pytest.approx(total / 6, abs=1e-5)


def test_training_raises_chosen_above_rejected(trained: tuple[DPOModule, Any, Any]) -> None:
    module, policy, reference = trained
    chosen, rejected = log_ratios(policy, reference)
    assert sum(c > r for c, r in zip(chosen, rejected, strict=True)) == 6
    assert sum(chosen) > 0 > sum(rejected)
    assert all(not parameter.requires_grad for model in module.frozen_models() for parameter in model.parameters())


def test_the_gradient_pushes_chosen_up_and_rejected_down_token_by_token(policy_folder: str) -> None:
    kept: dict[str, Tensor] = {}

    class Watched(DPOModule):
        def preference_loss(self, logprobs: PreferenceLogprobs) -> Tensor | Loss:
            for side in ("chosen", "rejected"):
                grid = getattr(logprobs, f"policy_{side}_logprobs")
                grid.register_hook(lambda gradient, side=side: kept.update({side: gradient}))
                kept[f"{side}_mask"] = getattr(logprobs, f"{side}_mask")
            return super().preference_loss(logprobs)

    fit(Watched(init_from=policy_folder, beta=0.3), [preference_step(PAIRS)])
    # At policy = reference the slope of a pair's loss is -beta / 2 in its chosen and beta / 2 in its rejected sum.
    for side, slope in (("chosen", -0.15 / 6), ("rejected", 0.15 / 6)):
        gradient = kept[side][kept[f"{side}_mask"]]
        torch.testing.assert_close(gradient, torch.full_like(gradient, slope), atol=1e-7, rtol=1e-5)


def test_pair_weights_scale_the_training_loss(policy_folder: str) -> None:
    found = []
    for weights, rows in (([1.0, 0.0, 0.0, 0.0, 0.0, 0.0], PAIRS), ([1 / 6], PAIRS[:1])):
        module = DPOModule(init_from=policy_folder, learning_rate=1e-3, adam_eps=1e-3, warmup=0, max_grad_norm=None)
        fit(module, [preference_step(rows, weights=weights)])
        found.append(module.policy.model.get_input_embeddings().weight.detach().clone())
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=0)


def test_with_an_adapter_the_frozen_backbone_is_the_reference(policy_folder: str) -> None:
    module = DPOModule(init_from=policy_folder, beta=0.3, lora=LoraSettings(r=4), learning_rate=1e-2, warmup=0)
    logged = MetricsLog()
    fit(module, [preference_step(PAIRS, 3)] * 4, callbacks=[logged])
    assert module.frozen_models() == ()
    margins = logged.column("train/reward_margin")
    assert margins[0] == 0 and margins[-1] > 0.5
    base = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float32)
    with module.policy.as_reference(), torch.no_grad():
        for prompt, chosen, _ in PAIRS[:2]:
            found = plain_logprobs(module.policy.model, prompt, chosen)
            torch.testing.assert_close(found, plain_logprobs(base, prompt, chosen), atol=1e-5, rtol=1e-5)


def test_the_reference_of_a_continued_adapter_is_its_initial_state(policy_folder: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"beta": 0.3, "lora": LoraSettings(r=4), "learning_rate": 1e-2, "warmup": 0}
    first = DPOModule(init_from=policy_folder, **settings)
    fit(first, [preference_step(PAIRS)] * 3)
    second = DPOModule(init_from=str(first.export(tmp_path / "first")), **settings)
    logged = MetricsLog()
    fit(second, [preference_step(PAIRS)] * 3, callbacks=[logged])
    assert logged.column("train/loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert logged.column("train/reward_margin")[-1] > 0.3
    assert second.export(tmp_path / "second").is_dir()


# -- objectives of one's own ------------------------------------------------------------------------------------------


class OffsetDPOModule(DPOModule):
    r"""Chosen must beat rejected by ``offset``: -log sigmoid(beta * margin - offset).

    Args:
        offset: gap, in implicit-reward units, that a pair must clear.
    """

    def __init__(self, offset: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.offset = offset

    def pair_loss(self, pair: PreferenceLogprobs) -> Tensor:
        """Return one loss per pair, shape (pairs,)."""
        return -F.logsigmoid(self.beta * pair.margin - self.offset)


def test_a_custom_objective_of_twenty_lines_trains(policy_folder: str) -> None:
    module = OffsetDPOModule(offset=0.7, init_from=policy_folder, beta=0.3, learning_rate=2e-3, warmup=0)
    logged = MetricsLog()
    fit(module, [preference_step(PAIRS, 4)] * 3, callbacks=[logged])
    assert logged.column("train/loss")[0] == pytest.approx(math.log1p(math.exp(0.7)), abs=1e-6)
    assert logged.column("train/reward_margin")[-1] > 0.1
    assert module.hparams["offset"] == 0.7 and module.hparams["beta"] == 0.3


class ReferenceFreeModule(DPOModule):
    """Needs no reference, weights by length, and returns metrics."""

    needs_reference = False

    def pair_loss(self, logprobs: PreferenceLogprobs) -> Loss:
        assert logprobs.reference_chosen_logprobs is None and logprobs.reference_rejected_logprobs is None
        gap = (
            logprobs.chosen_logratio / logprobs.chosen_lengths - logprobs.rejected_logratio / logprobs.rejected_lengths
        )
        return Loss(-F.logsigmoid(self.beta * gap), {"length_gap": gap, "rated": logprobs.rated_margin})


def test_an_objective_without_reference_loads_none_and_logs_its_own_metrics(policy_folder: str) -> None:
    module = ReferenceFreeModule(init_from=policy_folder, beta=2.0)
    logged = MetricsLog()
    rated = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    fit(module, [preference_step(PAIRS, 4, margin=rated)], callbacks=[logged])
    assert module.frozen_models() == ()
    plain = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float32)
    with torch.no_grad():
        gaps = [float(plain_logprobs(plain, p, c).mean() - plain_logprobs(plain, p, r).mean()) for p, c, r in PAIRS]
    first = logged.rows[0]
    assert first["train/length_gap"] == pytest.approx(sum(gaps) / 6, abs=1e-5)
    assert first["train/loss"] == pytest.approx(sum(math.log1p(math.exp(-2 * g)) for g in gaps) / 6, rel=1e-5)
    assert first["train/rated"] == pytest.approx(2.5)
