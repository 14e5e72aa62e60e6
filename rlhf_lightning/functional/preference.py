"""Losses on preference pairs against a reference: Direct Preference Optimisation and its kin, one function each.

``chosen_logratio`` and ``rejected_logratio`` are log policy(completion) - log reference(completion) in nats, summed
over the completion's tokens; ``margin`` is their difference; beta times a log-ratio is the implicit reward. All have
shape (pairs,), and every loss returns one value per pair. "At the start" is policy = reference, where all log-ratios
are 0.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_lightning.functional.logprobs import MAX_LOG_RATIO, at_least_float32, require_shape


def dpo_loss(margin: Tensor, beta: float | Tensor, target: Tensor | None = None) -> Tensor:
    r"""DPO: negative log-likelihood of the preference under the implicit reward beta * log(policy / reference).

    -p log sigmoid(beta * margin) - (1 - p) log sigmoid(-beta * margin). p = 1 is Eq. 7 of Rafailov et al. (arXiv
    2305.18290); p = 1 - flip rate is their conservative DPO. At the start log 2.

    Args:
        margin: chosen minus rejected log-ratio in nats, shape (pairs,).
        beta: rewards per nat of log-ratio; a scalar tensor where it adapts.
        target: p, probability that chosen is the better one, shape (pairs,); None means 1.

    Returns:
        One loss per pair in nats, shape (pairs,).
    """
    require_shape("pairs", margin=margin, target=target)
    reward_margin = beta * at_least_float32(margin)
    if target is None:
        return -F.logsigmoid(reward_margin)
    return -target * F.logsigmoid(reward_margin) - (1 - target) * F.logsigmoid(-reward_margin)


def robust_dpo_loss(margin: Tensor, beta: float, flip_rate: float = 0.1) -> Tensor:
    r"""Robust DPO: the unbiased estimate of the DPO loss on clean labels when a known share of labels is flipped.

    [-(1 - e) log sigmoid(x) + e log sigmoid(-x)] / (1 - 2e), x = beta * margin (Chowdhury et al., arXiv 2403.00409).
    At the start log 2; it may be negative.

    Args:
        margin: chosen minus rejected log-ratio in nats, shape (pairs,).
        beta: rewards per nat.
        flip_rate: e, share of flipped labels.

    Raises:
        ValueError: if the flip rate is not in [0, 0.5).
    """
    require_shape("pairs", margin=margin)
    if not 0 <= flip_rate < 0.5:
        raise ValueError(f"flip_rate must be at least 0 and below 0.5, found {flip_rate}: labels at 0.5 teach nothing")
    x = beta * at_least_float32(margin)
    return (-(1 - flip_rate) * F.logsigmoid(x) + flip_rate * F.logsigmoid(-x)) / (1 - 2 * flip_rate)


def ipo_loss(
    chosen_logratio: Tensor,
    rejected_logratio: Tensor,
    beta: float,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> Tensor:
    r"""IPO: the margin regressed on 1 / (2 beta), so that certain preferences do not drive the policy to extremes.

    (a_w - a_l - 1 / (2 beta))^2, Eq. 17 of Azar et al. (arXiv 2310.12036), whose tau is beta. With lengths the
    log-ratios are averaged per token, as the authors do in practice. At the start 1 / (4 beta^2).

    Args:
        chosen_logratio: a_w, shape (pairs,).
        rejected_logratio: a_l, shape (pairs,).
        beta: strength of the pull towards the reference; averaging over tokens needs a larger one.
        chosen_lengths: tokens of each chosen completion, shape (pairs,); None for sums.
        rejected_lengths: tokens of each rejected completion, shape (pairs,); None for sums.
    """
    require_shape("pairs", chosen_logratio=chosen_logratio, rejected_logratio=rejected_logratio)
    chosen, rejected = _per_token(chosen_logratio, chosen_lengths), _per_token(rejected_logratio, rejected_lengths)
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def length_normalized_dpo_loss(
    chosen_logratio: Tensor,
    rejected_logratio: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float = 5.0,
) -> Tensor:
    r"""Length-normalised DPO of Tulu 3 (arXiv 2411.15124): -log sigmoid(beta * (a_w / n_w - a_l / n_l)).

    At the start log 2.

    Args:
        chosen_logratio: a_w, shape (pairs,).
        rejected_logratio: a_l, shape (pairs,).
        chosen_lengths: n_w, tokens of each chosen completion, shape (pairs,).
        rejected_lengths: n_l, tokens of each rejected completion, shape (pairs,).
        beta: rewards per nat per token.
    """
    chosen, rejected = _per_token(chosen_logratio, chosen_lengths), _per_token(rejected_logratio, rejected_lengths)
    return dpo_loss(chosen - rejected, beta)


def _per_token(logratio: Tensor, lengths: Tensor | None) -> Tensor:
    require_shape("pairs", logratio=logratio, lengths=lengths)
    return at_least_float32(logratio) / (1 if lengths is None else lengths.clamp(min=1))


def hinge_loss(margin: Tensor, beta: float = 0.05) -> Tensor:
    r"""SLiC's hinge on the implicit reward margin, max(0, 1 - beta * margin) (arXiv 2305.10425, as in RSO, 2309.06657).

    At the start 1; 0 with no gradient once the margin is 1 / beta.

    Args:
        margin: chosen minus rejected log-ratio in nats, shape (pairs,).
        beta: rewards per nat.
    """
    require_shape("pairs", margin=margin)
    return torch.relu(1 - beta * at_least_float32(margin))


def exo_pair_loss(margin: Tensor, beta: float, epsilon: float = 1e-3) -> Tensor:
    r"""EXO: reverse KL from the policy's preference to a label smoothed by epsilon (Ji et al., arXiv 2402.00856).

    sigmoid(x) [log sigmoid(x) - log(1 - e)] + sigmoid(-x) [log sigmoid(-x) - log e], x = beta * margin. Least, 0, at
    sigmoid(x) = 1 - e.

    Args:
        margin: chosen minus rejected log-ratio in nats, shape (pairs,).
        beta: rewards per nat.
        epsilon: e, probability that the label is wrong; above 0.
    """
    require_shape("pairs", margin=margin)
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon must be between 0 and 1, both excluded, found {epsilon}")
    x = beta * at_least_float32(margin)
    right = torch.sigmoid(x) * (F.logsigmoid(x) - math.log1p(-epsilon))
    return right + torch.sigmoid(-x) * (F.logsigmoid(-x) - math.log(epsilon))


def nca_pair_loss(chosen_logratio: Tensor, rejected_logratio: Tensor, beta: float = 0.01) -> Tensor:
    r"""NCA for pairs: noise-contrastive, so that the chosen log-probability itself is held up (arXiv 2402.05369).

    -log sigmoid(u) - 1/2 log sigmoid(-u) - 1/2 log sigmoid(-v), u = beta a_w, v = beta a_l. At the start 2 log 2.

    Args:
        chosen_logratio: a_w, shape (pairs,).
        rejected_logratio: a_l, shape (pairs,).
        beta: rewards per nat.
    """
    u, v = _implicit_rewards(chosen_logratio, rejected_logratio, beta)
    return -F.logsigmoid(u) - F.logsigmoid(-u) / 2 - F.logsigmoid(-v) / 2


def bco_pair_loss(
    chosen_logratio: Tensor, rejected_logratio: Tensor, beta: float = 0.01, shift: float | Tensor = 0.0
) -> Tensor:
    r"""BCO for pairs: a binary classifier whose logit is the implicit reward (Jung et al., arXiv 2404.04656).

    -log sigmoid(u - delta) - log sigmoid(-(v - delta)), u = beta a_w, v = beta a_l. At the start 2 log 2 for delta 0.

    Args:
        chosen_logratio: a_w, shape (pairs,).
        rejected_logratio: a_l, shape (pairs,).
        beta: rewards per nat.
        shift: delta, running mean of all implicit rewards, chosen and rejected; without gradient.
    """
    u, v = _implicit_rewards(chosen_logratio, rejected_logratio, beta)
    return -F.logsigmoid(u - shift) - F.logsigmoid(shift - v)


def sppo_hard_loss(chosen_logratio: Tensor, rejected_logratio: Tensor, beta: float = 0.001) -> Tensor:
    r"""SPPO with hard labels: log-ratios regressed on +-1 / (2 beta) (Wu et al., arXiv 2405.00675).

    (a_w - 1 / (2 beta))^2 + (a_l + 1 / (2 beta))^2. At the start 1 / (2 beta^2).

    Args:
        chosen_logratio: a_w, shape (pairs,).
        rejected_logratio: a_l, shape (pairs,).
        beta: inverse of the step size eta of the self-play game.
    """
    chosen, rejected = _implicit_rewards(chosen_logratio, rejected_logratio, 1.0)
    return (chosen - 1 / (2 * beta)) ** 2 + (rejected + 1 / (2 * beta)) ** 2


def aot_loss(policy_margin: Tensor, reference_margin: Tensor, beta: float = 0.01) -> Tensor:
    r"""AOT on pairs: the policy's distribution of margins made to dominate the reference's (arXiv 2406.05882).

    -log sigmoid(beta * (sort(policy margins) - sort(reference margins))). At the start log 2. Couples the batch: value
    k belongs to the k-th smallest margins, not to pair k.

    Args:
        policy_margin: log policy(chosen) - log policy(rejected), shape (pairs,).
        reference_margin: log reference(chosen) - log reference(rejected), shape (pairs,).
        beta: rewards per nat.
    """
    require_shape("pairs", policy_margin=policy_margin, reference_margin=reference_margin)
    return dpo_loss(policy_margin.sort().values - reference_margin.sort().values, beta)


def aot_unpaired_loss(chosen_logratio: Tensor, rejected_logratio: Tensor, beta: float = 0.01) -> Tensor:
    r"""AOT on unpaired data: -log sigmoid(beta * (sort(a_w) - sort(a_l))) (arXiv 2406.05882). At the start log 2.

    Couples the batch: value k belongs to the k-th smallest log-ratios of either side.

    Args:
        chosen_logratio: a_w, shape (pairs,).
        rejected_logratio: a_l, shape (pairs,); row i need not answer the prompt of chosen row i.
        beta: rewards per nat.
    """
    require_shape("pairs", chosen_logratio=chosen_logratio, rejected_logratio=rejected_logratio)
    return dpo_loss(chosen_logratio.sort().values - rejected_logratio.sort().values, beta)


def apo_zero_loss(chosen_logratio: Tensor, rejected_logratio: Tensor, beta: float = 0.1) -> Tensor:
    r"""APO-zero, for chosen completions better than the policy's own: chosen goes up, rejected down.

    1 - sigmoid(u) + sigmoid(v), u = beta a_w, v = beta a_l (D'Oosterlinck et al., arXiv 2408.06266). At the start 1.

    Args:
        chosen_logratio: a_w, shape (pairs,).
        rejected_logratio: a_l, shape (pairs,).
        beta: rewards per nat.
    """
    u, v = _implicit_rewards(chosen_logratio, rejected_logratio, beta)
    return torch.sigmoid(-u) + torch.sigmoid(v)


def apo_down_loss(chosen_logratio: Tensor, rejected_logratio: Tensor, beta: float = 0.1) -> Tensor:
    r"""APO-down, for chosen completions worse than the policy's own: rejected goes down, and chosen after it.

    sigmoid(u) + 1 - sigmoid(u - v), u = beta a_w, v = beta a_l (arXiv 2408.06266). At the start 1.

    Args:
        chosen_logratio: a_w, shape (pairs,).
        rejected_logratio: a_l, shape (pairs,).
        beta: rewards per nat.
    """
    u, v = _implicit_rewards(chosen_logratio, rejected_logratio, beta)
    return torch.sigmoid(u) + torch.sigmoid(v - u)


def discopop_loss(margin: Tensor, beta: float = 0.05, temperature: float = 0.05) -> Tensor:
    r"""DiscoPOP: a learned blend of logistic and exponential loss (Lu et al., arXiv 2406.08414).

    (1 - g)(-log sigmoid(x)) + g e^{-x}, g = sigmoid(x / temperature), x = beta * margin. At the start (1 + log 2) / 2.
    Not monotone: about the start its gradient shrinks the margin.

    Args:
        margin: chosen minus rejected log-ratio in nats, shape (pairs,).
        beta: rewards per nat.
        temperature: of the gate g.
    """
    require_shape("pairs", margin=margin)
    x = beta * at_least_float32(margin)
    gate = torch.sigmoid(x / temperature)
    return -(1 - gate) * F.logsigmoid(x) + gate * torch.exp(-x.clamp(min=-MAX_LOG_RATIO))


def forward_kl_dpo_loss(chosen_logratio: Tensor, rejected_logratio: Tensor, beta: float = 0.1) -> Tensor:
    r"""f-DPO with the forward KL: DPO on 1 - e^{-a} instead of the log-ratio a (Wang et al., arXiv 2309.16240).

    Equals `alpha_dpo_loss` at alpha 1. At the start log 2.

    Args:
        chosen_logratio: shape (pairs,).
        rejected_logratio: shape (pairs,).
        beta: weight of the divergence.
    """
    return alpha_dpo_loss(chosen_logratio, rejected_logratio, beta, alpha=1.0)


def alpha_dpo_loss(chosen_logratio: Tensor, rejected_logratio: Tensor, beta: float = 0.1, alpha: float = 0.5) -> Tensor:
    r"""f-DPO with an alpha-divergence: DPO on (1 - e^{-alpha a}) / alpha instead of a (Wang et al., arXiv 2309.16240).

    alpha towards 0 gives DPO (reverse KL), 1 the forward KL. alpha * a is held within 20 before `exp`. At the start
    log 2.

    Args:
        chosen_logratio: shape (pairs,).
        rejected_logratio: shape (pairs,).
        beta: weight of the divergence.
        alpha: which divergence; above 0.

    Raises:
        ValueError: if alpha is not positive.
    """
    if alpha <= 0:
        raise ValueError(f"alpha must be positive, found {alpha}; its limit 0 is dpo_loss")
    chosen, rejected = (
        -torch.expm1(-scaled.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)) / alpha
        for scaled in _implicit_rewards(chosen_logratio, rejected_logratio, alpha)
    )
    return dpo_loss(chosen - rejected, beta)


def jensen_shannon_dpo_loss(chosen_logratio: Tensor, rejected_logratio: Tensor, beta: float = 0.1) -> Tensor:
    r"""f-DPO with the Jensen-Shannon divergence: DPO on log 2 + log sigmoid(a) instead of a (arXiv 2309.16240).

    At the start log 2.

    Args:
        chosen_logratio: shape (pairs,).
        rejected_logratio: shape (pairs,).
        beta: weight of the divergence.
    """
    chosen, rejected = _implicit_rewards(chosen_logratio, rejected_logratio, 1.0)
    return dpo_loss(F.logsigmoid(chosen) - F.logsigmoid(rejected), beta)


def rpo_loss(
    margin: Tensor, chosen_sequence_logprobs: Tensor, chosen_lengths: Tensor, beta: float = 0.1, alpha: float = 1.0
) -> Tensor:
    r"""DPO plus alpha times the chosen completion's negative log-likelihood per token, which keeps it from falling.

    -log sigmoid(beta * margin) - alpha * S_w / n_w: Iterative RPO (arXiv 2404.19733, alpha 1); RPO (arXiv 2405.16436,
    alpha 0.005).

    Args:
        margin: chosen minus rejected log-ratio in nats, shape (pairs,).
        chosen_sequence_logprobs: S_w, the policy's log-probability of each chosen completion, shape (pairs,).
        chosen_lengths: n_w, shape (pairs,). The batch's mean length for every pair gives a mean over tokens.
        beta: rewards per nat.
        alpha: weight of the likelihood term.
    """
    return dpo_loss(margin, beta) - alpha * _per_token(chosen_sequence_logprobs, chosen_lengths)


def _implicit_rewards(chosen_logratio: Tensor, rejected_logratio: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    require_shape("pairs", chosen_logratio=chosen_logratio, rejected_logratio=rejected_logratio)
    return beta * at_least_float32(chosen_logratio), beta * at_least_float32(rejected_logratio)
