"""Write the page of results, measured in the hazard world and on the real model."""

from __future__ import annotations

from typing import Any

from rlhf_lightning.constitution.critique import revisions_table
from rlhf_lightning.constitution.labels import describe
from rlhf_lightning.evaluation.report import interval, markdown_table

NAMES = {"sft": "helpful SFT", "sl_cai": "SL-CAI", "rl_cai": "RL-CAI"}


def holds(policies: dict[str, Any]) -> dict[str, bool]:
    """Return whether each stage is more harmless beyond its confidence interval, and not less helpful beyond its
    interval.
    """
    return {
        f"{name} {what}": ok
        for name in ("sl_cai", "rl_cai")
        for what, ok in (
            ("is more harmless", policies[name]["harmlessness_gain"]["ci"][0] > 0),
            ("is not less helpful", policies[name]["helpfulness_gain"]["ci"][1] >= 0),
        )
    }


def page(world: dict[str, Any] | None, smollm2: dict[str, Any] | None) -> str:
    """Return the results as Markdown. Parts that have not been run are named as such."""
    parts = ["# Constitutional AI", "`make constitution` runs all of this and writes this page."]
    parts += world_part(world) if world else ["The hazard world has not been run."]
    parts += smollm2_part(smollm2) if smollm2 else ["SmolLM2 has not been run."]
    return "\n\n".join(parts) + "\n"


def world_part(world: dict[str, Any]) -> list[str]:
    """Return the change of helpfulness and harmlessness, stage by stage."""
    header = ["policy", "harmlessness", "95 %", "gain", "95 %", "helpfulness", "95 %", "gain", "95 %", "KL risky", "KL"]
    rows = []
    for name, found in world["policies"].items():
        row: list[Any] = [NAMES[name]]
        for what in ("harmlessness", "harmlessness_gain", "helpfulness", "helpfulness_gain"):
            row += [found[what]["mean"], interval(found[what]["ci"])]
        rows.append([*row, found["harmlessness_kl"], found["helpfulness_kl"]])
    held = "; ".join(f"{NAMES[said.split()[0]]} {said.partition(' ')[2]}: {'yes' if ok else 'NO'}"
                     for said, ok in holds(world["policies"]).items())  # fmt: skip
    judge, given = world["judge"], world["judge_arguments"]
    return [
        f"## The hazard world, seed {world['seed']}",
        "Harmlessness of answers to held-out risky requests and helpfulness of answers to held-out ordinary ones, both "
        "by the world's gold rewards, which nothing was trained on; gains over the helpful SFT policy on the same "
        "random numbers; intervals are bootstrapped over prompts. KL from the helpful SFT policy, nats per completion.",
        markdown_table(header, rows),
        f"{held}. {world['seconds']:,} s in all.",
        "Revisions:",
        revisions_table(world["revisions"]),
        f"The judge is simulated: log-odds {given['scale']:g} times the difference of harmlessness, a bias of "
        f"{given['position_bias']:g} towards the first place, noise of {given['noise']:g}; both orders, log-odds "
        "averaged over them and over two principles. What its labels say of it:",
        markdown_table(["judge", "value"], describe(judge)),
    ]


def smollm2_part(report: dict[str, Any]) -> list[str]:
    """Return how well a small real model works as critic and judge."""
    return [
        "## SmolLM2-135M-Instruct as critic and as judge",
        f"As it is, untrained for either. Judge: {report['pairs']:,} pairs of pandalm (people's majority of three), "
        "constitution `helpful`, one principle a pair, both orders, log-odds averaged. Naming the longer answer agrees "
        f"with people in {report['longer']:.3f} of them.",
        markdown_table(["judge", "value"], describe(report["judge"])),
        f"Critic: {report['prompts']:,} prompts of people, constitution `harmless`, {report['rounds']} rounds. Mean "
        "length of a kept revision over that of its parent stands in the last column.",
        revisions_table(report["revisions"]),
        f"{report['seconds']:,} s in all. A model of this size follows neither the question nor the principle: the "
        "figures show the machinery, and what to look at before a judge is trusted.",
    ]
