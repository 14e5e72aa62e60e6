import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.functional.critic_free import (
    cispo_loss,
    constant_length_mean,
    dr_grpo_advantages,
    geometric_sequence_ratio,
    grpo_advantages,
    gspo_token_ratio,
    informative_groups,
    lite_ppo_advantages,
    over_tokens,
    overlong_penalty,
    reinforce_loss,
    reinforce_plus_plus_advantages,
    reinforce_plus_plus_baseline_advantages,
    remax_advantages,
    rloo_advantages,
    sequence_mean_token_mean,
    sequence_mean_token_sum,
    sequence_ratio,
    sequence_rewards,
    token_mean,
)
from rlhf_lightning.functional.logprobs import masked_whiten
from rlhf_lightning.functional.policy_gradient import clipped_policy_loss, clipped_surrogate_loss, token_ratio

from .worked import Worked, check, each, gradient, normal, property_test, right_padded_mask

SCORES, GROUP = [1, 0, 0.5, 0], torch.zeros(4, dtype=torch.long)
TWO_GROUPS, GROUPS = [1, 0, 0.5, 0, 1, 1, 0, 1], torch.tensor([0] * 4 + [1] * 4)
EQUAL_LENGTHS = torch.ones(8, 3, dtype=torch.bool)
LOG_RATIOS, MASK = [[0.1, -0.2, 0.3]], torch.ones(1, 3, dtype=torch.bool)
TOKEN_LOSSES = [[1, 1, 99, 99], [3, 3, 3, 3]]
TOKEN_MASK = torch.tensor([[True, True, False, False], [True] * 4])
ACCUMULATED = ([[1, 3, 0, 0, 0, 0]], [[0.5] * 6])
ACCUMULATED_MASKS = (torch.arange(6).unsqueeze(0) < 2, torch.arange(6).unsqueeze(0) < 6)


def no_change(t):
    return torch.zeros_like(t(LOG_RATIOS))


def surrogate(t, clip_high=None):
    return clipped_policy_loss(t(LOG_RATIOS), no_change(t), torch.ones_like(t(LOG_RATIOS)), 0.2, None, clip_high)


def gspo(t):
    ratio = geometric_sequence_ratio(t(LOG_RATIOS), no_change(t), MASK)
    return clipped_surrogate_loss(ratio, torch.ones_like(ratio), 3e-4, clip_high=4e-4)


def cispo(t):
    now, log_ratios = t([[-1, -0.5, -2]]), t([[1, -0.2, 0.3]])
    return cispo_loss(now, now - log_ratios, torch.ones_like(now), cap=2.0)


def whitened_globally(t):
    return masked_whiten(over_tokens(t(TWO_GROUPS), EQUAL_LENGTHS), EQUAL_LENGTHS)[:4, 0]


def baseline(t):
    return reinforce_plus_plus_baseline_advantages(t(TWO_GROUPS), GROUPS, EQUAL_LENGTHS)[:, 0]


def accumulated(t):
    parts = zip(ACCUMULATED, ACCUMULATED_MASKS, strict=True)
    return torch.stack([token_mean(t(losses), mask, tokens=8) for losses, mask in parts])


def mean_of_means(t):
    parts = zip(ACCUMULATED, ACCUMULATED_MASKS, strict=True)
    return torch.stack([token_mean(t(losses), mask) for losses, mask in parts]).mean()


