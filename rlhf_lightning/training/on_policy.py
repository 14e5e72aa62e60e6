"""Policy gradients: rewards, advantages and a loss per token, minibatch after minibatch of a rollout."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlhf_lightning.errors import undefined
from rlhf_lightning.functional.aggregation import token_mean
from rlhf_lightning.functional.policy_gradient import adapted_kl_coef
from rlhf_lightning.models.causal_lm import inference_mode_of
from rlhf_lightning.models.layout import Layout, free_layout, select
from rlhf_lightning.models.sharding import in_step, most_passes
from rlhf_lightning.training.collector import (
    gather_grids,
    last_learned,
    select_episodes,
    without_unscored,
)
from rlhf_lightning.training.gathering import each_share, gathered_rows
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.training.module import as_loss
from rlhf_lightning.training.rollout import RolloutModule
from rlhf_lightning.types import (
    Advantages,
    Aggregation,
    Loss,
    Minibatch,
    PolicyLogprobs,
    PromptBatch,
    Rollout,
    Sequences,
)

FIELDS = {"completion_mask", "logprobs", "entropy", "values", "reference_logprobs"}
"""Grids of a forward that are fields of the rollout; others are slots."""


class OnPolicyModule(RolloutModule):
    """Base of the policy gradients: a rollout becomes rewards, advantages, and a loss per token.

    A family overrides ``shape_rewards``, ``advantages`` and ``policy_loss``. Further override points are
    ``aggregation``, ``score_slots``, ``critic_loss``, ``critic_states``, ``policy_outputs`` and ``measure_advantages``.

    Args:
        kl_coef: KL penalty coefficient, reward units per nat.
        kl_target: sequence KL that the coefficient is steered towards, nats; None keeps the coefficient fixed.
        kl_horizon: episodes over which the coefficient may change by a fifth.
        entropy_coef: weight of the entropy bonus, reward units per nat.
        ppo_epochs: passes over each rollout.
    """

    ranges = {
        "kl_coef": "[0, inf)",
        "kl_target": "(0, inf)",
        "kl_horizon": "(0, inf)",
        "entropy_coef": "(-inf, inf)",
    }
    learns_unscored: ClassVar[bool] = True
    """Whether a completion without a score, whose advantage is 0, takes part in updates all the same: in the KL that is
    a loss, and in what lengths are averaged over."""

    needs_minibatch: bool = False
    """Whether ``policy_loss`` looks at ``logprobs.minibatch``: all episodes of the step, of all ranks."""

    needs_minibatch_logprobs: ClassVar[bool] = False
    """Whether it looks at the policy's current log-probabilities of them too: one more forward without gradient."""

    def __init__(
        self,
        scorer: Any,
        kl_coef: float = 0.05,
        kl_target: float | None = None,
        kl_horizon: int = 10_000,
        entropy_coef: float = 0.0,
        ppo_epochs: int = 4,
        **kwargs: Any,
    ) -> None:
        super().__init__(scorer=scorer, ppo_epochs=ppo_epochs, **kwargs)
        self.kl_coef, self.kl_target, self.kl_horizon = kl_coef, kl_target, kl_horizon
        self.entropy_coef = entropy_coef

    # -- from a rollout to updates ------------------------------------------------------------------------------------

    def learn(self, rollout: Rollout, batch: PromptBatch, meter: Meter) -> float:
        """Shape rewards, take advantages, and make one update per minibatch; return the last gradient norm."""
        self.check_rollout(rollout)
        rewards = self.checked_rewards(rollout)
        advantages = self.advantages(rollout, rewards)
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
        count = float(self.sum_over_ranks(self.aggregation(learned[rows]).divisor))
        cuts = self.cut(rollout.sequences, rows)
        minibatch = self.minibatch_view(rollout, advantages, rows, cuts)
        states = float(self.sum_over_ranks(self.critic_states(rollout)[rows].sum()))
        scale = count / max(states, 1.0)
        loss = partial(self.token_loss_sum, rollout, advantages, minibatch=minibatch, critic_scale=scale)
        losses: list[Callable[[], Tensor]] = [partial(loss, cut, meter) for cut in cuts]
        # Without a backward pass here the gradients of the ranks that have rows would wait for ever.
        missing = max(most_passes(self.policy, len(cuts)), 1) - len(cuts)
        losses += [partial(self._loss_of_nothing, loss, meter)] * missing
        # The rollout's passes go last: where ranks add gradients up after the last one, it must touch every weight.
        return self.update(self.further_losses(batch, count, meter) + losses, count)

    def _loss_of_nothing(self, loss: Callable[[list[int], Meter], Tensor], meter: Meter) -> Tensor:
        """Return a loss that changes nothing, for a rank without rows left while others have some."""
        unused = Meter()
        nothing = 0.0 * loss([0], unused)
        meter.add_nothing(unused)
        return nothing

    def token_loss_sum(
        self,
        rollout: Rollout,
        advantages: Advantages,
        cut: list[int],
        meter: Meter,
        minibatch: Minibatch | None = None,
        critic_scale: float = 1.0,
    ) -> Tensor:
        """Return the weighted sum of a micro-batch's token losses, to be divided by the minibatch's count."""
        layout = self.lay_out(select(rollout.sequences, cut))
        mask, length = layout.completion_mask, layout.completion_mask.shape[1]
        rows = torch.tensor(cut, device=self.device)
        outputs = self.policy_outputs(layout, self.sampling.temperature, with_entropy=self.entropy_coef != 0)
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
            self.invariants.check_ratio(logprobs)
        learned = mask if advantages.learned is None else advantages.learned[rows, :length]
        aggregation = self.aggregation(learned)
        policy = as_loss(self.policy_loss(logprobs))
        total = aggregation.weighted_sum(policy.values)
        for name, values in {"policy_loss": policy.values, **policy.metrics}.items():
            meter.add(name, values, learned)
        if outputs.entropy is not None and self.entropy_coef:
            total = total - self.entropy_coef * aggregation.weighted_sum(outputs.entropy)
        further = self.critic_loss(layout, rows, rollout, advantages, outputs)
        self.measure_update(logprobs, meter)
        for name, values in further.metrics.items():
            meter.add(name, values, mask if values.shape == mask.shape else None)
        total = total + critic_scale * further.values.sum()
        meter.add_ratio("loss", total, aggregation.divisor)
        return total

    def minibatch_view(
        self, rollout: Rollout, advantages: Advantages, rows: list[int], cuts: list[list[int]]
    ) -> Minibatch | None:
        """Return all ranks' episodes of a minibatch; ``rows`` is the place of each of this rank's, -1 of others.

        None unless the class declares that its loss looks at them: nothing is gathered then.
        """
        if not (self.needs_minibatch or self.needs_minibatch_logprobs):
            return None
        assert rollout.episodes is not None
        mask, learned = rollout.completion_mask, advantages.learned
        entropy = torch.zeros_like(rollout.old_logprobs) if rollout.entropy is None else rollout.entropy
        grids = {
            "old_logprobs": rollout.old_logprobs,
            "entropy": entropy,
            "advantages": advantages.advantages,
            "completion_mask": mask,
            "learned": mask if learned is None else learned,
        }
        if rollout.behaviour_logprobs is not None:
            grids["behaviour_logprobs"] = rollout.behaviour_logprobs
        if self.needs_minibatch_logprobs:
            grids["logprobs"] = self._logprobs_now(rollout.sequences, cuts)
        index = torch.tensor(rows, dtype=torch.long, device=self.device)
        width = int(each_share(self, torch.tensor(mask.shape[1], device=self.device)).max())
        episodes = rollout.episodes.to(self.device)
        first = torch.stack([episodes[rollout.group == group].min() for group in rollout.group])
        fields = {
            name: torch.nn.functional.pad(grid[index], (0, width - grid.shape[1])) for name, grid in grids.items()
        } | {"scores": rollout.scores[index], "group": first[index], "episodes": episodes[index]}
        counts = each_share(self, torch.tensor(len(rows), device=self.device)).tolist()
        everyone = {name: gathered_rows(self, values, counts) for name, values in fields.items()}
        numbers, order = everyone.pop("episodes").sort()
        places = torch.full_like(episodes, -1).scatter(0, index, torch.searchsorted(numbers, episodes[index]))
        return Minibatch(rows=places, **{name: values[order] for name, values in everyone.items()})

    def _logprobs_now(self, sequences: Sequences, cuts: list[list[int]]) -> Tensor:
        """Return the policy's log-probabilities as it is, without gradient, shape (episodes, length)."""

        def forward(layout: Layout) -> dict[str, Tensor | None]:
            before_pass()
            return {"logprobs": self.policy(layout, self.sampling.temperature).logprobs}

        idle = partial(self.policy, free_layout().to(self.device), self.sampling.temperature)
        with inference_mode_of(self), in_step(self.policy, idle) as before_pass:
            return gather_grids(sequences, cuts, forward, self.lay_out)["logprobs"].clone()

    # -- override points ----------------------------------------------------------------------------------------------

    def shape_rewards(self, rollout: Rollout) -> Tensor:
        """Return the reward of each token, shape (episodes, length). Called once per rollout."""
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

    def critic_states(self, rollout: Rollout) -> Tensor:
        """Return which states the critic learns from, bool, shape (episodes, states): its loss is a mean over them."""
        return rollout.completion_mask

    def aggregation(self, learned: Tensor) -> Aggregation:
        """Return how token losses become one: a mean over the tokens of the minibatch.

        Args:
            learned: bool, True on the tokens that are learned from, shape (rows, length).
        """
        return token_mean(learned)

    def score_slots(self, rollout: Rollout) -> Tensor | None:
        """Return the slot on which each completion's score must land, shape (episodes,); None where it is spread."""
        return last_learned(rollout.completion_mask)

    def measure_advantages(self, rollout: Rollout, advantages: Advantages, meter: Meter) -> None:
        """Add what describes the advantages, in families that have more to say of them."""

    # -- what must hold, and what is logged ---------------------------------------------------------------------------

    def checked_rewards(self, rollout: Rollout) -> Tensor:
        """Return the shaped rewards, after a check that each score landed on its slot and nowhere else.

        The check differentiates the rewards by the scores, so that ``shape_rewards`` is called once and may scale.
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
        """Log one rollout, and steer the KL coefficient."""
        means = super().log_rollout(meter, norm, episodes, kl_coef=self.kl_coef, **further)
        # A KL that is not finite would stay in the coefficient, and a skipped update would not have been the last.
        if self.kl_target is not None and math.isfinite(means.get("kl", math.nan)):
            self.kl_coef = float(adapted_kl_coef(self.kl_coef, means["kl"], self.kl_target, self.kl_horizon, episodes))
        return means

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the KL coefficient with the counters."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["kl_coef"] = self.kl_coef

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore it."""
        super().on_load_checkpoint(checkpoint)
        self.kl_coef = checkpoint["kl_coef"]
