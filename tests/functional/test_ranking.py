import math

import pytest
import torch
from conftest import refused
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.functional.ranking import (
    bradley_terry_loss,
    centering_penalty,
    davidson_loss,
    mean_by_group,
    plackett_luce_loss,
    ranked_davidson_loss,
    ranked_pairs_loss,
    untied_pairs,
)

from .worked import Worked, check, each, gradient, normal, property_test

CHOSEN, REJECTED = [1.2, 0.3], [0.4, 0.5]
PAIR_GROUPS, PAIR_RANKS = torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1])
ONE_GROUP, ONE_RANKING = torch.zeros(3, dtype=torch.long), torch.arange(3)


def pairs_as_groups(t, target=(1.0, 1.0), margin=(0.0, 0.0), centering=0.0):
    scores = torch.cat([t(CHOSEN), t(REJECTED)])
    return ranked_pairs_loss(scores, PAIR_GROUPS, PAIR_RANKS, t(target), t(margin), centering)


def pair_losses_of_three(t):
    scores = t([2, 1, 0.5])
    better, worse = untied_pairs(ONE_GROUP, ONE_RANKING)
    return bradley_terry_loss(scores[better], scores[worse]).sort().values


WORKED = [
    Worked("bradley-terry", lambda t: bradley_terry_loss(t(CHOSEN), t(REJECTED)), [0.37110067, 0.79813887]),
    Worked("bradley-terry mean", lambda t: bradley_terry_loss(t(CHOSEN), t(REJECTED)).mean(), 0.58461977),
    Worked("margin", lambda t: bradley_terry_loss(t(CHOSEN), t(REJECTED), margin=t([0.5, 0])).mean(), 0.67624706),
    Worked("margin, as groups", lambda t: pairs_as_groups(t, margin=(0.5, 0.0)).mean(), 0.67624706),
    Worked(
        "centering",
        lambda t: (
            bradley_terry_loss(t(CHOSEN), t(REJECTED)) + 0.01 * centering_penalty(t(CHOSEN), t(REJECTED))
        ).mean(),
        0.60061977,
    ),
    Worked("centering, as groups", lambda t: pairs_as_groups(t, centering=0.01).mean(), 0.60061977),
    Worked("accuracy", lambda t: (t(CHOSEN) > t(REJECTED)).double().mean(), 0.5),
    Worked("soft label", lambda t: bradley_terry_loss(t([0.8]), t([0.0]), t([0.7])), [0.61110067]),
    Worked("soft label of a judge", lambda t: bradley_terry_loss(t([0.5]), t([0.0]), t([0.6])), [0.67407698]),
    Worked("mean by group", lambda t: mean_by_group(t([1, 2, 4]), torch.tensor([0, 2, 2]), 3), [1.0, 0.0, 3.0]),
    Worked("pairs of a ranking", pair_losses_of_three, [0.20141328, 0.31326169, 0.47407698]),
    Worked(
        "mean over pairs of a ranking",
        lambda t: ranked_pairs_loss(t([2, 1, 0.5]), ONE_GROUP, ONE_RANKING, t([1.0]), t([0.0])),
        [0.32958398],
    ),
    # nu = 1: log(e^0.4 + e^-0.4 + 1) = 1.15125051, less 0.4, plus 0.4, less 0; then half of each of the first and last
    Worked(
        "davidson",
        lambda t: davidson_loss(t([0.8, 0.8, 0.8, 0.8]), t([0, 0, 0, 0]), t([1, 0, 0.5, 0.75]), 1 / 3),
        [0.75125051, 1.55125051, 1.15125051, 0.95125051],
    ),
    # nu = 2: log(e^0.4 + e^-0.4 + 2) = 1.42603050, less 0.4, less log 2
    Worked(
        "davidson, more ties",
        lambda t: davidson_loss(t([0.8, 0.8]), t([0, 0]), t([1, 0.5]), 0.5),
        [1.02603050, 0.73288332],
    ),
    Worked(
        "davidson of equals", lambda t: davidson_loss(t([2, 2]), t([2, 2]), t([1, 0.5]), 0.5), [1.38629436, 0.69314718]
    ),
    # a tie of 0.8, and two wins by 1 and by 0.2: 1.15125051, log(e^.5 + e^-.5 + 1) - .5, log(e^.1 + e^-.1 + 1) - .1
    Worked(
        "davidson of a list",
        lambda t: ranked_davidson_loss(t([1, 0.2, 0]), ONE_GROUP, torch.tensor([0, 0, 1]), t([1.0]), 1 / 3),
        [(1.15125051 + 0.68026979 + 1.00194285) / 3],
    ),
    Worked("plackett-luce", lambda t: plackett_luce_loss(t([2, 1, 0.5]), ONE_GROUP, ONE_RANKING), [0.93844577]),
]


