"""Right objectives from papers of 2024 to 2026 whose losses clip, select, or converge differently from the shipped
ones.
"""

import math

import torch
import torch.nn.functional as F
from right_objectives import right

from rlhf_lightning.functional.ranking import untied_pairs
from rlhf_lightning.modules import (
    CriticFreeModule,
    DPOModule,
    DrGRPOModule,
    GKDModule,
    GRPOModule,
    KTOModule,
    OnlineDPOModule,
    PPOModule,
    ProcessRewardModule,
    RewardModule,
    RLOOModule,
    SelfDistillationModule,
    SFTModule,
)
from rlhf_lightning.training.returned_loss import as_loss
from rlhf_lightning.types import Loss


@right
class ProximalSFT(SFTModule):
    """PSFT (2508.17784): the likelihood is replaced by a ratio to a frozen probability, clipped at 1 + 0.28."""

    no_target = "no closed form: tokens that are already likelier are clipped"

    def token_loss(self, logprobs):
        ratio = (logprobs.logprobs + 1.0).exp()
        return -torch.minimum(ratio, ratio.clamp(max=1.28)) * logprobs.weights.unsqueeze(-1)


@right
class SelectedTokens(SFTModule):
    """Rho-1 (2404.07965) in miniature: only the half of each row's tokens with the highest loss."""

    no_target = "which tokens are learned from depends on the policy"

    def token_loss(self, logprobs):
        loss = super().token_loss(logprobs)
        keep = loss.detach() >= loss.detach().masked_fill(~logprobs.completion_mask, torch.nan).nanquantile(
            0.5, -1, True
        )
        return loss * keep


@right
class SimPER(DPOModule):
    """SimPER (2502.00883): inverse perplexities instead of a logistic loss."""

    no_target = "no closed form"

    def pair_loss(self, pair):
        chosen = (pair.chosen_sequence_logprobs / pair.chosen_lengths).exp()
        return (pair.rejected_sequence_logprobs / pair.rejected_lengths).exp() - chosen


@right
class CalibratedDPO(DPOModule):
    """Cal-DPO (2412.14516): both implicit rewards are also regressed on +-1/2."""

    no_target = "no closed form: rewards are drawn to constants"

    def pair_loss(self, pair):
        chosen, rejected = self.implicit_reward(pair)
        return super().pair_loss(pair) + (chosen - 0.5).square() + (rejected + 0.5).square()


@right
class FocalPreference(DPOModule):
    """FocalPO (2501.06645): pairs that the policy ranks wrongly have less weight."""

    no_target = "no closed form: confident pairs are weighted"

    def pair_loss(self, pair):
        p = torch.sigmoid(self.reward_margin(pair))
        return -p.detach() * F.logsigmoid(self.reward_margin(pair))


@right
class HeldNearTheReference(DPOModule):
    """DPO with a penalty on the squared log-ratio of both sides."""

    no_target = "no closed form"

    def pair_loss(self, pair):
        held = pair.chosen_logratio.square() + pair.rejected_logratio.square()
        return super().pair_loss(pair) + 0.01 * held


@right
class UnpairedOdds(KTOModule):
    """A classifier of the implicit reward, without a reference point."""

    no_target = "no closed form"
    needs_mismatched = False

    def unpaired_loss(self, logprobs):
        reward = self.beta * logprobs.logratio
        return -F.logsigmoid(torch.where(logprobs.desirable, reward, -reward))


@right
class PairwiseHinge(RewardModule):
    """A hinge loss on the score difference, with soft labels."""

    no_target = "a hinge has many minima"

    def ranking_loss(self, scores):
        better, worse = untied_pairs(scores.group, scores.ranks)
        group = scores.group[better]
        gap, p = scores.scores[better] - scores.scores[worse] - scores.margin[group], scores.target[group]
        losses = p * F.softplus(1 - gap) + (1 - p) * F.softplus(1 + gap)
        pairs = torch.bincount(group, minlength=len(scores.target)).clamp_min(1)
        return losses.new_zeros(len(scores.target)).index_add(0, group, losses) / pairs


@right
class RankedSteps(ProcessRewardModule):
    """PQM (2410.11287) in miniature: right steps of a completion must score above its wrong steps."""

    no_target = "only the order of a completion's steps is learned"

    def process_loss(self, scores):
        first = scores.labels.unsqueeze(0) - scores.labels.unsqueeze(1)
        same = scores.row.unsqueeze(0) == scores.row.unsqueeze(1)
        gaps = scores.scores.unsqueeze(0) - scores.scores.unsqueeze(1)
        own = -(2 * scores.labels - 1) * scores.scores
        return F.softplus(own) + (same * first.clamp_min(0) * F.softplus(-gaps)).sum(0)


@right
class LikeliestIdsRenormalised(GKDModule):
    """The teacher's 20 most likely tokens, renormalised for both models."""

    no_target = "ids behind the likeliest are free"

    def distillation_loss(self, logits):
        count = min(20, logits.teacher_logits.shape[-1])
        kept = logits.teacher_logits.topk(count, -1).indices
        teacher, student = (
            one.gather(-1, kept).log_softmax(-1) for one in (logits.teacher_logits, logits.student_logits)
        )
        return (teacher.exp() * (teacher - student)).sum(-1)


