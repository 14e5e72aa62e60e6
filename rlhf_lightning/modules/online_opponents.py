"""Online preference objectives with an opponent: the last round's policy, the reference, or a mixture."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_lightning.errors import SettingError
from rlhf_lightning.functional.logprobs import nash_md_logits
from rlhf_lightning.functional.surrogates import AggregationName, RatioName
from rlhf_lightning.models.frozen import Reference
from rlhf_lightning.modules.critic_free import CriticFreeModule
from rlhf_lightning.modules.online_preference import OnlineDPOModule
from rlhf_lightning.sampling.decoding import Mixture
from rlhf_lightning.training.collector import Samples
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.training.on_policy import ObjectiveName
from rlhf_lightning.training.pairs import tilted
from rlhf_lightning.training.returned_loss import as_loss
from rlhf_lightning.types import (
    Advantages,
    EnumeratedProblem,
    Loss,
    PreferenceLogprobs,
    PromptBatch,
    Rollout,
    Step,
)

OPPONENTS = 2**62
"""Offset added to an episode's number to seed its opponent's sample. Training counts episodes up from 0 and validation
down from -1, so the numbers never collide."""


class IterativeDPOModule(OnlineDPOModule):
    r"""Iterative DPO: rounds of sampling and training; each round's reference is the policy at the last round's end.

    loss = online DPO's on the best and the worst of ``data.samples_per_prompt`` samples, with the reference of the
    round (Xu et al., 2312.16682; Yuan et al., 2401.10020, Section 2.4). Each round resets the optimizer's moments.
    When policy = reference, the loss is log 2.

    Target: with soft labels reference * exp(score / beta), normalised, with the reference of the round. If every round
    converges, the k-th round leads to start * exp(k score / beta).

    Args:
        rollouts_per_round: rollouts per round.
        reference_of_round: "last": the policy at the end of the last round; "start": the model that training started
            from. With an adapter and "last", the reference is a separate model.
    """

    paper = "Xu et al. 2023, arXiv 2312.16682"
    ranges = {"rollouts_per_round": "[1, inf)"}

    def __init__(
        self, rollouts_per_round: int = 50, reference_of_round: Literal["last", "start"] = "last", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if reference_of_round not in ("last", "start"):
            raise SettingError(
                "unknown-choice", f"reference_of_round is {reference_of_round!r}: it must be 'last' or 'start'"
            )
        self.rollouts_per_round, self.reference_of_round = rollouts_per_round, reference_of_round

    @property
    def moves_reference(self) -> bool:
        """Whether each round has its own reference."""
        return self.reference_of_round == "last"

    def load_reference_and_scorer(self) -> None:
        """Load reference and scorer; a reference that changes between rounds is always a separate model."""
        super().load_reference_and_scorer()
        if self.reference is not None and self.reference.copy is None and self.moves_reference:
            self.reference = Reference(self.policy, self.init_from, self.load_settings, own=True)

    def training_step(self, step: Step[PromptBatch], batch_idx: int) -> Any:
        """Begin a new round if due, then collect one rollout and take all its updates."""
        if self.rollouts and self.rollouts % self.rollouts_per_round == 0:
            self.begin_round()
        return super().training_step(step, batch_idx)

    def begin_round(self) -> None:
        """Copy the policy into the reference, and reset the optimizer's moments, which belong to the last loss."""
        if self.moves_reference:
            assert self.reference is not None
            self.reference.follow()
        optimizer: Any = self.optimizers()
        optimizer.optimizer.state.clear()

    def check_rollout(self, rollout: Rollout) -> None:
        """Check a rollout; at the start of a round also check that policy = reference."""
        super().check_rollout(rollout)
        if self.rollouts and self.moves_reference and self.rollouts % self.rollouts_per_round == 0:
            self.invariants.check_first_kl(rollout)


