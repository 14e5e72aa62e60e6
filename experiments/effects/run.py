"""Reproduce published effects in the quickstart's world: several arms and seeds per effect, and a page with intervals.

    rlhf quickstart --out runs/quickstart
    python experiments/effects/run.py [length_bias chosen_logprob label_noise] [--start runs/quickstart] [--seeds 5]

Every arm is a YAML file and an `rlhf sweep` over seeds, so the same command resumes after a kill and skips finished
runs. Run it from the repository's root. Pages and plots are written next to this file.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from rlhf_lightning.evaluation.differences import holm, mean_interval, seed_difference
from rlhf_lightning.evaluation.policies import sample_and_score
from rlhf_lightning.evaluation.report import interval, markdown_table, p_value, write_json, write_markdown
from rlhf_lightning.evaluation.run_curves import FinishedRun, read_run, run_folders
from rlhf_lightning.loading import read_record, read_records
from rlhf_lightning.models.loading import LoadSettings
from rlhf_lightning.models.roles import load_policy
from rlhf_lightning.sampling.engines import SamplingSettings
from rlhf_lightning.tokenization import load_tokenizer
from rlhf_lightning.worlds.assistant import gold_of_conversation

HERE = Path(__file__).resolve().parent
HELD_OUT_PROMPTS = 100
FLIPPED = 0.3
BETA = 0.1


class Effect(NamedTuple):
    """A published effect.

    Attributes:
        title: heading of the page.
        claim: what the paper claims, with its reference.
        setting: the experiment here.
        config: function from arguments to the config that all arms share.
        arms: changes of the config's model section, by arm; the first arm is the baseline.
        metric: tag of the metric, and its label.
        scale: factor applied to the metric.
    """

    title: str
    claim: str
    setting: str
    config: Callable[[argparse.Namespace], dict[str, Any]]
    arms: dict[str, dict[str, Any]]
    metric: tuple[str, str]
    scale: float = 1.0


def pairs_config(arguments: argparse.Namespace, source: Path, rows: int) -> dict[str, Any]:
    """Return the config of a run on pairs."""
    world = arguments.start / "world"
    return {
        "model": {"class_path": "DPOModule", "init_args": {
            "init_from": str(arguments.start / "sft/version_0/model"), "learning_rate": 5e-4, "lr_schedule": "cosine",
            "beta": BETA}},
        "data": {"class_path": "PreferenceDataModule", "init_args": {
            "source": str(source), "rows": rows, "batch_size": 32, "micro_batch_size": 16,
            "eval_source": [{"path": str(world / "pairs_test.jsonl"), "rows": 200}]}},
        "trainer": {"max_epochs": 1, "val_check_interval": 0.25},
    }  # fmt: skip


def clean_pairs(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the config on the world's own pairs."""
    return pairs_config(arguments, arguments.start / "world" / "pairs_train.jsonl", 1600)


