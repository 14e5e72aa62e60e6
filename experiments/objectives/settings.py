"""Settings of each objective on the quickstart's world, beyond the recipes of the assistant world.

Each family names the YAML file it starts from, what all its objectives depart in, and what each one does.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Family(NamedTuple):
    """Objectives that start from one YAML file.

    Attributes:
        config: name of the recipe below assistant/.
        settings: flags of all its objectives. ``model.scorer`` and ``model.teacher`` name a stage of the quickstart.
        objectives: flags of each objective, by class name.
    """

    config: str
    settings: dict[str, Any]
    objectives: dict[str, dict[str, Any]]


FAMILIES = (
    Family(
        "dpo",
        {},
        {
            "DPOModule": {"model.beta": 0.5},
            "ConservativeDPOModule": {"model.beta": 0.5},
            "RobustDPOModule": {"model.beta": 0.5},
            "IPOModule": {"model.beta": 1.0},
            "HingeModule": {"model.beta": 0.5},
            "EXOModule": {"model.beta": 0.5},
            "NCAModule": {"model.beta": 0.5},
            "BCOPairModule": {"model.beta": 0.5},
            "SPPOModule": {"model.beta": 0.25},
            "AOTModule": {"model.beta": 0.5},
            "UnpairedAOTModule": {"model.beta": 2.0, "model.learning_rate": 2e-4},
            "APOZeroModule": {"model.beta": 0.5},
            "APODownModule": {"model.beta": 5.0, "model.learning_rate": 5e-5},
            "DiscoPOPModule": {"model.beta": 0.5},
            "LengthNormalizedDPOModule": {"model.beta": 10.0},
            "ForwardKLDPOModule": {"model.beta": 0.5},
            "JensenShannonDPOModule": {"model.beta": 1.0},
            "AlphaDPOModule": {"model.beta": 0.5},
            "ReferenceFreeDPOModule": {"model.beta": 0.5},
            "RPOModule": {"model.beta": 0.5},
            "SimPOModule": {"model.beta": 10.0, "model.gamma": 1.0},
            "ORPOModule": {},
            "CPOModule": {"model.beta": 0.5},
            "WPOModule": {"model.beta": 0.5},
            "BetaDPOModule": {"model.beta": 0.5},
            "LDDPOModule": {"model.beta": 0.5},
            "TRDPOModule": {"model.beta": 0.5, "model.reference_every": 100},
        },
    ),
    Family(
        "dpo",
        {"data": "UnpairedDataModule"},
        {
            "KTOModule": {"model.beta": 0.5},
            "BCOModule": {"model.beta": 0.5},
        },
    ),
    Family(
        "ppo",
        {"model.scorer": "reward", "data.samples_per_prompt": 4},
        {
            "CriticFreeModule": {},
            "GRPOModule": {},
            "DrGRPOModule": {},
            "DAPOModule": {},
            "LitePPOModule": {},
            "GSPOModule": {},
            "CISPOModule": {},
            "RLOOModule": {},
            "ReinforcePlusPlusBaselineModule": {},
        },
    ),
    Family(
        "ppo",
        {"model.scorer": "reward"},
        {
            "PPOModule": {},
            "ReinforcePlusPlusModule": {},
            "ReMaxModule": {},
        },
    ),
    Family(
        "ppo",
        {"model.scorer": "reward", "data.samples_per_prompt": 2},
        {
            "OnlineDPOModule": {"model.beta": 0.5},
            "IterativeDPOModule": {"model.beta": 0.5, "model.rollouts_per_round": 10},
            "XPOModule": {"model.beta": 0.5},
            "NashMDModule": {"model.kl_coef": 0.02, "model.kl_target": "null"},
        },
    ),
    Family("ppo", {"model.teacher": "dpo"}, {"OnPolicyDistillationModule": {"model.scorer": "reward"}}),
    Family(
        "sft",
        {"model.teacher": "dpo", "model.from_scratch": "false"},
        {"GKDModule": {"model.learning_rate": 1e-3, "model.max_new_tokens": 48, "trainer.max_epochs": 1}},
    ),
)

REASONS = {
    "APODownModule": "It pushes chosen completions down as well, rejected ones further: meant for a policy that writes "
    "better ones than the data holds. This policy's are worse than the chosen ones, so what it unlearns is the best it "
    "could learn from. At beta 0.5 and learning rates of 1e-4 and 5e-4 gold falls to 0.06 and 0.04, at beta 2 to 0.18."
}
"""Why an objective does not raise the gold reward here, by class name."""
