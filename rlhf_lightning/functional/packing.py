"""Where tokens stand once rows of unequal length are padded or laid end to end."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_lightning.functional.logprobs import require_shape


def positions_from_mask(attention_mask: Tensor) -> Tensor:
    """Position of each token counted over real tokens only, max(cumsum(mask) - 1, 0), whatever side is padded.

    Args:
        attention_mask: bool or 0/1, shape (rows, width).
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def packed_positions(lengths: Tensor) -> Tensor:
    """Position ids of documents laid end to end: [3, 2] gives [0, 1, 2, 0, 1].

    Only tokens at a position above 0 may be supervised: a document's first token would be predicted by its neighbour.

    Args:
        lengths: tokens of each document, int64, shape (documents,).

    Returns:
        Shape (tokens,), int64.
    """
    require_shape("documents", lengths=lengths)
    first_token = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    return torch.ones_like(first_token).cumsum(0) - 1 - first_token


def cumulative_lengths(lengths: Tensor) -> Tensor:
    """Boundaries of documents laid end to end, the ``cu_seqlens`` of varlen attention: [3, 2] gives [0, 3, 5].

    Args:
        lengths: tokens of each document, int64, shape (documents,).

    Returns:
        Shape (documents + 1,), int32.
    """
    require_shape("documents", lengths=lengths)
    return F.pad(lengths.cumsum(0), (1, 0)).int()


def neftune_bound(lengths: Tensor, width: int, alpha: float = 5.0) -> Tensor:
    r"""Half-width of NEFTune's uniform embedding noise, alpha / \sqrt{length * width} (arXiv 2310.05914, Alg. 1).

    Args:
        lengths: real tokens of each row, without padding, shape (rows,).
        width: dimension of the embeddings.
        alpha: noise scale.
    """
    return alpha * torch.rsqrt(lengths.clamp(min=1).type(torch.get_default_dtype()) * width)
