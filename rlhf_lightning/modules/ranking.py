"""Further objectives on rankings: each is the reward model's loop with another `ranking_loss`."""

from __future__ import annotations

from torch import Tensor

from rlhf_lightning.functional.ranking import plackett_luce_loss
from rlhf_lightning.modules.reward import RewardModule
from rlhf_lightning.types import RankedScores


class PlackettLuceModule(RewardModule):
    r"""Reward model of whole rankings: the best is picked first, then the best of the rest.

    loss = sum_k [logsumexp_{j ranked at or below k} score_j - score_k] (Plackett 1975, Luce 1959; for reward models Zhu
    et al., 2301.11270). K equal scores give log K!. For pairs it is `RewardModule`'s loss; that one counts all pairs of
    a list alike. Soft labels, margins and ``centering`` belong to pairs and are not in it.

    Target: scores that are the rewards up to a constant for each prompt, where rankings are Plackett-Luce in them.
    """

    paper = "Zhu et al. 2023, arXiv 2301.11270"

    def ranking_loss(self, scores: RankedScores) -> Tensor:
        """Return one loss per group, shape (groups,)."""
        return plackett_luce_loss(scores.scores, scores.group, scores.ranks)
