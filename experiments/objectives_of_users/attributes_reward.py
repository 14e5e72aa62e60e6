"""A reward model of five attributes: `rlhf fit --config experiments/objectives_of_users/attributes_reward.yaml`."""

from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.modules import RewardModule
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.types import DemonstrationBatch


class AttributesRewardModule(RewardModule):
    r"""Regression of five rated attributes of each completion (HelpSteer, Wang et al., 2311.09528, Section 3).

    loss = mean over attributes of (output - rating)^2. The rows are those of `SFTDataModule` with a column for each
    attribute. The exported folder scores by the first attribute; the others are parts of its judgements.
    """

    paper = "Wang et al. 2023, arXiv 2311.09528"
    batch_type = DemonstrationBatch
    data_columns = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    output_names = data_columns
    headline_metrics = ("val/loss",)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(outputs=len(self.data_columns), normalise=False, **kwargs)

    def loss_sum(self, batch: DemonstrationBatch, meter: Meter) -> Tensor:
        """Return the summed losses of a micro-batch's rows."""
        outputs = self.reward_model(self.lay_out(batch.sequences))
        ratings = torch.stack([batch.extras[name] for name in self.data_columns], -1).to(outputs)
        errors = (outputs - ratings).square()
        for name, error in zip(self.data_columns, errors.T, strict=True):
            meter.add(f"{name}_error", error)
        losses = errors.mean(-1) * batch.weights.to(outputs)
        meter.add("loss", losses)
        return losses.sum()
