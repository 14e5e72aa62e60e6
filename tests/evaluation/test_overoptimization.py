"""Over-optimisation: best-of-n by score and trained policies, against planted gold rewards."""

import math

import pytest
import torch
from conftest import refused

from rlhf_lightning.evaluation.overoptimization import best_of_n_by, best_of_n_points, policy_points
from rlhf_lightning.functional.statistics import best_of_n_kl


def group(scores, gold):
    return [{"score": score, "gold": value} for score, value in zip(scores, gold, strict=True)]


def test_best_of_n_by_hand_leaves_out_prompts_with_a_missing_score():
    found = best_of_n_points([group([1.0, 2.0, 3.0], [0.3, 0.6, 0.0]), group([0.0, None, 5.0], [9.0, 9.0, 9.0])])
    one, two, three = found["points"]
    assert [point["n"] for point in found["points"]] == [1, 2, 3] and found["prompts"] == 1
    assert (one["score"], one["gold"]["mean"]) == pytest.approx((2.0, 0.3))
    assert (two["score"], two["gold"]["mean"]) == pytest.approx((8 / 3, 0.2))
    assert (three["score"], three["gold"]["mean"]) == pytest.approx((3.0, 0.0))
    assert two["kl"] == pytest.approx(math.log(2) - 0.5)
    assert [point["fit"] for point in found["points"]] == pytest.approx([0.3, 0.2, 0.0]), "two gains, two coefficients"


def test_the_fit_finds_the_peak_of_an_over_optimised_score():
    distance = best_of_n_kl(torch.arange(1, 9)).sqrt()
    mean = distance * (1.0 - 0.4 * distance)  # of best-of-n; its estimator is solved for the gold rewards
    subsets = torch.tensor([[math.comb(i, n - 1) / math.comb(8, n) for i in range(8)] for n in range(1, 9)])
    gold = torch.linalg.solve(subsets.double(), mean)
    found = best_of_n_points([group(range(8), gold.tolist())])
    assert (found["alpha"], found["beta"]) == pytest.approx((1.0, 0.4), rel=1e-4)
    assert found["peak_kl"] == pytest.approx((1.0 / 0.8) ** 2, rel=1e-4)


def test_without_scores_best_of_n_is_refused():
    with refused("no-scores"):
        best_of_n_points([group([None, 1.0, 2.0], [0.0, 0.0, 0.0])])


def test_the_smallest_group_bounds_n_and_larger_groups_are_used_whole():
    found = best_of_n_by(range(7), [[{"gold": 0.0}] * 3, [{"gold": 4.0 * place} for place in range(4)]])
    assert [point["n"] for point in found["points"]] == [1, 2, 3]
    # means of the largest of 1, 2 and 3 of {0, 4, 8, 12}, halved by the group of zeros
    assert [point["gold"]["mean"] for point in found["points"]] == pytest.approx([6 / 2, 56 / 6 / 2, 44 / 4 / 2])


def test_policies_are_fitted_from_the_first_and_need_two_more():
    kl = [0.0, 1.0, 4.0, 9.0]
    gold = [0.5 + d * (1.0 - 0.5 * math.log(d)) if d else 0.5 for d in (0.0, 1.0, 2.0, 3.0)]
    found = policy_points(kl, gold)
    assert found["fit"] == pytest.approx(gold) and found["beta"] == pytest.approx(0.5)
    assert found["peak_kl"] == pytest.approx(math.exp(2.0 - 1.0) ** 2)
    assert policy_points(kl[:2], gold[:2]) is None
    rising = policy_points(kl, [math.sqrt(one) for one in kl])
    assert rising["peak_kl"] is None or rising["peak_kl"] > 1e6, "a gold reward that only rises has no peak"