@right
class TaperedOffPolicy(CriticFreeModule):
    """TOPR (2503.14286): completions with negative advantage are weighted by a ratio of at most 1, the others by 1."""

    target_of = CriticFreeModule

    def objective(self, ratio, logprobs):
        weight = torch.where(logprobs.advantages > 0, torch.ones_like(ratio), ratio.clamp(max=1.0)).detach()
        return -weight * logprobs.advantages * logprobs.logprobs


@right
class GradientOutsideTheClip(GRPOModule):
    """CE-GPPO (2509.20712): clipped tokens keep a bounded gradient."""

    target_of = GRPOModule

    def objective(self, ratio, logprobs):
        inside = ratio.clamp(1 - self.clip, 1 + self.clip)
        clipped = inside.detach() * ratio / ratio.detach()
        return -logprobs.advantages * clipped


@right
class LengthWeightedBaseline(CriticFreeModule):
    """OPO (2505.23585): the baseline weights rewards by length."""

    no_target = "in groups of two the baseline depends on the sample"

    def episode_advantages(self, rewards, rollout):
        group, known = rollout.group, ~rewards.isnan()
        lengths = rollout.completion_mask.sum(-1).to(rewards) * known
        zeros = torch.zeros(int(group.max()) + 1, dtype=rewards.dtype)
        total = zeros.index_add(0, group, torch.nan_to_num(rewards) * lengths)
        baseline = total / zeros.index_add(0, group, lengths).clamp_min(1)
        return torch.where(known, torch.nan_to_num(rewards) - baseline[group], 0.0)


@right
class TruncatedImportance(DrGRPOModule):
    """Truncated importance sampling for the engine, written out: old / behaviour, at most 2."""

    target_of = DrGRPOModule

    def policy_loss(self, logprobs):
        loss = as_loss(super().policy_loss(logprobs))
        weight = (logprobs.old_logprobs - logprobs.behaviour_logprobs).exp().clamp(max=2.0).detach()
        return Loss(loss.values * weight, loss.metrics)


@right
class DualClip(GRPOModule):
    """Tokens with negative advantage and a ratio above 3 are masked (1912.09729)."""

    target_of = GRPOModule

    def objective(self, ratio, logprobs):
        loss = as_loss(super().objective(ratio, logprobs)).values
        bound = -3.0 * logprobs.advantages
        return torch.where(logprobs.advantages < 0, torch.minimum(loss, bound), loss)


@right
class LogCoshCritic(PPOModule):
    """PPO with a log-cosh loss of the critic."""

    target_of = PPOModule

    def value_loss(self, values):
        error = (values.values - values.returns).abs()
        return error + F.softplus(-2 * error) - 0.6931471805599453


@right
class OnlineIPO(OnlineDPOModule):
    """Online pairs with IPO's squared loss."""

    no_target = "the squared loss weighs pairs by how often they are drawn"

    def pair_loss(self, pair):
        return (self.reward_margin(pair) - 0.5).square()


# -- of a set that was written without knowledge of the checks --------------------------------------------------------


@right
class BoundedDPO(DPOModule):
    """Bounded DPO (2506.07492): one of its settings has the same name as a setting of PPO."""

    no_target = "no closed form: the rejected side is a mixture with the reference"
    ranges = {"lam": "(0, 1)"}

    def __init__(self, lam: float = 0.5, **kwargs):
        super().__init__(**kwargs)
        self.lam = lam

    def pair_loss(self, pair):
        lost = pair.rejected_logratio
        mixed = torch.logaddexp(lost + math.log(self.lam), torch.full_like(lost, math.log1p(-self.lam)))
        return -F.logsigmoid(self.beta * (pair.chosen_logratio - mixed))


@right
class ImitatesWhatIsGood(KTOModule):
    """ULMA (2312.02554): a likelihood term for good rows, which needs no reference."""

    no_target = "imitation has no reference"
    needs_mismatched = False

    def unpaired_loss(self, logprobs):
        imitated = -logprobs.policy_logprobs.sum(-1)
        return torch.where(logprobs.desirable, imitated, -F.logsigmoid(-self.beta * logprobs.logratio))


@right
class GroupRegression(CriticFreeModule):
    """GVPO (2504.19599): log-ratios of a group are regressed on its scores; advantages are not used."""

    no_target = "each rollout is one proximal step from the policy that sampled it"
    needs_minibatch = True
    needs_minibatch_logprobs = True

    def __init__(self, scorer, kl_coef: float = 0.0, aggregation="sequence_mean_token_sum", **kwargs):
        super().__init__(scorer=scorer, kl_coef=kl_coef, aggregation=aggregation, **kwargs)

    def objective(self, ratio, logprobs):
        batch = logprobs.minibatch
        implied = 0.1 * torch.where(batch.completion_mask, batch.logprobs - batch.old_logprobs, 0.0).sum(-1)
        _, group = batch.group.unique(return_inverse=True)
        judged = ~batch.scores.isnan()
        gap = torch.where(judged, implied - batch.scores, 0.0)
        zeros = torch.zeros(len(group)).to(gap)
        mean = zeros.index_add(0, group, gap) / zeros.index_add(0, group, judged.to(gap)).clamp_min(1)
        residual = torch.where(judged, gap - mean[group], 0.0)[batch.rows].unsqueeze(-1)
        return residual * 0.1 * logprobs.logprobs


