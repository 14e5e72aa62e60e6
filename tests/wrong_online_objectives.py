"""Objectives on the policy's own samples with one mistake each, and the check that must detect it."""

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from functional.pair_losses import dpo_loss
from wrong_objectives import caught_by

from rlhf_lightning.modules import IterativeDPOModule, NashMDModule, OnlineDPOModule, XPOModule
from rlhf_lightning.training.collector import Samples
from rlhf_lightning.training.rollout import RolloutModule
from rlhf_lightning.types import Pairs


@caught_by("best is chosen")
class WorstIsChosen(OnlineDPOModule):
    def pairs(self, rollout):
        found = super().pairs(rollout)
        return found._replace(chosen=found.rejected, rejected=found.chosen)


@caught_by("best is chosen")
class PairedAcrossPrompts(OnlineDPOModule):
    def pairs(self, rollout):
        found = super().pairs(rollout)
        return found._replace(rejected=found.rejected.roll(1))


@caught_by("ties")
class TiesByPosition(OnlineDPOModule):
    def pairs(self, rollout):
        sides = rollout.scores.view(-1, 2)
        rows = 2 * torch.arange(len(sides))
        chosen, rejected = rows + sides.argmax(-1), rows + 1 - sides.argmax(-1)
        gap = rollout.scores[chosen] - rollout.scores[rejected]
        return Pairs(chosen, rejected, torch.sigmoid(gap), gap, torch.ones_like(gap))


@caught_by("no score")
class UnscoredIsZero(OnlineDPOModule):
    def pairs(self, rollout):
        return super().pairs(rollout._replace(scores=torch.nan_to_num(rollout.scores)))


@caught_by("every pair")
class CloseCallsLeftOut(OnlineDPOModule):
    def pairs(self, rollout):
        found = super().pairs(rollout)
        return found.at((found.rated_margin > 0.5).nonzero().squeeze(-1))


@caught_by("missing end")
class EndsForgiven(OnlineDPOModule):
    def draw(self, batches):
        samples = self.collector.sample(self.policy, self.tokenizer, batches[0])
        raw = self.collector.raw_judgements(self.tokenizer, samples, batches[0])
        return Samples(batches[0], samples, raw.scores)


@caught_by("drawn from")
class SampledTooCold(OnlineDPOModule):
    def draw(self, batches):
        cold = replace(self.sampling, temperature=0.5)
        samples = self.collector.sample(self.policy, self.tokenizer, batches[0], cold)
        return self.collector.judge(self.tokenizer, samples, batches[0])


@caught_by("drawn from")
class ExploresWithThePolicy(XPOModule):
    def draw(self, batches):
        return RolloutModule.draw(self, batches)


@caught_by("micro-batches")
class PairsAveraged(OnlineDPOModule):
    def pair_loss_sum(self, rollout, pairs, meter):
        return super().pair_loss_sum(rollout, pairs, meter) / len(pairs.chosen)


@caught_by("two ranks")
class PairsOfThisRank(IterativeDPOModule):
    def learn_pairs(self, rollout, pairs, rows, batch, meter):
        mine = pairs.at(torch.isin(pairs.chosen, torch.tensor(rows)).nonzero().squeeze(-1))
        return self.update([partial(self.pair_loss_sum, rollout, mine, meter)], len(mine.chosen))


@caught_by("reference logprobs")
class ReferenceIsItself(OnlineDPOModule):
    def preference_logprobs(self, rollout, pairs):
        return super().preference_logprobs(rollout._replace(reference_logprobs=rollout.old_logprobs), pairs)


@caught_by("reference detached")
class ReferenceFollowsAlong(OnlineDPOModule):
    def preference_logprobs(self, rollout, pairs):
        found = super().preference_logprobs(rollout, pairs)
        return found._replace(
            reference_chosen_logprobs=found.reference_chosen_logprobs + 0 * found.policy_chosen_logprobs
        )


@caught_by("policy logprobs")
class LearnsAtAnotherTemperature(OnlineDPOModule):
    def preference_logprobs(self, rollout, pairs):
        sampling, self.sampling = self.sampling, replace(self.sampling, temperature=0.7)
        try:
            return super().preference_logprobs(rollout, pairs)
        finally:
            self.sampling = sampling


@caught_by("direction")
class PushedApart(OnlineDPOModule):
    def preference_loss(self, logprobs):
        return F.logsigmoid(self.beta * logprobs.margin)


@caught_by("labels")
class SoftLabelIgnored(OnlineDPOModule):
    def preference_loss(self, logprobs):
        return dpo_loss(logprobs.margin, self.beta)


@caught_by("labels")
class BonusForTheRejected(XPOModule):
    def preference_loss(self, logprobs):
        bonus = 0.1 * logprobs.rejected_sequence_logprobs
        return dpo_loss(logprobs.margin, self.beta, logprobs.target) + bonus


@caught_by("padding")
class MarginByTheWidth(OnlineDPOModule):
    def preference_loss(self, logprobs):
        return dpo_loss(logprobs.margin / logprobs.chosen_mask.shape[1], self.beta, logprobs.target)


@caught_by("target")
class ScoresCountTwice(OnlineDPOModule):
    def pairs(self, rollout):
        found = super().pairs(rollout)
        return found._replace(target=torch.sigmoid(2 * found.rated_margin))


@caught_by("opponent")
class OpponentWithTheSameDice(NashMDModule):
    def opponent_scores(self, batch):
        from rlhf_lightning.modules import online_opponents

        return super().opponent_scores(batch._replace(episodes=batch.episodes - online_opponents.OPPONENTS))


@caught_by("opponent")
class OpponentSharpened(NashMDModule):
    def opponent_scores(self, batch):
        sampling = self.collector.sampling
        self.collector.sampling = replace(sampling, temperature=0.3)
        try:
            return super().opponent_scores(batch)
        finally:
            self.collector.sampling = sampling


@caught_by("convergence")
class PenaltyPaidTokenByToken(NashMDModule):
    def target_policy(self, problem):
        return self.best_response(problem, problem.reference)

    def __init__(self, **kwargs):
        super().__init__(**{**kwargs, "mixture": 1.0, "kl_place": "loss", "kl_estimator": "k2"})


@caught_by("best of three", "chosen must be a better sample than rejected")
class RejectedOfTheFirstPrompt(OnlineDPOModule):
    """An index within a prompt is used as an index into the rollout: in the small world, no pair is left."""

    def pairs(self, rollout):
        found = super().pairs(rollout)
        rejected = found.rejected % 2
        better = rollout.scores[found.chosen] > rollout.scores[rejected]
        return found._replace(rejected=rejected).at(better.nonzero().squeeze(-1))
