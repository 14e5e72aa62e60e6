"""Objectives on preference pairs with a fixed reference. Notation as in `dpo`.

The population loss is the mean over all pairs, drawn with equal probability. Each order of a pair is weighted by its
probability of being preferred.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_lightning.functional.logprobs import MAX_LOG_RATIO
from rlhf_lightning.modules.dpo import DPOModule, normalised
from rlhf_lightning.training.pairs import mean_logprobs, per_token
from rlhf_lightning.types import EnumeratedProblem, Loss, PreferenceLogprobs


class ConservativeDPOModule(DPOModule):
    r"""cDPO: DPO that assumes a share of wrong labels.

    loss = -(1 - s) log sigmoid(x) - s log sigmoid(-x), s = ``label_smoothing`` (Mitchell 2023, a note on DPO with noisy
    preferences). L_0 = log 2. The optimal margin of a certain label is logit(1 - s).
    Target: no closed form; the minimiser of the population loss. If the labels are already noisy, DPO recovers the
    rewards and cDPO does not.
    """

    paper = "Mitchell 2023, a note on DPO with noisy preferences"

    def __init__(self, label_smoothing: float = 0.1, **kwargs: Any) -> None:
        super().__init__(label_smoothing=label_smoothing, **kwargs)


class RobustDPOModule(DPOModule):
    r"""Robust DPO: an unbiased estimate of DPO's loss on the clean labels when labels are flipped at a known rate.

    loss = [-(1 - e) log sigmoid(x) + e log sigmoid(-x)] / (1 - 2e), e = ``flip_rate`` (Chowdhury et al., 2403.00409);
    it may be negative. L_0 = log 2. A pair preferred with probability below e has no finite optimum.
    Target: reference * exp(reward / beta), normalised, if labels are Bradley-Terry in the rewards and flipped at rate
    e. For other labels it is the minimiser of the population loss, without a closed form.

    Args:
        flip_rate: share of flipped labels, below 0.5.
    """

    paper = "Chowdhury et al. 2024, arXiv 2403.00409"
    ranges = {"flip_rate": "[0, 0.5)"}

    def __init__(self, flip_rate: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.flip_rate = flip_rate

    def pair_loss(self, pair: PreferenceLogprobs) -> Tensor | Loss:
        x, e = self.reward_margin(pair), self.flip_rate
        return (-(1 - e) * logsigmoid(x) + e * logsigmoid(-x)) / (1 - 2 * e)

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        odds = torch.logit((self.smoothed(problem.preference) - self.flip_rate) / (1 - 2 * self.flip_rate))
        rewards = odds[:, :, 0]  # relative to the first completion
        consistent = torch.allclose(odds, rewards[:, :, None] - rewards[:, None, :], atol=1e-9)
        return torch.softmax(problem.reference.log() + rewards / self.beta, -1) if consistent else None


class IPOModule(DPOModule):
    r"""Identity preference optimisation: margins are regressed on a constant, so they stay bounded.

    loss = (a_w - a_l - 1 / (2 beta))^2 = ((x - 1/2) / beta)^2, with log-ratios averaged over tokens (the authors'
    practice) or summed as in the paper (Azar et al., 2310.12036, Eq. 17). L_0 = 1 / (4 beta^2).
    Target: with sums reference * exp(E p / beta), normalised, where E p is a completion's mean win rate. With averages
    over n tokens it is reference * exp(n (E p / beta + c)), where each prompt's c makes it sum to 1.

    Args:
        beta: the paper's tau, strength of the KL penalty; averages need a larger value.
        average: divide each side's log-ratio by its length.
    """

    paper = "Azar et al. 2023, arXiv 2310.12036"

    def __init__(self, beta: float = 0.1, average: bool = True, **kwargs: Any) -> None:
        super().__init__(beta=beta, **kwargs)
        self.average = average

    def implicit_reward(self, pairs: PreferenceLogprobs) -> tuple[Tensor, Tensor]:
        return per_token(pairs, *super().implicit_reward(pairs)) if self.average else super().implicit_reward(pairs)

    def pair_loss(self, pair: PreferenceLogprobs) -> Tensor | Loss:
        return ((self.reward_margin(pair) - 0.5) / self.beta) ** 2

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        lengths = problem.lengths if self.average else torch.ones_like(problem.lengths)
        wins = self.smoothed(problem.preference).mean(-1) / self.beta
        return normalised(problem, wins, lambda shifted: torch.exp(lengths * shifted))


class HingeModule(DPOModule):
    r"""SLiC's hinge loss on the margin, relative to the reference as in RSO.

    loss = max(0, 1 - x) (Zhao et al., 2305.10425; Liu et al., 2309.06657). L_0 = 1. A pair with x > 1 has no gradient.
    Target: no closed form; any minimiser of the population loss. Only the more likely label of each pair matters, not
    its probability, and the minimiser need not be unique.
    """

    paper = "Zhao et al. 2023, arXiv 2305.10425"

    def __init__(self, beta: float = 0.05, **kwargs: Any) -> None:
        super().__init__(beta=beta, **kwargs)

    def pair_loss(self, pair: PreferenceLogprobs) -> Tensor | Loss:
        return torch.relu(1 - self.reward_margin(pair))


class EXOModule(DPOModule):
    r"""EXO for pairs: the reverse KL from the policy's preference to the smoothed label.

    loss = sigmoid(x) [log sigmoid(x) - log(1 - e)] + sigmoid(-x) [log sigmoid(-x) - log e], e = ``epsilon`` (Ji et al.,
    2402.00856). L_0 = 2.7612 for e = 1e-3. The optimal margin of a single pair is x = (2 p - 1) logit(1 - e).
    Target: no closed form; the minimiser of the population loss.

    Args:
        epsilon: label smoothing inside the KL, above 0.
    """

    paper = "Ji et al. 2024, arXiv 2402.00856"
    ranges = {"epsilon": "(0, 0.5)"}

    def __init__(self, epsilon: float = 1e-3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.epsilon = epsilon

    def pair_loss(self, pair: PreferenceLogprobs) -> Tensor | Loss:
        x = self.reward_margin(pair)
        right = torch.sigmoid(x) * (logsigmoid(x) - math.log1p(-self.epsilon))
        return right + torch.sigmoid(-x) * (logsigmoid(-x) - math.log(self.epsilon))


class DiscoPOPModule(DPOModule):
    r"""DiscoPOP: a blend of the logistic and the exponential loss, discovered by a language model.

    loss = (1 - g)(-log sigmoid(x)) + g e^{-x}, g = sigmoid(x / temperature) (Lu et al., 2406.08414). L_0 = (1 + log 2)
    / 2. It is not monotone: near x = 0 its gradient shrinks the margin.
    Target: no closed form; a minimiser of the population loss, which is not convex and has several minimisers.

    Args:
        temperature: temperature of the gate g.
    """

    paper = "Lu et al. 2024, arXiv 2406.08414"
    ranges = {"temperature": "(0, inf)"}

    def __init__(self, beta: float = 0.05, temperature: float = 0.05, **kwargs: Any) -> None:
        super().__init__(beta=beta, **kwargs)
        self.temperature = temperature

    def pair_loss(self, pair: PreferenceLogprobs) -> Tensor | Loss:
        x = self.reward_margin(pair)
        gate = torch.sigmoid(x / self.temperature)
        return -(1 - gate) * logsigmoid(x) + gate * torch.exp(-x.clamp(min=-MAX_LOG_RATIO))


class LengthNormalizedDPOModule(DPOModule):
    r"""DPO on log-ratios per token, so that length has no advantage.

    loss = -log sigmoid(beta (a_w / n_w - a_l / n_l)) (Lambert et al., 2411.15124). L_0 = log 2.
    Target: reference * exp(n (reward + c) / beta), where each prompt's c makes it sum to 1.
    """

    paper = "Lambert et al. 2024 (Tulu 3), arXiv 2411.15124"

    def __init__(self, beta: float = 5.0, **kwargs: Any) -> None:
        super().__init__(beta=beta, **kwargs)

    def implicit_reward(self, pairs: PreferenceLogprobs) -> tuple[Tensor, Tensor]:
        return per_token(pairs, *super().implicit_reward(pairs))

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        if self.label_smoothing:
            return None
        return normalised(problem, problem.rewards, lambda shifted: torch.exp(problem.lengths * shifted / self.beta))


class RPOModule(DPOModule):
    r"""DPO plus the likelihood of the chosen completion, which keeps its probability from falling.

    loss = -log sigmoid(x) - alpha S_w / n_w (Pang et al., 2404.19733; Liu et al., 2405.16436, use alpha 0.005). When
    policy = reference, the loss is log 2 + alpha * NLL per token.
    Target: no closed form; the minimiser of the population loss. It lies between DPO's and the chosen completions'
    frequencies divided by their lengths.

    Args:
        alpha: weight of the likelihood.
    """

    paper = "Pang et al. 2024, arXiv 2404.19733"
    ranges = {"alpha": "[0, inf)"}

    def __init__(self, alpha: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.alpha = alpha

    def pair_loss(self, pair: PreferenceLogprobs) -> Tensor | Loss:
        nll = -mean_logprobs(pair)[0]
        return Loss(-logsigmoid(self.reward_margin(pair)) + self.alpha * nll, {"nll_loss": nll})


class AOTModule(DPOModule):
    r"""AOT on pairs: the distribution of the policy's margins dominates that of the reference's margins.

    loss = -log sigmoid(beta (sort(S_w - S_l) - sort(the reference's S_w - S_l))), sorted over all pairs of the
    optimizer step (Melnyk et al., 2406.05882). L_0 = log 2. Sorting breaks the pairing, so soft labels have no effect,
    and weights are refused.
    Target: no closed form; if every step is the whole population, one of several minimisers of the population loss.
    With smaller steps the result depends on which pairs share a step.
    """

    paper = "Melnyk et al. 2024, arXiv 2406.05882"
    batch_coupled = True
    weighs_rows = False

    def __init__(self, beta: float = 0.01, **kwargs: Any) -> None:
        super().__init__(beta=beta, **kwargs)

    def preference_loss(self, pairs: PreferenceLogprobs) -> Tensor | Loss:
        policy = pairs.chosen_sequence_logprobs - pairs.rejected_sequence_logprobs
        reference = policy.detach() - pairs.margin.detach()
        return -logsigmoid(self.beta * (policy.sort().values - reference.sort().values))


class UnpairedAOTModule(AOTModule):
    r"""AOT without pairing: the distribution of chosen log-ratios dominates that of rejected log-ratios.

    loss = -log sigmoid(beta (sort(a_w) - sort(a_l))), sorted over all pairs of the optimizer step (Melnyk et al.,
    2406.05882). L_0 = log 2. Soft labels have no effect, and weights are refused.
    Target: no closed form; if every step is the whole population, one of several minimisers of the population loss.
    With smaller steps the result depends on which pairs share a step.
    """

    def preference_loss(self, pairs: PreferenceLogprobs) -> Tensor | Loss:
        return -logsigmoid(self.beta * (pairs.chosen_logratio.sort().values - pairs.rejected_logratio.sort().values))


class NCAModule(DPOModule):
    r"""NCA for pairs: noise-contrastive loss that keeps the chosen completion's own probability high.

    loss = -log sigmoid(u) - 1/2 log sigmoid(-u) - 1/2 log sigmoid(-v) (Chen et al., 2402.05369). L_0 = 2 log 2.
    Target: no closed form; the minimiser of the population loss.
    """

    paper = "Chen et al. 2024, arXiv 2402.05369"

    def __init__(self, beta: float = 0.01, **kwargs: Any) -> None:
        super().__init__(beta=beta, **kwargs)

    def pair_loss(self, pair: PreferenceLogprobs) -> Tensor | Loss:
        u, v = self.implicit_reward(pair)
        return -logsigmoid(u) - logsigmoid(-u) / 2 - logsigmoid(-v) / 2


class BCOPairModule(DPOModule):
    r"""BCO on pairs: a binary classifier of chosen against rejected, with the implicit reward as the logit.

    loss = -log sigmoid(u - delta) - log sigmoid(-(v - delta)) (Jung et al., 2404.04656), delta the mean of all u and v
    of the optimizer step, without gradient. L_0 = 2 log 2.
    Target: no closed form; the policy that minimises the population loss at its own delta.
    """

    paper = "Jung et al. 2024, arXiv 2404.04656"
    batch_coupled = True

    def __init__(self, beta: float = 0.01, learning_rate: float = 5e-7, **kwargs: Any) -> None:
        super().__init__(beta=beta, learning_rate=learning_rate, **kwargs)

    def preference_loss(self, pairs: PreferenceLogprobs) -> Tensor | Loss:
        chosen, rejected = self.implicit_reward(pairs)
        total = ((chosen + rejected) / 2 * pairs.weights).sum() / pairs.weights.sum().clamp_min(1e-12)
        slots = {**pairs.extras, "delta": total.detach().expand(len(chosen))}
        return super().preference_loss(pairs._replace(extras=slots))

    def pair_loss(self, pair: PreferenceLogprobs) -> Tensor | Loss:
        (u, v), delta = self.implicit_reward(pair), pair.extras["delta"]
        return -logsigmoid(u - delta) - logsigmoid(delta - v)


class SPPOModule(DPOModule):
    r"""SPPO with hard labels: one step of self-play, with each log-ratio regressed on a constant.

    loss = (a_w - 1 / (2 beta))^2 + (a_l + 1 / (2 beta))^2 (Wu et al., 2405.00675). L_0 = 1 / (2 beta^2).
    Target: no closed form; the minimiser of the population loss.

    Args:
        beta: inverse of the step size eta of the self-play game.
    """

    paper = "Wu et al. 2024, arXiv 2405.00675"

    def __init__(self, beta: float = 0.001, **kwargs: Any) -> None:
        super().__init__(beta=beta, **kwargs)

    def pair_loss(self, pair: PreferenceLogprobs) -> Tensor | Loss:
        u, v = self.implicit_reward(pair)
        return ((u - 0.5) / self.beta) ** 2 + ((v + 0.5) / self.beta) ** 2


class APOZeroModule(DPOModule):
    r"""APO-zero, for chosen completions better than the policy's own: raises chosen, lowers rejected.

    loss = 1 - sigmoid(u) + sigmoid(v) (D'Oosterlinck et al., 2408.06266). L_0 = 1.
    Target: no closed form; the minimiser of the population loss. The loss is bounded, so the probability of poor
    completions may go to 0.
    """

    paper = "D'Oosterlinck et al. 2024, arXiv 2408.06266"

    def __init__(self, learning_rate: float = 2e-7, **kwargs: Any) -> None:
        super().__init__(learning_rate=learning_rate, **kwargs)

    def pair_loss(self, pair: PreferenceLogprobs) -> Tensor | Loss:
        u, v = self.implicit_reward(pair)
        return torch.sigmoid(-u) + torch.sigmoid(v)


class APODownModule(APOZeroModule):
    r"""APO-down, for chosen completions worse than the policy's own: lowers both, rejected more.

    loss = sigmoid(u) + 1 - sigmoid(x) (D'Oosterlinck et al., 2408.06266). L_0 = 1.
    Target: no closed form; the minimiser of the population loss. It lowers u of every chosen completion, so a prompt's
    probability may end on a single completion.
    """

    def pair_loss(self, pair: PreferenceLogprobs) -> Tensor | Loss:
        u, v = self.implicit_reward(pair)
        return torch.sigmoid(u) + torch.sigmoid(v - u)


class ForwardKLDPOModule(DPOModule):
    r"""f-DPO with the forward KL as KL penalty, which keeps every completion of the reference at positive probability.

    loss = -log sigmoid(beta (f(a_w) - f(a_l))), f(a) = 1 - e^{-a} (Wang et al., 2309.16240). L_0 = log 2. For another
    divergence, override ``f`` and ``ratio``.
    Target: beta (1 - reference/policy) = reward + c, where each prompt's c makes the policy sum to 1.
    """

    paper = "Wang et al. 2023, arXiv 2309.16240"
    alpha = 1.0

    def f(self, logratio: Tensor) -> Tensor:
        """Return f of log-ratios a, shape (pairs,); here (1 - e^{-alpha a}) / alpha."""
        return -torch.expm1(-(self.alpha * logratio).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)) / self.alpha

    def ratio(self, value: Tensor) -> Tensor:
        """Return the ratio policy/reference at which f equals ``value``; infinite beyond the range of f."""
        return (1 - self.alpha * value).clamp_min(1e-300) ** (-1 / self.alpha)

    def implicit_reward(self, pairs: PreferenceLogprobs) -> tuple[Tensor, Tensor]:
        return self.beta * self.f(pairs.chosen_logratio), self.beta * self.f(pairs.rejected_logratio)

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        return None if self.label_smoothing else normalised(problem, problem.rewards / self.beta, self.ratio)


class AlphaDPOModule(ForwardKLDPOModule):
    r"""f-DPO with an alpha-divergence as KL penalty: between the reverse KL (DPO) and the forward KL.

    loss = -log sigmoid(beta (f(a_w) - f(a_l))), f(a) = (1 - e^{-alpha a}) / alpha (Wang et al., 2309.16240), where
    alpha a is clamped to +-20. L_0 = log 2.
    Target: beta f(log policy/reference) = reward + c, where each prompt's c makes the policy sum to 1.

    Args:
        alpha: 1 is the forward KL; the limit 0, the reverse KL, is DPOModule.
    """

    ranges = {"alpha": "(0, inf)"}

    def __init__(self, alpha: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.alpha = alpha


class JensenShannonDPOModule(ForwardKLDPOModule):
    r"""f-DPO with the Jensen-Shannon divergence as KL penalty.

    loss = -log sigmoid(beta (f(a_w) - f(a_l))), f(a) = log 2 + log sigmoid(a) (Wang et al., 2309.16240). L_0 = log 2.
    Target: beta f(log policy/reference) = reward + c, where each prompt's c makes the policy sum to 1.
    """

    def f(self, logratio: Tensor) -> Tensor:
        return math.log(2) + logsigmoid(logratio)

    def ratio(self, value: Tensor) -> Tensor:
        return (2 * torch.exp(-value) - 1).clamp_min(1e-300).reciprocal()
