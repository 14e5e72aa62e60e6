"""Adapters for losses and advantages of verl: ``rlhf verify --foreign verl:Policy``; install it with ``--no-deps``."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any, Literal

from torch import Tensor

from rlhf_lightning.modules import (
    CISPOModule,
    CriticFreeModule,
    DrGRPOModule,
    GRPOModule,
    GSPOModule,
    PPOModule,
    RLOOModule,
)
from rlhf_lightning.types import CriticValues, PolicyLogprobs, Rollout
from rlhf_lightning.verification.foreign import RunsAs, compared_with, import_alone

PACKAGE = "verl"

_KL = {"kl_place": "reward", "kl_estimator": "k1"}


def _algorithms() -> Any:
    if "verl.trainer.ppo.core_algos" in sys.modules:
        return sys.modules["verl.trainer.ppo.core_algos"]
    stubs = ("omegaconf", "tensordict", "ray", "codetiming", "hydra")
    groupwise = import_alone("verl.utils.groupwise", stubs)
    for name in ("verl.trainer.config", "verl.workers.config"):
        import_alone(f"{name}.__none__", stubs)
    utils = sys.modules["verl.utils"]
    utils.as_torch_index, utils.group_mean_std = groupwise.as_torch_index, groupwise.group_mean_std  # type: ignore[attr-defined]
    return import_alone("verl.trainer.ppo.core_algos", stubs)


def _config(**settings: Any) -> Any:
    """Return a config of verl's actor."""
    kind = sys.modules["verl.workers.config"].ActorConfig
    found = kind()
    defaults: dict[str, Any] = {
        "clip_ratio_low": None,
        "clip_ratio_high": None,
        "global_batch_info": {},
        "tau_pos": 1.0,
    }
    for name, value in {**defaults, "tau_neg": 1.05, **settings}.items():
        setattr(found, name, value)
    found.get = lambda name, default=None: getattr(found, name, default)
    found.policy_loss = SimpleNamespace(dro_beta=0.1)
    return found


@compared_with(
    {
        "vanilla": (PPOModule, {"dual_clip": 3.0}),
        "gspo": (GSPOModule, {"clip": 0.2, "clip_high": None, **_KL}),
        "sapo": (GRPOModule, {"objective": "soft_gate", **_KL}),
        "cispo": (CISPOModule, {"cispo_low": 0.8, "cispo_high": 1.2, **_KL}),
        "geo_mean": RunsAs(CriticFreeModule, {"aggregation": "sequence_mean_token_mean"}),
    },
    by="loss_type",
)
def Policy(
    logprobs: PolicyLogprobs,
    loss_type: Literal["vanilla", "gspo", "sapo", "cispo", "geo_mean", "dppo_tv", "dppo_kl"] = "vanilla",
    clip: float = 0.2,
) -> Tensor:
    """Call the policy loss that verl registers under the given name."""
    core = _algorithms()
    mask = logprobs.completion_mask.to(logprobs.logprobs)
    mode = {"gspo": "seq-mean-token-mean", "sapo": "seq-mean-token-mean"}.get(loss_type, "token-mean")
    config = _config(clip_ratio=clip, clip_ratio_c=3.0 if loss_type == "vanilla" else 20.0)
    loss = core.get_policy_loss_fn(loss_type)
    given = (logprobs.old_logprobs, logprobs.logprobs, logprobs.advantages, mask, mode, config)
    return loss(*given)[0]


@compared_with(PPOModule)
def Value(values: CriticValues, value_clip: float = 0.2) -> Tensor:
    """Call ``compute_value_loss``."""
    mask = values.completion_mask.to(values.values)
    given = (values.values, values.returns, values.old_values, mask, value_clip)
    return _algorithms().compute_value_loss(*given)[0]


@compared_with(
    {
        "grpo": (GRPOModule, {"scale_epsilon": 1e-6}),
        "dr_grpo": DrGRPOModule,
        "rloo": RLOOModule,
    },
    by="estimator",
)
def Advantages(
    rollout: Rollout, estimator: Literal["grpo", "dr_grpo", "rloo"] = "grpo", scale_epsilon: float = 1e-6
) -> Tensor:
    """Call verl's outcome advantages of the given name, with the family's shaped rewards as token rewards."""
    core = _algorithms()
    mask = rollout.completion_mask.to(rollout.old_logprobs)
    rewards, index = rollout.extras["rewards"].to(mask), rollout.group.numpy()
    if estimator == "rloo":
        return core.compute_rloo_outcome_advantage(rewards, mask, index)[0]
    scaled = estimator == "grpo"
    return core.compute_grpo_outcome_advantage(rewards, mask, index, scale_epsilon, norm_adv_by_std_in_grpo=scaled)[0]
