"""Further objectives on rankings: each is the reward model's loop with another `ranking_loss`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlhf_lightning.functional.ranking import plackett_luce_loss, ranked_davidson_loss
from rlhf_lightning.modules.reward import RewardModule
from rlhf_lightning.types import DataNeeds, EnumeratedProblem, RankedScores


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


class DavidsonModule(RewardModule):
    r"""Reward model of comparisons that may end in a tie, which `RewardModule` can only read as a toss-up.

    P(i wins) : P(j wins) : P(tie) = e^{d / 2} : e^{-d / 2} : nu with d = score_i - score_j (Davidson 1970; for
    preference optimisation Chen et al., arXiv 2409.17431): a tie says that two scores are close. A pair's
    ``preference`` of 0.5 is a tie, one between 0.5 and 1 a mean of verdicts that holds wins and ties. Equal ranks of a
    list are ties, and lists that are ties throughout are kept. Each list counts the mean over its pairs. Rated margins
    are not in it. Equal scores give -log((1 - tie_share) / 2) for a win and -log(tie_share) for a tie.

    Target: no closed form; the minimiser of the population loss. Of comparisons drawn from its own model it finds the
    scores.

    Args:
        tie_share: probability that two completions of equal score are called a tie, nu / (2 + nu). It belongs to the
            annotators and is not trained; count it on pairs that nobody could tell apart.
    """

    paper = "Davidson 1970; Chen et al. 2024, arXiv 2409.17431"
    ranges = {"tie_share": "(0, 1)"}

    def __init__(self, tie_share: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tie_share = tie_share

    @property
    def data_needs(self) -> DataNeeds:
        """Ties are kept."""
        return super().data_needs._replace(ties=True)

    def ranking_loss(self, scores: RankedScores) -> Tensor:
        """Return one loss per group, shape (groups,)."""
        return ranked_davidson_loss(
            scores.scores, scores.group, scores.ranks, scores.target, self.tie_share, self.centering
        )

    def target_policy(self, problem: EnumeratedProblem) -> Tensor | None:
        """Of comparisons that never tie the model is not the true one: its minimiser has no closed form."""
        return None
