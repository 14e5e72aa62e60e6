"""Scores made of parts: weights by number and by row, conditions, and normalization against the papers' formulas."""

import math
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import refused
from rank_cases import low_words_at_a_cost, share_of_words
from test_rollout_objectives_of_users import PROMPTS
from tiny_folders import one_thread, policy_folder
from tiny_models import MetricsLog, fit, prompt_step
from torch import Tensor

from rlhf_lightning.modules import GRPOModule, PPOModule
from rlhf_lightning.scoring.scorer import Judgements
from rlhf_lightning.training.judgements import ScoreRule
from rlhf_lightning.types import Judgement

__all__ = ["one_thread", "policy_folder"]


class OneRank:
    """A strategy of one rank."""

    @staticmethod
    def reduce(value: Tensor, reduce_op: str) -> Tensor:
        return value


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def deviation(values: Sequence[float]) -> float:
    """Return the sample standard deviation."""
    return math.sqrt(sum((value - mean(values)) ** 2 for value in values) / (len(values) - 1))


def gdpo(
    rewards: dict[str, list[float]], weights: dict[str, float], group: list[int], eps: float = 1e-4
) -> list[float]:
    """GDPO's advantages (2601.05242): each reward within its group, summed by weight, then over the batch."""
    summed = [0.0] * len(group)
    for name, values in rewards.items():
        for row, value in enumerate(values):
            mine = [other for place, other in enumerate(values) if group[place] == group[row]]
            summed[row] += weights[name] * (value - mean(mine)) / (deviation(mine) + eps)
    return [(value - mean(summed)) / (deviation(summed) + eps) for value in summed]


def judged(rule: ScoreRule, parts: dict[str, list[float]], scores: list[float] | None = None, **columns: Any) -> Any:
    tensors = {name: torch.tensor(values) for name, values in parts.items()}
    own = torch.tensor(scores or [0.0] * len(next(iter(parts.values()))))
    return rule.judged(Judgements(own, tensors), columns)


def test_gdpo_normalization_by_hand() -> None:
    rule = ScoreRule({"weights": {"a": 1.0, "b": 1.0}, "normalize": "group_then_sum"})
    parts = {"a": torch.tensor([1.0, 0, 1, 0]), "b": torch.tensor([0.2, 0.8, 0.5, 0.5])}
    group, strategy = torch.zeros(4, dtype=torch.long), OneRank()
    found = rule.normalized(torch.zeros(4), parts, {}, group, strategy)
    assert found.tolist() == pytest.approx([-0.35836965, 0.35836965, 0.86587543, -0.86587543], abs=1e-6)
    whole = gdpo({name: one.tolist() for name, one in parts.items()}, {"a": 1.0, "b": 1.0}, [0] * 4)
    assert rule.standardised(found, strategy).tolist() == pytest.approx(whole, abs=1e-6)


class Kept(GRPOModule):
    """Records the rollout and the advantages of the last step."""

    def advantages(self, rollout: Any, rewards: Tensor) -> Any:
        self.kept = rollout, super().advantages(rollout, rewards)
        return self.kept[1]


