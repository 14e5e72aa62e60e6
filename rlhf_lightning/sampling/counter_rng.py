"""Random numbers by address: the number for (seed, episode, position) is a pure function of the three.

Episodes therefore do not depend on the number of ranks, batch size, order of slots or point of resumption. The
generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in int64 arithmetic.
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
        # The products wrap around in int64, but their bits are right: masking after the shift gives the high word.
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
    bits = (high >> 6) * 2**26 + (low >> 6)  # 52 bits: with 53 the half below would round up to 1
    return (bits.double() + 0.5) / 2**52
