"""Right objectives, from papers or with unusual details that look like mistakes: `rlhf verify` must accept all of
them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_lightning.functional.policy_gradient import generalized_advantages, over_tokens
from rlhf_lightning.functional.surrogates import token_ratio
from rlhf_lightning.modules import (
    CriticFreeModule,
    DPOModule,
    DrGRPOModule,
    GKDModule,
    GRPOModule,
    GSPOModule,
    KTOModule,
    OnlineDPOModule,
    OnPolicyDistillationModule,
    PPOModule,
    ProcessRewardModule,
    RewardModule,
    RLOOModule,
    SFTModule,
    SimPOModule,
)
from rlhf_lightning.types import Advantages, Loss

RIGHT: list[type] = []


def right(kind: type) -> type:
    RIGHT.append(kind)
    return kind


# -- published: pairs -------------------------------------------------------------------------------------------------


@right
class RDPO(DPOModule):
    """R-DPO (2403.19159): the margin is regularised by the difference in length."""

    no_target = "the tilt by length has a closed form that is not declared here"

    def pair_loss(self, pair):
        longer = (pair.chosen_lengths - pair.rejected_lengths).to(pair.margin)
        return -F.logsigmoid(self.reward_margin(pair) - 0.1 * longer)


@right
class ODPO(DPOModule):
    """ODPO (2402.10571): the rated margin is an offset that the margin must exceed."""

    target_of = DPOModule

    def pair_loss(self, pair):
        return -F.logsigmoid(self.reward_margin(pair) - 0.5 * pair.rated_margin)


@right
class DPOP(DPOModule):
    """DPO-Positive (2402.13228): a fall of the chosen completion's likelihood is penalised."""

    no_target = "no closed form: the penalty has a kink at the reference"
    means_it = {"reference slope": "the penalty is zero above the reference's likelihood"}

    def pair_loss(self, pair):
        fall = torch.relu(-pair.chosen_logratio)
        return -F.logsigmoid(self.beta * (pair.margin - 5.0 * fall))


@right
class CalDPO(DPOModule):
    """Cal-DPO (2412.14516): implicit rewards are calibrated to +-1/2."""

    no_target = "no closed form: a squared error is added"

    def pair_loss(self, pair):
        u, v = self.implicit_reward(pair)
        return -F.logsigmoid(self.reward_margin(pair)) + (u - 0.5) ** 2 + (v + 0.5) ** 2


@right
class AlphaPO(SimPOModule):
    """AlphaPO (2501.03884): the reward is a power of the probability per token."""

    no_target = "no closed form"

    def implicit_reward(self, pairs):
        chosen = -0.25 * pairs.chosen_sequence_logprobs / pairs.chosen_lengths
        rejected = -0.25 * pairs.rejected_sequence_logprobs / pairs.rejected_lengths
        return tuple(-self.beta * torch.expm1(power.clamp(-20, 20)) / 0.25 for power in (chosen, rejected))


@right
class FocalDPO(DPOModule):
    """Easy pairs have less weight: the weight is detached, so the gradient is not that of the loss value."""

    no_target = "no closed form: weights depend on the policy"
    means_it = {"gradcheck": "the weight is detached"}

    def pair_loss(self, pair):
        x = self.reward_margin(pair)
        return -torch.sigmoid(-x).detach() * F.logsigmoid(x)


@right
class GradientOfDPO(DPOModule):
    """The gradient of DPO written as a weighted likelihood, with the weight detached."""

    means_it = {"gradcheck": "the weight is detached", "value at reference": "the value is of no interest"}

    def pair_loss(self, pair):
        x = self.reward_margin(pair)
        return -torch.sigmoid(-x).detach() * x


@right
class TwiceDPO(DPOModule):
    """The loss multiplied by a constant, which is equivalent to another learning rate."""

    def pair_loss(self, pair):
        return 2.0 * super().pair_loss(pair)


