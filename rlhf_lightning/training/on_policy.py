"""Stages that learn from their own samples: one training step is one rollout and all its updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from rlhf_lightning.errors import undefined
from rlhf_lightning.functional.aggregation import token_mean
from rlhf_lightning.functional.logprobs import kl_k1
from rlhf_lightning.functional.policy_gradient import adapted_kl_coef, approx_kl
from rlhf_lightning.models.causal_lm import CausalLM, inference_mode_of
from rlhf_lightning.models.export import export_policy
from rlhf_lightning.models.layout import Layout, cut_sequences, free_layout, select
from rlhf_lightning.models.roles import Reference
from rlhf_lightning.models.sharding import in_step, most_passes
from rlhf_lightning.sampling.engines import SamplingEngine, SamplingSettings
from rlhf_lightning.scoring import Scorer
from rlhf_lightning.training.checkpoint_state import of_all_ranks, rank_of
from rlhf_lightning.training.gathering import summed_over_ranks
from rlhf_lightning.training.invariants import Invariants
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.training.module import AlignmentModule, as_loss
from rlhf_lightning.training.optimization import rows_of_step
from rlhf_lightning.training.rollouts import (
    Drawn,
    RolloutCollector,
    Samples,
    gather_grids,
    gathered_numbers,
    measure_samples,
    on_grid,
    with_score_std,
    without_unscored,
)
from rlhf_lightning.training.slots import of_rows, on_device
from rlhf_lightning.types import (
    NO_LIMITS,
    Advantages,
    Aggregation,
    Loss,
    PolicyLogprobs,
    PromptBatch,
    Rollout,
    Sequences,
    Step,
)

FIELDS = {"completion_mask", "logprobs", "entropy", "values", "reference_logprobs"}
"""Grids of a forward that are fields of the rollout; others are slots."""


class OnPolicyModule(AlignmentModule):
    """Base of the stages that sample, score and learn from what they sampled.

    A family overrides ``shape_rewards``, ``advantages`` and ``policy_loss``; sampling, scoring, minibatches, KL control
    and logging are here. The completions of episode e are a function of the weights, the seed and e alone.

    Args:
        scorer: what scores completions: a reward model's folder, an importable function
            ``(prompts, completions, **columns) -> scores``, a Scorer, or its class_path and init_args. A completion
            whose score is None teaches nothing; ``FaultTolerant`` makes one of a scorer's faults.
        max_new_tokens: longest completion, tokens.
        temperature: of sampling and of every log-probability.
        sampling_batch_size: completions decoded side by side, waiting prompts taking the place of finished ones; None
            decodes a whole rollout at once.
        engine: what draws the completions, by class_path and init_args; None draws in this process.
        reuse_behaviour_logprobs: take log-probabilities and entropies as sampling found them and spare a forward of the
            policy, in fp32 and on whole weights; the ratio before the first update is then 1 up to rounding.
        ppo_epochs: passes over each rollout.
        mini_batch_size: episodes of one optimizer step over all ranks; None takes the whole rollout.
        kl_coef: strength of the KL leash, reward units per nat.
        kl_target: sequence KL that the coefficient is steered towards, nats; None keeps the coefficient fixed.
        kl_horizon: episodes over which the coefficient may change by a fifth.
        entropy_coef: weight of the entropy bonus, reward units per nat.
        early_stop_kl: leave a rollout's epochs once the approximate KL to the old policy exceeds 1.5 times this, nats
            per token; None never does.
        missing_eos_score: score of a completion that did not end by itself, in place of the scorer's; None keeps the
            scorer's.
        missing_eos_penalty: subtracted from the score of a completion that did not end by itself.
        on_violation: what happens when a rollout breaks what must hold (a ratio of 1 before the first update, one score
            a completion ...): "raise", or "warn" and go on.
    """

    batch_type = PromptBatch
    needs_reference = True
    policy: CausalLM
    learns_unscored: ClassVar[bool] = True
    """Whether a completion without a score, whose advantage is 0, takes part in updates all the same: in the KL that is
    a loss, and in what lengths are averaged over."""

    headline_metrics = ("rollout/score", "rollout/kl", "val/score", "val/kl")

    sampler_correction: str | None = None
    """How a family corrects for a sampling engine whose log-probabilities differ from the trainer's; None for not."""

    def __init__(
        self,
        scorer: Scorer | str | dict[str, Any],
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        sampling_batch_size: int | None = None,
        engine: SamplingEngine | dict[str, Any] | None = None,
        reuse_behaviour_logprobs: bool = False,
        ppo_epochs: int = 4,
        mini_batch_size: int | None = None,
        kl_coef: float = 0.05,
        kl_target: float | None = None,
        kl_horizon: int = 10_000,
        entropy_coef: float = 0.0,
        early_stop_kl: float | None = None,
        missing_eos_score: float | None = None,
        missing_eos_penalty: float | None = None,
        on_violation: Literal["raise", "warn"] = "raise",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.sampling = SamplingSettings(max_new_tokens, temperature, batch_size=sampling_batch_size)
        self.collector = RolloutCollector(
            scorer, self.sampling, self.seed, missing_eos_score, missing_eos_penalty, engine
        )
        self.reuse_behaviour_logprobs = reuse_behaviour_logprobs
        self.ppo_epochs, self.mini_batch_size = ppo_epochs, mini_batch_size
        self.limits = NO_LIMITS
        self.kl_coef, self.kl_target, self.kl_horizon = kl_coef, kl_target, kl_horizon
        self.entropy_coef, self.early_stop_kl = entropy_coef, early_stop_kl
        self.invariants = Invariants(on_violation)
        self._untouched = False

    # -- models -------------------------------------------------------------------------------------------------------

    @property
    def model(self) -> CausalLM:
        """The policy."""
        return self.policy

    @property
    def scorer(self) -> Scorer:
        """What scores completions; loaded on first use."""
        return self.collector.scorer

    @property
    def holds_reference(self) -> bool:
        """Whether this run measures anything from a reference."""
        return self.needs_reference

    def load_reference_and_scorer(self) -> None:
        """Load what stays frozen: the reference, unless the policy's backbone is it, and the scorer."""
        self._check_engine()
        if self.holds_reference:
            self.reference = Reference(self.policy, self.init_from, self.load_settings)
        # A scorer that cannot be loaded should fail now, not after the first rollout.
        self.scorer.load_beside(self.policy if self.device_mesh is None else None, self.load_settings)
        self.invariants.exact = self.load_settings.is_exact

    def _check_engine(self) -> None:
        """Refuse an engine with numbers of its own where nothing corrects for them."""
        engine = self.collector.engine
        self.invariants.own_sampler = engine.exact
        if engine.exact:
            return
        if not engine.reports_logprobs:
            raise ValueError(
                f"{type(engine).__name__} does not say how likely its own draws were: it serves evaluation, but there "
                "is nothing to correct a gradient by"
            )
        if self.sampler_correction is None:
            raise ValueError(
                f"{type(engine).__name__} draws with other numbers than the trainer's, and {type(self).__name__} does "
                "not correct for them: set model.sampler_correction (token_truncate is usual), or leave engine out"
            )

    def frozen_models(self) -> Sequence[nn.Module]:
        """The reference, and the networks that the scorer holds."""
        return (*super().frozen_models(), *getattr(self.scorer, "models", ()))

    def place_frozen_models(self) -> None:
        """Move the reference and the scorer to the device."""
        super().place_frozen_models()
        self.scorer.to(self.device)

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps of one rollout: epochs times minibatches."""
        episodes = rows_of_step(self.trainer)
        return self.ppo_epochs * math.ceil(episodes / (self.mini_batch_size or episodes))

    # -- one rollout --------------------------------------------------------------------------------------------------

    def training_step(self, step: Step[PromptBatch], batch_idx: int) -> None:
        """Collect one rollout and take all its updates."""
        meter, self.limits = Meter(), step.limits
        rollout, entropy = self.collect(*step.micro_batches)
        norm = self.learn(rollout, entropy, step.micro_batches[0], meter)
        self.rollouts += 1
        self.episodes += step.rows
        self.tokens += int(self._over_ranks(rollout.completion_mask.sum()))
        self._log_rollout(meter, norm, step.rows)

    def learn(self, rollout: Rollout, entropy: Tensor, batch: PromptBatch, meter: Meter) -> float:
        """Take all updates of a rollout; return the gradient norm of the last."""
        rewards = self.shape_rewards(rollout)
        self._check_rollout(rollout, rewards)
        advantages = self.advantages(rollout, rewards)
        if not self.learns_unscored:
            advantages = without_unscored(rollout, advantages)
        self._measure_rollout(rollout, rewards, entropy, meter)
        self._measure_advantages(rollout, advantages, meter)
        return self._learn_from(rollout, lambda rows: self._learn(rollout, advantages, rows, batch, meter), meter)

    def draw(self, batches: Sequence[PromptBatch]) -> Drawn:
        """Sample and score a completion for each prompt. A family that chooses among its samples overrides this.

        Args:
            batches: prompts of the rollout; further batches are candidates for families that need more.
        """
        return self.collector.draw(self.policy, self.tokenizer, batches[0])

    def collect(self, *batches: PromptBatch) -> tuple[Rollout, Tensor]:
        """Sample completions, score them, and take the statistics that the rollout's updates start from.

        Returns:
            The rollout, and the entropy of each token's distribution.
        """
        self.scorer.take_metrics()  # of completions that are no rollout's, such as a sample table's
        drawn = self.draw(batches)
        grids = self.statistics(drawn.samples)
        device = grids["logprobs"].device
        rollout = Rollout(
            sequences=drawn.samples.sequences,
            completion_mask=grids["completion_mask"],
            old_logprobs=grids["logprobs"],
            reference_logprobs=grids.get("reference_logprobs"),
            values=grids.get("values"),
            scores=drawn.scores.to(device),
            finished=drawn.samples.finished.to(device),
            group=drawn.batch.group.to(device),
            behaviour_logprobs=on_grid(drawn.samples.logprobs, grids["logprobs"]),
            episodes=drawn.batch.episodes,
            baseline_scores=None if drawn.baseline_scores is None else drawn.baseline_scores.to(device),
            extras={
                **{name: values for name, values in grids.items() if name not in FIELDS},
                **on_device(drawn.batch.extras, device),
            },
        )
        return rollout, grids["entropy"]

    def statistics(self, samples: Samples) -> dict[str, Tensor]:
        """Return what is to be known of sampled completions, one (episodes, length) grid for each name.

        The models forward them as training will, without gradient; the policy unless sampling has said it all.
        """
        sequences, known = samples.sequences, self._says_all(samples)
        idle = partial(self._forward_statistics, free_layout().to(self.device), not known)
        with inference_mode_of(self), in_step(self.policy, idle) as before_pass:

            def forward(layout: Layout) -> dict[str, Tensor]:
                before_pass()
                return self._forward_statistics(layout, not known)

            grids = gather_grids(sequences, self.cut(sequences), forward, self.lay_out)
        if known:
            grids["logprobs"] = on_grid(samples.logprobs, grids["completion_mask"])
            grids["entropy"] = on_grid(samples.entropies or (), grids["completion_mask"])
        return grids

    def _says_all(self, samples: Samples) -> bool:
        """Whether what sampling found is taken for what a forward of the policy would find.

        Not in lower precisions, whose rounding would move the ratio from 1; nor where weights are cut over ranks, which
        make their passes together.
        """
        exact = self.invariants.exact and str(self.trainer.precision) in ("32-true", "64-true")
        asks_more = self.hidden_layers or type(self).token_statistics is not AlignmentModule.token_statistics
        known = samples.entropies is not None and self.device_mesh is None and not asks_more
        return self.reuse_behaviour_logprobs and known and exact

    def cut(self, sequences: Sequences, rows: Sequence[int] | None = None) -> list[list[int]]:
        """Cut episodes into micro-batches by the step's limits, in training as for a rollout's statistics."""
        return cut_sequences(sequences, rows, self.limits, self.packs_rows)

    def _forward_statistics(self, layout: Layout, with_policy: bool = True) -> dict[str, Tensor]:
        """Return what one forward of the reference, and one of the policy, say about a micro-batch."""
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

    # -- override points ----------------------------------------------------------------------------------------------

    def shape_rewards(self, rollout: Rollout) -> Tensor:
        """Return the reward of each token, shape (episodes, length)."""
        raise undefined(self, "shape_rewards")

    def advantages(self, rollout: Rollout, rewards: Tensor) -> Advantages:
        """Return the advantage of each token, and the critic's target where there is one."""
        raise undefined(self, "advantages")

    def policy_loss(self, logprobs: PolicyLogprobs) -> Tensor | Loss:
        """Return one loss per token, shape (rows, length)."""
        raise undefined(self, "policy_loss")

    def critic_loss(self, layout: Layout, rows: Tensor, rollout: Rollout, advantages: Advantages, outputs: Any) -> Loss:
        """Return the critic's loss per state, in families that have one."""
        return Loss(torch.zeros_like(outputs.logprobs))

    # -- updates ------------------------------------------------------------------------------------------------------

    def _learn_from(self, rollout: Rollout, learn: Callable[[list[int]], float], meter: Meter) -> float:
        """Call ``learn`` with the rows of each minibatch of each epoch; return the gradient norm of the last."""
        norm = 0.0
        for epoch in range(self.ppo_epochs):
            for number, rows in enumerate(self._minibatches(rollout, epoch)):
                self._untouched = epoch == number == 0  # the policy is still the one that sampled
                norm = learn(rows)
                if self._should_stop(meter):
                    return norm
        return norm

    def _minibatches(self, rollout: Rollout, epoch: int) -> Iterator[list[int]]:
        """Yield this rank's rows of each minibatch; the permutation is over all ranks' episodes."""
        mine = self._units(rollout)
        everyone = sorted(gathered_numbers(self, list(mine)))
        generator = torch.Generator().manual_seed(hash((self.seed, self.rollouts, epoch)) % 2**63)
        order = [everyone[place] for place in torch.randperm(len(everyone), generator=generator).tolist()]
        whole = max((len(rows) for rows in mine.values()), default=1)
        size = len(order) if self.mini_batch_size is None else max(self.mini_batch_size // whole, 1)
        for start in range(0, len(order), size):
            yield [row for unit in order[start : start + size] if unit in mine for row in mine[unit]]

    def _units(self, rollout: Rollout) -> dict[int, list[int]]:
        """Rows that no minibatch may part, by a number that no other rank has: here each episode is by itself."""
        assert rollout.episodes is not None
        return {int(episode): [row] for row, episode in enumerate(rollout.episodes)}

    def aggregation(self, learned: Tensor) -> Aggregation:
        """Return how token losses become one: a mean over the tokens of the minibatch.

        Args:
            learned: bool, True on the tokens that are learned from, shape (rows, length).
        """
        return token_mean(learned)

    def _learn(
        self, rollout: Rollout, advantages: Advantages, rows: list[int], batch: PromptBatch, meter: Meter
    ) -> float:
        """Take one optimizer step on some episodes of the rollout."""
        sequences = rollout.sequences
        learned = rollout.completion_mask if advantages.learned is None else advantages.learned
        count = float(self._over_ranks(self.aggregation(learned[rows]).divisor))
        cuts = self.cut(sequences, rows)
        losses: list[Callable[[], Tensor]] = [partial(self._loss_sum, rollout, advantages, cut, meter) for cut in cuts]
        # Without a backward pass here the gradients of the ranks that have rows would wait for ever.
        missing = max(most_passes(self.policy, len(cuts)), 1) - len(cuts)
        losses += [partial(self._loss_of_nothing, rollout, advantages, meter)] * missing
        # The rollout's passes go last: where ranks add gradients up after the last one, it must touch every weight.
        return self.update(self.further_losses(batch, count, meter) + losses, count)

    def _loss_of_nothing(self, rollout: Rollout, advantages: Advantages, meter: Meter) -> Tensor:
        """Return a loss that changes nothing, for a rank without rows left while others have some."""
        unused = Meter()
        loss = 0.0 * self._loss_sum(rollout, advantages, [0], unused)
        meter.add_nothing(unused)
        return loss

    def further_losses(self, batch: PromptBatch, count: float, meter: Meter) -> list[Callable[[], Tensor]]:
        """Return losses on other text than the rollout's, as functions, to be divided by ``count`` like the rest."""
        return []

    def _loss_sum(self, rollout: Rollout, advantages: Advantages, cut: list[int], meter: Meter) -> Tensor:
        """Return the weighted sum of a micro-batch's token losses, to be divided by the minibatch's count."""
        layout = self.lay_out(select(rollout.sequences, cut))
        mask, length = layout.completion_mask, layout.completion_mask.shape[1]
        rows = torch.tensor(cut, device=self.device)
        outputs = self.policy_outputs(layout, self.sampling.temperature, with_entropy=self.entropy_coef != 0)

        def part(grid: Tensor | None) -> Any:
            return None if grid is None else grid[rows, :length]

        logprobs = PolicyLogprobs(
            logprobs=outputs.logprobs,
            old_logprobs=part(rollout.old_logprobs),
            reference_logprobs=part(rollout.reference_logprobs),
            entropy=outputs.entropy,
            advantages=part(advantages.advantages),
            completion_mask=mask,
            behaviour_logprobs=part(rollout.behaviour_logprobs),
            extras={**of_rows(rollout.extras, rows, length), **outputs.extras},
        )
        if self._untouched:
            self._check_first_ratio(logprobs)
        learned = mask if advantages.learned is None else part(advantages.learned)
        aggregation = self.aggregation(learned)
        policy = as_loss(self.policy_loss(logprobs))
        total = aggregation.weighted_sum(policy.values)
        for name, values in {"policy_loss": policy.values, **policy.metrics}.items():
            meter.add(name, values, learned)
        if outputs.entropy is not None and self.entropy_coef:
            total = total - self.entropy_coef * aggregation.weighted_sum(outputs.entropy)
        further = self.critic_loss(layout, rows, rollout, advantages, outputs)
        self._measure_update(logprobs, meter)
        for name, values in further.metrics.items():
            meter.add(name, values, mask if values.shape == mask.shape else None)
        total = total + further.values.sum()
        meter.add_ratio("loss", total, aggregation.divisor)
        return total

    # -- what must hold -----------------------------------------------------------------------------------------------

    def score_slots(self, rollout: Rollout) -> Tensor | None:
        """Return the slot on which each completion's score must land, shape (episodes,); None where it is spread."""
        return rollout.completion_mask.sum(-1) - 1

    def _check_rollout(self, rollout: Rollout, rewards: Tensor) -> None:
        """Check a rollout before anything is learned from it."""
        self.invariants.check_lengths(rollout)
        self.invariants.check_sampler(rollout)
        if self.updates == 0:
            self.invariants.check_first_kl(rollout)
        slots = self.score_slots(rollout)
        if slots is not None:
            unscored = self.shape_rewards(rollout._replace(scores=torch.zeros_like(rollout.scores)))
            self.invariants.check_scores(rollout.scores, rewards - unscored, slots)

    def _check_first_ratio(self, logprobs: PolicyLogprobs) -> None:
        """Check that the policy about to be updated is the one that sampled."""
        self.invariants.check_ratio(logprobs)

    def _should_stop(self, meter: Meter) -> bool:
        """Whether the policy has moved far enough from the one that sampled; all ranks decide alike."""
        if self.early_stop_kl is None:
            return False
        moved = meter.means(self.trainer.strategy)["last_approx_kl"]
        meter.forget("last_approx_kl")
        return moved > 1.5 * self.early_stop_kl

    def _over_ranks(self, value: Tensor) -> Tensor:
        """Sum over all ranks."""
        return summed_over_ranks(self, value)

    # -- logging ------------------------------------------------------------------------------------------------------

    def _measure_update(self, logprobs: PolicyLogprobs, meter: Meter) -> None:
        """Add how far the update has moved the policy from the one that sampled."""
        now, old, mask = logprobs.logprobs.detach(), logprobs.old_logprobs, logprobs.completion_mask
        moved = approx_kl(now, old)
        meter.add("approx_kl", moved, mask)
        if self.early_stop_kl is not None:
            meter.add("last_approx_kl", moved, mask)
        meter.add("ratio", (now - old).exp(), mask)

    def _measure_rollout(self, rollout: Rollout, rewards: Tensor, entropy: Tensor, meter: Meter) -> None:
        """Add what describes the rollout itself, before any update."""
        mask = rollout.completion_mask
        measure_samples(meter, rollout.scores, rollout.finished, mask.sum(-1))
        meter.add("rollout/entropy", entropy, mask)
        meter.add("rollout/reward", rewards.sum(-1), ~rollout.scores.isnan())
        meter.add("rollout/score_missing", rollout.scores.isnan().double())
        for name, values in self.scorer.take_metrics().items():
            meter.add(f"rollout/{name}", values, ~values.isnan())
        if rollout.reference_logprobs is not None:
            meter.add("rollout/kl", kl_k1(rollout.old_logprobs, rollout.reference_logprobs).sum(-1))

    def _measure_advantages(self, rollout: Rollout, advantages: Advantages, meter: Meter) -> None:
        """Add what describes the advantages, in families that have more to say of them."""

    def _log_rollout(self, meter: Meter, norm: float, episodes: int) -> None:
        """Log one rollout at x = updates, and steer the KL coefficient."""
        means = meter.means(self.trainer.strategy)
        rollout = with_score_std({name: means.pop(name) for name in list(means) if name.startswith("rollout/")})
        means.pop("last_approx_kl", None)
        further = {"kl_coef": self.kl_coef, **self.invariants.take(self.trainer.strategy), **means, **rollout}
        self.log_training(Meter(), grad_norm=norm, **further)
        # A KL that is no number would stay in the coefficient, and a skipped update would not have been the last.
        if self.kl_target is not None and math.isfinite(rollout.get("rollout/kl", math.nan)):
            new = adapted_kl_coef(self.kl_coef, rollout["rollout/kl"], self.kl_target, self.kl_horizon, episodes)
            self.kl_coef = float(new)

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def validation_step(self, step: Step[PromptBatch], batch_idx: int) -> None:
        """Sample and score held-out prompts, and measure the KL to the reference on them."""
        self.limits = step.limits
        for batch in step.micro_batches:
            rollout, entropy = self.collect(batch._replace(episodes=-1 - batch.episodes))
            self._measure_rollout(rollout, torch.zeros_like(rollout.old_logprobs), entropy, self._evaluation)

    def test_step(self, step: Step[PromptBatch], batch_idx: int) -> None:
        """Sample and score test prompts."""
        self.validation_step(step, batch_idx)

    def evaluation_metrics(self) -> dict[str, float]:
        """Return held-out metrics without the rollout prefix."""
        means = {name.removeprefix("rollout/"): value for name, value in super().evaluation_metrics().items()}
        means.pop("reward", None)
        return with_score_std(means, prefix="")

    def export(self, folder: str | Path) -> Path:
        """Write the policy as a Hugging Face folder."""
        return export_policy(self.policy, self.tokenizer, folder)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the KL coefficient with the counters, and what a scorer has learned."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["kl_coef"] = self.kl_coef
        checkpoint["scorer"] = of_all_ranks(self, self.scorer.state_dict())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them up again; an export goes without the scorer."""
        super().on_load_checkpoint(checkpoint)
        self.kl_coef = checkpoint["kl_coef"]
        (rank, ranks), states = rank_of(self), checkpoint["scorer"]
        if any(states):
            self.scorer.load_state_dict(states[rank if len(states) == ranks else 0])
