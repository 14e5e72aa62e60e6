"""Objectives on the margin of a preference pair.

In every docstring a_w and a_l are the log-ratios log policy/reference of chosen and rejected, d = a_w - a_l is the
margin and x the difference of implicit rewards, beta d unless the class says otherwise. Formulas are those of a certain
label; a soft label is the expectation over both orders of the pair. The population is all pairs, drawn alike, each
order weighted by its probability of being preferred.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_lightning.functional.logprobs import MAX_LOG_RATIO
from rlhf_lightning.modules.dpo import DPOModule, normalised
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

    loss = [-(1 - e) log sigmoid(x) + e log sigmoid(-x)] / (1 - 2e), e = ``flip_rate`` (Chowdhury et al., 2403.00409);
    it may be negative. Policy = reference gives log 2. A pair preferred with probability below e has no finite optimum.

    Target: reference * exp(reward / beta), normalised, where the labels are Bradley-Terry ones of the rewards, flipped
    with rate e; of other labels no closed form; the minimiser of the population loss.

    Args:
        flip_rate: share of the labels that were flipped, below 0.5.
    """

    paper = "Chowdhury et al. 2024, arXiv 2403.00409"
    ranges = {"flip_rate": "[0, 0.5)"}

    def __init__(self, flip_rate: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.flip_rate = flip_rate

    def pair_loss(self, pair: PreferenceLogprobs) -> Tensor | Loss:
        """Return the unbiased estimate of DPO's loss on the clean label, shape (pairs,)."""
        x, e = self.reward_margin(pair), self.flip_rate
        return (-(1 - e) * logsigmoid(x) + e * logsigmoid(-x)) / (1 - 2 * e)

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        """Return the policy whose margins are the log-odds of the clean labels, where those are Bradley-Terry."""
        odds = torch.logit((self.smoothed(problem.preference) - self.flip_rate) / (1 - 2 * self.flip_rate))
        rewards = odds[:, :, 0]  # against the first completion
        consistent = torch.allclose(odds, rewards[:, :, None] - rewards[:, None, :], atol=1e-9)
        return torch.softmax(problem.reference.log() + rewards / self.beta, -1) if consistent else None


class IPOModule(DPOModule):
    r"""Identity preference optimisation: margins regressed on a constant, so that they cannot run away.

    loss = (d - 1 / (2 beta))^2, with a_w and a_l averaged over tokens (Azar et al., 2310.12036, Eq. 17; the average is
    the authors' practice) or summed as in the paper. Policy = reference gives 1 / (4 beta^2).

    Target: with sums reference * exp(E p / beta), normalised, E p a completion's mean win rate; with averages over n
    tokens reference * exp(n (E p / beta + c)), each prompt's c so that it sums to 1.

    Args:
        beta: the paper's tau: strength of the pull towards the reference; averages need a larger one.
        average: divide each side's log-ratio by its length.
    """

    paper = "Azar et al. 2023, arXiv 2310.12036"

    def __init__(self, beta: float = 0.1, average: bool = True, **kwargs: Any) -> None:
        super().__init__(beta=beta, **kwargs)
        self.average = average

    def implicit_reward(self, pairs: PreferenceLogprobs) -> tuple[Tensor, Tensor]:
        """Return beta a, divided by the length where log-ratios are averaged."""
        return per_token(pairs, *super().implicit_reward(pairs)) if self.average else super().implicit_reward(pairs)

    def pair_loss(self, pair: PreferenceLogprobs) -> Tensor | Loss:
        """Return ((x - 1/2) / beta)^2, shape (pairs,)."""
        return ((self.reward_margin(pair) - 0.5) / self.beta) ** 2

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        """Return reference * exp(n (mean win rate / beta + c)), n the tokens that a log-ratio is averaged over."""
        lengths = problem.lengths if self.average else torch.ones_like(problem.lengths)
        wins = self.smoothed(problem.preference).mean(-1) / self.beta
        return normalised(problem, wins, lambda shifted: torch.exp(lengths * shifted))


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

    def pair_loss(self, pair: PreferenceLogprobs) -> Tensor | Loss:
        """Return max(0, 1 - x), shape (pairs,)."""
        return torch.relu(1 - self.reward_margin(pair))


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
    ranges = {"epsilon": "(0, 0.5)"}

    def __init__(self, epsilon: float = 1e-3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.epsilon = epsilon

    def pair_loss(self, pair: PreferenceLogprobs) -> Tensor | Loss:
        """Return the KL to the smoothed label, shape (pairs,)."""
        x = self.reward_margin(pair)
        right = torch.sigmoid(x) * (logsigmoid(x) - math.log1p(-self.epsilon))
        return right + torch.sigmoid(-x) * (logsigmoid(-x) - math.log(self.epsilon))


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

    def preference_loss(self, pairs: PreferenceLogprobs) -> Tensor | Loss:
        """Return one loss per rank of the sorted margins, shape (pairs,)."""
        policy = pairs.chosen_sequence_logprobs - pairs.rejected_sequence_logprobs
        reference = policy.detach() - pairs.margin.detach()
        return -logsigmoid(self.beta * (policy.sort().values - reference.sort().values))


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

    def preference_loss(self, pairs: PreferenceLogprobs) -> Tensor | Loss:
        """Return one loss per rank of the sorted log-ratios, shape (pairs,)."""
        return -logsigmoid(self.beta * (pairs.chosen_logratio.sort().values - pairs.rejected_logratio.sort().values))


class DiscoPOPModule(DPOModule):
    r"""DiscoPOP: a blend of the logistic and the exponential loss that a language model discovered.

    loss = (1 - g)(-log sigmoid(x)) + g e^{-x}, g = sigmoid(x / temperature) (Lu et al., 2406.08414).
    Policy = reference gives (1 + log 2) / 2. Not monotone: about x = 0 its gradient shrinks the margin.

    Target: no closed form; a minimiser of the population loss, which is not convex and has several.

    Args:
        temperature: of the gate g.
    """

    paper = "Lu et al. 2024, arXiv 2406.08414"
    ranges = {"temperature": "(0, inf)"}

    def __init__(self, beta: float = 0.05, temperature: float = 0.05, **kwargs: Any) -> None:
        super().__init__(beta=beta, **kwargs)
        self.temperature = temperature

    def pair_loss(self, pair: PreferenceLogprobs) -> Tensor | Loss:
        """Return the gated blend, shape (pairs,)."""
        x = self.reward_margin(pair)
        gate = torch.sigmoid(x / self.temperature)
        return -(1 - gate) * logsigmoid(x) + gate * torch.exp(-x.clamp(min=-MAX_LOG_RATIO))


class LengthNormalizedDPOModule(DPOModule):
    r"""DPO on log-ratios per token, so that length earns nothing.

    loss = -log sigmoid(beta (a_w / n_w - a_l / n_l)), n the lengths in tokens (Lambert et al., 2411.15124).
    Policy = reference gives log 2.

    Target: reference * exp(n (reward + c) / beta), each prompt's c so that it sums to 1.
    """

    paper = "Lambert et al. 2024 (Tulu 3), arXiv 2411.15124"

    def __init__(self, beta: float = 5.0, **kwargs: Any) -> None:
        super().__init__(beta=beta, **kwargs)

    def implicit_reward(self, pairs: PreferenceLogprobs) -> tuple[Tensor, Tensor]:
        """Return beta a / n."""
        return per_token(pairs, *super().implicit_reward(pairs))

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        """Return reference * exp(n (reward + c) / beta)."""
        if self.label_smoothing:
            return None
        return normalised(problem, problem.rewards, lambda shifted: torch.exp(problem.lengths * shifted / self.beta))


class RPOModule(DPOModule):
    r"""DPO with the chosen completion's likelihood, so that its probability cannot fall with the rejected one's.

    loss = -log sigmoid(x) - alpha S_w / n_w, S_w the policy's log-probability of the chosen completion of n_w tokens
    (Pang et al., 2404.19733; Liu et al., 2405.16436, use alpha 0.005). Policy = reference gives log 2 + alpha * NLL per
    token.

    Target: no closed form; the minimiser of the population loss, between DPO's and the chosen completions' frequencies
    over lengths.

    Args:
        alpha: weight of the likelihood.
    """

    paper = "Pang et al. 2024, arXiv 2404.19733"
    ranges = {"alpha": "[0, inf)"}

    def __init__(self, alpha: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.alpha = alpha

    def pair_loss(self, pair: PreferenceLogprobs) -> Tensor | Loss:
        """Return the logistic loss plus alpha NLL per token, shape (pairs,)."""
        nll = -mean_logprobs(pair)[0]
        return Loss(-logsigmoid(self.reward_margin(pair)) + self.alpha * nll, {"nll_loss": nll})


def per_token(pairs: PreferenceLogprobs, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """Return values of chosen and rejected completions divided by their lengths, each of shape (pairs,)."""
    return chosen / pairs.chosen_lengths.clamp(min=1), rejected / pairs.rejected_lengths.clamp(min=1)


def mean_logprobs(pairs: PreferenceLogprobs) -> tuple[Tensor, Tensor]:
    """Return the policy's log-probability per token, S / n, of chosen and rejected, each of shape (pairs,)."""
    return per_token(pairs, pairs.chosen_sequence_logprobs, pairs.rejected_sequence_logprobs)
