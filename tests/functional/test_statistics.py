import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.functional.statistics import (
    best_of_n_curve,
    best_of_n_kl,
    best_of_n_overoptimization,
    best_of_n_overoptimization_fit,
    best_of_n_peak,
    bootstrap_interval,
    brier_score,
    calibration_error,
    length_controlled_fit,
    length_controlled_win_rate,
    length_terms,
    log_loss,
    logistic_fit,
    pass_at_k,
    rl_overoptimization,
    rl_overoptimization_fit,
    rl_peak,
    wilson_interval,
    win_rate,
)

from .worked import Worked, check, each, normal, property_test

DELTA = [0.8, -0.2, 2.0, 0.1, -1.5]
PROXY, GOLD = [0.1, 0.4, 0.35, 0.8], [1, 3, 2, 2.5]
# The last two lengths make the standard deviation of all five 1, so the first three are already standardised.
FAR = math.sqrt((5 * (1 + 0.16**2) - 1.34) / 2)
LENGTHS = [1, -0.5, 0.3, FAR, -FAR]


def soft_verdicts(t):
    return torch.sigmoid(0.2 + 0.5 * length_terms(t(LENGTHS)))


def fit(t):
    return length_controlled_fit(soft_verdicts(t), t(LENGTHS), ridge=1e-12)


WORKED = [
    Worked("calibration error", lambda t: calibration_error(t(DELTA), bins=5), 0.21664205),
    Worked("accuracy", lambda t: (t(DELTA) > 0).double().mean(), 0.6),
    Worked("brier", lambda t: brier_score(t(DELTA)).mean(), 0.26134308),
    Worked("log loss", lambda t: log_loss(t(DELTA)).mean(), 0.72839550),
    Worked(
        "best-of-n kl",
        lambda t: best_of_n_kl(torch.tensor([1, 2, 4, 16, 64])),
        [0, 0.19314718, 0.63629436, 1.83508872, 3.17450808],
    ),
    Worked("best-of-n curve", lambda t: best_of_n_curve(t(PROXY), t(GOLD)), [2.125, 2.58333333, 2.625, 2.5]),
    Worked("pass at k", lambda t: pass_at_k(5, torch.tensor([2]), 2), [0.7]),
    Worked("wilson 60 of 100", lambda t: torch.stack(wilson_interval(0.6, 100)), [0.50200259, 0.69059871]),
    Worked("wilson 3 of 4", lambda t: torch.stack(wilson_interval(0.75, 4)), [0.30064184, 0.95441274]),
    Worked("wilson 0 of 10", lambda t: torch.stack(wilson_interval(0.0, 10)), [0, 0.27753280]),
    Worked("raw win rate", lambda t: soft_verdicts(t)[:3].mean(), 0.57301687),
    Worked("controlled win rate", lambda t: torch.sigmoid(fit(t)[0]), 0.54983400),
    Worked("best-of-n overoptimization", lambda t: best_of_n_overoptimization(t(1.5), 1, 0.2), 1.05),
    Worked("best-of-n peak", lambda t: torch.stack(best_of_n_peak(1, 0.2)), [2.5, 1.25]),
    Worked("rl overoptimization", lambda t: rl_overoptimization(t(3.0), 1, 0.4), 1.68166525),
    Worked("rl peak", lambda t: torch.stack(rl_peak(1, 0.4)), [4.48168907, 1.79267563]),
]


@each(WORKED)
def test_worked_number(case, dtype):
    check(case, dtype)