REINFORCE_REWARDS, TO_GO = [[-0.01, 0.005, 0.9975]], [[0.9925, 1.0025, 0.9975]]
WORKED = [
    Worked("grpo", lambda t: grpo_advantages(t(SCORES), GROUP), [1.30530975, -0.78318585, 0.26106195, -0.78318585]),
    Worked("dr. grpo", lambda t: dr_grpo_advantages(t(SCORES), GROUP), [0.625, -0.375, 0.125, -0.375]),
    Worked("rloo", lambda t: rloo_advantages(t(SCORES), GROUP), [0.83333333, -0.5, 0.16666667, -0.5]),
    Worked("remax", lambda t: remax_advantages(t(SCORES), t([0.4] * 4)), [0.6, -0.4, 0.1, -0.4]),
    Worked("global whitening", whitened_globally, [0.94387979, -1.21355972, -0.13483997, -1.21355972]),
    Worked(
        "reinforce++ baseline",
        baseline,
        [1.47441952, -0.88465171, 0.29488390, -0.88465171, 0.58976781, 0.58976781, -1.76930342, 0.58976781],
    ),
    Worked("token ratio", lambda t: token_ratio(t(LOG_RATIOS), no_change(t)), [[1.10517092, 0.81873075, 1.34985881]]),
    Worked("geometric ratio", lambda t: geometric_sequence_ratio(t(LOG_RATIOS), no_change(t), MASK), [1.06893911]),
    Worked("product ratio", lambda t: sequence_ratio(t(LOG_RATIOS), no_change(t), MASK), [1.22140276]),
    Worked("grpo loss", lambda t: sequence_mean_token_mean(surrogate(t), MASK), -1.04130056),
    Worked("dapo loss", lambda t: token_mean(surrogate(t, clip_high=0.28), MASK), -1.06796722),
    Worked("gspo loss", lambda t: gspo(t).mean(), -1.0004),
    Worked("cispo loss", lambda t: token_mean(cispo(t), MASK), 1.70302766),
    Worked("token mean", lambda t: token_mean(t(TOKEN_LOSSES), TOKEN_MASK), 2.33333333),
    Worked("sequence mean of token means", lambda t: sequence_mean_token_mean(t(TOKEN_LOSSES), TOKEN_MASK), 2.0),
    Worked("sequence mean of token sums", lambda t: sequence_mean_token_sum(t(TOKEN_LOSSES), TOKEN_MASK), 7.0),
    Worked("constant length", lambda t: constant_length_mean(t(TOKEN_LOSSES), TOKEN_MASK, 8), 0.875),
    Worked("overlong", lambda t: overlong_penalty(t([79, 80, 90, 100, 130]), 100, 20), [0.0, 0.0, -0.5, -1.0, -1.0]),
    Worked("token mean over an accumulated step", lambda t: accumulated(t).sum(), 0.875),
    Worked("its mean of micro-batch means, which is another number", mean_of_means, 1.25),
    Worked("its two micro-batches as two accumulated losses", lambda t: 2 * accumulated(t), [1.0, 0.75]),
]


@each(WORKED)
def test_worked_number(case, dtype):
    check(case, dtype)


# --- advantages ------------------------------------------------------------------------------------------------------

seeds = st.integers(0, 2**31)
CENTRED = {
    "grpo": grpo_advantages,
    "dr. grpo": dr_grpo_advantages,
    "rloo": rloo_advantages,
    "lite": lite_ppo_advantages,
}
centred = pytest.mark.parametrize("name", CENTRED)


@centred
@property_test
@given(seed=seeds, size=st.integers(2, 5))
def test_advantages_sum_to_zero_in_every_group_and_forget_a_constant(name, seed, size):
    scores, group = normal(seed, 3 * size), torch.arange(3).repeat(size)
    advantages = CENTRED[name](scores, group)
    sums = torch.zeros(3, dtype=torch.float64).index_add(0, group, advantages)
    torch.testing.assert_close(sums, torch.zeros_like(sums), atol=1e-9, rtol=0)
    torch.testing.assert_close(CENTRED[name](scores + 7, group), advantages)


@centred
def test_equal_scores_give_exactly_zero(name):
    scores = torch.tensor([0.1, 0.1, 0.1, 5.0, 6.0])
    assert CENTRED[name](scores, torch.tensor([0, 0, 0, 1, 1]))[:3].tolist() == [0, 0, 0]


@centred
def test_an_unscorable_sample_is_out_of_the_baseline_and_gets_zero(name):
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    scores = torch.tensor([1.0, float("nan"), 0.0, 2.0, 2.5, float("nan")], dtype=torch.float64)
    found, kept = CENTRED[name](scores, group), ~scores.isnan()
    torch.testing.assert_close(found[kept], CENTRED[name](scores[kept], group[kept]))
    assert found[~kept].tolist() == [0, 0]
    nothing = CENTRED[name](torch.full((3,), float("nan")), torch.zeros(3, dtype=torch.long))
    assert nothing.tolist() == [0, 0, 0]


@centred
def test_a_sample_without_siblings_gets_zero(name):
    assert CENTRED[name](torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0, 1, 1]))[0].item() == 0


@property_test
@given(seed=seeds, size=st.integers(2, 6))
def test_rloo_is_score_minus_the_mean_of_the_others(seed, size):
    scores, group = normal(seed, size), torch.zeros(size, dtype=torch.long)
    by_hand = torch.stack([scores[i] - torch.cat([scores[:i], scores[i + 1 :]]).mean() for i in range(size)])
    torch.testing.assert_close(rloo_advantages(scores, group), by_hand)
    torch.testing.assert_close(rloo_advantages(scores, group), size / (size - 1) * dr_grpo_advantages(scores, group))


