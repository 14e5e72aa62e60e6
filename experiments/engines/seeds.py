"""Train SmolLM2 on rollouts of vLLM and of SlotEngine, and compare the first update and the final scores over seeds.

    python experiments/engines/seeds.py --model SmolLM2.gguf [--vllm_python .venv-vllm/bin/python] [--minutes 40]

GRPO trains an adapter, and PPO all weights. The score is the share of short words in a completion. The two engines draw
other completions for the same seed, so the first update is compared on the completions of vLLM: they are trained on
once more with the trainer's own log-probabilities and without a correction. After training, SlotEngine samples the
held-out prompts for both engines. Every finished run is one line of ``runs.jsonl``, and a second call continues after
the last line. Writes experiments/engines/seeds.md; the exit status is 1 if a bound is exceeded.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import lightning.pytorch as pl
import torch
from speed import vllm

from rlhf_lightning.data import PromptDataModule
from rlhf_lightning.evaluation.differences import seed_difference
from rlhf_lightning.evaluation.report import interval, markdown_table, write_markdown
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.lora import LoraSettings
from rlhf_lightning.models.resolving import resolve_folder
from rlhf_lightning.modules import GRPOModule, PPOModule
from rlhf_lightning.sampling.engines import Completions, SamplingEngine, SamplingRequest, SamplingSettings
from rlhf_lightning.sampling.own_logprobs import scored
from rlhf_lightning.sampling.remote_engine import RemoteEngine
from rlhf_lightning.sampling.slot_engine import SlotEngine
from rlhf_lightning.worlds.assistant import write_world

HERE = Path(__file__).resolve().parent
ENGINES = ("SlotEngine", "vLLM")
ROLLOUTS, PROMPTS, SAMPLES, TOKENS, LAST = 6, 2, 8, 8, 2
SHORT = 3
"""Letters of a short word."""

OBJECTIVES: dict[str, tuple[type[GRPOModule] | type[PPOModule], dict[str, Any]]] = {
    "GRPO, adapter": (GRPOModule, {"lora": LoraSettings(r=16, alpha=32), "learning_rate": 1e-3}),
    "PPO, all weights": (PPOModule, {"critic": "shared", "missing_eos_score": None, "learning_rate": 3e-5}),
}
LOSS_BOUND, SCORE_BOUND = 1e-4, 0.08
"""Largest allowed differences of the first update's loss, and of the mean final score."""


def short_words(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    """Return the share of words with at most three letters; 0 without words."""
    words = [text.split() for text in completions]
    return [sum(len(word) <= SHORT for word in one) / max(len(one), 1) for one in words]


class Again(SamplingEngine):
    """Returns completions that were drawn before, with the trainer's own log-probabilities."""

    def __init__(self, ids: list[list[int]]) -> None:
        self.ids = tuple(torch.tensor(row) for row in ids)

    def complete(self, model: CausalLM, request: SamplingRequest) -> Completions:
        """Return the completions."""
        finished = torch.tensor([int(row[-1]) in request.end_ids for row in self.ids])
        return Completions(self.ids, scored(model, request.prompts, self.ids, request.settings.temperature), finished)


class Record(pl.Callback):
    """Records the mean score of each rollout, and completions, loss and gradient norm of the first update."""

    def __init__(self) -> None:
        self.scores: list[float] = []
        self.sync: list[float] = []
        self.first: dict[str, Any] = {}

    def on_rollout_end(self, trainer: Any, module: Any, rollout: Any, means: Any) -> None:
        """Record the scores."""
        self.scores.append(means["score"])
        self.first.setdefault("ids", [row.tolist() for row in rollout.sequences.completions])

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        """Record the update."""
        metrics = trainer.callback_metrics
        self.first.setdefault("loss", float(metrics["train/loss"]))
        self.first.setdefault("norm", float(metrics["train/grad_norm"]))
        if "invariant/sync_error" in metrics:
            self.sync.append(float(metrics["invariant/sync_error"]))


def trained(
    objective: str, seed: int, engine: SamplingEngine, rollouts: int, arguments: argparse.Namespace
) -> tuple[Any, Record]:
    """Train one update per rollout; return the module and the record."""
    kind, settings = OBJECTIVES[objective]
    data = PromptDataModule(
        str(arguments.out / "world" / "prompts_train.jsonl"), batch_size=PROMPTS * SAMPLES, samples_per_prompt=SAMPLES,
        rollouts=rollouts, seed=seed, cache_dir=str(arguments.out / "cache"),
    )  # fmt: skip
    module = kind(
        init_from=resolve_folder(arguments.model), scorer=short_words, engine=engine, max_new_tokens=TOKENS, seed=seed,
        sampler_correction=None if engine.exact else "token_truncate", ppo_epochs=1, kl_coef=0.0,
        lr_schedule="constant", self_check=False, **settings | arguments.changes,
    )  # fmt: skip
    record = Record()
    pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, limit_val_batches=0, callbacks=[record],
    ).fit(module, data)  # fmt: skip
    return module, record


