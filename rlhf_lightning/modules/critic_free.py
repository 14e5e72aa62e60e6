"""Policy gradients without a critic: one module with five switches, each a method that a subclass overrides."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rlhf_lightning.functional import critic_free as functional
from rlhf_lightning.functional.logprobs import kl_k1, kl_k2, kl_k3
from rlhf_lightning.functional.policy_gradient import (
    clipped_surrogate_loss,
    sampler_correction,
    token_ratio,
    token_rewards,
)
from rlhf_lightning.models.causal_lm import load_policy
from rlhf_lightning.training.on_policy import OnPolicyModule
from rlhf_lightning.training.rollouts import Aggregation
from rlhf_lightning.types import Advantages, EnumeratedProblem, Loss, PolicyLogprobs, Rollout

KLPlace = Literal["reward", "k1", "k2", "k3"]


class CriticFreeModule(OnPolicyModule):
    r"""Policy gradient whose baseline comes from other samples: REINFORCE with the group's mean as baseline.

    loss = Agg(objective(ratio, A) + kl_coef * kl). A method is a choice of five things, each a method here:
    ``episode_advantages`` (or ``advantages`` where tokens differ), ``ratio``, ``objective``, ``aggregation``, and where
    the KL goes (``kl_place``). Here: score minus the group's mean, token ratios, the clipped surrogate, the mean over
    tokens, and the KL in the reward. At ratio 1 the gradient is that of -A log policy.

    Target: reference * exp(score / kl_coef), normalised, as rollouts grow; without a leash the best completions take
    all.

    Args:
        kl_coef: strength of the KL leash; 0 loads no reference.
        clip_high: how far the ratio may rise above 1; None takes ``clip`` on both sides.
        ratio_cap: bound of the ratio where the clip does not hold it (two-sided clip, INTELLECT-2); None for no bound.
        sampler_cap: correct for a sampling engine whose numbers differ from the trainer's by ratios of at most this;
            None does not correct.
        ppo_epochs: passes over each rollout.
    """

    kl_place: ClassVar[KLPlace] = "reward"
    """Where the KL to the reference is paid: in the reward of each token, or as a loss (k1, k2 or k3 estimate)."""

    needs_group: ClassVar[bool] = True
    """Whether advantages compare several completions of one prompt."""

    paper = "Williams 1992; Ahmadian et al. 2024, arXiv 2402.14740"

    def __init__(
        self,
        scorer: Any,
        kl_coef: float = 0.05,
        clip_high: float | None = None,
        ratio_cap: float | None = None,
        sampler_cap: float | None = None,
        ppo_epochs: int = 1,
        learning_rate: float = 1e-6,
        **kwargs: Any,
    ) -> None:
        super().__init__(scorer=scorer, kl_coef=kl_coef, ppo_epochs=ppo_epochs, learning_rate=learning_rate, **kwargs)
        self.clip_high, self.ratio_cap, self.sampler_cap = clip_high, ratio_cap, sampler_cap

    @property
    def holds_reference(self) -> bool:
        """Whether anything is measured from a reference."""
        return self.needs_reference and (self.kl_coef != 0 or self.kl_target is not None)

    def load_models(self) -> None:
        """Load the policy to train, reference and scorer frozen."""
        self.policy = load_policy(self.init_from, self.load_settings, self.lora)
        self.load_reference_and_scorer()

    # -- the five switches --------------------------------------------------------------------------------------------

    def episode_advantages(self, rewards: Tensor, rollout: Rollout) -> Tensor:
        """Return the advantage of each completion, shape (episodes,); 0 where its reward is NaN.

        Args:
            rewards: of whole completions, the KL in them where it is paid there; NaN where there is no score.
            rollout: for groups, lengths and baselines.
        """
        return functional.dr_grpo_advantages(rewards, rollout.group)

    def ratio(self, logprobs: PolicyLogprobs) -> Tensor:
        """Return policy / old policy of each token, with gradient, shape (rows, length)."""
        return token_ratio(logprobs.logprobs, logprobs.old_logprobs)

    def objective(self, ratio: Tensor, logprobs: PolicyLogprobs) -> Tensor:
        """Return the loss of each token, shape (rows, length)."""
        clip = (self.clip, self.dual_clip, self.clip_high, self.ratio_cap)
        return clipped_surrogate_loss(ratio, logprobs.advantages, *clip)

    def aggregation(self, learned: Tensor) -> Aggregation:
        """Return how token losses become one: a mean over the tokens of the minibatch."""
        return super().aggregation(learned)

    def kl_loss(self, logprobs: PolicyLogprobs) -> Tensor | None:
        """Return the KL estimate of each token as a loss in nats, shape (rows, length); None where it is no loss."""
        if self.kl_place == "reward" or not self.kl_coef:
            return None
        assert logprobs.reference_logprobs is not None
        estimate = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}[self.kl_place]
        return estimate(logprobs.logprobs, logprobs.reference_logprobs)

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        """Return reference * exp(score / kl_coef), normalised, where all that differs from the policy gradient is
        scale.

        A subclass with other advantages, another aggregation or the KL elsewhere has another optimum, and one that it
        knows it declares.
        """
        changed = any(
            getattr(type(self), name) is not getattr(CriticFreeModule, name)
            for name in ("advantages", "episode_advantages", "objective", "aggregation", "shape_rewards", "kl_place")
        )
        return None if changed else exact_target(problem, self.kl_coef)

    # -- what OnPolicyModule asks for ---------------------------------------------------------------------------------

    def shape_rewards(self, rollout: Rollout) -> Tensor:
        """Return the reward of each token: the score on the last, and the KL where the reward pays it."""
        paid = self.kl_place == "reward" and self.kl_coef != 0
        kl = torch.zeros_like(rollout.old_logprobs)
        if paid:
            assert rollout.reference_logprobs is not None
            kl = kl_k1(rollout.old_logprobs, rollout.reference_logprobs)
        return token_rewards(rollout.scores, kl, rollout.completion_mask, self.kl_coef)

    def advantages(self, rollout: Rollout, rewards: Tensor) -> Advantages:
        """Return the advantage of each token: its completion's."""
        self._check_groups(rollout)
        episodes = self.episode_advantages(rewards.sum(-1), rollout)
        return Advantages(functional.over_tokens(episodes, rollout.completion_mask), None)

    def policy_loss(self, logprobs: PolicyLogprobs) -> Tensor | Loss:
        """Return the loss of each token, shape (rows, length)."""
        values = self.objective(self.ratio(logprobs), logprobs)
        if self.sampler_cap is not None:
            assert logprobs.behaviour_logprobs is not None
            weight = sampler_correction(logprobs.old_logprobs, logprobs.behaviour_logprobs, self.sampler_cap)
            values = values * weight
        kl = self.kl_loss(logprobs)
        return values if kl is None else Loss(values + self.kl_coef * kl, {"kl_loss": kl})

    def _check_groups(self, rollout: Rollout) -> None:
        if self.needs_group and len(rollout.group) and int(torch.bincount(rollout.group).max()) < 2:
            raise ValueError(
                f"{type(self).__name__} compares completions of one prompt, and each prompt has one: set "
                "data.samples_per_prompt to 2 or more"
            )

    def _measure_advantages(self, rollout: Rollout, advantages: Advantages, meter: Any) -> None:
        """Add the share of groups whose scores are all alike: they teach nothing."""
        if self.needs_group:
            informative = functional.informative_groups(rollout.scores, rollout.group)
            meter.add("rollout/frac_score_zero_std", (~informative).double())


def sequence_mean_of_token_means(learned: Tensor) -> Aggregation:
    """Every completion weighs the same, whatever its length (GRPO, GSPO); fully masked rows do not count."""
    weights = learned / learned.sum(-1, keepdim=True).clamp_min(1)
    return Aggregation(weights, learned.any(-1).sum())


def sequence_mean_of_token_sums(learned: Tensor) -> Aggregation:
    """The mean over completions of sums over tokens (RLOO, ReMax); fully masked rows do not count."""
    return Aggregation(learned.float(), learned.any(-1).sum())


def exact_target(problem: EnumeratedProblem, kl_coef: float) -> Tensor | None:
    """Return what maximises E[score] - kl_coef KL(policy || reference): reference * exp(score / kl_coef)."""
    if not kl_coef:
        return None
    return torch.softmax(problem.reference.log() + problem.rewards / kl_coef, -1)
