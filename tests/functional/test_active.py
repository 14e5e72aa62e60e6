"""Test the information of a label: hand-computed values, limits, and the order with the best coverage."""

import math

import torch
from conftest import refused

from rlhf_lightning.functional.selection import disagreement, farthest_first, preference_probabilities, uncertainty

LOG3 = math.log(3.0)  # this margin makes one side three times as likely


def test_list_probabilities_equal_pair_probabilities():
    found = preference_probabilities(torch.tensor([[LOG3, 0.0, 0.0]]))
    torch.testing.assert_close(found, torch.tensor([[0.75, 0.75, 0.5]]))


def test_uncertainty_by_hand():
    torch.testing.assert_close(uncertainty(torch.tensor([[LOG3, 0.0]])), torch.tensor(0.5))
    # The mean of 3/4 and 1/4 is 1/2, however certain each ensemble member is.
    torch.testing.assert_close(uncertainty(torch.tensor([[LOG3, 0.0], [0.0, LOG3]])), torch.tensor(1.0))
    # The pairs in the list have 1 - |2 p - 1| equal to 1/2, 1/2 and 1.
    torch.testing.assert_close(uncertainty(torch.tensor([[LOG3, 0.0, 0.0]])), torch.tensor(2 / 3))
    assert uncertainty(torch.tensor([[50.0, -50.0]])) == 0


def test_disagreement_by_hand():
    torch.testing.assert_close(disagreement(torch.tensor([[LOG3, 0.0], [0.0, LOG3]])), torch.tensor(1 / 16))
    torch.testing.assert_close(disagreement(torch.tensor([[50.0, -50.0], [-50.0, 50.0]])), torch.tensor(0.25))
    assert disagreement(torch.tensor([[3.0, 1.0], [2.0, 0.0]])) == 0, "only differences of scores count"


def test_uncertainty_and_disagreement_do_not_depend_on_order():
    scores = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    for value in (uncertainty, disagreement):
        torch.testing.assert_close(value(scores), value(scores.flip(1)))
        torch.testing.assert_close(value(scores), value(scores.flip(0)))


def test_farthest_first_by_hand():
    points = torch.tensor([[0.0], [1.0], [9.0], [10.0], [4.0]])
    # The mean is 4.8, and 4 is nearest; then 10 (6 away), 0 (4 away), 1 and 9 (1 away each; the first of equals).
    assert farthest_first(points, torch.empty(0, 1)).tolist() == [4, 3, 0, 1, 2]
    assert farthest_first(points, torch.tensor([[10.0]])).tolist() == [0, 4, 1, 2, 3]
    assert farthest_first(points[:0], points).tolist() == []


def test_farthest_first_can_be_continued():
    points = torch.randn(30, 5, generator=torch.Generator().manual_seed(1))
    whole = farthest_first(points, torch.empty(0, 5))
    taken, left = whole[:12], torch.tensor(sorted(set(range(30)) - set(whole[:12].tolist())))
    assert left[farthest_first(points[left], points[taken])].tolist() == whole[12:].tolist()


def test_wrong_shapes_are_refused():
    with refused("shape-mismatch", "scores"):
        uncertainty(torch.zeros(3))