def test_length_controlled_win_rate_by_hand():
    lengths = torch.tensor(LENGTHS, dtype=torch.float64)
    verdicts = torch.sigmoid(0.2 + 0.5 * length_terms(lengths))
    theta, phi = length_controlled_fit(verdicts, lengths, ridge=1e-12)
    torch.testing.assert_close((theta.item(), phi.item()), (0.2, 0.5), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(torch.sigmoid(theta).item(), 0.54983400, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(length_controlled_win_rate(verdicts, lengths).item(), 0.54983400, rtol=1e-3, atol=0)


# --- calibration -----------------------------------------------------------------------------------------------------


def test_a_calibrated_reward_model_has_no_calibration_error():
    confident = torch.full((10,), math.log(0.7 / 0.3), dtype=torch.float64)
    confident[:3] *= -1  # 70 % confident, wrong in 30 % of cases
    torch.testing.assert_close(calibration_error(confident, bins=10).item(), 0.0, atol=1e-12, rtol=0)
    torch.testing.assert_close(calibration_error(confident.abs(), bins=10).item(), 0.3)


@property_test
@given(seed=st.integers(0, 2**31), bins=st.integers(1, 12))
def test_calibration_error_equals_a_plain_loop(seed, bins):
    delta = 2 * normal(seed, 40)
    confidence, right = torch.sigmoid(delta.abs()), (delta > 0).double()
    edges, expected = torch.linspace(0.5, 1, bins + 1, dtype=torch.float64), 0.0
    for low, high in itertools.pairwise(edges):
        inside = (confidence >= low) & (confidence < high)
        if inside.any():
            expected += inside.double().mean() * (confidence[inside].mean() - right[inside].mean()).abs()
    torch.testing.assert_close(calibration_error(delta, bins), torch.as_tensor(expected))


def test_a_tied_score_counts_as_probability_one_half():
    tie = torch.zeros(1)
    assert calibration_error(tie).item() == 0.5
    assert brier_score(tie).item() == 0.25
    torch.testing.assert_close(log_loss(tie).item(), math.log(2))


# --- intervals -------------------------------------------------------------------------------------------------------


def test_ties_count_as_half_a_win():
    assert win_rate(torch.tensor([1.0, 0.5, 0.5, 0.0])).item() == 0.5


@property_test
@given(wins=st.integers(0, 50), count=st.integers(50, 500))
def test_wilson_bounds_are_the_critical_points_of_the_score_test(wins, count):
    rate, z = wins / count, 1.959963984540054
    for end in wilson_interval(rate, count):
        p = end.item()
        assert 0 <= p <= 1
        assert (rate - p) ** 2 == pytest.approx(z**2 * p * (1 - p) / count, abs=1e-12)


def test_the_bootstrap_is_deterministic_and_has_the_theoretical_width():
    values = (torch.arange(200) % 5 < 3).double()
    low, high = bootstrap_interval(values, draws=4000, seed=3)
    again = bootstrap_interval(values, draws=4000, seed=3)
    assert (low.item(), high.item()) == (again[0].item(), again[1].item())
    half = 1.96 * math.sqrt(0.6 * 0.4 / 200)
    assert low.item() == pytest.approx(0.6 - half, abs=0.01)
    assert high.item() == pytest.approx(0.6 + half, abs=0.01)
    narrower = bootstrap_interval(values, draws=4000, seed=3, level=0.5)
    assert low < narrower[0] < narrower[1] < high


def test_the_bootstrap_resamples_prompts():
    values = normal(0, 30)
    repeated, prompts = values.repeat_interleave(4), torch.arange(30).repeat_interleave(4)
    clustered = bootstrap_interval(repeated, draws=2000, clusters=prompts)
    torch.testing.assert_close(clustered, bootstrap_interval(values, draws=2000))
    naive = bootstrap_interval(repeated, draws=2000)
    assert naive[1] - naive[0] < 0.6 * (clustered[1] - clustered[0])


@property_test
@given(seed=st.integers(0, 2**31))
def test_the_length_controlled_fit_minimises_its_penalised_loss(seed):
    lengths = 100 * normal(seed, 60)
    verdicts = (normal(seed + 1, 60) + 0.5 * length_terms(lengths) > 0).double()
    theta, phi = length_controlled_fit(verdicts, lengths, ridge=0.1)
    residual = verdicts - torch.sigmoid(theta + phi * length_terms(lengths))
    torch.testing.assert_close(residual.sum(), 0.1 * theta)
    torch.testing.assert_close((residual * length_terms(lengths)).sum(), 0.1 * phi)


def test_winning_all_rows_or_equal_lengths_give_finite_rates():
    all_won = length_controlled_win_rate(torch.ones(20), torch.arange(20.0))
    assert 0.99 < all_won.item() < 1
    same_length = length_controlled_win_rate(torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.zeros(4))
    assert same_length.item() == pytest.approx(0.75, abs=1e-3)


def test_length_bias_is_removed():
    lengths = torch.tensor([1.0, 1.0, 1.0, -1.0] * 25)  # mostly longer, with a judge that prefers length only
    verdicts = torch.where(lengths > 0, 0.8, 0.2)
    assert win_rate(verdicts).item() == pytest.approx(0.65)
    theta, phi = length_controlled_fit(verdicts, lengths - lengths.mean())
    assert phi > 1
    centred_on_equal = length_controlled_fit(verdicts, lengths)
    assert torch.sigmoid(centred_on_equal[0]).item() == pytest.approx(0.5, abs=1e-3)
    assert theta > centred_on_equal[0]


# --- best of n -------------------------------------------------------------------------------------------------------


@property_test
@given(seed=st.integers(0, 2**31), samples=st.integers(1, 6), levels=st.integers(2, 50))
def test_best_of_n_curve_is_the_mean_over_all_subsets(seed, samples, levels):
    generator = torch.Generator().manual_seed(seed)
    proxy = torch.randint(levels, (samples,), generator=generator).double()
    gold = normal(seed, samples)
    curve = best_of_n_curve(proxy, gold)
    for n in range(1, samples + 1):
        picked = []
        for subset in itertools.combinations(range(samples), n):
            index = torch.tensor(subset)
            best = proxy[index] == proxy[index].max()
            picked.append(gold[index][best].mean())  # ties are equally likely
        torch.testing.assert_close(curve[n - 1], torch.stack(picked).mean())


def test_best_of_n_gives_one_curve_per_prompt():
    proxy, gold = torch.tensor([PROXY, GOLD]), torch.tensor([GOLD, PROXY])
    torch.testing.assert_close(best_of_n_curve(proxy, gold)[1], best_of_n_curve(proxy[1], gold[1]))


@property_test
@given(samples=st.integers(1, 7), correct=st.integers(0, 7), k=st.integers(1, 7))
def test_pass_at_k_counts_subsets(samples, correct, k):
    correct, k = min(correct, samples), min(k, samples)
    subsets = list(itertools.combinations(range(samples), k))
    expected = sum(min(subset) < correct for subset in subsets) / len(subsets)
    assert pass_at_k(samples, torch.tensor([correct]), k).item() == pytest.approx(expected, abs=1e-12)


# --- over-optimisation -----------------------------------------------------------------------------------------------


@property_test
@given(alpha=st.floats(0.1, 3), beta=st.floats(0.05, 1))
def test_fits_recover_their_curve_and_peaks_are_maxima(alpha, beta):
    distance = torch.linspace(0.0, 4.0, 9, dtype=torch.float64)
    for curve, fit, peak in (
        (best_of_n_overoptimization, best_of_n_overoptimization_fit, best_of_n_peak),
        (rl_overoptimization, rl_overoptimization_fit, rl_peak),
    ):
        gold = curve(distance, alpha, beta)
        assert gold[0].item() == 0
        torch.testing.assert_close([x.item() for x in fit(distance, gold)], [alpha, beta])
        at, height = peak(alpha, beta)
        torch.testing.assert_close(curve(at, alpha, beta), height)
        assert (curve(at * torch.tensor([0.9, 1.1]), alpha, beta) < height).all()


def test_unregularised_logistic_fit_reproduces_group_means():
    design = torch.tensor([[1.0, 0.0]] * 4 + [[1.0, 1.0]] * 5)
    targets = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0, 0])
    intercept, slope = logistic_fit(design, targets, torch.zeros(2)).tolist()
    assert intercept == pytest.approx(math.log(1 / 3)) and intercept + slope == pytest.approx(math.log(3 / 2))
    shrunk = logistic_fit(design, targets, torch.tensor([0.0, 1.0]))
    residual = targets.double() - torch.sigmoid(design.double() @ shrunk)
    assert (design.double().T @ residual).tolist() == pytest.approx([0.0, shrunk[1].item()])
