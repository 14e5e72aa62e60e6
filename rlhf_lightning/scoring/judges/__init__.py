"""Language models as judges: local, behind a server, simulated, or your own."""

from rlhf_lightning.scoring.judges.critiques import CritiqueJudge, load_judge
from rlhf_lightning.scoring.judges.judge import SimulatedJudge
from rlhf_lightning.scoring.judges.local import LocalJudge, LocalWriter
from rlhf_lightning.scoring.judges.remote import RemoteJudge, RemoteWriter

__all__ = ["CritiqueJudge", "LocalJudge", "LocalWriter", "RemoteJudge", "RemoteWriter", "SimulatedJudge", "load_judge"]
