"""GRPO of SmolLM2-135M-Instruct on a verifiable score: whether a completion follows its instruction.

    python experiments/smollm2/grpo.py --model SmolLM2.gguf --data ../shared/data [--smoke] [--page grpo.md]

Writes the prompts, runs `rlhf fit --config recipe:grpo_instructions`, and evaluates the same held-out prompts before
and after training. The data folder only needs prompts.jsonl. Each of its short single-turn questions is combined with
every instruction below.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
for _folder in (str(HERE), str(HERE.parents[1])):
    if _folder not in sys.path:
        sys.path.insert(0, _folder)

import torch  # noqa: E402 - like the next, found through the lines above
from lightning.pytorch import Callback  # noqa: E402
from real import parser as real_parser  # noqa: E402
from real_stages import read_rows  # noqa: E402

from rlhf_lightning.functional.statistics import bootstrap_interval  # noqa: E402
from rlhf_lightning.scoring.instructions import with_instruction  # noqa: E402

FILE, SOURCE, LONGEST = "prompts.jsonl", "oasst_lottery", 80
INSTRUCTIONS: dict[str, dict[str, Any]] = {
    "at_most_words": {"count": 10},
    "no_commas": {},
    "digits": {},
    "title": {},
}
"""Instructions with their arguments; the untrained model follows them only sometimes."""

TRAIN_QUESTIONS = 80
SMOKE = {"data.rollouts": 2, "data.batch_size": 8, "model.max_new_tokens": 8}


class RolloutScores(Callback):
    """Keep the mean score of every rollout."""

    def __init__(self) -> None:
        self.scores: list[float] = []

    def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        """Record the metrics that the module has just logged."""
        self.scores.append(float(trainer.callback_metrics["rollout/score"]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run, write the report, and print it; return exit status 1 if a full run does not raise the score."""
    arguments = parser().parse_args(argv)
    if not (arguments.data / FILE).is_file():
        print(f"skipped: this needs {FILE}, and {arguments.data} has none; name its folder with --data")
        return 0
    started = time.perf_counter()
    report = run(arguments)
    report["seconds"] = round(time.perf_counter() - started, 1)
    import grpo_report

    text = grpo_report.write(report, arguments.out, arguments.page)
    print(f"\n{text}\nreport: {arguments.out / 'report.json'}   {report['seconds']:.0f} s")
    if arguments.smoke or (report["change"]["score_ci"][0] > 0 and report["slope"]["ci"][0] > 0):
        return 0
    print("not shown by this run: that the score rises", file=sys.stderr)
    return 1


def parser() -> argparse.ArgumentParser:
    """Return the command-line parser: that of the real run, with an option for the page."""
    result = real_parser()
    result.description, result.formatter_class = __doc__, argparse.RawDescriptionHelpFormatter
    result.set_defaults(out=Path("runs/real-grpo"))
    result.add_argument("--page", type=Path, help="also write the report here")
    return result


# -- rows -------------------------------------------------------------------------------------------------------------


