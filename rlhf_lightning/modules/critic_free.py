"""Policy gradients without a critic: one class whose settings cover the published methods (see `grpo`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_lightning.functional.logprobs import masked_whiten
from rlhf_lightning.functional.policy_gradient import (
    discounted_returns,
    greedy_advantages,
    group_deviation,
    group_mean_advantages,
    informative_groups,
    leave_one_out_advantages,
    over_tokens,
    token_rewards,
    turn_returns,
)
from rlhf_lightning.loading import refuse_contradictions
from rlhf_lightning.training.collector import Samples, gathered_numbers, joined, select_prompts
from rlhf_lightning.training.gathering import summed_over_ranks
from rlhf_lightning.training.meter import moments_over_ranks
from rlhf_lightning.training.on_policy import OnPolicyModule
from rlhf_lightning.training.token_rewards import with_token_rewards
from rlhf_lightning.types import Advantages, LeftOut, PromptBatch, Rollout

BaselineName = Literal["group_mean", "leave_one_out", "greedy", "none"]
ScaleName = Literal["group", "batch", "none"]


class CriticFreeModule(OnPolicyModule):
    r"""Policy gradient with a baseline from other samples; the default is REINFORCE with the group's mean.

    loss = aggregation(objective(ratio, A) + kl_coef * KL loss), A = (reward - baseline) / scale. By default the
    baseline is the mean score of the group, ratios are per token, the objective is the clipped surrogate, the
    aggregation is the mean over tokens, and the KL penalty is in the reward. At ratio 1 the gradient is that of -A log
    policy.

    Target: reference * exp(score / kl_coef), normalised, in the limit of large rollouts; without a KL penalty, all
    probability goes to the completions with the highest score.

    Args:
        baseline: value subtracted from a completion's reward. "group_mean": the mean over its prompt's completions
            (2402.03300); "leave_one_out": the mean over the prompt's other completions (RLOO, 2402.14740); "greedy":
            the score of the prompt's greedy completion (ReMax, 2310.10505), one more decode per prompt; "none": 0.
        advantage_scale: divisor of the difference. "group": the standard deviation of the prompt's rewards (GRPO);
            "batch": the standard deviation over the whole rollout (Lite PPO, 2508.08221); "none": 1.
        scale_epsilon: added to the standard deviation.
        scale_unbiased: divide by n - 1 instead of n in the variance.
        credit: how tokens share rewards. "completion" gives each token its completion's advantage; "reward_to_go" the
            sum of the rewards from that token on, discounted by ``gamma`` (REINFORCE++, 2501.03262); "turn" gives each
            token the advantage of its turn in an environment: the rewards from that turn on, compared with the same
            turn of other episodes (2505.11821).
        gamma: discount, per token for "reward_to_go" and per turn for "turn".
        whiten_advantages: give advantages zero mean and unit variance over all tokens of the rollout.
        mask_truncated: exclude completions without an end token from the loss (DAPO, 2503.14476).
        dynamic_sampling: keep only groups with different scores (DAPO); needs candidate prompts, see
            ``PromptDataModule.candidate_rounds``.
    """

    paper = "Williams 1992; Ahmadian et al. 2024, arXiv 2402.14740"
    ranges = {"scale_epsilon": "[0, inf)", "gamma": "[0, 1]"}

    def __init__(
        self, scorer: Any, baseline: BaselineName = "group_mean", advantage_scale: ScaleName = "none",
        scale_epsilon: float = 1e-4, scale_unbiased: bool = True,
        credit: Literal["completion", "reward_to_go", "turn"] = "completion", gamma: float = 1.0,
        whiten_advantages: bool = False, mask_truncated: bool = False, dynamic_sampling: bool = False,
        ppo_epochs: int = 1, learning_rate: float = 1e-6, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(scorer=scorer, ppo_epochs=ppo_epochs, learning_rate=learning_rate, **kwargs)
        self.baseline, self.advantage_scale = baseline, advantage_scale
        self.scale_epsilon, self.scale_unbiased = scale_epsilon, scale_unbiased
        self.credit, self.gamma, self.whiten_advantages = credit, gamma, whiten_advantages
        self.mask_truncated, self.dynamic_sampling = mask_truncated, dynamic_sampling
        self._rounds = 0
        refuse_contradictions(_contradictions(self))

    @property
    def needs_group(self) -> bool:  # type: ignore[override]
        """Whether advantages compare several completions of one prompt."""
        compares = self.baseline in ("group_mean", "leave_one_out") or self.advantage_scale == "group"
        return compares or self.dynamic_sampling or self.score_rule.in_groups

    @property
    def has_centred_loss(self) -> bool:  # type: ignore[override]
        """Whether advantages sum to 0 over each group or over the rollout."""
        return self.baseline in ("group_mean", "leave_one_out") or self.whiten_advantages

    @property
    def holds_reference(self) -> bool:
        """Whether a KL to the reference is measured or penalised."""
        return self.needs_reference and (self.kl_coef != 0 or self.kl_target is not None)

    @property
    def discounts(self) -> bool:
        return self.credit != "completion" and self.gamma != 1

    @property
    def samples_ahead(self) -> bool:
        return not self.dynamic_sampling and self.baseline != "greedy"

    # -- advantages ---------------------------------------------------------------------------------------------------

    def shape_rewards(self, rollout: Rollout) -> Tensor:
        rewards = token_rewards(rollout.scores, self.reward_kl(rollout), rollout.completion_mask, self.kl_coef)
        return with_token_rewards(rewards, rollout)

    def episode_advantages(self, rewards: Tensor, rollout: Rollout) -> Tensor:
        """Return the advantage of each completion, (reward - baseline) / scale, shape (episodes,); 0 for NaN rewards.

        Args:
            rewards: reward per completion, with the KL penalty if it is in the reward; NaN without a score.
            rollout: provides groups, lengths and baselines.
        """
        if self.baseline == "greedy":
            assert rollout.baseline_scores is not None
            centred = greedy_advantages(rewards, rollout.baseline_scores)
        elif self.baseline == "none":
            centred = torch.nan_to_num(rewards)
        elif self.baseline == "leave_one_out":
            centred = leave_one_out_advantages(rewards, rollout.group)
        else:
            centred = group_mean_advantages(rewards, rollout.group)
        if self.advantage_scale == "none" or self.score_rule.in_groups:  # in_groups: parts are already scaled
            return centred
        if self.advantage_scale == "group":
            deviation = group_deviation(rewards, rollout.group, self.scale_unbiased)
        else:
            deviation = self._batch_deviation(rewards)
        return centred / (deviation + self.scale_epsilon)

    def _batch_deviation(self, rewards: Tensor) -> Tensor:
        """Return the standard deviation of the rewards over all ranks, a scalar."""
        scorable = ~rewards.isnan()
        _, variance = moments_over_ranks(self.trainer.strategy, torch.nan_to_num(rewards), scorable)
        if self.scale_unbiased:
            count = summed_over_ranks(self, scorable.sum())
            variance = variance * count / (count - 1).clamp_min(1)
        return variance.sqrt().to(rewards)

    def advantages(self, rollout: Rollout, rewards: Tensor) -> Advantages:
        mask = rollout.completion_mask
        scorable = mask & ~rollout.scores.isnan().unsqueeze(-1)
        if self.credit == "reward_to_go":
            advantages = discounted_returns(torch.nan_to_num(rewards), scorable, self.gamma)
        elif self.credit == "turn":
            advantages = self._turn_advantages(rewards, rollout)
        else:
            advantages = over_tokens(self.episode_advantages(rewards.sum(-1), rollout), mask)
        if self.whiten_advantages:
            mean, variance = moments_over_ranks(self.trainer.strategy, advantages, scorable)
            advantages = masked_whiten(advantages, scorable, mean=mean, var=variance)
        learned = mask & rollout.finished.unsqueeze(-1) if self.mask_truncated else None
        return Advantages(advantages, None, learned)

    def _turn_advantages(self, rewards: Tensor, rollout: Rollout) -> Tensor:
        """Return the advantage of each token's turn, compared with the same turn of other episodes."""
        returns, turn = turn_returns(rewards, rollout.completion_mask, self.gamma)
        most = max(gathered_numbers(self, [returns.shape[1]]))  # equal counts keep the ranks' collectives in step
        missing = returns.new_full((len(returns), most - returns.shape[1]), torch.nan)
        columns = torch.cat([returns, missing], 1).unbind(1)
        found = torch.stack([self.episode_advantages(column, rollout) for column in columns], 1)
        return torch.where(rollout.completion_mask, found.gather(1, turn), 0.0)

    def reaches_kl_optimum(self) -> bool:
        every = not (self.mask_truncated or self.dynamic_sampling)
        return super().reaches_kl_optimum() and self.advantage_scale != "group" and self.gamma == 1 and every

    # -- samples ------------------------------------------------------------------------------------------------------

    def draw(self, batches: Sequence[PromptBatch]) -> Samples:
        """Sample and score a completion for each prompt; with a greedy baseline also one greedy completion."""
        drawn = self._draw_informative(batches) if self.dynamic_sampling else super().draw(batches)
        if self.baseline != "greedy":
            return drawn
        group = drawn.batch.group.tolist()
        batch = select_prompts(drawn.batch, [group.index(g) for g in range(max(group, default=-1) + 1)])
        greedy = self.collector.sample(self.policy, self.tokenizer, batch, replace(self.sampling, temperature=0.0))
        scores = self.collector.judge(self.tokenizer, greedy, batch).scores
        return drawn._replace(baseline_scores=scores[drawn.batch.group])

    def _draw_informative(self, batches: Sequence[PromptBatch]) -> Samples:
        """Sample rounds of candidate prompts until enough groups with different scores fill the rollout.

        Groups are taken in the order of their episodes, so that the choice does not depend on the number of ranks. If
        the candidates run out, groups with equal scores fill the rollout: they have no gradient.
        """
        wanted = len(gathered_numbers(self, batches[0].group.unique().tolist()))
        drawn: list[Samples] = []
        informative: list[int] = []
        for batch in batches:
            one = super().draw([batch])
            drawn.append(one)
            informative += gathered_numbers(self, _first_episodes(one, self._informative(one)))
            if len(informative) >= wanted:
                break
        self._rounds = len(drawn)
        every = sorted(gathered_numbers(self, [first for one in drawn for first in _first_episodes(one)]))
        kept = sorted(informative)[:wanted]
        kept += [first for first in every if first not in set(informative)][: wanted - len(kept)]
        rows = [_rows_of(one, set(kept)) for one in drawn]
        rest = [sorted(set(range(len(one.scores))) - set(taken)) for one, taken in zip(drawn, rows, strict=True)]
        dropped = joined(list(zip(drawn, rest, strict=True)))
        taken = joined(list(zip(drawn, rows, strict=True)))
        return taken._replace(left_out=LeftOut(dropped.batch.row_ids, dropped.scores))

    def _informative(self, drawn: Samples | Rollout) -> Tensor:
        """Return whether each group has a gradient: its scores differ, or a part that is standardised."""
        group = drawn.batch.group if isinstance(drawn, Samples) else drawn.group
        found = informative_groups(drawn.scores, group)
        for values in self.score_rule.learned(drawn.parts) if self.score_rule.in_groups else ():
            found = found | informative_groups(values, group)
        return found

    def measure_advantages(self, rollout: Rollout, advantages: Advantages, meter: Any) -> None:
        """Record the share of groups with equal scores, which have no gradient, and the rounds of dynamic sampling."""
        if self.needs_group:
            meter.add("rollout/frac_score_zero_std", (~self._informative(rollout)).double())
        if self.dynamic_sampling:
            meter.add("rollout/sampling_rounds", torch.tensor(float(self._rounds)))


