"""What happens beside training: checkpoints, exports, samples, the run's folder. Nothing here alters a gradient."""

from rlhf_lightning.callbacks.checkpoint import RunCheckpoint
from rlhf_lightning.callbacks.curves import RunCurves
from rlhf_lightning.callbacks.export import ModelExport
from rlhf_lightning.callbacks.hparams import RunHparams
from rlhf_lightning.callbacks.manifest import RunManifest
from rlhf_lightning.callbacks.predictions import PredictionWriter
from rlhf_lightning.callbacks.progress import RunProgress
from rlhf_lightning.callbacks.ranks import RankWatch
from rlhf_lightning.callbacks.samples import SampleTable
from rlhf_lightning.callbacks.skips import SkippedUpdates

__all__ = [
    "ModelExport",
    "PredictionWriter",
    "RankWatch",
    "RunCheckpoint",
    "RunCurves",
    "RunHparams",
    "RunManifest",
    "RunProgress",
    "SampleTable",
    "SkippedUpdates",
]
