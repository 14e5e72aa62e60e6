"""Evaluation statistics: calibration, win rates, best-of-n curves, over-optimisation fits and benchmark scores.

``delta`` is the score of the chosen minus the score of the rejected completion, shape (pairs,). Its sigmoid is the
probability that the reward model gives to the label. A verdict is 1 for a win, 0.5 for a tie and 0 for a loss.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_lightning.functional.logprobs import at_least_float32, require_shape

# --- calibration of a reward model -----------------------------------------------------------------------------------


def calibration_error(delta: Tensor, bins: int = 10) -> Tensor:
    r"""Return the expected calibration error, \sum_b n_b / n |mean confidence - accuracy| (arXiv 1706.04599).

    Guo et al. Confidence is max(p, 1 - p), p = sigmoid(delta), in equal bins on [0.5, 1]. A comparison is right if
    p > 0.5. Bins of p itself would be wrong, because the label is always chosen.
    """
    require_shape("pairs", delta=delta)
    delta = at_least_float32(delta)
    confidence = torch.sigmoid(delta.abs())
    gap = confidence - (delta > 0).type_as(delta)
    index = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    return delta.new_zeros(bins).index_add(0, index, gap).abs().sum() / max(len(delta), 1)


def brier_score(delta: Tensor) -> Tensor:
    """Return the squared distance of each probability from its label, (1 - sigmoid(delta))^2; average it over pairs."""
    require_shape("pairs", delta=delta)
    return torch.sigmoid(-at_least_float32(delta)) ** 2


def log_loss(delta: Tensor) -> Tensor:
    """Return the negative log-likelihood of each label in nats, -log sigmoid(delta); average it over pairs."""
    require_shape("pairs", delta=delta)
    return -F.logsigmoid(at_least_float32(delta))


# --- win rates -------------------------------------------------------------------------------------------------------


def win_rate(verdicts: Tensor) -> Tensor:
    """Return the share of wins, a tie counting as half a win; ``verdicts`` have shape (prompts,)."""
    require_shape("prompts", verdicts=verdicts)
    return at_least_float32(verdicts).mean()


def wilson_interval(rate: Tensor | float, count: Tensor | int, z: float = 1.959963984540054) -> tuple[Tensor, Tensor]:
    r"""Return Wilson's score interval of a rate, [centre - half, centre + half] (Wilson 1927).

    centre = (w + z^2 / 2n) / (1 + z^2 / n), half = z / (1 + z^2 / n) \sqrt{w (1 - w) / n + z^2 / 4 n^2}.

    Args:
        rate: w, in [0, 1], any shape.
        count: n, number of independent prompts behind the rate.
        z: normal quantile; the default gives 95 %.

    Returns:
        Lower and upper end, float64.
    """
    w, n = torch.as_tensor(rate, dtype=torch.float64), torch.as_tensor(count, dtype=torch.float64)
    widening = 1 + z**2 / n
    centre = (w + z**2 / (2 * n)) / widening
    half = z / widening * (w * (1 - w) / n + z**2 / (4 * n**2)).sqrt()
    return (centre - half).clamp(min=0), (centre + half).clamp(max=1)


def bootstrap_interval(
    values: Tensor, draws: int = 10_000, seed: int = 0, clusters: Tensor | None = None, level: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Return the percentile bootstrap interval of a mean, resampling prompts (Efron 1979); deterministic by seed.

    To compare two systems, pass the differences of their values on the same prompts.

    Args:
        values: shape (rows,).
        draws: number of resamples.
        seed: seed of the resampling.
        clusters: index of each row's prompt, int64 from 0, shape (rows,): rows of one prompt are not independent, so
            they are drawn together. None if each row has its own prompt.
        level: coverage.

    Returns:
        Lower and upper end, scalars.
    """
    require_shape("rows", values=values, clusters=clusters)
    values = at_least_float32(values)
    clusters = torch.arange(len(values), device=values.device) if clusters is None else clusters
    sizes = torch.bincount(clusters).type_as(values)
    sums = torch.zeros_like(sizes).index_add(0, clusters, values)
    generator = torch.Generator(device=values.device).manual_seed(seed)
    means = values.new_empty(draws)
    for start in range(0, draws, 256):  # holds 256 resamples at a time
        block = means[start : start + 256]
        drawn = torch.randint(len(sizes), (len(block), len(sizes)), generator=generator, device=values.device)
        block.copy_(sums[drawn].sum(-1) / sizes[drawn].sum(-1))
    tail = (1 - level) / 2
    return means.quantile(tail), means.quantile(1 - tail)


