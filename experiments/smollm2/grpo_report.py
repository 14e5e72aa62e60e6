"""Write report.json and report.md of the GRPO run, and the page with its results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf_lightning.evaluation.report import interval, markdown_table, write_json, write_markdown


def write(report: dict[str, Any], out: Path, page: Path | None) -> str:
    """Write the report, and the page if a path is given; return the page's tables."""
    write_json(out / "report.json", report)
    text = document(report)
    for path in (out / "report.md", page):
        if path is not None:
            write_markdown(path, text)
    return tables(report)


def tables(report: dict[str, Any]) -> str:
    """Return the tables of the held-out scores before and after, and of the slope of the rollouts' scores."""
    change, slope = report["change"], report["slope"]
    names = {
        "score": "score: share of instructions kept",
        "eos_rate": "EOS rate",
        "completion_length": "completion length, tokens",
        "kl": "KL to the reference, nats",
    }
    rows = [
        [label, change[f"{name}_before"], change[f"{name}_after"], interval(change[f"{name}_ci"])]
        for name, label in names.items()
    ]
    held_out = markdown_table(["on held-out prompts", "before", "after", "95 % interval of the change"], rows)
    return (
        f"{held_out}\n\nSlope of the rollouts' score: {slope['mean']:+.4f} a rollout, 95 % interval "
        f"{interval(slope['ci'], 4)}."
    )


def document(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    kind = "Shortened run: it shows that it runs, not that it learns. " if report["smoke"] else ""
    scores = report["rollout_scores"]
    thirds = [scores[start : start + 10] for start in range(0, len(scores), 10)]
    parts = [
        "# GRPO of SmolLM2-135M-Instruct on instructions that can be checked",
        f"{kind}{len(scores)} rollouts of {report['batch_size']} completions ({report['samples_per_prompt']} a prompt, "
        f"at most {report['max_new_tokens']} tokens), LoRA, learning rate {report['learning_rate']:g}, k3 penalty "
        f"{report['kl_coef']:g}, fp32, seed {report['seed']}; {report['seconds']:.0f} s on {report['threads']} "
        f"threads, at most {report['peak_memory_gib']} GiB. Made by `make real-grpo`.",
        tables(report),
        "The score of a completion is 1 if it keeps its instruction, else 0. Held-out prompts are "
        f"{report['eval_questions']} questions that training never asks, each with all of the instructions "
        f"({report['eval_rows']} rows), answered with the same random numbers before and after; the interval of the "
        "paired difference resamples questions. The slope is the least-squares line through the rollouts' mean scores, "
        "its interval from resampling rollouts.",
        markdown_table(
            ["instruction", "kept before", "kept after"], [[name, *kept] for name, kept in report["kept"].items()]
        ),
        markdown_table(
            ["rollouts", "mean score"],
            [[f"{10 * i + 1} to {10 * i + len(part)}", sum(part) / len(part)] for i, part in enumerate(thirds)],
        ),
        "## How the instructions were chosen",
        CHOICE,
        "## Answers before and after",
        "The first held-out question, sampled at temperature 1 and cut at the token limit.",
        markdown_table(
            ["prompt", "before", "after"], [[a["prompt"], a["before"], a["after"]] for a in report["answers"]]
        ),
    ]
    return "\n\n".join(parts) + "\n"


CHOICE = (
    "GRPO learns from groups whose completions differ in score, so an instruction that is never or always kept teaches "
    "nothing. Twelve instructions were tried on the first 16 training questions, one completion each at temperature 1 "
    "with at most 24 tokens, before any training: sentences (exactly 1) was kept 0.94 of the time, title 0.50, "
    "no_commas 0.38, digits 0.31, at_most_words (10) 0.25, forbidden (the) 0.19, keyword (because) 0.06, and question, "
    "lowercase, quoted, starts_with and bullets never. The four between 0.2 and 0.6 are trained on. Held-out questions "
    "are the last of the file's short ones, in its order; nothing that was measured on them chose a setting."
)
