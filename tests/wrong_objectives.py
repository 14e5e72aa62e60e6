"""Objectives with one common mistake each, and the check that must detect it."""

from typing import Any

import torch
import torch.nn.functional as F
from functional.pair_losses import dpo_loss
from torch import Tensor

from rlhf_lightning.functional.logprobs import kl_k1, masked_whiten
from rlhf_lightning.functional.policy_gradient import token_rewards
from rlhf_lightning.modules import (
    BCOModule,
    DPOModule,
    GRPOModule,
    KTOModule,
    PPOModule,
    RewardModule,
    RLOOModule,
    SFTModule,
)
from rlhf_lightning.types import Advantages, PolicyLogprobs, Rollout, Step

CAUGHT_BY: dict[type, str] = {}
"""The check that must fail, by class."""

NAMED: dict[type, str] = {}
"""Words that the reason must contain, by class."""


def caught_by(check: str, words: str = "") -> Any:
    def remember(kind: type) -> type:
        CAUGHT_BY[kind] = check
        if words:
            NAMED[kind] = words
        return kind

    return remember


# -- pairs ------------------------------------------------------------------------------------------------------------


@caught_by("direction")
class FlippedSign(DPOModule):
    def pair_loss(self, logprobs):
        return F.logsigmoid(self.beta * logprobs.margin)


@caught_by("direction")
class ChosenAndRejectedSwapped(DPOModule):
    def pair_loss(self, logprobs):
        return dpo_loss(logprobs.rejected_logratio - logprobs.chosen_logratio, self.beta)


@caught_by("micro-batches")
class MeanForSum(DPOModule):
    def loss_sum(self, batch, meter):
        return super().loss_sum(batch, meter) / len(batch.target)


@caught_by("two ranks")
class DividedByThisRank(DPOModule):
    def loss_count(self, step):
        return sum(len(batch.target) for batch in step.micro_batches)


@caught_by("labels")
class LabelIgnored(DPOModule):
    def preference_loss(self, logprobs):
        return dpo_loss(logprobs.margin, self.beta)


@caught_by("padding")
class DividedByTheWidth(DPOModule):
    def pair_loss(self, logprobs):
        return dpo_loss(logprobs.margin / logprobs.chosen_mask.shape[1], self.beta)


@caught_by("padding")
class MeanOverCells(DPOModule):
    def pair_loss(self, logprobs):
        chosen = logprobs.policy_chosen_logprobs.mean(-1) - logprobs.reference_chosen_logprobs.mean(-1)
        rejected = logprobs.policy_rejected_logprobs.mean(-1) - logprobs.reference_rejected_logprobs.mean(-1)
        return dpo_loss(chosen - rejected, self.beta)


@caught_by("reference detached")
class ReferenceWithGradient(DPOModule):
    def preference_logprobs(self, batch):
        found = super().preference_logprobs(batch)
        alive = 0.0 * found.policy_chosen_logprobs
        return found._replace(reference_chosen_logprobs=found.reference_chosen_logprobs + alive)


@caught_by("reference logprobs")
class RatioToItself(DPOModule):
    def preference_logprobs(self, batch):
        found = super().preference_logprobs(batch)
        return found._replace(reference_chosen_logprobs=found.policy_chosen_logprobs.detach())


@caught_by("tokens")
class PromptUnmasked(DPOModule):
    def preference_logprobs(self, batch):
        s = batch.sequences
        longer = tuple(torch.cat([s.prompts[p], c]) for p, c in zip(s.parents, s.completions, strict=True))
        flags = tuple(torch.ones(len(c), dtype=torch.bool) for c in longer)
        return super().preference_logprobs(batch._replace(sequences=s._replace(completions=longer, supervised=flags)))


@caught_by("tokens")
class EndTokenMasked(DPOModule):
    def preference_logprobs(self, batch):
        flags = tuple(torch.arange(len(f)) < max(len(f) - 1, 1) for f in batch.sequences.supervised)
        return super().preference_logprobs(batch._replace(sequences=batch.sequences._replace(supervised=flags)))