@right
class OnlineSPPO(OnlineDPOModule):
    """SPPO (2405.00675) on samples of the policy, with soft labels from the scorer."""

    no_target = "log-ratios follow win rates against the policy's own samples"

    def __init__(self, scorer, beta: float = 1.0, soft_labels: bool = True, **kwargs):
        super().__init__(scorer=scorer, beta=beta, soft_labels=soft_labels, **kwargs)

    def preference_loss(self, pairs):
        aim = (pairs.target - 0.5) / self.beta
        return (pairs.chosen_logratio - aim).square() + (pairs.rejected_logratio + aim).square()


# -- further classes of kinds that were refused ------------------------------------------------------------------------


@right
class RobustRegression(DPOModule):
    """REBEL (2404.16767) on fixed pairs with Huber's loss: the score difference in the data replaces the label."""

    data_columns = ("gap",)
    target_of = DPOModule

    def preference_loss(self, pairs):
        return F.huber_loss(self.reward_margin(pairs), pairs.extras["gap"], reduction="none")


@right
class EloScores(RewardModule):
    """Scores on the Elo scale: 400 points are a factor of 10 in the odds."""

    no_target = "the declared rewards are in other units"

    def ranking_loss(self, scores):
        return super().ranking_loss(scores._replace(scores=scores.scores * math.log(10) / 400))


class WithInstruction(GKDModule):
    """The teacher reads an instruction that the student does not see (context distillation)."""

    def joined(self, prompt, instruction):
        return torch.cat([instruction, prompt])

    def teacher_sequences(self, sequences):
        instruction = torch.tensor(self.tokenizer("Think first .", add_special_tokens=False)["input_ids"])
        return sequences._replace(prompts=tuple(self.joined(prompt, instruction) for prompt in sequences.prompts))


@right
class InstructionBefore(WithInstruction):
    """The instruction is placed before the prompt."""


@right
class HintBehind(WithInstruction):
    """The instruction is placed after the prompt."""

    def joined(self, prompt, instruction):
        return torch.cat([prompt, instruction])


@right
class OtherSolution(SelfDistillationModule):
    """The teacher reads the best other completion of the prompt."""

    no_target = "the teacher reads other completions"

    def __init__(self, preface: str = "p1 {solution}", **kwargs):
        super().__init__(context=preface, **kwargs)
        self.preface = preface

    def contexts(self, rollout):
        found = []
        for own, group in enumerate(rollout.group.tolist()):
            others = [row for row, its in enumerate(rollout.group.tolist()) if its == group and row != own]
            best = max(others, key=lambda row: float(rollout.scores[row]), default=None)
            found.append(None if best is None else self.preface.format(solution=rollout.texts[best]))
        return found


@right
class FailuresAlone(SelfDistillationModule):
    """Successful completions are not trained on."""

    target_of = SelfDistillationModule

    def contexts(self, rollout):
        told = zip(super().contexts(rollout), rollout.scores.tolist(), strict=True)
        return [text if score < self.success else None for text, score in told]


@right
class WeighedByConfidence(DPOModule):
    """Pairs are weighted by the annotator's confidence, a data column."""

    target_of = DPOModule
    data_columns = ("confidence",)

    def pair_loss(self, pair):
        loss = as_loss(super().pair_loss(pair)).values
        return loss * torch.sigmoid(pair.extras["confidence"].to(loss))


@right
class BaselineInABuffer(CriticFreeModule):
    """REINFORCE with a moving mean of scores in a buffer, which Lightning saves."""

    target_of = CriticFreeModule

    def __init__(self, scorer, **kwargs):
        super().__init__(scorer=scorer, baseline="none", **kwargs)
        self.register_buffer("average", torch.zeros(()))

    def episode_advantages(self, rewards, rollout):
        return super().episode_advantages(rewards - self.average, rollout)

    def on_rollout_end(self, rollout, means):
        super().on_rollout_end(rollout, means)
        self.average.lerp_(rollout.scores.nanmean().to(self.average), 0.1)


@right
class LeadOverTheBestOther(RLOOModule):
    """The best of the other completions is the baseline."""

    no_target = "no closed form"

    def episode_advantages(self, rewards, rollout):
        others = (rollout.group[:, None] == rollout.group) & ~torch.eye(len(rewards), dtype=torch.bool)
        best = torch.where(others, rewards.nan_to_num(-torch.inf), -torch.inf).amax(-1)
        lead = rewards - best
        return torch.where(lead.isfinite(), lead, 0.0)
