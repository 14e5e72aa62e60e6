"""The run layer: run folders, loggers, checkpoints, resume, exports and callbacks. It never changes a gradient."""

from rlhf_lightning.runs.checkpoint import RunCheckpoint
from rlhf_lightning.runs.interruptions import RankWatch
from rlhf_lightning.runs.loggers import RunHparams
from rlhf_lightning.runs.manifest import RunManifest
from rlhf_lightning.runs.outputs import ModelExport, PredictionWriter, SkippedUpdates
from rlhf_lightning.runs.progress import RunProgress
from rlhf_lightning.runs.run import RunFolder
from rlhf_lightning.runs.run_records import RunRecords
from rlhf_lightning.runs.samples import SampleTable

__all__ = [
    "ModelExport",
    "PredictionWriter",
    "RankWatch",
    "RunCheckpoint",
    "RunFolder",
    "RunHparams",
    "RunManifest",
    "RunProgress",
    "RunRecords",
    "SampleTable",
    "SkippedUpdates",
]