def test_deviations_of_group_and_batch():
    scores, group = torch.tensor([0.0, 2.0, 10.0, 14.0], dtype=torch.float64), torch.tensor([0, 0, 1, 1])
    by_group = grpo_advantages(scores, group, epsilon=0.0)
    torch.testing.assert_close(by_group, torch.tensor([-1, 1, -1, 1]).double() / math.sqrt(2))
    biased = grpo_advantages(scores, group, epsilon=0.0, unbiased=False)
    torch.testing.assert_close(biased, torch.tensor([-1, 1, -1, 1]).double())
    by_batch = lite_ppo_advantages(scores, group, epsilon=0.0)
    torch.testing.assert_close(by_batch, torch.tensor([-1, 1, -2, 2]).double() / math.sqrt(131 / 3))


def test_reinforce_plus_plus_whitens_rewards_to_go():
    mask = torch.ones(1, 3, dtype=torch.bool)
    found = reinforce_plus_plus_advantages(torch.tensor(REINFORCE_REWARDS, dtype=torch.float64), mask)
    to_go = torch.tensor(TO_GO, dtype=torch.float64)
    torch.testing.assert_close(found, (to_go - to_go.mean()) / (to_go.var(correction=0) + 1e-8).sqrt())


def test_reinforce_plus_plus_baseline_leaves_unscorable_rows_out_of_the_whitening():
    mask, group = torch.ones(3, 2, dtype=torch.bool), torch.zeros(3, dtype=torch.long)
    found = reinforce_plus_plus_baseline_advantages(torch.tensor([1.0, 0.0, float("nan")]), group, mask)
    torch.testing.assert_close(found, torch.tensor([[1.0, 1.0], [-1.0, -1.0], [0.0, 0.0]]))


def test_sequence_rewards_subtract_the_summed_kl():
    mask = torch.tensor([[True, True], [True, False]])
    kl = torch.tensor([[0.5, 0.25], [1.0, float("nan")]])
    torch.testing.assert_close(sequence_rewards(torch.tensor([1.0, 2.0]), kl, mask, 0.1), torch.tensor([0.925, 1.9]))


def test_only_groups_whose_scores_differ_are_informative():
    scores = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, float("nan"), float("nan"), float("nan")])
    group = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    assert informative_groups(scores, group).tolist() == [True, False, False, False]


# --- ratios and objectives -------------------------------------------------------------------------------------------


@property_test
@given(seed=seeds, rows=st.integers(1, 3), length=st.integers(1, 5))
def test_at_ratio_one_clip_cispo_and_reinforce_share_their_gradient(seed, rows, length):
    mask = right_padded_mask(seed, rows, length)
    logprobs = torch.where(mask, normal(seed, rows, length), 0.0)
    advantages = torch.where(mask, normal(seed + 1, rows, length), 0.0)
    for aggregate in (token_mean, sequence_mean_token_mean, sequence_mean_token_sum):
        clip, cispo, reinforce = (
            gradient(lambda lp, loss=loss: aggregate(loss(lp), mask), logprobs)[0]  # noqa: B023
            for loss in (
                lambda lp: clipped_policy_loss(lp, logprobs, advantages),
                lambda lp: cispo_loss(lp, logprobs, advantages),
                lambda lp: reinforce_loss(lp, advantages),
            )
        )
        torch.testing.assert_close(clip, reinforce)
        torch.testing.assert_close(cispo, reinforce)
        assert clip[~mask].abs().sum().item() == 0


@property_test
@given(seed=seeds)
def test_gspo_over_tokens_has_the_gradient_of_the_sequence_ratio(seed):
    mask = right_padded_mask(seed, 3, 4)
    old = torch.where(mask, normal(seed, 3, 4), 0.0)
    now = torch.where(mask, old + 0.3 * normal(seed + 1, 3, 4), 0.0)
    advantages = normal(seed + 2, 3)

    def by_sequence(lp):
        return clipped_surrogate_loss(geometric_sequence_ratio(lp, old, mask), advantages, 0.2).mean()

    def by_token(lp):
        losses = clipped_surrogate_loss(gspo_token_ratio(lp, old, mask), over_tokens(advantages, mask), 0.2)
        return sequence_mean_token_mean(losses, mask)

    torch.testing.assert_close(by_token(now), by_sequence(now))
    torch.testing.assert_close(gradient(by_token, now), gradient(by_sequence, now))


