"""Critic-free methods by name: presets of `CriticFreeModule`, whose settings any YAML can change."""

from __future__ import annotations

from typing import Any, Literal

from rlhf_lightning.functional.logprobs import KLEstimator
from rlhf_lightning.functional.surrogates import AggregationName, RatioName
from rlhf_lightning.modules.critic_free import BaselineName, CriticFreeModule, ScaleName
from rlhf_lightning.training.on_policy import KLPlace, ObjectiveName


class GRPOModule(CriticFreeModule):
    r"""GRPO: scores standardised within their group, the clipped surrogate, and the KL as a loss.

    A = (score - mean_g) / (std_g + scale_epsilon); loss = mean over completions of token means of
    max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip)) + kl_coef k3 (Shao et al., 2402.03300, Eq. 3 and 4). At ratio 1
    and policy = reference the loss is minus the mean advantage, 0.

    Target: no closed form; where its mean update vanishes, found by a solver. Not the KL-regularised optimum: the
    deviation rescales each prompt's scores, and k3's gradient is that of KL(reference || policy).
    """

    paper = "Shao et al. 2024, arXiv 2402.03300"

    def __init__(
        self, scorer: Any, kl_coef: float = 0.04, advantage_scale: ScaleName = "group",
        aggregation: AggregationName = "sequence_mean_token_mean", kl_place: KLPlace = "loss",
        kl_estimator: KLEstimator = "k3", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            scorer=scorer, kl_coef=kl_coef, advantage_scale=advantage_scale, aggregation=aggregation, kl_place=kl_place,
            kl_estimator=kl_estimator, **kwargs,
        )  # fmt: skip


