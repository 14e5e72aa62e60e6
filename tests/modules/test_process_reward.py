"""Process reward models: worked losses and metrics, one forward for all steps, and a scorer that gives the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused
from tiny_models import (
    EOS,
    MetricsLog,
    StepData,
    cut,
    evaluate,
    fit,
    quiet_trainer,
    random_rows,
    save_reward_model,
    sequences,
)
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from rlhf_lightning.data import ProcessDataModule
from rlhf_lightning.models.layout import Layout
from rlhf_lightning.models.lora import LoraSettings
from rlhf_lightning.modules import ProcessRewardModule
from rlhf_lightning.scoring import LearnedScorer, ProcessScorer, load_scorer
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.types import Loss, ProcessBatch, ProcessScores, Step


class ScoreOfTokens(nn.Module):
    """A reward model that scores a position by its token, with one free parameter per token."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.tensor(scores))
        self.bias = 0.0

    def forward(self, layout: Layout, per_token: bool = False) -> Tensor:
        found = self.table[layout.input_ids.flatten()[layout.predictors if per_token else layout.last]]
        return layout.scatter(found) if per_token else found


Judged = tuple[list[float], list[float]]
"""Scores and labels of a completion's steps."""


def process_step(rows: list[tuple[list[int], list[list[int]], list[float]]], micro: int | None = None,
                 weights: list[float] | None = None) -> Step[ProcessBatch]:  # fmt: skip
    """Each row is (prompt, steps, labels)."""
    weights = weights or [1.0] * len(rows)
    batches = []
    for part in cut(range(len(rows)), micro):
        steps = [rows[i][1] for i in part]
        flags = [[place == len(step) - 1 for step in many for place in range(len(step))] for many in steps]
        ragged = sequences([(rows[i][0], [t for step in rows[i][1] for t in step]) for i in part], flags)
        labels = tuple(torch.tensor(rows[i][2]) for i in part)
        batches.append(ProcessBatch(ragged, labels, torch.tensor([weights[i] for i in part])))
    return Step(tuple(batches), len(rows), sum(len(labels) for _, _, labels in rows))


def with_scores(judged: list[Judged], **settings: Any) -> tuple[ProcessRewardModule, list[Any]]:
    """A module whose steps have exactly these scores; each step is a filler token with score 9 and a token of its
    own.
    """
    module = settings.pop("kind", ProcessRewardModule)(init_from="unread", **settings)
    flat = [score for scores, _ in judged for score in scores]
    module.reward_model, module._models_loaded = ScoreOfTokens([*flat, 9.0]), True
    rows, token = [], 0
    for scores, labels in judged:
        rows.append(([len(flat)], [[len(flat), token + i] for i in range(len(scores))], labels))
        token += len(scores)
    module._best_scores = None
    return module, rows


WORKED: list[Judged] = [([0.8, -0.2, 0.8], [1.0, 0.0, 0.7]), ([0.5], [0.0]), ([1.0, 2.0], [1.0, 1.0])]
LOSSES = [0.37110067, 0.59813887, 0.61110067, 0.97407698, 0.31326169, 0.12692801]


@pytest.mark.parametrize("micro", [None, 1])
def test_steps_have_equal_weight_in_long_and_short_completions(micro: int | None) -> None:
    module, rows = with_scores(WORKED)
    found = evaluate(module, [process_step(rows, micro)])
    assert found["val/loss"] == pytest.approx(sum(LOSSES) / 6, abs=1e-6)
    assert found["val/step_accuracy"] == pytest.approx(5 / 6)
    # Two completions contain an error: the first error is found, the second is not; the right completion passes.
    assert found["val/first_error_found"] == 0.5 and found["val/right_accepted"] == 1.0
    assert found["val/first_error_f1"] == pytest.approx(2 * 0.5 / 1.5)


def test_a_score_of_0_counts_as_wrong() -> None:
    module, rows = with_scores([([0.0, 1.0, 1.0], [1.0, 1.0, 0.5])])
    assert evaluate(module, [process_step(rows)])["val/step_accuracy"] == 0.5  # a label of 0.5 is on neither side