def length_terms(length_difference: Tensor) -> Tensor:
    r"""Return the length covariate of AlpacaEval 2, tanh(difference / its standard deviation) (arXiv 2404.04475).

    ``length_difference`` is the length of the judged completion minus the baseline's, shape (prompts,). The standard
    deviation is over prompts.
    """
    require_shape("prompts", length_difference=length_difference)
    difference = length_difference.double()
    return torch.tanh(difference / difference.std(correction=0).clamp(min=1e-12))


def length_controlled_win_rate(verdicts: Tensor, length_difference: Tensor) -> Tensor:
    """Return the judge's win rate at equal lengths, sigmoid(theta) of `length_controlled_fit`, float64."""
    return torch.sigmoid(length_controlled_fit(verdicts, length_difference)[0])


def length_controlled_fit(verdicts: Tensor, length_difference: Tensor, ridge: float = 1e-3) -> tuple[Tensor, Tensor]:
    r"""Fit a judge's preference and length bias, the smallest form of AlpacaEval 2's regression (arXiv 2404.04475).

    verdict ~ sigmoid(theta + phi `length_terms`), fitted by Newton's method. AlpacaEval's term for each prompt's
    difficulty is left out.

    Args:
        verdicts: verdicts or probabilities, shape (prompts,).
        length_difference: length of the judged completion minus the baseline's, shape (prompts,).
        ridge: squared penalty on both coefficients, in pseudo-prompts, so that the fit of a clean sweep stays finite.

    Returns:
        theta and phi, scalars in float64.
    """
    require_shape("prompts", verdicts=verdicts, length_difference=length_difference)
    y = verdicts.double()
    terms = length_terms(length_difference)
    design = torch.stack([torch.ones_like(terms), terms], dim=-1)  # (prompts, 2)
    theta, phi = logistic_fit(design, y, y.new_full((2,), ridge))
    return theta, phi


def logistic_fit(design: Tensor, targets: Tensor, ridge: Tensor) -> Tensor:
    """Fit the coefficients of the logistic regression targets ~ sigmoid(design w) by Newton's method, float64.

    Args:
        design: covariates, shape (rows, covariates).
        targets: labels or probabilities, shape (rows,).
        ridge: squared penalty on each coefficient, in pseudo-rows, shape (covariates,).
    """
    design, y, coefficients = design.double(), targets.double(), torch.zeros_like(ridge, dtype=torch.float64)
    for _ in range(50):
        p = torch.sigmoid(design @ coefficients)
        gradient = design.T @ (y - p) - ridge * coefficients
        hessian = design.T @ (design * (p * (1 - p)).unsqueeze(-1)) + torch.diag(ridge.double())
        coefficients = coefficients + torch.linalg.solve(hessian, gradient)
    return coefficients


# --- best of n -------------------------------------------------------------------------------------------------------


def best_of_n_kl(n: Tensor | int) -> Tensor:
    r"""Return KL(best-of-n || sampling policy) in nats, log n - (n - 1) / n (Stiennon et al., arXiv 2009.01325).

    Exact if scores never tie, otherwise an upper bound (Beirami et al., arXiv 2401.01879). n = 1 gives 0.
    """
    samples = torch.as_tensor(n, dtype=torch.float64)
    return samples.log() - (samples - 1) / samples


def best_of_n_curve(proxy: Tensor, gold: Tensor) -> Tensor:
    r"""Estimate without bias the expected gold score of the proxy's best of n, for n = 1 .. N, from N samples.

    \sum_i C(i - 1, n - 1) / C(N, n) gold_{(i)}, samples sorted ascending by proxy (Nakano et al., arXiv 2112.09332,
    App. I): the mean over all subsets of size n. Samples with equal proxy scores are equally likely to be chosen. All
    tensors have shape (..., samples). Entry n - 1 of the result, in float64, is for n.
    """
    require_shape("...", proxy=proxy, gold=gold)
    total = proxy.shape[-1]
    tied = (proxy.unsqueeze(-1) == proxy.unsqueeze(-2)).double()
    gold = (tied @ gold.double().unsqueeze(-1)).squeeze(-1) / tied.sum(-1)
    ascending = gold.gather(-1, proxy.argsort(-1))
    n = torch.arange(1, total + 1, dtype=torch.float64, device=proxy.device).unsqueeze(-1)  # (n, 1)
    i = n.squeeze(-1)  # (i,)
    chosen = _log_binomial(i - 1, n - 1) - _log_binomial(torch.full_like(n, total), n)
    return ascending @ chosen.exp().T


