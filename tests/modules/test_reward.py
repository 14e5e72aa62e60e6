import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused
from tiny_models import (
    EOS,
    MetricsLog,
    StepData,
    demonstration_step,
    evaluate,
    fit,
    quiet_trainer,
    random_pairs,
    random_rows,
    ranked_pairs,
    ranked_step,
)
from torch import Tensor, nn

from rlhf_lightning.models.layout import Layout, padded_layout
from rlhf_lightning.models.lora import LoraSettings
from rlhf_lightning.modules.reward import RewardModule
from rlhf_lightning.modules.sft import SFTModule
from rlhf_lightning.sampling.engines import SamplingSettings
from rlhf_lightning.scoring import LearnedScorer
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.types import Loss, RankedScores


class ScoreTable(nn.Module):
    """A reward model that scores a completion by its last token, with one free parameter per token."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.tensor(scores))
        self.bias = 0.0

    def forward(self, layout: Layout) -> Tensor:
        return self.table[layout.input_ids.flatten()[layout.last]]


def with_scores(groups: list[tuple[list[float], list[int]]], **settings: Any) -> tuple[RewardModule, list[Any]]:
    """A module whose completions have exactly the given (scores, ranks), and its groups."""
    kind = settings.pop("kind", RewardModule)
    module = kind(init_from="unread", **settings)
    flat = [score for scores, _ in groups for score in scores]
    module.reward_model, module._best_scores, module._models_loaded = ScoreTable(flat), Meter(), True
    rows, token = [], 0
    for scores, ranks in groups:
        rows.append(([7], [[8, token + i] for i in range(len(scores))], ranks))
        token += len(scores)
    return module, rows


def validated(
    groups: list[tuple[list[float], list[int]]], micro: int | None = None, **columns: Any
) -> dict[str, float]:
    settings = {name: columns.pop(name) for name in ("centering", "kind") if name in columns}
    module, rows = with_scores(groups, **settings)
    return evaluate(module, [ranked_step(rows, micro, **columns)])


PAIR = [0, 1]
WORKED = [([1.2, 0.4], PAIR), ([0.3, 0.5], PAIR)]


@pytest.mark.parametrize("micro", [None, 1])
def test_pair_losses_by_hand(micro: int | None) -> None:
    metrics = validated(WORKED, micro)
    assert metrics["val/loss"] == pytest.approx(0.58461977, abs=1e-6)
    assert metrics["val/accuracy"] == 0.5
    assert metrics["val/score_margin"] == pytest.approx(0.3)
    assert metrics["val/score"] == pytest.approx(0.6)
    deviations = [x - 0.6 for x in (1.2, 0.4, 0.3, 0.5)]
    assert metrics["val/score_std"] == pytest.approx(math.sqrt(sum(d * d for d in deviations) / 4), rel=1e-5)


def test_equal_scores_give_log_2_and_accuracy_one_half() -> None:
    metrics = validated([([0.7, 0.7], PAIR)])
    assert metrics["val/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["val/accuracy"] == 0.5
    assert metrics["val/ece"] == pytest.approx(0.5)  # half sure, never right


def test_margins_soft_labels_and_centering_by_hand() -> None:
    assert validated(WORKED, margin=[0.5, 0.0])["val/loss"] == pytest.approx(0.67624706, abs=1e-6)
    assert validated([([0.8, 0.0], PAIR)], target=[0.7])["val/loss"] == pytest.approx(0.61110067, abs=1e-6)
    assert validated(WORKED, centering=0.01)["val/loss"] == pytest.approx(0.60061977, abs=1e-6)


def test_a_ranked_list_averages_its_untied_pairs() -> None:
    ranked = ([2.0, 1.0, 0.5], [0, 1, 2])
    assert validated([ranked])["val/loss"] == pytest.approx(0.32958398, abs=1e-6)
    together = validated([ranked, WORKED[0]])["val/loss"]
    assert together == pytest.approx((0.32958398 + 0.37110067) / 2, abs=1e-6)
    # The first two are tied: two pairs remain, 2 over 0.5 and 1 over 0.5.
    assert validated([(ranked[0], [0, 0, 1])])["val/loss"] == pytest.approx((0.20141328 + 0.47407698) / 2, abs=1e-6)
    assert validated([ranked, WORKED[0]])["val/accuracy"] == 1.0


def test_a_fully_tied_group_has_loss_zero() -> None:
    metrics = validated([([2.0, 1.0], [0, 0]), WORKED[0]])
    assert metrics["val/loss"] == pytest.approx(0.37110067 / 2, abs=1e-6)
    assert metrics["val/accuracy"] == 1.0


def test_calibration_bins_the_confidence_of_the_preferred_side() -> None:
    margins = [0.8, -0.2, 2.0, 0.1, -1.5]
    metrics = validated([([delta, 0.0], PAIR) for delta in margins], micro=2)
    # 20 bins of [0, 1]: confidences 0.5250 and 0.5498 share one (accuracy 1/2); 0.6900, 0.8808 and 0.8176 stand alone.
    confidence = [1 / (1 + math.exp(-abs(delta))) for delta in margins]
    shared = 2 / 5 * abs((confidence[1] + confidence[3]) / 2 - 1 / 2)
    alone = (1 - confidence[0] + 1 - confidence[2] + confidence[4]) / 5
    assert metrics["val/ece"] == pytest.approx(shared + alone, abs=1e-6)
    assert metrics["val/brier"] == pytest.approx(0.26134308, abs=1e-6)
    assert metrics["val/accuracy"] == pytest.approx(0.6)
    assert metrics["val/loss"] == pytest.approx(0.72839550, abs=1e-6)


def test_the_gradient_equals_that_of_the_weighted_mean_over_groups() -> None:
    module, rows = with_scores(WORKED, lr_schedule="constant", max_grad_norm=None, adam_eps=1.0, learning_rate=1.0)
    before = module.reward_model.table.detach().clone()
    fit(module, [ranked_step(rows, 1, weights=[3.0, 1.0])])
    slope = [-3.0 / 2 * (1 / (1 + math.exp(0.8))), -1.0 / 2 * (1 / (1 + math.exp(-0.2)))]
    gradient = torch.tensor([slope[0], -slope[0], slope[1], -slope[1]])
    step = gradient / (gradient.abs() + 1.0)  # Adam's first step
    torch.testing.assert_close(module.reward_model.table.detach(), before - step, atol=1e-5, rtol=1e-5)


def test_soft_labels_and_margins_affect_the_gradient() -> None:
    module, rows = with_scores([([0.8, 0.0], PAIR)], lr_schedule="constant", max_grad_norm=None, adam_eps=1.0)
    module.learning_rate = 1.0
    fit(module, [ranked_step(rows, target=[0.5])])  # a toss-up pulls the scores together
    better, worse = module.reward_model.table.detach().tolist()
    assert better < 0.8 and worse > 0.0


class BestOnlyModule(RewardModule):
    """A custom objective with a metric."""

    def ranking_loss(self, scores: RankedScores) -> Loss:  # type: ignore[override]
        best = torch.stack([scores.scores[(scores.group == g) & (scores.ranks == 0)].mean() for g in range(2)])
        return Loss(-best, {"best": best})


def test_a_custom_reward_objective_trains_and_logs_its_metrics() -> None:
    module, rows = with_scores(WORKED, kind=BestOnlyModule, learning_rate=0.1)
    logged = MetricsLog()
    fit(module, [ranked_step(rows)] * 2, callbacks=[logged])
    assert logged.column("train/best")[0] == pytest.approx(0.75)
    assert logged.column("train/loss")[0] == pytest.approx(-0.75)
    assert logged.column("train/best")[1] > 0.75
    assert module.reward_model.table.detach()[1] == pytest.approx(0.4)


# -- the score's zero -------------------------------------------------------------------------------------------------


class RecordedModule(RewardModule):
    """Records the scores of the best-ranked completions of each training step."""

    def ranking_loss(self, scores: RankedScores) -> Tensor:
        if torch.is_grad_enabled():
            self.__dict__.setdefault("seen", []).append(scores.scores[scores.ranks == 0].detach().clone())
        return super().ranking_loss(scores)


GROUPS = ranked_pairs(random_pairs(6, seed=17)) + [
    (p, [a, b, c], [0, 0, 1])
    for (p, a), (_, b), (_, c) in zip(*(random_rows(2, seed=s) for s in (1, 2, 3)), strict=True)
]


@pytest.mark.parametrize("lora", [None, LoraSettings(r=4)])
def test_the_score_bias_is_the_mean_best_score_of_the_last_epoch(
    policy_folder: str, tmp_path: Path, lora: LoraSettings | None
) -> None:
    module = RecordedModule(init_from=policy_folder, learning_rate=1e-3, lora=lora)
    fit(module, [ranked_step(GROUPS[:5], 2), ranked_step(GROUPS[5:])], [ranked_step(GROUPS)], max_epochs=2)
    seen = torch.cat(module.seen)
    half = len(seen) // 2
    assert half == 6 + 2 * 2
    assert module.reward_model.bias == pytest.approx(float(seen[half:].mean()), abs=1e-6)
    assert module.reward_model.bias != pytest.approx(float(seen[:half].mean()), abs=1e-4)

    scorer = LearnedScorer(str(module.export(tmp_path / "reward")))
    (batch,) = ranked_step(GROUPS).micro_batches
    with torch.no_grad():
        raw = module.reward_model(padded_layout(batch.sequences))
    torch.testing.assert_close(
        scorer.score_sequences(batch.sequences), raw - module.reward_model.bias, atol=1e-5, rtol=0
    )

    rows = quiet_trainer().predict(module, StepData([], [ranked_step(GROUPS[:1])]))
    assert rows is not None
    found = [(row["score"], row["rank"], row["completion"]) for row in rows[0]]
    words = [" ".join(f"w{token}" for token in completion if token != EOS) for completion in GROUPS[0][1]]
    scores = (raw[:2] - module.reward_model.bias).tolist()
    assert found == [
        (pytest.approx(scores[0], abs=1e-5), 0, words[0]),
        (pytest.approx(scores[1], abs=1e-5), 1, words[1]),
    ]


def test_without_normalisation_the_score_bias_is_zero(policy_folder: str) -> None:
    module = RewardModule(init_from=policy_folder, normalise=False)
    fit(module, [ranked_step(GROUPS[:3])])
    assert module.reward_model.bias == 0.0


def test_the_head_starts_small_so_the_first_loss_is_near_log_2(policy_folder: str) -> None:
    logged = MetricsLog()
    module = RewardModule(init_from=policy_folder, seed=3)
    module.configure_model()
    head = module.reward_model.model.score.weight.detach()
    assert 12 < float(head.square().sum()) * 33 < 63  # N(0, 1/33): chi-square with 32 degrees of freedom
    other = RewardModule(init_from=policy_folder, seed=4)
    other.configure_model()
    assert not torch.equal(other.reward_model.model.score.weight.detach(), head)
    fit(module, [ranked_step(GROUPS)], callbacks=[logged])
    assert 0.2 < logged.column("train/loss")[0] < 2.0


def test_training_reaches_full_accuracy(policy_folder: str) -> None:
    module = RewardModule(init_from=policy_folder, learning_rate=5e-3)
    before = evaluate(module, [ranked_step(GROUPS)])
    fit(module, [ranked_step(GROUPS, 3)] * 12)
    after = evaluate(module, [ranked_step(GROUPS)])
    assert after["val/accuracy"] == 1.0 and after["val/loss"] < 0.1 < before["val/loss"]


def test_a_reward_model_refuses_to_generate(policy_folder: str) -> None:
    module = RewardModule(init_from=policy_folder)
    module.configure_model()
    with refused("writes-no-completions", "RewardModule"):
        module.complete([torch.tensor([7])], torch.arange(1), SamplingSettings(), 0)


def test_a_reward_model_continues_the_policy_adapter_and_exports_an_adapter(policy_folder: str, tmp_path: Path) -> None:
    """SFT with an adapter, then the reward model from it: an adapter on the same backbone, scoring as trained."""
    sft = SFTModule(init_from=policy_folder, lora=LoraSettings(r=4), learning_rate=5e-2)
    fit(sft, [demonstration_step(random_rows(6, seed=1))] * 5)
    start = str(sft.export(tmp_path / "sft"))
    module = RewardModule(init_from=start, lora=LoraSettings(r=4), learning_rate=1e-2)
    module.configure_model()
    (batch,) = ranked_step(GROUPS).micro_batches
    layout = padded_layout(batch.sequences)
    with torch.no_grad():
        found = module.reward_model.model.base_model.model.model(layout.input_ids).last_hidden_state
        expected = sft.policy.model.base_model.model.model(layout.input_ids).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    fit(module, [ranked_step(GROUPS)] * 3)
    for folder in (module.export(tmp_path / "reward"), tmp_path / "again"):
        if not folder.exists():  # continued again without a step: the head and the score bias are loaded too
            module = RewardModule(init_from=str(tmp_path / "reward"), lora=LoraSettings(r=4))
            module.configure_model()
            module.export(folder)
        record = json.loads((folder / "backbone.json").read_text())
        assert record["source"] == Path(policy_folder).name and record["score_bias"] == module.reward_model.bias != 0.0
        assert not (folder / "model.safetensors").exists()
        with torch.no_grad():
            raw = module.reward_model(layout)
        scores = LearnedScorer(str(folder)).score_sequences(batch.sequences)
        torch.testing.assert_close(scores, raw - module.reward_model.bias, atol=1e-4, rtol=0)