@each(WORKED)
def test_worked_number(case, dtype):
    check(case, dtype)


def plain_groups(count):
    return torch.ones(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)


@property_test
@given(seed=st.integers(0, 2**31), p=st.floats(0, 1), margin=st.floats(0, 3))
def test_swapping_completions_equals_swapping_the_label(seed, p, margin):
    chosen, rejected = 3 * normal(seed, 4), 3 * normal(seed + 1, 4)
    delta = chosen - rejected
    difference = bradley_terry_loss(chosen, rejected) - bradley_terry_loss(rejected, chosen)
    torch.testing.assert_close(difference, -delta)
    target, gap = torch.full_like(delta, p), torch.full_like(delta, margin)
    torch.testing.assert_close(
        bradley_terry_loss(chosen, rejected, target, gap), bradley_terry_loss(rejected, chosen, 1 - target, gap)
    )


def test_equal_scores_give_log_2_and_target_1_equals_no_target():
    scores = torch.tensor([0.3, -4.0])
    torch.testing.assert_close(bradley_terry_loss(scores, scores), torch.full((2,), math.log(2)))
    other = torch.tensor([1.3, -7.0])
    torch.testing.assert_close(bradley_terry_loss(scores, other, torch.ones(2)), bradley_terry_loss(scores, other))


def test_chosen_scores_are_pushed_up_and_rejected_down_by_the_probability_of_error():
    chosen, rejected = torch.tensor([0.8], dtype=torch.float64), torch.tensor([0.0], dtype=torch.float64)
    up, down = gradient(bradley_terry_loss, chosen, rejected)
    error = 1 / (1 + math.exp(0.8))
    torch.testing.assert_close(up.item(), -error)
    torch.testing.assert_close(down.item(), error)


def test_extreme_scores_give_finite_losses():
    loss = bradley_terry_loss(torch.tensor([-1e4, 1e4]), torch.tensor([1e4, -1e4]))
    assert loss.tolist() == [2e4, 0.0]


@property_test
@given(seed=st.integers(0, 2**31), pairs=st.integers(1, 5))
def test_ranking_losses_of_two_equal_the_pair_loss(seed, pairs):
    chosen, rejected = normal(seed, pairs), normal(seed + 1, pairs)
    scores = torch.stack([chosen, rejected], dim=1).flatten()
    group, ranks = torch.arange(pairs).repeat_interleave(2), torch.tensor([0, 1]).repeat(pairs)
    expected = bradley_terry_loss(chosen, rejected)
    torch.testing.assert_close(plackett_luce_loss(scores, group, ranks), expected)
    torch.testing.assert_close(ranked_pairs_loss(scores, group, ranks, *plain_groups(pairs)), expected)


