"""Reward models from human rankings."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

from rlhf_lightning.errors import SettingError
from rlhf_lightning.functional.ranking import ranked_pairs_loss, untied_pairs
from rlhf_lightning.models.export import export_reward_model
from rlhf_lightning.models.loading import (
    OUTPUT_NAMES,
    add_lora,
    is_adapter,
    load_base_of_adapter,
    load_reward_hf_model,
    prepare_for_training,
    refuse_other_quantization,
    resolve_folder,
)
from rlhf_lightning.models.scalar_head import ScalarModel
from rlhf_lightning.training.checkpoint_state import of_all_ranks, rank_of
from rlhf_lightning.training.gathering import gathered_rows
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.training.module import as_loss
from rlhf_lightning.training.offline import OfflineModule
from rlhf_lightning.training.slots import on_device
from rlhf_lightning.types import EnumeratedProblem, RankedBatch, RankedScores, Step


class RewardModule(OfflineModule):
    r"""A scalar score per completion whose differences are the log-odds of a human's preference.

    For a pair, loss = -p log sigmoid(d - m) - (1 - p) log sigmoid(-(d - m)) with d = score(chosen) - score(rejected),
    p the probability that chosen is better (1 for a plain label) and m its rated margin (Bradley-Terry; Stiennon et al.
    2009.01325, margins of Llama 2, 2307.09288). A ranked list counts the mean over its untied pairs, each completion
    forwarded once (InstructGPT, 2203.02155, Eq. 1). Equal scores give log 2.

    Target: scores that are the rewards up to a constant for each prompt, where preferences are Bradley-Terry in them;
    with ``centering`` no closed form.

    The score is a linear head on the last completion token's hidden state, drawn from N(0, 1/(hidden size + 1)).

    Args:
        centering: weight of (score(chosen) + score(rejected))^2, which keeps scores near zero (Eisenstein et al.,
            2312.09244); 0.01 there.
        normalise: after training, report scores relative to the mean score of the best-ranked training completions, so
            that demonstrations score 0 on average (InstructGPT). The exported weights stay as trained; the bias
            travels in the folder's config.json.
        outputs: numbers that the head gives for each completion: several attributes, or a mean and a variance. With
            more than one, ``score_of`` makes a score of them, a loss finds them in ``RankedScores.extras["outputs"]``,
            and whoever scores with the exported folder gets them as the parts of a `Judgement`.
    """

    paper = "Stiennon et al. 2020, arXiv 2009.01325"
    ranges = {
        "centering": "[0, inf)",
        "outputs": "[1, inf)",
    }
    batch_type: ClassVar[type] = RankedBatch
    has_policy = False
    headline_metrics = ("val/loss", "val/accuracy", "val/ece")

    def __init__(
        self,
        centering: float = 0.0,
        normalise: bool = True,
        outputs: int = 1,
        learning_rate: float = 9e-6,
        adam_eps: float = 1e-5,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, adam_eps=adam_eps, **kwargs)
        if outputs < 1:
            raise SettingError("reward-outputs", f"outputs is {outputs}: a reward model has at least one")
        self.centering, self.normalise, self.outputs = centering, normalise, outputs
        self._judged: list[Tensor] = []  # confidence in each held-out pair, and whether it was right

    @property
    def model(self) -> ScalarModel:
        """The reward model."""
        return self.reward_model

    def load_models(self) -> None:
        """Load the backbone and give it a scalar head where it has none; an adapter is trained on, not stacked upon."""
        name = resolve_folder(self.init_from)
        continued = name if self.lora is not None and is_adapter(name) else None
        if continued is not None:
            refuse_other_quantization(continued, self.load_settings.quantization)
            name = load_base_of_adapter(continued)
        model = load_reward_hf_model(name, self.load_settings, self.outputs, pad_token_id=self.tokenizer.pad_token_id)
        prepare_for_training(model, self.load_settings)
        if self.lora is not None:
            model = add_lora(model, self.lora, "SEQ_CLS", continued, self.seed)
        self.reward_model = ScalarModel(model, bias=float(getattr(model.config, "score_bias", 0.0)))
        self._best_scores = Meter()

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the head's outputs, which a scorer calls the parts of its judgements by."""
        return tuple(f"output_{number}" for number in range(self.outputs))

    def score_of(self, outputs: Tensor) -> Tensor:
        """Return the score that a head of several outputs gives, shape (completions,): their first.

        Args:
            outputs: shape (completions, outputs).
        """
        return outputs[:, 0]

    def ranking_loss(self, scores: RankedScores) -> Tensor:
        """Return one loss per group, shape (groups,). The override point of this family."""
        return ranked_pairs_loss(
            scores.scores, scores.group, scores.ranks, scores.target, scores.margin, centering=self.centering
        )

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        """Return the scores that are the log-odds of the preferences: the rewards, each prompt's mean taken off."""
        return None if self.centering else problem.rewards - problem.rewards.mean(-1, keepdim=True)

    def loss_sum(self, batch: RankedBatch, meter: Meter) -> Tensor:
        """Return the summed losses of a micro-batch's groups."""
        scores, extras = self.reward_model(self.lay_out(batch.sequences)), on_device(batch.extras, self.device)
        if self.outputs > 1:
            scores, extras = self.score_of(scores), {**extras, "outputs": scores}
        group = torch.tensor(batch.sequences.parents, dtype=torch.long, device=self.device)
        parts = (batch.ranks, batch.target, batch.margin, batch.weights)
        ranks, target, margin, weights = (part.to(self.device) for part in parts)
        ranked = RankedScores(scores, group, ranks, target, margin, weights, extras)
        loss = as_loss(self.ranking_loss(ranked))
        self._measure(ranked, loss.values, meter)
        for name, values in loss.metrics.items():
            meter.add(name, values)
        return (loss.values * ranked.weights).sum()

    def _measure(self, ranked: RankedScores, losses: Tensor, meter: Meter) -> None:
        """Add accuracy (equal scores count as wrong), margins and calibration over all pairs that are no ties."""
        better, worse = untied_pairs(ranked.group, ranked.ranks)
        told_apart = ranked.target[ranked.group[better]] != 0.5
        better, worse = better[told_apart], worse[told_apart]
        margins = (ranked.scores[better] - ranked.scores[worse]).detach()
        meter.add_ratio("loss", (losses * ranked.weights).sum(), len(losses))
        meter.add("accuracy", (margins > 0).double())
        meter.add("score_margin", margins)
        meter.add("score", ranked.scores)
        meter.add("score_squared", ranked.scores.detach().square())
        if torch.is_grad_enabled():
            self._best_scores.add("score", ranked.scores[ranked.ranks == 0])
        else:
            self._judged.append(torch.stack([torch.sigmoid(margins.abs()), (margins > 0).to(margins)], -1))
            meter.add("brier", (torch.sigmoid(margins) - 1.0).square())

    def on_train_epoch_start(self) -> None:
        """The demonstrations' mean is taken over the last epoch, when the scores have settled."""
        self._best_scores = Meter()

    def on_train_epoch_end(self) -> None:
        """Set the bias that scores are reported relative to."""
        means = self._best_scores.means(self.trainer.strategy)
        if self.normalise and means:
            self.reward_model.bias = means["score"]

    def on_validation_epoch_start(self) -> None:
        """Forget the last evaluation."""
        super().on_validation_epoch_start()
        self._judged = []

    def on_test_epoch_start(self) -> None:
        """Forget the last evaluation."""
        super().on_test_epoch_start()
        self._judged = []

    def evaluation_metrics(self) -> dict[str, float]:
        """Return held-out metrics; ``ece`` bins the confidence max(p, 1-p), since chosen is always the label."""
        means = super().evaluation_metrics()
        judged = gathered_rows(self, torch.cat([torch.zeros(0, 2, device=self.device), *self._judged]))
        if len(judged):
            confidence, right = judged.T.contiguous()
            means["ece"] = float(binary_calibration_error(confidence, right, n_bins=20, norm="l1"))
        if "score_squared" in means:
            means["score_std"] = max(means.pop("score_squared") - means["score"] ** 2, 0.0) ** 0.5
        return means

    def predict_step(self, step: Step[Any], batch_idx: int) -> list[dict[str, Any]]:
        """Score each completion of each group."""
        rows: list[dict[str, Any]] = []
        for batch in step.micro_batches:
            scores = self.reward_model(self.lay_out(batch.sequences))
            scores = (self.score_of(scores) if self.outputs > 1 else scores) - self.reward_model.bias
            decode = self.tokenizer.decode
            for row, (parent, score) in enumerate(zip(batch.sequences.parents, scores.tolist(), strict=True)):
                prompt = decode(batch.sequences.prompts[parent].tolist(), skip_special_tokens=True)
                completion = decode(batch.sequences.completions[row].tolist(), skip_special_tokens=True)
                rows.append({"prompt": prompt, "completion": completion, "score": score, "rank": int(batch.ranks[row])})
        return rows

    def export(self, folder: str | Path) -> Path:
        """Write the reward model as a Hugging Face folder."""
        source = self.backbone_source() if self.lora is not None else resolve_folder(self.init_from)
        facts = {OUTPUT_NAMES: list(self.output_names)} if self.outputs > 1 else {}
        return export_reward_model(self.reward_model, self.tokenizer, folder, source, **facts, **self.facts_of_scores)

    @property
    def facts_of_scores(self) -> dict[str, Any]:
        """What whoever scores with the exported folder has to know beside the weights."""
        return {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the bias with the weights, and the mean that is being taken for the next one."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["score_bias"] = self.reward_model.bias
        checkpoint["best_scores"] = of_all_ranks(self, self._best_scores.state_dict())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them up again."""
        super().on_load_checkpoint(checkpoint)
        self.reward_model.bias = checkpoint["score_bias"]
        self._best_scores.load_state_dict(checkpoint["best_scores"], *rank_of(self))
