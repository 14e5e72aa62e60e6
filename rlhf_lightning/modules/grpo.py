"""The critic-free methods by name: each is `CriticFreeModule` with one or two of its five switches set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.functional import critic_free as functional
from rlhf_lightning.modules.critic_free import (
    CriticFreeModule,
    exact_target,
    sequence_mean_of_token_means,
    sequence_mean_of_token_sums,
)
from rlhf_lightning.training.gathering import summed_over_ranks
from rlhf_lightning.training.meter import moments_over_ranks
from rlhf_lightning.training.rollouts import Aggregation, Drawn, gathered_numbers, joined, select_prompts
from rlhf_lightning.types import Advantages, EnumeratedProblem, PolicyLogprobs, PromptBatch, Rollout


class GRPOModule(CriticFreeModule):
    r"""GRPO: scores standardised within their group, the clipped surrogate, and the KL as a loss.

    A = (score - mean_g) / (std_g + epsilon); loss = mean over completions of token means of
    max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip)) + kl_coef k3 (Shao et al., 2402.03300, Eq. 3 and 4). At ratio 1
    and policy = reference the loss is minus the mean advantage, 0.

    Target: no closed form; where its mean update vanishes, found by a solver. Not the KL-regularised optimum: the
    deviation rescales each prompt's scores, and k3's gradient is that of KL(reference || policy).

    Args:
        epsilon: added to a group's deviation.
        unbiased: divide by G - 1 in the deviation.
    """

    paper = "Shao et al. 2024, arXiv 2402.03300"
    kl_place = "k3"

    def __init__(
        self, scorer: Any, kl_coef: float = 0.04, epsilon: float = 1e-4, unbiased: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(scorer=scorer, kl_coef=kl_coef, **kwargs)
        self.epsilon, self.unbiased = epsilon, unbiased

    def episode_advantages(self, rewards: Tensor, rollout: Rollout) -> Tensor:
        """Return scores standardised within their group, shape (episodes,)."""
        return functional.grpo_advantages(rewards, rollout.group, self.epsilon, self.unbiased)

    def aggregation(self, learned: Tensor) -> Aggregation:
        """Every completion weighs the same."""
        return sequence_mean_of_token_means(learned)


class DrGRPOModule(CriticFreeModule):
    r"""Dr. GRPO: GRPO without its two biases, the deviation and the length of a completion.

    A = score - mean_g; loss = sum over tokens of the clipped surrogate / (completions * max_new_tokens) (Liu et al.,
    2503.20783). No KL unless asked for. At ratio 1 it is the policy gradient of the mean score,
    scaled by (G - 1) / G.

    Target: reference * exp(score / kl_coef), normalised; without a leash the best completions take all.
    """

    paper = "Liu et al. 2025, arXiv 2503.20783"

    def __init__(self, scorer: Any, kl_coef: float = 0.0, **kwargs: Any) -> None:
        super().__init__(scorer=scorer, kl_coef=kl_coef, **kwargs)

    def aggregation(self, learned: Tensor) -> Aggregation:
        """Divide by a constant for each completion, masked or not, so that length has no say."""
        return Aggregation(learned / self.sampling.max_new_tokens, torch.tensor(float(len(learned))))

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        """Return reference * exp(score / kl_coef), normalised; without a leash the best completions take all."""
        return exact_target(problem, self.kl_coef)


class DAPOModule(CriticFreeModule):
    r"""DAPO: GRPO with a higher upper clip, a mean over tokens, groups that teach something, and no KL.

    loss = mean over tokens of max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip_high)) (Yu et al., 2503.14476, Eq. 8).
    A completion that nears the length limit loses up to 1 of its score (Eq. 13). At ratio 1 the loss is minus the mean
    advantage over tokens.

    Target: no closed form; where its mean update vanishes, found by a solver. Without a leash the best completions take
    all.

    Args:
        dynamic_sampling: keep only groups whose scores differ; needs candidate prompts, see
            ``PromptDataModule.candidate_rounds``.
        overlong_buffer: tokens before the limit over which the punishment grows to 1; None does not punish.
        overlong_filter: learn nothing from completions that did not end by themselves.
    """

    paper = "Yu et al. 2025, arXiv 2503.14476"
    kl_place = "k3"

    def __init__(
        self,
        scorer: Any,
        kl_coef: float = 0.0,
        clip_high: float | None = 0.28,
        dynamic_sampling: bool = True,
        overlong_buffer: int | None = None,
        overlong_filter: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(scorer=scorer, kl_coef=kl_coef, clip_high=clip_high, **kwargs)
        if overlong_buffer is not None and not 0 < overlong_buffer <= self.sampling.max_new_tokens:
            raise ValueError(
                f"overlong_buffer is {overlong_buffer}: it must lie between 1 and max_new_tokens "
                f"({self.sampling.max_new_tokens})"
            )
        self.dynamic_sampling, self.overlong_buffer = dynamic_sampling, overlong_buffer
        self.overlong_filter = overlong_filter
        self._rounds = 0

    def episode_advantages(self, rewards: Tensor, rollout: Rollout) -> Tensor:
        """Return scores standardised within their group, shape (episodes,)."""
        return functional.grpo_advantages(rewards, rollout.group)

    def draw(self, batches: Sequence[PromptBatch]) -> Drawn:
        """Sample until there are as many groups that teach something as the rollout has prompts, or no candidates left.

        Groups are taken in the order of their episodes, so that the same ones are kept for any number of ranks. Where
        too few differ, ones that do not fill the rollout: they cost time and change nothing.
        """
        wanted = len(gathered_numbers(self, batches[0].group.unique().tolist()))
        drawn: list[Drawn] = []
        informative: list[int] = []
        for batch in batches if self.dynamic_sampling else batches[:1]:
            one = self._punished(self.collector.draw(self.policy, self.tokenizer, batch))
            drawn.append(one)
            informative += gathered_numbers(self, _first_episodes(one, informative=True))
            if len(informative) >= wanted:
                break
        self._rounds = len(drawn)
        every = sorted(gathered_numbers(self, [first for one in drawn for first in _first_episodes(one)]))
        kept = sorted(informative)[:wanted]
        kept += [first for first in every if first not in set(informative)][: wanted - len(kept)]
        return joined([(one, _rows_of(one, set(kept))) for one in drawn])

    def _punished(self, drawn: Drawn) -> Drawn:
        if self.overlong_buffer is None:
            return drawn
        penalty = functional.overlong_penalty(drawn.samples.lengths, self.sampling.max_new_tokens, self.overlong_buffer)
        return drawn._replace(scores=drawn.scores + penalty)

    def advantages(self, rollout: Rollout, rewards: Tensor) -> Advantages:
        """Return the advantage of each token; overlong completions are left out if asked."""
        advantages = super().advantages(rollout, rewards)
        if not self.overlong_filter:
            return advantages
        return advantages._replace(learned=rollout.completion_mask & rollout.finished.unsqueeze(-1))

    def _measure_advantages(self, rollout: Rollout, advantages: Advantages, meter: Any) -> None:
        super()._measure_advantages(rollout, advantages, meter)
        meter.add("rollout/sampling_rounds", torch.tensor(float(self._rounds)))


def _first_episodes(drawn: Drawn, informative: bool = False) -> list[int]:
    """Number of the first episode of each group, of those alone whose scores differ if asked."""
    groups = int(drawn.batch.group.max()) + 1
    wanted = functional.informative_groups(drawn.scores, drawn.batch.group).tolist() if informative else [True] * groups
    return [int(drawn.batch.episodes[drawn.batch.group == g].min()) for g in range(groups) if wanted[g]]


def _rows_of(drawn: Drawn, firsts: set[int]) -> list[int]:
    """Rows of the groups whose first episode is named."""
    group = drawn.batch.group
    kept = {g for g, first in enumerate(_first_episodes(drawn)) if first in firsts}
    return [row for row, g in enumerate(group.tolist()) if g in kept]


class LitePPOModule(CriticFreeModule):
    r"""Lite PPO: mean of the group, deviation of the whole batch, mean over tokens; nothing else.

    A = (score - mean_g) / (std of all scores of the rollout + epsilon) (Liu et al., 2508.08221). At ratio 1 the
    gradient is that of -A log policy.

    Target: reference * exp(score / kl_coef), normalised, as rollouts grow: one deviation for all prompts is a matter of
    step size. Without a leash the best completions take all.

    Args:
        epsilon: added to the deviation.
        unbiased: divide by n - 1 in the deviation.
    """

    paper = "Liu et al. 2025, arXiv 2508.08221"

    def __init__(
        self, scorer: Any, kl_coef: float = 0.0, epsilon: float = 1e-4, unbiased: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(scorer=scorer, kl_coef=kl_coef, **kwargs)
        self.epsilon, self.unbiased = epsilon, unbiased

    def episode_advantages(self, rewards: Tensor, rollout: Rollout) -> Tensor:
        """Return advantages, shape (episodes,); the deviation is over all ranks."""
        scorable = ~rewards.isnan()
        _, variance = moments_over_ranks(self.trainer.strategy, torch.nan_to_num(rewards), scorable)
        count = summed_over_ranks(self, scorable.sum())
        if self.unbiased:
            variance = variance * count / (count - 1).clamp_min(1)
        std = variance.sqrt().to(rewards)
        return functional.lite_ppo_advantages(rewards, rollout.group, self.epsilon, self.unbiased, std)

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        """Return reference * exp(score / kl_coef), normalised: the deviation is one number for all prompts."""
        return exact_target(problem, self.kl_coef)


class GSPOModule(CriticFreeModule):
    r"""GSPO: GRPO with the ratio of whole completions, the geometric mean of token ratios.

    ratio = exp(mean_t(log policy - log old)), clipped within 3e-4 below and 4e-4 above 1 (Zheng et al., 2507.18071,
    Eq. 5 to 7), each token with its own gradient. At ratio 1 its gradient is GRPO's.

    Target: no closed form; where its mean update vanishes, found by a solver: GRPO's place at the same kl_coef. Without
    a leash the best completions take all.
    """

    paper = "Zheng et al. 2025, arXiv 2507.18071"
    kl_place = "k3"

    def __init__(
        self, scorer: Any, kl_coef: float = 0.0, clip: float = 3e-4, clip_high: float | None = 4e-4, **kwargs: Any
    ) -> None:
        super().__init__(scorer=scorer, kl_coef=kl_coef, clip=clip, clip_high=clip_high, **kwargs)

    def episode_advantages(self, rewards: Tensor, rollout: Rollout) -> Tensor:
        """Return scores standardised within their group, shape (episodes,)."""
        return functional.grpo_advantages(rewards, rollout.group)

    def ratio(self, logprobs: PolicyLogprobs) -> Tensor:
        """Return the completion's ratio on each of its tokens, shape (rows, length)."""
        return functional.gspo_token_ratio(logprobs.logprobs, logprobs.old_logprobs, logprobs.completion_mask)

    def aggregation(self, learned: Tensor) -> Aggregation:
        """Every completion weighs the same."""
        return sequence_mean_of_token_means(learned)


