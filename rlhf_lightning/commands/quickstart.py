"""``rlhf quickstart``: run the whole pipeline on a small built-in world, from random weights to a report."""

from __future__ import annotations

import argparse
import math
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf_lightning.errors import SettingError
from rlhf_lightning.evaluation.report import (
    FrontierPoint,
    draw_frontier,
    interval,
    markdown_table,
    write_json,
    write_markdown,
)
from rlhf_lightning.loading import read_records
from rlhf_lightning.recipes import FOLDER

if TYPE_CHECKING:
    from rlhf_lightning.evaluation.policies import ScoredSamples
    from rlhf_lightning.models.causal_lm import CausalLM
    from rlhf_lightning.types import Prompt

FREE, WEAK = "ppo_without_kl", "reward_weak"
"""PPO without KL penalty, and the reward model trained on few pairs that this PPO run over-optimises."""

POLICIES = ("sft", "dpo", "ppo", FREE)
NAMES = {FREE: "ppo without KL penalty", WEAK: "weak reward model", "reward": "reward model"}
WEAK_PAIRS = 1000
FURTHER = {
    WEAK: ("--data.rows", str(WEAK_PAIRS)),
    FREE: tuple("--model.kl_coef 0 --model.kl_target null --model.early_stop_kl null --data.rollouts 16".split()),
}
"""Flags of a stage in addition to its YAML file."""
BEST_OF = (1, 2, 4, 8, 16)
FRONTIER_PROMPTS = 200


class Run(NamedTuple):
    """A finished stage: run folder, metrics of the last validation, and budget."""

    folder: Path
    metrics: dict[str, float]
    updates: int
    episodes: int
    tokens: int
    seconds: float

    @property
    def model(self) -> str:
        """The exported model folder, input of the next stage."""
        return str(self.folder / "model")

    def budget(self) -> dict[str, float]:
        """Return updates, episodes, tokens and seconds of the stage."""
        counts = {"updates": self.updates, "episodes": self.episodes, "tokens": self.tokens}
        return {**counts, "seconds": round(self.seconds, 1)}


def main(argv: Sequence[str]) -> int:
    """Run the pipeline and print its table."""
    parser = argparse.ArgumentParser("rlhf quickstart", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="seed of world, weights, order and samples (default 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder of the report and the runs")
    parser.add_argument("--configs", type=Path, default=FOLDER / "assistant", help="folder of the four YAML files")
    arguments = parser.parse_args(argv)
    from rlhf_lightning.worlds.assistant import write_world  # slow to import (as below); help must be fast

    started = time.perf_counter()
    out = fresh_folder(arguments.out)
    world = write_world(out / "world", seed=arguments.seed)
    runs = train_stages(arguments.configs, out, arguments.seed)
    print("quickstart: evaluating on held-out prompts", flush=True)
    report, samples, points = evaluate(out, runs, world, arguments.seed)
    levels = {"best possible": 1.0, "demonstrations": report["world"]["demonstrations_gold"]}
    draw_frontier(points, out / "frontier.png", f"assistant world, seed {arguments.seed}", levels)
    report = {"seconds": round(time.perf_counter() - started, 1), "seed": arguments.seed, **report}
    write_json(out / "report.json", report)
    table = summary_table(report)
    write_markdown(out / "report.md", markdown_report(report, table, samples, runs))
    print(f"\n{table}\n\nreport: {out / 'report.md'}   frontier: {out / 'frontier.png'}   {report['seconds']:.0f} s")
    print(f"compare the runs: tensorboard --logdir {out}\ntalk to the policy: rlhf chat {runs['ppo'].model}")
    return 0


def fresh_folder(out: Path) -> Path:
    """Create an empty folder; rename an earlier report in its place with a number."""
    if out.is_file():
        raise SettingError("no-folder", f"--out {out} is a file: name a folder, which is made")
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
    data |= {WEAK: pairs, FREE: prompts}
    for number, stage in enumerate(data, start=1):
        config = configs / {FREE: "ppo", WEAK: "reward"}.get(stage, stage)
        print(f"\nquickstart {number}/{len(data)}: rlhf fit --config {config}.yaml", flush=True)
        started = time.perf_counter()
        start = str(world / "model") if stage == "sft" else runs["sft"].model
        flags = ["fit", "--config", f"{config}.yaml", "--seed_everything", str(seed)]
        flags += ["--runs_folder", str(out), "--run_name", stage]
        flags += ["--model.init_from", start, *data[stage]]
        if data[stage] is prompts:
            flags += ["--model.scorer", runs[WEAK if stage == FREE else "reward"].model]
        done = train.run([*flags, *FURTHER.get(stage, ())])
        metrics = {name: float(value) for name, value in done.trainer.callback_metrics.items()}
        budget = done.model.updates, done.model.episodes, done.model.tokens
        runs[stage] = Run(done.folder or out, metrics, *budget, time.perf_counter() - started)
    return runs


