"""Test ties, from votes in the data to reward models that train on them."""

import math

import pytest
import torch
from conftest import refused
from tiny_models import evaluate, fit, quiet_trainer, ranked_step

from rlhf_lightning.data import PreferenceDataModule
from rlhf_lightning.modules import DavidsonModule, DPOModule, RewardModule
from rlhf_lightning.types import PreferenceBatch, RankedBatch, RankedScores

from .test_reward import PAIR, WORKED, with_scores

VOTED = [
    {"prompt": "w7", "completion_1": "w8 w9", "completion_2": "w10", "label": "tie"},
    {"prompt": "w11", "completion_1": "w12", "completion_2": "w13 w14", "label": 2},
    {"prompt": "w15", "completion_1": "w16", "completion_2": "w17", "labels": [1, 0, 1]},
    {"prompt": "w18", "completion_1": "w19", "completion_2": "w20", "labels": [2, 0, 1]},
]


def data_for(kind, folder, source, **settings):
    """A DataModule as the module's trainer prepares it, and the module."""
    module, data = kind(init_from=folder, learning_rate=5e-3), PreferenceDataModule(source, **settings)
    trainer = quiet_trainer(max_epochs=settings.get("epochs", 1))
    return module, data, trainer


def batches(module, data, trainer):
    trainer.fit(module, data)
    return [batch for step in data.train_dataloader() for batch in step.micro_batches]


@pytest.mark.parametrize(("kind", "expected"), [(RewardModule, RankedBatch), (DPOModule, PreferenceBatch)])
def test_votes_become_soft_labels(kind, expected, policy_folder, write_rows, cache):
    (batch,) = batches(*data_for(kind, policy_folder, write_rows(VOTED), shuffle=False))
    assert isinstance(batch, expected)
    by_prompt = {}
    for row, prompt in enumerate(batch.sequences.prompts):
        first = batch.sequences.completions[row if expected is PreferenceBatch else 2 * row]
        by_prompt[int(prompt[-1])] = (int(first[0]), round(float(batch.target[row]), 4))
    assert by_prompt == {7: (8, 0.5), 11: (13, 1.0), 15: (16, 0.8333), 18: (19, 0.5)}


@pytest.mark.real
@pytest.mark.parametrize("kind", [RewardModule, DavidsonModule, DPOModule])
def test_pandalm_ties_are_read_and_trained_on(kind, policy_folder, shared_data, cache):
    source = str(shared_data("pandalm_ties.jsonl"))
    module, data, trainer = data_for(kind, policy_folder, source, batch_size=16, max_length=64)
    found = torch.cat([batch.target for batch in batches(module, data, trainer)])
    dropped = data.report.dropped  # some pairs are equal, as text or in this vocabulary
    assert data.report.read == 65 and data.report.kept == len(found) >= 40
    same = {"identical_completions", "identical_after_truncation"}
    assert same < set(dropped) == {*same, "empty_completion"} and dropped["empty_completion"] == 2
    votes = {0.5, 0.6667}  # three votes, at least two of them for a tie
    assert {round(share, 4) for share in found.tolist()} == votes and float((found == 0.5).float().mean()) > 0.6
    assert module.updates == math.ceil(len(found) / 16)


def test_ties_do_not_enter_the_accuracy():
    module, rows = with_scores(WORKED)
    found = evaluate(module, [ranked_step(rows, target=[1.0, 0.5])])
    assert found["val/accuracy"] == 1.0 and found["val/score_margin"] == pytest.approx(0.8)
    # -log sigmoid(0.8), and for the toss-up the mean of both sides of -0.2
    toss_up = 0.5 * (0.79813887 + 0.59813887)
    assert found["val/loss"] == pytest.approx((0.37110067 + toss_up) / 2, abs=1e-6)


def test_davidson_loss_by_hand():
    groups = [([0.8, 0.0], PAIR), ([0.8, 0.0], PAIR), ([1.0, 0.2, 0.0], [0, 0, 1])]
    module, rows = with_scores(groups, kind=DavidsonModule, tie_share=1 / 3)
    found = evaluate(module, [ranked_step(rows, 2, target=[1.0, 0.5, 1.0])])
    listed = (1.15125051 + 0.68026979 + 1.00194285) / 3
    assert found["val/loss"] == pytest.approx((0.75125051 + 1.15125051 + listed) / 3, abs=1e-6)


def test_davidson_recovers_the_generating_scores():
    """The population: every pair of four completions, with the win, loss and tie probabilities of the model."""
    scores, share = torch.tensor([0.9, 0.1, -0.4, -0.6], dtype=torch.float64), 0.4
    nu = 2 * share / (1 - share)
    module, _ = with_scores([([0.0] * 4, [0] * 4)], kind=DavidsonModule, tie_share=share)
    leaf = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    first, second = torch.triu_indices(4, 4, 1)
    half = (scores[first] - scores[second]) / 2
    shares = torch.stack([half, -half, torch.full_like(half, math.log(nu))]).softmax(0)
    groups = torch.arange(3 * len(first)).repeat_interleave(2)
    target = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64).repeat_interleave(len(first))
    ranks, index = torch.tensor([0, 1] * (3 * len(first))), torch.stack([first, second], 1).repeat(3, 1).flatten()
    optimizer = torch.optim.LBFGS(
        [leaf], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        given = RankedScores(leaf[index], groups, ranks, target, torch.zeros_like(target), torch.ones_like(target))
        loss = (shares.flatten() * module.ranking_loss(given)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = leaf.detach() - leaf.detach().mean()
    torch.testing.assert_close(found, scores - scores.mean(), atol=1e-6, rtol=0)


def test_fully_tied_lists_are_kept_only_for_tie_models(policy_folder, write_rows, cache):
    rows = [
        {"prompt": "w7", "completions": ["w8", "w9", "w10"], "ranks": [1, 1, 1]},
        {"prompt": "w11", "completions": ["w12", "w13"], "ranks": [0, 1]},
    ]
    source = write_rows(rows)
    module, data, trainer = data_for(DavidsonModule, policy_folder, source)
    (batch,) = batches(module, data, trainer)
    assert data.report.kept == 2 and sorted(batch.ranks.tolist()) == [0, 0, 0, 0, 1]
    _, plain, _ = both = data_for(RewardModule, policy_folder, source)
    batches(*both)
    assert plain.report.dropped == {"all_tied": 1}


def test_ties_reduce_the_score_difference(policy_folder, write_rows, cache):
    tied = [([7, 6], [[8, 9, 3], [10, 11, 3]], PAIR)]
    module = DavidsonModule(init_from=policy_folder, learning_rate=5e-3)
    before = evaluate(module, [ranked_step(tied, target=[0.5])])["val/loss"]
    fit(module, [ranked_step(tied, target=[0.5])] * 20)
    after = evaluate(module, [ranked_step(tied, target=[0.5])])["val/loss"]
    assert after < before and after == pytest.approx(math.log(2), abs=1e-3)  # -log of the share of ties


@pytest.mark.parametrize("share", [0, 1])
def test_a_tie_share_outside_0_to_1_is_refused(share):
    with refused("setting-out-of-range", f"tie_share of DavidsonModule is {share}: it must lie in (0, 1)"):
        DavidsonModule(init_from="unread", tie_share=share)