def test_cispo_keeps_the_gradient_of_capped_tokens():
    now, old = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-4.0, -1.0]])
    (slope,) = gradient(lambda lp: cispo_loss(lp, old, torch.ones(1, 2), cap=5.0), now)
    assert slope.tolist() == [[-5.0, -1.0]]
    (clipped,) = gradient(lambda lp: clipped_policy_loss(lp, old, torch.ones(1, 2)), now)
    assert clipped.tolist() == [[0.0, -1.0]]


def test_reinforce_gradient_is_minus_the_advantage():
    advantages = torch.tensor([[2.0, -3.0]])
    (slope,) = gradient(lambda lp: reinforce_loss(lp, advantages), torch.tensor([[-1.0, -2.0]]))
    assert slope.tolist() == [[-2.0, 3.0]]


# --- aggregations ----------------------------------------------------------------------------------------------------

AGGREGATIONS = {
    "token mean": lambda losses, mask, **counts: token_mean(losses, mask, counts.get("tokens")),
    "mean of means": lambda losses, mask, **counts: sequence_mean_token_mean(losses, mask, counts.get("rows")),
    "mean of sums": lambda losses, mask, **counts: sequence_mean_token_sum(losses, mask, counts.get("rows")),
    "constant": lambda losses, mask, **counts: constant_length_mean(losses, mask, 8, counts.get("rows")),
}
aggregations = pytest.mark.parametrize("name", AGGREGATIONS)


@aggregations
@property_test
@given(seed=seeds, rows=st.integers(2, 5), length=st.integers(1, 5), pads=st.integers(0, 3))
def test_padding_and_micro_batches_change_neither_value_nor_gradient(name, seed, rows, length, pads):
    aggregate, mask, losses = AGGREGATIONS[name], right_padded_mask(seed, rows, length), normal(seed, rows, length)
    whole = aggregate(losses, mask)
    padded = aggregate(F.pad(losses, (0, pads), value=float("nan")), F.pad(mask, (0, pads)))
    torch.testing.assert_close(padded, whole)
    counts = {"tokens": mask.sum(), "rows": rows}
    cut = seed % (rows - 1) + 1

    def in_two(losses):
        first, second = aggregate(losses[:cut], mask[:cut], **counts), aggregate(losses[cut:], mask[cut:], **counts)
        return first + second

    torch.testing.assert_close(in_two(losses), whole)
    (slope,) = gradient(lambda x: aggregate(x, mask), losses)
    torch.testing.assert_close(gradient(in_two, losses), (slope,))
    assert slope[~mask].abs().sum().item() == 0


@aggregations
def test_a_fully_masked_row_weighs_nothing_and_a_fully_masked_batch_gives_zero(name):
    aggregate = AGGREGATIONS[name]
    mask = torch.tensor([[True, True], [False, False]])
    losses = torch.tensor([[1.0, 3.0], [float("nan"), float("nan")]])
    expected = {"token mean": 2.0, "mean of means": 2.0, "mean of sums": 4.0, "constant": 4 / 16}
    assert aggregate(losses, mask).item() == expected[name]
    assert aggregate(losses, torch.zeros_like(mask)).item() == 0


def test_a_row_without_tokens_leaves_every_loss_and_gradient_finite():
    mask = torch.tensor([[True, True], [False, False]])
    old = torch.tensor([[-1.0, -2.0], [0.0, 0.0]])
    group = torch.zeros(2, dtype=torch.long)
    advantages = reinforce_plus_plus_baseline_advantages(torch.tensor([1.0, 0.0]), group, mask)
    of_sequence = grpo_advantages(torch.tensor([1.0, 0.0]), group)
    losses = {
        "token": lambda lp: clipped_policy_loss(lp, old, advantages),
        "product": lambda lp: clipped_surrogate_loss(sequence_ratio(lp, old, mask), of_sequence).unsqueeze(-1),
        "geometric": lambda lp: clipped_surrogate_loss(geometric_sequence_ratio(lp, old, mask), of_sequence).unsqueeze(
            -1
        ),
        "gspo": lambda lp: clipped_surrogate_loss(gspo_token_ratio(lp, old, mask), advantages),
        "cispo": lambda lp: cispo_loss(lp, old, advantages),
        "reinforce": lambda lp: reinforce_loss(lp, advantages),
    }
    for name, loss in losses.items():
        (slope,) = gradient(loss, old + 0.1 * mask)
        assert loss(old).isfinite().all() and slope.isfinite().all(), name
        assert slope[1].abs().sum().item() == 0, name
