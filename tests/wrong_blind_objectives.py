"""Objectives with one mistake each, most of them written without knowledge of the checks: see `wrong_objectives`."""

import torch
import torch.nn.functional as F
from functional.pair_losses import dpo_loss
from wrong_objectives import caught_by

from rlhf_lightning.functional.policy_gradient import group_deviation, group_mean_advantages
from rlhf_lightning.functional.ranking import mean_by_group, ranked_pairs_loss, untied_pairs
from rlhf_lightning.modules import (
    CriticFreeModule,
    DAPOModule,
    DPOModule,
    DrGRPOModule,
    ForwardKLDPOModule,
    GKDModule,
    GRPOModule,
    GSPOModule,
    KTOModule,
    LengthNormalizedDPOModule,
    PlackettLuceModule,
    PPOModule,
    ProcessRewardModule,
    RewardModule,
    RLOOModule,
)

# -- pairs, judgements ------------------------------------------------------------------------------------------------


@caught_by("convergence", "divided by the chosen length")
class BothSidesByTheChosenLength(LengthNormalizedDPOModule):
    target_of = LengthNormalizedDPOModule

    def implicit_reward(self, pairs):
        lengths = pairs.chosen_lengths.clamp(min=1)
        return self.beta * pairs.chosen_logratio / lengths, self.beta * pairs.rejected_logratio / lengths


@caught_by("known mistake", "is minus KL(policy || reference)")
class SequentialKLReversed(DPOModule):
    no_target = "no closed form: the margin holds a detached KL of each completion"
    needs_reference_logits = True

    def token_statistics(self, policy_logits, reference_logits, targets):
        policy, reference = policy_logits.log_softmax(-1), reference_logits.log_softmax(-1)
        return {"kl": (policy.exp() * (reference - policy)).sum(-1)}

    def pair_loss(self, pair):
        won, lost = (pair.extras[f"{side}_kl"].sum(-1) for side in ("chosen", "rejected"))
        return -F.logsigmoid(self.beta * (pair.margin - 0.5 * (lost - won.detach())))


@caught_by("every token", "look for a slice")
class CutAtAFixedLength(DPOModule):
    def pair_loss(self, pair):
        chosen, rejected = (ratios[:, :512].sum(-1) for ratios in pair.token_logratios)
        return dpo_loss(chosen - rejected, self.beta)


@caught_by("checkpoint", "starts with a different running")
class RunningStateForgotten(DPOModule):
    no_target = "beta follows the margins"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.running = 0.0

    def training_step(self, step, batch_idx):
        self.running = 0.9 * self.running + 0.1
        return super().training_step(step, batch_idx)

    def pair_loss(self, pair):
        return dpo_loss(pair.margin, self.beta * (1 + self.running))


@caught_by("reference point", "in every row")
class PointOfThePraisedAlone(KTOModule):
    target_of = KTOModule

    def unpaired_loss(self, logprobs):
        gain = torch.sigmoid(-self.beta * (logprobs.logratio - logprobs.reference_point))
        loss = torch.sigmoid(self.beta * logprobs.logratio)
        return torch.where(logprobs.desirable, self.desirable_weight * gain, self.undesirable_weight * loss)


@caught_by("known mistake", "desirable_weight and undesirable_weight are exchanged")
class SideWeightsExchanged(KTOModule):
    no_target = "no closed form: the reference point depends on the policy"

    def unpaired_loss(self, logprobs):
        advantage = self.beta * (logprobs.logratio - logprobs.reference_point)
        gain, loss = torch.sigmoid(-advantage), torch.sigmoid(advantage)
        return torch.where(logprobs.desirable, self.undesirable_weight * gain, self.desirable_weight * loss)


# -- scores, steps, divergences ---------------------------------------------------------------------------------------


@caught_by("soft label", "the label is ignored")
class ComparisonsTakenAsSure(RewardModule):
    target_of = RewardModule

    def ranking_loss(self, scores):
        ones = torch.ones_like(scores.target)
        return ranked_pairs_loss(scores.scores, scores.group, scores.ranks, ones, scores.margin)


@caught_by("labels", "the label is squared")
class ComparisonsSquared(RewardModule):
    target_of = RewardModule

    def ranking_loss(self, scores):
        return super().ranking_loss(scores._replace(target=scores.target.square()))