def evaluate(
    out: Path, runs: dict[str, Run], world: dict[str, Any], seed: int
) -> tuple[dict[str, Any], dict[str, ScoredSamples], list[FrontierPoint]]:
    """Sample every policy on the held-out prompts; return report, samples and points of the plot."""
    import torch

    from rlhf_lightning.evaluation.policies import best_of_n, mean_with_interval, sample_and_score
    from rlhf_lightning.functional.statistics import best_of_n_kl, wilson_interval
    from rlhf_lightning.models.roles import load_policy, load_reference
    from rlhf_lightning.sampling.engines import SamplingSettings
    from rlhf_lightning.scoring import LearnedScorer
    from rlhf_lightning.tokenization import load_tokenizer
    from rlhf_lightning.worlds.assistant import gold_of_conversation

    sampling = SamplingSettings(max_new_tokens=48)
    tokenizer = load_tokenizer(runs["sft"].model)
    prompts = [row["prompt"] for row in read_records(out / "world" / "prompts_test.jsonl")]
    reference = load_reference(runs["sft"].model)
    strong, weak = (LearnedScorer(runs[stage].model) for stage in ("reward", WEAK))

    def measure(stage: str, policy: CausalLM, chosen: list[Prompt], each: int = 1) -> ScoredSamples:
        scorer = weak if stage == FREE else strong
        return sample_and_score(
            policy, tokenizer, chosen, sampling, seed + 1, each, reference, scorer, gold_of_conversation
        )

    samples = {stage: measure(stage, load_policy(runs[stage].model), prompts) for stage in POLICIES}
    many, largest = measure("sft", reference, prompts[:FRONTIER_PROMPTS], max(BEST_OF)), max(BEST_OF)
    start_of_free = measure(FREE, reference, prompts[:FRONTIER_PROMPTS])
    points = []
    for n in BEST_OF:
        gold, score = (mean_with_interval(best_of_n(many, largest, n, of), seed) for of in ("gold", "scores"))
        where = "best of n", float(best_of_n_kl(n)), gold["mean"], score["mean"], gold["ci"], score["ci"]
        points.append(FrontierPoint(*where, label=f"n={n}" if n > 1 else "sft"))
    best = {point.label: point for point in points}
    demonstrations = read_records(out / "world" / "demonstrations.jsonl")
    shown = [(row["prompt"], row["completion"][-1]["content"]) for row in demonstrations]
    shown_gold = mean_with_interval(torch.tensor([gold_of_conversation(*pair) for pair in shown]), seed)
    accuracy = runs["reward"].metrics["val/accuracy"]
    report: dict[str, Any] = {
        "world": {
            "bayes_accuracy": world["bayes_accuracy"],
            "demonstrations_gold": world["demonstrations_gold"],
            "demonstrations_gold_ci": shown_gold["ci"],
            **{f"best_of_{n}_gold": best[f"n={n}"].gold_reward for n in (4, 16)},
            **{f"best_of_{n}_gold_ci": list(best[f"n={n}"].gold_reward_ci) for n in (4, 16)},
            **{f"best_of_{n}_score": best[f"n={n}"].score for n in (4, 16)},
        },
        **{stage: policy_report(drawn, seed) for stage, drawn in samples.items()},
        "reward_model": {
            "accuracy": accuracy,
            "accuracy_ci": [float(end) for end in wilson_interval(accuracy, world["sizes"]["pairs_test"])],
            "ece": runs["reward"].metrics["val/ece"],
        },
        "weak_reward_model": {"pairs": WEAK_PAIRS, "accuracy": runs[WEAK].metrics["val/accuracy"]},
        "budgets": {stage: run.budget() for stage, run in runs.items()},
    }
    start = points[0]._replace(label="")
    for stage in ("ppo", "dpo", FREE):
        free = _point(stage, policy_report(start_of_free, seed), 0)._replace(kl=0.0)
        points.append(free if stage == FREE else start._replace(method=stage))
        exports = {int(path.name.split("_")[1]): path for path in (runs[stage].folder / "exports").glob("update_*")}
        for update in sorted(exports.keys() - {runs[stage].updates}):
            drawn = measure(stage, load_policy(str(exports[update])), prompts[:FRONTIER_PROMPTS])
            points.append(_point(stage, policy_report(drawn, seed), update))
        points.append(_point(stage, report[stage], runs[stage].updates)._replace(final=True))
    names = ("update", "kl", "score", "gold_reward", "gold_reward_ci")
    free_path = [point for point in points if point.method == NAMES[FREE]]
    report["over_optimisation"] = [{name: getattr(point, name) for name in names} for point in free_path]
    return report, samples, points


