"""Adapters for losses of OpenRLHF: ``rlhf verify --foreign openrlhf:PairWise``; install it with ``--no-deps``."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_lightning.modules import DPOModule, GSPOModule, IPOModule, PPOModule, RewardModule, SFTModule
from rlhf_lightning.types import CriticValues, PolicyLogprobs, PreferenceLogprobs, RankedScores, TokenLogprobs
from rlhf_lightning.verification.foreign import compared_with, import_alone

PACKAGE = "openrlhf"

_KL = {"kl_place": "reward", "kl_estimator": "k1"}


def _losses() -> Any:
    return import_alone("openrlhf.models.loss", stubs=("deepspeed",))


@compared_with({"dpo": DPOModule, "ipo": (IPOModule, {"average": False})}, by="loss_type")
def DPO(pairs: PreferenceLogprobs, loss_type: Literal["dpo", "ipo"] = "dpo", beta: float = 0.1) -> Tensor:
    """Call ``DPOLoss``."""
    assert pairs.reference_chosen_logprobs is not None and pairs.reference_rejected_logprobs is not None
    loss, _, _ = _losses().DPOLoss(beta, ipo=loss_type == "ipo")(
        pairs.chosen_sequence_logprobs,
        pairs.rejected_sequence_logprobs,
        pairs.reference_chosen_logprobs.sum(-1),
        pairs.reference_rejected_logprobs.sum(-1),
    )
    return loss


def _two_sides(scores: RankedScores) -> tuple[Tensor, Tensor]:
    best = scores.ranks == 0
    return scores.scores[best], scores.scores[~best]


@compared_with(RewardModule)
def PairWise(scores: RankedScores) -> Tensor:
    """Call ``PairWiseLoss`` with the rated margin."""
    if len(scores.scores) != 2 * len(scores.target):
        return _by_pairs(scores)
    chosen, rejected = _two_sides(scores)
    loss = _losses().PairWiseLoss()
    right, wrong = loss(chosen, rejected, scores.margin), loss(rejected, chosen, scores.margin)
    if len(scores.target) == 1:  # a soft label is the expectation over both orders
        return scores.target[0] * right + (1 - scores.target[0]) * wrong
    rows = [PairWise(_group(scores, row)) for row in range(len(scores.target))]
    return torch.stack(rows)


def _group(scores: RankedScores, row: int) -> RankedScores:
    own, index = scores.group == row, torch.tensor([row])
    target, margin, weights = (part[index] for part in (scores.target, scores.margin, scores.weights))
    return RankedScores(scores.scores[own], 0 * scores.group[own], scores.ranks[own], target, margin, weights)


def _by_pairs(scores: RankedScores) -> Tensor:
    """Return the mean loss over all pairs of different rank, for each list."""
    loss, found = _losses().PairWiseLoss(), []
    for row in range(len(scores.target)):
        one = _group(scores, row)
        pairs = [(i, j) for i in range(len(one.ranks)) for j in range(len(one.ranks)) if one.ranks[i] < one.ranks[j]]
        first, second = (one.scores[torch.tensor(side)] for side in zip(*pairs, strict=True))
        found.append(loss(first, second, one.margin.expand(len(pairs))))
    return torch.stack(found)


@compared_with(SFTModule)
def SFT(logprobs: TokenLogprobs) -> Tensor:
    """Call ``SFTLoss``."""
    return _losses().SFTLoss()(logprobs.logprobs, logprobs.completion_mask.to(logprobs.logprobs))


@compared_with({"ppo": PPOModule, "gspo": (GSPOModule, {"clip": 0.2, "clip_high": None, **_KL})}, by="loss_type")
def Policy(
    logprobs: PolicyLogprobs,
    loss_type: Literal["ppo", "gspo"] = "ppo",
    clip: float = 0.2,
    dual_clip: float | None = None,
) -> Tensor:
    """Call ``PolicyLoss``."""
    loss = _losses().PolicyLoss(clip, clip, dual_clip, policy_loss_type=loss_type)
    mask = logprobs.completion_mask.to(logprobs.logprobs)
    return loss(logprobs.logprobs, logprobs.old_logprobs, logprobs.advantages, mask)[0]


@compared_with(PPOModule)
def Value(values: CriticValues, value_clip: float = 0.2) -> Tensor:
    """Call ``ValueLoss``."""
    mask = values.completion_mask.to(values.values)
    return _losses().ValueLoss(value_clip)(values.values, values.old_values, values.returns, mask)
