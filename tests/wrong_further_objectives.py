"""Objectives with one hard-to-see mistake each, and the check that must detect it."""

import torch
import torch.nn.functional as F
from functional.pair_losses import dpo_loss
from wrong_objectives import caught_by

from rlhf_lightning.functional.policy_gradient import generalized_advantages
from rlhf_lightning.functional.ranking import ranked_pairs_loss
from rlhf_lightning.modules import (
    BCOModule,
    DPOModule,
    DrGRPOModule,
    GRPOModule,
    GSPOModule,
    KTOModule,
    OnlineDPOModule,
    PPOModule,
    RewardModule,
    RLOOModule,
    SFTModule,
)
from rlhf_lightning.types import Advantages

# -- pairs, judgements, demonstrations --------------------------------------------------------------------------------


@caught_by("every token")
class LastTokenAlone(DPOModule):
    def pair_loss(self, pair):
        last = [mask.sum(-1, keepdim=True) - 1 for mask in (pair.chosen_mask, pair.rejected_mask)]
        chosen, rejected = (r.gather(1, at).squeeze(1) for r, at in zip(pair.token_logratios, last, strict=True))
        return dpo_loss(chosen - rejected, self.beta)


@caught_by("every token")
class FirstTokenSkipped(DPOModule):
    def pair_loss(self, pair):
        shifted = [ratios[:, 1:].sum(-1) for ratios in pair.token_logratios]
        return dpo_loss(shifted[0] - shifted[1] + 0 * pair.margin, self.beta)


@caught_by("every token")
class EndNotImitated(SFTModule):
    def token_loss(self, logprobs):
        places = torch.arange(logprobs.completion_mask.shape[1])
        return super().token_loss(logprobs) * (places < logprobs.lengths.unsqueeze(-1) - 1)


@caught_by("every token")
class OneTokenJudged(KTOModule):
    def unpaired_loss(self, logprobs):
        first = torch.arange(logprobs.policy_logprobs.shape[1]) == 0
        cut = {name: getattr(logprobs, name) * first for name in ("policy_logprobs", "reference_logprobs")}
        return super().unpaired_loss(logprobs._replace(**cut))


@caught_by("reference slope")
class ReferenceAdded(DPOModule):
    def pair_loss(self, pair):
        policy = pair.chosen_sequence_logprobs - pair.rejected_sequence_logprobs
        reference = pair.reference_chosen_logprobs.sum(-1) - pair.reference_rejected_logprobs.sum(-1)
        return dpo_loss(policy + reference, self.beta)


@caught_by("reference slope")
class ReferenceForgotten(DPOModule):
    def pair_loss(self, pair):
        return dpo_loss(pair.chosen_sequence_logprobs - pair.rejected_sequence_logprobs, self.beta)


@caught_by("reference slope")
class ReferenceOfOneSide(DPOModule):
    def pair_loss(self, pair):
        return dpo_loss(pair.chosen_logratio - pair.rejected_sequence_logprobs, self.beta)


@caught_by("reference slope")
class ReferenceOfJudgementsForgotten(BCOModule):
    def unpaired_loss(self, logprobs):
        return super().unpaired_loss(logprobs._replace(reference_logprobs=0 * logprobs.reference_logprobs))


@caught_by("rated margin")
class MarginAdded(DPOModule):
    def pair_loss(self, pair):
        return -F.logsigmoid(self.beta * pair.margin + pair.rated_margin)


@caught_by("rated margin")
class MarginWeighsDown(DPOModule):
    def pair_loss(self, pair):
        return super().pair_loss(pair) / (1 + pair.rated_margin)


@caught_by("rated margin")
class RewardMarginAdded(RewardModule):
    def ranking_loss(self, scores):
        return super().ranking_loss(scores._replace(margin=-scores.margin))


@caught_by("soft label")
class LabelRounded(DPOModule):
    def preference_loss(self, pairs):
        return super().preference_loss(pairs._replace(target=(pairs.target > 0.5).to(pairs.target)))


@caught_by("soft label")
class LabelsTakenAsSure(OnlineDPOModule):
    def preference_loss(self, pairs):
        return super().preference_loss(pairs._replace(target=torch.ones_like(pairs.target)))


@caught_by("extremes")
class OverflowsInSinglePrecision(DPOModule):
    def pair_loss(self, pair):
        return torch.log1p(torch.exp(-self.beta * pair.margin.clamp(-600, 600)))


