"""DataModules: rows of text from anywhere in, optimizer steps of token ids out. Knows no models."""

from rlhf_lightning.data.batching import BatchPlan, PlannedStep
from rlhf_lightning.data.datamodule import AlignmentDataModule
from rlhf_lightning.data.preference import PreferenceDataModule
from rlhf_lightning.data.process import ProcessDataModule
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.data.sft import SFTDataModule
from rlhf_lightning.data.unpaired import UnpairedDataModule

__all__ = [
    "AlignmentDataModule", "BatchPlan", "PlannedStep", "PreferenceDataModule", "ProcessDataModule",
    "PromptDataModule", "SFTDataModule", "UnpairedDataModule",
]  # fmt: skip
