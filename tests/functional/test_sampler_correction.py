import pytest
import torch

from rlhf_lightning.functional.surrogates import (
    effective_share,
    normalised_weights,
    off_policy_weights,
    sampler_weights,
)

from .worked import Worked, check, each

OLD, BEHAVIOUR = [[-1, -0.5, -2], [-0.2, -1.5, -0.7]], [[-1.2, -0.4, -3.9], [-0.9, -1.4, -0.6]]
MASK = torch.ones(2, 3, dtype=torch.bool)
TRUNCATED = [[1.22140276, 0.90483742, 2.0], [2.0, 0.90483742, 0.90483742]]


def weights(t, correction, **bounds):
    return sampler_weights(correction, t(OLD), t(BEHAVIOUR), MASK, **bounds)


def geometric_means(t):
    """Return the lower bounds below which each completion is dropped."""
    means = [1.94773404, 1.18136041]
    for row, mean in enumerate(means):
        kept = [weights(t, "geometric_mask", low=mean * (1 + e), high=9.0)[row, 0].item() for e in (-1e-6, 1e-6)]
        assert kept == [1, 0]
    return t(means)


WORKED = [
    Worked(
        "ratios",
        lambda t: weights(t, "token_truncate", high=1e9),
        [[1.22140276, 0.90483742, 6.68589444], [2.01375271, 0.90483742, 0.90483742]],
    ),
    Worked("token, truncated", lambda t: weights(t, "token_truncate", high=2.0), TRUNCATED),
    Worked(
        "token, masked",
        lambda t: weights(t, "token_mask", low=0.5, high=5.0),
        [[1.22140276, 0.90483742, 0.0], [2.01375271, 0.90483742, 0.90483742]],
    ),
    Worked("sequence", lambda t: weights(t, "sequence_truncate", high=1e9)[:, 0], [7.3890561, 1.64872127]),
    Worked("sequence, truncated", lambda t: weights(t, "sequence_truncate", high=3.0)[:, 0], [3.0, 1.64872127]),
    Worked("sequence, masked", lambda t: weights(t, "sequence_mask", high=3.0)[:, 0], [0.0, 1.64872127]),
    Worked("geometric, rejected", lambda t: weights(t, "geometric_mask", low=0.5, high=1.5)[:, 0], [0.0, 1.0]),
    Worked(
        "token, truncated on both sides",
        lambda t: weights(t, "token_truncate", high=2.0, low=1.0),
        [[1.22140276, 1.0, 2.0], [2.0, 1.0, 1.0]],
    ),
    Worked("sequence, low", lambda t: weights(t, "sequence_mask", high=9.0, low=2.0)[:, 0], [7.3890561, 0.0]),
    Worked("bypass", lambda t: weights(t, "bypass"), [[1.0] * 3] * 2),
    Worked("geometric means", geometric_means, [1.94773404, 1.18136041]),
]


@each(WORKED)
def test_worked_number(case, dtype):
    check(case, dtype)


CORRECTIONS = ["bypass", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_mask"]


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_equal_logprobs_give_weight_one_and_padding_is_ignored(correction):
    old = torch.tensor(OLD)
    assert sampler_weights(correction, old, old, MASK).tolist() == [[1.0] * 3] * 2
    mask = torch.tensor([[True, True, False]] * 2)
    behaviour = torch.tensor(BEHAVIOUR)
    wild = torch.where(mask, behaviour, -50.0)
    short = sampler_weights(correction, old[:, :2], behaviour[:, :2], mask[:, :2])
    torch.testing.assert_close(sampler_weights(correction, old, wild, mask)[:, :2], short)


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_extreme_differences_give_finite_weights(correction):
    far = torch.tensor([[-1.0, -5e3]]), torch.tensor([[-5e3, -1.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    for old, behaviour in (far, far[::-1], (far[0][:, :1], far[1][:, :1])):
        assert sampler_weights(correction, old, behaviour, mask[:, : old.shape[1]]).isfinite().all()


def test_normalised_weights_have_mean_one_over_tokens():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    found = normalised_weights(torch.tensor(TRUNCATED), mask)
    assert float(found[mask].mean()) == pytest.approx(1)
    torch.testing.assert_close(
        normalised_weights(torch.tensor(TRUNCATED), mask, torch.tensor(4.0)) * 4, torch.tensor(TRUNCATED)
    )
    assert normalised_weights(torch.zeros(1, 2), mask[1:, :2]).tolist() == [[0, 0]]


def test_effective_sample_fraction_by_hand():
    weight = torch.tensor([1.0, 1.0, 0.0, 2.0])
    share = effective_share(weight.mean(), weight.var(correction=0))
    assert float(share) == pytest.approx(16 / (4 * 6))
    assert float(effective_share(torch.tensor(0.0), torch.tensor(0.0))) == 0


def test_opsm_masks_unlikely_completions_with_negative_advantage():
    old, mask = torch.tensor([[-1.0, -1.0]] * 4), torch.ones(4, 2, dtype=torch.bool)
    now = torch.tensor([[-2.0, -1.5], [-2.0, -1.5], [-1.2, -1.2], [0.0, -1.0]])
    advantages = torch.tensor([[-1.0], [1.0], [-1.0], [-1.0]]).expand(4, 2)
    assert off_policy_weights(now, old, advantages, mask, 0.5).tolist() == [[0, 0], [1, 1], [1, 1], [1, 1]]
    assert off_policy_weights(now, old, advantages, mask, 0.1)[:, 0].tolist() == [0, 1, 0, 1]
