"""Base of stages that learn from their own samples: sample, score, update, log. One training step is one rollout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from rlhf_lightning.compat import attached_datamodule
from rlhf_lightning.errors import SettingError, undefined
from rlhf_lightning.functional.logprobs import kl_k1
from rlhf_lightning.functional.policy_gradient import approx_kl
from rlhf_lightning.functional.surrogates import CorrectionName
from rlhf_lightning.loading import refuse_contradictions
from rlhf_lightning.models.causal_lm import CausalLM, inference_mode_of
from rlhf_lightning.models.export import export_policy
from rlhf_lightning.models.frozen import Reference
from rlhf_lightning.models.layout import Layout, cut_sequences, free_layout, select
from rlhf_lightning.models.roles import load_policy
from rlhf_lightning.models.sharding import in_step
from rlhf_lightning.sampling.drawing import uniform
from rlhf_lightning.sampling.engines import SamplingEngine, SamplingSettings
from rlhf_lightning.scoring import Scorer
from rlhf_lightning.scoring.scorer import Judgements, ZeroScorer, learning, unmoved
from rlhf_lightning.training.checkpoint_state import of_all_ranks, rank_of
from rlhf_lightning.training.collector import (
    RolloutCollector,
    Samples,
    gathered_numbers,
    measure_samples,
    on_grid,
    prompts_of,
    with_score_std,
)
from rlhf_lightning.training.gathering import summed_over_ranks
from rlhf_lightning.training.invariants import Invariants
from rlhf_lightning.training.judgements import PartSettings, ScoreRule
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.training.module import AlignmentModule, prompt_form
from rlhf_lightning.training.optimization import rows_of_step
from rlhf_lightning.types import NO_LIMITS, PolicyLogprobs, PromptBatch, Rollout, Sequences, Step

FIELDS = {"completion_mask", "logprobs", "entropy", "values", "reference_logprobs"}
"""Statistics that are fields of the rollout; all other statistics are slots in ``extras``."""

MINIBATCHES = 2**31
"""Position that seeds the random order of minibatches; it is beyond the length of any completion."""


class RolloutModule(AlignmentModule):
    """Base of the stages that sample completions, score them, and learn from them.

    A family overrides ``learn``. A training step runs ``collect`` (``draw``, then ``statistics``), ``learn`` over
    ``minibatches``, ``log_rollout``, ``on_rollout_end``. The completion of episode e depends only on the weights, the
    seed and e. docs/extending.md lists the override points.

    Args:
        scorer: scores completions: a reward model's folder, an importable function
            ``(prompts, completions, **columns) -> scores``, a Scorer, or its class_path and init_args. Completions
            with score None are excluded from training.
        max_new_tokens: maximum length of a completion, tokens.
        temperature: softmax temperature of sampling and of all log-probabilities.
        sampling_batch_size: completions decoded at the same time (continuous batching); null decodes all at once.
        engine: sampling engine of training, validation and sample tables, by class_path and init_args; null samples in
            this process.
        lag: train each rollout on completions of the policy from this many rollouts ago, so that an external engine
            samples the next rollouts during training; 0 alternates sampling and training.
        reuse_behaviour_logprobs: reuse log-probabilities and entropies from sampling and skip a forward pass of the
            policy; only in fp32 and with unsharded weights. The first ratio is then 1 up to rounding.
        ppo_epochs: passes over each rollout.
        mini_batch_size: episodes per optimizer step over all ranks; null uses the whole rollout.
        early_stop_kl: end a rollout's updates when the approximate KL to the old policy exceeds 1.5 times this, nats
            per token; null does not stop early.
        missing_eos_score: replaces the score of a completion without an end token; null keeps the scorer's score.
        missing_eos_penalty: subtracted from the score of a completion without an end token.
        on_violation: "raise" or "warn" when a rollout violates an invariant, such as a ratio of 1 before the first
            update.
        parts: weights, conditions and normalization of a judgement's parts; null keeps the scorer's own score.
        constraints: limit on the mean of each part that is a cost, or the settings of a `Constraint`, such as
            {cost: {limit: 0.0}}; the cost's weight is a multiplier that adapts during training.
    """

    batch_type = PromptBatch
    needs_reference = True
    ranges = {
        "temperature": "[0, inf)",
        "max_new_tokens": "[1, inf)",
        "sampling_batch_size": "[1, inf)",
        "lag": "[0, inf)",
        "ppo_epochs": "[1, inf)",
        "mini_batch_size": "[1, inf)",
        "early_stop_kl": "(0, inf)",
        "missing_eos_score": "(-inf, inf)",
        "missing_eos_penalty": "(-inf, inf)",
    }
    normalizes_scores: ClassVar[bool] = False
    """Whether ``parts.normalize`` has an effect, because scores are rewards of a policy gradient."""

    policy: CausalLM
    _truncation_told = False

    headline_metrics = ("rollout/score", "rollout/kl", "val/score", "val/kl")

    sampler_correction: CorrectionName | None = None
    """Correction for a sampling engine whose log-probabilities differ from the trainer's; None for no correction."""

    needs_entropies: bool = False
    """Whether training reads ``rollout.entropy``, which an engine may not report."""

    def __init__(
        self,
        scorer: Scorer | str | dict[str, Any],
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        sampling_batch_size: int | None = None,
        engine: SamplingEngine | dict[str, Any] | None = None,
        lag: int = 0,
        reuse_behaviour_logprobs: bool = False,
        ppo_epochs: int = 1,
        mini_batch_size: int | None = None,
        early_stop_kl: float | None = None,
        missing_eos_score: float | None = None,
        missing_eos_penalty: float | None = None,
        on_violation: Literal["raise", "warn"] = "raise",
        parts: PartSettings | None = None,
        constraints: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if self.router_aux_loss_coef:
            raise SettingError(
                "router-loss-in-rl",
                f"router_aux_loss_coef is {self.router_aux_loss_coef}, but {type(self).__name__} learns from "
                "samples, and this loss would change their routing independently of their scores; set it to 0",
            )
        self.score_rule = ScoreRule(parts, constraints)
        if self.score_rule.normalizes and not self.normalizes_scores:
            raise SettingError(
                "nothing-normalized",
                f"parts.normalize is {self.score_rule.settings.normalize}, but {type(self).__name__} compares raw "
                "scores: set it to sum_then_group",
            )
        self.sampling = SamplingSettings(max_new_tokens, temperature, batch_size=sampling_batch_size)
        self.collector = RolloutCollector(
            scorer, self.sampling, self.seed, missing_eos_score, missing_eos_penalty, engine, self.shape_judgements,
            self.score_rule,
        )  # fmt: skip
        self.engine = self.collector.engine
        self.lag, self._restored = lag, dict[int, Mapping[str, Any]]()
        self.reuse_behaviour_logprobs = reuse_behaviour_logprobs
        self.ppo_epochs, self.mini_batch_size = ppo_epochs, mini_batch_size
        self.limits = NO_LIMITS
        self.early_stop_kl = early_stop_kl
        self.invariants = Invariants(on_violation)
        self._untouched = False

    # -- models -------------------------------------------------------------------------------------------------------

    @property
    def model(self) -> CausalLM:
        return self.policy

    @property
    def scorer(self) -> Scorer:
        return self.collector.scorer

    def load_models(self) -> None:
        self.policy = load_policy(self.init_from, self.load_settings, self.lora)
        self.load_reference_and_scorer()

    def load_reference_and_scorer(self) -> None:
        """Load the frozen reference and the scorer."""
        self._check_engine()
        if self.holds_reference:
            self.reference = Reference(self.policy, self.init_from, self.load_settings, own=self.reference_moves)
        # Load the scorer now, so that a scorer that cannot be loaded fails before the first rollout.
        self.scorer.load_beside(self.policy if self.device_mesh is None else None, self.load_settings)
        self.invariants.exact = self.load_settings.is_exact

    def _check_engine(self) -> None:
        """Refuse an engine whose log-probabilities differ from the trainer's, unless a correction is set."""
        engine = self.collector.engine
        refuse_contradictions(_contradictions(self))
        engine.prepare(self.init_from, self.load_settings, self.lora, self.lag + 1)
        self.invariants.own_sampler, self.invariants.whole_support = engine.exact and not self.lag, engine.exact
        self.invariants.own_old = self.invariants.own_sampler or not self.bypasses_forward
        if engine.exact:
            return
        if not engine.reports_logprobs:
            raise SettingError(
                "engine-without-logprobs",
                f"{type(engine).__name__} does not report log-probabilities, so its samples cannot be corrected: use "
                "it only for evaluation",
            )
        if self.sampler_correction is None:
            correctable = "set model.sampler_correction (token_truncate is usual), or "
            raise SettingError(
                "uncorrected-engine",
                f"{type(engine).__name__} has other log-probabilities than the trainer, and {type(self).__name__} does "
                f"not correct for them: {correctable if 'sampler_correction' in self.hparams else ''}leave engine out",
            )

    def frozen_models(self) -> Sequence[nn.Module]:
        return (*super().frozen_models(), *self.scorer.models)

    def on_fit_start(self) -> None:
        """Check ``lag``, and warn if the reward model was trained on another form of prompts than the data has."""
        super().on_fit_start()
        datamodule = attached_datamodule(self.trainer)
        if self.lag and not hasattr(datamodule, "step_ahead"):
            raise SettingError(
                "lag-without-prompts",
                f"lag is {self.lag}, but the data does not know the prompts of later rollouts; use PromptDataModule, "
                "or set lag to 0",
            )
        if self.lag and self.sampler_correction is None:
            rank_zero_warn(
                f"lag is {self.lag}, but nothing corrects for rollouts of an earlier policy: model.sampler_correction "
                "is null (sequence_truncate is usual with lag)."
            )
        trained, given = getattr(self.scorer, "prompt_form", None), prompt_form(self)
        if trained is not None and given is not None and trained != given:
            rank_zero_warn(
                f"The reward model was trained on prompts written as {trained}, but these are {given}, so its scores "
                f"may be meaningless: set data.as_chat to {str(trained == 'messages').lower()} or train it on "
                "prompts in that format."
            )

    def place_frozen_models(self) -> None:
        super().place_frozen_models()
        self.scorer.to(self.device)

    @property
    def updates_per_step(self) -> int:
        episodes = rows_of_step(self.trainer)
        return self.ppo_epochs * math.ceil(episodes / (self.mini_batch_size or episodes))

    # -- one rollout --------------------------------------------------------------------------------------------------

    def training_step(self, step: Step[PromptBatch], batch_idx: int) -> Any:
        """Collect one rollout and take all its updates."""
        meter, self.limits = Meter(), step.limits
        if self.lag:
            self._sample_ahead(step, batch_idx)
        with learning(), self.speed.collecting():
            rollout = self.collect(*step.micro_batches)
        updates = self.updates
        norm = self.learn(rollout, prompts_of(rollout, step.micro_batches[0]), meter)
        self.rollouts += 1
        self.episodes += step.rows
        self.tokens += int(self.sum_over_ranks(rollout.completion_mask.sum()))
        means = self.log_rollout(meter, norm, step.rows)
        self._end_rollout(rollout, means)
        loss = self.trainer.callback_metrics.get("train/loss")
        learned = loss is not None and self.updates > updates  # else the loss belongs to an earlier rollout
        return {**({"loss": loss} if learned else {}), **means}

    @property
    def discounts(self) -> bool:
        """Whether a reward counts less for earlier tokens than for its own."""
        return False

    @property
    def samples_ahead(self) -> bool:
        """Whether sampling needs only the policy and the prompts, as ``lag`` requires."""
        return False

    def _sample_ahead(self, step: Step[PromptBatch], batch_idx: int) -> None:
        """Start sampling this rollout and the next ``lag`` rollouts, unless they were started before.

        After the first rollout only the last of them is new; it is sampled from the current policy.
        """
        datamodule = attached_datamodule(self.trainer)
        for ahead in range(self.lag + 1):
            later = step if ahead == 0 else datamodule.step_ahead(self.trainer.current_epoch, batch_idx + ahead)
            if later is None:
                break
            self.collector.restore_episodes(later.micro_batches[0], self._restored)
            self.collector.start(self.policy, self.tokenizer, later.micro_batches[0])
        self._restored = {}

    def collect(self, *batches: PromptBatch) -> Rollout:
        """Sample and score completions, and compute the statistics that the updates need."""
        self.scorer.take_metrics()  # drop metrics of completions outside a rollout, such as a sample table's
        samples = self.draw(batches)
        self.invariants.note_sync(self.engine.sync_error)
        grids = self.statistics(samples)
        batch, mask, device = samples.batch, grids["completion_mask"], grids["logprobs"].device
        rewards = samples.token_rewards
        names = sorted({name for names in of_all_ranks(self, [*samples.parts]) for name in names})
        nothing = torch.full_like(samples.scores, math.nan)
        pays = any(of_all_ranks(self, bool(rewards)))
        if pays and self.discounts and self.score_rule.rescales:
            raise SettingError(
                "discounted-token-rewards",
                "parts or constraints rescale the scores of episodes, but not the rewards of turns and spans, and a "
                "discount below 1 would mix both: set the discounts (gamma, turn_gamma) to 1, or every weight in parts "
                "to 1 without constraints, conditions and normalization",
            )
        return Rollout(
            sequences=samples.sequences,
            completion_mask=mask,
            old_logprobs=grids["logprobs"],
            reference_logprobs=grids.get("reference_logprobs"),
            values=grids.get("values"),
            scores=samples.scores.to(device),
            finished=samples.completions.finished.to(device),
            group=batch.group.to(device),
            behaviour_logprobs=on_grid(samples.completions.logprobs, grids["logprobs"]),
            episodes=batch.episodes,
            baseline_scores=None if samples.baseline_scores is None else samples.baseline_scores.to(device),
            entropy=grids.get("entropy"),
            parts={name: samples.parts.get(name, nothing).to(device) for name in names},
            token_rewards=on_grid(rewards, grids["logprobs"]) if pays else None,
            feedback=samples.feedback,
            prompts=tuple(batch.texts),
            texts=samples.completions.texts,
            left_out=samples.left_out,
            columns=batch.columns,
            row_ids=tuple(batch.row_ids),
            extras={
                **{name: values for name, values in grids.items() if name not in FIELDS},
                **self.slots_of(batch),
            },
            turns=samples.turns,
        )

    def draw(self, batches: Sequence[PromptBatch]) -> Samples:
        """Sample a completion for each prompt and score it.

        Args:
            batches: prompts of the rollout; further batches are candidates for families that select samples.
        """
        return self.collector.draw(self.policy, self.tokenizer, batches[0])

    def shape_judgements(self, judged: Judgements) -> Judgements:
        """Return the judgements to learn from, given the judgements of one or more completions. Override point.

        ``parts`` and ``constraints`` are already part of the scores. Combine parts in other ways here:
        missing_eos_score, missing_eos_penalty and baselines apply to the returned scores. Called in training and
        validation.
        """
        return judged

    def learn(self, rollout: Rollout, batch: PromptBatch, meter: Meter) -> float:
        """Take all updates of a rollout; return the gradient norm of the last update.

        Args:
            rollout: this rank's episodes.
            batch: the prompts of the episodes, and pretraining text to mix in.
            meter: collects the metrics of the rollout and its updates.
        """
        raise undefined(self, "learn")

    def on_rollout_end(self, rollout: Rollout, means: Mapping[str, float]) -> None:
        """Update the module's own state after a training rollout; see `Scorer.on_rollout_end`."""

    def _end_rollout(self, rollout: Rollout, means: Mapping[str, float]) -> None:
        """Update multipliers, and call ``on_rollout_end`` of module, scorer, DataModule and callbacks."""
        self.score_rule.on_rollout_end(means)
        self.on_rollout_end(rollout, means)
        self.scorer.on_rollout_end(rollout, means)
        datamodule = attached_datamodule(self.trainer)
        if hasattr(datamodule, "on_rollout_end"):
            datamodule.on_rollout_end(rollout, means)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if hasattr(callback, "on_rollout_end"):
                callback.on_rollout_end(self.trainer, self, rollout, means)

    def statistics(self, samples: Samples) -> dict[str, Tensor]:
        """Compute per-token statistics of sampled completions; each value has shape (episodes, length).

        The models run the same forward passes as in training, without gradient. The policy's forward pass is skipped
        if sampling has reported everything.
        """
        sequences, known = samples.sequences, self.sampler_stats_suffice(samples)
        forward = partial(self.forward_statistics, with_policy=not known)
        grids = self.gather_grids(sequences, self.cut(sequences), forward)
        if known or self.bypasses_forward:
            grids["logprobs"] = on_grid(samples.completions.logprobs, grids["completion_mask"])
        if known and samples.completions.entropies is not None:
            grids["entropy"] = on_grid(samples.completions.entropies, grids["completion_mask"])
        return grids

    def gather_grids(
        self, sequences: Sequences, cuts: Sequence[Sequence[int]], forward: Callable[[Layout], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Run micro-batches without gradient, and collect each statistic in a tensor of shape (rows, length or more).

        Args:
            sequences: prompts and completions.
            cuts: rows of each micro-batch.
            forward: returns per-token tensors of a layout by name, shape (rows, length or more).
        """
        rows, length = len(sequences.completions), max((len(ids) for ids in sequences.completions), default=1)
        grids: dict[str, Tensor] = {}
        idle = partial(forward, free_layout().to(self.device))
        with inference_mode_of(self), in_step(self.policy, idle) as before_pass:
            for cut in cuts or [[]]:  # a rank without rows needs the tensors too
                layout = self.lay_out(select(sequences, cut))
                before_pass()
                for name, part in forward(layout).items():
                    if name not in grids:
                        width = length + part.shape[1] - layout.completion_mask.shape[1]
                        grids[name] = part.new_zeros(rows, width, *part.shape[2:])
                    grids[name][list(cut), : part.shape[1]] = part
        return grids

    @property
    def bypasses_forward(self) -> bool:
        """Whether the engine's log-probabilities are used as the old ones, without the trainer's forward pass."""
        return self.sampler_correction == "bypass"

    def sampler_stats_suffice(self, samples: Samples) -> bool:
        """Whether the sampler's log-probabilities and entropies make the policy's forward pass unnecessary.

        The forward pass is needed in lower precision, where rounding would move the ratio from 1, and with sharded
        weights, where all ranks must run the same passes. With the correction "bypass" any precision is allowed, and
        entropies are needed only if the loss reads whole minibatches.
        """
        asks_more = self.hidden_layers or type(self).token_statistics is not AlignmentModule.token_statistics
        if asks_more or self.device_mesh is not None:
            return False
        has_entropies = samples.completions.entropies is not None
        if self.bypasses_forward:
            return has_entropies or not self.needs_entropies
        exact = self.invariants.exact and str(self.trainer.precision) in ("32-true", "64-true")
        return self.reuse_behaviour_logprobs and has_entropies and exact

    def cut(self, sequences: Sequences, rows: Sequence[int] | None = None) -> list[list[int]]:
        """Split episodes into micro-batches within the step's limits."""
        return cut_sequences(sequences, rows, self.limits, self.packs_rows)

    def forward_statistics(self, layout: Layout, with_policy: bool = True) -> dict[str, Tensor]:
        """Return the per-token statistics of a micro-batch from forward passes of policy and reference."""
        grids = {"completion_mask": layout.completion_mask}
        if with_policy:
            outputs = self.policy_outputs(layout, self.sampling.temperature, with_entropy=True)
            assert outputs.entropy is not None
            grids |= {"logprobs": outputs.logprobs, "entropy": outputs.entropy, **outputs.extras}
            if outputs.values is not None:
                grids["values"] = outputs.values
        if self.reference is not None and "reference_logprobs" not in grids:
            grids["reference_logprobs"] = self.reference.logprobs(layout, self.sampling.temperature)
        return grids

    # -- updates ------------------------------------------------------------------------------------------------------

    def minibatches(self, rollout: Rollout, meter: Meter) -> Iterator[list[int]]:
        """Yield this rank's rows of each minibatch of each epoch, until ``early_stop_kl`` ends the rollout."""
        lengths = rollout.sequences.lengths
        for epoch in range(self.ppo_epochs):
            for number, rows in enumerate(self._epoch(rollout, epoch)):
                self._untouched = epoch == number == 0  # the policy has not changed since sampling
                self.speed.read += sum(lengths[row] for row in rows)
                yield rows
                if self._should_stop(meter):
                    return

    def _epoch(self, rollout: Rollout, epoch: int) -> Iterator[list[int]]:
        """Yield this rank's rows of each minibatch; the permutation is over all ranks' episodes."""
        mine = self.minibatch_units(rollout)
        everyone = torch.tensor(sorted(gathered_numbers(self, list(mine))), dtype=torch.long)
        places = uniform(self.seed, everyone, torch.full_like(everyone, MINIBATCHES + epoch)).argsort(stable=True)
        order = everyone[places].tolist()
        whole = max((len(rows) for rows in mine.values()), default=1)
        size = len(order) if self.mini_batch_size is None else max(self.mini_batch_size // whole, 1)
        for start in range(0, len(order), size):
            yield [row for unit in order[start : start + size] if unit in mine for row in mine[unit]]

    def minibatch_units(self, rollout: Rollout) -> dict[int, list[int]]:
        """Return rows that stay in one minibatch, keyed by a number unique over ranks; by default single episodes."""
        assert rollout.episodes is not None
        return {int(episode): [row] for row, episode in enumerate(rollout.episodes)}

    def further_losses(self, batch: PromptBatch, count: float | Tensor, meter: Meter) -> list[Callable[[], Tensor]]:
        """Return losses on text outside the rollout, as functions; they are divided by ``count`` too."""
        return []

    def _should_stop(self, meter: Meter) -> bool:
        if self.early_stop_kl is None:
            return False
        moved = meter.means(self.trainer.strategy).get("last_approx_kl", 0.0)
        meter.forget("last_approx_kl")
        return moved > 1.5 * self.early_stop_kl

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """Return the sum over all ranks."""
        return summed_over_ranks(self, value)

    # -- checks and metrics -------------------------------------------------------------------------------------------

    def check_rollout(self, rollout: Rollout) -> None:
        """Check the invariants of a rollout before its updates."""
        self.invariants.check_lengths(rollout)
        self.invariants.check_sampler(rollout)
        if self.updates == 0:
            self.invariants.check_first_kl(rollout)

    def measure_rollout(self, rollout: Rollout, meter: Meter) -> None:
        """Record metrics of the rollout itself, before any update, in training and validation."""
        measure_samples(meter, rollout, scored=not isinstance(self.scorer, ZeroScorer))
        if rollout.entropy is not None:
            meter.add("rollout/entropy", rollout.entropy, rollout.completion_mask)
        for name, values in self.scorer.take_metrics().items():
            meter.add(f"rollout/{name}", values, ~values.isnan())
        if rollout.reference_logprobs is not None:
            meter.add("rollout/kl", kl_k1(rollout.old_logprobs, rollout.reference_logprobs).sum(-1))

    def measure_update(self, logprobs: PolicyLogprobs, meter: Meter) -> None:
        """Record KL and ratio between the current policy and the policy that sampled."""
        now, old, mask = logprobs.logprobs.detach(), logprobs.old_logprobs, logprobs.completion_mask
        for name in ("approx_kl",) if self.early_stop_kl is None else ("approx_kl", "last_approx_kl"):
            meter.add(name, approx_kl(now, old), mask)
        meter.add("ratio", (now - old).exp(), mask)

    def log_rollout(self, meter: Meter, norm: float, episodes: int, **further: float) -> dict[str, float]:
        """Log one rollout at x = updates; return its means over ranks without the prefix ``rollout/``."""
        means = meter.means(self.trainer.strategy)
        rollout = with_score_std({name: means.pop(name) for name in list(means) if name.startswith("rollout/")})
        means.pop("last_approx_kl", None)
        measured = {
            **further,
            **self.score_rule.metrics(),
            **self.invariants.take(self.trainer.strategy),
            **means,
            **rollout,
        }
        self.log_training(Meter(), grad_norm=norm, **measured)
        if rollout.get("rollout/eos_rate", 1.0) < 0.5 and not self._truncation_told:
            self._truncation_told = True
            rank_zero_warn(
                f"Only {rollout['rollout/eos_rate']:.0%} of the episodes were ended by the environment; the others "
                "reached model.max_new_tokens, data.max_turns or data.max_episode_tokens: raise the one that is too "
                "low."
                if "rollout/turns" in rollout
                else f"Only {rollout['rollout/eos_rate']:.0%} of the completions ended before "
                f"model.max_new_tokens={self.sampling.max_new_tokens}; the others were truncated: raise it."
            )
        return {name.removeprefix("rollout/"): value for name, value in rollout.items()}

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def validation_step(self, step: Step[PromptBatch], batch_idx: int) -> None:
        """Sample and score held-out prompts, and measure the KL to the reference."""
        self.limits = step.limits
        with unmoved(self.scorer):
            for batch in step.micro_batches:
                rollout = self.collect(batch._replace(episodes=-1 - batch.episodes))
                self.measure_rollout(rollout, self._evaluation)

    def evaluation_metrics(self) -> dict[str, float]:
        means = {name.removeprefix("rollout/"): value for name, value in super().evaluation_metrics().items()}
        return with_score_std(means, prefix="")

    def export(self, folder: str | Path) -> Path:
        return export_policy(self.policy, self.tokenizer, folder)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["scorer"] = of_all_ranks(self, self.scorer.state_dict())
        checkpoint["multipliers"] = self.score_rule.state_dict()
        checkpoint["started_episodes"] = of_all_ranks(self, self.collector.started_episodes())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.score_rule.load_state_dict(checkpoint["multipliers"])
        for episodes in checkpoint["started_episodes"]:
            self._restored |= episodes
        (rank, ranks), states = rank_of(self), checkpoint["scorer"]
        if any(states):
            self.scorer.load_state_dict(states[rank if len(states) == ranks else 0])


def _contradictions(m: RolloutModule) -> dict[str, tuple[bool, str]]:
    """Return, by error code, whether ``lag`` contradicts another setting, and the message."""
    return {
        "lag-needs-plain-sampling": (
            m.lag > 0 and not m.samples_ahead,
            f"lag is {m.lag}, and {type(m).__name__} with these settings samples more than one completion of the "
            "policy for each prompt of the rollout (dynamic sampling, a greedy baseline, an opponent): set lag to 0",
        ),
        "lag-reuses-logprobs": (
            m.lag > 0 and m.reuse_behaviour_logprobs,
            f"lag is {m.lag}, so the engine's log-probabilities are those of an earlier policy: set "
            "reuse_behaviour_logprobs to false, or sampler_correction to bypass",
        ),
    }
