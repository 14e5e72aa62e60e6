"""Test significance tests: a planted difference is found as often as theory predicts, a true null as
rarely as stated.
"""

import math

import numpy as np
import pytest
from scipy import stats

from rlhf_lightning.evaluation.differences import clustered_difference, holm, mcnemar, mean_interval, seed_difference

COMPARISONS = 500


def within(found: int, rate: float) -> bool:
    """Return whether a count out of `COMPARISONS` is in the central 99.9 % range for the rate."""
    low, high = stats.binom.ppf([0.0005, 0.9995], COMPARISONS, rate)
    return low <= found <= high


def arms(rng, gap, seeds=5, spread=1.0):
    """Return two arms whose seeds share half of their variance, as with equal data order."""
    shared = rng.normal(size=seeds)
    first, second = (shared + rng.normal(size=seeds) * spread / math.sqrt(2) for _ in range(2))
    return dict(enumerate(first)), dict(enumerate(second + gap))


def test_the_test_over_seeds_has_its_nominal_power_and_level():
    rng = np.random.default_rng(0)
    for gap in (0.0, 2.0):
        centre = gap * math.sqrt(5)
        bound = stats.t.ppf(0.975, 4)
        power = float(stats.nct.sf(bound, 4, centre) + stats.nct.cdf(-bound, 4, centre)) if gap else 0.05
        tests = [seed_difference(*arms(rng, gap)) for _ in range(COMPARISONS)]
        assert within(sum(test.p < 0.05 for test in tests), power), power
        assert within(sum(test.low <= gap <= test.high for test in tests), 0.95)
        assert all((test.p < 0.05) == (test.low > 0 or test.high < 0) for test in tests)


def test_the_test_over_prompts_finds_a_difference_and_its_interval_covers_it():
    rng = np.random.default_rng(1)
    spread, prompts = 0.25, 256  # of the difference in gold reward between two policies on one prompt
    for gap in (0.0, 0.05):
        shift = gap / spread * prompts**0.5
        rate = stats.norm.sf(1.96 - shift) + stats.norm.cdf(-1.96 - shift)  # 0.05 without a difference, then 0.89
        gaps = rng.normal(gap, spread, (COMPARISONS, prompts))
        tests = [clustered_difference(row, seed=number, draws=500) for number, row in enumerate(gaps)]
        assert within(sum(test.p < 0.05 for test in tests), float(rate)), rate
        assert sum(test.low <= gap <= test.high for test in tests) > 0.9 * COMPARISONS


def test_samples_of_one_prompt_are_treated_as_one_cluster():
    rng = np.random.default_rng(2)
    wrong = right = 0
    for number in range(COMPARISONS):
        gaps = np.repeat(rng.normal(size=40), 4) + 0.1 * rng.normal(size=160)
        clusters = np.repeat(np.arange(40), 4).tolist()
        right += clustered_difference(gaps, clusters, number, 500).p < 0.05
        wrong += clustered_difference(gaps, None, number, 500).p < 0.05
    assert within(right, 0.05)
    assert wrong > 0.2 * COMPARISONS


def test_mcnemar_has_its_nominal_level_and_finds_a_difference():
    rng = np.random.default_rng(3)
    zero = planted = 0
    for _ in range(COMPARISONS):
        first = rng.random(300) < 0.7
        zero += mcnemar(first, rng.random(300) < 0.7) < 0.05
        planted += mcnemar(first, rng.random(300) < 0.85) < 0.05
    assert zero <= stats.binom.ppf(0.9995, COMPARISONS, 0.05)  # an exact test is conservative
    assert planted > 0.95 * COMPARISONS
    assert mcnemar([True] * 8 + [False] * 2, [False] * 2 + [True] * 8) == pytest.approx(1.0)
    assert mcnemar([False] * 5, [True] * 5) == pytest.approx(2 / 32)


def test_holm_controls_the_family_wise_error_rate():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, math.nan, 0.02])[0] == 0.5 and math.isnan(holm([0.5, math.nan])[1])
    rng = np.random.default_rng(4)
    errors = sum(min(holm(rng.random(4).tolist())) < 0.05 for _ in range(COMPARISONS))
    assert errors <= stats.binom.ppf(0.9995, COMPARISONS, 0.05)


def test_too_few_values_give_no_interval_and_no_test():
    assert mean_interval([2.0])[0] == 2.0 and math.isnan(mean_interval([2.0])[1])
    one = seed_difference({0: 1.0}, {0: 3.0})
    assert one.mean == 2 and math.isnan(one.p) and "one seed" in one.test
    assert "Welch" in seed_difference({0: 1.0, 1: 2.0}, {2: 3.0, 3: 5.0}).test
    assert seed_difference({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}).p == 1.0
    assert clustered_difference([math.nan, 1.0]).test == "none: one prompt"
