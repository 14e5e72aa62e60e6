"""Measure how long a trainer waits for rollouts with `model.lag: 1`, and the run time on one core and on two.

    python experiments/engines/waiting.py [--rollouts 12] [--turns 3]

GRPO of a small policy with random weights, whose completions nearly all reach the token limit. Every setting runs in a
separate process that is bound to its cores, with one thread in the trainer and one in the worker. Settings alternate;
medians over the turns are reported. The lower bound of lag 1 is the longer of sampling and training on two cores, and
their sum on one core. Writes experiments/engines/waiting.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
SETTINGS = {
    "lag 0, one core": (0, 1), "lag 0, two cores": (0, 2), "lag 1, one core": (1, 1), "lag 1, two cores": (1, 2),
}  # fmt: skip
"""Lag in rollouts, and cores shared by trainer and worker."""
FIRST = 3
"""Rollouts left out: during them the worker starts, and the first `lag` rollouts are sampled before any training."""


def lengths(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    """Score completions by their number of characters, which takes no time."""
    return [float(len(text)) for text in completions]


def run(folder: Path, lag: int, epochs: int, rollouts: int) -> dict[str, float]:
    """Train; return the seconds per rollout, and the seconds of waiting for its episodes."""
    import lightning.pytorch as pl
    import torch

    from rlhf_lightning.data import PromptDataModule
    from rlhf_lightning.models.causal_lm import CausalLM
    from rlhf_lightning.modules import GRPOModule
    from rlhf_lightning.sampling.engines import Completions, SamplingRequest
    from rlhf_lightning.sampling.slot_engine import SlotEngine
    from rlhf_lightning.sampling.worker_engine import WorkerEngine

    torch.set_num_threads(1)
    waited = [0.0]

    def timed(result: Callable[[], Completions]) -> Completions:
        began = time.perf_counter()
        found = result()
        waited[0] += time.perf_counter() - began
        return found

    class Ahead(WorkerEngine):
        def start(self, model: CausalLM, request: SamplingRequest) -> Callable[[], Completions]:
            result = super().start(model, request)
            return lambda: timed(result)

    class InStep(SlotEngine):
        def complete(self, model: CausalLM, request: SamplingRequest) -> Completions:
            parent = super().complete
            return timed(lambda: parent(model, request))

    class Clock(pl.Callback):
        ends: list[tuple[float, float]] = []

        def on_train_batch_end(self, *_: Any) -> None:
            self.ends.append((time.perf_counter(), waited[0]))

    pl.seed_everything(0, verbose=False)
    module = GRPOModule(
        init_from=str(folder / "model"), from_scratch=True, scorer=lengths,
        engine=Ahead(threads=1) if lag else InStep(), lag=lag, max_new_tokens=48, ppo_epochs=epochs, kl_coef=0.0,
        sampler_correction="sequence_truncate" if lag else "none", learning_rate=1e-5,
    )  # fmt: skip
    data = PromptDataModule(
        str(folder / "prompts_train.jsonl"), batch_size=64, samples_per_prompt=8, rollouts=rollouts,
        cache_dir=str(folder / "cache"),
    )  # fmt: skip
    pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[Clock()],
    ).fit(module, data)  # fmt: skip
    kept = Clock.ends[FIRST - 1 :]
    count = len(kept) - 1
    return {"rollout": (kept[-1][0] - kept[0][0]) / count, "waiting": (kept[-1][1] - kept[0][1]) / count}


def measured(folder: Path, name: str, epochs: int, rollouts: int) -> dict[str, float]:
    """Run a setting in a separate process bound to its cores."""
    lag, cores = SETTINGS[name]
    free = sorted(os.sched_getaffinity(0))[:cores]
    command = [sys.executable, __file__, "--run", str(folder), str(lag), str(epochs), "--rollouts", str(rollouts)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False,
        preexec_fn=lambda: os.sched_setaffinity(0, free), env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Run the settings in turn and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=12)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--page", default=str(HERE / "waiting.md"))
    parser.add_argument("--run", nargs=3, metavar=("FOLDER", "LAG", "EPOCHS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        folder, lag, epochs = arguments.run
        print(json.dumps(run(Path(folder), int(lag), int(epochs), arguments.rollouts)))
        return
    from rlhf_lightning.evaluation.report import markdown_table, write_markdown
    from rlhf_lightning.worlds.assistant import write_world

    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_world(folder, demonstrations=8, pairs_train=16, pairs_test=4)
        once = measured(folder, "lag 0, one core", 1, FIRST + 2)
        epochs = max(1, round(once["waiting"] / (once["rollout"] - once["waiting"])))
        found: dict[str, list[dict[str, float]]] = {name: [] for name in SETTINGS}
        for _ in range(arguments.turns):
            for name, records in found.items():
                records.append(measured(folder, name, epochs, arguments.rollouts))
    in_step = found["lag 0, one core"]
    sampling = median(one["waiting"] for one in in_step)
    training = median(one["rollout"] - one["waiting"] for one in in_step)
    rows = []
    for name, records in found.items():
        whole, waiting = (median(one[part] for one in records) for part in ("rollout", "waiting"))
        bound = max(sampling, training) if name == "lag 1, two cores" else sampling + training
        share = f"{waiting / whole:.0%}" if SETTINGS[name][0] else "samples itself"
        rows.append(
            [name, f"{whole:.2f}", f"{bound:.2f}", share, ", ".join(f"{one['rollout']:.2f}" for one in records)]
        )
    table = markdown_table(["setting", "seconds of a rollout", "bound", "trainer waits", "each turn"], rows)
    write_markdown(arguments.page, (
        "# Waiting for rollouts\n\n"
        f"`python experiments/engines/waiting.py` writes this page: GRPO, 64 completions of up to 48 tokens, {epochs} "
        f"epoch(s) of training on each, one thread in the trainer and one in the worker, medians of {arguments.turns} "
        f"turns of {arguments.rollouts - FIRST} rollouts. On one core at lag 0 sampling takes {sampling:.2f} s and "
        f"training {training:.2f} s; the bounds follow from these two.\n\n{table}\n"
    ))  # fmt: skip
    print(table)


if __name__ == "__main__":
    main()
