"""Several rewards, weighed by each prompt: `rlhf fit --config experiments/objectives_of_users/prompt_weights.yaml`.

Each row of the data has a column ``weight_NAME`` for every scorer NAME.
"""

from collections.abc import Sequence
from typing import Any

from rlhf_lightning.scoring.composition import ScorerGroup
from rlhf_lightning.scoring.scorer import Scores, column
from rlhf_lightning.types import Prompt


class PromptWeightedSum(ScorerGroup):
    r"""Directional rewards: score = sum_k w_k(prompt) r_k(prompt, completion) (Wang et al., 2402.18571, R = v^T r).

    Each r_k is a part of the judgement before weighting, logged as ``rollout/score_NAME``. Without a score of every
    scorer a completion cannot be judged.

    Args:
        scorers: each a Scorer or what `load_scorer` takes, by name; the data's column ``weight_NAME`` weighs it.

    Raises:
        MissingColumnError: the data has no weight for a scorer.
    """

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        """Return the weighted sum for each completion, and its terms before weighting as parts."""
        rows = self.member_judgements(prompts, completions, columns)
        weights = zip(*(column(columns, f"weight_{name}", self) for name in self.scorers), strict=True)
        found = []
        for row, values in zip(rows, weights, strict=True):
            own = dict(zip(self.scorers, map(float, values), strict=True))
            scores = {name: one.score for name, one in row.items() if one.score is not None}
            total = sum(own[name] * score for name, score in scores.items()) if len(scores) == len(row) else None
            found.append(self.combined(total, row, own))
        return found
