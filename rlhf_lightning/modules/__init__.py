"""The stages and objectives as LightningModules. No loss arithmetic here: forward -> functional -> log."""

from rlhf_lightning.modules.adaptive_preference import BetaDPOModule, LDDPOModule, TRDPOModule, WPOModule, WPOWeighting
from rlhf_lightning.modules.critic_free import CriticFreeModule
from rlhf_lightning.modules.distillation import GKDModule, OnPolicyDistillationModule
from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.modules.grpo import (
    CISPOModule,
    DAPOModule,
    DrGRPOModule,
    GRPOModule,
    GSPOModule,
    LitePPOModule,
    ReinforcePlusPlusBaselineModule,
    ReinforcePlusPlusModule,
    ReMaxModule,
    RLOOModule,
)
from rlhf_lightning.modules.online_opponents import IterativeDPOModule, NashMDModule, XPOModule
from rlhf_lightning.modules.online_preference import OnlineDPOModule
from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.modules.preference import (
    AOTModule,
    ConservativeDPOModule,
    DiscoPOPModule,
    EXOModule,
    HingeModule,
    IPOModule,
    LengthNormalizedDPOModule,
    RobustDPOModule,
    RPOModule,
    UnpairedAOTModule,
)
from rlhf_lightning.modules.process_reward import ProcessRewardModule
from rlhf_lightning.modules.ranking import DavidsonModule, PlackettLuceModule
from rlhf_lightning.modules.reference_free import CPOModule, ORPOModule, ReferenceFreeDPOModule, SimPOModule
from rlhf_lightning.modules.reward import RewardModule
from rlhf_lightning.modules.sft import SFTModule
from rlhf_lightning.modules.sided_preference import (
    AlphaDPOModule,
    APODownModule,
    APOZeroModule,
    BCOPairModule,
    ForwardKLDPOModule,
    JensenShannonDPOModule,
    NCAModule,
    SPPOModule,
)
from rlhf_lightning.modules.unpaired import BCOModule, KTOModule, UnpairedModule
from rlhf_lightning.training.module import AlignmentModule
from rlhf_lightning.training.offline import OfflineModule
from rlhf_lightning.training.on_policy import OnPolicyModule

__all__ = [
    "AOTModule",
    "APODownModule",
    "APOZeroModule",
    "AlignmentModule",
    "AlphaDPOModule",
    "BCOModule",
    "BCOPairModule",
    "BetaDPOModule",
    "CISPOModule",
    "CPOModule",
    "ConservativeDPOModule",
    "CriticFreeModule",
    "DAPOModule",
    "DPOModule",
    "DavidsonModule",
    "DiscoPOPModule",
    "DrGRPOModule",
    "EXOModule",
    "ForwardKLDPOModule",
    "GKDModule",
    "GRPOModule",
    "GSPOModule",
    "HingeModule",
    "IPOModule",
    "JensenShannonDPOModule",
    "KTOModule",
    "LDDPOModule",
    "LengthNormalizedDPOModule",
    "LitePPOModule",
    "NCAModule",
    "ORPOModule",
    "OfflineModule",
    "OnPolicyDistillationModule",
    "OnPolicyModule",
    "PPOModule",
    "PlackettLuceModule",
    "ProcessRewardModule",
    "RLOOModule",
    "RPOModule",
    "ReMaxModule",
    "ReferenceFreeDPOModule",
    "ReinforcePlusPlusBaselineModule",
    "ReinforcePlusPlusModule",
    "RewardModule",
    "RobustDPOModule",
    "SFTModule",
    "SPPOModule",
    "SimPOModule",
    "TRDPOModule",
    "UnpairedAOTModule",
    "UnpairedModule",
    "WPOModule",
    "WPOWeighting",
    "IterativeDPOModule",
    "NashMDModule",
    "OnlineDPOModule",
    "XPOModule",
]
