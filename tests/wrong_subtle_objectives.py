"""Objectives with one subtle mistake each that leaves most numbers plausible, and the check that must detect it."""

import torch
import torch.nn.functional as F
from functional.pair_losses import dpo_loss
from wrong_objectives import caught_by

from rlhf_lightning.functional.policy_gradient import generalized_advantages
from rlhf_lightning.modules import (
    BCOModule,
    DPOModule,
    DrGRPOModule,
    GKDModule,
    GRPOModule,
    GSPOModule,
    KTOModule,
    LengthNormalizedDPOModule,
    OnPolicyDistillationModule,
    PPOModule,
    ProcessRewardModule,
    RewardModule,
    RLOOModule,
    RobustDPOModule,
    SFTModule,
    SimPOModule,
)
from rlhf_lightning.types import Advantages

# -- pairs ------------------------------------------------------------------------------------------------------------


@caught_by("target", "averaged over tokens")
class LogratiosAveraged(DPOModule):
    def pair_loss(self, pair):
        chosen = pair.chosen_logratio / pair.chosen_lengths
        return dpo_loss(chosen - pair.rejected_logratio / pair.rejected_lengths, self.beta)


@caught_by("target", "reference's log-probabilities are averaged")
class OnlyTheReferenceIsAveraged(DPOModule):
    def pair_loss(self, pair):
        reference = pair.reference_chosen_logprobs.sum(-1) / pair.chosen_lengths
        reference = reference - pair.reference_rejected_logprobs.sum(-1) / pair.rejected_lengths
        policy = pair.chosen_sequence_logprobs - pair.rejected_sequence_logprobs
        return dpo_loss(policy - reference, self.beta)


@caught_by("target", "beta is squared")
class BetaTwice(DPOModule):
    def pair_loss(self, pair):
        return dpo_loss(self.beta * pair.margin, self.beta)


@caught_by("target", "which is 1 / beta")
class BetaOnThePolicyAlone(DPOModule):
    def pair_loss(self, pair):
        policy = pair.chosen_sequence_logprobs - pair.rejected_sequence_logprobs
        reference = pair.reference_chosen_logprobs.sum(-1) - pair.reference_rejected_logprobs.sum(-1)
        return -F.logsigmoid(self.beta * policy - reference)


@caught_by("target", "constant of")
class ConstantMargin(DPOModule):
    def pair_loss(self, pair):
        return dpo_loss(pair.margin - 1.5, self.beta)


@caught_by("every token", "first token")
class FirstTokensSkipped(DPOModule):
    def pair_loss(self, pair):
        sides = []
        for ratios, mask in zip(pair.token_logratios, (pair.chosen_mask, pair.rejected_mask), strict=True):
            sides.append((ratios * (mask.cumsum(-1) > 1)).sum(-1))
        return dpo_loss(sides[0] - sides[1], self.beta)


@caught_by("every token", "end token")
class EndTokensSkipped(DPOModule):
    def pair_loss(self, pair):
        sides = []
        for ratios, mask in zip(pair.token_logratios, (pair.chosen_mask, pair.rejected_mask), strict=True):
            sides.append((ratios * (mask.cumsum(-1) < mask.sum(-1, keepdim=True))).sum(-1))
        return dpo_loss(sides[0] - sides[1], self.beta)


@caught_by("reference slope", "chosen and rejected of the reference are exchanged")
class ReferenceSidesExchanged(DPOModule):
    def pair_loss(self, pair):
        reference = pair.reference_rejected_logprobs.sum(-1) - pair.reference_chosen_logprobs.sum(-1)
        return dpo_loss(pair.chosen_sequence_logprobs - pair.rejected_sequence_logprobs - reference, self.beta)


@caught_by("target", "sigmoid is used instead of its logarithm")
class SigmoidForItsLogarithm(DPOModule):
    def pair_loss(self, pair):
        return torch.sigmoid(-self.beta * pair.margin)


@caught_by("target", "squared error")
class SquaredForLogistic(DPOModule):
    def pair_loss(self, pair):
        return (self.beta * pair.margin - 1).square()


@caught_by("target", "added to the loss: the log-probability of chosen")
class LikelihoodAdded(DPOModule):
    def pair_loss(self, pair):
        return super().pair_loss(pair) - 0.2 * pair.chosen_sequence_logprobs


@caught_by("labels", "a sigmoid is applied")
class LabelsThroughASigmoid(DPOModule):
    def preference_loss(self, pairs):
        return super().preference_loss(pairs._replace(target=pairs.target.sigmoid()))


@caught_by("row order")
class CentredMargins(DPOModule):
    def pair_loss(self, pair):
        spread = pair.margin - pair.margin.mean()
        return dpo_loss(spread, self.beta) * torch.linspace(0.9, 1.1, len(spread), dtype=spread.dtype)


@caught_by("target", "flip_rate has the wrong sign")
class FlipRateNegated(RobustDPOModule):
    def pair_loss(self, pair):
        x, e = self.reward_margin(pair), -self.flip_rate
        return (-(1 - e) * F.logsigmoid(x) + e * F.logsigmoid(-x)) / (1 - 2 * e)


@caught_by("target", "gamma has the wrong sign")
class GapAdded(SimPOModule):
    def pair_loss(self, pair):
        return -F.logsigmoid(self.reward_margin(pair) + self.gamma)


@caught_by("target", "")
class LengthsExchanged(LengthNormalizedDPOModule):
    def implicit_reward(self, pairs):
        chosen, rejected = self.beta * pairs.chosen_logratio, self.beta * pairs.rejected_logratio
        return chosen / pairs.rejected_lengths, rejected / pairs.chosen_lengths


