"""PPO-Lagrangian as a user's file: `rlhf fit --config ppo_lagrangian.yaml --model.init_from ... --model.scorer ...`."""

import math
from collections.abc import Mapping
from typing import Any

from rlhf_lightning.modules import PPOModule
from rlhf_lightning.scoring.scorer import Judgements
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.types import Rollout


class PPOLagrangianModule(PPOModule):
    r"""PPO under a constraint: the highest reward among policies whose mean cost is at most ``cost_limit``.

    Each completion scores (r - lambda c) / (1 + lambda); after each rollout log lambda += multiplier_lr * (mean c -
    cost_limit), the mean over all ranks (Dai et al., 2310.12773, Eq. 10 and App. B). r is the score of the scorer's
    `Judgement`, c its part ``cost``. Against the paper, one critic learns the mixed score, the cost pays no KL, and the
    step of log lambda has no factor lambda. ``rollout/score_reward`` and ``rollout/score_cost`` are logged.

    Target: no closed form: lambda moves with the costs.

    Args:
        cost_limit: largest mean cost, in the scorer's units.
        multiplier: lambda before the first rollout, positive.
        multiplier_lr: step size of log lambda, per unit of cost; 0 keeps lambda.
    """

    paper = "Dai et al. 2023, arXiv 2310.12773"
    no_target = "no closed form: lambda moves with the costs"

    def __init__(
        self,
        scorer: Any,
        cost_limit: float = 0.0,
        multiplier: float = 1.0,
        multiplier_lr: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(scorer=scorer, **kwargs)
        self.cost_limit, self.multiplier_lr = cost_limit, multiplier_lr
        self.log_multiplier = math.log(multiplier)

    def shape_judgements(self, judged: Judgements) -> Judgements:
        """Return each completion's score as (r - lambda c) / (1 + lambda)."""
        reward, cost, multiplier = judged.scores, judged.parts["cost"], math.exp(self.log_multiplier)
        scores = (reward - multiplier * cost) / (1 + multiplier)
        return judged._replace(scores=scores, parts={**judged.parts, "reward": reward})

    def on_rollout_end(self, rollout: Rollout, means: Mapping[str, float]) -> None:
        """Raise lambda where the mean cost is above its limit, lower it where it is below."""
        cost = means.get("score_cost", math.nan)
        if math.isfinite(cost):  # no completion of the rollout was judged
            self.log_multiplier += self.multiplier_lr * (cost - self.cost_limit)

    def log_rollout(self, meter: Meter, norm: float, episodes: int, **further: float) -> dict[str, float]:
        """Log the rollout with the multiplier that it used."""
        return super().log_rollout(meter, norm, episodes, multiplier=math.exp(self.log_multiplier), **further)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save log lambda with the counters."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["log_multiplier"] = self.log_multiplier

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore it."""
        super().on_load_checkpoint(checkpoint)
        self.log_multiplier = checkpoint["log_multiplier"]

    def reaches_kl_optimum(self) -> bool:
        """Return False: lambda moves."""
        return False