def grouped_step(first: int = 0, **columns: Any) -> Any:
    made = prompt_step(PROMPTS, first_episode=first, **columns)
    batch = made.micro_batches[0]._replace(group=torch.arange(len(PROMPTS)) // 4)
    return made._replace(micro_batches=(batch,))


def test_grpo_with_group_then_sum_equals_gdpo(policy_folder: str) -> None:
    weights = {"low": 1.0, "cost": -0.5}
    parts = {"weights": weights, "normalize": "group_then_sum"}
    module = Kept(init_from=policy_folder, scorer=low_words_at_a_cost, parts=parts, max_new_tokens=4)
    log = MetricsLog()
    fit(module, [grouped_step()], callbacks=[log])
    rollout, advantages = module.kept
    rewards = {name: rollout.parts[name].tolist() for name in weights}
    expected = gdpo(rewards, weights, rollout.group.tolist())
    assert max(map(abs, expected)) > 0.5
    assert advantages.advantages[:, 0].tolist() == pytest.approx(expected, abs=1e-5)
    raw = [1.0 * a - 0.5 * b for a, b in zip(rewards["low"], rewards["cost"], strict=True)]
    assert log.rows[0]["rollout/score"] == pytest.approx(mean(raw), abs=1e-6)


def even_words(prompts: Any, completions: Sequence[str], **columns: Any) -> list[Judgement]:
    """Rewards each even word by its number; the rest of the score is 0.5."""
    found = []
    for text in completions:
        spans = [(one.start(), one.end(), int(one[1]) / 10) for one in re.finditer(r"w(\d*[02468])\b", text)]
        found.append(Judgement(0.5 + sum(reward for *_, reward in spans), span_rewards=spans))
    return found


@pytest.mark.parametrize("kind", [GRPOModule, PPOModule])
def test_span_rewards_are_placed_on_their_tokens(policy_folder: str, kind: Any) -> None:
    class KeptRewards(kind):  # type: ignore[misc, valid-type]
        def shape_rewards(self, rollout: Any) -> Tensor:
            self.__dict__["kept"] = rollout, super().shape_rewards(rollout)
            return self.kept[1]

    settings = {"missing_eos_score": None} if kind is PPOModule else {}
    module = KeptRewards(init_from=policy_folder, scorer=even_words, max_new_tokens=6, kl_coef=0.0, **settings)
    fit(module, [grouped_step()])
    rollout, rewards = module.kept
    expected = torch.zeros_like(rewards)
    for row, ids in enumerate(rollout.sequences.completions):
        last = len(ids) - 1
        for place, token in enumerate(ids.tolist()):
            if token >= 10 and token % 2 == 0:  # the tokens from 10 on are words
                expected[row, place] += token / 10
        expected[row, last] += 0.5
    torch.testing.assert_close(rewards.detach(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(rollout.scores, expected.sum(-1), atol=1e-5, rtol=0)
    assert int((expected != 0).sum()) > 2 * len(expected), "rewards within completions"


def test_rewards_to_go_include_span_rewards(policy_folder: str) -> None:
    module = Kept(
        init_from=policy_folder,
        scorer=even_words,
        max_new_tokens=6,
        kl_coef=0.0,
        credit="reward_to_go",
        baseline="none",
        advantage_scale="none",
    )
    fit(module, [grouped_step()])
    _, advantages = module.kept
    assert any(len(set(row[row != 0].tolist())) > 1 for row in advantages.advantages), "tokens differ"


def test_batch_normalization_is_over_the_rollout(policy_folder: str) -> None:
    kept: list[Any] = []

    class KeptPPO(PPOModule):
        def shape_rewards(self, rollout: Any) -> Tensor:
            kept.append(rollout)
            return super().shape_rewards(rollout)

    parts = {"weights": {"low": 1.0, "cost": -0.5}, "normalize": "batch"}
    module = KeptPPO(init_from=policy_folder, scorer=low_words_at_a_cost, parts=parts, missing_eos_score=None)
    fit(module, [grouped_step()])
    low, cost = (kept[0].parts[name].tolist() for name in ("low", "cost"))
    expected = [
        (a - mean(low)) / (deviation(low) + 1e-4) - 0.5 * (b - mean(cost)) / (deviation(cost) + 1e-4)
        for a, b in zip(low, cost, strict=True)
    ]
    assert kept[0].scores.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_normalized_score_is_penalised_once(policy_folder: str) -> None:
    kept: list[Any] = []

    class KeptPPO(PPOModule):
        def shape_rewards(self, rollout: Any) -> Tensor:
            kept.append(rollout)
            return super().shape_rewards(rollout)

    rules = {"missing_eos_score": None, "missing_eos_penalty": 0.5, "parts": {"normalize": "batch"}}
    fit(KeptPPO(init_from=policy_folder, scorer=low_words_at_a_cost, **rules), [grouped_step()])
    own, finished = kept[0].parts["objective"].tolist(), kept[0].finished.tolist()
    expected = [
        (score - mean(own)) / (deviation(own) + 1e-4) - 0.5 * (not ends)
        for score, ends in zip(own, finished, strict=True)
    ]
    assert kept[0].scores.tolist() == pytest.approx(expected, abs=1e-5) and not all(finished)


def test_part_weights_can_come_from_a_column() -> None:
    rule = ScoreRule({"weights": {"a": "weight_a", "b": 0.5}})
    found = judged(rule, {"a": [1.0, 2.0], "b": [4.0, math.nan]}, weight_a=[3.0, "1"])
    assert found.scores[0] == 5.0 and found.scores[1].isnan()
    with refused("missing-data-column", "weight_a"):
        judged(rule, {"a": [1.0], "b": [1.0]})
    with refused("not-a-number", "weight_a"):
        judged(rule, {"a": [1.0], "b": [1.0]}, weight_a=[None])


def test_each_prompt_can_have_its_own_part_weights(policy_folder: str) -> None:
    pairs = [(1.0, 0.0), (0.0, -0.5), (2.0, 0.25), (-1.0, 0.125)] * 2
    parts = {"weights": {"low": "weight_low", "cost": "weight_cost"}}
    module = Kept(init_from=policy_folder, scorer=low_words_at_a_cost, parts=parts, max_new_tokens=4, kl_coef=0.0)
    fit(module, [grouped_step(weight_low=[a for a, _ in pairs], weight_cost=[b for _, b in pairs])])
    rollout = module.kept[0]
    terms = [(share_of_words(text, 0, 60), share_of_words(text, 30, 90)) for text in rollout.texts]
    expected = [a * x + b * y for (a, b), (x, y) in zip(pairs, terms, strict=True)]
    assert rollout.scores.tolist() == pytest.approx(expected, abs=1e-6)


def test_a_part_counts_only_where_its_condition_holds() -> None:
    rule = ScoreRule({"weights": {"short": 2.0, "right": 1.0}, "conditions": {"short": "right >= 1"}})
    found = judged(rule, {"short": [1.0, 1.0, math.nan], "right": [1.0, 0.5, 0.0]})
    assert found.scores.tolist() == [3.0, 0.5, 0.0]
    assert found.parts["short"][:2].tolist() == [1.0, 1.0], "parts are logged as they are"
    unknown = judged(rule, {"short": [1.0], "right": [math.nan]})
    assert unknown.scores.isnan().all()
    below = ScoreRule({"weights": {"a": 1.0}, "conditions": {"a": "b < 0.5"}})
    assert judged(below, {"a": [1.0, 1.0], "b": [0.4, 0.5]}).scores.tolist() == [1.0, 0.0]


def test_conditions_apply_to_constraint_costs() -> None:
    rule = ScoreRule({"weights": {"a": 1.0}, "conditions": {"cost": "a > 0"}}, {"cost": 0.5})
    found = judged(rule, {"a": [1.0, 0.0], "cost": [1.0, 1.0]})
    assert found.scores.tolist() == [0.0, 0.0] and found.parts["objective"].tolist() == [1.0, 0.0]


def test_confidence_intervals_are_over_prompts(policy_folder: str) -> None:
    log = MetricsLog()
    module = Kept(init_from=policy_folder, scorer=low_words_at_a_cost, max_new_tokens=4)
    fit(module, [grouped_step()], evaluation=[grouped_step(64)], callbacks=[log])
    rollout = module.kept[0]
    costs = rollout.parts["cost"].tolist()
    means = [mean(costs[:4]), mean(costs[4:])]
    assert log.rows[0]["rollout/score_cost"] == pytest.approx(mean(costs), abs=1e-6)
    assert log.rows[0]["rollout/score_cost_ci95"] == pytest.approx(1.96 * deviation(means) / math.sqrt(2), abs=1e-6)


def test_constraints_ignore_completions_without_the_part(policy_folder: str) -> None:
    def scorer(prompts: Any, completions: Sequence[str], **columns: Any) -> list[Any]:
        return [Judgement(1.0, {"cost": 1.0 if n % 2 else None}) for n, _ in enumerate(completions)]

    log = MetricsLog()
    module = GRPOModule(init_from=policy_folder, scorer=scorer, constraints={"cost": 0.0}, max_new_tokens=4)
    fit(module, [grouped_step()], callbacks=[log])
    assert log.rows[0]["rollout/score_missing"] == 0.5 and log.rows[0]["rollout/score"] == 0.0


def test_dynamic_sampling_keeps_groups_whose_parts_differ(policy_folder: str) -> None:
    def scorer(prompts: Any, completions: Sequence[str], **columns: Any) -> list[Any]:
        return [Judgement(1.0, {"a": float(n % 2), "b": 1.0 - n % 2}) for n, _ in enumerate(completions)]

    for normalize, flat in (("group_then_sum", 0.0), ("sum_then_group", 1.0)):
        log = MetricsLog()
        parts = {"weights": {"a": 1.0, "b": 1.0}, "normalize": normalize}
        fit(GRPOModule(init_from=policy_folder, scorer=scorer, parts=parts, max_new_tokens=4), [grouped_step()],
            callbacks=[log])  # fmt: skip
        assert log.rows[0]["rollout/frac_score_zero_std"] == flat


def test_invalid_settings_are_refused(policy_folder: str) -> None:
    with refused("unknown-name", "weights"):
        ScoreRule({"weight": {"a": 1.0}})
    with refused("unknown-choice", "group_then_sum"):
        ScoreRule({"weights": {"a": 1.0}, "normalize": "gdpo"})
    with refused("nothing-weighed", "empty"):
        ScoreRule({"weights": {}})
    with refused("not-a-number", "weights.a"):
        ScoreRule({"weights": {"a": None}})
    with refused("conditions-without-weights", "short"):
        ScoreRule({"weights": {"a": 1.0}, "conditions": {"short": "a > 1"}})
    for text in ("correct", "correct == 1", "correct >= one", 1.0):
        with refused("unknown-condition", "short"):
            ScoreRule({"weights": {"short": 1.0}, "conditions": {"short": text}})
    with refused("reserved-part", "objective"):
        judged(ScoreRule({"weights": {"a": 1.0}}, {"b": 1.0}), {"a": [1.0], "b": [1.0], "objective": [1.0]})
    settings = {"init_from": policy_folder, "scorer": low_words_at_a_cost}
    with refused("normalized-baseline", "group_mean"):
        GRPOModule(baseline="greedy", parts={"weights": {"low": 1.0}, "normalize": "batch"}, **settings)
    with refused("group-of-one", "samples_per_prompt"):
        parts = {"weights": {"low": 1.0}, "normalize": "group_then_sum"}
        fit(PPOModule(parts=parts, **settings), [prompt_step(PROMPTS)])