@right
class DPOInLogSpace(DPOModule):
    """DPO with logaddexp, with unusual whitespace."""

    def pair_loss(self, pair):
        zero = torch.zeros_like(pair.margin)
        return torch.logaddexp(zero, -self.beta * pair.margin)


@right
class DPOByHand(DPOModule):
    """DPO from token log-probabilities, without the input's properties."""

    def pair_loss(self, pair):
        won = (pair.policy_chosen_logprobs - pair.reference_chosen_logprobs).where(pair.chosen_mask, 0.0).sum(-1)
        lost = (pair.policy_rejected_logprobs - pair.reference_rejected_logprobs).where(pair.rejected_mask, 0.0).sum(-1)
        return F.softplus(-self.beta * (won - lost))


@right
class BrierDPO(DPOModule):
    """A proper scoring rule that is not linear in the label: (sigmoid(x) - p)^2."""

    target_of = DPOModule
    means_it = {"labels": "the Brier score is proper and not linear in the label"}

    def preference_loss(self, pairs):
        return (torch.sigmoid(self.reward_margin(pairs)) - pairs.target) ** 2


@right
class SphericalDPO(DPOModule):
    """The spherical score, another proper scoring rule."""

    target_of = DPOModule

    def pair_loss(self, pair):
        p = torch.sigmoid(self.reward_margin(pair))
        return -p / (p**2 + (1 - p) ** 2).sqrt()


@right
class MetricsInTheLoss(DPOModule):
    """A loss that returns metrics, including one per token."""

    def pair_loss(self, pair):
        chosen, _ = pair.token_logratios
        return Loss(-F.logsigmoid(self.reward_margin(pair)), {"gap": pair.margin.detach(), "ratios": chosen.sum(-1)})


@right
class ExpectedMarginFromData(DPOModule):
    """Regresses the margin on a data column (REBEL on fixed pairs)."""

    data_columns = ("gap",)
    target_of = DPOModule
    means_it = dict.fromkeys(("labels", "soft label", "direction"), "the data's number takes the label's place")

    def preference_loss(self, pairs):
        return (self.reward_margin(pairs) - pairs.extras["gap"]) ** 2


# -- published: demonstrations, judgements, scores, divergences --------------------------------------------------------


@right
class FocalSFT(SFTModule):
    """Tokens that are already likely have less weight: (1 - p)^2, detached."""

    no_target = "no closed form: the weights are the policy's own probabilities"
    means_it = {"gradcheck": "the weight is detached"}

    def token_loss(self, logprobs):
        return (1 - logprobs.logprobs.exp()).detach() ** 2 * super().token_loss(logprobs)


@right
class ClippedSFT(SFTModule):
    """DFT with a lower bound on the weight."""

    no_target = "no closed form"
    means_it = {"gradcheck": "the weight is detached"}

    def token_loss(self, logprobs):
        return logprobs.logprobs.detach().exp().clamp_min(0.1) * super().token_loss(logprobs)


@right
class HalfKTO(KTOModule):
    """KTO with a linear value function near 0."""

    no_target = "no closed form"

    def unpaired_loss(self, logprobs):
        advantage = self.beta * (logprobs.logratio - logprobs.reference_point)
        return F.softplus(torch.where(logprobs.desirable, -advantage, advantage))


@right
class HingeReward(RewardModule):
    """A hinge loss on the score difference of pairs, rank 0 minus the other."""

    no_target = "flat minima"
    means_it = dict.fromkeys(("direction", "list direction", "ties"), "a pair that is far enough has no gradient")

    def ranking_loss(self, scores):
        away = torch.where(scores.ranks == 0, -scores.scores, scores.scores)
        gap = torch.zeros_like(scores.target).index_add(0, scores.group, away)
        right, wrong = torch.relu(1 + gap + scores.margin), torch.relu(1 - gap + scores.margin)
        return scores.target * right + (1 - scores.target) * wrong


@right
class LargeScores(RewardModule):
    """Scores in units of 100: the score difference is divided by 100."""

    no_target = "the declared rewards are in other units"

    def ranking_loss(self, scores):
        return super().ranking_loss(scores._replace(scores=scores.scores / 100))


