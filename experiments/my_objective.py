"""A new objective is one small subclass: `rlhf fit --model my_objective.OffsetDPOModule --model.offset 0.7 ...`."""

from typing import Any

from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_lightning.modules import DPOModule
from rlhf_lightning.types import PreferenceLogprobs


class OffsetDPOModule(DPOModule):
    r"""Chosen must beat rejected by ``offset``: -log sigmoid(beta * margin - offset).

    Args:
        offset: gap, in implicit-reward units, that a pair must clear.
    """

    def __init__(self, offset: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.offset = offset

    def preference_loss(self, logprobs: PreferenceLogprobs) -> Tensor:
        """Return one loss per pair, shape (pairs,)."""
        return -logsigmoid(self.beta * logprobs.margin - self.offset)
