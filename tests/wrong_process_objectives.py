"""Process reward models with one mistake each, and the check that must detect it: see `wrong_objectives`."""

import torch
from wrong_objectives import caught_by

from rlhf_lightning.modules import ProcessRewardModule


@caught_by("direction")
class WrongStepsRewarded(ProcessRewardModule):
    def process_loss(self, scores):
        return super().process_loss(scores._replace(labels=1 - scores.labels))


@caught_by("labels")
class LabelsRounded(ProcessRewardModule):
    def process_loss(self, scores):
        return super().process_loss(scores._replace(labels=scores.labels.round()))


@caught_by("log-odds")
class SquaredError(ProcessRewardModule):
    def process_loss(self, scores):
        return (scores.scores - scores.labels) ** 2


@caught_by("step scores")
class ReadBeforeTheStepEnds(ProcessRewardModule):
    def step_scores(self, batch):
        earlier = super().step_scores(batch).scores.roll(1)
        return super().step_scores(batch)._replace(scores=earlier)


@caught_by("step labels")
class LabelsOfTheNextStep(ProcessRewardModule):
    def step_scores(self, batch):
        found = super().step_scores(batch)
        return found._replace(labels=found.labels.roll(-1))


@caught_by("row weights")
class StepsWithoutWeights(ProcessRewardModule):
    def loss_sum(self, batch, meter):
        return super().loss_sum(batch._replace(weights=torch.ones_like(batch.weights)), meter)


@caught_by("two ranks")
class StepsOfThisRank(ProcessRewardModule):
    def loss_count(self, step):
        return sum(len(labels) for batch in step.micro_batches for labels in batch.labels)


@caught_by("micro-batches")
class MeanPerCompletion(ProcessRewardModule):
    def loss_sum(self, batch, meter):
        return super().loss_sum(batch, meter) / sum(len(labels) for labels in batch.labels)
