"""Reward models from human comparisons and rankings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

from rlhf_lightning.errors import SettingError
from rlhf_lightning.functional.ranking import (
    cost_sign_loss,
    mean_by_group,
    plackett_luce_loss,
    ranked_davidson_loss,
    ranked_pairs_loss,
    thurstone_loss,
    untied_pairs,
)
from rlhf_lightning.models.adapters import read_adapter
from rlhf_lightning.models.export import export_reward_model
from rlhf_lightning.models.loading import load_reward_hf_model, prepare_for_training
from rlhf_lightning.models.lora import add_lora
from rlhf_lightning.models.quantization import refuse_quantized_file
from rlhf_lightning.models.resolving import (
    MEAN_VARIANCE,
    OUTPUT_NAMES,
    PROMPT_FORM,
    is_adapter,
    load_base_of_adapter,
    refuse_other_quantization,
    resolve_folder,
)
from rlhf_lightning.models.roles import scalar_model
from rlhf_lightning.models.scalar_head import ScalarModel
from rlhf_lightning.models.transfer import to_device
from rlhf_lightning.training.checkpoint_state import of_all_ranks, rank_of
from rlhf_lightning.training.gathering import gathered_rows
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.training.module import prompt_form
from rlhf_lightning.training.offline import OfflineModule
from rlhf_lightning.training.returned_loss import loss_of
from rlhf_lightning.types import (
    DataNeeds,
    DemonstrationBatch,
    EnumeratedProblem,
    RankedBatch,
    RankedScores,
    Step,
)


class RewardModule(OfflineModule):
    r"""Bradley-Terry reward model: score differences are the log-odds of a human's preference.

    For a pair, loss = -p log sigmoid(d - m) - (1 - p) log sigmoid(-d - m) with d = score(chosen) - score(rejected). p
    is the probability that chosen is better (1 for a plain label) and m the rated margin (Bradley-Terry; Stiennon et
    al. 2009.01325; margins of Llama 2, 2307.09288). The loss of a ranked list is the mean over its untied pairs, with
    one forward pass per completion (InstructGPT, 2203.02155, Eq. 1). Equal scores give log 2. The score is a linear
    head on the last completion token's hidden state, initialised from N(0, 1/(hidden size + 1)).

    Target: scores equal to the rewards up to a constant per prompt, if preferences are Bradley-Terry in the rewards;
    with ``centering`` no closed form.

    Args:
        centering: weight of (score(chosen) + score(rejected))^2, which keeps scores near zero; Eisenstein et al.
            (2312.09244) use 0.01.
        normalise: after training, subtract the mean score of the best-ranked training completions from every score, so
            that demonstrations score 0 on average (InstructGPT). The weights do not change; the bias is kept in the
            exported config.json.
        outputs: outputs of the head per completion: several attributes, or a mean and a variance. With more than one,
            ``score_of`` computes the score, a loss finds all outputs in ``RankedScores.extras["outputs"]``, and the
            exported model returns them as the parts of a `Judgement`.
    """

    paper = "Stiennon et al. 2020, arXiv 2009.01325"
    ranges = {"centering": "[0, inf)", "outputs": "[1, inf)"}
    batch_type: ClassVar[type] = RankedBatch
    has_policy = False
    headline_metrics: ClassVar[tuple[str, ...]] = ("val/loss", "val/accuracy", "val/ece")

    def __init__(
        self, centering: float = 0.0, normalise: bool = True, outputs: int = 1, learning_rate: float = 9e-6,
        adam_eps: float = 1e-5, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(learning_rate=learning_rate, adam_eps=adam_eps, **kwargs)
        self.centering, self.normalise, self.outputs = centering, normalise, outputs
        self._judged: list[Tensor] = []  # confidence in each held-out pair, and whether it was right

    @property
    def model(self) -> ScalarModel:
        return self.reward_model

    def load_models(self) -> None:
        """Load the backbone and add a scalar head if it has none; an existing adapter is trained further."""
        name = resolve_folder(self.init_from)
        continued = name if self.lora is not None and is_adapter(name) else None
        if continued is not None:
            refuse_other_quantization(continued, self.load_settings.quantization)
            name = load_base_of_adapter(continued)
        settings = replace(self.load_settings, says_new_head=continued is None or read_adapter(continued).head is None)
        model = load_reward_hf_model(name, settings, self.outputs, pad_token_id=self.tokenizer.pad_token_id)
        refuse_quantized_file(model, name, self.load_settings.quantization)
        prepare_for_training(model, self.load_settings)
        if self.lora is not None:
            model = add_lora(model, self.lora, "SEQ_CLS", continued, self.seed)
        self.reward_model = scalar_model(model, self.load_settings)
        self._best_scores = Meter()

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the head's outputs; scorers use them as the names of a judgement's parts."""
        return tuple(f"output_{number}" for number in range(self.outputs))

    def score_of(self, outputs: Tensor) -> Tensor:
        """Return the score from a head with several outputs, shape (completions,); by default the first output.

        Args:
            outputs: shape (completions, outputs).
        """
        return outputs[:, 0]

    lower_is_better: ClassVar[bool] = False
    """Whether a lower score is better: the score is a cost."""

    def ranking_loss(self, scores: RankedScores) -> Tensor:
        """Return one loss per group, shape (groups,). Override it for another objective on rankings."""
        return ranked_pairs_loss(*scores[:5], centering=self.centering)

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        """Return the scores whose differences are the log-odds: the rewards minus each prompt's mean."""
        return None if self.centering else problem.rewards - problem.rewards.mean(-1, keepdim=True)

    def loss_sum(self, batch: RankedBatch, meter: Meter) -> Tensor:
        scores, extras = self.reward_model(self.lay_out(batch.sequences)), self.slots_of(batch)
        if self.outputs > 1:
            scores, extras = self.score_of(scores), {**extras, "outputs": scores}
        parents = torch.tensor(batch.sequences.parents, dtype=torch.long)
        parts = (parents, batch.ranks, batch.target, batch.margin, batch.weights, *untied_pairs(parents, batch.ranks))
        group, ranks, target, margin, weights, better, worse = (to_device(part, self.device) for part in parts)
        ranked = RankedScores(scores, group, ranks, target, margin, weights, extras)
        loss = loss_of(self.ranking_loss, ranked, like=ranked.weights)
        self._measure(ranked, better, worse, loss.values, meter)
        for name, values in loss.metrics.items():
            meter.add(name, values)
        return (loss.values * ranked.weights).sum()

    def _measure(self, ranked: RankedScores, better: Tensor, worse: Tensor, losses: Tensor, meter: Meter) -> None:
        """Record accuracy (equal scores count half), margins and calibration over all untied pairs."""
        told_apart = ranked.target[ranked.group[better]] != 0.5
        margins = (ranked.scores[better] - ranked.scores[worse]).detach() * (-1 if self.lower_is_better else 1)
        meter.add_ratio("loss", (losses * ranked.weights).sum(), len(losses))
        meter.add("accuracy", ((margins > 0).double() + (margins >= 0)) / 2, told_apart)
        meter.add("score_margin", margins, told_apart)
        meter.add("score", ranked.scores)
        meter.add("score_squared", ranked.scores.detach().square())
        if torch.is_grad_enabled():
            self._best_scores.add("score", ranked.scores, ranked.ranks == 0)
        else:
            judged = torch.stack([torch.sigmoid(margins.abs()), (margins > 0).to(margins)], -1)
            self._judged.append(judged[told_apart])
            meter.add("brier", (torch.sigmoid(margins) - 1.0).square(), told_apart)

    def on_train_epoch_start(self) -> None:
        """Reset the mean score of the best-ranked completions; the last epoch's mean is used."""
        self._best_scores = Meter()

    def on_train_epoch_end(self) -> None:
        """Set the bias that is subtracted from scores."""
        means = self._best_scores.means(self.trainer.strategy)
        if self.normalise and "score" in means:
            self.reward_model.bias = means["score"]

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._judged = []

    on_test_epoch_start = on_validation_epoch_start

    def evaluation_metrics(self) -> dict[str, float]:
        """Return held-out metrics; ``ece`` bins the confidence max(p, 1 - p), since chosen is always the label."""
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
        source = self.backbone_source() if self.lora is not None else resolve_folder(self.init_from)
        facts: dict[str, Any] = {OUTPUT_NAMES: list(self.output_names)} if self.outputs > 1 else {}
        if (form := prompt_form(self)) is not None:
            facts[PROMPT_FORM] = form
        return export_reward_model(self.reward_model, self.tokenizer, folder, source, **facts, **self.facts_of_scores)

    @property
    def facts_of_scores(self) -> dict[str, Any]:
        """Additional entries of the exported config.json, which scorers read."""
        return {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["score_bias"] = self.reward_model.bias
        checkpoint["best_scores"] = of_all_ranks(self, self._best_scores.state_dict())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.reward_model.bias = checkpoint["score_bias"]
        self._best_scores.load_state_dict(checkpoint["best_scores"], *rank_of(self))


class PlackettLuceModule(RewardModule):
    r"""Reward model of whole rankings: the best completion is picked first, then the best of the remaining.

    loss = sum_k [logsumexp_{j ranked at or below k} score_j - score_k] (Plackett 1975, Luce 1959; for reward models Zhu
    et al., 2301.11270). K equal scores give log K!. For pairs the loss equals `RewardModule`'s. Soft labels and margins
    are defined for pairs only and have no effect.

    Target: scores equal to the rewards up to a constant per prompt, if rankings are Plackett-Luce in the rewards.
    """

    paper = "Zhu et al. 2023, arXiv 2301.11270"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(centering=0.0, **kwargs)

    def ranking_loss(self, scores: RankedScores) -> Tensor:
        return plackett_luce_loss(scores.scores, scores.group, scores.ranks, len(scores.target))


class DavidsonModule(RewardModule):
    r"""Reward model of comparisons with ties, which `RewardModule` can only read as a label of 0.5.

    P(i wins) : P(j wins) : P(tie) = e^{d / 2} : e^{-d / 2} : nu with d = score_i - score_j (Davidson 1970; for
    preference optimisation Chen et al., arXiv 2409.17431). A tie is evidence that two scores are close. A pair's
    ``preference`` of 0.5 is a tie; a value between 0.5 and 1 is a mean of verdicts with wins and ties. Equal ranks in a
    list are ties, and lists of only ties are kept. The loss of a list is the mean over its pairs. Rated margins have no
    effect. Equal scores give -log((1 - tie_share) / 2) for a win and -log(tie_share) for a tie.

    Target: no closed form; the minimiser of the population loss. On comparisons drawn from its own model it recovers
    the scores.

    Args:
        tie_share: probability that two completions of equal score are called a tie, nu / (2 + nu). It describes the
            annotators and is not trained; count it on pairs that annotators cannot distinguish.
    """

    paper = "Davidson 1970; Chen et al. 2024, arXiv 2409.17431"
    ranges = {"tie_share": "(0, 1)"}

    def __init__(self, tie_share: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tie_share = tie_share

    @property
    def data_needs(self) -> DataNeeds:
        return super().data_needs._replace(ties=True)

    def ranking_loss(self, scores: RankedScores) -> Tensor:
        s = scores
        return ranked_davidson_loss(s.scores, s.group, s.ranks, s.target, self.tie_share, self.centering)

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        return None  # the enumerated problem has no ties


class CostModule(RewardModule):
    r"""Cost model of Safe RLHF: harmful completions cost more than safe ones, and more than 0.

    loss = -p log sigmoid(c_r - c_c) - (1 - p) log sigmoid(c_c - c_r) + sign_coef * sum over both of
    [-s log sigmoid(-c) - (1 - s) log sigmoid(c)], where c is the cost and s is 1 for a safe completion and 0 for a
    harmful one (Dai et al., 2310.12773, Eq. 6). ``chosen`` is the less harmful completion of a pair. The exported
    model's scores are costs with 0 as the boundary: a limit of 0 on their mean is a constraint of `PPOModule`. Costs of
    0 give (1 + 2 sign_coef) log 2. In a list, chosen_safe describes the best completion, and rejected_safe all others;
    the sign loss of the others is averaged.

    Target: no closed form; the minimiser of the population loss.

    Args:
        sign_coef: weight of the sign loss.

    The data needs the columns chosen_safe and rejected_safe, numbers or booleans.
    """

    paper = "Dai et al. 2023, arXiv 2310.12773"
    ranges = {"sign_coef": "[0, inf)"}
    data_columns = ("chosen_safe", "rejected_safe")
    lower_is_better = True

    def __init__(self, sign_coef: float = 1.0, normalise: bool = False, **kwargs: Any) -> None:
        super().__init__(normalise=normalise, **kwargs)
        self.sign_coef = sign_coef

    def ranking_loss(self, scores: RankedScores) -> Tensor:
        pairs = ranked_pairs_loss(-scores.scores, *scores[1:5], centering=self.centering)
        best = scores.ranks == 0
        safe = [scores.extras[name].to(scores.scores)[scores.group] for name in self.data_columns]
        signs = cost_sign_loss(scores.scores, torch.where(best, safe[0], safe[1]))
        groups = len(pairs)  # completions of the other side count as another group
        of_best, of_rest = (
            mean_by_group(signs, torch.where(side, scores.group, groups), groups + 1)[:groups] for side in (best, ~best)
        )
        return pairs + self.sign_coef * (of_best + of_rest)

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        return None  # hard safety labels push costs away from 0, and soft preferences pull them together


class MeanVarianceRewardModule(RewardModule):
    r"""Reward model with normally distributed scores, N(m, e^v), which estimates its own uncertainty.

    loss = -p log Phi(z) - (1 - p) log Phi(-z), z = (m_c - m_r) / sqrt(e^{v_c} + e^{v_r}), for pairs (Thurstone 1927,
    case III), and the mean over the untied pairs of a list. The exported model has the outputs mean and log_variance.
    `LearnedScorer` scores by the mean minus ``caution`` standard deviations. Equal means give log 2.

    Target: no closed form; the minimiser of the population loss. Its preference probabilities are unique; its means and
    standard deviations are unique up to scale, and its means up to a constant.
    """

    paper = "Thurstone 1927, A law of comparative judgment"

    def __init__(self, outputs: int = 2, **kwargs: Any) -> None:
        if outputs != 2:
            raise SettingError("setting-out-of-range", f"outputs is {outputs}: a mean and a variance need 2")
        super().__init__(outputs=outputs, centering=0.0, **kwargs)

    @property
    def output_names(self) -> tuple[str, ...]:
        return MEAN_VARIANCE

    def ranking_loss(self, scores: RankedScores) -> Tensor:
        better, worse = untied_pairs(scores.group, scores.ranks)
        group, outputs = scores.group[better], scores.extras["outputs"]
        chosen, rejected = outputs[better], outputs[worse]
        losses = thurstone_loss(chosen[:, 0], rejected[:, 0], chosen[:, 1], rejected[:, 1], scores.target[group])
        return mean_by_group(losses, group, len(scores.target))

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        return None  # Bradley-Terry preferences differ from the preferences of normal scores


class AttributesRewardModule(RewardModule):
    r"""Reward model of several rated attributes per completion, trained by regression.

    loss = mean over attributes of (output - rating)^2 (HelpSteer, Wang et al., 2311.09528, Section 3). The rows are
    demonstrations with a column of numbers for each attribute. The exported model scores by the first attribute. All
    attributes are parts of its judgements, which ``parts.weights`` of an on-policy module can weight.

    Target: no closed form; the minimiser of the population loss, which equals the ratings if the model can fit them.

    Args:
        attributes: names of the columns; null uses the columns of HelpSteer.
    """

    paper = "Wang et al. 2023, arXiv 2311.09528"
    batch_type = DemonstrationBatch
    data_columns: ClassVar[tuple[str, ...]] = (
        "helpfulness", "correctness", "coherence", "complexity", "verbosity",
    )  # fmt: skip
    headline_metrics: ClassVar[tuple[str, ...]] = ("val/loss",)

    def __init__(self, attributes: list[str] | None = None, **kwargs: Any) -> None:
        names = type(self).data_columns if attributes is None else tuple(attributes)
        if len(names) < 2 or len(set(names)) < len(names):
            raise SettingError("too-few-attributes", f"attributes is {list(names)}: name two or more, each once")
        super().__init__(outputs=len(names), centering=0.0, normalise=False, **kwargs)
        self.data_columns = names  # type: ignore[misc]  # of this run

    @property
    def output_names(self) -> tuple[str, ...]:
        return self.data_columns

    def loss_sum(self, batch: DemonstrationBatch, meter: Meter) -> Tensor:  # type: ignore[override]
        outputs = self.reward_model(self.lay_out(batch.sequences))
        ratings = torch.stack([batch.extras[name] for name in self.data_columns], -1)
        ratings = to_device(ratings, self.device).to(outputs.dtype)
        errors = (outputs - ratings).square()
        for name, error in zip(self.data_columns, errors.T, strict=True):
            meter.add(f"{name}_error", error)
        losses: Tensor = errors.mean(-1) * to_device(batch.weights, self.device)
        meter.add("loss", losses)
        return losses.sum()

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        return None  # the enumerated problem has no ratings