class XPOModule(OnlineDPOModule):
    r"""XPO: online DPO on one sample of the policy and one of the reference, with an exploration bonus.

    loss = DPO(y, y') + alpha log policy(y'), with y from the policy and y' from the reference, chosen and rejected by
    score (Xie et al., 2405.21046, Algorithm 1). When policy = reference, the loss is log 2 + alpha log policy(y'). The
    second of each prompt's two samples is drawn from the reference, with its own episode number and random numbers.

    Target: no closed form; with soft labels it is close to reference * exp(score / beta), and the shift caused by the
    bonus is proportional to alpha.

    Args:
        alpha: weight of the exploration bonus.
    """

    paper = "Xie et al. 2024, arXiv 2405.21046"
    ranges = {"alpha": "[0, inf)"}

    def __init__(self, alpha: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.alpha = alpha

    def by_reference(self, group: Tensor) -> Tensor:
        """Return True for the second sample of each prompt, shape (episodes,)."""
        rows = torch.arange(len(group), device=group.device)
        first = torch.full_like(group, len(group)).scatter_reduce(0, group, rows, "amin")
        return rows != first[group]

    def pair_loss(self, pair: PreferenceLogprobs) -> Tensor | Loss:
        sides = (pair.chosen_sequence_logprobs, pair.rejected_sequence_logprobs)
        explored = torch.where(pair.extras["chosen_by_reference"], *sides)
        dpo = as_loss(super().pair_loss(pair)).values
        return Loss(dpo + self.alpha * explored, {"explored_logprob": explored})

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        """Return online DPO's optimum if alpha is 0; it does not depend on which model drew the samples."""
        known = self.has_losses_of(XPOModule) and not self.alpha and self.soft_labels
        return tilted(problem, self.beta) if known and self.sampling.temperature == 1 else None

    def check_groups(self, rollout: Rollout) -> None:
        """Refuse rollouts without exactly two samples per prompt, one of the policy and one of the reference."""
        super().check_groups(rollout)
        most = int(torch.bincount(rollout.group).max())
        if most != 2:
            raise SettingError(
                "samples-per-prompt",
                f"{type(self).__name__} compares a sample of the policy with one of the reference, but a prompt has "
                f"{most}: set data.samples_per_prompt to 2",
            )


class NashMDModule(CriticFreeModule):
    r"""Nash-MD: policy gradient of the probability to beat an opponent, a mixture of policy and reference.

    loss = -(P(y beats y') - 1/2 - kl_coef log policy(y)/reference(y)) log policy(y), with the bracket without gradient.
    y is drawn from the policy, and y' token by token from policy^{1 - c} reference^c, c = ``mixture``;
    P = sigmoid(score(y) - score(y')) (Munos et al., 2312.00886, Section 7). Opponents have their own random numbers and
    cost one more decode per completion. A KL penalty per token in the loss (``kl_place: loss``, ``kl_estimator: k2``)
    ignores the KL of later tokens and has another optimum.

    Target: no closed form; the fixed point policy = reference * exp(E P(y beats y') / kl_coef), normalised. For c = 0
    it is the Nash equilibrium of the KL-regularised game, for c = 1 the best response to the reference.

    Args:
        scorer: scores completions; score differences are log-odds of winning.
        kl_coef: KL penalty coefficient, in win probability per nat.
        mixture: c, the weight of the reference in the opponent.
    """

    paper = "Munos et al. 2023, arXiv 2312.00886"
    ranges = {"mixture": "[0, 1]"}
    needs_group = False

    def __init__(
        self, scorer: Any, kl_coef: float = 0.1, mixture: float = 0.5, temperature: float = 0.9,
        ratio: RatioName = "none", objective: ObjectiveName = "reinforce",
        aggregation: AggregationName = "sequence_mean_token_sum", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            scorer=scorer, kl_coef=kl_coef, temperature=temperature, baseline="none", advantage_scale="none",
            credit="completion", ratio=ratio, objective=objective, aggregation=aggregation, **kwargs,
        )  # fmt: skip
        self.mixture = mixture

    @property
    def holds_reference(self) -> bool:
        return self.needs_reference  # the opponent needs it

    def draw(self, batches: Sequence[PromptBatch]) -> Samples:
        """Sample and score a completion for each prompt; in training also sample and score an opponent for each."""
        drawn = super().draw(batches)
        if not self.trainer.training:
            return drawn
        return drawn._replace(baseline_scores=self.opponent_scores(drawn.batch))

    def opponent_scores(self, batch: PromptBatch) -> Tensor:
        """Return the score of one opponent completion for each prompt, shape (episodes,)."""
        assert self.reference is not None
        mixture = Mixture(self.reference.as_model, partial(nash_md_logits, mixture=self.mixture))
        theirs = batch._replace(episodes=batch.episodes + OPPONENTS)
        opponents = self.collector.sample(self.policy, self.tokenizer, theirs, mixture=mixture)
        return self.collector.judge(self.tokenizer, opponents, batch).scores

    def win_probability(self, rollout: Rollout) -> Tensor:
        """Return P(y beats y'), shape (episodes,); NaN if either completion has no score."""
        assert rollout.baseline_scores is not None
        lead = rollout.scores - rollout.baseline_scores
        return lead.double().sigmoid().to(lead.dtype)  # double: in float32, devices round sigmoid differently

    def episode_advantages(self, rewards: Tensor, rollout: Rollout) -> Tensor:
        """Return the win probability minus 1/2, with the KL penalty subtracted, shape (episodes,)."""
        return torch.nan_to_num(self.win_probability(rollout) - 0.5 + rewards - rollout.scores)

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        """Return the best response to the reference for c = 1, and the game's equilibrium for c = 0, at temperature 1.

        For other c the opponent is drawn token by token, which an enumerated problem cannot represent.
        """
        if not self.reaches_kl_optimum() or self.mixture not in (0, 1):
            return None
        if self.mixture:
            return self.best_response(problem, problem.reference)
        policy = problem.reference
        for _ in range(10_000):
            policy = (policy + self.best_response(problem, policy)) / 2
        found = bool((policy - self.best_response(problem, policy)).abs().max() < 1e-9)
        return policy if found else None  # with a weak KL penalty the half-steps can cycle around the equilibrium

    def best_response(self, problem: EnumeratedProblem, opponent: Tensor) -> Tensor:
        """Return the policy that maximises E P(y beats y') - kl_coef KL(policy || reference) for a fixed opponent.

        Args:
            problem: the enumerated problem.
            opponent: probability of each completion, shape (prompts, completions).
        """
        wins = (problem.preference * opponent.unsqueeze(1)).sum(-1)
        return torch.softmax(problem.reference.log() + wins / self.kl_coef, -1)

    def measure_advantages(self, rollout: Rollout, advantages: Advantages, meter: Meter) -> None:
        """Record the policy's win rate against its opponent."""
        wins = self.win_probability(rollout)
        meter.add("rollout/win_rate", wins, ~wins.isnan())
