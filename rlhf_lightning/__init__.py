"""The PyTorch Lightning framework for research on learning from human feedback.

The public names are read from their rooms when they are first asked for, so that ``rlhf --help`` need not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_lightning.data import (
        AlignmentDataModule,
        PreferenceDataModule,
        ProcessDataModule,
        PromptDataModule,
        SFTDataModule,
        UnpairedDataModule,
    )
    from rlhf_lightning.models.loading import LoraSettings
    from rlhf_lightning.modules import (
        AlignmentModule,
        AlphaDPOModule,
        AOTModule,
        APODownModule,
        APOZeroModule,
        BCOModule,
        BCOPairModule,
        BetaDPOModule,
        CISPOModule,
        ConservativeDPOModule,
        CPOModule,
        CriticFreeModule,
        DAPOModule,
        DavidsonModule,
        DiscoPOPModule,
        DPOModule,
        DrGRPOModule,
        EXOModule,
        ForwardKLDPOModule,
        GKDModule,
        GRPOModule,
        GSPOModule,
        HingeModule,
        IPOModule,
        IterativeDPOModule,
        JensenShannonDPOModule,
        KTOModule,
        LDDPOModule,
        LengthNormalizedDPOModule,
        LitePPOModule,
        NashMDModule,
        NCAModule,
        OfflineModule,
        OnlineDPOModule,
        OnPolicyDistillationModule,
        OnPolicyModule,
        ORPOModule,
        PlackettLuceModule,
        PPOModule,
        ProcessRewardModule,
        ReferenceFreeDPOModule,
        ReinforcePlusPlusBaselineModule,
        ReinforcePlusPlusModule,
        ReMaxModule,
        RewardModule,
        RLOOModule,
        RobustDPOModule,
        RPOModule,
        SFTModule,
        SimPOModule,
        SPPOModule,
        TRDPOModule,
        UnpairedAOTModule,
        UnpairedModule,
        WPOModule,
        WPOWeighting,
        XPOModule,
    )
    from rlhf_lightning.sampling.engines import SamplingSettings
    from rlhf_lightning.scoring import LearnedScorer, Scorer
    from rlhf_lightning.types import Loss

__all__ = [
    "AOTModule",
    "APODownModule",
    "APOZeroModule",
    "AlignmentDataModule",
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
    "LearnedScorer",
    "LengthNormalizedDPOModule",
    "LitePPOModule",
    "LoraSettings",
    "Loss",
    "NCAModule",
    "ORPOModule",
    "OfflineModule",
    "OnPolicyDistillationModule",
    "OnPolicyModule",
    "PPOModule",
    "PlackettLuceModule",
    "PreferenceDataModule",
    "ProcessDataModule",
    "ProcessRewardModule",
    "PromptDataModule",
    "RLOOModule",
    "RPOModule",
    "ReMaxModule",
    "ReferenceFreeDPOModule",
    "ReinforcePlusPlusBaselineModule",
    "ReinforcePlusPlusModule",
    "RewardModule",
    "RobustDPOModule",
    "SFTDataModule",
    "SFTModule",
    "SPPOModule",
    "SamplingSettings",
    "Scorer",
    "SimPOModule",
    "TRDPOModule",
    "UnpairedAOTModule",
    "UnpairedDataModule",
    "UnpairedModule",
    "WPOModule",
    "WPOWeighting",
    "IterativeDPOModule",
    "NashMDModule",
    "OnlineDPOModule",
    "XPOModule",
]

_ROOMS = ("modules", "data", "scoring", "types", "models.loading", "models.sampling")


def __getattr__(name: str) -> Any:
    """Return a public name from the room it lives in."""
    if name in __all__:
        for room in _ROOMS:
            module = importlib.import_module(f"{__name__}.{room}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
