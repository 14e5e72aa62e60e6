"""Write report.json and report.md of the real run."""

from __future__ import annotations

import dataclasses
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from rlhf_lightning.evaluation.report import interval, markdown_table, write_json, write_markdown

PACKAGES = ("rlhf-lightning", "torch", "lightning", "transformers", "peft", "datasets", "tokenizers", "gguf")


def checks(report: dict[str, Any]) -> dict[str, bool]:
    """Return the results that a full run must show, and whether this run shows them."""
    return {
        "the reward model beats the bag of words": report["reward_model"]["lead"] > 0,
        "the reward margin of DPO is above 0": report["dpo"]["reward_margin_ci"][0] > 0,
        "the score of PPO rises": report["ppo"]["score_change_ci"][0] > 0,
    }


def settings(budget: Any, arguments: Any) -> dict[str, Any]:
    """Return the settings of the run and its hardware and software."""
    return {
        "smoke": arguments.smoke,
        "seed": arguments.seed,
        "model": Path(arguments.model).name if Path(arguments.model).exists() else arguments.model,
        "budget": dataclasses.asdict(budget),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "versions": {"python": platform.python_version(), **{name: version_of(name) for name in PACKAGES}},
    }


def version_of(package: str) -> str | None:
    """Return a package's version; None if only its source is available."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def peak_memory() -> float | None:
    """Return the peak memory of this process, GiB; None if the system does not report it."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**30 if sys.platform == "darwin" else 2**20), 2)


def write(report: dict[str, Any], out: Path) -> tuple[Path, Path]:
    """Write report.json and report.md; return their paths."""
    return write_json(out / "report.json", report), write_markdown(out / "report.md", document(report))


def tables(report: dict[str, Any]) -> str:
    """Return the table of each stage's effect on its held-out rows."""
    sft, reward, dpo, ppo = (report[stage] for stage in ("sft", "reward_model", "dpo", "ppo"))

    def changed(stage: str, label: str, part: dict[str, Any], name: str) -> list[Any]:
        return [stage, label, part[f"{name}_before"], part[f"{name}_after"], interval(part[f"{name}_change_ci"])]

    words, lead = reward["bag_of_words_accuracy"], interval(reward["lead_ci"])
    rows = [
        changed("SFT", "loss, nats a token", sft, "loss"),
        ["reward model", "accuracy (before: bag of words)", words, reward["accuracy"], lead],
        ["DPO", "reward margin", 0.0, dpo["reward_margin"], interval(dpo["reward_margin_ci"])],
        ["DPO", "KL to SFT, nats", 0.0, dpo["kl"], interval(dpo["kl_ci"])],
        changed("PPO", "score", ppo, "score"),
        changed("PPO", "EOS rate", ppo, "eos_rate"),
        changed("PPO", "completion length", ppo, "completion_length"),
        ["PPO", "KL to SFT, nats", 0.0, ppo["kl"], interval(ppo["kl_ci"])],
    ]
    header = ["stage", "on held-out rows", "before", "after", "95 % interval of the change"]
    missed = "not in so short a run" if report["smoke"] else "NO"
    marks = "\n".join(f"- {'yes' if held else missed}: {name}" for name, held in report["checks"].items())
    return f"{markdown_table(header, rows)}\n\n{marks}"


def document(report: dict[str, Any]) -> str:
    """Return report.md."""
    kind = "Shortened run: it shows that the stages run, not that they learn." if report["smoke"] else "Full run."
    versions = ", ".join(f"{name} {found}" for name, found in report["versions"].items() if found)
    parts = [
        f"# SmolLM2-135M-Instruct on human data, seed {report['seed']}",
        f"{kind} {report['seconds']:.0f} s on {report['threads']} threads of {report['cpus']} cores, at most "
        f"{report['peak_memory_gib']} GiB.",
        tables(report),
        "Intervals are bootstrap intervals over held-out rows or prompts, of the paired difference where there is a "
        "before and an after. Scores are the reward model's own: 0 is its average truthful training answer.",
        "## Stages",
        "\n".join(stage_lines(report)),
        markdown_table(["stage", "seconds"], [[name, seconds] for name, seconds in report["stage_seconds"].items()]),
        "## Answers before and after",
        "The likeliest answer of each policy to held-out questions; three dots where it was cut.",
        *answers_shown(report),
        "## Versions",
        versions,
    ]
    return "\n\n".join(parts) + "\n"


def stage_lines(report: dict[str, Any]) -> list[str]:
    """Return the training and evaluation rows of each stage, and results that are not in the table."""
    budget = report["budget"]
    sft, reward, dpo, ppo = (report[stage] for stage in ("sft", "reward_model", "dpo", "ppo"))
    return [
        f"- **SFT** (all weights): {budget['sft_rows']} demonstrations of up to {budget['sft_characters']} characters, "
        f"evaluated on {sft['eval_rows']} of the test file; perplexity {sft['perplexity_before']:.2f} before, "
        f"{sft['perplexity_after']:.2f} after.",
        f"- **Reward model** (LoRA, from SFT): {budget['reward_rows']} pairs of a truthful and a false answer, "
        f"{budget['reward_epochs']} epochs; accuracy {reward['accuracy']:.3f} {interval(reward['accuracy_ci'])} on "
        f"{reward['eval_rows']} pairs of other prompts, calibration error {reward['ece']:.3f}. Bag-of-words logistic "
        f"regression trained on the same rows: {reward['bag_of_words_accuracy']:.3f} "
        f"{interval(reward['bag_of_words_accuracy_ci'])}; always the longer answer: {reward['longer_accuracy']:.3f}.",
        f"- **DPO** (LoRA, from SFT): {budget['dpo_rows']} harmlessness pairs of up to {budget['dpo_characters']} "
        f"characters, evaluated on {dpo['eval_rows']} of the test file, whose opening questions are others. Before "
        f"training the policy is the reference, so every margin is 0 and the loss log 2; after it the loss is "
        f"{dpo['loss_after']:.3f} and the accuracy {dpo['reward_accuracy']:.3f} {interval(dpo['reward_accuracy_ci'])}. "
        f"Of its answers to {dpo['sampled_prompts']} held-out questions {100 * dpo['eos_rate']:.0f} % end by "
        f"themselves; they have {dpo['completion_length']:.1f} tokens, and the KL above is theirs.",
        f"- **PPO** (LoRA, from SFT, against that reward model): {budget['rollouts']} rollouts of {budget['episodes']} "
        f"answers of at most {budget['max_new_tokens']} tokens to the reward model's training prompts, evaluated on "
        f"{ppo['eval_rows']} held-out prompts with the same random numbers before and after. It is trained on the "
        f"score less a penalty for answers that do not end: that is {ppo['trained_score_before']:.3f} before, "
        f"{ppo['trained_score_after']:.3f} after {interval(ppo['trained_score_change_ci'])}.",
    ]


def answers_shown(report: dict[str, Any]) -> list[str]:
    """Return one table per question."""
    return [
        f"**{question}**\n\n"
        + markdown_table(["policy", "answer"], [[policy, texts[row]] for policy, texts in report["answers"].items()])
        for row, question in enumerate(report["questions"])
    ]
