"""The stages and objectives as LightningModules. Formulas are in `functional`: a module runs forward passes and logs.

Every public class of this folder is exported automatically, so a new objective needs no line here. The imports below
are for type checkers.
"""

from typing import TYPE_CHECKING

from rlhf_lightning.loading import shipped_classes
from rlhf_lightning.training.module import AlignmentModule as AlignmentModule
from rlhf_lightning.training.offline import OfflineModule as OfflineModule
from rlhf_lightning.training.on_policy import OnPolicyModule as OnPolicyModule
from rlhf_lightning.training.pairs import PairObjective as PairObjective
from rlhf_lightning.training.rollout import RolloutModule as RolloutModule

if TYPE_CHECKING:
    from rlhf_lightning.modules.adaptive_preference import *
    from rlhf_lightning.modules.critic_free import *
    from rlhf_lightning.modules.distillation import *
    from rlhf_lightning.modules.dpo import *
    from rlhf_lightning.modules.grpo import *
    from rlhf_lightning.modules.online_opponents import *
    from rlhf_lightning.modules.online_preference import *
    from rlhf_lightning.modules.ppo import *
    from rlhf_lightning.modules.preference import *
    from rlhf_lightning.modules.process_reward import *
    from rlhf_lightning.modules.reference_free import *
    from rlhf_lightning.modules.reward import *
    from rlhf_lightning.modules.self_distillation import *
    from rlhf_lightning.modules.sft import *
    from rlhf_lightning.modules.unpaired import *

_SHIPPED = shipped_classes(__name__, object)
globals().update(_SHIPPED)
__all__ = sorted(["AlignmentModule", "OfflineModule", "OnPolicyModule", "PairObjective", "RolloutModule", *_SHIPPED])  # pyright: ignore