@caught_by("row weights")
class JudgementsUnweighted(KTOModule):
    def loss_sum(self, batch, meter):
        return super().loss_sum(batch._replace(weights=torch.ones_like(batch.weights)), meter)


@caught_by("row weights")
class WeightsSquared(BCOModule):
    def loss_sum(self, batch, meter):
        return super().loss_sum(batch._replace(weights=batch.weights.square()), meter)


@caught_by("step count")
class JudgementsOfThisRank(KTOModule):
    def loss_count(self, step):
        return sum(len(batch.desirable) for batch in step.micro_batches)


@caught_by("row order")
class CenteredOverTheBatch(DPOModule):
    def pair_loss(self, pair):
        places = torch.linspace(0.5, 1.5, len(pair.margin), dtype=pair.margin.dtype)
        return dpo_loss(pair.margin, self.beta) * places


@caught_by("same twice")
class Dropout(DPOModule):
    def pair_loss(self, pair):
        return dpo_loss(F.dropout(pair.margin, 0.3), self.beta)


# -- reward models ----------------------------------------------------------------------------------------------------


@caught_by("ties")
class TiesBrokenByPlace(RewardModule):
    def ranking_loss(self, scores):
        ranks = scores.ranks + 0.1 * torch.arange(len(scores.ranks)) / len(scores.ranks)
        parts = (scores.scores, scores.group, ranks, scores.target, scores.margin)
        return ranked_pairs_loss(*parts, centering=self.centering)


@caught_by("list order")
class RankedAsTheyStand(RewardModule):
    def ranking_loss(self, scores):
        starts = torch.cat([torch.ones(1, dtype=torch.bool), scores.group[1:] != scores.group[:-1]])
        first = scores.scores[starts]
        rest = torch.zeros_like(first).index_add(0, scores.group, torch.where(starts, 0.0, scores.scores))
        gap = torch.where(scores.ranks[starts] == 0, first - rest, rest - first)
        return -F.logsigmoid(gap)


@caught_by("list direction")
class ListsReversed(RewardModule):
    def ranking_loss(self, scores):
        pairs = super().ranking_loss(scores)
        return pairs if len(scores.scores) == 2 * len(pairs) else -pairs


# -- on-policy --------------------------------------------------------------------------------------------------------


@caught_by("micro-batches")
class MeanOfTheMicroBatch(GRPOModule):
    def token_loss_sum(self, rollout, advantages, cut, meter, minibatch=None, critic_scale=1.0):
        found = super().token_loss_sum(rollout, advantages, cut, meter, minibatch, critic_scale)
        return found / len(cut) * 4


@caught_by("micro-batches")
class AdvantagesOfTheMicroBatch(RLOOModule):
    def policy_loss(self, logprobs):
        centred = logprobs.advantages - logprobs.advantages.mean()
        return super().policy_loss(logprobs._replace(advantages=centred * logprobs.completion_mask))


@caught_by("two ranks")
class CountOfThisRank(GRPOModule):
    def learn_minibatch(self, rollout, advantages, rows, batch, meter):
        told, self.sum_over_ranks = self.sum_over_ranks, lambda value: value.double()
        try:
            return super().learn_minibatch(rollout, advantages, rows, batch, meter)
        finally:
            self.sum_over_ranks = told


@caught_by("missing score")
class MissingScoreIsZero(RLOOModule):
    def advantages(self, rollout, rewards):
        known = rollout._replace(scores=torch.nan_to_num(rollout.scores))
        return super().advantages(known, torch.nan_to_num(rewards))


@caught_by("missing score")
class MissingScoreSpreads(GRPOModule):
    def episode_advantages(self, rewards, rollout):
        return (rewards - rewards.mean()) / (rewards.std() + 1e-4)


@caught_by("aggregation")
class DividedByTheGrid(GRPOModule):
    def aggregation(self, learned):
        found = super().aggregation(learned)
        return found._replace(divisor=torch.tensor(float(learned.numel())))


@caught_by("aggregation")
class ConstantOfTheWidth(DrGRPOModule):
    def aggregation(self, learned):
        found = super().aggregation(learned)
        return found._replace(weights=found.weights / learned.shape[1])


