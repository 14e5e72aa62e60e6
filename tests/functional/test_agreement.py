"""Test agreement on Krippendorff's own example, and reliabilities against simulated annotators."""

import math

import pytest
import torch

from rlhf_lightning.functional.judging import annotator_reliability, krippendorff_alpha
from rlhf_lightning.functional.ranking import bradley_terry_loss

NAN = float("nan")
EXAMPLE = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
    [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN],
]
"""Krippendorff's example of four observers and twelve units; the paper gives alpha to three digits."""


@pytest.mark.parametrize(("metric", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_krippendorffs_published_example(metric, alpha):
    assert float(krippendorff_alpha(torch.tensor(EXAMPLE), metric)) == pytest.approx(alpha, abs=5e-4)


def test_alpha_of_two_annotators_by_hand():
    """Ten units, three disagreements: D_o = 6 / 20; 15 values 0 and 5 values 1: D_e = 2 * 15 * 5 / (20 * 19)."""
    first, second = [0] * 6 + [1, 1, 0, 1], [0] * 6 + [0, 0, 1, 1]
    expected = 1 - (6 / 20) / (2 * 15 * 5 / (20 * 19))
    assert float(krippendorff_alpha(torch.tensor([first, second], dtype=torch.float64))) == pytest.approx(expected)


def test_alpha_is_1_for_full_agreement_and_nan_if_undefined():
    same = torch.tensor([[0.0, 1.0, 1.0], [0.0, 1.0, 1.0]])
    assert float(krippendorff_alpha(same)) == 1
    assert float(krippendorff_alpha(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))) < 0
    assert math.isnan(float(krippendorff_alpha(torch.tensor([[0.0, 1.0], [NAN, NAN]])))), "no second annotator"
    assert math.isnan(float(krippendorff_alpha(torch.ones(2, 3)))), "nothing that could differ"


def test_alpha_ignores_annotator_order_and_empty_units():
    table = torch.tensor(EXAMPLE)
    more = torch.cat([table.flip(0), torch.full((4, 2), NAN)], -1)
    assert torch.allclose(krippendorff_alpha(more, "ordinal"), krippendorff_alpha(table, "ordinal"))


def simulated(seed, pairs=400, rates=(0.9, 0.85, 0.8, 0.5, 0.5)):
    """Return pairs of feature vectors, whether the first is better, and votes of annotators with given accuracies."""
    generator = torch.Generator().manual_seed(seed)
    difference = torch.randn(pairs, 8, generator=generator, dtype=torch.float64)
    gold = torch.randn(8, generator=generator, dtype=torch.float64)
    first = (difference @ gold > 0).double()
    right = torch.rand(len(rates), pairs, generator=generator) < torch.tensor(rates).unsqueeze(-1)
    return difference, gold, first, torch.where(right, first, 1 - first)


def test_simulated_reliabilities_are_recovered():
    _, _, first, votes = simulated(0, pairs=4000)
    rates, better = annotator_reliability(votes)
    assert rates.tolist() == pytest.approx([0.9, 0.85, 0.8, 0.5, 0.5], abs=0.03)
    mean = votes.mean(0)
    assert ((better > 0.5) == first.bool()).double().mean() > ((mean > 0.5) == first.bool()).double().mean() + 0.02


def test_ties_and_missing_votes_carry_no_information():
    _, _, _, votes = simulated(1)
    silent = torch.cat([votes, torch.full((1, votes.shape[1]), NAN), torch.full((1, votes.shape[1]), 0.5)])
    rates, better = annotator_reliability(silent)
    alone, same = annotator_reliability(votes)
    assert torch.allclose(rates[:5], alone) and torch.allclose(better, same)
    assert rates[5:].tolist() == pytest.approx([0.75, 0.75]), "the prior, where nothing is known"


def test_a_reward_model_of_reliability_labels_beats_one_of_the_majority():
    """Two of five annotators answer at random; a linear reward model trains on either label and is tested on unseen
    pairs.
    """

    def held_out_accuracy(difference, gold, target):
        weights = torch.zeros(8, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=100)

        def loss():
            optimizer.zero_grad()
            scores = difference @ weights
            value = bradley_terry_loss(scores, torch.zeros_like(scores), target).mean() + 1e-3 * weights.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        unseen = torch.randn(4000, 8, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        return float(((unseen @ weights > 0) == (unseen @ gold > 0)).double().mean())

    gains = []
    for seed in range(12):
        difference, gold, _, votes = simulated(seed, pairs=60)
        majority = (votes.sum(0) > 2.5).double()
        aware = held_out_accuracy(difference, gold, annotator_reliability(votes)[1])
        gains.append(aware - held_out_accuracy(difference, gold, majority))
    mean, deviation = torch.tensor(gains).mean(), torch.tensor(gains).std()
    assert mean > 2 * deviation / 12**0.5 > 0, "no clear gain"
