"""What scores a completion: learned models, functions of the text, verifiable answers, and their compositions."""

from rlhf_lightning.scoring.composition import Ensemble, WeightedSum
from rlhf_lightning.scoring.faults import FaultTolerant
from rlhf_lightning.scoring.ifeval import IFEvalScorer
from rlhf_lightning.scoring.instructions import InstructionScorer
from rlhf_lightning.scoring.learned import LearnedScorer
from rlhf_lightning.scoring.maths import MathAnswerScorer
from rlhf_lightning.scoring.process import ProcessScorer
from rlhf_lightning.scoring.remote import RemoteScorer
from rlhf_lightning.scoring.scorer import Scorer, checked_scores, load_scorer
from rlhf_lightning.scoring.shaping import LengthPenalty, RepetitionPenalty

__all__ = [
    "Ensemble",
    "FaultTolerant",
    "IFEvalScorer",
    "InstructionScorer",
    "LearnedScorer",
    "LengthPenalty",
    "MathAnswerScorer",
    "ProcessScorer",
    "RemoteScorer",
    "RepetitionPenalty",
    "Scorer",
    "WeightedSum",
    "checked_scores",
    "load_scorer",
]
