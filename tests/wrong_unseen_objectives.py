"""Wrong objectives of further kinds; most of them declare that no target is known."""

from typing import Any

import torch
import torch.nn.functional as F
from wrong_objectives import caught_by

from rlhf_lightning.functional.logprobs import masked_whiten
from rlhf_lightning.functional.ranking import first_errors
from rlhf_lightning.modules import (
    CriticFreeModule,
    DPOModule,
    DrGRPOModule,
    GKDModule,
    GRPOModule,
    KTOModule,
    ORPOModule,
    PlackettLuceModule,
    PPOModule,
    ProcessRewardModule,
    RewardModule,
    RLOOModule,
    SelfDistillationModule,
    SFTModule,
    SimPOModule,
    XPOModule,
)
from rlhf_lightning.training.meter import moments_over_ranks
from rlhf_lightning.training.returned_loss import as_loss
from rlhf_lightning.types import Advantages, Loss


@caught_by("rejected", "likelihood term of rejected")
class LikelihoodOfRejected(DPOModule):
    no_target = "the likelihood holds the policy back"

    def pair_loss(self, pair):
        return super().pair_loss(pair) - 0.1 * pair.rejected_sequence_logprobs / pair.rejected_lengths


@caught_by("known mistake", "which makes it less likely")
class LikelihoodOfTheWrongSign(DPOModule):
    no_target = "the likelihood holds the policy back"

    def pair_loss(self, pair):
        return super().pair_loss(pair) + 0.2 * pair.chosen_sequence_logprobs / pair.chosen_lengths


@caught_by("reference slope", "a reference that is left out")
class ReferenceOfChosenForBoth(DPOModule):
    no_target = "none"

    def pair_loss(self, pair):
        reference = pair.reference_chosen_logprobs.sum(-1)
        chosen, rejected = pair.chosen_sequence_logprobs - reference, pair.rejected_sequence_logprobs - reference
        return -F.logsigmoid(self.beta * (chosen - rejected))


@caught_by("padding", "or by a slice")
class SlicedByTheLength(DPOModule):
    """Treats the first n columns of a row as its n tokens, which is right only for rows without gaps."""

    def implicit_reward(self, pairs):
        sums = []
        for side in ("chosen", "rejected"):
            values = getattr(pairs, f"policy_{side}_logprobs") - getattr(pairs, f"reference_{side}_logprobs")
            lengths = getattr(pairs, f"{side}_lengths")
            sums.append(torch.stack([row[: int(n)].sum() for row, n in zip(values, lengths, strict=True)]))
        return self.beta * sums[0], self.beta * sums[1]


