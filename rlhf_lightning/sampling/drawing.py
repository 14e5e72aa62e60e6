"""Sample tokens with counter-based random numbers: a number is a function of (seed, episode, position).

Therefore episodes do not depend on the number of ranks, the batch size, the order of slots or the point of resuming.
The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in int64
arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
LOW = 0xFFFFFFFF

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Return four 32-bit words (in int64 tensors) for each counter, after ten rounds."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        # The products overflow in int64, but their bits are right: masking after the shift gives the high word.
        high0, low0 = (product0 >> 32) & LOW, product0 & LOW
        high1, low1 = (product1 >> 32) & LOW, product1 & LOW
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & LOW, (k1 + WEYL[1]) & LOW
    return c0, c1, c2, c3


def uniform(seed: int, episodes: Tensor, positions: Tensor) -> Tensor:
    """Return a float64 number in (0, 1) for each (seed, episode, position).

    Args:
        seed: seed of the run.
        episodes: number of each episode, int64, any shape.
        positions: index of each token within its completion, int64, same shape.
    """
    zeros = torch.zeros_like(positions)
    counter = (episodes & LOW, (episodes >> 32) & LOW, positions & LOW, zeros)
    high, low, _, _ = philox(counter, (seed & LOW, (seed >> 32) & LOW))
    bits = (high >> 6) * 2**26 + (low >> 6)  # 52 bits: with 53, adding 0.5 could round up to 1
    return (bits.double() + 0.5) / 2**52


AHEAD = 64
"""Maximum number of tokens of a completion for which random numbers are generated at once."""


def draw(
    logits: Tensor, numbers: Tensor, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the token sampled for each row, its log-probability at the temperature, and the distribution's entropy.

    Args:
        logits: fp32 or wider, shape (rows, vocabulary).
        numbers: uniform in (0, 1), see `uniform`, shape (rows,); unused at temperature 0.
        temperature: divisor of the logits; 0 takes the most probable token.
        top_p: nucleus size; 1 keeps all.
        top_k: number of most probable tokens to keep; 0 keeps all.
    """
    if temperature == 0:
        best, logprobs = logits.argmax(-1), logits.log_softmax(-1)
        return best, logprobs.gather(-1, best.unsqueeze(-1)).squeeze(-1), entropy_of(logprobs.exp())
    logprobs = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
    probabilities, kept = logprobs.exp(), _truncated(logprobs, top_p, top_k)
    drawn = inverse_cdf(probabilities if kept is logprobs else kept.exp(), numbers)
    return drawn, logprobs.gather(-1, drawn.unsqueeze(-1)).squeeze(-1), entropy_of(probabilities)


BLOCK = 256
"""Number of tokens with a common sum of probabilities in the two-level inverse CDF."""


BLOCKED = 8192
"""Vocabulary size from which the two-level sum is faster than one sum over all tokens."""


def inverse_cdf(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """Return for each row the token at which the cumulative probability reaches a share of the total, int64.

    Cumulative sums use double precision. For a large vocabulary they run over blocks of tokens, then within one block.

    Args:
        probabilities: shape (rows, vocabulary); they need not sum to 1.
        numbers: the shares, in (0, 1), shape (rows,).
    """
    vocabulary = probabilities.shape[-1]
    if vocabulary < BLOCKED:
        cumulative = probabilities.double().cumsum(-1)
        return _first_at_least(cumulative, (numbers * cumulative[:, -1]).unsqueeze(-1)).squeeze(-1)
    if vocabulary % BLOCK:
        probabilities = torch.nn.functional.pad(probabilities, (0, -vocabulary % BLOCK))
    blocks = probabilities.unflatten(-1, (-1, BLOCK))
    sums = blocks.sum(-1).double()
    cumulative = sums.cumsum(-1)
    wanted = (numbers * cumulative[:, -1]).unsqueeze(-1)
    block = _first_at_least(cumulative, wanted)
    within = blocks.gather(1, block.unsqueeze(-1).expand(-1, -1, BLOCK)).squeeze(1).double().cumsum(-1)
    # Limit the share to the block's own sum, so that rounding cannot select a token of probability 0 at its end.
    wanted = (wanted - (cumulative - sums).gather(-1, block)).minimum(within[:, -1:])
    return (block * BLOCK + _first_at_least(within, wanted)).squeeze(-1).clamp_max(vocabulary - 1)


def _first_at_least(cumulative: Tensor, wanted: Tensor) -> Tensor:
    return torch.searchsorted(cumulative, wanted).clamp_max(cumulative.shape[-1] - 1)


def entropy_of(probabilities: Tensor) -> Tensor:
    """Return the entropy in nats of distributions of shape (rows, vocabulary); a probability of 0 adds 0."""
    return torch.special.entr(probabilities).sum(-1)


def _truncated(logprobs: Tensor, top_p: float, top_k: int) -> Tensor:
    """Set the log-probability of tokens outside top_k and top_p to -inf."""
    if top_k > 0:
        least = logprobs.topk(min(top_k, logprobs.shape[-1])).values[:, -1:]
        logprobs = logprobs.masked_fill(logprobs < least, -torch.inf)
    if top_p < 1:
        ordered, index = logprobs.sort(-1, descending=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()
        dropped = torch.zeros_like(logprobs, dtype=torch.bool).scatter(-1, index, before >= top_p)
        logprobs = logprobs.masked_fill(dropped, -torch.inf)
    return logprobs
