"""Right objectives without ``means_it``, as written by users who do not know the checks."""

import torch
import torch.nn.functional as F
from right_objectives import right

from rlhf_lightning.functional.policy_gradient import (
    generalized_advantages,
    group_mean_advantages,
    leave_one_out_advantages,
    over_tokens,
)
from rlhf_lightning.functional.ranking import untied_pairs
from rlhf_lightning.modules import (
    BCOModule,
    CriticFreeModule,
    DPOModule,
    DrGRPOModule,
    GKDModule,
    GRPOModule,
    KTOModule,
    OnlineDPOModule,
    OnPolicyDistillationModule,
    PPOModule,
    ProcessRewardModule,
    RewardModule,
    RLOOModule,
    SFTModule,
)
from rlhf_lightning.modules.dpo import normalised
from rlhf_lightning.types import Advantages, Pairs


@right
class RootLengthDPO(DPOModule):
    """Log-ratios divided by the root of the length; its closed form is declared."""

    def implicit_reward(self, pairs):
        chosen, rejected = (lengths.clamp(min=1).sqrt() for lengths in (pairs.chosen_lengths, pairs.rejected_lengths))
        return self.beta * pairs.chosen_logratio / chosen, self.beta * pairs.rejected_logratio / rejected

    def target_policy(self, problem):
        root = problem.lengths.double().sqrt()
        return normalised(problem, problem.rewards / self.beta, lambda shifted: torch.exp(root * shifted))


@right
class ReverseKLOfLabels(DPOModule):
    """EXO with the label instead of a smoothed label: not linear in the label; the optimum is the label's log-odds."""

    no_target = "certain labels have no optimum"

    def preference_loss(self, pairs):
        p, x = pairs.target.clamp(1e-3, 1 - 1e-3), self.reward_margin(pairs)
        right = torch.sigmoid(x) * (F.logsigmoid(x) - p.log())
        return right + torch.sigmoid(-x) * (F.logsigmoid(-x) - torch.log1p(-p))


@right
class DynamicFineTuning(SFTModule):
    """DFT (2508.05629): tokens are weighted by their probability, without gradient."""

    no_target = "no closed form: the weights are the policy's own probabilities"

    def token_loss(self, logprobs):
        return logprobs.logprobs.detach().exp() * super().token_loss(logprobs)


@right
class JudgedByLength(KTOModule):
    """KTO on log-ratios per token."""

    no_target = "no closed form"

    def unpaired_loss(self, logprobs):
        advantage = self.beta * (logprobs.logratio / logprobs.lengths - logprobs.reference_point)
        gain, loss = torch.sigmoid(-advantage), torch.sigmoid(advantage)
        return torch.where(logprobs.desirable, self.desirable_weight * gain, self.undesirable_weight * loss)


@right
class ScoresNearZero(RewardModule):
    """A penalty on the squared sum of a pair's scores, written out (2312.09244)."""

    no_target = "no closed form: scores are held near zero"

    def ranking_loss(self, scores):
        losses = super().ranking_loss(scores)
        better, worse = untied_pairs(scores.group, scores.ranks)
        level, group = (scores.scores[better] + scores.scores[worse]).square(), scores.group[better]
        pairs = torch.bincount(group, minlength=len(losses)).clamp_min(1)
        return losses + 0.01 * losses.new_zeros(len(losses)).index_add(0, group, level) / pairs


@right
class BrierSteps(ProcessRewardModule):
    """The Brier score of each step, which is proper and not linear in the label."""

    target_of = ProcessRewardModule

    def process_loss(self, scores):
        return (torch.sigmoid(scores.scores) - scores.labels).square()


@right
class TeacherAndData(GKDModule):
    """Hinton et al. (1503.02531): the teacher's distribution and the data's tokens."""

    no_target = "between the teacher and the data"

    def distillation_loss(self, logits):
        entropy = F.cross_entropy(logits.student_logits, logits.targets, reduction="none")
        return 0.9 * super().distillation_loss(logits) + 0.1 * entropy


@right
class RewardsToGo(OnPolicyDistillationModule):
    """The teacher's log-ratio for the rest of the completion, minus its mean over the rollout."""

    target_of = OnPolicyDistillationModule

    def advantages(self, rollout, rewards):
        mask = rollout.completion_mask
        word = torch.where(mask, rollout.reference_logprobs - rollout.old_logprobs, 0.0)
        onwards = torch.where(mask, word.flip(-1).cumsum(-1).flip(-1), 0.0)
        return Advantages(torch.where(mask, onwards - onwards[mask].mean(), 0.0), None)