@caught_by("list weight", "long lists do not dominate")
class PairsOfAListSummed(RewardModule):
    target_of = RewardModule

    def ranking_loss(self, scores):
        better, _ = untied_pairs(scores.group, scores.ranks)
        return super().ranking_loss(scores) * torch.bincount(scores.group[better], minlength=len(scores.target))


@caught_by("log-odds", "labels are those of the step before")
class LabelOfTheStepBefore(ProcessRewardModule):
    def process_loss(self, scores):
        shifted = torch.where(scores.position > 0, scores.labels.roll(1), scores.labels)
        return super().process_loss(scores._replace(labels=shifted))


@caught_by("gradient at teacher", "tokens left out")
class LikeliestIdsNotRenormalised(GKDModule):
    target_of = GKDModule

    def distillation_loss(self, logits):
        student, teacher = logits.student_logits.log_softmax(-1), logits.teacher_logits.log_softmax(-1)
        top, ids = teacher.topk(min(3, teacher.shape[-1]), -1)
        return (top.exp() * (top - student.gather(-1, ids))).sum(-1)


@caught_by("gradient at teacher", "only the teacher's logits are divided by 2")
class OnlyTheTeacherIsTempered(GKDModule):
    target_of = GKDModule

    def distillation_loss(self, logits):
        student, teacher = logits.student_logits.log_softmax(-1), (logits.teacher_logits / 2).log_softmax(-1)
        return (teacher.exp() * (teacher - student)).sum(-1)


# -- policy gradients -------------------------------------------------------------------------------------------------


@caught_by("validation state", "validation changes running")
class BaselineMovesInValidation(CriticFreeModule):
    target_of = CriticFreeModule

    def __init__(self, scorer, baseline="none", **kwargs):
        super().__init__(scorer=scorer, baseline=baseline, **kwargs)
        self.running = 0.0

    def episode_advantages(self, rewards, rollout):
        return torch.nan_to_num(rewards - self.running)

    def measure_rollout(self, rollout, meter):
        super().measure_rollout(rollout, meter)
        self.running = 0.9 * self.running + 0.1 * float(rollout.scores.nanmean())

    def on_save_checkpoint(self, checkpoint):
        super().on_save_checkpoint(checkpoint)
        checkpoint["running"] = self.running

    def on_load_checkpoint(self, checkpoint):
        super().on_load_checkpoint(checkpoint)
        self.running = checkpoint["running"]


@caught_by("known mistake", "negative advantages are dropped")
class OnlyGainsTeach(DrGRPOModule):
    no_target = "without a KL penalty the best completions take all"

    def episode_advantages(self, rewards, rollout):
        return super().episode_advantages(rewards, rollout).clamp(min=0)


@caught_by("known mistake", "clip and clip_high are exchanged")
class ClipBoundsExchanged(DAPOModule):
    target_of = DAPOModule

    def objective(self, ratio, logprobs):
        held = ratio.clamp(1 - self.clip_high, 1 + self.clip)
        return torch.maximum(-logprobs.advantages * ratio, -logprobs.advantages * held)


@caught_by("adaptive kl", "look at the sign")
class CoefficientRunsAway(PPOModule):
    target_of = PPOModule

    def on_rollout_end(self, rollout, means):
        self.kl_coef *= 1.1 if means["kl"] < 0.05 else 0.9


@caught_by("entropy bonus", "an entropy bonus is subtracted")
class EntropyPunished(GRPOModule):
    target_of = GRPOModule

    def __init__(self, scorer, entropy_coef=1e-9, **kwargs):
        super().__init__(scorer=scorer, entropy_coef=entropy_coef, **kwargs)

    def policy_loss(self, logprobs):
        found = super().policy_loss(logprobs)
        return found._replace(values=found.values + 0.01 * logprobs.entropy)


@caught_by("learned", "before finished ones")
class TruncatedAloneTeach(CriticFreeModule):
    no_target = "truncated completions are left out"

    def advantages(self, rollout, rewards):
        found = super().advantages(rollout, rewards)
        return found._replace(learned=rollout.completion_mask & ~rollout.finished.unsqueeze(-1))