def questions(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the distinct short single-turn questions of the prompts file, in order."""
    asked = [row["prompt"][0]["content"].strip() for row in rows if row["source"] == SOURCE and len(row["prompt"]) == 1]
    return list(dict.fromkeys(text for text in asked if len(text) <= LONGEST))


def write_prompts(folder: Path, data: Path, smoke: bool = False) -> dict[str, Path]:
    """Write the training rows (the first questions) and evaluation rows (the rest), each with every instruction.

    Raises:
        ValueError: there are too few questions.
    """
    found = questions(read_rows(data / FILE))
    if len(found) <= TRAIN_QUESTIONS:
        raise ValueError(f"{len(found)} short questions are too few: {TRAIN_QUESTIONS} are trained on")
    held_out = found[TRAIN_QUESTIONS:]
    parts = {"train": found[:TRAIN_QUESTIONS], "held_out": held_out[:2] if smoke else held_out}
    paths = {name: folder / f"{name}.jsonl" for name in parts}
    folder.mkdir(parents=True, exist_ok=True)
    for name, texts in parts.items():
        rows = [
            {**with_instruction(text, instruction, **given), "question": text}
            for text in texts
            for instruction, given in INSTRUCTIONS.items()
        ]
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return paths


def command(paths: dict[str, Path], start: str, out: Path, seed: int, smoke: bool = False) -> list[str]:
    """Return the arguments of `rlhf fit`: all deviations of this run from the recipe."""
    callbacks = [{"class_path": "held_out.HeldOutRows"}, {"class_path": "grpo.RolloutScores"}]
    flags: dict[str, Any] = {
        "config": "recipe:grpo_instructions",
        "seed_everything": seed,
        "runs_folder": out,
        "run_name": "grpo",
        "model.init_from": start,
        "model.seed": seed,
        "data.source": paths["train"],
        "data.eval_source": paths["held_out"],
        "data.seed": seed,
        "samples.prompts": 2,
        # Evaluate all held-out rows before training, for comparison.
        "trainer.num_sanity_val_steps": -1,
        "trainer.callbacks": json.dumps(callbacks),
        "trainer.enable_checkpointing": "false",
        "trainer.accelerator": "cpu",
        **(SMOKE if smoke else {}),
    }
    return ["fit", *(part for name, value in flags.items() for part in (f"--{name}", str(value)))]


# -- results ----------------------------------------------------------------------------------------------------------


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, and return the report."""
    import real_report

    from rlhf_lightning.commands import train
    from rlhf_lightning.commands.quickstart import fresh_folder
    from rlhf_lightning.models.resolving import resolve_folder
    from rlhf_lightning.quiet import silence_libraries

    silence_libraries()
    out, seed = fresh_folder(arguments.out), arguments.seed
    paths = write_prompts(out / "data", arguments.data, arguments.smoke)
    start = resolve_folder(arguments.model)
    cli = train.run(command(paths, start, out, seed, arguments.smoke))
    callbacks = {type(callback).__name__: callback for callback in cli.trainer.callbacks}
    scores = callbacks["RolloutScores"].scores
    figures = held_out_figures(callbacks["HeldOutRows"].passes, read_rows(paths["held_out"]), cli.model.tokenizer, seed)
    return {
        "smoke": arguments.smoke,
        "seed": seed,
        "model": Path(arguments.model).name,
        "threads": torch.get_num_threads(),
        "batch_size": cli.trainer.datamodule.batch_size,
        "samples_per_prompt": cli.trainer.datamodule.samples_per_prompt,
        "max_new_tokens": cli.model.sampling.max_new_tokens,
        "learning_rate": cli.model.learning_rate,
        "kl_coef": cli.model.kl_coef,
        "rollout_scores": scores,
        "slope": slope(scores, seed),
        "peak_memory_gib": real_report.peak_memory(),
        **figures,
    }


def slope(scores: Sequence[float], seed: int = 0, draws: int = 10_000) -> dict[str, Any]:
    """Return the least-squares slope of the scores per rollout, and its 95 % interval from resampling rollouts."""
    y = torch.tensor(scores, dtype=torch.float64)
    x = torch.arange(len(y), dtype=torch.float64)
    drawn = torch.randint(len(y), (draws, len(y)), generator=torch.Generator().manual_seed(seed))
    # A resample of a single rollout has no slope and gives 0.
    found = _slopes(x[drawn], y[drawn]).nan_to_num(0.0)
    tails = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return {"mean": float(_slopes(x, y)), "ci": found.quantile(tails).tolist()}


def _slopes(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return (centered * y).sum(-1) / centered.square().sum(-1)


def held_out_figures(
    passes: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], tokenizer: Any, seed: int
) -> dict[str, Any]:
    """Return the scores of held-out prompts before and after, sampled with the same random numbers.

    The interval of the difference resamples questions, since rows of the same question are not independent.

    Raises:
        ValueError: the two passes have different prompts or another order.
    """
    from rlhf_lightning.tokenization import encode_prompt

    before, after = passes[0], passes[-1]
    if before["prompt"] != after["prompt"]:
        raise ValueError("the held-out prompts came in another order after training: their answers cannot be paired")
    by_prompt = {tuple(encode_prompt(tokenizer, row["prompt"])): row for row in rows}
    known = [by_prompt[prompt] for prompt in before["prompt"]]
    number = {text: index for index, text in enumerate(dict.fromkeys(row["question"] for row in known))}
    clusters = torch.tensor([number[row["question"]] for row in known])
    columns = {"score": "score", "eos_rate": "finished", "completion_length": "length", "kl": "kl"}
    change: dict[str, Any] = {}
    for name, column in columns.items():
        first, last = (torch.tensor(part[column], dtype=torch.float64) for part in (before, after))
        low, high = bootstrap_interval(last - first, seed=seed, clusters=clusters)
        change |= {f"{name}_before": float(first.mean()), f"{name}_after": float(last.mean())}
        change[f"{name}_ci"] = [float(low), float(high)]
    each = {name: [row for row, given in enumerate(known) if given["instruction"] == name] for name in INSTRUCTIONS}
    kept = {
        name: [sum(part["score"][row] for row in mine) / len(mine) for part in (before, after)]
        for name, mine in each.items()
    }
    shown = [{"prompt": known[row]["prompt"][0]["content"], "before": before["completion"][row],
              "after": after["completion"][row]} for row in range(len(INSTRUCTIONS))]  # fmt: skip
    return {"change": change, "kept": kept, "answers": shown, "eval_rows": len(known), "eval_questions": len(number)}


if __name__ == "__main__":
    raise SystemExit(main())
