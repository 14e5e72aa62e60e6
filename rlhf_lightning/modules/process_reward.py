"""Process reward models, which score each step of a completion."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from rlhf_lightning.errors import DataError, SettingError
from rlhf_lightning.functional.ranking import first_errors, step_loss
from rlhf_lightning.models.layout import padded_layout
from rlhf_lightning.models.resolving import STEP_SEPARATOR
from rlhf_lightning.models.transfer import to_device
from rlhf_lightning.modules.reward import RewardModule
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.training.returned_loss import loss_of
from rlhf_lightning.types import DataNeeds, Loss, ProcessBatch, ProcessScores, Step


class ProcessRewardModule(RewardModule):
    r"""Process reward model: the log-odds that each step of a completion is right.

    loss = (1/N) \sum_{rows} w \sum_{steps} [-y log sigmoid(s) - (1 - y) log sigmoid(-s)], where y is the step's label
    and s the scalar head's value at the step's last token, which attends to the step and all tokens before it (Lightman
    et al., arXiv 2305.20050, Section 2.6, with one logit instead of their two tokens). N is the number of labelled
    steps of the whole optimizer step, so every step has the same weight. Soft labels (Math-Shepherd, arXiv 2312.08935)
    are probabilities. Scores of 0 give log 2.

    ``step_accuracy`` is the share of steps whose score has the right sign. ``first_error_f1`` is the F1 of
    ProcessBench (arXiv 2412.06559): the harmonic mean of two accuracies. The first is the share of wrong completions
    whose first wrong step is found; the second the share of right completions in which no step is judged wrong. A label
    of exactly 0.5 is left out of ``step_accuracy`` and counts as right in ``first_error_f1``.

    The exported folder holds a reward model and its step separator. Used as a scorer, the model splits completions at
    the separator and returns the lowest step score, see `ProcessScorer`.

    Target: the log-odds of each step's labels.

    Args:
        step_separator: text between two steps, in the training data and in completions scored later.
    """

    paper = "Lightman et al. 2023, arXiv 2305.20050"
    batch_type: ClassVar[type] = ProcessBatch
    counts_tokens = True
    headline_metrics = ("val/loss", "val/step_accuracy", "val/first_error_f1")

    def __init__(self, step_separator: str = "\n", **kwargs: Any) -> None:
        super().__init__(centering=0.0, normalise=False, outputs=1, **kwargs)
        if not step_separator:
            raise SettingError("missing-setting", "step_separator is empty: set the text between two steps")
        self.step_separator = step_separator

    @property
    def data_needs(self) -> DataNeeds:
        return super().data_needs._replace(step_separator=self.step_separator)

    def load_models(self) -> None:
        super().load_models()
        self.reward_model.bias = 0.0  # scores are log-odds, which a bias would shift

    def process_loss(self, scores: ProcessScores) -> Tensor | Loss:
        """Return one loss per step, shape (steps,). Override it for another objective on judged steps."""
        return step_loss(scores.scores, scores.labels)

    def step_scores(self, batch: ProcessBatch) -> ProcessScores:
        """Return the score of each judged step, from one forward pass."""
        layout = padded_layout(batch.sequences).to(self.device)
        ends = layout._replace(predictors=layout.predictors + 1)  # hidden state of a step's last token itself
        mask = layout.completion_mask
        found = self.reward_model(ends, per_token=True).flatten()[layout.cells]
        row = layout.cells.div(mask.shape[1], rounding_mode="floor")
        labels = to_device(torch.cat([torch.zeros(0), *batch.labels]), self.device).to(found)
        if len(labels) != len(row):
            raise DataError(
                "wrong-number", f"{len(labels)} labels for {len(row)} labelled steps: a batch needs one label per step"
            )
        position = (mask.cumsum(-1) - 1).flatten()[layout.cells]
        extras = self.slots_of(batch)
        return ProcessScores(found, labels, row, position, to_device(batch.weights, self.device), extras)

    def loss_sum(self, batch: ProcessBatch, meter: Meter) -> Tensor:  # type: ignore[override]
        scores = self.step_scores(batch)
        loss = loss_of(self.process_loss, scores, like=scores.labels)
        losses = loss.values * scores.weights[scores.row]
        meter.add("loss", losses)
        self._measure_steps(scores, meter)
        for name, values in loss.metrics.items():
            meter.add(name, values)
        return losses.sum()

    def _measure_steps(self, scores: ProcessScores, meter: Meter) -> None:
        """Add the accuracy per step and the two accuracies per completion."""
        said, labelled = scores.scores.detach() > 0, scores.labels
        meter.add("step_accuracy", ((said == (labelled > 0.5)) & (scores.scores != 0)).double(), labelled != 0.5)
        meter.add("score", scores.scores)
        rows = len(scores.weights)
        found = first_errors(said, scores.row, scores.position, rows)
        true = first_errors(labelled >= 0.5, scores.row, scores.position, rows)
        meter.add("first_error_found", (found == true).double(), true >= 0)
        meter.add("right_accepted", (found == true).double(), true < 0)

    def evaluation_metrics(self) -> dict[str, float]:
        means = super().evaluation_metrics()
        if {"first_error_found", "right_accepted"} <= means.keys():
            found, accepted = means["first_error_found"], means["right_accepted"]
            means["first_error_f1"] = 2 * found * accepted / max(found + accepted, 1e-12)
        return means

    def predict_step(self, step: Step[Any], batch_idx: int) -> list[dict[str, Any]]:
        """Return each completion with the predicted probability that each judged step is right, and the labels."""
        found: list[dict[str, Any]] = []
        for batch in step.micro_batches:
            scores, sequences = self.step_scores(batch), batch.sequences
            for row, (parent, ids) in enumerate(zip(sequences.parents, sequences.completions, strict=True)):
                prompt, completion = (
                    self.tokenizer.decode(part.tolist(), skip_special_tokens=True)
                    for part in (sequences.prompts[parent], ids)
                )
                mine = scores.row == row
                right = torch.sigmoid(scores.scores[mine]).tolist()
                labels = scores.labels[mine].tolist()
                found.append({"prompt": prompt, "completion": completion, "steps": right, "labels": labels})
        return found

    @property
    def facts_of_scores(self) -> dict[str, Any]:
        return {STEP_SEPARATOR: self.step_separator}