def measured(objective: str, name: str, seed: int, url: str | None, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train with one engine; return its scores, and for vLLM both versions of the first update."""
    began = time.monotonic()
    engine = SlotEngine() if url is None else RemoteEngine(url, "policy", str(shared(objective, arguments)))
    module, record = trained(objective, seed, engine, ROLLOUTS, arguments)
    lines = (arguments.out / "world" / "prompts_test.jsonl").read_text().splitlines()[: arguments.held_out]
    prompts = [json.loads(line)["prompt"] for line in lines]
    module.eval()
    module.engine = SlotEngine()
    with torch.no_grad():
        texts = module.answer(prompts, SamplingSettings(TOKENS), seed=1234).texts
    row = {
        "objective": objective, "engine": name, "seed": seed, "score": mean(short_words(prompts, texts)),
        "curve": record.scores,
    }  # fmt: skip
    del module
    if url is not None:
        _, again = trained(objective, seed, Again(record.first["ids"]), 1, arguments)
        pairs = {part: [record.first[part], again.first[part]] for part in ("loss", "norm")}
        row |= {**pairs, "sync_error": max(record.sync)}
    return {**row, "seconds": round(time.monotonic() - began)}


def shared(objective: str, arguments: argparse.Namespace) -> Path:
    """Return the folder of the weights that the trainer sends."""
    return Path(arguments.out).absolute() / ("adapters" if "lora" in OBJECTIVES[objective][1] else "policy")


def read(path: Path) -> list[dict[str, Any]]:
    """Return the finished runs."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> int:
    """Run the missing measurements, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--vllm_python", default=".venv-vllm/bin/python")
    parser.add_argument("--out", type=Path, default=Path("runs/engine_seeds"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=40.0, help="start no run after this")
    parser.add_argument("--objectives", nargs="*", choices=list(OBJECTIVES), default=list(OBJECTIVES))
    parser.add_argument("--rate", type=float, help="learning rate, for another model than SmolLM2")
    parser.add_argument("--held_out", type=int, default=48, help="held-out prompts (default 48)")
    parser.add_argument("--page", type=Path, default=HERE / "seeds.md")
    arguments = parser.parse_args()
    arguments.changes = {} if arguments.rate is None else {"learning_rate": arguments.rate}
    torch.set_num_threads(1)
    out, begun = arguments.out, time.monotonic()
    if not (out / "world" / "world.json").exists():
        write_world(out / "world", demonstrations=1, pairs_train=1, pairs_test=1)
    results = out / "runs.jsonl"
    for objective in arguments.objectives:
        for name in ENGINES:
            missing = [seed for seed in range(arguments.seeds) if seed not in of(read(results), objective, name)]
            folder = shared(objective, arguments)
            flags = [] if folder.name == "adapters" else ["--folder", str(folder)]
            server = vllm(arguments.model, arguments.vllm_python, 1, out / "server.log", *flags)
            with server if missing and name == "vLLM" else nullcontext() as url:
                for seed in missing:
                    if time.monotonic() - begun < 60 * arguments.minutes:
                        row = measured(objective, name, seed, url, arguments)
                        with results.open("a") as file:
                            file.write(json.dumps(row) + "\n")
                        print(row, flush=True)
    if any(len(of(read(results), *pair)) < arguments.seeds for pair in product(arguments.objectives, ENGINES)):
        raise SystemExit(f"not all runs are finished after {arguments.minutes:g} minutes; start the script again")
    return int(not write_page(read(results), arguments))


# -- the page ---------------------------------------------------------------------------------------------------------


def of(rows: list[dict[str, Any]], objective: str, engine: str) -> dict[int, dict[str, Any]]:
    """Return the runs of an objective with an engine, by seed."""
    return {row["seed"]: row for row in rows if (row["objective"], row["engine"]) == (objective, engine)}


def score_rows(rows: list[dict[str, Any]], objective: str) -> tuple[list[list[Any]], bool]:
    """Return the scores with both engines, and whether their difference is within the bound."""
    runs = {engine: of(rows, objective, engine) for engine in ENGINES}
    finals = {engine: {seed: row["score"] for seed, row in own.items()} for engine, own in runs.items()}
    gap, cells = seed_difference(*finals.values()), []
    for engine, own in runs.items():
        first, last = (
            mean([mean(row["curve"][part]) for row in own.values()]) for part in (slice(1), slice(-LAST, None))
        )
        each = ", ".join(f"{score:.3f}" for score in finals[engine].values())
        difference = f"{gap.mean:+.3f} {interval((gap.low, gap.high))}" if engine == "vLLM" else ""
        cells.append([objective, engine, first, last, mean(finals[engine].values()), each, difference])
    return cells, abs(gap.mean) <= SCORE_BOUND


def update_rows(rows: list[dict[str, Any]], objective: str) -> tuple[list[list[Any]], bool]:
    """Return the first updates of each seed, and whether their differences are within the bound."""
    cells, largest = [], 0.0
    for seed, row in of(rows, objective, "vLLM").items():
        (loss, other), (norm, again) = row["loss"], row["norm"]
        largest = max(largest, abs(loss - other))
        differences = [abs(loss - other), abs(norm / again - 1), row["sync_error"]]
        cells.append([objective, seed, f"{loss:.6f}", f"{other:.6f}", *(f"{value:.1e}" for value in differences)])
    return cells, largest <= LOSS_BOUND


def write_page(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> bool:
    """Write the tables; return whether all differences are within their bounds."""
    scores = [score_rows(rows, objective) for objective in arguments.objectives]
    updates = [update_rows(rows, objective) for objective in arguments.objectives]
    model = Path(arguments.model).stem
    score_header = [
        "objective",
        "engine",
        "first rollout",
        f"last {LAST} rollouts",
        "held-out",
        "each seed",
        "difference",
    ]
    update_header = ["objective", "seed", "loss, vLLM", "loss, trainer", "difference", "gradient", "check"]
    seconds = sum(row["seconds"] for row in rows)
    write_markdown(arguments.page, (
        f"# {model} on rollouts of vLLM and of SlotEngine\n\n"
        f"`python experiments/engines/seeds.py` writes this page: {model} in fp32, {ROLLOUTS} rollouts of "
        f"{PROMPTS} prompts of the assistant world with {SAMPLES} completions of up to {TOKENS} tokens, one update for "
        "each rollout, no KL penalty; with vLLM `sampler_correction: token_truncate`. The score is the share of words "
        f"of at most {SHORT} letters. {len(rows)} runs, {seconds / 60:.0f} minutes, one thread in the trainer and one "
        "in the server.\n\n## Scores\n\n"
        f"*Held-out*: one completion for each of {arguments.held_out} prompts after training, which SlotEngine samples "
        "with the same seed for all runs. *Difference*: vLLM minus SlotEngine, paired by seed, with Student's 95 % "
        f"interval; the mean must be within {SCORE_BOUND}.\n\n"
        f"{markdown_table(score_header, [row for cells, _ in scores for row in cells])}\n\n## First update\n\n"
        "Both losses are of the completions that vLLM drew: once with vLLM's log-probabilities and the correction, "
        "once with the trainer's own log-probabilities and without a correction. *Gradient*: relative difference of "
        "its norm. *Check*: largest `invariant/sync_error` of the run, nats. The losses must agree within "
        f"{LOSS_BOUND:g}.\n\n"
        f"{markdown_table(update_header, [row for cells, _ in updates for row in cells])}\n\n"
        "See also: [engines against a real server](results.md), and [engines](../../docs/engines.md).\n"
    ))  # fmt: skip
    return all(within for _, within in scores + updates)


if __name__ == "__main__":
    sys.exit(main())
