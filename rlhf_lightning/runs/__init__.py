"""The run layer: run folders, loggers, checkpoints, resume, exports and callbacks. Nothing here alters a gradient."""

from rlhf_lightning.runs.checkpoint import RunCheckpoint
from rlhf_lightning.runs.hparams import RunHparams
from rlhf_lightning.runs.manifest import RunManifest
from rlhf_lightning.runs.model_export import ModelExport
from rlhf_lightning.runs.predictions import PredictionWriter
from rlhf_lightning.runs.progress import RunProgress
from rlhf_lightning.runs.ranks import RankWatch
from rlhf_lightning.runs.run import RunFolder
from rlhf_lightning.runs.run_records import RunRecords
from rlhf_lightning.runs.samples import SampleTable
from rlhf_lightning.runs.skipped_updates import SkippedUpdates

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
