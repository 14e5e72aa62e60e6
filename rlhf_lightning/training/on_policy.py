"""Policy gradients: rewards, advantages and a loss per token, computed per minibatch of a rollout.

loss = aggregation(objective(ratio, A) * sampler weight + kl_coef * KL loss). The variations found in papers are
settings. A new method is a subclass with other defaults (a preset) or with overridden public methods; docs/extending.md
lists them. `CriticFreeModule` adds ``episode_advantages(rewards, rollout)``, and `PPOModule` ``value_loss(values)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rlhf_lightning.errors import SettingError, undefined
from rlhf_lightning.functional.logprobs import MAX_LOG_RATIO, KLEstimator, kl_estimate
from rlhf_lightning.functional.policy_gradient import adapted_kl_coef, last_turn_lengths, overlong_penalty
from rlhf_lightning.functional.surrogates import (
    AggregationName,
    CorrectionName,
    RatioName,
    aggregate,
    cispo_loss,
    clip_fractions,
    clipped_surrogate_loss,
    effective_share,
    normalised_weights,
    off_policy_weights,
    policy_ratio,
    reinforce_loss,
    sampler_weights,
    soft_gate_loss,
    token_ratio,
)
from rlhf_lightning.loading import refuse_contradictions
from rlhf_lightning.models.layout import Layout, select
from rlhf_lightning.models.sharding import most_passes
from rlhf_lightning.models.transfer import to_device
from rlhf_lightning.training.collector import Samples, last_learned, select_episodes, without_unscored
from rlhf_lightning.training.gathering import whole_minibatch
from rlhf_lightning.training.meter import Meter, moments_over_ranks
from rlhf_lightning.training.returned_loss import loss_of
from rlhf_lightning.training.rollout import RolloutModule
from rlhf_lightning.types import (
    Advantages,
    Aggregation,
    EnumeratedProblem,
    Loss,
    Minibatch,
    PolicyLogprobs,
    PromptBatch,
    Rollout,
    Sequences,
)

ObjectiveName = Literal["clip", "soft_gate", "cispo", "reinforce"]
KLPlace = Literal["reward", "loss"]


class OnPolicyModule(RolloutModule):
    r"""Base of policy gradients: ratio, objective, aggregation, KL penalty and sampler correction as settings.

    Args:
        kl_coef: KL penalty coefficient, in reward units per nat; 0 turns the KL penalty off.
        kl_target: target of the sequence KL, nats, towards which the coefficient is adapted; null keeps it fixed.
        kl_horizon: episodes over which the coefficient may change by a fifth.
        entropy_coef: weight of the entropy bonus, reward units per nat.
        kl_place: "reward" subtracts the KL estimate from each token's reward, without gradient (Ziegler et al.,
            1909.08593); "loss" adds it to each token's loss (Shao et al., 2402.03300).
        kl_estimator: with d = log policy - log reference: k1 = d, k2 = d^2 / 2, k3 = e^(-d) - 1 + d (Schulman 2020).
            Use k1 in the reward.
        kl_times_ratio: multiply the KL loss by the token ratio, with gradient through both factors. The gradient is
            then that of the reverse KL for every estimator (DeepSeek-V3.2; TRL).
        kl_clamp: clamp d to [-kl_clamp, kl_clamp], nats, except for k1 in the reward; null does not clamp.
        ratio: policy / old policy, by level. "token": per token (PPO, 1707.06347); "sequence": the geometric mean
            over the completion (GSPO, 2507.18071); "sequence_product": of the whole completion (RLOO, 2402.14740);
            "none": no ratio, for the "reinforce" objective.
        objective: loss of each token. "clip": max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip_high)) (PPO);
            "soft_gate": -(4 / tau) sigmoid(tau (ratio - 1)) A (SAPO, 2511.20347); "cispo":
            -sg(clip(ratio, cispo_low, cispo_high)) A log policy (2506.13585); "reinforce": -A log policy.
        clip: distance from 1 at which the ratio's gradient stops, below and above.
        clip_high: distance above 1 at which the ratio's gradient stops (DAPO, 2503.14476); null uses ``clip``.
        dual_clip: bound of the loss where A < 0, in units of -A, above 1 (1912.09729); null for no bound.
        ratio_cap: bound of the ratio where A < 0, above 1 + clip_high (two-sided clip, 2505.07291); null for no bound.
        cispo_high: largest weight of a token in "cispo"; 5 in ScaleRL (2510.13786); null for no bound.
        cispo_low: smallest weight of a token in "cispo" (verl, NeMo-RL); null for no bound.
        gate_temperature: tau of "soft_gate" where A > 0.
        gate_temperature_negative: tau of "soft_gate" where A <= 0.
        aggregation: "token_mean": over all tokens (PPO, DAPO); "sequence_mean_token_mean": the mean over completions
            of token means (GRPO); "sequence_mean_token_sum": of token sums (RLOO); "constant": sums divided by
            max_new_tokens per completion (Dr. GRPO, 2503.20783).
        sampler_correction: weight that corrects for an engine whose log-probabilities differ from the trainer's, from
            the ratio old / behaviour. "token_truncate": min(ratio, sampler_high); "token_mask": 0 outside
            [sampler_low, sampler_high] (IcePop); "sequence_truncate", "sequence_mask": the completion's ratio,
            truncated to or set to 0 above sampler_high; "geometric_mask": reject completions with a geometric mean
            outside [sampler_low, sampler_high]; "bypass": use the engine's log-probabilities as the old ones, without
            the trainer's forward pass; null does not correct.
        sampler_high: upper bound of the sampler correction; 2 to 5 are usual.
        sampler_low: lower bound of the sampler correction; null is 0.5 for "token_mask" and "geometric_mask", and no
            bound for the others.
        sampler_normalise: divide the sampler correction's weights by their mean over the minibatch (verl).
        off_policy_threshold: skip completions with A < 0 whose mean of log old - log policy exceeds this, nats per
            token (DeepSeek-V3.2); null skips none.
        overlong_buffer: tokens before max_new_tokens over which up to 1 is subtracted from the score (DAPO, Eq. 13); in
            an environment, for the last turn; null subtracts nothing.

    Raises:
        SettingError: a setting is outside its range, or two settings contradict each other.
    """

    ranges = {
        "kl_coef": "[0, inf)",
        "kl_target": "(0, inf)",
        "kl_horizon": "(0, inf)",
        "entropy_coef": "(-inf, inf)",
        "kl_clamp": "(0, inf)",
        "clip": "(0, inf)",
        "clip_high": "(0, inf)",
        "dual_clip": "(1, inf)",
        "ratio_cap": "(1, inf)",
        "cispo_high": "(0, inf)",
        "cispo_low": "[0, inf)",
        "gate_temperature": "(0, inf)",
        "gate_temperature_negative": "(0, inf)",
        "sampler_high": "(0, inf)",
        "sampler_low": "[0, inf)",
        "off_policy_threshold": "[0, inf)",
        "overlong_buffer": "[1, inf)",
    }
    normalizes_scores = True
    learns_unscored: ClassVar[bool] = True
    """Whether completions without a score (their advantage is 0) still count in the KL loss and in averages."""

    needs_group: bool = False
    """Whether the objective compares completions of the same prompt."""

    needs_minibatch: bool = False
    """Whether ``policy_loss`` reads ``logprobs.minibatch``, the episodes of the step on all ranks."""

    needs_minibatch_logprobs: ClassVar[bool] = False
    """Whether ``logprobs.minibatch`` also has the current log-probabilities: one more forward pass without gradient."""

    def __init__(
        self,
        scorer: Any,
        kl_coef: float = 0.05,
        kl_target: float | None = None,
        kl_horizon: int = 10_000,
        entropy_coef: float = 0.0,
        ppo_epochs: int = 4,
        kl_place: KLPlace = "reward",
        kl_estimator: KLEstimator = "k1",
        kl_times_ratio: bool = False,
        kl_clamp: float | None = MAX_LOG_RATIO,
        ratio: RatioName = "token",
        objective: ObjectiveName = "clip",
        clip: float = 0.2,
        clip_high: float | None = None,
        dual_clip: float | None = None,
        ratio_cap: float | None = None,
        cispo_high: float | None = 5.0,
        cispo_low: float | None = None,
        gate_temperature: float = 1.0,
        gate_temperature_negative: float = 1.05,
        aggregation: AggregationName = "token_mean",
        sampler_correction: CorrectionName | None = None,
        sampler_high: float = 2.0,
        sampler_low: float | None = None,
        sampler_normalise: bool = False,
        off_policy_threshold: float | None = None,
        overlong_buffer: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(scorer=scorer, ppo_epochs=ppo_epochs, **kwargs)
        self.kl_coef, self.kl_target, self.kl_horizon = kl_coef, kl_target, kl_horizon
        self.entropy_coef = entropy_coef
        self.kl_place, self.kl_estimator = kl_place, kl_estimator
        self.kl_times_ratio, self.kl_clamp = kl_times_ratio, kl_clamp
        self.ratio_name, self.objective_name, self.aggregation_name = ratio, objective, aggregation
        self.clip, self.clip_high, self.dual_clip, self.ratio_cap = clip, clip_high, dual_clip, ratio_cap
        self.cispo_high, self.cispo_low = cispo_high, cispo_low
        self.gate_temperature, self.gate_temperature_negative = gate_temperature, gate_temperature_negative
        self.sampler_correction, self.sampler_normalise = sampler_correction, sampler_normalise
        self.sampler_high, self.sampler_low = sampler_high, sampler_low
        self.needs_minibatch = self.needs_minibatch or sampler_normalise
        self.needs_entropies = self.needs_minibatch
        self.off_policy_threshold, self.overlong_buffer = off_policy_threshold, overlong_buffer
        self._without_rows = False
        refuse_contradictions(_contradictions(self))

    @property
    def samples_ahead(self) -> bool:
        return True

    # -- from a rollout to updates ------------------------------------------------------------------------------------

    def learn(self, rollout: Rollout, batch: PromptBatch, meter: Meter) -> float:
        self.check_groups(rollout)
        self.check_rollout(rollout)
        self.measure_sampler(rollout, meter)
        normalized = self.with_normalized_scores(rollout)
        rewards = self.checked_rewards(normalized)
        advantages = self.advantages(normalized, rewards)
        if not self.learns_unscored:
            advantages = without_unscored(rollout, advantages)
        self.measure_rollout(rollout, meter)
        meter.add("rollout/reward", rewards.sum(-1), ~rollout.scores.isnan())
        self.measure_advantages(rollout, advantages, meter)
        norm = 0.0
        for rows in self.minibatches(rollout, meter):
            norm = self.learn_minibatch(rollout, advantages, rows, batch, meter)
        return norm

    def learn_minibatch(
        self, rollout: Rollout, advantages: Advantages, rows: list[int], batch: PromptBatch, meter: Meter
    ) -> float:
        """Take one optimizer step on some episodes of the rollout."""
        learned = rollout.completion_mask if advantages.learned is None else advantages.learned
        index = to_device(torch.tensor(rows, dtype=torch.long), self.device)
        divisors = self.aggregation(learned[index]).divisor, self.critic_states(rollout)[index].sum()
        # They stay on the device, since reading them would wait for it.
        sums = [to_device(one, self.device).double() for one in divisors]
        count, states = self.sum_over_ranks(torch.stack(sums)).unbind()
        cuts = self.cut(rollout.sequences, rows)
        minibatch = None
        if self.needs_minibatch or self.needs_minibatch_logprobs:
            now = self._logprobs_now(rollout.sequences, cuts) if self.needs_minibatch_logprobs else None
            minibatch = whole_minibatch(self, rollout, advantages, rows, now)
        scale = count / states.clamp_min(1)
        loss = partial(self.token_loss_sum, rollout, advantages, minibatch=minibatch, critic_scale=scale)
        losses: list[Callable[[], Tensor]] = [partial(loss, cut, meter) for cut in cuts]
        # Ranks without rows need backward passes too, since the gradient averaging of the other ranks waits for them.
        missing = max(most_passes(self.policy, len(cuts)), 1) - len(cuts)
        losses += [partial(self._loss_of_nothing, loss, meter)] * missing
        # The rollout's passes come last: DDP averages gradients in the last pass, which must use every weight.
        return self.update(self.further_losses(batch, count, meter) + losses, count, meter)

    def _loss_of_nothing(self, loss: Callable[[list[int], Meter], Tensor], meter: Meter) -> Tensor:
        """Return a loss of 0 for a rank without rows, when other ranks have rows."""
        unused = Meter()
        self._without_rows = True
        try:
            # nan_to_num: NaN times 0 is NaN, in the loss and in its gradient.
            nothing = 0.0 * loss([0], unused).nan_to_num(0.0, 0.0, 0.0)
        finally:
            self._without_rows = False
        meter.add_nothing(unused)
        return nothing

    def muted(self, outputs: Sequence[Tensor | None]) -> None:
        """Zero the gradient of some model outputs if this rank has no rows and only joins the others' passes."""
        for tensor in outputs if self._without_rows else ():
            if tensor is not None and tensor.requires_grad:
                tensor.register_hook(torch.zeros_like)

    def token_loss_sum(
        self, rollout: Rollout, advantages: Advantages, cut: list[int], meter: Meter,
        minibatch: Minibatch | None = None, critic_scale: float | Tensor = 1.0,
    ) -> Tensor:  # fmt: skip
        """Return the weighted sum of a micro-batch's token losses; ``update`` divides it by the minibatch's count."""
        layout = self.lay_out(select(rollout.sequences, cut))
        mask, length = layout.completion_mask, layout.completion_mask.shape[1]
        rows = to_device(torch.tensor(cut), self.device)
        outputs = self.policy_outputs(layout, self.sampling.temperature, with_entropy=self.entropy_coef != 0)
        self.muted([outputs.logprobs, outputs.entropy, outputs.values, *outputs.extras.values()])
        part = select_episodes(rollout, cut, length)
        logprobs = PolicyLogprobs(
            logprobs=outputs.logprobs,
            old_logprobs=part.old_logprobs,
            reference_logprobs=part.reference_logprobs,
            entropy=outputs.entropy,
            advantages=advantages.advantages[rows, :length],
            completion_mask=mask,
            behaviour_logprobs=part.behaviour_logprobs,
            extras={**part.extras, **outputs.extras},
            rollout=part,
            minibatch=None if minibatch is None else minibatch._replace(rows=minibatch.rows[rows]),
        )
        if self._untouched:
            self.invariants.check_ratio(logprobs, meter)
        learned = mask if advantages.learned is None else advantages.learned[rows, :length]
        aggregation = self.aggregation(learned)
        policy = loss_of(self.policy_loss, logprobs, like=mask)
        total = aggregation.weighted_sum(policy.values)
        for name, values in {"policy_loss": policy.values, **policy.metrics}.items():
            meter.add(name, values, learned)
        if outputs.entropy is not None and self.entropy_coef:
            total = total - self.entropy_coef * aggregation.weighted_sum(outputs.entropy)
        further = self.critic_loss(layout, rows, rollout, advantages, outputs)
        self.measure_update(logprobs, meter)
        states = self.critic_states(part)
        for name, values in further.metrics.items():
            meter.add(name, values, states if values.shape == states.shape else None)
        total = total + torch.as_tensor(critic_scale, dtype=total.dtype) * further.values.sum()
        meter.add_ratio("loss", total, aggregation.divisor)
        return total

    def _logprobs_now(self, sequences: Sequences, cuts: list[list[int]]) -> Tensor:
        """Return the policy's current log-probabilities without gradient, shape (episodes, length)."""

        def forward(layout: Layout) -> dict[str, Tensor]:
            return {"logprobs": self.policy(layout, self.sampling.temperature).logprobs}

        return self.gather_grids(sequences, cuts, forward)["logprobs"].clone()

    # -- override points ----------------------------------------------------------------------------------------------

    def shape_rewards(self, rollout: Rollout) -> Tensor:
        """Return the reward of each token, shape (episodes, length). Called once per rollout."""
        raise undefined(self, "shape_rewards")

    def advantages(self, rollout: Rollout, rewards: Tensor) -> Advantages:
        """Return the advantage of each token, and the critic's targets if there is a critic."""
        raise undefined(self, "advantages")

    def critic_loss(self, layout: Layout, rows: Tensor, rollout: Rollout, advantages: Advantages, outputs: Any) -> Loss:
        """Return the critic's loss per state, in families with a critic. Override point."""
        return Loss(torch.zeros_like(outputs.logprobs))

    def critic_states(self, rollout: Rollout) -> Tensor:
        """Return a mask of the states that the critic's loss is averaged over, bool, shape (episodes, states)."""
        return rollout.completion_mask

    def score_slots(self, rollout: Rollout) -> Tensor | None:
        """Return the position of each completion's score, shape (episodes,); None if scores are spread over tokens."""
        return last_learned(rollout.completion_mask)

    def measure_advantages(self, rollout: Rollout, advantages: Advantages, meter: Meter) -> None:
        """Record metrics of the advantages. Override point."""

    # -- the parts of the loss ----------------------------------------------------------------------------------------

    def ratio(self, logprobs: PolicyLogprobs) -> Tensor:
        """Return policy / old policy on each token, with gradient, shape (rows, length)."""
        given = (logprobs.logprobs, logprobs.old_logprobs, logprobs.completion_mask)
        return policy_ratio(self.ratio_name, *given)

    def objective(self, ratio: Tensor, logprobs: PolicyLogprobs) -> Tensor | Loss:
        """Return the loss of each token, shape (rows, length); the clipped objective adds its clip fractions."""
        advantages = logprobs.advantages
        if self.objective_name == "clip":
            bounds = (self.clip, self.dual_clip, self.clip_high, self.ratio_cap)
            values = clipped_surrogate_loss(ratio, advantages, *bounds)
            return Loss(values, clip_fractions(ratio, advantages, *bounds))
        if self.objective_name == "soft_gate":
            return soft_gate_loss(ratio, advantages, self.gate_temperature, self.gate_temperature_negative)
        if self.objective_name == "cispo":
            return cispo_loss(ratio, logprobs.logprobs, advantages, self.cispo_high, self.cispo_low)
        return reinforce_loss(logprobs.logprobs, advantages)

    def aggregation(self, learned: Tensor) -> Aggregation:
        """Return how token losses are averaged.

        Args:
            learned: bool, True on the tokens to learn from, shape (rows, length).
        """
        return aggregate(self.aggregation_name, learned, self.sampling.max_new_tokens)

    def kl_loss(self, logprobs: PolicyLogprobs) -> Tensor | None:
        """Return each token's KL loss in nats, shape (rows, length); None if the KL is in the reward or 0."""
        if self.kl_place == "reward" or not self.kl_coef:
            return None
        assert logprobs.reference_logprobs is not None
        kl = kl_estimate(logprobs.logprobs, logprobs.reference_logprobs, self.kl_estimator, self.kl_clamp)
        return token_ratio(logprobs.logprobs, logprobs.old_logprobs) * kl if self.kl_times_ratio else kl

    def sampler_weight(self, logprobs: PolicyLogprobs) -> Tensor | None:
        """Return the sampler correction of each token, shape (rows, length); None without a correction."""
        weight = None
        if self.sampler_correction not in (None, "bypass"):
            weight = self._correction(logprobs)
            if self.sampler_normalise:
                assert logprobs.minibatch is not None
                whole = self._correction(logprobs.minibatch)
                mask = logprobs.minibatch.learned
                weight = normalised_weights(weight, logprobs.completion_mask, whole[mask].mean())
        if self.off_policy_threshold is not None:
            parts = (logprobs.logprobs, logprobs.old_logprobs, logprobs.advantages, logprobs.completion_mask)
            off_policy = off_policy_weights(*parts, self.off_policy_threshold)
            weight = off_policy if weight is None else weight * off_policy
        return weight

    def measure_sampler(self, rollout: Rollout, meter: Meter) -> None:
        """Record how far the engine is from the trainer, and the share of the rollout that the correction drops."""
        mask, behaviour = rollout.completion_mask, rollout.behaviour_logprobs
        if self.sampler_correction in (None, "bypass") or behaviour is None:
            return
        meter.add("rollout/sampler_kl", kl_estimate(behaviour, rollout.old_logprobs, "k3", MAX_LOG_RATIO), mask)
        weight = self._correction(rollout)
        meter.add("rollout/sampler_masked", (weight == 0).double(), mask)
        meter.add("rollout/sampler_rejected", ((weight == 0) | ~mask).all(-1).double())
        share = effective_share(*moments_over_ranks(self.trainer.strategy, weight, mask))
        meter.add("rollout/sampler_effective_share", share)

    def _correction(self, logprobs: Any) -> Tensor:
        assert self.sampler_correction is not None and logprobs.behaviour_logprobs is not None
        return sampler_weights(
            self.sampler_correction,
            logprobs.old_logprobs,
            logprobs.behaviour_logprobs,
            logprobs.completion_mask,
            self.sampler_high,
            self.sampler_low,
        )

    def policy_loss(self, logprobs: PolicyLogprobs) -> Tensor | Loss:
        """Return the loss of each token, shape (rows, length)."""
        values, found = loss_of(self.objective, self.ratio(logprobs), logprobs, like=logprobs.completion_mask)
        metrics = dict(found)
        weight = self.sampler_weight(logprobs)
        if weight is not None:
            values, metrics["sampler_weight"] = values * weight, weight
        if self.off_policy_threshold is not None:
            assert weight is not None
            metrics["left_out"] = (weight == 0).type_as(weight)
        kl = self.kl_loss(logprobs)
        if kl is not None:
            values, metrics["kl_loss"] = values + self.kl_coef * kl, kl
        return Loss(values, metrics)

    # -- rewards ------------------------------------------------------------------------------------------------------

    def with_normalized_scores(self, rollout: Rollout) -> Rollout:
        """Return the rollout with scores recomputed from normalized parts, according to ``parts.normalize``.

        The rules for a missing end token and for long completions apply to these scores too. With "group_then_sum" the
        sums are finally standardised over the rollout.
        """
        rule, strategy = self.score_rule, self.trainer.strategy
        if not rule.normalizes:
            return rollout
        scores = rule.normalized(rollout.scores, rollout.parts, rollout.columns, rollout.group, strategy)
        scores = self.scores_after_rules(scores, rollout)
        return rollout._replace(scores=rule.standardised(scores, strategy) if rule.in_groups else scores)

    def scores_after_rules(self, scores: Tensor, rollout: Rollout) -> Tensor:
        """Return the scores of a rollout after the rules for a missing end token and for long completions."""
        scores = self.collector.ruled(scores, rollout.finished)
        if self.overlong_buffer is None:
            return scores
        lengths = last_turn_lengths(rollout.completion_mask)
        return scores + overlong_penalty(lengths, self.sampling.max_new_tokens, self.overlong_buffer)

    def reward_kl(self, rollout: Rollout) -> Tensor:
        """Return the KL penalty in each token's reward, nats, shape (episodes, length); 0 if the KL is in the loss."""
        if self.kl_place == "loss" or not self.kl_coef:
            return torch.zeros_like(rollout.old_logprobs)
        assert rollout.reference_logprobs is not None
        clamp = None if self.kl_estimator == "k1" else self.kl_clamp
        return kl_estimate(rollout.old_logprobs, rollout.reference_logprobs, self.kl_estimator, clamp)

    def draw(self, batches: Sequence[PromptBatch]) -> Samples:
        """Sample and score completions; ``overlong_buffer`` subtracts up to 1 from the score of long completions."""
        drawn = super().draw(batches)
        if self.overlong_buffer is None:
            return drawn
        found = drawn.completions
        lengths = torch.tensor([len(ids) - start for ids, start in zip(found.ids, found.starts, strict=True)])
        penalty = overlong_penalty(lengths, self.sampling.max_new_tokens, self.overlong_buffer)
        return drawn._replace(scores=drawn.scores + penalty)

    # -- the optimum --------------------------------------------------------------------------------------------------

    def reaches_kl_optimum(self) -> bool:
        """Whether the optimum under these settings is reference * exp(score / kl_coef), normalised.

        The KL penalty must be exact (k1 in the reward, a fixed coefficient). Otherwise only the scale may differ from
        the policy gradient of whole completions: no weighting by length, no changed score, no entropy bonus.
        """
        pays_kl = self.kl_coef > 0 and self.kl_target is None and (self.kl_place, self.kl_estimator) == ("reward", "k1")
        plain = self.aggregation_name != "sequence_mean_token_mean" and self.overlong_buffer is None
        plain = plain and not self.score_rule.normalizes and not self.score_rule.multipliers
        return pays_kl and plain and not self.entropy_coef and self.sampling.temperature == 1

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        if not self.reaches_kl_optimum():
            return None
        return torch.softmax(problem.reference.log() + problem.rewards / self.kl_coef, -1)

    # -- checks and logging -------------------------------------------------------------------------------------------

    def check_groups(self, rollout: Rollout) -> None:
        """Refuse prompts with a single completion if the objective compares completions of the same prompt."""
        compares = self.needs_group or self.score_rule.in_groups
        if compares and len(rollout.group) and int(torch.bincount(rollout.group).max()) < 2:
            raise SettingError(
                "group-of-one",
                f"{type(self).__name__} with these settings compares completions of one prompt, but each prompt has "
                "only one: set data.samples_per_prompt to 2 or more",
            )

    def checked_rewards(self, rollout: Rollout) -> Tensor:
        """Return the shaped rewards, after checking that each score appears at its position and nowhere else.

        The check differentiates the rewards with respect to the scores. So ``shape_rewards`` runs only once, and it may
        scale scores.
        """
        slots = self.score_slots(rollout)
        if slots is None:
            return self.shape_rewards(rollout).detach()
        scores = rollout.scores.detach().clone().requires_grad_()
        with torch.enable_grad():
            rewards = self.shape_rewards(rollout._replace(scores=scores))
        if rewards.requires_grad:
            self.invariants.check_scores(scores, rewards, slots)
        return rewards.detach()

    def log_rollout(self, meter: Meter, norm: float, episodes: int, **further: float) -> dict[str, float]:
        """Log one rollout, and adapt the KL coefficient towards ``kl_target``."""
        means = super().log_rollout(meter, norm, episodes, kl_coef=self.kl_coef, **further)
        # A non-finite KL would make the coefficient non-finite for the rest of the run.
        if self.kl_target is not None and math.isfinite(means.get("kl", math.nan)):
            self.kl_coef = float(adapted_kl_coef(self.kl_coef, means["kl"], self.kl_target, self.kl_horizon, episodes))
        return means

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["kl_coef"] = self.kl_coef

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.kl_coef = checkpoint["kl_coef"]


