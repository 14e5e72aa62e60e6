"""Models that judge, criticise and revise under a constitution: local, behind an address, simulated, or your own.

What they are asked is `feedback`'s; here is who answers.
"""

from rlhf_lightning.judging.labeller import AILabeller
from rlhf_lightning.judging.loading import load_judge
from rlhf_lightning.judging.local import LocalJudge, LocalWriter
from rlhf_lightning.judging.remote import RemoteJudge, RemoteWriter
from rlhf_lightning.judging.simulated import SimulatedJudge

__all__ = ["AILabeller", "LocalJudge", "LocalWriter", "RemoteJudge", "RemoteWriter", "SimulatedJudge", "load_judge"]
