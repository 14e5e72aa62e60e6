"""Critic-free methods by name: presets of `CriticFreeModule` whose settings can all be changed in YAML."""

from __future__ import annotations

from typing import Any, Literal

from rlhf_lightning.functional.logprobs import KLEstimator
from rlhf_lightning.functional.surrogates import AggregationName, RatioName
from rlhf_lightning.modules.critic_free import BaselineName, CriticFreeModule, ScaleName
from rlhf_lightning.training.on_policy import KLPlace, ObjectiveName


class GRPOModule(CriticFreeModule):
    r"""GRPO: scores standardised within their group, the clipped surrogate, and the KL penalty in the loss.

    A = (score - mean_g) / (std_g + scale_epsilon); loss = mean over completions of token means of
    max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip)) + kl_coef k3 (Shao et al., 2402.03300, Eq. 3 and 4). At ratio 1
    and policy = reference the loss is minus the mean advantage, 0.

    Target: no closed form; the policy where its mean update vanishes, found by a numerical solver. It is not the
    KL-regularised optimum: the standard deviation rescales each prompt's scores, and the gradient of k3 is that of
    KL(reference || policy).
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
    r"""Dr. GRPO: GRPO without division by the group's standard deviation and by the completion's length.

    A = score - mean_g; loss = sum over tokens of the clipped surrogate / (completions * max_new_tokens) (Liu et al.,
    2503.20783). kl_coef is 0 by default. At ratio 1 it is the policy gradient of the mean score, scaled by (G - 1) / G.

    Target: reference * exp(score / kl_coef), normalised; without a KL penalty, all probability goes to the completions
    with the highest score.
    """

    paper = "Liu et al. 2025, arXiv 2503.20783"

    def __init__(
        self, scorer: Any, kl_coef: float = 0.0, aggregation: AggregationName = "constant", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(scorer=scorer, kl_coef=kl_coef, aggregation=aggregation, **kwargs)


class DAPOModule(CriticFreeModule):
    r"""DAPO: GRPO with a higher upper clip bound, a mean over tokens, dynamic sampling, and no KL penalty.

    loss = mean over tokens of max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip_high)) (Yu et al., 2503.14476, Eq. 8).
    Dynamic sampling keeps the groups whose scores differ. ``overlong_buffer`` (Eq. 13) and ``mask_truncated`` change
    how completions near the length limit count. At ratio 1 the loss is minus the mean advantage over tokens.

    Target: no closed form; the policy where its mean update vanishes, found by a numerical solver. Without a KL
    penalty, all probability goes to the completions with the highest score.
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
    r"""Lite PPO: the group's mean as baseline, the batch's standard deviation as scale, and a mean over tokens.

    A = (score - mean_g) / (std of all scores of the rollout + scale_epsilon) (Liu et al., 2508.08221). At ratio 1 the
    gradient is that of -A log policy.

    Target: reference * exp(score / kl_coef), normalised, in the limit of large rollouts: one standard deviation for all
    prompts changes only the step size. Without a KL penalty, all probability goes to the completions with the highest
    score.
    """

    paper = "Liu et al. 2025, arXiv 2508.08221"

    def __init__(self, scorer: Any, kl_coef: float = 0.0, advantage_scale: ScaleName = "batch", **kwargs: Any) -> None:
        super().__init__(scorer=scorer, kl_coef=kl_coef, advantage_scale=advantage_scale, **kwargs)


class GSPOModule(CriticFreeModule):
    r"""GSPO: GRPO with a ratio per completion, the geometric mean of its token ratios.

    ratio = exp(mean_t(log policy - log old)), clipped to [1 - 3e-4, 1 + 4e-4] (Zheng et al., 2507.18071, Eq. 5 to 7).
    Each token has its own gradient. At ratio 1 the gradient is GRPO's.

    Target: no closed form; the policy where its mean update vanishes, found by a numerical solver. It is GRPO's optimum
    at the same kl_coef. Without a KL penalty, all probability goes to the completions with the highest score.
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
    r"""CISPO: REINFORCE weighted by a ratio with an upper bound, so that every token keeps its gradient.

    loss = mean over tokens of -sg(min(ratio, cispo_high)) A log policy, sg being stop-gradient (MiniMax, 2506.13585,
    Eq. 4 and 5). At ratio 1 the gradient equals the clipped surrogate's.

    Target: no closed form; the policy where its mean update vanishes, found by a numerical solver. It is DAPO's optimum
    at the same kl_coef. Without a KL penalty, all probability goes to the completions with the highest score.
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
    r"""RLOO: the baseline is the mean reward of the prompt's other completions; the KL penalty is in the reward.

    A = r - mean of the other G - 1 rewards, r = score - kl_coef * sum_t(log policy - log reference). The ratio is per
    completion (Ahmadian et al., 2402.14740). The gradient estimate is unbiased.

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
    r"""REINFORCE++: rewards-to-go that include the KL penalty, whitened over all tokens of the rollout, without groups.

    A_t = whitened sum_{s >= t} gamma^(s-t) reward_s (Hu et al., 2501.03262). At ratio 1 the loss is 0.

    Target: reference * exp(score / kl_coef), normalised, in the limit of large rollouts: whitening shifts and scales
    all tokens by the same amounts. With gamma below 1 it has no closed form.
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
    r"""REINFORCE++-baseline: score minus the group's mean, whitened over all tokens; the KL penalty (k2) in the loss.

    A = whitened (score - mean_g) (Hu et al., 2501.03262). At ratio 1 and policy = reference the loss is 0.

    Target: no closed form; the policy where its mean update vanishes, found by a numerical solver. It is not the
    KL-regularised optimum: k2 penalises each token alone and ignores the KL of later tokens.
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
    r"""ReMax: the baseline is the score of the prompt's greedy completion, which costs one more decode per prompt.

    loss = mean over completions of -(r - score of greedy) log policy, r = score - kl_coef * sum_t KL (Li et al.,
    2310.10505, Algorithm 1). The gradient estimate is unbiased.

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
