"""Distillation objectives with one mistake each, and the check that must detect it; see `wrong_objectives`."""

import torch
from wrong_objectives import caught_by

from rlhf_lightning.functional.distillation import distillation_advantages, forward_kl
from rlhf_lightning.modules import GKDModule, OnPolicyDistillationModule
from rlhf_lightning.training.offline import OfflineModule
from rlhf_lightning.types import Advantages

# -- divergences ------------------------------------------------------------------------------------------------------


@caught_by("direction")
class AwayFromTheTeacher(GKDModule):
    def distillation_loss(self, logits):
        return -super().distillation_loss(logits)


@caught_by("gradient at teacher")
class OnlyTheStudentIsTempered(GKDModule):
    def distillation_loss(self, logits):
        return forward_kl(logits.student_logits / 2.0, logits.teacher_logits)


@caught_by("target")
class LikeliestTokenOnly(GKDModule):
    def distillation_loss(self, logits):
        best = logits.teacher_logits.argmax(-1, keepdim=True)
        return -logits.student_logits.log_softmax(-1).gather(-1, best).squeeze(-1)


@caught_by("gradient")
class StudentDetached(GKDModule):
    def distillation_loss(self, logits):
        return forward_kl(logits.student_logits.detach(), logits.teacher_logits) + 0 * logits.student_logits.sum(-1)


@caught_by("shift")
class LogitsRegressed(GKDModule):
    def distillation_loss(self, logits):
        return (logits.student_logits - logits.teacher_logits).square().clamp(max=1e6).mean(-1)


@caught_by("micro-batches")
class DivergenceMeanForSum(GKDModule):
    def loss_sum(self, batch, meter):
        return super().loss_sum(batch, meter) / len(batch.weights)


@caught_by("row weights")
class DivergenceWithoutWeights(GKDModule):
    def loss_sum(self, batch, meter):
        return super().loss_sum(batch._replace(weights=torch.ones_like(batch.weights)), meter)


@caught_by("sampled step")
class SamplesDividedByTheDatasTokens(GKDModule):
    def training_step(self, step, batch_idx):
        sampled = self.with_samples(step) if self.learns_from_samples(self.updates) else step
        OfflineModule.training_step(self, sampled._replace(tokens=step.tokens), batch_idx)


@caught_by("sampled micro-batches")
class SamplesNumberedByTheirPlace(GKDModule):
    def sampled(self, sequences):
        places = tuple(torch.tensor([place]) for place in range(len(sequences.completions)))
        return super().sampled(sequences._replace(completions=places))


@caught_by("coin")
class AlwaysOnSamples(GKDModule):
    def learns_from_samples(self, update):
        return self.on_policy_fraction > 0


@caught_by("student logits")
class StudentHalved(GKDModule):
    def _of_chunk(self, student_logits, targets, teacher_hidden):
        return super()._of_chunk(0.5 * student_logits, targets, teacher_hidden)


# -- samples ----------------------------------------------------------------------------------------------------------


@caught_by("advantage sign")
class TeacherAndStudentExchanged(OnPolicyDistillationModule):
    def advantages(self, rollout, rewards):
        mask = rollout.completion_mask
        return Advantages(distillation_advantages(rollout.old_logprobs, rollout.reference_logprobs, mask), None)


@caught_by("agreement")
class LikelihoodOfTheTeacherAlone(OnPolicyDistillationModule):
    def advantages(self, rollout, rewards):
        return Advantages(rollout.reference_logprobs, None)


@caught_by("own token")
class TokensPayForThoseBefore(OnPolicyDistillationModule):
    def advantages(self, rollout, rewards):
        found = super().advantages(rollout, rewards).advantages
        return Advantages(torch.where(rollout.completion_mask, found.cumsum(-1), 0.0), None)


@caught_by("advantages under mask")
class CentredOverPads(OnPolicyDistillationModule):
    def advantages(self, rollout, rewards):
        found = super().advantages(rollout, rewards).advantages
        return Advantages(found - found.mean(), None)
