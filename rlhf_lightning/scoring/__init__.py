"""What scores a completion: learned models, functions of the text, and their compositions."""

from rlhf_lightning.scoring.base import Scorer, checked_scores, load_scorer
from rlhf_lightning.scoring.learned import LearnedScorer

__all__ = ["LearnedScorer", "Scorer", "checked_scores", "load_scorer"]