@caught_by("policy logprobs")
class AtAnotherTemperature(DPOModule):
    def preference_logprobs(self, batch):
        found = super().preference_logprobs(batch)
        return found._replace(policy_chosen_logprobs=found.policy_chosen_logprobs / 0.7)


@caught_by("row weights")
class WeightsForgotten(DPOModule):
    def loss_sum(self, batch, meter):
        return super().loss_sum(batch._replace(weights=torch.ones_like(batch.weights)), meter)


@caught_by("gradcheck")
class OneSideDetached(DPOModule):
    def pair_loss(self, logprobs):
        return dpo_loss(logprobs.chosen_logratio.detach() - logprobs.rejected_logratio, self.beta)


@caught_by("gradient")
class AllDetached(DPOModule):
    def pair_loss(self, logprobs):
        return dpo_loss(logprobs.margin.detach() + 0 * logprobs.margin, self.beta)


@caught_by("extremes")
class LogOfSigmoid(DPOModule):
    def pair_loss(self, logprobs):
        x = self.beta * logprobs.margin
        return -torch.sigmoid(x).log()


@caught_by("extremes")
class ExponentUnbounded(DPOModule):
    def pair_loss(self, logprobs):
        x = self.beta * logprobs.margin
        return torch.exp(-x)


@caught_by("value at reference")
class OffsetUnderTheSameStatement(DPOModule):
    value_at_reference = 0.6931471805599453

    def pair_loss(self, logprobs):
        return dpo_loss(logprobs.margin - 1.0, self.beta)


@caught_by("convergence")
class BetaInTheWrongPlace(DPOModule):
    def pair_loss(self, logprobs):
        return dpo_loss(logprobs.margin / self.beta, 1.0)

    def target_policy(self, problem):
        return torch.softmax(problem.reference.log() + problem.rewards / self.beta, -1)


@caught_by("control")
class LabelsDrowned(DPOModule):
    def preference_loss(self, logprobs):
        both = dpo_loss(logprobs.margin, self.beta) + dpo_loss(-logprobs.margin, self.beta)
        return both + 0 * logprobs.target


# -- demonstrations, judgements, rankings -----------------------------------------------------------------------------


@caught_by("direction")
class Unlikelihood(SFTModule):
    def token_loss(self, logprobs):
        return -super().token_loss(logprobs)


@caught_by("padding")
class DemonstrationsByWidth(SFTModule):
    def token_loss(self, logprobs):
        return super().token_loss(logprobs) / logprobs.logprobs.shape[1]


@caught_by("two ranks")
class TokensOfThisRank(SFTModule):
    def loss_count(self, step):
        return sum(int(mask.sum()) for batch in step.micro_batches for mask in batch.sequences.supervised)


@caught_by("direction")
class ThumbsExchanged(KTOModule):
    def unpaired_loss(self, logprobs):
        return super().unpaired_loss(logprobs._replace(desirable=~logprobs.desirable))


@caught_by("micro-batches")
class PointOfTheMicroBatch(BCOModule):
    def loss_sum(self, batch, meter):
        self._reference_point = self._point_of(Step((batch,), 0, 0))
        return super().loss_sum(batch, meter)


@caught_by("value at reference")
class JudgedTwice(BCOModule):
    def unpaired_loss(self, logprobs):
        return 2 * super().unpaired_loss(logprobs)


@caught_by("direction")
class WorstFirst(RewardModule):
    def ranking_loss(self, scores):
        return super().ranking_loss(scores._replace(ranks=1 - scores.ranks))


@caught_by("shift")
class ScoresHeldDown(RewardModule):
    def ranking_loss(self, scores):
        levels = torch.zeros_like(scores.weights).index_add(0, scores.group, scores.scores.square())
        return super().ranking_loss(scores) + 0.1 * levels


@caught_by("micro-batches")
class RankedMean(RewardModule):
    def ranking_loss(self, scores):
        losses = super().ranking_loss(scores)
        return losses.sum().expand(len(losses))


# -- on-policy --------------------------------------------------------------------------------------------------------


