"""A reward model that says how sure it is: `rlhf fit --config .../objectives_of_users/mean_variance_reward.yaml`.

It scores as `--model.scorer.class_path mean_variance_reward.CautiousScorer --model.scorer.init_args.folder RUN/model`.
"""

from typing import Any

from torch import Tensor
from torch.special import log_ndtr

from rlhf_lightning.modules import RewardModule
from rlhf_lightning.scoring import LearnedScorer
from rlhf_lightning.types import RankedScores


class MeanVarianceRewardModule(RewardModule):
    r"""Scores that are normal variables, N(m, e^v): chosen is better with probability Phi(d / sqrt(e^v_w + e^v_l)).

    loss = -p log Phi(z) - (1 - p) log Phi(-z) with z = (m_w - m_l) / sqrt(e^v_w + e^v_l), for pairs (Thurstone 1927,
    "A law of comparative judgment", case III). v and z are held within 20.
    """

    paper = "Thurstone 1927, A law of comparative judgment"
    no_target = "no closed form: Bradley-Terry preferences are no probits"
    output_names = ("mean", "log_variance")

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(outputs=2, **kwargs)

    def ranking_loss(self, scores: RankedScores) -> Tensor:
        """Return one loss per pair, shape (groups,)."""
        won, lost = (scores.extras["outputs"][order] for order in ranked(scores))
        variances = won[:, 1].clamp(-20, 20).exp() + lost[:, 1].clamp(-20, 20).exp()
        z = ((won[:, 0] - lost[:, 0]) * variances.rsqrt()).clamp(-20, 20)
        return -scores.target * log_ndtr(z) - (1 - scores.target) * log_ndtr(-z)


def ranked(scores: RankedScores) -> tuple[Tensor, Tensor]:
    """Return the places of each pair's better and worse completion; completions of a pair stand side by side."""
    first = scores.ranks[0::2] < scores.ranks[1::2]
    place = 2 * scores.group[0::2]
    return place + (~first).long(), place + first.long()


class CautiousScorer(LearnedScorer):
    """The mean of a `MeanVarianceRewardModule` less some of its standard deviations: mean - k std.

    Args:
        folder: the reward model's.
        k: standard deviations taken off.
    """

    def __init__(self, folder: str, k: float = 1.0, **kwargs: Any) -> None:
        super().__init__(folder, **kwargs)
        self.k = k

    def score_of(self, outputs: Tensor) -> Tensor:
        """Return the cautious score of each completion, shape (completions,)."""
        return outputs[:, 0] - self.k * (0.5 * outputs[:, 1]).exp()
