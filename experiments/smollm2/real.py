"""The whole pipeline on a real model and human data: SFT, reward model, DPO and PPO of SmolLM2-135M-Instruct on a CPU.

    python experiments/smollm2/real.py --model SmolLM2.gguf --data ../shared/data [--smoke] [--out runs/real]

Each stage runs `rlhf fit` with the YAML file of its name in this folder; only its row budget differs (real_stages.py).
Held-out rows are never trained on: the reward model and PPO share one split of the TruthfulQA prompts. Writes
report.json and report.md.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
for _folder in (str(HERE), str(ROOT)):
    if _folder not in sys.path:
        sys.path.insert(0, _folder)

import real_stages  # noqa: E402 - found through the line above

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
SAMPLE_CATEGORIES = ("Nutrition", "Weather", "Science", "Proverbs")
"""Categories of the questions whose answers the report shows."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages, write the report and print its tables; return 1 if a full run misses a required result."""
    arguments = parser().parse_args(argv)
    missing = [name for name in real_stages.FILES.values() if not (arguments.data / name).is_file()]
    if missing:
        print(
            f"skipped: this needs the human data, and {arguments.data} has no {missing[0]}; name its folder with --data"
        )
        return 0
    started = time.perf_counter()
    report = run(arguments)
    report = {"seconds": round(time.perf_counter() - started, 1), **report}
    import real_report

    paths = real_report.write(report, arguments.out)
    print(f"\n{real_report.tables(report)}\n\nreport: {paths[1]}   {report['seconds']:.0f} s")
    print(f"compare the runs: tensorboard --logdir {arguments.out}")
    failed = [name for name, held in report["checks"].items() if not held]
    if failed and not arguments.smoke:
        print(f"not shown by this run: {', '.join(failed)}", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--model", default=MODEL, help=f"hub id, folder or .gguf file to start from (default {MODEL})")
    default = Path(os.environ.get("RLHF_DATA") or ROOT.parent / "shared" / "data")
    result.add_argument("--data", type=Path, default=default, help="folder of the human data (default $RLHF_DATA)")
    result.add_argument("--out", type=Path, default=Path("runs/real"), help="folder of the report and the runs")
    result.add_argument("--seed", type=int, default=0, help="seed of order, heads and samples (default 0)")
    result.add_argument("--smoke", action="store_true", help="tiny budgets: shows that it runs, not that it learns")
    return result


class Finished:
    """A finished stage.

    Attributes:
        module: the module, with its models in memory.
        folder: run folder.
        passes: rows of each validation pass.
        seconds: duration.
    """

    def __init__(self, cli: Any, seconds: float) -> None:
        callbacks = {type(callback).__name__: callback for callback in cli.trainer.callbacks}
        self.module, self.folder, self.seconds = cli.model, Path(cli.folder), seconds
        self.passes = callbacks["HeldOutRows"].passes

    @property
    def model(self) -> str:
        """The folder the next stage starts from."""
        return str(self.folder / "model")

    def release(self) -> None:
        """Free the memory of its models before the next stage loads its own."""
        self.module = None
        gc.collect()


def fit(stage: str, flags: Sequence[str]) -> Finished:
    """Run `rlhf fit` in this process."""
    from rlhf_lightning.commands import train

    print(f"\nreal: rlhf fit --config recipe:{stage}", flush=True)
    started = time.perf_counter()
    cli = train.run(flags)
    return Finished(cli, time.perf_counter() - started)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the four stages; return the report."""
    import real_figures
    import real_report

    from rlhf_lightning.commands.quickstart import fresh_folder
    from rlhf_lightning.evaluation.policies import sample_and_score
    from rlhf_lightning.loading import cache_folder
    from rlhf_lightning.models.resolving import resolve_folder
    from rlhf_lightning.models.roles import load_policy, load_reference
    from rlhf_lightning.quiet import silence_libraries
    from rlhf_lightning.sampling.engines import SamplingSettings
    from rlhf_lightning.tokenization import load_tokenizer

    silence_libraries()
    budget, seed = real_stages.SMOKE if arguments.smoke else real_stages.FULL, arguments.seed
    out = fresh_folder(arguments.out)
    paths = real_stages.write_data(out / "data", cache_folder() / "real", arguments.data, budget)
    unseen = real_stages.read_rows(Path(paths["truthful_test"]))
    questions = real_figures.shown_questions(unseen, SAMPLE_CATEGORIES, budget.shown)
    began = time.perf_counter()
    start = resolve_folder(arguments.model)
    seconds, tokenizer = {"conversion": time.perf_counter() - began}, load_tokenizer(start)

    def answers_of(policy: Any) -> list[str]:
        return real_figures.greedy_answers(policy, tokenizer, questions, budget.max_new_tokens)

    answers = {"before": answers_of(load_policy(start))}
    report: dict[str, Any] = {}

    done = fit("sft", real_stages.command("sft", budget, paths, start, out, seed))
    report["sft"] = real_figures.sft(done.passes, seed)
    answers["sft"], seconds["sft"], policy = answers_of(done.module.policy), done.seconds, done.model
    done.release()

    done = fit("reward", real_stages.command("reward", budget, paths, policy, out, seed))
    report["reward_model"] = real_figures.reward(
        done.passes[-1], tokenizer, real_stages.read_rows(Path(paths["truthful"])), unseen, seed
    )
    reward_model, seconds["reward"] = done.model, done.seconds
    done.release()

    done = fit("dpo", real_stages.command("dpo", budget, paths, policy, out, seed))
    reference, settings = load_reference(policy), SamplingSettings(budget.max_new_tokens, 1.0)
    prompts = [row["prompt"] for row in unseen[: budget.dpo_prompts]]
    samples = sample_and_score(done.module.policy, tokenizer, prompts, settings, seed, reference=reference)
    report["dpo"] = {**real_figures.dpo(done.passes[-1], seed), **real_figures.sampled(samples, seed)}
    answers["dpo"], seconds["dpo"] = answers_of(done.module.policy), done.seconds
    done.release()

    done = fit("ppo", real_stages.command("ppo", budget, paths, policy, out, seed, scorer=reward_model))
    report["ppo"] = real_figures.ppo(done.passes, seed)
    answers["ppo"], seconds["ppo"] = answers_of(done.module.policy), done.seconds
    done.release()

    report = {**real_report.settings(budget, arguments), **report, "questions": questions, "answers": answers}
    report["stage_seconds"] = {name: round(value, 1) for name, value in seconds.items()}
    return {**report, "peak_memory_gib": real_report.peak_memory(), "checks": real_report.checks(report)}


if __name__ == "__main__":
    raise SystemExit(main())
