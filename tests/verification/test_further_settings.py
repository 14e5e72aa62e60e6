"""Every shipped objective passes its contract at two further settings, where ignored settings are noticed."""

import pytest

from rlhf_lightning.commands.objectives import objective_classes
from rlhf_lightning.modules import (
    BCOModule,
    DPOModule,
    GKDModule,
    KTOModule,
    NashMDModule,
    OnlineDPOModule,
    OnPolicyDistillationModule,
    PPOModule,
    ProcessRewardModule,
    RewardModule,
    SelfDistillationModule,
    SFTModule,
)
from rlhf_lightning.training.on_policy import OnPolicyModule
from rlhf_lightning.verification.contract import verify

BY_FAMILY = (
    (SFTModule, ({"learning_rate": 1e-4}, {"lr_schedule": "linear"})),
    (KTOModule, ({"desirable_weight": 1.33}, {"beta": 1.3, "undesirable_weight": 1.5})),
    (BCOModule, ({"beta": 0.7}, {"beta": 1.3})),
    (ProcessRewardModule, ({"learning_rate": 1e-4}, {"lr_schedule": "linear"})),
    (RewardModule, ({"centering": 0.1}, {"lr_schedule": "linear"})),
    (GKDModule, ({"beta": 0.1, "on_policy_fraction": 0.0}, {"softmax_temperature": 2.0, "on_policy_fraction": 1.0})),
    (OnPolicyDistillationModule, ({"temperature": 0.7}, {"ppo_epochs": 2, "aggregation": "sequence_mean_token_sum"})),
    (SelfDistillationModule, ({"temperature": 0.7}, {"beta": 0.5, "ppo_epochs": 2})),
    (OnlineDPOModule, ({"beta": 1.3}, {"temperature": 0.7, "beta": 0.7})),
    (NashMDModule, ({"kl_coef": 1.0}, {"mixture": 0.3})),
    (PPOModule, ({"lam": 0.9, "value_clip": 0.1}, {"temperature": 0.7, "gamma": 0.95, "lam": 0.8})),
    (OnPolicyModule, ({"kl_coef": 0.8, "sampler_correction": "token_truncate"}, {"temperature": 0.7, "ppo_epochs": 2})),
    (DPOModule, ({"beta": 1.3}, {"beta": 0.7, "label_smoothing": 0.1})),
)
"""Settings by family; the first family that a class belongs to counts."""

OWN = {
    "RobustDPOModule": ({"flip_rate": 0.05}, {"beta": 1.3}),
    "EXOModule": ({"epsilon": 0.01}, {"beta": 1.3}),
    "IPOModule": ({"average": False}, {"beta": 1.3}),
    "SimPOModule": ({"gamma": 0.3}, {"beta": 3.0}),
    "LDDPOModule": ({"alpha": 0.2}, {"beta": 1.3}),
    "AOTModule": ({"beta": 1.3}, {"beta": 0.7}),
    "UnpairedAOTModule": ({"beta": 1.3}, {"beta": 0.7}),
    "DavidsonModule": ({"tie_share": 0.2}, {"tie_share": 0.7}),
    "XPOModule": ({"beta": 1.3}, {"alpha": 0.01}),
    **dict.fromkeys(
        ("PlackettLuceModule", "MeanVarianceRewardModule", "AttributesRewardModule"),
        ({"learning_rate": 1e-4}, {"lr_schedule": "linear"}),
    ),
}

CASES = [
    (kind, settings)
    for kind in objective_classes()
    for settings in OWN.get(kind.__name__, next(settings for family, settings in BY_FAMILY if issubclass(kind, family)))
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "settings"), CASES, ids=lambda one: getattr(one, "__name__", str(one)))
def test_every_objective_passes_at_other_settings(kind, settings):
    found = verify(kind, settings)
    assert [check for check in found.failed if check.name != "target"] == []
    assert found.convergence is not None and found.convergence.gold_after > found.convergence.gold_before - 0.2