class DrGRPOModule(CriticFreeModule):
    r"""Dr. GRPO: GRPO without its two biases, the deviation and the length of a completion.

    A = score - mean_g; loss = sum over tokens of the clipped surrogate / (completions * max_new_tokens) (Liu et al.,
    2503.20783). No KL unless asked for. At ratio 1 it is the policy gradient of the mean score, scaled by (G - 1) / G.

    Target: reference * exp(score / kl_coef), normalised; without a KL penalty the best completions take all.
    """

    paper = "Liu et al. 2025, arXiv 2503.20783"

    def __init__(
        self, scorer: Any, kl_coef: float = 0.0, aggregation: AggregationName = "constant", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(scorer=scorer, kl_coef=kl_coef, aggregation=aggregation, **kwargs)


class DAPOModule(CriticFreeModule):
    r"""DAPO: GRPO with a higher upper clip, a mean over tokens, groups whose scores differ, and no KL.

    loss = mean over tokens of max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip_high)) (Yu et al., 2503.14476, Eq. 8).
    ``overlong_buffer`` (Eq. 13) and ``mask_truncated`` treat completions near the length limit. At ratio 1 the loss is
    minus the mean advantage over tokens.

    Target: no closed form; where its mean update vanishes, found by a solver. Without a KL penalty the best
    completions take all.
    """

    paper = "Yu et al. 2025, arXiv 2503.14476"

    def __init__(
        self, scorer: Any, kl_coef: float = 0.0, advantage_scale: ScaleName = "group", clip_high: float | None = 0.28,
        dynamic_sampling: bool = True, kl_place: KLPlace = "loss", kl_estimator: KLEstimator = "k3", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            scorer=scorer, kl_coef=kl_coef, advantage_scale=advantage_scale, clip_high=clip_high,
            dynamic_sampling=dynamic_sampling, kl_place=kl_place, kl_estimator=kl_estimator, **kwargs,
        )  # fmt: skip


class LitePPOModule(CriticFreeModule):
    r"""Lite PPO: mean of the group, deviation of the whole batch, mean over tokens; nothing else.

    A = (score - mean_g) / (std of all scores of the rollout + scale_epsilon) (Liu et al., 2508.08221). At ratio 1 the
    gradient is that of -A log policy.

    Target: reference * exp(score / kl_coef), normalised, as rollouts grow: one deviation for all prompts changes the
    step size alone. Without a KL penalty the best completions take all.
    """

    paper = "Liu et al. 2025, arXiv 2508.08221"

    def __init__(self, scorer: Any, kl_coef: float = 0.0, advantage_scale: ScaleName = "batch", **kwargs: Any) -> None:
        super().__init__(scorer=scorer, kl_coef=kl_coef, advantage_scale=advantage_scale, **kwargs)


class GSPOModule(CriticFreeModule):
    r"""GSPO: GRPO with the ratio of whole completions, the geometric mean of token ratios.

    ratio = exp(mean_t(log policy - log old)), clipped within 3e-4 below and 4e-4 above 1 (Zheng et al., 2507.18071,
    Eq. 5 to 7), each token with its own gradient. At ratio 1 its gradient is GRPO's.

    Target: no closed form; where its mean update vanishes, found by a solver: GRPO's optimum at the same kl_coef.
    Without a KL penalty the best completions take all.
    """

    paper = "Zheng et al. 2025, arXiv 2507.18071"

    def __init__(
        self, scorer: Any, kl_coef: float = 0.0, clip: float = 3e-4, clip_high: float | None = 4e-4,
        ratio: RatioName = "sequence", advantage_scale: ScaleName = "group",
        aggregation: AggregationName = "sequence_mean_token_mean", kl_place: KLPlace = "loss",
        kl_estimator: KLEstimator = "k3", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            scorer=scorer, kl_coef=kl_coef, clip=clip, clip_high=clip_high, ratio=ratio,
            advantage_scale=advantage_scale, aggregation=aggregation, kl_place=kl_place,
            kl_estimator=kl_estimator, **kwargs,
        )  # fmt: skip


class CISPOModule(CriticFreeModule):
    r"""CISPO: REINFORCE weighted by a bounded ratio, so that every token keeps its gradient.

    loss = mean over tokens of -sg(min(ratio, cispo_high)) A log policy (MiniMax, 2506.13585, Eq. 4 and 5). At ratio 1
    its gradient is the clipped surrogate's.

    Target: no closed form; where its mean update vanishes, found by a solver: DAPO's optimum at the same kl_coef.
    Without a KL penalty the best completions take all.
    """

    paper = "MiniMax 2025, arXiv 2506.13585"

    def __init__(
        self, scorer: Any, kl_coef: float = 0.0, objective: ObjectiveName = "cispo",
        advantage_scale: ScaleName = "group", kl_place: KLPlace = "loss", kl_estimator: KLEstimator = "k3",
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            scorer=scorer, kl_coef=kl_coef, objective=objective, advantage_scale=advantage_scale, kl_place=kl_place,
            kl_estimator=kl_estimator, **kwargs,
        )  # fmt: skip


class RLOOModule(CriticFreeModule):
    r"""RLOO: each completion is compared with the mean of its siblings, the KL in its reward.

    A = r - mean of the other G - 1 rewards, r = score - kl_coef * sum_t(log policy - log reference); the ratio is the
    whole completion's (Ahmadian et al., 2402.14740). Unbiased.

    Target: reference * exp(score / kl_coef), normalised.
    """

    paper = "Ahmadian et al. 2024, arXiv 2402.14740"

    def __init__(
        self, scorer: Any, kl_coef: float = 0.03, baseline: BaselineName = "leave_one_out",
        ratio: RatioName = "sequence_product", aggregation: AggregationName = "sequence_mean_token_sum", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            scorer=scorer, kl_coef=kl_coef, baseline=baseline, ratio=ratio, aggregation=aggregation, **kwargs,
        )  # fmt: skip


class ReinforcePlusPlusModule(CriticFreeModule):
    r"""REINFORCE++: rewards to go with the KL in them, whitened over all tokens of the rollout; no groups.

    A_t = whitened sum_{s >= t} gamma^(s-t) reward_s (Hu et al., 2501.03262). At ratio 1 the loss is 0.

    Target: reference * exp(score / kl_coef), normalised, as rollouts grow: whitening shifts and scales all tokens
    alike. Discounted it has no closed form.
    """

    paper = "Hu et al. 2025, arXiv 2501.03262"

    def __init__(
        self, scorer: Any, kl_coef: float = 0.01, baseline: BaselineName = "none",
        credit: Literal["completion", "reward_to_go"] = "reward_to_go", whiten_advantages: bool = True, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            scorer=scorer, kl_coef=kl_coef, baseline=baseline, credit=credit, whiten_advantages=whiten_advantages,
            **kwargs,
        )  # fmt: skip


class ReinforcePlusPlusBaselineModule(CriticFreeModule):
    r"""REINFORCE++-baseline: score minus the group's mean, whitened over all tokens; the KL (k2) as a loss.

    A = whitened (score - mean_g) (Hu et al., 2501.03262). At ratio 1 and policy = reference the loss is 0.

    Target: no closed form; where its mean update vanishes, found by a solver. Not the KL-regularised optimum: k2 holds
    each token to the reference, without regard to the tokens that follow.
    """

    paper = "Hu et al. 2025, arXiv 2501.03262"

    def __init__(
        self, scorer: Any, kl_coef: float = 0.01, whiten_advantages: bool = True, kl_place: KLPlace = "loss",
        kl_estimator: KLEstimator = "k2", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            scorer=scorer, kl_coef=kl_coef, whiten_advantages=whiten_advantages, kl_place=kl_place,
            kl_estimator=kl_estimator, **kwargs,
        )  # fmt: skip


class ReMaxModule(CriticFreeModule):
    r"""ReMax: the baseline is the score of the greedy completion of the same prompt, one more decode a prompt.

    loss = mean over completions of -(r - score of greedy) log policy, r = score - kl_coef * sum_t KL (Li et al.,
    2310.10505, Algorithm 1). Unbiased.

    Target: reference * exp(score / kl_coef), normalised.
    """

    paper = "Li et al. 2023, arXiv 2310.10505"

    def __init__(
        self, scorer: Any, kl_coef: float = 0.05, baseline: BaselineName = "greedy", ratio: RatioName = "none",
        objective: ObjectiveName = "reinforce", aggregation: AggregationName = "sequence_mean_token_sum", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            scorer=scorer, kl_coef=kl_coef, baseline=baseline, ratio=ratio, objective=objective,
            aggregation=aggregation, **kwargs,
        )  # fmt: skip