@right
class SmoothedSteps(ProcessRewardModule):
    """Cross-entropy, written out."""

    def process_loss(self, scores):
        return F.binary_cross_entropy_with_logits(scores.scores, scores.labels, reduction="none")


@right
class SkewKL(GKDModule):
    """Skew KL (2402.03898): KL(teacher || .1 teacher + .9 student)."""

    def distillation_loss(self, logits):
        teacher, student = logits.teacher_logits.log_softmax(-1), logits.student_logits.log_softmax(-1)
        rate = torch.tensor(0.1, dtype=student.dtype)
        mixed = torch.logaddexp(teacher + rate.log(), student + torch.log1p(-rate))
        return (teacher.exp() * (teacher - mixed)).sum(-1)


@right
class TotalVariation(GKDModule):
    """Squared Hellinger distance, another proper divergence."""

    def distillation_loss(self, logits):
        teacher, student = logits.teacher_logits.log_softmax(-1), logits.student_logits.log_softmax(-1)
        return 1 - ((teacher + student) / 2).exp().sum(-1)


@right
class CentredDistillation(OnPolicyDistillationModule):
    """A baseline over the rollout is subtracted from the teacher's log-ratio."""

    means_it = dict.fromkeys(("own token", "agreement"), "a baseline over the rollout is subtracted")

    def advantages(self, rollout, rewards):
        found, mask = super().advantages(rollout, rewards).advantages, rollout.completion_mask
        return Advantages(torch.where(mask, found - found[mask].mean(), 0.0), None)


# -- published: policy gradients --------------------------------------------------------------------------------------


@right
class GMPO(GRPOModule):
    """GMPO (2507.20673): the geometric mean of clipped token ratios."""

    target_of = GRPOModule

    def objective(self, ratio, logprobs):
        mask, sign = logprobs.completion_mask, logprobs.advantages.sign()
        d = torch.where(mask, ratio.log(), 0.0)
        clipped = sign * (sign * d).clamp(max=0.4)
        mean = clipped.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp_min(1)
        return -logprobs.advantages * mean.exp()


@right
class VESPO(GRPOModule):
    """VESPO (2602.10693): a gamma weight of the completion's ratio, without gradient, on a REINFORCE loss."""

    target_of = GRPOModule
    means_it = {"pull back": "completions far from the sampled policy lose their weight"}

    def objective(self, ratio, logprobs):
        d = (logprobs.logprobs - logprobs.old_logprobs).clamp(-20, 20).sum(-1, keepdim=True).clamp(-18, 20)
        shape, rate = (torch.where(logprobs.advantages >= 0, a, b) for a, b in ((2.0, 3.0), (3.0, 2.0)))
        weight = torch.exp(rate + shape * d - rate * d.exp()).detach()
        return -weight * logprobs.advantages * logprobs.logprobs


@right
class LUSPO(GSPOModule):
    """LUSPO (2602.05261): GSPO whose completions are weighted by length."""

    no_target = "solved for other aggregations alone"

    def __init__(self, scorer: Any, **kwargs: Any) -> None:
        super().__init__(scorer, aggregation="sequence_mean_token_sum", **kwargs)


@right
class DPPO(DrGRPOModule):
    """DPPO (2602.04879): a trust region in total variation of the sampled token's probability."""

    target_of = DrGRPOModule

    def objective(self, ratio, logprobs):
        moved = logprobs.logprobs.exp() - logprobs.old_logprobs.exp()
        kept = torch.where(logprobs.advantages > 0, moved <= 0.5, moved >= -0.5).to(ratio)
        return -logprobs.advantages * ratio * kept


@right
class IcePop(GRPOModule):
    """IcePop: tokens with a large difference between engine and trainer are masked."""

    target_of = GRPOModule

    def sampler_weight(self, logprobs):
        weight = (logprobs.old_logprobs - logprobs.behaviour_logprobs).clamp(-20, 20).exp()
        return torch.where((weight >= 0.5) & (weight <= 5.0), weight, 0.0)


