"""Train every objective in the quickstart's world and compare its gold reward, which is not used in training, with SFT.

    rlhf quickstart --out runs/quickstart
    python experiments/objectives/assistant_world.py [--only SimPOModule ...] [--start runs/quickstart]

Each objective starts from the quickstart's SFT policy and trains through `rlhf fit` with the quickstart's YAML of its
family and the settings of `settings.py` in this folder. Objectives with a stored result are skipped.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from settings import REASONS, runs  # in this folder

from rlhf_lightning.commands import train
from rlhf_lightning.evaluation.policies import mean_with_interval, sample_and_score
from rlhf_lightning.evaluation.report import interval, markdown_table, write_json, write_markdown
from rlhf_lightning.models.roles import load_policy, load_reference
from rlhf_lightning.sampling.engines import SamplingSettings
from rlhf_lightning.scoring import LearnedScorer
from rlhf_lightning.tokenization import load_tokenizer
from rlhf_lightning.types import Prompt
from rlhf_lightning.worlds.assistant import gold_of_conversation

HERE = Path(__file__).resolve().parent
SOURCES = {"dpo": ("pairs_train", "pairs_test"), "ppo": ("prompts_train", "prompts_test"), "sft": ("demonstrations",)}
"""Training and evaluation rows, by YAML file; without the latter, the file's own fraction of the rows is held out."""


def main() -> None:
    """Run the missing objectives, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=None, help="names of objectives (default: all)")
    parser.add_argument("--start", type=Path, default=Path("runs/quickstart"), help="folder of a finished quickstart")
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--table", type=Path, default=HERE / "assistant_world.md")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rows = [measured(load(arguments.start, "sft"), arguments.start, arguments.seed) | {"objective": "SFTModule"}]
    for objective, config, settings in runs():
        result = arguments.out / objective / "result.json"
        if not result.is_file() and (arguments.only is None or objective in arguments.only):
            write_json(result, run(objective, config, settings, arguments))
        if result.is_file():
            rows.append(json.loads(result.read_text(encoding="utf-8")))
    write_markdown(arguments.table, page(rows, arguments.seed))
    print(f"wrote {arguments.table}")


def load(start: Path, stage: str) -> str:
    """Return the model folder of a stage of the quickstart.

    Raises:
        FileNotFoundError: ``start`` has no finished quickstart.
    """
    folder = start / stage / "version_0" / "model"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing: run `rlhf quickstart --out {start}` first")
    return str(folder)


def run(objective: str, config: str, settings: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one objective through `rlhf fit`; return its figures and settings."""
    print(f"\n{objective}: {settings}", flush=True)
    world = arguments.start / "world"
    flags: dict[str, Any] = {
        "seed_everything": arguments.seed,
        "runs_folder": arguments.out,
        "run_name": objective,
        "model": objective,
        "model.init_from": load(arguments.start, "sft"),
        "model.seed": arguments.seed,
        "data.seed": arguments.seed,
    }
    for name, value in settings.items():
        flags[name] = load(arguments.start, value) if name in ("model.scorer", "model.teacher") else value
    for name, source in zip(("data.source", "data.eval_source"), SOURCES[config], strict=False):
        flags[name] = world / f"{source}.jsonl"
    flags["export.every_n_updates"] = "null"
    parts = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    started = time.perf_counter()
    done = train.run(["fit", "--config", f"recipe:assistant/{config}", *parts])
    seconds = time.perf_counter() - started
    figures = measured(str(Path(done.folder) / "model"), arguments.start, arguments.seed)
    return {"objective": objective, "settings": settings, "config": config, "seconds": round(seconds), **figures}


def measured(folder: str, start: Path, seed: int) -> dict[str, Any]:
    """Answer the held-out prompts; return gold reward, score, KL and length."""
    lines = (start / "world" / "prompts_test.jsonl").read_text(encoding="utf-8").splitlines()
    prompts: list[Prompt] = [json.loads(line)["prompt"] for line in lines]
    scorer, reference = LearnedScorer(load(start, "reward")), load_reference(load(start, "sft"))
    samples = sample_and_score(
        load_policy(folder), load_tokenizer(folder), prompts, SamplingSettings(max_new_tokens=48),
        seed + 1, 1, reference, scorer,        gold_of_conversation,
    )  # fmt: skip
    assert samples.gold is not None and samples.scores is not None and samples.kl is not None
    gold = mean_with_interval(samples.gold, seed)

    def mean(values: torch.Tensor) -> float:
        return float(values.double().mean())

    return {
        "gold_reward": gold["mean"],
        "gold_reward_ci": gold["ci"],
        "score": mean(samples.scores),
        "kl": mean(samples.kl),
        "length": mean(samples.lengths),
    }


def page(rows: list[dict[str, Any]], seed: int) -> str:
    """Return the page: one row per objective, with its settings."""
    start = rows[0]["gold_reward_ci"]
    cells = []
    for row in rows:
        settings = ", ".join(f"{name} {value}" for name, value in row.get("settings", {}).items())
        raised = "" if row is rows[0] else "yes" if row["gold_reward_ci"][0] > start[1] else "NO"
        figures = [row["gold_reward"], interval(row["gold_reward_ci"]), raised, row["score"], row["kl"], row["length"]]
        cells.append([row["objective"], *figures, settings])
    header = ["objective", "gold reward", "95 % interval", "above SFT", "score", "KL", "length", "settings"]
    return (
        "# Objectives on the assistant world\n\n"
        "`python experiments/objectives/assistant_world.py` after `rlhf quickstart`, seed "
        f"{seed}. Each objective starts from the quickstart's SFT policy. Gold reward is the world's own, was never "
        "trained on, and is the mean over the held-out prompts at temperature 1; `above SFT`: the intervals are "
        "disjoint. Score is the quickstart's reward model's, KL is from the SFT policy in nats per completion. What a "
        "row's settings leave out is in recipe:assistant/dpo (fixed data), ppo.yaml (on-policy) and "
        "sft.yaml (GKD). Students are taught by the quickstart's DPO policy.\n\n"
        f"{markdown_table(header, cells)}\n{explained(rows, start)}"
    )


def explained(rows: list[dict[str, Any]], start: list[float]) -> str:
    """Return why some objectives do not raise the gold reward.

    Raises:
        KeyError: an objective does not raise it, and `settings.REASONS` has no entry for the objective.
    """
    names = [row["objective"] for row in rows[1:] if row["gold_reward_ci"][0] <= start[1]]
    return "".join(f"\n{name} does not raise it. {REASONS[name]}\n" for name in names)


if __name__ == "__main__":
    main()
