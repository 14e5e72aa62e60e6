"""Objectives on preference pairs with a reference: each is DPO's loop with another `preference_loss`.

In every docstring u = beta a_w and v = beta a_l are the implicit rewards of chosen and rejected, a the log-ratio
log policy/reference of a completion, d = a_w - a_l the margin and x = beta d.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.functional import preference as losses
from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.types import EnumeratedProblem, Loss, PreferenceLogprobs


class ConservativeDPOModule(DPOModule):
    r"""cDPO: DPO that takes a share of the labels to be wrong.

    loss = -(1 - s) log sigmoid(x) - s log sigmoid(-x), s = ``label_smoothing`` (Mitchell 2023, a note on DPO with noisy
    preferences). Policy = reference gives log 2. The margin is pulled towards logit(1 - s), never beyond; where
    labels are noisy already, DPO itself is calibrated and this is not.

    Args:
        label_smoothing: share of labels taken to be wrong; p becomes (1 - s) p + s (1 - p).
    """

    paper = "Mitchell 2023, a note on DPO with noisy preferences"

    def __init__(self, label_smoothing: float = 0.1, **kwargs: Any) -> None:
        super().__init__(label_smoothing=label_smoothing, **kwargs)


class RobustDPOModule(DPOModule):
    r"""Robust DPO: unbiased for the clean labels when each was flipped with a known rate.

    loss = [-(1 - e) log sigmoid(x) + e log sigmoid(-x)] / (1 - 2e), e = ``flip_rate`` (Chowdhury et al., 2403.00409).
    Policy = reference gives log 2. On labels flipped with rate e its minimiser is DPO's on clean ones. A pair
    preferred with probability below e has no finite optimum.

    Args:
        flip_rate: share of the labels that were flipped, below 0.5.
    """

    paper = "Chowdhury et al. 2024, arXiv 2403.00409"

    def __init__(self, flip_rate: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 <= flip_rate < 0.5:
            raise ValueError(f"flip_rate is {flip_rate}: it must lie in [0, 0.5)")
        self.flip_rate = flip_rate

    def preference_loss(self, logprobs: PreferenceLogprobs) -> Tensor | Loss:
        """Return one loss per pair, shape (pairs,); a soft label is the expectation over both orders."""
        p, margin = logprobs.target, logprobs.margin
        agrees = losses.robust_dpo_loss(margin, self.beta, self.flip_rate)
        return p * agrees + (1 - p) * losses.robust_dpo_loss(-margin, self.beta, self.flip_rate)

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        """Return the policy whose margins are the log-odds of the clean labels, where those are Bradley-Terry."""
        clean = (problem.preference - self.flip_rate) / (1 - 2 * self.flip_rate)
        if bool((clean <= 0).any()):
            return None
        odds = torch.logit(clean)
        rewards = odds[:, :, :1].squeeze(-1)  # against the first completion
        consistent = torch.allclose(odds, rewards[:, :, None] - rewards[:, None, :], atol=1e-9)
        return torch.softmax(problem.reference.log() + rewards / self.beta, -1) if consistent else None

    @property
    def value_at_reference(self) -> float | None:
        """What each row loses where the policy is the reference."""
        return math.log(2)


class IPOModule(DPOModule):
    r"""Identity preference optimisation: margins regressed on a constant, so that they cannot run away.

    loss = (d - 1 / (2 beta))^2, with a_w and a_l averaged over tokens (Azar et al., 2310.12036, Eq. 17; the average is
    the authors' practice) or summed as in the paper. Policy = reference gives 1 / (4 beta^2). With sums and all pairs
    drawn alike the optimum has margins (E p - E p') / beta, E p a completion's mean win rate.

    Args:
        beta: the paper's tau: strength of the pull towards the reference.
        average: divide each side's log-ratio by its length.
    """

    paper = "Azar et al. 2023, arXiv 2310.12036"

    def __init__(self, beta: float = 0.1, average: bool = True, **kwargs: Any) -> None:
        super().__init__(beta=beta, **kwargs)
        self.average = average

    def preference_loss(self, logprobs: PreferenceLogprobs) -> Tensor | Loss:
        """Return one loss per pair, shape (pairs,); a soft label is the expectation over both orders."""
        chosen, rejected, p = logprobs.chosen_logratio, logprobs.rejected_logratio, logprobs.target
        n_w, n_l = (logprobs.chosen_lengths, logprobs.rejected_lengths) if self.average else (None, None)
        agrees = losses.ipo_loss(chosen, rejected, self.beta, n_w, n_l)
        return p * agrees + (1 - p) * losses.ipo_loss(rejected, chosen, self.beta, n_l, n_w)

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        """Return reference * exp(mean win rate / beta), for sums and pairs drawn uniformly."""
        if self.average:
            return None
        wins = problem.preference.mean(-1)
        return torch.softmax(problem.reference.log() + wins / self.beta, -1)

    @property
    def value_at_reference(self) -> float | None:
        """What each row loses where the policy is the reference."""
        return 1 / (4 * self.beta**2)


class HingeModule(DPOModule):
    r"""SLiC's hinge on the margin, normalised by the reference as in RSO.

    loss = max(0, 1 - x) (Zhao et al., 2305.10425; Liu et al., 2309.06657). Policy = reference gives 1. Beyond
    x = 1 a pair teaches nothing; the optimum is the median label's, not the probability's, and need not be unique.
    """

    paper = "Zhao et al. 2023, arXiv 2305.10425"

    def __init__(self, beta: float = 0.05, **kwargs: Any) -> None:
        super().__init__(beta=beta, **kwargs)

    def preference_loss(self, logprobs: PreferenceLogprobs) -> Tensor | Loss:
        """Return one loss per pair, shape (pairs,); a soft label is the expectation over both orders."""
        p, margin = logprobs.target, logprobs.margin
        return p * losses.hinge_loss(margin, self.beta) + (1 - p) * losses.hinge_loss(-margin, self.beta)

    @property
    def value_at_reference(self) -> float | None:
        """What each row loses where the policy is the reference."""
        return 1.0


class EXOModule(DPOModule):
    r"""EXO for pairs: the reverse KL from the policy's preference to the smoothed label.

    loss = sigmoid(x) [log sigmoid(x) - log(1 - e)] + sigmoid(-x) [log sigmoid(-x) - log e], e = ``epsilon``
    (Ji et al., 2402.00856). Policy = reference gives 2.7612 for e = 1e-3.

    Args:
        epsilon: smoothing of the label, above 0.
    """

    paper = "Ji et al. 2024, arXiv 2402.00856"

    def __init__(self, epsilon: float = 1e-3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 < epsilon < 0.5:
            raise ValueError(f"epsilon is {epsilon}: it must lie in (0, 0.5)")
        self.epsilon = epsilon

    def preference_loss(self, logprobs: PreferenceLogprobs) -> Tensor | Loss:
        """Return one loss per pair, shape (pairs,); a soft label is the expectation over both orders."""
        p, margin = logprobs.target, logprobs.margin
        agrees = losses.exo_pair_loss(margin, self.beta, self.epsilon)
        return p * agrees + (1 - p) * losses.exo_pair_loss(-margin, self.beta, self.epsilon)

    @property
    def value_at_reference(self) -> float | None:
        """What each row loses where the policy is the reference."""
        return -math.log(2) - (math.log(1 - self.epsilon) + math.log(self.epsilon)) / 2


class NCAModule(DPOModule):
    r"""NCA for pairs: noise contrast that holds up the chosen completion's own probability.

    loss = -log sigmoid(u) - 1/2 log sigmoid(-u) - 1/2 log sigmoid(-v) (Chen et al., 2402.05369).
    Policy = reference gives 2 log 2.
    """

    paper = "Chen et al. 2024, arXiv 2402.05369"

    def __init__(self, beta: float = 0.01, **kwargs: Any) -> None:
        super().__init__(beta=beta, **kwargs)

    def preference_loss(self, logprobs: PreferenceLogprobs) -> Tensor | Loss:
        """Return one loss per pair, shape (pairs,); a soft label is the expectation over both orders."""
        return _over_orders(logprobs, partial(losses.nca_pair_loss, beta=self.beta))

    @property
    def value_at_reference(self) -> float | None:
        """What each row loses where the policy is the reference."""
        return 2 * math.log(2)


class BCOPairModule(DPOModule):
    r"""BCO on pairs: a binary classifier, good or bad, whose logit is the implicit reward.

    loss = -log sigmoid(u - delta) - log sigmoid(-(v - delta)) (Jung et al., 2404.04656), delta the mean of all
    u and v of the optimizer step, without gradient. Policy = reference gives 2 log 2.
    """

    paper = "Jung et al. 2024, arXiv 2404.04656"
    batch_coupled = True

    def __init__(self, beta: float = 0.01, learning_rate: float = 5e-7, **kwargs: Any) -> None:
        super().__init__(beta=beta, learning_rate=learning_rate, **kwargs)

    def preference_loss(self, logprobs: PreferenceLogprobs) -> Tensor | Loss:
        """Return one loss per pair, shape (pairs,)."""
        chosen, rejected = logprobs.chosen_logratio, logprobs.rejected_logratio
        weights = logprobs.weights / logprobs.weights.sum().clamp_min(1e-12)
        delta = (self.beta * (chosen + rejected) / 2 * weights).sum().detach()
        return _over_orders(logprobs, partial(losses.bco_pair_loss, beta=self.beta, shift=delta))

    @property
    def value_at_reference(self) -> float | None:
        """What each row loses where the policy is the reference."""
        return 2 * math.log(2)


class SPPOModule(DPOModule):
    r"""SPPO with hard labels: one step of self-play, each log-ratio regressed on a constant.

    loss = (a_w - 1 / (2 beta))^2 + (a_l + 1 / (2 beta))^2 (Wu et al., 2405.00675). Policy = reference gives
    1 / (2 beta^2).
    """

    paper = "Wu et al. 2024, arXiv 2405.00675"

    def __init__(self, beta: float = 0.001, **kwargs: Any) -> None:
        super().__init__(beta=beta, **kwargs)

    def preference_loss(self, logprobs: PreferenceLogprobs) -> Tensor | Loss:
        """Return one loss per pair, shape (pairs,); a soft label is the expectation over both orders."""
        return _over_orders(logprobs, partial(losses.sppo_hard_loss, beta=self.beta))

    @property
    def value_at_reference(self) -> float | None:
        """What each row loses where the policy is the reference."""
        return 1 / (2 * self.beta**2)


class AOTModule(DPOModule):
    r"""AOT on pairs: the whole distribution of margins is made to dominate the reference's.

    loss = -log sigmoid(beta (sort(policy margins) - sort(reference margins))) over all pairs of the optimizer step
    (Melnyk et al., 2406.05882). Policy = reference gives log 2. Labels are taken as hard: sorting breaks the
    pairing that a soft label belongs to.
    """

    paper = "Melnyk et al. 2024, arXiv 2406.05882"
    batch_coupled = True
    weighs_rows = False  # a sorted margin belongs to no row

    def __init__(self, beta: float = 0.01, **kwargs: Any) -> None:
        super().__init__(beta=beta, **kwargs)

    def preference_loss(self, logprobs: PreferenceLogprobs) -> Tensor | Loss:
        """Return one loss per rank of the sorted margins, shape (pairs,)."""
        assert logprobs.reference_chosen_logprobs is not None and logprobs.reference_rejected_logprobs is not None
        policy = logprobs.chosen_sequence_logprobs - logprobs.rejected_sequence_logprobs
        reference = logprobs.reference_chosen_logprobs.sum(-1) - logprobs.reference_rejected_logprobs.sum(-1)
        return losses.aot_loss(policy, reference, self.beta)

    @property
    def value_at_reference(self) -> float | None:
        """What each row loses where the policy is the reference."""
        return math.log(2)


class UnpairedAOTModule(DPOModule):
    r"""AOT without pairing: chosen log-ratios dominate rejected ones as distributions.

    loss = -log sigmoid(beta (sort(a_w) - sort(a_l))) over all pairs of the optimizer step (Melnyk et al., 2406.05882).
    Policy = reference gives log 2.
    """

    paper = "Melnyk et al. 2024, arXiv 2406.05882"
    batch_coupled = True
    weighs_rows = False

    def __init__(self, beta: float = 0.01, **kwargs: Any) -> None:
        super().__init__(beta=beta, **kwargs)

    def preference_loss(self, logprobs: PreferenceLogprobs) -> Tensor | Loss:
        """Return one loss per rank of the sorted log-ratios, shape (pairs,)."""
        return losses.aot_unpaired_loss(logprobs.chosen_logratio, logprobs.rejected_logratio, self.beta)

    @property
    def value_at_reference(self) -> float | None:
        """What each row loses where the policy is the reference."""
        return math.log(2)


class APOZeroModule(DPOModule):
    r"""APO-zero, for chosen completions better than the policy's own: chosen goes up, rejected down.

    loss = 1 - sigmoid(u) + sigmoid(v) (D'Oosterlinck et al., 2408.06266). Policy = reference gives 1.
    """

    paper = "D'Oosterlinck et al. 2024, arXiv 2408.06266"

    def __init__(self, learning_rate: float = 2e-7, **kwargs: Any) -> None:
        super().__init__(learning_rate=learning_rate, **kwargs)

    def preference_loss(self, logprobs: PreferenceLogprobs) -> Tensor | Loss:
        """Return one loss per pair, shape (pairs,); a soft label is the expectation over both orders."""
        return _over_orders(logprobs, partial(losses.apo_zero_loss, beta=self.beta))

    @property
    def value_at_reference(self) -> float | None:
        """What each row loses where the policy is the reference."""
        return 1.0


class APODownModule(DPOModule):
    r"""APO-down, for chosen completions worse than the policy's own: both go down, rejected further.

    loss = sigmoid(u) + 1 - sigmoid(x) (D'Oosterlinck et al., 2408.06266). Policy = reference gives 1.
    """

    paper = "D'Oosterlinck et al. 2024, arXiv 2408.06266"

    def __init__(self, learning_rate: float = 2e-7, **kwargs: Any) -> None:
        super().__init__(learning_rate=learning_rate, **kwargs)

    def preference_loss(self, logprobs: PreferenceLogprobs) -> Tensor | Loss:
        """Return one loss per pair, shape (pairs,); a soft label is the expectation over both orders."""
        return _over_orders(logprobs, partial(losses.apo_down_loss, beta=self.beta))

    @property
    def value_at_reference(self) -> float | None:
        """What each row loses where the policy is the reference."""
        return 1.0


class DiscoPOPModule(DPOModule):
    r"""DiscoPOP: a blend of the logistic and the exponential loss that a language model discovered.

    loss = (1 - g)(-log sigmoid(x)) + g e^{-x}, g = sigmoid(x / temperature) (Lu et al., 2406.08414).
    Policy = reference gives (1 + log 2) / 2. Not monotone: about x = 0 its gradient shrinks the margin.

    Args:
        temperature: of the gate g.
    """

    paper = "Lu et al. 2024, arXiv 2406.08414"

    def __init__(self, beta: float = 0.05, temperature: float = 0.05, **kwargs: Any) -> None:
        super().__init__(beta=beta, **kwargs)
        self.temperature = temperature

    def preference_loss(self, logprobs: PreferenceLogprobs) -> Tensor | Loss:
        """Return one loss per pair, shape (pairs,); a soft label is the expectation over both orders."""
        p, margin = logprobs.target, logprobs.margin
        agrees = losses.discopop_loss(margin, self.beta, self.temperature)
        return p * agrees + (1 - p) * losses.discopop_loss(-margin, self.beta, self.temperature)

    @property
    def value_at_reference(self) -> float | None:
        """What each row loses where the policy is the reference."""
        return (1 + math.log(2)) / 2


class LengthNormalizedDPOModule(DPOModule):
    r"""DPO on log-ratios per token, so that length earns nothing.

    loss = -log sigmoid(beta (a_w / n_w - a_l / n_l)), n the lengths in tokens (Lambert et al., 2411.15124).
    Policy = reference gives log 2.
    """

    paper = "Lambert et al. 2024 (Tulu 3), arXiv 2411.15124"

    def __init__(self, beta: float = 5.0, **kwargs: Any) -> None:
        super().__init__(beta=beta, **kwargs)

    def preference_loss(self, logprobs: PreferenceLogprobs) -> Tensor | Loss:
        """Return one loss per pair, shape (pairs,); a soft label is the expectation over both orders."""
        chosen, rejected, p = logprobs.chosen_logratio, logprobs.rejected_logratio, logprobs.target
        n_w, n_l = logprobs.chosen_lengths, logprobs.rejected_lengths
        agrees = losses.length_normalized_dpo_loss(chosen, rejected, n_w, n_l, self.beta)
        return p * agrees + (1 - p) * losses.length_normalized_dpo_loss(rejected, chosen, n_l, n_w, self.beta)

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        """Return reference * exp(n (reward + c) / beta), the constant c of each prompt chosen so that it sums to 1."""

        def ratios(shift: Tensor) -> Tensor:
            return torch.exp(problem.lengths * (problem.rewards + shift) / self.beta)

        lowest, highest = -problem.rewards.amax(-1, keepdim=True), -problem.rewards.amin(-1, keepdim=True)
        return _normalised(problem.reference, ratios, lowest, highest)

    @property
    def value_at_reference(self) -> float | None:
        """What each row loses where the policy is the reference."""
        return math.log(2)


class AlphaDPOModule(DPOModule):
    r"""f-DPO with an alpha-divergence as the leash: between the reverse KL (DPO) and the forward KL.

    loss = -log sigmoid(beta (f(a_w) - f(a_l))), f(a) = (1 - e^{-alpha a}) / alpha (Wang et al., 2309.16240).
    Policy = reference gives log 2.

    Args:
        alpha: towards 0 the reverse KL, 1 the forward KL; above 0.
    """

    paper = "Wang et al. 2023, arXiv 2309.16240"

    def __init__(self, alpha: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if alpha <= 0:
            raise ValueError(f"alpha is {alpha}: it must be positive; its limit 0 is DPOModule")
        self.alpha = alpha

    def preference_loss(self, logprobs: PreferenceLogprobs) -> Tensor | Loss:
        """Return one loss per pair, shape (pairs,); a soft label is the expectation over both orders."""
        return _over_orders(logprobs, partial(losses.alpha_dpo_loss, beta=self.beta, alpha=self.alpha))

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        """Return the policy with beta f(log policy/reference) = reward + c, each prompt's c so that it sums to 1."""
        return _alpha_target(problem, self.beta, self.alpha)

    @property
    def value_at_reference(self) -> float | None:
        """What each row loses where the policy is the reference."""
        return math.log(2)


class ForwardKLDPOModule(DPOModule):
    r"""f-DPO with the forward KL as the leash: no completion of the reference is given up.

    loss = -log sigmoid(beta (f(a_w) - f(a_l))), f(a) = 1 - e^{-a} (Wang et al., 2309.16240).
    Policy = reference gives log 2.
    """

    paper = "Wang et al. 2023, arXiv 2309.16240"

    def preference_loss(self, logprobs: PreferenceLogprobs) -> Tensor | Loss:
        """Return one loss per pair, shape (pairs,); a soft label is the expectation over both orders."""
        return _over_orders(logprobs, partial(losses.forward_kl_dpo_loss, beta=self.beta))

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        """Return the policy with beta (1 - reference/policy) = reward + c, each prompt's c so that it sums to 1."""
        return _alpha_target(problem, self.beta, 1.0)

    @property
    def value_at_reference(self) -> float | None:
        """What each row loses where the policy is the reference."""
        return math.log(2)


class JensenShannonDPOModule(DPOModule):
    r"""f-DPO with the Jensen-Shannon divergence as the leash.

    loss = -log sigmoid(beta (f(a_w) - f(a_l))), f(a) = log 2 + log sigmoid(a) (Wang et al., 2309.16240).
    Policy = reference gives log 2.
    """

    paper = "Wang et al. 2023, arXiv 2309.16240"

    def preference_loss(self, logprobs: PreferenceLogprobs) -> Tensor | Loss:
        """Return one loss per pair, shape (pairs,); a soft label is the expectation over both orders."""
        return _over_orders(logprobs, partial(losses.jensen_shannon_dpo_loss, beta=self.beta))

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        """Return the policy with beta f(log policy/reference) = reward + c, each prompt's c so that it sums to 1."""

        def ratios(shift: Tensor) -> Tensor:
            half = torch.exp((problem.rewards + shift) / self.beta) / 2
            return half / (1 - half)

        highest = self.beta * math.log(2) - problem.rewards.amax(-1, keepdim=True)
        return _normalised(problem.reference, ratios, highest - 100 * self.beta, highest - 1e-12)

    @property
    def value_at_reference(self) -> float | None:
        """What each row loses where the policy is the reference."""
        return math.log(2)


class RPOModule(DPOModule):
    r"""DPO with the chosen completion's likelihood, so that its probability cannot fall with the rejected one's.

    loss = DPO - alpha S_w / n_w, S_w the policy's log-probability of the chosen completion of n_w tokens (Pang et al.,
    2404.19733; Liu et al., 2405.16436, use alpha 0.005). Policy = reference gives log 2 + alpha * NLL per token.

    Args:
        alpha: weight of the likelihood.
    """

    paper = "Pang et al. 2024, arXiv 2404.19733"

    def __init__(self, alpha: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.alpha = alpha

    def preference_loss(self, logprobs: PreferenceLogprobs) -> Tensor | Loss:
        """Return one loss per pair, shape (pairs,); a soft label is the expectation over both orders."""
        p, margin = logprobs.target, logprobs.margin
        sides = (
            (logprobs.chosen_sequence_logprobs, logprobs.chosen_lengths, margin),
            (logprobs.rejected_sequence_logprobs, logprobs.rejected_lengths, -margin),
        )
        agrees, disagrees = (losses.rpo_loss(d, s, n, self.beta, self.alpha) for s, n, d in sides)
        nll = -logprobs.chosen_sequence_logprobs / logprobs.chosen_lengths
        return Loss(p * agrees + (1 - p) * disagrees, {"nll_loss": nll})


def _normalised(reference: Tensor, ratios: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """Return reference * ratios(c), shape (prompts, completions), each prompt's c in [low, high] so that it sums to 1.

    ``ratios`` must grow with c.
    """
    for _ in range(200):
        middle = (low + high) / 2
        below = (reference * ratios(middle)).sum(-1, keepdim=True) < 1
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    policy = reference * ratios(low)
    return policy / policy.sum(-1, keepdim=True)


def _alpha_target(problem: EnumeratedProblem, beta: float, alpha: float) -> Tensor:
    """Return the policy with beta (1 - ratio^-alpha) / alpha = reward + c, ratio = policy / reference."""

    def ratios(shift: Tensor) -> Tensor:
        inside = 1 - alpha * (problem.rewards + shift) / beta
        return inside.clamp_min(1e-300) ** (-1 / alpha)

    highest = beta / alpha - problem.rewards.amax(-1, keepdim=True)
    return _normalised(problem.reference, ratios, highest - beta / alpha * 1e6**alpha, highest)


def _over_orders(logprobs: PreferenceLogprobs, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return the expectation of a loss of (chosen, rejected) log-ratios over both orders of each pair's label."""
    chosen, rejected, p = logprobs.chosen_logratio, logprobs.rejected_logratio, logprobs.target
    return p * loss(chosen, rejected) + (1 - p) * loss(rejected, chosen)