def flipped_pairs(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the config with randomly flipped training labels; validation pairs keep their labels."""
    source, target = arguments.start / "world" / "pairs_train.jsonl", arguments.out / "flipped.jsonl"
    lot, lines = random.Random(0), []
    for row in read_records(source)[:3200]:
        if lot.random() < FLIPPED:
            row = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
        lines.append(json.dumps(row))
    write_markdown(target, "\n".join(lines) + "\n")
    return pairs_config(arguments, target, 3200)


def rollouts(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the config of GRPO on answers with a binary score."""
    return {
        "model": {"class_path": "GRPOModule", "init_args": {
            "init_from": str(arguments.start / "sft/version_0/model"), "learning_rate": 5e-4, "kl_coef": 0.0,
            "lr_schedule": "constant", "max_new_tokens": 64, "scorer": "experiments.effects.scores.answered"}},
        "data": {"class_path": "PromptDataModule", "init_args": {
            "source": str(arguments.start / "world" / "prompts_train.jsonl"), "batch_size": 64, "samples_per_prompt": 8,
            "rollouts": arguments.rollouts}},
        "trainer": {"max_epochs": 1},
    }  # fmt: skip


EFFECTS = {
    "length_bias": Effect(
        "Length bias of the mean over sequences of means over tokens",
        "Dr. GRPO (Liu et al., arXiv 2503.20783): the mean over completions of means over tokens penalises a long "
        "wrong completion less per token than a short one, so wrong completions grow; a constant divisor does not "
        "do so.",
        "GRPO on answers that are right (subject and kind) or wrong; length plays no role in the score. The arms "
        "differ by `model.aggregation` alone.",
        rollouts,
        {name: {"aggregation": name} for name in ("constant", "token_mean", "sequence_mean_token_mean")},
        ("rollout/score_wrong_words", "words of wrong completions"),
    ),
    "chosen_logprob": Effect(
        "The log-probability of chosen completions under DPO",
        "Pang et al. (arXiv 2404.19733) and Rafailov et al. (2404.12358): under DPO the log-probability of the "
        "chosen completions themselves falls; a term of their likelihood (RPO) keeps it up. APO-zero "
        "(D'Oosterlinck et al., 2408.06266) raises it by its form.",
        f"1,600 pairs, beta {BETA}. The metric is the mean of log policy - log reference of held-out chosen "
        "completions.",
        clean_pairs,
        {"DPO": {}, "RPO": {"class_path": "RPOModule", "alpha": 1.0}, "APO-zero": {"class_path": "APOZeroModule"}},
        ("val/chosen_reward", "change of the chosen log-probability, nats"),
        1 / BETA,
    ),
    "label_noise": Effect(
        "Flipped labels and robust losses",
        "Robust DPO (Chowdhury et al., arXiv 2403.00409): with a known flip rate an unbiased estimate of the "
        "clean loss learns from noisy labels what DPO does not; conservative DPO only softens the labels.",
        f"3,200 pairs; {FLIPPED:.0%} of them have flipped labels, on top of the world's own noise; both robust losses "
        "know the rate. Accuracy is on held-out pairs without flips.",
        flipped_pairs,
        {"DPO": {}, "conservative DPO": {"class_path": "ConservativeDPOModule", "label_smoothing": FLIPPED},
         "robust DPO": {"class_path": "RobustDPOModule", "flip_rate": FLIPPED}},
        ("val/reward_accuracy", "accuracy of the implicit reward"),
    ),
}  # fmt: skip


def train(effect: str, arguments: argparse.Namespace) -> dict[str, list[FinishedRun]]:
    """Train the unfinished runs, and return the finished runs of each arm."""
    found, shared = {}, EFFECTS[effect].config(arguments)
    for arm, changes in EFFECTS[effect].arms.items():
        folder = arguments.out / effect / arm.replace(" ", "_").replace(",", "")
        model = dict(shared["model"])
        given = dict(changes)
        model["class_path"] = given.pop("class_path", model["class_path"])
        model["init_args"] = {**model["init_args"], **given}
        config = folder.with_suffix(".yaml")
        write_markdown(config, yaml.safe_dump({**shared, "model": model}, sort_keys=False))
        command = [sys.executable, "-m", "rlhf_lightning", "sweep", str(config), "--seeds", str(arguments.seeds)]
        print(f"{effect}: {arm}", flush=True)
        subprocess.run([*command, "--out", str(folder)], check=False)  # the page counts finished runs
        runs = [read_run(run) for run in run_folders([str(folder)])]
        found[arm] = [run for run in runs if run.status == "finished"]
    return found


def gold(run: FinishedRun, arguments: argparse.Namespace) -> float:
    """Return the mean gold reward of a run's policy on held-out prompts; cached after the first call."""
    kept = run.folder / "gold.json"
    if not kept.is_file():
        prompts = [row["prompt"] for row in read_records(arguments.start / "world" / "prompts_test.jsonl")]
        folder = str(run.folder / "model")
        policy, tokenizer = load_policy(folder, LoadSettings()).eval(), load_tokenizer(folder)
        sampling = SamplingSettings(max_new_tokens=64, temperature=1.0, batch_size=64)
        found = sample_and_score(
            policy, tokenizer, prompts[:HELD_OUT_PROMPTS], sampling, 0, gold_reward=gold_of_conversation
        )
        assert found.gold is not None
        write_json(kept, {"gold": float(found.gold.mean()), "words": float(found.lengths.double().mean())})
    return float(read_record(kept)["gold"])


def final(run: FinishedRun, tag: str) -> float:
    """Return the last validation value of a metric; without validation, the mean over the last quarter of training."""
    values = run.scalars[tag][1]
    return float(values[-1] if tag.startswith("val/") else values[-max(len(values) // 4, 1) :].mean())


def page(effect: str, arms: dict[str, list[FinishedRun]], arguments: argparse.Namespace) -> str:
    """Return the page of an effect and plot its curves."""
    said, (tag, name) = EFFECTS[effect], EFFECTS[effect].metric
    measures = {
        name: {arm: {run.seed: said.scale * final(run, tag) for run in runs} for arm, runs in arms.items()},
        "gold reward": {arm: {run.seed: gold(run, arguments) for run in runs} for arm, runs in arms.items()},
    }
    first, *others = arms
    rows = [
        [arm, len(runs), *(_shown(list(values[arm].values())) for values in measures.values())]
        for arm, runs in arms.items()
    ]
    parts = [f"# {said.title}", f"**Claim.** {said.claim}", f"**Here.** {said.setting} `python "
             f"experiments/effects/run.py {effect}` writes this page.",
             markdown_table(["arm", "seeds", *measures], rows)]  # fmt: skip
    tests = []
    for measure, values in measures.items():
        gaps = [seed_difference(values[first], values[arm]) for arm in others]
        adjusted = holm([gap.p for gap in gaps])
        tests += [
            [measure, arm, gap.mean, interval([gap.low, gap.high]), p_value(gap.p), p_value(p)]
            for arm, gap, p in zip(others, gaps, adjusted, strict=True)
        ]
    header = ["metric", "arm", f"difference from {first}", "95 % interval", "p", "p (Holm)"]
    parts += [
        "Means over seeds with Student's 95 % interval: of the last validation, or of the last quarter of the "
        f"rollouts. Gold reward is that of completions to {HELD_OUT_PROMPTS} held-out prompts.",
        markdown_table(header, tests),
        "Paired t-tests over seeds; Holm's correction is for the arms of one metric.",
        f"![{name} over training]({effect}.svg)",
    ]
    draw(effect, arms)
    return "\n\n".join(parts) + "\n"


def _shown(values: list[float]) -> str:
    mean, low, high = mean_interval(values)
    return f"{mean:.3f} {interval([low, high])}"


def draw(effect: str, arms: dict[str, list[FinishedRun]]) -> None:
    """Plot the metric over training: means over seeds with 95 % intervals."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "effects"
    tag, name = EFFECTS[effect].metric
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for number, (arm, runs) in enumerate(arms.items()):
        places = runs[0].scalars[tag][0]
        values = np.array([np.interp(places, *run.scalars[tag]) for run in runs]) * EFFECTS[effect].scale
        mean, low, high = np.array([mean_interval(column.tolist()) for column in values.T]).T
        axis.plot(places, mean, color=f"C{number}", label=arm)
        axis.fill_between(places, low, high, color=f"C{number}", alpha=0.15, lw=0)
    axis.set_xlabel("updates")
    axis.set_ylabel(name)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(HERE / f"{effect}.svg", metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Train the unfinished runs, and write the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("effects", nargs="*", default=list(EFFECTS), help="effects to run")
    parser.add_argument("--start", type=Path, default=Path("runs/quickstart"), help="folder of a finished quickstart")
    parser.add_argument("--out", type=Path, default=Path("runs/effects"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rollouts", type=int, default=30)
    arguments = parser.parse_args()
    for effect in arguments.effects:
        arms = train(effect, arguments)
        if all(arms.values()):
            write_markdown(HERE / f"{effect}.md", page(effect, arms, arguments))
            print(HERE / f"{effect}.md")


if __name__ == "__main__":
    main()
