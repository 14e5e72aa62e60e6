"""GMPO as a user's file: `rlhf fit --config gmpo.yaml --model.init_from ... --model.scorer ...`."""

from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.modules import GRPOModule
from rlhf_lightning.types import Loss, PolicyLogprobs


class GMPOModule(GRPOModule):
    """Geometric-mean policy optimisation: a completion's ratio is the geometric mean of clipped token ratios.

    loss = -A exp(mean_t clipped d_t), d = log policy - log old; d is clipped from above at log_clip if A > 0, and from
    below at -log_clip if A < 0 (Zhao et al., 2507.20673, Eq. 4 and its code). At ratio 1 the gradient equals GRPO's.

    Target: GRPO's at the same kl_coef.

    Args:
        log_clip: clip bound of each token's log-ratio; the paper clips ratios to [e^-0.4, e^0.4].
    """

    paper = "Zhao et al. 2025, arXiv 2507.20673"
    target_of = GRPOModule

    def __init__(self, scorer: Any, kl_coef: float = 0.0, log_clip: float = 0.4, **kwargs: Any) -> None:
        super().__init__(scorer=scorer, kl_coef=kl_coef, **kwargs)
        self.log_clip = log_clip

    def objective(self, ratio: Tensor, logprobs: PolicyLogprobs) -> Loss:
        """Return each token's share of its completion's loss, shape (rows, length)."""
        mask, sign = logprobs.completion_mask, logprobs.advantages.sign()
        d = torch.where(mask, ratio.log(), 0.0)
        clipped = sign * (sign * d).clamp(max=self.log_clip)
        mean = clipped.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp_min(1)
        cut = (sign * d > self.log_clip).type_as(d)
        return Loss(-logprobs.advantages * mean.exp(), {"clip_fraction": cut})