@caught_by("settings read", "the setting forgotten_gap is never read")
class SettingForgotten(DPOModule):
    target_of = DPOModule

    def __init__(self, forgotten_gap: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.forgotten_gap = forgotten_gap

    def pair_loss(self, pair):
        return -F.logsigmoid(self.reward_margin(pair))


@caught_by("state graph", "keeps the graph of a past step")
class RunningMeanWithItsGraph(DPOModule):
    no_target = "pairs are weighted by the running mean"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.running = 0.0

    def loss_sum(self, batch, meter):
        loss = super().loss_sum(batch, meter)
        self.running = 0.9 * self.running + 0.1 * loss
        return loss


@caught_by("direction", "must become more likely")
class WeightOfDFTNotDetached(SFTModule):
    no_target = "the weights are the policy's own probabilities"

    def token_loss(self, logprobs):
        return logprobs.logprobs.exp() * super().token_loss(logprobs)


@caught_by("entropy bonus", "an entropy bonus is subtracted")
class DemonstrationsWithoutEntropy(SFTModule):
    no_target = "the entropy flattens every distribution"

    def token_statistics(self, policy_logits, reference_logits, targets):
        logp = policy_logits.log_softmax(-1)
        return {"spread": -(logp.exp() * logp).sum(-1)}

    def token_loss(self, logprobs):
        return super().token_loss(logprobs) + 0.1 * logprobs.extras["spread"] * logprobs.weights.unsqueeze(-1)


@caught_by("same twice", "look for random numbers")
class ScoresWithDropout(RewardModule):
    no_target = "noise keeps the gaps small"

    def ranking_loss(self, scores):
        return super().ranking_loss(scores._replace(scores=F.dropout(scores.scores, 0.1)))


@caught_by("known mistake", "student and teacher are exchanged")
class InterpolatedTheOtherWay(GKDModule):
    def distillation_loss(self, logits):
        own, self.beta = self.beta, 1 - self.beta
        try:
            return super().distillation_loss(logits)
        finally:
            self.beta = own


@caught_by("rollout kept", "replace operations in place")
class ScoresCentredInPlace(CriticFreeModule):
    no_target = "scores are centred"

    def episode_advantages(self, rewards, rollout):
        rollout.scores.sub_(rollout.scores.nanmean())
        return super().episode_advantages(rewards, rollout)


@caught_by("own group", "another group's scores")
class BaselineOfTheNextGroup(DrGRPOModule):
    no_target = "none"

    def episode_advantages(self, rewards, rollout):
        group, known = rollout.group, torch.nan_to_num(rewards)
        sums = torch.zeros(int(group.max()) + 1, dtype=rewards.dtype).index_add(0, group, known)
        means = (sums / torch.bincount(group).clamp_min(1)).roll(1)
        return torch.nan_to_num(rewards - means[group])


@caught_by("pull back", "must keep its gradient")
class FarTokensPushedOn(GRPOModule):
    """A dual clip with the wrong sign."""

    no_target = "none"

    def objective(self, ratio, logprobs):
        loss = as_loss(super().objective(ratio, logprobs)).values
        far = (logprobs.advantages < 0) & (ratio > 3)
        return torch.where(far, -loss, loss)


@caught_by("sampler correction", "look for the inverse")
class EngineCorrectedTheWrongWay(DrGRPOModule):
    no_target = "none"

    def policy_loss(self, logprobs):
        loss = as_loss(super().policy_loss(logprobs))
        weight = (logprobs.behaviour_logprobs - logprobs.old_logprobs).exp().clamp(max=5.0).detach()
        return Loss(loss.values * weight, loss.metrics)


@caught_by("entropy bonus", "of the rollout has no gradient")
class EntropyOfTheRollout(CriticFreeModule):
    no_target = "a bonus on entropy"

    def policy_loss(self, logprobs):
        loss = as_loss(super().policy_loss(logprobs))
        return Loss(loss.values - 0.1 * logprobs.rollout.entropy, loss.metrics)


@caught_by("rollout kept", "replace operations in place")
class ValuesScaledInPlace(PPOModule):
    no_target = "none"

    def advantages(self, rollout, rewards):
        rollout.values.mul_(0.9)
        return super().advantages(rollout, rewards)


# -- of a set that was written without knowledge of the checks --------------------------------------------------------


@caught_by("chosen", "the sign inside a penalty")
class PenaltyOnTheWrongSide(DPOModule):
    """DPOP's penalty on chosen above the reference, instead of below it."""

    no_target = "no closed form"

    def pair_loss(self, pair):
        return -F.logsigmoid(self.beta * (pair.margin - 5.0 * pair.chosen_logratio.clamp(min=0)))


@caught_by("implicit reward", "a sign in implicit_reward")
class OddsWithASum(ORPOModule):
    """log P + log(1 - P) instead of the log-odds."""

    def implicit_reward(self, pairs):
        chosen = pairs.chosen_sequence_logprobs / pairs.chosen_lengths.clamp(min=1)
        rejected = pairs.rejected_sequence_logprobs / pairs.rejected_lengths.clamp(min=1)
        return tuple(mean + torch.log1p(-mean.exp().clamp(max=1 - 1e-6)) for mean in (chosen, rejected))


@caught_by("known mistake", "which is 1 / beta")
class BetaOfThePolicyAlone(DPOModule):
    def pair_loss(self, pair):
        policy = pair.chosen_sequence_logprobs - pair.rejected_sequence_logprobs
        reference = pair.reference_chosen_logprobs.sum(-1) - pair.reference_rejected_logprobs.sum(-1)
        return -F.logsigmoid(self.beta * policy - reference)


@caught_by("known mistake", "both sides are divided by the chosen length; added to the loss")
class ChosenLengthAndATerm(SimPOModule):
    no_target = "no closed form, as for SimPO"

    def implicit_reward(self, pairs):
        lengths = pairs.chosen_lengths.clamp(min=1)
        return (
            self.beta * pairs.chosen_sequence_logprobs / lengths,
            self.beta * pairs.rejected_sequence_logprobs / lengths,
        )

    def pair_loss(self, pair):
        chosen, _ = self.implicit_reward(pair)
        return -F.logsigmoid(self.reward_margin(pair) - self.gamma) - 0.05 * chosen / self.beta


@caught_by("mismatched", "matched completions were used")
class PointOfItsOwnRows(KTOModule):
    target_of = KTOModule
    needs_mismatched = False

    def reference_point(self, matched, mismatched):
        return matched.mean().clamp(min=0) if len(matched) else matched.new_zeros(())


@caught_by("credit", "the direction of a sum")
class SumOfThePast(CriticFreeModule):
    def __init__(self, scorer, baseline="none", aggregation="sequence_mean_token_sum", **kwargs):
        super().__init__(scorer=scorer, baseline=baseline, aggregation=aggregation, **kwargs)

    def advantages(self, rollout, rewards):
        return Advantages(torch.nan_to_num(rewards).cumsum(-1) * rollout.completion_mask, None)


@caught_by("list at rest", "the normaliser of each choice")
class PicksAgainstEverybody(PlackettLuceModule):
    target_of = PlackettLuceModule

    def ranking_loss(self, scores):
        same = scores.group.unsqueeze(1) == scores.group.unsqueeze(0)
        against = torch.where(same, scores.scores.unsqueeze(0), -torch.inf).logsumexp(-1)
        last = ~(same & (scores.ranks.unsqueeze(1) < scores.ranks.unsqueeze(0))).any(-1)
        losses = torch.where(last, 0.0, against - scores.scores)
        return losses.new_zeros(len(scores.target)).index_add(0, scores.group, losses)


@caught_by("known mistake", "gamma has the wrong sign (of SimPOModule)")
class GapOfTheWrongSign(DPOModule):
    no_target = "no closed form"
    needs_reference = False

    def __init__(self, beta: float = 2.0, gamma: float = 1.0, **kwargs: Any):
        super().__init__(beta=beta, **kwargs)
        self.gamma = gamma

    def implicit_reward(self, pairs):
        chosen, rejected = pairs.chosen_lengths.clamp(min=1), pairs.rejected_lengths.clamp(min=1)
        return (
            self.beta * pairs.chosen_sequence_logprobs / chosen,
            self.beta * pairs.rejected_sequence_logprobs / rejected,
        )

    def pair_loss(self, pair):
        return -F.logsigmoid(self.reward_margin(pair) + self.gamma)


# -- kinds that a fourth set of strangers' classes showed --------------------------------------------------------------


@caught_by("point unit", "beta is misplaced")
class PointWithoutBeta(KTOModule):
    def unpaired_loss(self, logprobs):
        gain = self.beta * logprobs.logratio - logprobs.reference_point
        return -F.logsigmoid(torch.where(logprobs.desirable, gain, -gain))


@caught_by("statistic", "the position of detach")
class DivergenceThatIsSought(DPOModule):
    """TDPO2 with the wrong one of its two divergences detached."""

    no_target = "no closed form: one of the two divergences has no gradient"
    needs_reference_logits = True

    def token_statistics(self, policy_logits, reference_logits, targets):
        policy, reference = policy_logits.log_softmax(-1), reference_logits.log_softmax(-1)
        return {"kl": (reference.exp() * (reference - policy)).sum(-1)}

    def pair_loss(self, pair):
        won, lost = (pair.extras[f"{side}_kl"].sum(-1) for side in ("chosen", "rejected"))
        return -F.logsigmoid(self.beta * (pair.margin - 0.5 * (lost.detach() - won)))


@caught_by("known mistake", "student and teacher are exchanged")
class AtBetaZero(GKDModule):
    target_of = GKDModule

    def __init__(self, **kwargs: Any):
        super().__init__(beta=0.0, **kwargs)

    def distillation_loss(self, logits):
        student, teacher = logits.student_logits.log_softmax(-1), logits.teacher_logits.log_softmax(-1)
        return F.kl_div(teacher, student, reduction="none", log_target=True).sum(-1)


@caught_by("known mistake", "own reward")
class BestOfAll(RLOOModule):
    target_of = RLOOModule

    def episode_advantages(self, rewards, rollout):
        known = rewards.nan_to_num(-torch.inf)
        best = torch.full_like(rewards, -torch.inf).scatter_reduce(0, rollout.group, known, "amax")
        lead = rewards - best[rollout.group]
        return torch.where(lead.isfinite(), lead, 0.0)


@caught_by("credit", "the direction of a sum")
class WhitenedSumOfThePast(CriticFreeModule):
    def __init__(self, scorer, baseline="none", **kwargs):
        super().__init__(scorer=scorer, baseline=baseline, **kwargs)

    def advantages(self, rollout, rewards):
        scored = rollout.completion_mask & ~rollout.scores.isnan().unsqueeze(-1)
        returns = torch.where(scored, rewards, 0.0).cumsum(-1)
        mean, variance = moments_over_ranks(self.trainer.strategy, returns, scored)
        return Advantages(masked_whiten(returns, scored, mean=mean, var=variance), None)


@caught_by("both labels", "the ends of a mask")
class BeforeTheError(ProcessRewardModule):
    no_target = "steps behind the first wrong one are not learned from"

    def process_loss(self, scores):
        right = scores.labels >= 0.5
        error = first_errors(right, scores.row, scores.position, len(scores.weights))[scores.row]
        return as_loss(super().process_loss(scores)).values * ((error < 0) | (scores.position < error))


@caught_by("known mistake", "the data column chosen_by_reference is inverted")
class OwnSamplePays(XPOModule):
    no_target = "no closed form: the bonus shifts the optimum"

    def pair_loss(self, pair):
        explored = torch.where(
            pair.extras["rejected_by_reference"], pair.chosen_sequence_logprobs, pair.rejected_sequence_logprobs
        )
        return -F.logsigmoid(self.reward_margin(pair)) + self.alpha * explored


@caught_by("uniform share", "this is their sum")
class UniformSum(SFTModule):
    no_target = "demonstrations mixed with uniform tokens"

    def token_statistics(self, policy_logits, reference_logits, targets):
        return {"uniform": policy_logits.log_softmax(-1).sum(-1)}

    def token_loss(self, logprobs):
        uniform = -logprobs.extras["uniform"] * logprobs.weights.unsqueeze(-1)
        return 0.9 * super().token_loss(logprobs) + 0.1 * uniform


@caught_by("other's solution", "the teacher reads the completion itself")
class ItsOwnSolution(SelfDistillationModule):
    def __init__(self, preface: str = "p1 {solution}", **kwargs: Any):
        super().__init__(context=preface, **kwargs)
        self.preface = preface

    def contexts(self, rollout):
        best = {int(group): 0 for group in rollout.group}
        for row in rollout.scores.argsort().tolist():
            best[int(rollout.group[row])] = row
        return [self.preface.format(solution=rollout.texts[best[int(group)]]) for group in rollout.group]
