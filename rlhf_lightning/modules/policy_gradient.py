"""Policy gradients: what papers vary in the loss is a setting of one class.

loss = aggregation(objective(ratio, A) * sampler weight + kl_coef * KL loss). A new method is a subclass with other
defaults (a preset), or one that overrides public methods:

- ``shape_rewards(rollout)``: the reward of each token; ``advantages(rollout, rewards)``: the advantage of each token;
- ``ratio(logprobs)``: policy / old policy on each token;
- ``objective(ratio, logprobs)``: the loss of each token, with the metrics that the objective reports about itself;
- ``kl_loss(logprobs)``: the KL estimate of each token where the KL is a loss;
- ``sampler_weight(logprobs)``: the correction for a sampling engine with numbers of its own;
- ``policy_loss(logprobs)``: all of these together;
- ``aggregation(learned)``: how token losses become one;
- ``target_policy(problem)``: the optimum, which a subclass with another one declares anew.

`CriticFreeModule` adds ``episode_advantages(rewards, rollout)``, and `PPOModule` ``value_loss(values)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_lightning.functional.aggregation import AggregationName, aggregate
from rlhf_lightning.functional.critic_free import overlong_penalty
from rlhf_lightning.functional.logprobs import MAX_LOG_RATIO, KLEstimator, kl_estimate
from rlhf_lightning.functional.sampler_correction import (
    CorrectionName,
    normalised_weights,
    off_policy_weights,
    sampler_weights,
)
from rlhf_lightning.functional.surrogates import (
    RatioName,
    cispo_loss,
    clip_fractions,
    clipped_surrogate_loss,
    policy_ratio,
    reinforce_loss,
    soft_gate_loss,
    token_ratio,
)
from rlhf_lightning.training.collector import Samples
from rlhf_lightning.training.module import as_loss
from rlhf_lightning.training.on_policy import OnPolicyModule
from rlhf_lightning.training.settings import refuse_contradictions
from rlhf_lightning.types import Aggregation, EnumeratedProblem, Loss, PolicyLogprobs, PromptBatch, Rollout

ObjectiveName = Literal["clip", "soft_gate", "cispo", "reinforce"]
KLPlace = Literal["reward", "loss"]


class PolicyGradientModule(OnPolicyModule):
    r"""Base of policy gradients: ratio, objective, aggregation, KL penalty and sampler correction as settings.

    Args:
        kl_coef: KL penalty coefficient, in reward units per nat; 0 pays no KL.
        kl_place: "reward" subtracts the KL estimate from each token's reward, without gradient (Ziegler et al.,
            1909.08593); "loss" adds it to each token's loss (Shao et al., 2402.03300).
        kl_estimator: with d = log policy - log reference: k1 = d, k2 = d^2 / 2, k3 = e^(-d) - 1 + d (Schulman 2020).
            k1 is the one for the reward.
        kl_times_ratio: multiply the KL loss by the token ratio, with gradient through both; this makes its gradient
            the reverse KL's for every estimator (DeepSeek-V3.2; TRL).
        kl_clamp: clamp d to plus or minus this, nats, except for k1 in the reward; null does not clamp.
        ratio: policy / old policy, by level. "token": of each token (PPO, 1707.06347); "sequence": the geometric mean
            over the completion (GSPO, 2507.18071); "sequence_product": of the whole completion (RLOO, 2402.14740);
            "none": no ratio, for the "reinforce" objective.
        objective: loss of each token. "clip": max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip_high)) (PPO);
            "soft_gate": -(4 / tau) sigmoid(tau (ratio - 1)) A (SAPO, 2511.20347); "cispo":
            -sg(clip(ratio, cispo_low, cispo_high)) A log policy (2506.13585); "reinforce": -A log policy.
        clip: how far below 1 the ratio may fall, and above 1 rise, before its gradient stops.
        clip_high: how far the ratio may rise above 1 (DAPO, 2503.14476); null takes ``clip``.
        dual_clip: bound of the loss where A < 0, in units of -A, above 1 (1912.09729); null does not bound.
        ratio_cap: bound of the ratio where A < 0, above 1 + clip_high (two-sided clip, 2505.07291); null for no bound.
        cispo_high: largest weight of a token in "cispo"; 5 in ScaleRL (2510.13786); null for no bound.
        cispo_low: smallest weight of a token in "cispo" (verl, NeMo-RL); null for no bound.
        gate_temperature: tau of "soft_gate" where A > 0.
        gate_temperature_negative: tau of "soft_gate" elsewhere.
        aggregation: "token_mean": over all tokens (PPO, DAPO); "sequence_mean_token_mean": the mean over completions
            of token means (GRPO); "sequence_mean_token_sum": of token sums (RLOO); "constant": sums divided by
            max_new_tokens per completion (Dr. GRPO, 2503.20783).
        sampler_correction: weight for an engine whose log-probabilities differ from the trainer's, from the ratio
            old / behaviour. "token_truncate": min(ratio, sampler_high); "token_mask": 0 outside [sampler_low,
            sampler_high] (IcePop); "sequence_truncate", "sequence_mask": of the completion's ratio, truncated or 0
            above sampler_high; "geometric_mask": reject completions whose geometric mean is outside [sampler_low,
            sampler_high]; null does not correct.
        sampler_high: upper bound of the sampler correction; 2 to 5 are usual.
        sampler_low: lower bound of the sampler correction's masks.
        sampler_normalise: divide the sampler correction's weights by their mean over the minibatch (verl).
        off_policy_threshold: learn nothing from completions with A < 0 whose mean of log old - log policy exceeds this,
            nats per token (DeepSeek-V3.2); null learns from all.
        overlong_buffer: tokens before max_new_tokens over which up to 1 is subtracted from the score (DAPO, Eq. 13);
            null subtracts nothing.

    Raises:
        SettingError: a setting is outside its range, or two settings contradict each other.
    """

    sampler_correction: CorrectionName | None = None

    ranges = {
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

    def __init__(
        self,
        scorer: Any,
        kl_coef: float = 0.05,
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
        sampler_low: float = 0.5,
        sampler_normalise: bool = False,
        off_policy_threshold: float | None = None,
        overlong_buffer: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(scorer=scorer, kl_coef=kl_coef, **kwargs)
        self.kl_place, self.kl_estimator = kl_place, kl_estimator
        self.kl_times_ratio, self.kl_clamp = kl_times_ratio, kl_clamp
        self.ratio_name, self.objective_name, self.aggregation_name = ratio, objective, aggregation
        self.clip, self.clip_high, self.dual_clip, self.ratio_cap = clip, clip_high, dual_clip, ratio_cap
        self.cispo_high, self.cispo_low = cispo_high, cispo_low
        self.gate_temperature, self.gate_temperature_negative = gate_temperature, gate_temperature_negative
        self.sampler_correction, self.sampler_normalise = sampler_correction, sampler_normalise
        self.sampler_high, self.sampler_low = sampler_high, sampler_low
        self.needs_minibatch = self.needs_minibatch or sampler_normalise
        self.off_policy_threshold, self.overlong_buffer = off_policy_threshold, overlong_buffer
        refuse_contradictions(_contradictions(self))

    # -- the parts of the loss ----------------------------------------------------------------------------------------

    def ratio(self, logprobs: PolicyLogprobs) -> Tensor:
        """Return policy / old policy on each token, with gradient, shape (rows, length)."""
        given = (logprobs.logprobs, logprobs.old_logprobs, logprobs.completion_mask)
        return policy_ratio(self.ratio_name, *given)

    def objective(self, ratio: Tensor, logprobs: PolicyLogprobs) -> Tensor | Loss:
        """Return the loss of each token, shape (rows, length), with the clip fractions of the objective that clips."""
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
        """Return how token losses become one.

        Args:
            learned: bool, True on the tokens that are learned from, shape (rows, length).
        """
        return aggregate(self.aggregation_name, learned, self.sampling.max_new_tokens)

    def kl_loss(self, logprobs: PolicyLogprobs) -> Tensor | None:
        """Return the KL estimate of each token as a loss in nats, shape (rows, length); None where it is no loss."""
        if self.kl_place == "reward" or not self.kl_coef:
            return None
        assert logprobs.reference_logprobs is not None
        kl = kl_estimate(logprobs.logprobs, logprobs.reference_logprobs, self.kl_estimator, self.kl_clamp)
        return token_ratio(logprobs.logprobs, logprobs.old_logprobs) * kl if self.kl_times_ratio else kl

    def sampler_weight(self, logprobs: PolicyLogprobs) -> Tensor | None:
        """Return the weight of each token that corrects for the sampler, shape (rows, length); None for none."""
        weight = None
        if self.sampler_correction is not None:
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
        values, found = as_loss(self.objective(self.ratio(logprobs), logprobs))
        metrics = dict(found)
        weight = self.sampler_weight(logprobs)
        if weight is not None:
            values, metrics["sampler_weight"] = values * weight, weight
        kl = self.kl_loss(logprobs)
        if kl is not None:
            values, metrics["kl_loss"] = values + self.kl_coef * kl, kl
        return Loss(values, metrics)

    # -- rewards ------------------------------------------------------------------------------------------------------

    def reward_kl(self, rollout: Rollout) -> Tensor:
        """Return the KL that each token's reward pays, nats, shape (episodes, length); 0 where it is a loss."""
        if self.kl_place == "loss" or not self.kl_coef:
            return torch.zeros_like(rollout.old_logprobs)
        assert rollout.reference_logprobs is not None
        clamp = None if self.kl_estimator == "k1" else self.kl_clamp
        return kl_estimate(rollout.old_logprobs, rollout.reference_logprobs, self.kl_estimator, clamp)

    def draw(self, batches: Sequence[PromptBatch]) -> Samples:
        """Sample and score a completion for each prompt; those near the length limit lose up to 1 of their score."""
        drawn = super().draw(batches)
        if self.overlong_buffer is None:
            return drawn
        penalty = overlong_penalty(drawn.lengths, self.sampling.max_new_tokens, self.overlong_buffer)
        return drawn._replace(scores=drawn.scores + penalty)

    # -- the optimum --------------------------------------------------------------------------------------------------

    def reaches_kl_optimum(self) -> bool:
        """Whether these settings have reference * exp(score / kl_coef), normalised, as their optimum.

        The KL must be paid exactly (k1 in the reward, a fixed coefficient), and all else may differ from the policy
        gradient of whole completions in scale alone: no weight by length, no other score, no entropy bonus.
        """
        pays_kl = self.kl_coef > 0 and self.kl_target is None and (self.kl_place, self.kl_estimator) == ("reward", "k1")
        plain = self.aggregation_name != "sequence_mean_token_mean" and self.overlong_buffer is None
        return pays_kl and plain and not self.entropy_coef and self.sampling.temperature == 1

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        """Return reference * exp(score / kl_coef), normalised, where the settings reach it."""
        if not self.reaches_kl_optimum():
            return None
        return torch.softmax(problem.reference.log() + problem.rewards / self.kl_coef, -1)


def _contradictions(m: PolicyGradientModule) -> dict[str, tuple[bool, str]]:
    """Return whether one setting makes another meaningless, and the sentence that says so, by error code."""
    high = 1 + (m.clip if m.clip_high is None else m.clip_high)
    return {
        "kl-without-gradient": (
            m.kl_place == "loss" and m.kl_estimator == "k1" and not m.kl_times_ratio,
            "kl_estimator is k1 and kl_place loss: its expected gradient is 0; set kl_times_ratio, kl_estimator k2 or "
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
            m.sampler_low > m.sampler_high,
            f"sampler_low is {m.sampler_low} and sampler_high {m.sampler_high}: the lower bound is above the upper one",
        ),
        "nothing-to-normalise": (
            m.sampler_normalise and m.sampler_correction is None,
            "sampler_normalise divides the weights of sampler_correction, which is null: set one",
        ),
        "overlong-buffer": (
            m.overlong_buffer is not None and m.overlong_buffer > m.sampling.max_new_tokens,
            f"overlong_buffer is {m.overlong_buffer}: it must lie between 1 and max_new_tokens "
            f"({m.sampling.max_new_tokens})",
        ),
    }
