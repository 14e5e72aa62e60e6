"""KL-Cov as a user's file: `rlhf fit --config kl_cov.yaml --model.init_from ... --model.scorer ...`."""

from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.modules import DAPOModule
from rlhf_lightning.types import Loss, PolicyLogprobs

ROUNDING = 1e-5
"""Largest difference in nats that two forward passes of one policy may show."""


class KLCovModule(DAPOModule):
    r"""KL-Cov: the tokens whose log-probability and advantage covary most pay a KL penalty; there is no clip.

    loss = mean over tokens of -A ratio + penalty 1[selected] |log policy - log old|. Selected is the share of the
    minibatch's tokens with the largest (lp - mean lp) (A - mean A), lp the policy's before the update, on all ranks
    (Cui et al., 2505.22617, Eq. 12 and its code). Before the first update |log policy - log old| is 0 up to rounding,
    whose sign would be its slope: it pays nothing below `ROUNDING`.

    Target: DAPO's: at ratio 1 no token pays.

    Args:
        share: of the minibatch's tokens that pay, at least one.
        penalty: of their KL, reward units per nat.
    """

    paper = "Cui et al. 2025, arXiv 2505.22617"
    target_of = DAPOModule
    needs_minibatch = True
    needs_minibatch_logprobs = True

    def __init__(self, scorer: Any, share: float = 2e-3, penalty: float = 1.0, **kwargs: Any) -> None:
        super().__init__(scorer=scorer, **kwargs)
        self.share, self.penalty = share, penalty

    def objective(self, ratio: Tensor, logprobs: PolicyLogprobs) -> Loss:
        """Return the loss of each token, shape (rows, length)."""
        batch = logprobs.minibatch
        assert batch is not None and batch.logprobs is not None
        lp, advantages = batch.logprobs[batch.learned], batch.advantages[batch.learned]
        covariance = (batch.logprobs - lp.mean()) * (batch.advantages - advantages.mean())
        count = max(int(self.share * len(lp)), 1)
        threshold = covariance[batch.learned].topk(count).values[-1]
        selected = (covariance >= threshold) & batch.learned
        moved = (logprobs.logprobs - logprobs.old_logprobs).abs()
        pays = selected[batch.rows, : ratio.shape[1]] & (moved > ROUNDING)
        return Loss(
            -logprobs.advantages * ratio + self.penalty * torch.where(pays, moved, 0.0),
            {"kl_cov_selected": pays.type_as(ratio)},
        )
