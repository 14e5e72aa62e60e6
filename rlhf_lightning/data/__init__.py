"""DataModules: rows of text from anywhere in, optimizer steps of token ids out. Knows no models."""

from rlhf_lightning.data.batching import BatchPlan, PlannedStep
from rlhf_lightning.data.datamodule import AlignmentDataModule
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.data.with_completions import (
    PreferenceDataModule,
    ProcessDataModule,
    SFTDataModule,
    UnpairedDataModule,
)

__all__ = [
    "AlignmentDataModule", "BatchPlan", "PlannedStep", "PreferenceDataModule", "ProcessDataModule",
    "PromptDataModule", "SFTDataModule", "UnpairedDataModule",
]  # fmt: skip