def _contradictions(m: OnPolicyModule) -> dict[str, tuple[bool, str]]:
    """Return, by error code, whether two settings contradict each other, and the message."""
    high = 1 + (m.clip if m.clip_high is None else m.clip_high)
    return {
        "kl-without-gradient": (
            m.kl_place == "loss" and m.kl_estimator == "k1" and not m.kl_times_ratio,
            "kl_estimator is k1 and kl_place loss: its expected gradient is 0: set kl_times_ratio, kl_estimator k2 or "
            "k3, or kl_place reward",
        ),
        "kl-ratio-in-reward": (
            m.kl_place == "reward" and m.kl_times_ratio,
            "kl_times_ratio multiplies the KL loss, and kl_place is reward: set kl_place loss",
        ),
        "ratio-without-objective": (
            (m.ratio_name == "none") != (m.objective_name == "reinforce"),
            f"ratio is {m.ratio_name} and objective {m.objective_name}: reinforce takes ratio none, and every other "
            "objective needs a ratio; for a weighted REINFORCE set objective cispo",
        ),
        "bound-without-clip": (
            m.objective_name != "clip" and not (m.dual_clip is m.ratio_cap is m.clip_high is None),
            f"clip_high, dual_clip and ratio_cap bound the clip objective, and objective is {m.objective_name}: set "
            "them to null",
        ),
        "two-bounds": (
            m.dual_clip is not None and m.ratio_cap is not None,
            f"dual_clip is {m.dual_clip} and ratio_cap {m.ratio_cap}: both bound the loss where A < 0; set one to null",
        ),
        "ratio-cap-below-clip": (
            m.ratio_cap is not None and m.ratio_cap <= high,
            f"ratio_cap is {m.ratio_cap}: it must be above 1 + clip_high ({high:g})",
        ),
        "cispo-bounds": (
            m.cispo_low is not None and m.cispo_high is not None and m.cispo_low > m.cispo_high,
            f"cispo_low is {m.cispo_low} and cispo_high {m.cispo_high}: the lower bound is above the upper one",
        ),
        "sampler-bounds": (
            m.sampler_low is not None and m.sampler_low > m.sampler_high,
            f"sampler_low is {m.sampler_low} and sampler_high {m.sampler_high}: the lower bound is above the upper one",
        ),
        "nothing-to-normalise": (
            m.sampler_normalise and m.sampler_correction in (None, "bypass"),
            f"sampler_normalise divides the weights of sampler_correction, which is {m.sampler_correction or 'null'} "
            "and has none: set another one",
        ),
        "overlong-buffer": (
            m.overlong_buffer is not None and m.overlong_buffer > m.sampling.max_new_tokens,
            f"overlong_buffer is {m.overlong_buffer}: it must lie between 1 and max_new_tokens "
            f"({m.sampling.max_new_tokens})",
        ),
    }