class CISPOModule(CriticFreeModule):
    r"""CISPO: REINFORCE weighted by a capped ratio, so that no token loses its gradient.

    loss = mean over tokens of -sg(min(ratio, cap)) A log policy (MiniMax, 2506.13585, Eq. 4 and 5). At ratio 1 its
    gradient is the clipped surrogate's.

    Target: no closed form; where its mean update vanishes, found by a solver: DAPO's place at the same kl_coef. Without
    a leash the best completions take all.

    Args:
        cap: largest weight; 5 in ScaleRL (2510.13786).
    """

    paper = "MiniMax 2025, arXiv 2506.13585"
    kl_place = "k3"

    def __init__(self, scorer: Any, kl_coef: float = 0.0, cap: float = 5.0, **kwargs: Any) -> None:
        super().__init__(scorer=scorer, kl_coef=kl_coef, **kwargs)
        self.cap = cap

    def episode_advantages(self, rewards: Tensor, rollout: Rollout) -> Tensor:
        """Return scores standardised within their group, shape (episodes,)."""
        return functional.grpo_advantages(rewards, rollout.group)

    def objective(self, ratio: Tensor, logprobs: PolicyLogprobs) -> Tensor:
        """Return the loss of each token, shape (rows, length)."""
        return functional.cispo_loss(logprobs.logprobs, logprobs.old_logprobs, logprobs.advantages, self.cap)


