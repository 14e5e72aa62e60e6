"""Objectives on the margin of a preference pair: each is DPO's loop with another `preference_loss`.

In every docstring a_w and a_l are the log-ratios log policy/reference of chosen and rejected, d = a_w - a_l is the
margin and x = beta d. A soft label is always the expectation over both orders of the pair. The population is all pairs,
drawn alike, each order weighted by its probability of being preferred.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.functional import preference as losses
from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.types import EnumeratedProblem, Loss, PreferenceLogprobs


class ConservativeDPOModule(DPOModule):
    r"""cDPO: DPO that takes a share of the labels to be wrong.

    loss = -(1 - s) log sigmoid(x) - s log sigmoid(-x), s = ``label_smoothing`` (Mitchell 2023, a note on DPO with noisy
    preferences). Policy = reference gives log 2. The margin of a certain label is pulled towards logit(1 - s), never
    beyond.

    Target: no closed form; the minimiser of the population loss. Where labels are noisy already, DPO itself finds the
    rewards and this does not.

    Args:
        label_smoothing: share of labels taken to be wrong; p becomes (1 - s) p + s (1 - p).
    """

    paper = "Mitchell 2023, a note on DPO with noisy preferences"

    def __init__(self, label_smoothing: float = 0.1, **kwargs: Any) -> None:
        super().__init__(label_smoothing=label_smoothing, **kwargs)


class RobustDPOModule(DPOModule):
    r"""Robust DPO: unbiased for the clean labels when each was flipped with a known rate.

    loss = [-(1 - e) log sigmoid(x) + e log sigmoid(-x)] / (1 - 2e), e = ``flip_rate`` (Chowdhury et al., 2403.00409).
    Policy = reference gives log 2. A pair preferred with probability below e has no finite optimum.

    Target: reference * exp(reward / beta), normalised, where the labels are Bradley-Terry ones of the rewards, flipped
    with rate e; of other labels no closed form; the minimiser of the population loss.

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
        clean = (self.smoothed(problem.preference) - self.flip_rate) / (1 - 2 * self.flip_rate)
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
    the authors' practice) or summed as in the paper. Policy = reference gives 1 / (4 beta^2).

    Target: with sums reference * exp(E p / beta), normalised, E p a completion's mean win rate; with averages over n
    tokens reference * exp(n (E p / beta + c)), each prompt's c so that it sums to 1.

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
        """Return reference * exp(n (mean win rate / beta + c)), n the tokens that a log-ratio is averaged over."""
        wins = self.smoothed(problem.preference).mean(-1) / self.beta
        lengths = problem.lengths if self.average else torch.ones_like(problem.lengths)

        def ratios(shift: Tensor) -> Tensor:
            return torch.exp(lengths * (wins + shift))

        return normalised(problem.reference, ratios, -wins.amax(-1, keepdim=True), -wins.amin(-1, keepdim=True))

    @property
    def value_at_reference(self) -> float | None:
        """What each row loses where the policy is the reference."""
        return 1 / (4 * self.beta**2)


class HingeModule(DPOModule):
    r"""SLiC's hinge on the margin, normalised by the reference as in RSO.

    loss = max(0, 1 - x) (Zhao et al., 2305.10425; Liu et al., 2309.06657). Policy = reference gives 1. Beyond
    x = 1 a pair teaches nothing.

    Target: no closed form; any minimiser of the population loss. It follows each pair's likelier label, not how likely
    that is, and need not be unique.
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
    (Ji et al., 2402.00856). Policy = reference gives 2.7612 for e = 1e-3. A pair alone is at its best at
    x = (2 p - 1) logit(1 - e).

    Target: no closed form; the minimiser of the population loss.

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


class AOTModule(DPOModule):
    r"""AOT on pairs: the whole distribution of margins is made to dominate the reference's.

    loss = -log sigmoid(beta (sort(policy margins) - sort(reference margins))) over all pairs of the optimizer step
    (Melnyk et al., 2406.05882). Policy = reference gives log 2. Labels are taken as certain and pairs as equal:
    sorting breaks the pairing that a label or a weight belongs to.

    Target: no closed form; a minimiser of the population loss where every step is the population, of which there are
    several. How pairs meet in smaller steps moves it.
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
    Policy = reference gives log 2. Labels are taken as certain and pairs as equal.

    Target: no closed form; a minimiser of the population loss where every step is the population, of which there are
    several. How pairs meet in smaller steps moves it.
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


class DiscoPOPModule(DPOModule):
    r"""DiscoPOP: a blend of the logistic and the exponential loss that a language model discovered.

    loss = (1 - g)(-log sigmoid(x)) + g e^{-x}, g = sigmoid(x / temperature) (Lu et al., 2406.08414).
    Policy = reference gives (1 + log 2) / 2. Not monotone: about x = 0 its gradient shrinks the margin.

    Target: no closed form; a minimiser of the population loss, which is not convex and has several.

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

    Target: reference * exp(n (reward + c) / beta), each prompt's c so that it sums to 1.
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
        if self.label_smoothing:
            return None

        def ratios(shift: Tensor) -> Tensor:
            return torch.exp(problem.lengths * (problem.rewards + shift) / self.beta)

        lowest, highest = -problem.rewards.amax(-1, keepdim=True), -problem.rewards.amin(-1, keepdim=True)
        return normalised(problem.reference, ratios, lowest, highest)

    @property
    def value_at_reference(self) -> float | None:
        """What each row loses where the policy is the reference."""
        return math.log(2)


class RPOModule(DPOModule):
    r"""DPO with the chosen completion's likelihood, so that its probability cannot fall with the rejected one's.

    loss = DPO - alpha S_w / n_w, S_w the policy's log-probability of the chosen completion of n_w tokens (Pang et al.,
    2404.19733; Liu et al., 2405.16436, use alpha 0.005). Policy = reference gives log 2 + alpha * NLL per token.

    Target: no closed form; the minimiser of the population loss, between DPO's and the chosen completions' frequencies
    over lengths.

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


def normalised(reference: Tensor, ratios: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """Return reference * ratios(c), shape (prompts, completions), each prompt's c in [low, high] so that it sums to 1.

    ``ratios`` must grow with c.
    """
    for _ in range(200):
        middle = (low + high) / 2
        below = (reference * ratios(middle)).sum(-1, keepdim=True) < 1
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    policy = reference * ratios(low)
    return policy / policy.sum(-1, keepdim=True)


def over_orders(logprobs: PreferenceLogprobs, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return the expectation of a loss of (chosen, rejected) log-ratios over both orders of each pair's label."""
    chosen, rejected, p = logprobs.chosen_logratio, logprobs.rejected_logratio, logprobs.target
    return p * loss(chosen, rejected) + (1 - p) * loss(rejected, chosen)
