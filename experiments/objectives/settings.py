"""Settings of each objective in the quickstart's world, beyond the recipes of the assistant world.

Objectives are discovered automatically. Each starts from the recipe of its family; `TUNED` holds additional settings of
single objectives.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from rlhf_lightning.commands.objectives import objective_classes


class Run(NamedTuple):
    """How one objective is trained.

    Attributes:
        objective: its class name.
        config: name of the recipe below assistant/.
        settings: additional flags to the recipe. ``model.scorer`` and ``model.teacher`` name a stage of the quickstart.
    """

    objective: str
    config: str
    settings: dict[str, Any]


SCORED = {"model.scorer": "reward"}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "NashMDModule": ("ppo", {**SCORED, "data.samples_per_prompt": 2}),
    "OnPolicyDistillationModule": ("ppo", {"model.teacher": "dpo", **SCORED}),
    "ReinforcePlusPlusModule": ("ppo", SCORED),
    "ReMaxModule": ("ppo", SCORED),
    "CriticFreeModule": ("ppo", {**SCORED, "data.samples_per_prompt": 4}),
    "OnlineDPOModule": ("ppo", {**SCORED, "data.samples_per_prompt": 2, "model.beta": 0.5}),
    "PPOModule": ("ppo", SCORED),
    "GKDModule": ("sft", {"model.teacher": "dpo", "model.from_scratch": "false"}),
    "UnpairedModule": ("dpo", {"data": "UnpairedDataModule", "model.beta": 0.5}),
    "ORPOModule": ("dpo", {}),
    "DPOModule": ("dpo", {"model.beta": 0.5}),
}
"""Recipe and flags of each family, by its base class; the first listed base class of an objective applies."""

TUNED: dict[str, dict[str, Any]] = {
    "IPOModule": {"model.beta": 1.0},
    "SPPOModule": {"model.beta": 0.25},
    "UnpairedAOTModule": {"model.beta": 2.0, "model.learning_rate": 2e-4},
    "APODownModule": {"model.beta": 5.0, "model.learning_rate": 5e-5},
    "LengthNormalizedDPOModule": {"model.beta": 10.0},
    "JensenShannonDPOModule": {"model.beta": 1.0},
    "SimPOModule": {"model.beta": 10.0, "model.gamma": 1.0},
    "TRDPOModule": {"model.reference_every": 100},
    "IterativeDPOModule": {"model.rollouts_per_round": 10},
    "NashMDModule": {"model.kl_coef": 0.02, "model.kl_target": "null"},
    "GKDModule": {"model.learning_rate": 1e-3, "model.max_new_tokens": 48, "trainer.max_epochs": 1},
}
"""Flags that single objectives need to train well in this world."""

REASONS = {
    "APODownModule": "It pushes chosen completions down as well, rejected ones further: meant for a policy that writes "
    "better ones than the data holds. This policy's are worse than the chosen ones, so what it unlearns is the best it "
    "could learn from. At beta 0.5 and learning rates of 1e-4 and 5e-4 gold falls to 0.06 and 0.04, at beta 2 to 0.18."
}
"""Why an objective does not raise the gold reward here, by class name."""


def runs() -> list[Run]:
    """Return the run of every shipped objective that trains a policy after SFT."""
    found = []
    for kind in objective_classes():
        heads = [base.__name__ for base in kind.__mro__ if base.__name__ in FAMILIES]
        if heads:
            config, settings = FAMILIES[heads[0]]
            found.append(Run(kind.__name__, config, {**settings, **TUNED.get(kind.__name__, {})}))
    return found