@pytest.mark.parametrize("micro", [None, 1, 2])
def test_the_gradient_equals_that_of_the_weighted_mean_over_steps(micro: int | None) -> None:
    settings = {"lr_schedule": "constant", "max_grad_norm": None, "adam_eps": 1.0, "learning_rate": 1.0}
    module, rows = with_scores(WORKED, **settings)
    before = module.reward_model.table.detach().clone()
    fit(module, [process_step(rows, micro, weights=[2.0, 1.0, 0.5])])
    scores, labels = (torch.tensor([x for row in WORKED for x in row[side]]) for side in (0, 1))
    weights = torch.tensor([2.0, 2.0, 2.0, 1.0, 0.5, 0.5])
    gradient = torch.cat([weights * (scores.sigmoid() - labels) / 6, torch.zeros(1)])
    step = gradient / (gradient.abs() + 1.0)  # Adam's first step
    torch.testing.assert_close(module.reward_model.table.detach(), before - step, atol=1e-6, rtol=1e-5)
    assert module.tokens == 6 and module.episodes == 3


class OnlyFirstErrors(ProcessRewardModule):
    """Steps after the first wrong step are not trained on."""

    def process_loss(self, scores: ProcessScores) -> Loss:
        kept = (scores.position == 0).float()
        return Loss(kept * super().process_loss(scores), {"kept": kept})  # type: ignore[operator]


def test_a_custom_objective_gets_step_positions() -> None:
    module, rows = with_scores(WORKED, kind=OnlyFirstErrors)
    logged = MetricsLog()
    fit(module, [process_step(rows, 2)], callbacks=[logged])
    assert logged.rows[0]["train/loss"] == pytest.approx((LOSSES[0] + LOSSES[3] + LOSSES[4]) / 6, abs=1e-6)
    assert logged.rows[0]["train/kept"] == pytest.approx(0.5)


def test_a_rank_without_rows_joins_with_loss_zero() -> None:
    module, _ = with_scores(WORKED)
    module.trainer = quiet_trainer()
    meter = Meter()
    assert float(module.loss_sum(ProcessBatch(sequences([]), (), torch.zeros(0)), meter).detach()) == 0.0
    assert "first_error_found" in meter.state_dict() and not meter.means(module.trainer.strategy)


# -- with a transformer -----------------------------------------------------------------------------------------------


def judged_rows(count: int, seed: int = 0) -> list[Any]:
    """Rows of one to three steps of words; the separator is the word w20, and the end token comes last."""
    rows = []
    for number in range(count):
        parts = random_rows(1 + number % 3, seed=seed + 10 * number, completion=4)
        steps = [[token for token in ids[:-1] if token != 20] + [20] for _, ids in parts]
        steps = [step if len(step) > 1 else [30, *step] for step in steps]
        steps[-1][-1] = EOS
        rows.append((parts[0][0], steps, [float((number + i) % 2) for i in range(len(steps))]))
    return rows


ROWS = judged_rows(7)


def step_scores_by_hand(model: Any, row: Any) -> list[float]:
    """Score of each step, from the text that ends with it alone."""
    prompt, steps, _ = row
    found, ids = [], list(prompt)
    for step in steps:
        ids += step
        hidden = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        found.append(float(model.score(hidden)))
    return found


@pytest.mark.parametrize("lora", [None, LoraSettings(r=4)])
def test_the_exported_model_scores_steps_as_the_trained_one(
    policy_folder: str, tmp_path: Path, lora: LoraSettings | None
) -> None:
    module = ProcessRewardModule(
        init_from=policy_folder, step_separator=" w20 ", learning_rate=2e-3, lora=lora, lr_schedule="constant"
    )
    fit(module, [process_step(ROWS, 3)] * 3)
    rows = quiet_trainer().predict(module, StepData([], [process_step(ROWS[:3], 2)]))
    assert rows is not None
    folder = str(module.export(tmp_path / "process"))
    scorer = load_scorer(folder)
    assert isinstance(scorer, ProcessScorer) and scorer.separator == " w20 "

    def words(ids: list[int]) -> str:
        return " ".join(f"w{token}" for token in ids if token != EOS)

    prompts = [words(prompt) for prompt, _, _ in ROWS]
    texts = [words([token for step in steps for token in step]) for _, steps, _ in ROWS]
    scores, row = scorer.step_scores(prompts, texts)
    assert row.tolist() == [index for index, (_, steps, _) in enumerate(ROWS) for _ in steps]
    (batch,) = process_step(ROWS).micro_batches
    with torch.no_grad():
        trained = module.step_scores(batch).scores
    torch.testing.assert_close(scores, trained, atol=1e-4, rtol=0)
    assert [x for found in rows[0] for x in found["steps"]] == pytest.approx(
        trained.sigmoid()[: sum(len(steps) for _, steps, _ in ROWS[:3])].tolist(), abs=1e-5
    )
    if lora is None:
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        by_hand = [score for one in ROWS for score in step_scores_by_hand(model, one)]
        assert trained.tolist() == pytest.approx(by_hand, abs=1e-4)
    probabilities = [trained.sigmoid()[row == index] for index in range(len(ROWS))]
    for how, reduce in (("min", torch.min), ("product", torch.prod), ("last", lambda p: p[-1])):
        found = ProcessScorer(folder, how, max_tokens=40)(prompts, texts)  # type: ignore[arg-type]
        assert found.tolist() == pytest.approx([float(reduce(p)) for p in probabilities], abs=1e-4)  # type: ignore
        by_step = ProcessScorer(folder, how, credit="steps")(prompts, texts)  # type: ignore[arg-type]
        for one, score, text, p in zip(by_step, found, texts, probabilities, strict=True):
            assert [text[start:end] for start, end, _ in one.span_rewards] == scorer.steps_of(text)
            rises = [
                float(reduce(p[: step + 1])) - (float(reduce(p[:step])) if step else 0.0) for step in range(len(p))
            ]
            assert [reward for *_, reward in one.span_rewards] == pytest.approx(rises, abs=1e-4)
            assert one.score == pytest.approx(float(score), abs=1e-6)
    last = LearnedScorer(folder).score_sequences(batch.sequences)
    assert last.tolist() == pytest.approx([float(trained[row == index][-1]) for index in range(len(ROWS))], abs=1e-4)