class RLOOModule(CriticFreeModule):
    r"""RLOO: each completion is compared with the mean of its siblings, the KL in its reward.

    A = r - mean of the other G - 1 rewards, r = score - kl_coef * sum_t(log policy - log reference); the ratio is the
    whole completion's (Ahmadian et al., 2402.14740). Unbiased.

    Target: reference * exp(score / kl_coef), normalised.
    """

    paper = "Ahmadian et al. 2024, arXiv 2402.14740"

    def __init__(self, scorer: Any, kl_coef: float = 0.03, **kwargs: Any) -> None:
        super().__init__(scorer=scorer, kl_coef=kl_coef, **kwargs)

    def episode_advantages(self, rewards: Tensor, rollout: Rollout) -> Tensor:
        """Return leave-one-out advantages, shape (episodes,)."""
        return functional.rloo_advantages(rewards, rollout.group)

    def ratio(self, logprobs: PolicyLogprobs) -> Tensor:
        """Return the completion's ratio on each of its tokens, each with its own gradient, shape (rows, length)."""
        parts = (logprobs.logprobs, logprobs.old_logprobs, logprobs.completion_mask)
        whole = functional.sequence_ratio(*parts).detach().unsqueeze(-1)
        own = torch.exp(logprobs.logprobs - logprobs.logprobs.detach())
        return torch.where(logprobs.completion_mask, whole * own, 1.0)

    def aggregation(self, learned: Tensor) -> Aggregation:
        """The mean over completions of sums over tokens: the policy gradient of whole completions."""
        return sequence_mean_of_token_sums(learned)

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        """Return reference * exp(score / kl_coef), normalised."""
        return exact_target(problem, self.kl_coef)