@caught_by("advantage sign", "as if prompts were tiled")
class TiledPrompts(RLOOModule):
    target_of = RLOOModule

    def episode_advantages(self, rewards, rollout):
        tiled = torch.arange(len(rewards)) % (int(rollout.group.max()) + 1)
        return super().episode_advantages(rewards, rollout._replace(group=tiled))


@caught_by("ratio one", "lets a gradient through")
class WeightWithGradient(DAPOModule):
    target_of = DAPOModule

    def __init__(self, scorer, clip_high=None, **kwargs):
        super().__init__(scorer=scorer, objective="cispo", clip_high=clip_high, **kwargs)

    def objective(self, ratio, logprobs):
        return -ratio.clamp(max=self.cispo_high) * logprobs.advantages * logprobs.logprobs


# -- kinds that a fifth set of strangers' classes showed ---------------------------------------------------------------


@caught_by("labels", "the expectation over both orders")
class LabelScalesTheGap(RewardModule):
    target_of = RewardModule

    def ranking_loss(self, scores):
        better, worse = untied_pairs(scores.group, scores.ranks)
        gap = (2 * scores.target - 1)[scores.group[better]] * (scores.scores[better] - scores.scores[worse])
        return mean_by_group(-F.logsigmoid(gap), scores.group[better], len(scores.target))


@caught_by("reference moves", "declare reference_moves")
class ReferenceReplaced(DPOModule):
    no_target = "no closed form: the reference is replaced"

    def __init__(self, every: int = 64, **kwargs):
        super().__init__(**kwargs)
        self.every = every

    def training_step(self, step, batch_idx):
        outputs = super().training_step(step, batch_idx)
        if self.updates % self.every == 0:
            self.reference.follow(1.0)
        return outputs


@caught_by("known mistake", "the lower side of the clip is missing")
class ClippedAbove(GRPOModule):
    target_of = GRPOModule

    def objective(self, ratio, logprobs):
        clipped = ratio.clamp(max=1 + (self.clip_high or self.clip))
        return torch.maximum(-logprobs.advantages * ratio, -logprobs.advantages * clipped)


# -- kinds that a sixth set of strangers' classes showed ---------------------------------------------------------------


@caught_by("inverse", "look for a sign in an exponent")
class ExponentOfTheWrongSign(ForwardKLDPOModule):
    def f(self, logratio):
        return torch.expm1(logratio.clamp(-20, 20))


@caught_by("known mistake", "over the other side's length")
class LikelihoodOverTheOtherLength(DPOModule):
    no_target = "no closed form: a likelihood term is added"

    def pair_loss(self, pair):
        return super().pair_loss(pair) - 0.1 * pair.chosen_sequence_logprobs / pair.rejected_lengths


@caught_by("ratio slope", "lacks a detach")
class SequenceRatioNotDetached(GSPOModule):
    target_of = GSPOModule

    def ratio(self, logprobs):
        return super().ratio(logprobs) * (logprobs.logprobs - logprobs.logprobs.detach()).exp()


@caught_by("rollout over ranks", "use moments_over_ranks")
class DeviationOfThisRank(CriticFreeModule):
    def episode_advantages(self, rewards, rollout):
        return group_mean_advantages(rewards, rollout.group) / (rewards[~rewards.isnan()].std() + 1e-4)


@caught_by("lower bound", "competes with itself")
class OthersAloneCompete(PlackettLuceModule):
    def ranking_loss(self, scores):
        better, worse = untied_pairs(scores.group, scores.ranks)
        gap = scores.scores[better] - scores.scores[worse]
        return mean_by_group(-gap, scores.group[better], len(scores.target))


@caught_by("equal scores", "add a small number")
class NothingAddedToTheDeviation(CriticFreeModule):
    def episode_advantages(self, rewards, rollout):
        return group_mean_advantages(rewards, rollout.group) / group_deviation(rewards, rollout.group)


@caught_by("micro-batches", "weighs short batches more")
class RatingsOfAllPairs(DPOModule):
    no_target = "ratings of different pairs need not be consistent"

    def pair_loss(self, pair):
        return (self.reward_margin(pair).unsqueeze(-1) - pair.rated_margin).square().mean(-1)