def _contradictions(m: CriticFreeModule) -> dict[str, tuple[bool, str]]:
    """Return, by error code, whether two settings contradict each other, and the message."""
    return {
        "baseline-of-reward-to-go": (
            m.credit == "reward_to_go" and (m.baseline, m.advantage_scale) != ("none", "none"),
            f"credit is reward_to_go, baseline {m.baseline} and advantage_scale {m.advantage_scale}: rewards to go "
            "have no baseline by completion; set both to none, and whiten_advantages to center them",
        ),
        "normalized-baseline": (
            m.score_rule.normalizes and m.baseline == "greedy",
            f"parts.normalize is {m.score_rule.settings.normalize} and baseline greedy, whose scores are not "
            "normalized: set baseline group_mean",
        ),
        "greedy-turns": (
            m.credit == "turn" and m.baseline == "greedy",
            "credit is turn and baseline greedy, which has one score per completion: set another baseline",
        ),
        "discount-without-tokens": (
            m.credit == "completion" and m.gamma != 1,
            f"gamma is {m.gamma} and credit completion, which does not discount: set credit to reward_to_go or turn",
        ),
    }


def _first_episodes(drawn: Samples, informative: Tensor | None = None) -> list[int]:
    """Return the number of the first episode of each group, or of the informative groups only."""
    groups = int(drawn.batch.group.max()) + 1
    wanted = [True] * groups if informative is None else informative.tolist()
    return [int(drawn.batch.episodes[drawn.batch.group == g].min()) for g in range(groups) if wanted[g]]


def _rows_of(drawn: Samples, firsts: set[int]) -> list[int]:
    """Return the rows of the groups that begin with these episodes."""
    group = drawn.batch.group
    kept = {g for g, first in enumerate(_first_episodes(drawn)) if first in firsts}
    return [row for row, g in enumerate(group.tolist()) if g in kept]
