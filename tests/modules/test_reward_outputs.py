"""Test multi-output reward models and the cost model: gradients of independent formulas, judgements, caution."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused
from test_objectives_of_users import assert_gradients, doubled, falls
from tiny_folders import one_thread, reward_folder
from tiny_models import (
    demonstration_step,
    evaluate,
    fit,
    gradients_of_step,
    random_pairs,
    random_rows,
    ranked_pairs,
    ranked_step,
    sequences,
)

from rlhf_lightning.modules import AttributesRewardModule, CostModule, MeanVarianceRewardModule, PlackettLuceModule
from rlhf_lightning.scoring import LearnedScorer
from rlhf_lightning.types import RankedScores, Step

__all__ = ["one_thread", "reward_folder"]


def rated_step(count: int = 4, micro: int | None = None) -> Step[Any]:
    names = AttributesRewardModule.data_columns
    step = demonstration_step(random_rows(count, seed=11), micro)
    ratings = {name: torch.randn(count, generator=torch.Generator().manual_seed(n)) for n, name in enumerate(names)}
    batches, first = [], 0
    for batch in step.micro_batches:
        rows = slice(first, first + len(batch.weights))
        batches.append(batch._replace(extras={name: values[rows] for name, values in ratings.items()}))
        first = rows.stop
    return step._replace(micro_batches=tuple(batches))


@pytest.mark.parametrize("micro", [None, 1])
def test_five_attributes_are_regressed_and_scored(reward_folder: str, tmp_path: Path, micro: int | None) -> None:
    kind, rows = AttributesRewardModule, random_rows(4, seed=11)
    module = doubled(kind(init_from=reward_folder, from_scratch=True, max_grad_norm=None))
    found = gradients_of_step(module, rated_step(micro=micro))
    plain = doubled(kind(init_from=reward_folder, from_scratch=True))
    plain.load_models()
    model = plain.reward_model.model
    ratings = torch.stack([rated_step().micro_batches[0].extras[name] for name in kind.data_columns], -1)
    total = torch.zeros((), dtype=torch.float64)
    for (prompt, completion), rating in zip(rows, ratings, strict=True):
        states = model.model(torch.tensor([[*prompt, *completion]])).last_hidden_state[0, -1]
        total = total + (model.score(states) - rating).square().mean() / len(rows)
    total.backward()
    assert_gradients(found, model, "reward_model.model.")

    falls(kind, reward_folder, rated_step(), from_scratch=True)
    trained = kind(init_from=reward_folder, from_scratch=True, learning_rate=3e-3, lr_schedule="constant")
    fit(trained, [rated_step()] * 60)
    scorer = LearnedScorer(str(trained.export(tmp_path / "model")))
    judged = scorer.judge_sequences(sequences(rows))
    assert [set(one.parts) for one in judged] == [set(kind.data_columns)] * 4
    errors = [abs(one.parts[name] - float(ratings[n, i])) for n, one in enumerate(judged)
              for i, name in enumerate(kind.data_columns)]  # fmt: skip
    assert sum(errors) / len(errors) < 0.5 * float(ratings.abs().mean())
    assert [one.score for one in judged] == [one.parts["helpfulness"] for one in judged]


def test_mean_and_variance_are_learned_and_scored_by_lower_bound(reward_folder: str, tmp_path: Path) -> None:
    kind, pairs = MeanVarianceRewardModule, random_pairs(4, seed=21)
    target = [1.0, 0.75, 1.0, 0.625]  # exact in single precision
    module = doubled(kind(init_from=reward_folder, from_scratch=True, max_grad_norm=None))
    found = gradients_of_step(module, ranked_step(ranked_pairs(pairs), 2, target))
    plain = doubled(kind(init_from=reward_folder, from_scratch=True))
    plain.load_models()
    model, total = plain.reward_model.model, torch.zeros((), dtype=torch.float64)
    for (prompt, *completions), p in zip(pairs, target, strict=True):
        outputs = [model.score(model.model(torch.tensor([[*prompt, *one]])).last_hidden_state[0, -1])
                   for one in completions]  # fmt: skip
        (better, sure), (worse, unsure) = outputs
        wins = torch.distributions.Normal(0.0, 1.0).cdf((better - worse) / (sure.exp() + unsure.exp()).sqrt())
        total = total - (p * wins.log() + (1 - p) * (1 - wins).log()) / len(pairs)
    total.backward()
    assert_gradients(found, model, "reward_model.model.")

    falls(kind, reward_folder, ranked_step(ranked_pairs(pairs)), from_scratch=True)
    trained = kind(init_from=reward_folder, from_scratch=True)
    fit(trained, [ranked_step(ranked_pairs(pairs))])
    folder = str(trained.export(tmp_path / "model"))
    rows = sequences([(prompt, chosen) for prompt, chosen, _ in pairs])
    bold, cautious = (LearnedScorer(folder, caution=k) for k in (0.0, 2.0))
    for plain_one, careful in zip(bold.judge_sequences(rows), cautious.judge_sequences(rows), strict=True):
        deviation = math.exp(0.5 * careful.parts["log_variance"])
        assert careful.score == pytest.approx(plain_one.score - 2.0 * deviation, abs=1e-5)
        assert plain_one.parts == careful.parts
    with refused("no-variance", "caution"):
        LearnedScorer(reward_folder, caution=1.0)


def test_attribute_names_can_be_set(reward_folder: str) -> None:
    module = AttributesRewardModule(["polite", "brief"], init_from=reward_folder)
    assert module.data_needs.columns == ("polite", "brief") == module.output_names
    with refused("too-few-attributes", "two or more"):
        AttributesRewardModule(["polite"], init_from=reward_folder)


SAFE = [(1.0, 0.0), (0.0, 0.0), (1.0, 1.0), (0.75, 0.25)]


def cost_step(micro: int | None = None) -> Step[Any]:
    step = ranked_step(ranked_pairs(random_pairs(4, seed=21)), micro, [1.0, 0.75, 1.0, 0.625])
    batches, first = [], 0
    for batch in step.micro_batches:
        rows = SAFE[first : first + len(batch.weights)]
        extras = {name: torch.tensor([row[n] for row in rows]) for n, name in enumerate(CostModule.data_columns)}
        batches.append(batch._replace(extras=extras))
        first += len(rows)
    return step._replace(micro_batches=tuple(batches))


@pytest.mark.parametrize("micro", [None, 2])
def test_cost_gradients_equal_safe_rlhf(reward_folder: str, micro: int | None) -> None:
    settings = {"init_from": reward_folder, "from_scratch": True, "sign_coef": 0.5, "max_grad_norm": None}
    found = gradients_of_step(doubled(CostModule(**settings)), cost_step(micro))
    plain = doubled(CostModule(**settings))
    plain.load_models()
    model, total = plain.reward_model.model, torch.zeros((), dtype=torch.float64)
    pairs = zip(random_pairs(4, seed=21), [1.0, 0.75, 1.0, 0.625], SAFE, strict=True)
    for (prompt, *completions), p, safe in pairs:
        costs = [model.score(model.model(torch.tensor([[*prompt, *one]])).last_hidden_state[0, -1])[0]
                 for one in completions]  # fmt: skip
        gap = costs[1] - costs[0]  # the rejected one is more harmful
        loss = p * torch.log1p(torch.exp(-gap)) + (1 - p) * torch.log1p(torch.exp(gap))
        for cost, s in zip(costs, safe, strict=True):
            loss = loss + 0.5 * (s * torch.log1p(torch.exp(cost)) + (1 - s) * torch.log1p(torch.exp(-cost)))
        total = total + loss / 4
    total.backward()
    assert_gradients(found, model, "reward_model.model.")


def test_the_sign_of_a_trained_cost_separates_safe_from_harmful(reward_folder: str, tmp_path: Path) -> None:
    signs = [(1.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 0.0)]
    step = cost_step()
    extras = {name: torch.tensor([row[n] for row in signs]) for n, name in enumerate(CostModule.data_columns)}
    batch = step.micro_batches[0]._replace(extras=extras, target=torch.ones(4))
    step = step._replace(micro_batches=(batch,))
    module = CostModule(init_from=reward_folder, from_scratch=True, learning_rate=3e-3, lr_schedule="constant")
    fit(module, [step] * 80)
    assert evaluate(module, [step])["val/accuracy"] == 1.0, "the better completion costs less"
    scorer = LearnedScorer(str(module.export(tmp_path / "model")))
    costs = scorer.score_sequences(batch.sequences).view(4, 2)
    for row, safe in zip(costs.tolist(), signs, strict=True):
        assert [cost < 0 for cost in row] == [bool(one) for one in safe]
        assert row[0] < row[1]


def test_lists_use_the_best_and_the_mean_of_the_others(reward_folder: str) -> None:
    module = CostModule(init_from=reward_folder)
    scores = torch.tensor([0.5, 1.0, -2.0], dtype=torch.float64)
    group, one = torch.zeros(3, dtype=torch.long), torch.ones(1, dtype=torch.float64)
    extras = {"chosen_safe": one, "rejected_safe": 0 * one}
    found = module.ranking_loss(RankedScores(scores, group, torch.tensor([0, 1, 2]), one, 0 * one, one, extras))
    soft = torch.nn.functional.softplus
    pairs = (soft(-(scores[1] - scores[0])) + soft(-(scores[2] - scores[0])) + soft(-(scores[2] - scores[1]))) / 3
    signs = soft(scores[0]) + (soft(-scores[1]) + soft(-scores[2])) / 2
    assert found.tolist() == [pytest.approx(float(pairs + signs))]


@pytest.mark.parametrize("kind", [PlackettLuceModule, MeanVarianceRewardModule, AttributesRewardModule])
def test_settings_without_effect_are_refused(kind: Any, reward_folder: str) -> None:
    with pytest.raises(TypeError, match="centering"):
        kind(init_from=reward_folder, centering=0.1)
