"""Prompts by success rate: `rlhf fit --config experiments/objectives_of_users/success_curriculum.yaml`."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from rlhf_lightning.data import PromptDataModule
from rlhf_lightning.training.gathering import gathered_rows
from rlhf_lightning.types import Rollout


class SuccessCurriculum(PromptDataModule):
    """Sample prompts more often if they are solved about half of the time (learnability, Foster et al., 2502.12272).

    A rollout's prompts are drawn without replacement with weights p (1 - p) + floor, where p is the running success
    rate of a prompt: p <- decay p + (1 - decay) (success rate of its scored completions), starting at 1/2.

    Args:
        source: source of the prompts.
        threshold: a completion succeeds if its score is above the threshold.
        decay: EMA decay of the success rate, applied in each rollout that contains the prompt.
        floor: weight of a prompt that is always or never solved.
    """

    def __init__(
        self, source: Any, threshold: float = 0.5, decay: float = 0.5, floor: float = 0.02, **kwargs: Any
    ) -> None:
        super().__init__(source, **kwargs)
        self.threshold, self.decay, self.floor = threshold, decay, floor
        self.rates: dict[int, float] = {}

    def choose_rows(self, rollout: int, count: int) -> np.ndarray:
        """Return the rows with the largest log(u) / weight, where u is uniform and determined by (seed,
        rollout, row).
        """
        rates = np.array([self.rates.get(row, 0.5) for row in self.train_rows.tolist()])
        raw = np.random.Philox(key=np.array([self.seed, rollout], dtype=np.uint64)).random_raw(len(rates))
        keys = np.log((raw + 0.5) / 2.0**64) / (rates * (1 - rates) + self.floor)
        return self.train_rows[np.argsort(-keys, kind="stable")[:count]]

    def on_rollout_end(self, rollout: Rollout, means: Mapping[str, float]) -> None:
        """Update the success rates of the answered prompts, including dropped groups; all ranks compute the same."""
        module, row_ids, scores = self.trainer.lightning_module, rollout.row_ids, rollout.scores
        if rollout.left_out is not None:  # dynamic sampling
            row_ids += rollout.left_out.row_ids
            scores = torch.cat([scores, rollout.left_out.scores.to(scores)])
        judged = ~scores.isnan()
        mine = torch.tensor(row_ids, dtype=torch.long, device=judged.device)[judged], scores[judged] > self.threshold
        rows, solved = (gathered_rows(module, one.to(module.device)) for one in mine)
        for row in rows.unique().tolist():
            share = float(solved[rows == row].float().mean())
            self.rates[row] = self.decay * self.rates.get(row, 0.5) + (1 - self.decay) * share

    def state_dict(self) -> dict[str, Any]:
        """Return the success rates."""
        return {"rates": self.rates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the success rates."""
        self.rates = state["rates"]
