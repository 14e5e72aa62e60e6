"""What scores a completion: learned models, functions of the text, and their compositions."""

from rlhf_lightning.scoring.base import Scorer, checked_scores
from rlhf_lightning.scoring.learned import LearnedScorer
from rlhf_lightning.scoring.loading import load_scorer
from rlhf_lightning.scoring.process import ProcessScorer

__all__ = ["LearnedScorer", "ProcessScorer", "Scorer", "checked_scores", "load_scorer"]