class ReinforcePlusPlusModule(CriticFreeModule):
    r"""REINFORCE++: rewards to go with the KL in them, whitened over all tokens of the rollout; no groups.

    A_t = whitened sum_{s >= t} gamma^(s-t) reward_s (Hu et al., 2501.03262). At ratio 1 the loss is 0.

    Target: reference * exp(score / kl_coef), normalised, as rollouts grow: whitening shifts and scales all tokens
    alike. Discounted it has no closed form.

    Args:
        gamma: discount per token.
    """

    paper = "Hu et al. 2025, arXiv 2501.03262"
    needs_group = False

    def __init__(self, scorer: Any, kl_coef: float = 0.01, gamma: float = 1.0, **kwargs: Any) -> None:
        super().__init__(scorer=scorer, kl_coef=kl_coef, **kwargs)
        self.gamma = gamma

    def advantages(self, rollout: Rollout, rewards: Tensor) -> Advantages:
        """Return whitened rewards to go, shape (episodes, length); 0 where there is no score."""
        mask = rollout.completion_mask & ~rollout.scores.isnan().unsqueeze(-1)
        rewards = torch.nan_to_num(rewards)
        to_go = functional.discounted_returns(rewards, mask, self.gamma)
        mean, variance = moments_over_ranks(self.trainer.strategy, to_go, mask)
        return Advantages(
            functional.reinforce_plus_plus_advantages(rewards, mask, self.gamma, mean=mean, var=variance), None
        )

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        """Return reference * exp(score / kl_coef), normalised: whitening shifts and scales all tokens alike."""
        return exact_target(problem, self.kl_coef) if self.gamma == 1 else None