@right
class OffPolicyMask(GRPOModule):
    """DeepSeek-V3.2: completions with A < 0 that became unlikely are masked."""

    target_of = GRPOModule
    means_it = {"pull back": "completions with A < 0 that are far off are masked"}

    def sampler_weight(self, logprobs):
        mask = logprobs.completion_mask
        off = torch.where(mask, logprobs.old_logprobs - logprobs.logprobs.detach(), 0.0).sum(-1, keepdim=True)
        far = off / mask.sum(-1, keepdim=True).clamp_min(1) > 0.3
        return torch.where(far & (logprobs.advantages < 0), 0.0, 1.0).to(logprobs.logprobs)


@right
class HighEntropyTokens(DrGRPOModule):
    """2506.01939: only the tokens with the highest entropy."""

    no_target = "which tokens are learned from depends on the minibatch"
    means_it = dict.fromkeys(("ratio one", "pull back"), "tokens of low entropy teach nothing")
    needs_minibatch = True

    def objective(self, ratio, logprobs):
        loss, batch = super().objective(ratio, logprobs), logprobs.minibatch
        entropy = batch.entropy[batch.learned]
        threshold = entropy.topk(max(round(0.2 * len(entropy)), 1)).values[-1]
        kept = (batch.entropy[batch.rows, : ratio.shape[1]] >= threshold).to(ratio)
        return loss.values * kept


@right
class MaxRL(CriticFreeModule):
    """MaxRL (2602.02710): advantages are divided by the group's mean success rate."""

    no_target = "the target is that of the likelihood of success"
    means_it = {"advantage sign": "scores of the small world are no success rates"}

    def episode_advantages(self, rewards, rollout):
        group, known = rollout.group, ~rewards.isnan()
        right = torch.where(known, torch.sigmoid(torch.nan_to_num(rewards)), 0.0)
        zeros = torch.zeros(int(group.max()) + 1, dtype=right.dtype)
        count = zeros.index_add(0, group, known.to(right)).clamp_min(1)
        mean = zeros.index_add(0, group, right) / count
        return torch.where(known, (right - mean[group]) / (mean[group] + 1e-4), 0.0)


@right
class OPO(CriticFreeModule):
    """OPO (2505.23585): the baseline is the mean weighted by length."""

    no_target = "a baseline that depends on the completion's own length is biased"

    def episode_advantages(self, rewards, rollout):
        group, lengths = rollout.group, rollout.completion_mask.sum(-1).to(rewards)
        known = ~rewards.isnan()
        zeros, weight = torch.zeros(int(group.max()) + 1, dtype=rewards.dtype), torch.where(known, lengths, 0.0)
        total = zeros.index_add(0, group, weight * torch.nan_to_num(rewards))
        mean = total / zeros.index_add(0, group, weight).clamp_min(1e-9)
        return torch.where(known, torch.nan_to_num(rewards) - mean[group], 0.0)


@right
class PassAtK(CriticFreeModule):
    """Pass@k for k = 2 (2505.15201): a completion gets the group's best score minus the best score without it."""

    no_target = "the best of two samples is rewarded"

    def episode_advantages(self, rewards, rollout):
        scores, group = torch.nan_to_num(rewards, nan=-1e9), rollout.group
        others = (group.unsqueeze(0) == group.unsqueeze(1)) & ~torch.eye(len(group), dtype=torch.bool)
        without = torch.where(others, scores.unsqueeze(0), -torch.inf).max(-1).values
        gain = (scores - without).clamp_min(0)
        return torch.where(rewards.isnan() | (without < -1e8), 0.0, gain)


@right
class DecoupledGAE(PPOModule):
    """VC-PPO (2503.01491): lambda 0.95 for the policy, 1 for the critic."""

    target_of = PPOModule

    def advantages(self, rollout, rewards):
        states = self.critic_states(rollout)
        policy, _ = generalized_advantages(rewards, rollout.values, states, self.gamma, 0.95)
        _, returns = generalized_advantages(rewards, rollout.values, states, self.gamma, self.lam)
        return Advantages(policy, returns)


