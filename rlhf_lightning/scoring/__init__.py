"""Scorers of completions: learned models, functions of the text, verifiable answers, and combinations of scorers.

Every public scorer of this folder is exported automatically, so a new scorer needs no line here. The imports below are
for type checkers.
"""

from typing import TYPE_CHECKING

from rlhf_lightning.loading import shipped_classes
from rlhf_lightning.scoring.learned import load_scorer as load_scorer
from rlhf_lightning.scoring.scorer import Scorer as Scorer
from rlhf_lightning.scoring.scorer import checked_scores as checked_scores

if TYPE_CHECKING:
    from rlhf_lightning.scoring.answers import *
    from rlhf_lightning.scoring.composition import *
    from rlhf_lightning.scoring.encoders import *
    from rlhf_lightning.scoring.faults import *
    from rlhf_lightning.scoring.instructions import *
    from rlhf_lightning.scoring.learned import *
    from rlhf_lightning.scoring.monitor import *
    from rlhf_lightning.scoring.remote_scorer import *
    from rlhf_lightning.scoring.rubrics import *

_SHIPPED = shipped_classes(__name__, Scorer)
globals().update(_SHIPPED)
__all__ = sorted(["checked_scores", "load_scorer", *_SHIPPED])