@right
class UncertainTokens(DrGRPOModule):
    """2506.01939: only the tokens with the highest entropy."""

    no_target = "which tokens are learned from depends on the minibatch"
    needs_minibatch = True

    def objective(self, ratio, logprobs):
        loss, batch = super().objective(ratio, logprobs), logprobs.minibatch
        entropy = batch.entropy[batch.learned]
        threshold = entropy.topk(max(round(0.2 * len(entropy)), 1)).values[-1]
        return loss.values * (batch.entropy[batch.rows, : ratio.shape[1]] >= threshold)


@right
class SuccessRates(CriticFreeModule):
    """MaxRL (2602.02710): advantages are divided by the group's mean success rate."""

    no_target = "the likelihood of success is maximised"

    def episode_advantages(self, rewards, rollout):
        group, known = rollout.group, ~rewards.isnan()
        zeros, right = torch.zeros(int(group.max()) + 1, dtype=rewards.dtype), torch.nan_to_num(rewards)
        mean = (zeros.index_add(0, group, right) / zeros.index_add(0, group, known.to(right)).clamp_min(1))[group]
        return torch.where(known, (right - mean) / (mean + 1e-4), 0.0)


@right
class ShortIsGood(GRPOModule):
    """A length penalty is part of the reward."""

    no_target = "short completions are preferred"

    def episode_advantages(self, rewards, rollout):
        return super().episode_advantages(rewards - 0.1 * rollout.completion_mask.sum(-1), rollout)


@right
class RobustCritic(PPOModule):
    """PPO with Huber's loss for the critic."""

    target_of = PPOModule

    def value_loss(self, values):
        return F.smooth_l1_loss(values.values, values.returns, reduction="none")


@right
class CriticOfThePaper(PPOModule):
    """PPO whose value loss has no factor 1/2 (1707.06347, Eq. 9)."""

    target_of = PPOModule

    def value_loss(self, values):
        return (values.values - values.returns).square()


@right
class CriticAtLambdaOne(PPOModule):
    """VC-PPO (2503.01491): the critic learns rewards to go at every lambda of the policy."""

    target_of = PPOModule

    def advantages(self, rollout, rewards):
        states = self.critic_states(rollout)
        _, returns = generalized_advantages(rewards, rollout.values, states, self.gamma, 1.0)
        return super().advantages(rollout, rewards)._replace(returns=returns)


@right
class BaselineThatFollows(CriticFreeModule):
    """REINFORCE with the moving mean of all scores as baseline, which is saved in checkpoints."""

    target_of = CriticFreeModule

    def __init__(self, scorer, baseline="none", **kwargs):
        super().__init__(scorer=scorer, baseline=baseline, **kwargs)
        self.running = 0.0

    def episode_advantages(self, rewards, rollout):
        return torch.nan_to_num(rewards - self.running)

    def on_rollout_end(self, rollout, means):
        self.running = 0.9 * self.running + 0.1 * means["score"]

    def on_save_checkpoint(self, checkpoint):
        super().on_save_checkpoint(checkpoint)
        checkpoint["running"] = self.running

    def on_load_checkpoint(self, checkpoint):
        super().on_load_checkpoint(checkpoint)
        self.running = checkpoint["running"]


@right
class EveryPair(OnlineDPOModule):
    """Every pair of a prompt's samples, the better one chosen."""

    target_of = OnlineDPOModule

    def pairs(self, rollout):
        scores, same = rollout.scores, rollout.group.unsqueeze(0) == rollout.group.unsqueeze(1)
        chosen, rejected = (same & (scores.unsqueeze(1) > scores.unsqueeze(0))).nonzero(as_tuple=True)
        gap = scores[chosen] - scores[rejected]
        ones = torch.ones_like(gap)
        return Pairs(chosen, rejected, torch.sigmoid(gap) if self.soft_labels else ones, gap, ones)


@right
class SureVerdicts(KTOModule):
    """A logistic variant of KTO whose rows have a label confidence from 1/2 to 1."""

    no_target = "no closed form: the reference point is that of the policy"
    data_columns = ("sureness",)

    def unpaired_loss(self, logprobs):
        lead = self.beta * (logprobs.logratio - logprobs.reference_point)
        sure = logprobs.extras["sureness"].to(lead).clamp(0.5, 1.0)
        q = torch.where(logprobs.desirable, sure, 1 - sure)
        return -q * F.logsigmoid(lead) - (1 - q) * F.logsigmoid(-lead)


@right
class SureBinary(BCOModule):
    """BCO weighted by a confidence that moves desirable and undesirable rows towards each other."""

    value_at_reference = None
    no_target = "no closed form: delta is that of the policy"
    data_columns = ("sureness",)

    def unpaired_loss(self, logprobs):
        lead = self.beta * logprobs.logratio - logprobs.reference_point
        sure = 2 * logprobs.extras["sureness"].to(lead).clamp(0.5, 1.0) - 1
        return sure * -F.logsigmoid(torch.where(logprobs.desirable, lead, -lead)) + (1 - sure) * lead.square() / 8


