import pytest
import torch
from tiny_models import quiet_trainer

from rlhf_lightning.training.meter import Meter

STRATEGY = quiet_trainer().strategy


def test_means_do_not_depend_on_micro_batches() -> None:
    values, mask = torch.arange(12.0).view(3, 4), torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()
    whole, cut = Meter(), Meter()
    whole.add("x", values, mask)
    for row in range(3):
        cut.add("x", values[row], mask[row])
    expected = (0 + 1 + 4 + 8 + 9 + 10 + 11) / 7
    assert whole.means(STRATEGY)["x"] == pytest.approx(expected)
    assert cut.means(STRATEGY)["x"] == pytest.approx(expected)


def test_masked_values_are_ignored() -> None:
    meter = Meter()
    meter.add("x", torch.tensor([1.0, float("nan"), float("inf")]), torch.tensor([True, False, False]))
    assert meter.means(STRATEGY) == {"x": 1.0}


def test_ratios_sum_numerators_and_denominators() -> None:
    meter = Meter()
    meter.add_ratio("share", 1.0, 2.0)
    meter.add_ratio("share", torch.tensor(3.0), 10)
    assert meter.means(STRATEGY)["share"] == pytest.approx(4 / 12)


def test_large_counts_keep_their_precision() -> None:
    meter = Meter()
    meter.add("x", torch.full((3,), 16_777_217.0, dtype=torch.float64))
    assert meter.means(STRATEGY)["x"] == 16_777_217.0


def test_reset_values_are_not_reported() -> None:
    meter = Meter()
    assert meter.means(STRATEGY) == {}
    meter.add("x", torch.ones(2))
    meter.add("y", torch.zeros(2))
    meter.forget("x")
    assert meter.means(STRATEGY) == {"y": 0.0}


def test_values_are_detached() -> None:
    meter, values = Meter(), torch.ones(2, requires_grad=True)
    meter.add("x", values * 2)
    assert not any(pair.requires_grad for pair in meter._sums.values())


def test_names_without_values_are_left_out() -> None:
    meter, values = Meter(), torch.tensor([torch.nan, torch.nan])
    meter.add("nothing", values, ~values.isnan())
    meter.add_interval("none", torch.zeros(0))
    meter.add("some", torch.tensor([3.0, torch.nan]), torch.tensor([True, False]))
    meter.add_ratio("loss", 0.0, 0.0)
    assert meter.means(STRATEGY) == {"some": 3.0, "loss": 0.0}


def test_a_rank_that_adds_nothing_reports_the_same_names() -> None:
    other, nothing = Meter(), Meter()
    other.add_ratio("loss", 0.0, 0.0)
    other.add("ratio", torch.zeros(0))
    nothing.add_nothing(other)
    assert nothing.means(STRATEGY) == other.means(STRATEGY) == {"loss": 0.0}