@caught_by("kl in reward")
class KLOfTheWrongSign(PPOModule):
    def shape_rewards(self, rollout):
        kl = kl_k1(rollout.reference_logprobs, rollout.old_logprobs)
        return token_rewards(rollout.scores, kl, rollout.completion_mask, self.kl_coef)


@caught_by("score slot")
class ScoreOneTokenEarly(RLOOModule):
    def shape_rewards(self, rollout):
        return super().shape_rewards(rollout).roll(-1, dims=1)


@caught_by("score slot")
class ScoreOnEveryToken(RLOOModule):
    def shape_rewards(self, rollout):
        spread = torch.where(rollout.completion_mask, rollout.scores.unsqueeze(-1), 0.0)
        return super().shape_rewards(rollout._replace(scores=0 * rollout.scores)) + spread


@caught_by("rewards under mask")
class RewardsOnPads(RLOOModule):
    def shape_rewards(self, rollout):
        return super().shape_rewards(rollout) - 0.1 * (~rollout.completion_mask)


@caught_by("padding")
class WhitenedOverPads(PPOModule):
    def advantages(self, rollout, rewards):
        found = super().advantages(rollout, rewards)
        everything = torch.ones_like(rollout.completion_mask)
        whitened = masked_whiten(found.advantages, everything)
        return found._replace(advantages=torch.where(rollout.completion_mask, whitened, 0.0))


@caught_by("advantages under mask")
class WhitenedWithoutTheMask(RLOOModule):
    def advantages(self, rollout, rewards):
        found = super().advantages(rollout, rewards)
        return Advantages(found.advantages - found.advantages.mean(), None)


@caught_by("advantage sign")
class AdvantageNegated(GRPOModule):
    def episode_advantages(self, rewards, rollout):
        return -super().episode_advantages(rewards, rollout)


@caught_by("ratio one")
class RatioInverted(GRPOModule):
    def ratio(self, logprobs):
        return (logprobs.old_logprobs - logprobs.logprobs).clamp(-20, 20).exp()


@caught_by("ratio one")
class RatioDetached(GRPOModule):
    def ratio(self, logprobs):
        return super().ratio(logprobs).detach() + 0 * logprobs.logprobs


@caught_by("ratio one")
class AdvantageWithGradient(GRPOModule):
    def policy_loss(self, logprobs):
        return -(logprobs.advantages + logprobs.logprobs) * super().ratio(logprobs)


@caught_by("pull back")
class ClippedOnTheWrongSide(PPOModule):
    def policy_loss(self, logprobs):
        ratio = (logprobs.logprobs - logprobs.old_logprobs).clamp(-20, 20).exp()
        plain, held = -logprobs.advantages * ratio, -logprobs.advantages * ratio.clamp(0.8, 1.2)
        return torch.minimum(plain, held)


@caught_by("clip")
class NotClipped(PPOModule):
    def policy_loss(self, logprobs: PolicyLogprobs) -> Tensor:
        return -logprobs.advantages * (logprobs.logprobs - logprobs.old_logprobs).clamp(-20, 20).exp()


@caught_by("extremes")
class RatioUnbounded(RLOOModule):
    def ratio(self, logprobs):
        return (logprobs.logprobs - logprobs.old_logprobs).exp()


@caught_by("value gradient")
class CriticPushedAway(PPOModule):
    def value_loss(self, values):
        return -0.5 * (values.values - values.returns) ** 2


@caught_by("value clip")
class SmallerOfTheTwo(PPOModule):
    def value_loss(self, values):
        held = values.old_values + (values.values - values.old_values).clamp(-0.2, 0.2)
        return 0.5 * torch.minimum((values.values - values.returns) ** 2, (held - values.returns) ** 2)


@caught_by("kl penalty")
class PenaltyPushesAway(GRPOModule):
    def kl_loss(self, logprobs):
        found = super().kl_loss(logprobs)
        return None if found is None else -found


@caught_by("control")
class ScoresForgotten(RLOOModule):
    def shape_rewards(self, rollout: Rollout) -> Tensor:
        return super().shape_rewards(rollout)

    def advantages(self, rollout, rewards):
        found = super().advantages(rollout, rewards)
        return Advantages(0 * found.advantages, None)
