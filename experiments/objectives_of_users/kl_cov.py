"""KL-Cov as a user's file: `rlhf fit --config kl_cov.yaml --model.init_from ... --model.scorer ...`."""

from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.modules import DAPOModule
from rlhf_lightning.types import Loss, PolicyLogprobs

ROUNDING = 1e-5
"""Maximum difference in nats between two forward passes of the same policy, caused by rounding."""


class KLCovModule(DAPOModule):
    """KL-Cov: a KL penalty on the tokens with the highest covariance of log-probability and advantage, without a clip.

    loss = mean over tokens of -A ratio + penalty 1[selected] |log policy - log old|. Selected is the fraction ``share``
    of the minibatch's tokens, over all ranks, with the largest (lp - mean lp) (A - mean A), where lp is the
    log-probability before the update (Cui et al., 2505.22617, Eq. 12 and its code). Before the first update |log policy
    - log old| is 0 up to rounding error, and its gradient would be the sign of that error. Values below `ROUNDING`
    therefore have no penalty.

    Target: the same as DAPO's, since no token is penalised at ratio 1.

    Args:
        share: fraction of the minibatch's tokens with a penalty, at least one token.
        penalty: KL penalty coefficient, in reward units per nat.
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
