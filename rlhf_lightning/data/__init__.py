"""DataModules: read rows of text from many sources, and yield optimizer steps of token ids. Independent of models."""

from rlhf_lightning.data.batching import BatchPlan, PlannedStep
from rlhf_lightning.data.datamodule import AlignmentDataModule
from rlhf_lightning.data.offline import (
    PreferenceDataModule,
    ProcessDataModule,
    SFTDataModule,
    UnpairedDataModule,
)
from rlhf_lightning.data.prompts import PromptDataModule

__all__ = [
    "AlignmentDataModule", "BatchPlan", "PlannedStep", "PreferenceDataModule", "ProcessDataModule",
    "PromptDataModule", "SFTDataModule", "UnpairedDataModule",
]  # fmt: skip