class Tilted(OnPolicyDistillationModule):
    """Distillation of whole completions, mixed with a score in a given proportion."""

    needs_group = True

    def __init__(self, teacher, share=1.0, aggregation="sequence_mean_token_sum", **kwargs):
        super().__init__(teacher=teacher, aggregation=aggregation, **kwargs)
        self.share = share

    def gains(self, rollout):
        said = torch.where(rollout.completion_mask, rollout.reference_logprobs - rollout.old_logprobs, 0.0).sum(-1)
        return self.share * rollout.scores + said

    def advantages(self, rollout, rewards):
        found = leave_one_out_advantages(self.gains(rollout), rollout.group)
        return Advantages(over_tokens(found, rollout.completion_mask), None)

    def target_policy(self, problem):
        return torch.softmax(problem.teacher.log() + self.share * problem.rewards, -1)


@right
class TiltedByScores(Tilted):
    """With a leave-one-out baseline."""


@right
class TiltedByTheGroup(Tilted):
    """With the group mean as baseline."""

    def advantages(self, rollout, rewards):
        total = self.gains(rollout)
        mean = total.new_zeros(len(total)).index_add(0, rollout.group, total) / torch.bincount(
            rollout.group, minlength=len(total)
        ).clamp_min(1)
        lead = torch.nan_to_num(total - mean[rollout.group])
        return Advantages(over_tokens(lead, rollout.completion_mask), None)


class Probed(SFTModule):
    """Demonstrations weighted by a probe of the last layer's states that is trained on their scores."""

    no_target = "no closed form: the demonstrations are tilted by bounded weights"
    data_columns = ("score",)
    hidden_layers = (-1,)
    means_it = {"list at rest": "there are no lists"}

    def load_models(self):
        super().load_models()
        self.probe = torch.nn.Linear(self.policy.model.config.hidden_size, 1)
        torch.nn.init.zeros_(self.probe.weight)
        torch.nn.init.zeros_(self.probe.bias)

    def weight(self, lead):
        return lead.clamp_max(3.0).exp()

    def token_loss(self, logprobs):
        first = logprobs.completion_mask & (logprobs.completion_mask.cumsum(-1) == 1)
        states = (logprobs.extras["hidden_-1"].to(self.probe.weight) * first.unsqueeze(-1)).sum(1)
        value, score = self.probe(states).squeeze(-1), logprobs.extras["score"].to(self.probe.weight)
        error = first * ((value - score).square() * logprobs.weights).unsqueeze(-1)
        return super().token_loss(logprobs) * self.weight(score - value.detach()).unsqueeze(-1) + 0.1 * error


@right
class ProbeWeighted(Probed):
    """Exponential weights."""


@right
class ProbeGated(Probed):
    """Weights between 0 and 1."""

    def weight(self, lead):
        return lead.sigmoid()


@right
class DrawsOfK(CriticFreeModule):
    """Pass@k (2508.10751): a completion gets the probability that k samples including it contain a right one."""

    no_target = "the chance of one right completion of k is maximised"

    def __init__(self, scorer, k: int = 2, kl_coef: float = 0.0, **kwargs):
        super().__init__(scorer=scorer, kl_coef=kl_coef, **kwargs)
        self.k = k

    def episode_advantages(self, rewards, rollout):
        wrong, group = (rewards <= 0).to(rewards), rollout.group
        none = torch.zeros(int(group.max()) + 1).to(rewards)
        count, failures = (none.index_add(0, group, one)[group] for one in (1.0 - rewards.isnan().to(rewards), wrong))
        missed = wrong
        for draw in range(1, self.k):
            missed = missed * (failures - draw).clamp(min=0) / (count - draw).clamp(min=1)
        return group_mean_advantages(torch.where(rewards.isnan(), rewards, -missed), group)


@right
class RatedGap(DPOModule):
    """Offline REBEL (2404.16767): the implicit reward margin is regressed on the rated strength of the preference."""

    no_target = "ratings of different pairs need not be consistent"

    def pair_loss(self, pair):
        return (self.reward_margin(pair) - pair.rated_margin).square()


@right
class BoundedScore(RLOOModule):
    """PAR (2502.18770): the reward is a sigmoid of the score; the class declares the optimum of these rewards."""

    def shape_rewards(self, rollout):
        return super().shape_rewards(rollout._replace(scores=rollout.scores.sigmoid()))

    def target_policy(self, problem):
        return torch.softmax(problem.reference.log() + problem.rewards.sigmoid() / self.kl_coef, -1)
