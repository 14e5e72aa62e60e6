"""``rlhf quickstart``: run the whole pipeline on a small built-in world, from random weights to a report."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf_lightning.evaluation.report import (
    FrontierPoint,
    draw_frontier,
    interval,
    markdown_table,
    write_json,
    write_markdown,
)
from rlhf_lightning.recipes import FOLDER

if TYPE_CHECKING:
    from rlhf_lightning.evaluation.policies import ScoredSamples
    from rlhf_lightning.models.causal_lm import CausalLM
    from rlhf_lightning.types import Prompt

STAGES = ("sft", "reward", "ppo", "dpo")
BEST_OF = (1, 2, 4, 8, 16)
FRONTIER_PROMPTS = 200


class Run(NamedTuple):
    """A finished stage: its run folder and the metrics of its last validation."""

    folder: Path
    metrics: dict[str, float]

    @property
    def model(self) -> str:
        """The model folder that the next stage starts from."""
        return str(self.folder / "model")


def main(argv: Sequence[str]) -> int:
    """Run the pipeline and print its table."""
    parser = argparse.ArgumentParser("rlhf quickstart", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="seed of world, weights, order and samples (default 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder of the report and the runs")
    parser.add_argument("--configs", type=Path, default=FOLDER / "assistant", help="folder of the four YAML files")
    arguments = parser.parse_args(argv)
    from rlhf_lightning.worlds.assistant import write_world  # slow to import, as below: help must be fast

    started = time.perf_counter()
    out = fresh_folder(arguments.out)
    world = write_world(out / "world", seed=arguments.seed)
    runs = train_stages(arguments.configs, out, arguments.seed)
    print("quickstart: evaluating on held-out prompts", flush=True)
    report, samples, points = evaluate(out, runs, world, arguments.seed)
    draw_frontier(points, out / "frontier.png", f"assistant world, seed {arguments.seed}")
    report = {"seconds": round(time.perf_counter() - started, 1), "seed": arguments.seed, **report}
    write_json(out / "report.json", report)
    table = summary_table(report)
    write_markdown(out / "report.md", markdown_report(report, table, samples, runs))
    print(f"\n{table}\n\nreport: {out / 'report.md'}   frontier: {out / 'frontier.png'}   {report['seconds']:.0f} s")
    print(f"compare the runs: tensorboard --logdir {out}")
    return 0


def fresh_folder(out: Path) -> Path:
    """Make an empty folder; an earlier report there is renamed with a number."""
    if out.exists() and any(out.iterdir()):
        number = 1
        while (earlier := out.with_name(f"{out.name}.{number}")).exists():
            number += 1
        shutil.move(out, earlier)
    out.mkdir(parents=True, exist_ok=True)
    return out


def train_stages(configs: Path, out: Path, seed: int) -> dict[str, Run]:
    """Train SFT, the reward model, PPO and DPO, each with ``rlhf fit`` and its YAML file."""
    from rlhf_lightning.commands import train

    runs: dict[str, Run] = {}
    world = out / "world"
    pairs = ("--data.source", f"{world}/pairs_train.jsonl", "--data.eval_source", f"{world}/pairs_test.jsonl")
    prompts = ("--data.source", f"{world}/prompts_train.jsonl", "--data.eval_source", f"{world}/prompts_test.jsonl")
    data = {"sft": ("--data.source", f"{world}/demonstrations.jsonl"), "reward": pairs, "ppo": prompts, "dpo": pairs}
    for number, stage in enumerate(STAGES, start=1):
        print(f"\nquickstart {number}/{len(STAGES)}: rlhf fit --config {configs / stage}.yaml", flush=True)
        start = str(world / "model") if stage == "sft" else runs["sft"].model
        flags = ["fit", "--config", str(configs / f"{stage}.yaml"), "--seed_everything", str(seed)]
        flags += ["--runs_folder", str(out), "--run_name", stage]
        flags += ["--model.init_from", start, *data[stage]]
        if stage == "ppo":
            flags += ["--model.scorer", runs["reward"].model]
        done = train.run(flags)
        metrics = {name: float(value) for name, value in done.trainer.callback_metrics.items()}
        runs[stage] = Run(done.folder or out, metrics)
    return runs


def evaluate(
    out: Path, runs: dict[str, Run], world: dict[str, Any], seed: int
) -> tuple[dict[str, Any], dict[str, ScoredSamples], list[FrontierPoint]]:
    """Sample every policy on the held-out prompts; return report, samples and points of the plot."""
    from rlhf_lightning.evaluation.policies import best_of_n, best_of_n_score, sample_and_score
    from rlhf_lightning.functional.statistics import best_of_n_kl
    from rlhf_lightning.models.causal_lm import load_policy, load_reference
    from rlhf_lightning.sampling.engines import SamplingSettings
    from rlhf_lightning.scoring import LearnedScorer
    from rlhf_lightning.tokenization import load_tokenizer
    from rlhf_lightning.worlds.assistant import gold_of_conversation

    sampling = SamplingSettings(max_new_tokens=48)
    tokenizer = load_tokenizer(runs["sft"].model)
    prompts = _read_prompts(out / "world" / "prompts_test.jsonl")
    reference, scorer = load_reference(runs["sft"].model), LearnedScorer(runs["reward"].model)

    def measure(policy: CausalLM, chosen: list[Prompt], each: int = 1) -> ScoredSamples:
        return sample_and_score(
            policy, tokenizer, chosen, sampling, seed + 1, each, reference, scorer, gold_of_conversation
        )

    samples = {stage: measure(load_policy(runs[stage].model), prompts) for stage in ("sft", "ppo", "dpo")}
    many = measure(reference, prompts[:FRONTIER_PROMPTS], max(BEST_OF))
    reward = runs["reward"].metrics
    report: dict[str, Any] = {
        "world": {
            "bayes_accuracy": world["bayes_accuracy"],
            "demonstrations_gold": world["demonstrations_gold"],
            "best_of_4_gold": float(best_of_n(many, max(BEST_OF), 4).mean()),
            "best_of_16_gold": float(best_of_n(many, max(BEST_OF), 16).mean()),
        },
        **{stage: policy_report(samples[stage], seed) for stage in ("sft", "ppo", "dpo")},
        "reward_model": {"accuracy": reward["val/accuracy"], "ece": reward["val/ece"]},
    }
    points = [
        FrontierPoint(
            "best of n",
            float(best_of_n_kl(n)) if n > 1 else 0.0,
            float(best_of_n(many, max(BEST_OF), n).mean()),
            float(best_of_n_score(many, max(BEST_OF), n).mean()),
            f"n={n}" if n > 1 else "sft",
        )
        for n in BEST_OF
    ]
    for stage in ("ppo", "dpo"):
        for folder in sorted((runs[stage].folder / "exports").glob("update_*")):
            points.append(_point(stage, measure(load_policy(str(folder)), prompts[:FRONTIER_PROMPTS])))
        points.append(_point(stage, samples[stage], "final"))
    return report, samples, points


def _read_prompts(path: Path) -> list[Prompt]:
    return [json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").splitlines()]


def _point(method: str, samples: ScoredSamples, label: str = "") -> FrontierPoint:
    assert samples.kl is not None and samples.gold is not None and samples.scores is not None
    kl, gold, score = (float(values.double().mean()) for values in (samples.kl, samples.gold, samples.scores))
    return FrontierPoint(method, kl, gold, score, label)


def policy_report(samples: ScoredSamples, seed: int) -> dict[str, Any]:
    """Return the metrics of one policy."""
    assert samples.gold is not None and samples.scores is not None and samples.kl is not None
    from rlhf_lightning.evaluation.policies import mean_with_interval

    gold = mean_with_interval(samples.gold, seed)
    return {
        "gold_reward": gold["mean"],
        "gold_reward_ci": gold["ci"],
        "score": float(samples.scores.double().mean()),
        "kl": float(samples.kl.double().mean()),
        "completion_length": float(samples.lengths.double().mean()),
        "eos_rate": float(samples.finished.double().mean()),
    }


def summary_table(report: dict[str, Any]) -> str:
    """Return the printed table."""
    from rlhf_lightning.functional.statistics import best_of_n_kl

    world, reward = report["world"], report["reward_model"]
    rows: list[list[Any]] = [["demonstrations", world["demonstrations_gold"], "", None, None, None, None]]
    for stage in ("sft", "dpo", "ppo"):
        part = report[stage]
        figures = [part[name] for name in ("score", "kl", "completion_length", "eos_rate")]
        rows.append([stage, part["gold_reward"], interval(part["gold_reward_ci"]), *figures])
    for n in (4, 16):
        kl = float(best_of_n_kl(n))
        rows.append([f"best of {n} of sft", world[f"best_of_{n}_gold"], "", None, kl, None, None])
    header = ["policy", "gold reward", "95 % interval", "score", "KL", "length", "EOS rate"]
    reached = (reward["accuracy"] - 0.5) / (world["bayes_accuracy"] - 0.5)
    return (
        f"{markdown_table(header, rows)}\n\n"
        f"reward model: accuracy {reward['accuracy']:.3f} of a best possible {world['bayes_accuracy']:.3f} "
        f"({100 * reached:.0f} % of the way from chance), calibration error {reward['ece']:.3f}"
    )


def markdown_report(report: dict[str, Any], table: str, samples: dict[str, ScoredSamples], runs: dict[str, Run]) -> str:
    """Return report.md: the table, the plot, and sample answers of each policy."""
    parts = [
        f"# Quickstart, seed {report['seed']}",
        table,
        "The score is the reward model's. The gold reward is the world's true reward, never used in training. KL is "
        "measured from the SFT policy, in nats per completion. All policies answer the same held-out prompts at "
        "temperature 1.",
        "![frontier](frontier.png)",
        "## Answers before and after",
    ]
    sft = samples["sft"]
    for index in range(0, len(sft.prompts), math.ceil(len(sft.prompts) / 6)):
        prompt = sft.prompts[index]
        asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        rows = []
        for stage, drawn in samples.items():
            assert drawn.gold is not None and drawn.scores is not None
            rows.append([stage, drawn.completions[index], float(drawn.gold[index]), float(drawn.scores[index])])
        parts.append(f"**{asked}**\n\n" + markdown_table(["policy", "answer", "gold", "score"], rows))
    folders = [f"- {stage}: `{os.path.relpath(run.folder)}`" for stage, run in runs.items()]
    parts.append("## Runs\n\n" + "\n".join(folders))
    return "\n\n".join(parts) + "\n"