def pass_at_k(samples: Tensor | int, correct: Tensor, k: Tensor | int) -> Tensor:
    r"""Estimate the probability that one of k samples is right, 1 - C(n - c, k) / C(n, k) (arXiv 2107.03374).

    Chen et al.; the estimate is unbiased.

    Args:
        samples: n, samples per problem.
        correct: c, number of right samples, shape (problems,).
        k: at most n.

    Returns:
        Shape (problems,), float64; average it over problems.
    """
    n, c, k = (torch.as_tensor(x, dtype=torch.float64) for x in (samples, correct, k))
    return 1 - (_log_binomial(n - c, k) - _log_binomial(n, k)).exp()


def _log_binomial(n: Tensor, k: Tensor) -> Tensor:
    """Return the log of the binomial coefficient C(n, k) by lgamma; minus infinity if k > n."""
    inside = k <= n
    left = torch.where(inside, n - k, 0)
    return torch.where(inside, (n + 1).lgamma() - (k + 1).lgamma() - (left + 1).lgamma(), -torch.inf)


# --- over-optimisation -----------------------------------------------------------------------------------------------
# Gao et al. (arXiv 2210.10760): gold score as a function of d = \sqrt{KL in nats}. alpha is the initial slope under
# best-of-n and the score at d = 1 under RL, beta the over-optimisation. Fits need at least two distinct distances above
# 0, and gold scores relative to the score at distance 0; both have shape (points,).


def best_of_n_overoptimization(distance: Tensor, alpha: Tensor | float, beta: Tensor | float) -> Tensor:
    r"""Return the gold score under best-of-n, R(d) = d (alpha - beta d)."""
    return distance * (alpha - beta * distance)


def best_of_n_peak(alpha: Tensor | float, beta: Tensor | float) -> tuple[Tensor, Tensor]:
    r"""Return distance alpha / (2 beta) and gold score alpha^2 / (4 beta) at the `best_of_n_overoptimization` peak."""
    alpha, beta = torch.as_tensor(alpha, dtype=torch.float64), torch.as_tensor(beta, dtype=torch.float64)
    return alpha / (2 * beta), alpha**2 / (4 * beta)


def rl_overoptimization(distance: Tensor, alpha: Tensor | float, beta: Tensor | float) -> Tensor:
    r"""Return the gold score under reinforcement learning, R(d) = d (alpha - beta log d), R(0) = 0."""
    return alpha * distance - beta * torch.xlogy(distance, distance)


def rl_peak(alpha: Tensor | float, beta: Tensor | float) -> tuple[Tensor, Tensor]:
    r"""Return distance d* = e^{alpha / beta - 1} and gold score beta d* at the peak of `rl_overoptimization`."""
    alpha, beta = torch.as_tensor(alpha, dtype=torch.float64), torch.as_tensor(beta, dtype=torch.float64)
    distance = torch.exp(alpha / beta - 1)
    return distance, beta * distance


def best_of_n_overoptimization_fit(distance: Tensor, gold: Tensor) -> tuple[Tensor, Tensor]:
    """Fit alpha and beta of `best_of_n_overoptimization` by least squares."""
    return _linear_fit(distance, -(distance**2), gold)


def rl_overoptimization_fit(distance: Tensor, gold: Tensor) -> tuple[Tensor, Tensor]:
    """Fit alpha and beta of `rl_overoptimization` by least squares."""
    return _linear_fit(distance, -torch.xlogy(distance, distance), gold)


def _linear_fit(first: Tensor, second: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
    require_shape("points", distance=first, basis=second, gold=observed)
    design = torch.stack([first, second], dim=-1).double()
    alpha, beta = torch.linalg.lstsq(design, observed.double().unsqueeze(-1)).solution.squeeze(-1)
    return alpha, beta
