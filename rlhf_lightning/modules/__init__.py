"""The stages as LightningModules. No loss arithmetic here: forward -> functional -> log."""

from rlhf_lightning.modules.base import AlignmentModule
from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.modules.reward import RewardModule
from rlhf_lightning.modules.sft import SFTModule

__all__ = ["AlignmentModule", "DPOModule", "PPOModule", "RewardModule", "SFTModule"]