class ReinforcePlusPlusBaselineModule(CriticFreeModule):
    r"""REINFORCE++-baseline: score minus the group's mean, whitened over all tokens; the KL (k2) as a loss.

    A = whitened (score - mean_g) (Hu et al., 2501.03262). At ratio 1 and policy = reference the loss is 0.

    Target: no closed form; where its mean update vanishes, found by a solver. Not the KL-regularised optimum: k2 holds
    each token to the reference, whatever it leads to.
    """

    paper = "Hu et al. 2025, arXiv 2501.03262"
    kl_place = "k2"

    def __init__(self, scorer: Any, kl_coef: float = 0.01, **kwargs: Any) -> None:
        super().__init__(scorer=scorer, kl_coef=kl_coef, **kwargs)

    def advantages(self, rollout: Rollout, rewards: Tensor) -> Advantages:
        """Return whitened centred scores, shape (episodes, length)."""
        self._check_groups(rollout)
        mask, scores = rollout.completion_mask, rewards.sum(-1)
        scorable = mask & ~scores.isnan().unsqueeze(-1)
        centred = functional.over_tokens(functional.dr_grpo_advantages(scores, rollout.group), mask)
        mean, variance = moments_over_ranks(self.trainer.strategy, centred, scorable)
        whitened = functional.reinforce_plus_plus_baseline_advantages(
            scores, rollout.group, mask, mean=mean, var=variance
        )
        return Advantages(whitened, None)


class ReMaxModule(CriticFreeModule):
    r"""ReMax: the baseline is the score of the greedy completion of the same prompt, one more decode a prompt.

    loss = mean over completions of -(r - score of greedy) log policy, r = score - kl_coef * sum_t KL (Li et al.,
    2310.10505, Algorithm 1). Unbiased.

    Target: reference * exp(score / kl_coef), normalised.
    """

    paper = "Li et al. 2023, arXiv 2310.10505"
    needs_group = False

    def draw(self, batches: Sequence[PromptBatch]) -> Drawn:
        """Sample and score; the greedy completion of each distinct prompt is scored beside them."""
        drawn = super().draw(batches)
        group = drawn.batch.group.tolist()
        firsts = [group.index(g) for g in range(max(group) + 1)]
        batch = select_prompts(drawn.batch, firsts)
        greedy = self.collector.sample(self.policy, self.tokenizer, batch, replace(self.sampling, temperature=0.0))
        scores = self.collector.score(self.tokenizer, greedy, batch)
        return drawn._replace(baseline_scores=scores[drawn.batch.group])

    def episode_advantages(self, rewards: Tensor, rollout: Rollout) -> Tensor:
        """Return reward minus the greedy completion's score, shape (episodes,)."""
        assert rollout.baseline_scores is not None
        return functional.remax_advantages(rewards, rollout.baseline_scores)

    def objective(self, ratio: Tensor, logprobs: PolicyLogprobs) -> Tensor:
        """Return -A log policy of each token, shape (rows, length)."""
        return functional.reinforce_loss(logprobs.logprobs, logprobs.advantages)

    def aggregation(self, learned: Tensor) -> Aggregation:
        """The mean over completions of sums over tokens: the policy gradient of whole completions."""
        return sequence_mean_of_token_sums(learned)

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        """Return reference * exp(score / kl_coef), normalised."""
        return exact_target(problem, self.kl_coef)