@caught_by("holes")
class NextColumnIsTheNextToken(PPOModule):
    def advantages(self, rollout, rewards):
        mask, values = rollout.completion_mask, rollout.values
        deltas = torch.where(mask, rewards + F.pad(values[:, 1:], (0, 1)) - values, 0.0)
        advantages = torch.where(mask, deltas.flip(-1).cumsum(-1).flip(-1), 0.0)
        return Advantages(advantages, torch.where(mask, advantages + values, 0.0))


@caught_by("holes")
class LengthUpToTheLastColumn(GSPOModule):
    def ratio(self, logprobs):
        mask, places = logprobs.completion_mask, torch.arange(1, logprobs.logprobs.shape[1] + 1)
        d = (logprobs.logprobs - logprobs.old_logprobs).sum(-1, keepdim=True) / (mask * places).amax(-1, keepdim=True)
        own = logprobs.logprobs - logprobs.logprobs.detach()
        return (d.detach() + own).clamp(-20, 20).exp()


@caught_by("loss padding")
class RatioOverTheWidth(GSPOModule):
    def ratio(self, logprobs):
        d = (logprobs.logprobs - logprobs.old_logprobs).sum(-1, keepdim=True) / logprobs.logprobs.shape[1]
        own = logprobs.logprobs - logprobs.logprobs.detach()
        return (d.detach() + own).clamp(-20, 20).exp()


@caught_by("kl loss")
class KLLossReversed(GRPOModule):
    def kl_loss(self, logprobs):
        turned = logprobs._replace(logprobs=logprobs.reference_logprobs, reference_logprobs=logprobs.logprobs)
        return super().kl_loss(turned)


@caught_by("kl loss")
class KLLossHalved(GRPOModule):
    def kl_loss(self, logprobs):
        found = super().kl_loss(logprobs)
        return None if found is None else found / 2


@caught_by("sampler correction")
class CorrectionInverted(GRPOModule):
    def sampler_weight(self, logprobs):
        if self.sampler_correction is None:
            return None
        return (logprobs.behaviour_logprobs - logprobs.old_logprobs).exp().clamp_max(self.sampler_high)


@caught_by("sampler correction")
class CorrectionDropped(PPOModule):
    def sampler_weight(self, logprobs):
        return None


@caught_by("temperature")
class TemperatureForgottenInUpdates(GRPOModule):
    def policy_outputs(self, layout, temperature=1.0, **asked):
        return super().policy_outputs(layout, 1.0, **asked)


@caught_by("temperature")
class ReferenceAtTemperatureOne(PPOModule):
    def forward_statistics(self, layout, with_policy=True):
        found = super().forward_statistics(layout, with_policy)
        return {**found, "reference_logprobs": self.reference.logprobs(layout)}


@caught_by("temperature")
class PairsAtTemperatureOne(OnlineDPOModule):
    def policy_outputs(self, layout, temperature=1.0, **asked):
        return super().policy_outputs(layout, 1.0, **asked)


@caught_by("returns")
class DiscountForgotten(PPOModule):
    def advantages(self, rollout, rewards):
        found = super().advantages(rollout, rewards)
        _, returns = generalized_advantages(rewards, rollout.values, self.critic_states(rollout), 1.0, self.lam)
        return found._replace(returns=returns)


@caught_by("returns")
class ReturnsOfWhitenedAdvantages(PPOModule):
    def advantages(self, rollout, rewards):
        found = super().advantages(rollout, rewards)
        return Advantages(found.advantages, found.advantages + rollout.values)


@caught_by("best of three")
class SecondIsPreferred(OnlineDPOModule):
    def pairs(self, rollout):
        found = super().pairs(rollout)
        if int(rollout.group.bincount().max()) < 3:
            return found
        second = [
            int(rows[rollout.scores[rows].argsort(descending=True)[1]])
            for rows in ((rollout.group == rollout.group[chosen]).nonzero().squeeze(-1) for chosen in found.chosen)
        ]
        return found._replace(chosen=torch.tensor(second), rejected=found.chosen)


# -- the target -------------------------------------------------------------------------------------------------------


@caught_by("target")
class TargetUnknown(DPOModule):
    def pair_loss(self, pair):
        return -F.logsigmoid(self.beta * pair.margin - 0.5)


@caught_by("target")
class HalfTheScore(RLOOModule):
    def shape_rewards(self, rollout):
        return super().shape_rewards(rollout._replace(scores=rollout.scores / 2))


@caught_by("convergence")
class TargetOfAnother(DPOModule):
    target_of = DPOModule

    def pair_loss(self, pair):
        return (self.beta * pair.margin - 0.5).square()
