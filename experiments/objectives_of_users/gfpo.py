"""GFPO as a user's file: `rlhf fit --config gfpo.yaml --model.init_from ... --model.scorer ...`."""

from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_lightning.modules import GRPOModule
from rlhf_lightning.types import Rollout


class GFPOModule(GRPOModule):
    """Group-filtered policy optimisation: learn only from the shortest or most efficient completions of each group.

    ``kept`` completions of each group are selected by length or by reward per token. A = (r - mean) / (std + epsilon)
    over the selected completions, and 0 for the others; the loss is GRPO's (Shrivastava et al., 2508.09726, Eq. 2).

    Target: no closed form: the selection depends on the whole group.

    Args:
        kept: number of selected completions in each group.
        metric: "length" keeps the shortest, "efficiency" keeps the completions with the highest reward per token.
    """

    paper = "Shrivastava et al. 2025, arXiv 2508.09726"
    no_target = "no closed form: what is kept depends on the whole group"

    def __init__(
        self, scorer: Any, kept: int = 2, metric: Literal["length", "efficiency"] = "length", **kwargs: Any
    ) -> None:
        super().__init__(scorer=scorer, **kwargs)
        self.kept, self.metric = kept, metric

    def episode_advantages(self, rewards: Tensor, rollout: Rollout) -> Tensor:
        """Return the advantage of each completion, shape (episodes,)."""
        lengths, group = rollout.completion_mask.sum(-1).to(rewards), rollout.group
        cost = lengths if self.metric == "length" else -rewards / lengths.clamp_min(1)
        cost = torch.where(rewards.isnan(), torch.inf, cost)
        place = torch.arange(len(cost), device=cost.device)
        ahead = (cost < cost.unsqueeze(1)) | ((cost == cost.unsqueeze(1)) & (place < place.unsqueeze(1)))
        rank = (ahead & (group == group.unsqueeze(1))).sum(-1)
        return super().episode_advantages(torch.where(rank < self.kept, rewards, torch.nan), rollout)
