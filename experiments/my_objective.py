"""Example objectives of a user, each a small subclass: `rlhf fit --model my_objective.OffsetDPOModule --model.offset
0.7 ...`.

`rlhf verify my_objective.OffsetDPOModule` checks the implementation.
"""

from typing import Any

from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_lightning.modules import CriticFreeModule, DPOModule
from rlhf_lightning.types import PreferenceLogprobs, Rollout


class OffsetDPOModule(DPOModule):
    """Require the chosen reward to exceed the rejected one by ``offset``: -log sigmoid(beta * margin - offset).

    Args:
        offset: required gap between chosen and rejected, in implicit-reward units.
    """

    no_target = "no closed form: the offset moves both orders of a pair"

    def __init__(self, offset: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.offset = offset

    def pair_loss(self, pair: PreferenceLogprobs) -> Tensor:
        """Return one loss per pair, shape (pairs,)."""
        return -logsigmoid(self.beta * pair.margin - self.offset)


class BestOfGroupModule(CriticFreeModule):
    """Learn only from the best completion of each group: A = ``gain`` for the highest score, else 0.

    Args:
        gain: advantage of the best completion.
    """

    no_target = "no closed form: what is learned depends on the whole group"

    def __init__(self, scorer: Any, gain: float = 1.0, **kwargs: Any) -> None:
        super().__init__(scorer=scorer, **kwargs)
        self.gain = gain

    def episode_advantages(self, rewards: Tensor, rollout: Rollout) -> Tensor:
        """Return the advantage of each completion, shape (episodes,)."""
        best = rewards.new_full((len(rewards),), -float("inf")).scatter_reduce(0, rollout.group, rewards, "amax")
        return self.gain * (rewards == best[rollout.group])
