"""REBEL as a user's file: `rlhf fit --config rebel.yaml --model.init_from ... --model.scorer ...`."""

from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.errors import SettingError
from rlhf_lightning.modules import OnlineDPOModule
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.types import Loss, Pairs, PreferenceLogprobs, Rollout


class REBELModule(OnlineDPOModule):
    """REBEL: regress the difference of two samples' rewards on the difference of their log-ratios.

    loss = ((1 / eta) (log policy/old (y) - log policy/old (y')) - (r(y) - r(y')))^2 over the two samples y, y' of each
    prompt; old is the policy that sampled them (Gao et al., 2404.16767, Eq. 1 and Algorithm 1). Before the first update
    the loss is (r(y) - r(y'))^2. The reference is used only for the metric ``rollout/kl``.

    Target: no closed form: every rollout is one step of mirror descent towards normalised old * exp(eta r).

    Args:
        eta: step size of mirror descent, per reward unit.
    """

    paper = "Gao et al. 2024, arXiv 2404.16767"
    no_target = "no closed form: every rollout solves one step of mirror descent"
    means_it = {
        **dict.fromkeys(
            ("best is chosen", "best of three", "every pair", "ties"), "both samples are regressed on, in either order"
        ),
        "reference logprobs": "the policy that sampled stands in the reference's place (Eq. 1)",
    }

    def __init__(self, scorer: Any, eta: float = 1.0, **kwargs: Any) -> None:
        super().__init__(scorer=scorer, beta=1 / eta, **kwargs)

    def check_groups(self, rollout: Rollout) -> None:
        """Refuse prompts without exactly two samples."""
        super().check_groups(rollout)
        if bool((torch.bincount(rollout.group) != 2).any()):
            raise SettingError(
                "rebel-pairs", "REBEL compares two samples of a prompt: set data.samples_per_prompt to 2"
            )

    def pairs(self, rollout: Rollout) -> Pairs:
        """Return both samples of each prompt, including ties, as first and second. Samples without a score form no
        pair.
        """
        first, second = rollout.group.argsort(stable=True).view(-1, 2).unbind(-1)
        gap = rollout.scores[first] - rollout.scores[second]
        ones = torch.ones_like(gap)
        return Pairs(first, second, ones, gap, ones).at((~gap.isnan()).nonzero().squeeze(-1))

    def preference_logprobs(self, rollout: Rollout, pairs: Pairs) -> PreferenceLogprobs:
        """Return the log-probabilities of some pairs, with the sampling policy as the reference."""
        return super().preference_logprobs(rollout._replace(reference_logprobs=rollout.old_logprobs), pairs)

    def preference_loss(self, pairs: PreferenceLogprobs) -> Tensor:
        """Return the squared error of each pair, shape (pairs,)."""
        return (self.reward_margin(pairs) - pairs.rated_margin).square()

    def measure_pairs(self, pairs: PreferenceLogprobs, loss: Loss, count: int, meter: Meter) -> None:
        """Record the loss only, since neither sample of a pair is the chosen one."""
        meter.add_ratio("loss", (loss.values * pairs.weights).sum(), count)