@caught_by("row weights", "")
class WeightsInsideTheSigmoid(DPOModule):
    def loss_sum(self, batch, meter):
        even = self.preference_logprobs(batch._replace(weights=torch.ones_like(batch.weights)))
        return dpo_loss(even.margin * batch.weights, self.beta).sum()


# -- judgements, demonstrations, scores, divergences ------------------------------------------------------------------


@caught_by("target", "reference point has the wrong sign")
class PointAdded(KTOModule):
    def unpaired_loss(self, logprobs):
        return super().unpaired_loss(logprobs._replace(reference_point=-logprobs.reference_point))


@caught_by("target", "averaged over tokens")
class JudgedPerToken(BCOModule):
    def unpaired_loss(self, logprobs):
        logits = self.beta * logprobs.logratio / logprobs.lengths - logprobs.reference_point
        return -F.logsigmoid(torch.where(logprobs.desirable, logits, -logits))


@caught_by("direction", "undesirable rows teach nothing")
class OnlyPraiseTeaches(KTOModule):
    def unpaired_loss(self, logprobs):
        return torch.where(logprobs.desirable, super().unpaired_loss(logprobs), 0.0 * logprobs.logratio)


@caught_by("target", "averaged over tokens")
class MeanOfEachDemonstration(SFTModule):
    def token_loss(self, logprobs):
        return super().token_loss(logprobs) / logprobs.lengths.unsqueeze(-1)


@caught_by("shift")
class ScoresSquashed(RewardModule):
    def ranking_loss(self, scores):
        return super().ranking_loss(scores._replace(scores=scores.scores.asinh()))


@caught_by("log-odds", "wrong steps are ignored")
class OnlyRightStepsTeach(ProcessRewardModule):
    def process_loss(self, scores):
        return -scores.labels * F.logsigmoid(scores.scores)


@caught_by("gradient at teacher", "divided by")
class OnlyTheStudentIsCooled(GKDModule):
    def distillation_loss(self, logits):
        teacher, student = logits.teacher_logits.log_softmax(-1), (2 * logits.student_logits).log_softmax(-1)
        return (teacher.exp() * (teacher - student)).sum(-1)


# -- policy gradients -------------------------------------------------------------------------------------------------


@caught_by("target", "mean of the rollout, not of the group")
class StandardisedOverTheRollout(GRPOModule):
    def episode_advantages(self, rewards, rollout):
        known = rewards[~rewards.isnan()]
        return torch.nan_to_num((rewards - known.mean()) / (known.std() + 1e-4))


@caught_by("clip")
class RatioCountsTwice(GRPOModule):
    def policy_loss(self, logprobs):
        ratio = self.ratio(logprobs)
        return -logprobs.advantages * ratio * ratio


@caught_by("clip", "on both sides")
class ClippedBelowAlone(PPOModule):
    def objective(self, ratio, logprobs):
        held = ratio.clamp(min=1 - self.clip)
        return torch.maximum(-logprobs.advantages * ratio, -logprobs.advantages * held)


@caught_by("kl penalty", "KL loss is k1")
class KLLossWithoutGradient(GRPOModule):
    def kl_loss(self, logprobs):
        return logprobs.logprobs - logprobs.reference_logprobs


@caught_by("value gradient", "regressed on the old values")
class ValuesHeld(PPOModule):
    def value_loss(self, values):
        return 0.5 * (values.values - values.old_values) ** 2


@caught_by("returns", "")
class NextValueOfTheSameState(PPOModule):
    def advantages(self, rollout, rewards):
        found = super().advantages(rollout, rewards)
        shifted = rollout.values.roll(1, dims=1)
        states = self.critic_states(rollout)
        _, returns = generalized_advantages(rewards, shifted, states, self.gamma, self.lam)
        return found._replace(returns=returns)


@caught_by("kl in reward", "KL (k1)")
class KLTurnedRoundInTheReward(RLOOModule):
    def reward_kl(self, rollout):
        return -super().reward_kl(rollout)


@caught_by("target", "KL (k1)")
class KLCountsTwice(RLOOModule):
    def reward_kl(self, rollout):
        return 2 * super().reward_kl(rollout)


@caught_by("score slot", "score over the length")
class ScorePerToken(DrGRPOModule):
    def shape_rewards(self, rollout):
        lengths = rollout.completion_mask.sum(-1)
        return super().shape_rewards(rollout._replace(scores=rollout.scores / lengths))


@caught_by("target", "")
class EndTokenNotLearned(RLOOModule):
    def advantages(self, rollout, rewards):
        found, mask = super().advantages(rollout, rewards), rollout.completion_mask
        return Advantages(found.advantages, None, mask & (mask.cumsum(-1) < mask.sum(-1, keepdim=True)))


@caught_by("loss padding", "")
class GeometricMeanOverTheGrid(GSPOModule):
    def ratio(self, logprobs):
        d = (logprobs.logprobs - logprobs.old_logprobs).mean(-1, keepdim=True)
        own = logprobs.logprobs - logprobs.logprobs.detach()
        return (d.detach() + own).clamp(-20, 20).exp()


@caught_by("own token", "summed cumulatively")
class WordsOfTheRestOfTheText(OnPolicyDistillationModule):
    def advantages(self, rollout, rewards):
        found, mask = super().advantages(rollout, rewards).advantages, rollout.completion_mask
        return Advantages(torch.where(mask, found.cumsum(-1), 0.0), None)