@property_test
@given(seed=st.integers(0, 2**31), size=st.integers(2, 5))
def test_ranking_losses_ignore_order_and_a_constant(seed, size):
    scores = normal(seed, 2 * size)
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.randint(3, (2 * size,), generator=generator)
    group = torch.arange(2).repeat(size)
    shuffled = torch.randperm(2 * size, generator=generator)
    for loss in (
        lambda s, g, r: ranked_pairs_loss(s, g, r, *plain_groups(2)),
        plackett_luce_loss,
    ):
        expected = loss(scores, group, ranks)
        torch.testing.assert_close(loss(scores[shuffled], group[shuffled], ranks[shuffled]), expected)
        torch.testing.assert_close(loss(scores + 5, group, ranks), expected)


def test_tied_pairs_are_skipped_and_the_others_averaged():
    scores, group = torch.tensor([2.0, 1.0, 1.5]), torch.zeros(3, dtype=torch.long)
    tied_second = ranked_pairs_loss(scores, group, torch.tensor([0, 1, 1]), torch.ones(1), torch.zeros(1))
    by_hand = (math.log1p(math.exp(-1.0)) + math.log1p(math.exp(-0.5))) / 2
    torch.testing.assert_close(tied_second.item(), by_hand)
    torch.testing.assert_close(
        plackett_luce_loss(scores, group, torch.tensor([0, 1, 1])).item(),
        math.log(math.exp(2) + math.exp(1) + math.exp(1.5)) - 2,
    )


@pytest.mark.parametrize("loss", ["pairs", "plackett_luce"])
def test_a_group_without_an_untied_pair_gives_exactly_zero_and_no_gradient(loss):
    group, ranks = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 0, 0, 1, 0])

    def values(scores):
        if loss == "pairs":
            return ranked_pairs_loss(scores, group, ranks, torch.ones(3), torch.zeros(3), centering=0.1)
        return plackett_luce_loss(scores, group, ranks)

    scores = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    found = values(scores)
    assert found[0].item() == 0 and found[2].item() == 0 and found[1].item() > 1
    (slope,) = gradient(values, scores)
    assert slope[[0, 1, 4]].tolist() == [0, 0, 0]
    assert slope[2] < slope[3]


def test_a_soft_label_changes_only_its_own_group():
    scores, target = torch.tensor([0.8, 0.0, 0.8, 0.0], dtype=torch.float64), torch.tensor([0.7, 1.0]).double()
    group, ranks = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    found = ranked_pairs_loss(scores, group, ranks, target, torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor([0.61110067, 0.37110067]).double(), rtol=1e-6, atol=1e-8)


@property_test
@given(seed=st.integers(0, 2**31), share=st.floats(0.01, 0.99))
def test_davidsons_three_probabilities_sum_to_one(seed, share):
    chosen, rejected = normal(seed, 4), normal(seed + 1, 4)
    win, loss, tie = (
        davidson_loss(chosen, rejected, torch.full((4,), p, dtype=torch.float64), share) for p in (1.0, 0.0, 0.5)
    )
    torch.testing.assert_close((-win).exp() + (-loss).exp() + (-tie).exp(), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(loss - win, chosen - rejected)  # the odds of winning equal Bradley-Terry's
    (pull,) = gradient(lambda s: davidson_loss(s, rejected, torch.full((4,), 0.5).double(), share).sum(), chosen)
    assert (pull * (chosen - rejected) > 0).all()  # a tie pulls scores together
    swapped = davidson_loss(rejected, chosen, torch.zeros(4, dtype=torch.float64), share)
    torch.testing.assert_close(swapped, win)


def test_davidson_without_ties_equals_bradley_terry():
    chosen, rejected = normal(0, 5), normal(1, 5)
    found = davidson_loss(chosen, rejected, torch.ones(5, dtype=torch.float64), 1e-12)
    torch.testing.assert_close(found, bradley_terry_loss(chosen, rejected))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_tie_share_of_0_or_1_is_refused(share):
    with refused("setting-out-of-range", f"tie_share is {share}: it must be in"):
        davidson_loss(torch.zeros(1), torch.zeros(1), torch.ones(1), share)