@right
class SoftGatePPO(PPOModule):
    """SAPO's gate in PPO: nothing is clipped; tokens with extreme ratios lose weight."""

    def __init__(self, scorer: Any, **kwargs: Any) -> None:
        super().__init__(scorer=scorer, objective="soft_gate", **kwargs)


@right
class TanhGatePPO(PPOModule):
    """Another soft gate, written as a custom objective."""

    target_of = PPOModule

    def objective(self, ratio, logprobs):
        return -logprobs.advantages * torch.tanh(ratio - 1)


@right
class LengthShaping(RLOOModule):
    """A penalty per token is part of the score."""

    no_target = "short completions are preferred"
    means_it = {"kl penalty": "length is priced at any score", "score slot": "the price is part of the score"}

    def shape_rewards(self, rollout):
        return super().shape_rewards(rollout) - 0.05 * rollout.completion_mask


@right
class HotPPO(PPOModule):
    """PPO at temperature 0.7."""

    no_target = "at another temperature the optimum is another"

    def __init__(self, scorer: Any, **kwargs: Any) -> None:
        kwargs.pop("temperature", None)
        super().__init__(scorer=scorer, temperature=0.7, **kwargs)


@right
class PPOAtLambda(PPOModule):
    """PPO at lambda 0.9."""

    target_of = PPOModule

    def __init__(self, scorer: Any, **kwargs: Any) -> None:
        kwargs.pop("lam", None)
        super().__init__(scorer=scorer, lam=0.9, **kwargs)


@right
class BaselineOfTheRollout(CriticFreeModule):
    """The mean over the rollout as a baseline: unbiased as rollouts grow."""

    def episode_advantages(self, rewards, rollout):
        known = rewards[~rewards.isnan()]
        return torch.nan_to_num(rewards - known.mean())


@right
class RanksAsScores(GRPOModule):
    """Advantages depend only on the order of scores in a group."""

    no_target = "only the order of the scores counts"

    def episode_advantages(self, rewards, rollout):
        return super().episode_advantages(rewards, rollout).sign()


@right
class TokensWeighedByPlace(CriticFreeModule):
    """Earlier tokens have more weight, which is set in aggregation."""

    no_target = "tokens are weighed by their place"
    means_it = {"ratio one": "tokens are weighed by their place"}

    def objective(self, ratio, logprobs):
        places = torch.arange(ratio.shape[1]).to(ratio)
        return super().objective(ratio, logprobs).values * 0.9**places


@right
class RatioByHand(CriticFreeModule):
    """The default loss, written out."""

    def policy_loss(self, logprobs):
        ratio = token_ratio(logprobs.logprobs, logprobs.old_logprobs)
        held = ratio.clamp(1 - self.clip, 1 + self.clip)
        return torch.maximum(-logprobs.advantages * ratio, -logprobs.advantages * held)


@right
class AdvantagesByHand(CriticFreeModule):
    """Advantages as a grid, without `episode_advantages`."""

    def advantages(self, rollout, rewards):
        total, group = torch.nan_to_num(rewards.sum(-1)), rollout.group
        known = ~rollout.scores.isnan()
        zeros = torch.zeros(int(group.max()) + 1, dtype=total.dtype)
        count = zeros.index_add(0, group, known.to(total)).clamp_min(1)
        mean: Tensor = zeros.index_add(0, group, total * known) / count
        return Advantages(over_tokens((total - mean[group]) * known, rollout.completion_mask), None)


@right
class WeightedOnlineDPO(OnlineDPOModule):
    """Pairs are weighted by their score difference."""

    no_target = "pairs are weighed by their gap"

    def pairs(self, rollout):
        found = super().pairs(rollout)
        return found._replace(weights=found.rated_margin.abs())
