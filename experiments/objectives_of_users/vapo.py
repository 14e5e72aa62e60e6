"""VAPO as a user's file: `rlhf fit --config vapo.yaml --model.init_from ... --model.scorer ...`."""

from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.modules import PPOModule
from rlhf_lightning.training.returned_loss import as_loss
from rlhf_lightning.types import Loss, PolicyLogprobs, Rollout


class VAPOModule(PPOModule):
    """VAPO: PPO for long reasoning, with a GAE lambda that grows with length and an NLL term on right answers.

    The policy's advantages take lambda = 1 - 1 / (alpha length), at least 0; the critic's targets take ``lam``, 1 here:
    Monte-Carlo returns. The loss adds nll_coef times the mean negative log-likelihood over the tokens of right answers
    (positive score) in the minibatch, over all ranks (Yue et al., 2504.05118, Eq. 7 to 12).

    Target: no closed form: lambda depends on the length, and the NLL term imitates right answers.

    Args:
        alpha: coefficient in lambda = 1 - 1 / (alpha length); the paper uses 0.05 for completions of thousands of
            tokens.
        nll_coef: weight of the NLL of right answers (mu).
    """

    paper = "Yue et al. 2025, arXiv 2504.05118"
    no_target = "no closed form: lambda depends on the length, and right answers are imitated"
    means_it = dict.fromkeys(("ratio one", "clip"), "right answers are imitated too (Eq. 12)")
    needs_minibatch = True

    def __init__(
        self,
        scorer: Any,
        alpha: float = 0.05,
        nll_coef: float = 0.1,
        kl_coef: float = 0.0,
        clip_high: float | None = 0.28,
        lam: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(scorer=scorer, kl_coef=kl_coef, clip_high=clip_high, lam=lam, **kwargs)
        self.alpha, self.nll_coef = alpha, nll_coef

    def gae_lambda(self, rollout: Rollout) -> Tensor:
        """Return lambda = 1 - 1 / (alpha length), shape (episodes,)."""
        return (1 - 1 / (self.alpha * rollout.completion_mask.sum(-1))).clamp_min(0)

    def policy_loss(self, logprobs: PolicyLogprobs) -> Loss:
        """Return the loss of each token, shape (rows, length)."""
        loss, batch = as_loss(super().policy_loss(logprobs)), logprobs.minibatch
        assert batch is not None and logprobs.rollout is not None
        count = (batch.learned & (batch.scores > 0).unsqueeze(-1)).sum().clamp_min(1)
        right = (logprobs.rollout.scores > 0).unsqueeze(-1) & logprobs.completion_mask
        # a mean over the tokens of right answers
        nll = torch.where(right, -logprobs.logprobs, 0.0) * batch.learned.sum() / count
        return Loss(loss.values + self.nll_coef * nll, {**loss.metrics, "nll": nll.detach()})

    def reaches_kl_optimum(self) -> bool:
        """Return False, since the NLL term moves the optimum."""
        return False