def _point(stage: str, found: dict[str, Any], update: int) -> FrontierPoint:
    names = ("kl", "gold_reward", "score", "gold_reward_ci", "score_ci")
    return FrontierPoint(NAMES.get(stage, stage), *(found[name] for name in names))._replace(update=update)


def policy_report(samples: ScoredSamples, seed: int) -> dict[str, Any]:
    """Return the metrics of one policy."""
    assert samples.gold is not None and samples.scores is not None and samples.kl is not None
    from rlhf_lightning.evaluation.policies import mean_with_interval

    gold, score = (mean_with_interval(values, seed) for values in (samples.gold, samples.scores))
    return {
        "gold_reward": gold["mean"],
        "gold_reward_ci": gold["ci"],
        "score": score["mean"],
        "score_ci": score["ci"],
        "kl": float(samples.kl.double().mean()),
        "completion_length": float(samples.lengths.double().mean()),
        "eos_rate": float(samples.finished.double().mean()),
    }


def summary_table(report: dict[str, Any]) -> str:
    """Return the printed table."""
    from rlhf_lightning.functional.statistics import best_of_n_kl

    world, reward = report["world"], report["reward_model"]
    shown = world["demonstrations_gold"], interval(world["demonstrations_gold_ci"])
    rows: list[list[Any]] = [["demonstrations", *shown, None, None, None, None]]
    for stage in POLICIES:
        part = report[stage]
        figures = [part[name] for name in ("score", "kl", "completion_length", "eos_rate")]
        rows.append([NAMES.get(stage, stage), part["gold_reward"], interval(part["gold_reward_ci"]), *figures])
    for n in (4, 16):
        gold, score = (world[f"best_of_{n}_{name}"] for name in ("gold", "score"))
        ends, kl = interval(world[f"best_of_{n}_gold_ci"]), float(best_of_n_kl(n))
        rows.append([f"best of {n} of sft", gold, ends, score, kl, None, None])
    header = ["policy", "gold reward", "95 % interval", "score", "KL", "length", "EOS rate"]
    reached = (reward["accuracy"] - 0.5) / (world["bayes_accuracy"] - 0.5)
    return (
        f"{markdown_table(header, rows)}\n\n"
        f"reward model: accuracy {reward['accuracy']:.3f} {interval(reward['accuracy_ci'])} of a best possible "
        f"{world['bayes_accuracy']:.3f} ({100 * reached:.0f} % of the way from chance), calibration error "
        f"{reward['ece']:.3f}"
    )


def headline(report: dict[str, Any]) -> str:
    """Return the result in two sentences."""
    gold = {stage: report[stage]["gold_reward"] for stage in POLICIES}
    text = (
        f"On held-out prompts, PPO raises the true (gold) reward from {gold['sft']:.2f} (SFT) to {gold['ppo']:.2f}, "
        f"and DPO raises it to {gold['dpo']:.2f}; the best possible is 1."
    )
    path = report["over_optimisation"]
    best, end = max(path, key=lambda one: one["gold_reward"]), path[-1]
    if end["score"] > best["score"] and end["gold_reward_ci"][1] < best["gold_reward_ci"][0]:
        return (
            f"{text} **Without a KL penalty, PPO over-optimises a weak reward model**: from update {best['update']} to "
            f"{end['update']} the score rises from {best['score']:.1f} to {end['score']:.1f}, while the gold reward "
            f"falls from {best['gold_reward']:.2f} to {end['gold_reward']:.2f}."
        )
    return f"{text} Without a KL penalty, PPO ends at {gold[FREE]:.2f}, at a KL of {report[FREE]['kl']:.1f} nats."