def test_predictions_pair_each_step_with_its_label(policy_folder: str, write_rows: Any, cache: Any) -> None:
    """The module sets the separator, the DataModule writes it, and predictions pair each step with its label."""
    rows = [{"prompt": f"w{30 + i}", "completions": ["w7", "w8 w9"], "labels": [True, i % 2 == 0]} for i in range(6)]
    module = ProcessRewardModule(init_from=policy_folder, step_separator=" w20 ", learning_rate=1e-3)
    data = ProcessDataModule(write_rows(rows), eval_rows=2, batch_size=2, micro_batch_size=1)
    trainer = quiet_trainer()
    trainer.fit(module, data)
    assert module.updates == 2 and module.tokens == 8
    assert trainer.callback_metrics.keys() >= {"train/step_accuracy", "val/first_error_f1", "val/loss"}
    found = [row for step in trainer.predict(module, data) or [] for row in step]
    assert [row["completion"] for row in found] == ["w7 w20 w8 w9"] * 2
    assert all(len(row["steps"]) == 2 and row["labels"][0] == 1.0 for row in found)


def test_training_reaches_full_step_accuracy(policy_folder: str) -> None:
    module = ProcessRewardModule(init_from=policy_folder, learning_rate=5e-3)
    before = evaluate(module, [process_step(ROWS)])
    fit(module, [process_step(ROWS, 4)] * 25)
    after = evaluate(module, [process_step(ROWS)])
    assert after["val/step_accuracy"] == 1.0 and after["val/first_error_f1"] == 1.0
    assert after["val/loss"] < 0.2 * before["val/loss"]


def test_scores_are_log_odds_without_bias(tmp_path: Path) -> None:
    """This also holds if training starts from a reward model with a score bias."""
    module = ProcessRewardModule(init_from=save_reward_model(tmp_path / "reward", score_bias=3.0))
    fit(module, [process_step(ROWS)])
    assert module.reward_model.bias == 0.0
    (batch,) = process_step(ROWS).micro_batches
    module.export(tmp_path / "process")
    torch.testing.assert_close(
        LearnedScorer(str(tmp_path / "process")).score_sequences(batch.sequences),
        torch.stack([module.step_scores(batch).scores[module.step_scores(batch).row == i][-1] for i in range(7)]),
    )


def test_process_scorer_refuses_invalid_arguments(policy_folder: str, reward_folder: str) -> None:
    with refused("no-separator", "is not the folder of a process reward model; give the separator"):
        ProcessScorer(reward_folder)
    with refused("unknown-choice", "aggregate is 'mean'"):
        ProcessScorer(reward_folder, "mean", separator="\n")  # type: ignore[arg-type]
    with refused("unknown-choice", "credit"):
        ProcessScorer(reward_folder, separator=".", credit="step")  # type: ignore[arg-type]
    assert isinstance(load_scorer(reward_folder), LearnedScorer)
    scorer = ProcessScorer(reward_folder, separator=" w20 ")
    assert scorer.steps_of("a w20 b w20 ") == ["a", "b"] and scorer.steps_of("") == [""]
    assert 0 <= float(scorer(["w9"], [""])[0]) <= 1
    with refused("missing-setting", "step_separator"):
        ProcessRewardModule(init_from=policy_folder, step_separator="")