HOW_TO_READ = """## How to read this

- **Gold reward** is the truth of this world, from 0 to 1. No stage is trained on it. Compare policies by it.
- **Score** (the proxy score) is the reward model's output. PPO maximises it: outside this world, the gold reward is
  unknown.
- **KL** is measured from the SFT policy, in nats per completion. It says how far a policy has moved.
- **Over-optimisation** is a rising score with a falling gold reward: the policy writes what the reward model likes and
  people do not. It grows with a weaker reward model and a larger KL. A KL penalty keeps PPO near the
  completions that the reward model was trained on. The last curve shows it: PPO without KL penalty against a reward
  model of {weak_pairs} pairs. Its scores are that model's, and are not comparable with the others.
- **Best of n** takes the best of n SFT completions by the reward model. It needs no training, and samples n times as
  much. At equal KL it scores above PPO and DPO, because selecting whole completions raises the score at nearly the
  lowest KL. Training also changes wording and entropy, which adds KL without raising the score. But KL grows only with
  log n, and best of n cannot write what SFT never samples.
- **{best:.3f} is the best possible accuracy of a reward model.** Annotators prefer the better completion only with
  probability sigmoid(12 x the difference in gold reward), so the gold reward itself predicts {share:.1f} %.
- **Intervals** are 95 % bootstrap intervals over prompts. All policies answer the same {prompts} held-out prompts at
  temperature 1. Checkpoints and best of n answer the first {fewer} of them.
- **In the figure**, a line joins the checkpoints of a run in the order of training, from the SFT policy to the final
  policy, which is a star. Vertical bars are intervals. Dotted lines are the gold reward of the demonstrations, which
  SFT imitates, and the best possible gold reward."""


def markdown_report(report: dict[str, Any], table: str, samples: dict[str, ScoredSamples], runs: dict[str, Run]) -> str:
    """Return report.md: headline, table, figure, explanations, over-optimisation, budgets, answers, next steps.

    The same seed gives the same text, because timings are only in report.json.
    """
    best, prompts = report["world"]["bayes_accuracy"], len(samples["sft"].prompts)
    guide = HOW_TO_READ.format(
        best=best, share=100 * best, prompts=prompts, fewer=min(FRONTIER_PROMPTS, prompts), weak_pairs=f"{WEAK_PAIRS:,}"
    )
    return "\n\n".join(
        [
            f"# Quickstart, seed {report['seed']}",
            headline(report),
            table,
            "![Gold reward and score against KL](frontier.png)",
            guide,
            over_optimisation(report),
            stages(runs),
            answers(samples),
            next_steps(runs),
        ]
    )


def over_optimisation(report: dict[str, Any]) -> str:
    """Return the section about the checkpoints of PPO without KL penalty."""
    rows = [
        [one["update"], one["kl"], one["score"], one["gold_reward"], interval(one["gold_reward_ci"])]
        for one in report["over_optimisation"]
    ]
    table = markdown_table(["update", "KL", "score", "gold reward", "95 % interval"], rows)
    weak = report["weak_reward_model"]
    return (
        f"## Over-optimisation\n\nPPO without KL penalty, against a reward model of {weak['pairs']:,} pairs (accuracy "
        f"{weak['accuracy']:.3f}):\n\n{table}"
    )


def stages(runs: dict[str, Run]) -> str:
    """Return the section about each stage's inputs and budget, with links to its run folder."""
    rows = []
    for stage, run in runs.items():
        folder = "/".join(run.folder.parts[-2:])
        rows.append([NAMES.get(stage, stage), run.updates, run.episodes, run.tokens, f"[{folder}]({folder})"])
    table = markdown_table(["stage", "updates", "episodes", "tokens", "run folder"], rows)
    return (
        f"## Stages\n\n{table}\n\nEach folder holds config.yaml, manifest.json, curves for TensorBoard, and "
        "model/. The data is in [world/](world), and every figure and its seconds in [report.json](report.json)."
    )


def answers(samples: dict[str, ScoredSamples]) -> str:
    """Return the section with a few prompts and the answer of each policy."""
    parts, sft = ["## Answers before and after"], samples["sft"]
    for index in range(0, len(sft.prompts), math.ceil(len(sft.prompts) / 6)):
        prompt = sft.prompts[index]
        asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        rows = []
        for stage, drawn in samples.items():
            assert drawn.gold is not None and drawn.scores is not None
            answer = [drawn.completions[index], float(drawn.gold[index]), float(drawn.scores[index])]
            rows.append([NAMES.get(stage, stage), *answer])
        parts.append(f"**{asked}**\n\n" + markdown_table(["policy", "answer", "gold", "score"], rows))
    return "\n\n".join(parts)


def next_steps(runs: dict[str, Run]) -> str:
    """Return the section with the next commands to try."""
    sft, ppo = (os.path.relpath(runs[name].folder) for name in ("sft", "ppo"))
    return f"""## Next

```bash
# compare the runs
tensorboard --logdir {os.path.dirname(os.path.dirname(sft))}
# talk to the policy
rlhf chat {ppo}/model
# change one setting and compare again
rlhf fit --config recipe:assistant/dpo --model.beta 0.2 --run_name dpo_beta_0.2 --model.init_from {sft}/model
```
"""
