"""Measure learning curves at lag 0, 1, 2 and 4 and two learning rates, with and without a correction.

    python experiments/engines/lag.py [--out runs/lag] [--seeds 5] [--minutes 40]

A small policy of the assistant world first imitates demonstrations. GRPO then trains it on the gold reward, once for
each setting and seed, with all settings on the same prompts. The episodes of a lagged run do not depend on the engine,
so they are sampled in this process. Every finished run is one line of ``runs.jsonl``, and a second call continues after
the last line. Writes experiments/engines/lag.md and lag.png.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch

from rlhf_lightning.data import PromptDataModule, SFTDataModule
from rlhf_lightning.evaluation.differences import mean_interval, seed_difference
from rlhf_lightning.evaluation.report import markdown_table, pyplot, save_figure, write_markdown
from rlhf_lightning.modules import GRPOModule, SFTModule
from rlhf_lightning.sampling.engines import SamplingSettings
from rlhf_lightning.types import Prompt
from rlhf_lightning.worlds.assistant import gold_of_conversation, write_world

HERE = Path(__file__).resolve().parent
PROMPTS, SAMPLES, LAST = 8, 8, 8
CORRECTIONS = (None, "sequence_truncate")
BOUND = 0.03
"""Difference of gold rewards that counts as equal."""


class Task(NamedTuple):
    """A column of the table.

    Attributes:
        rate: learning rate.
        rollouts: number of rollouts.
        samples: completions of each held-out prompt after training.
    """

    rate: float
    rollouts: int
    samples: int = 4

    @property
    def title(self) -> str:
        """The settings in words."""
        return f"learning rate {self.rate:g}, {self.rollouts} rollouts"


TASKS = (Task(1e-3, 48, 1), Task(3e-4, 48), Task(3e-4, 72))
CURVES = {"lag 0": (0, None)} | {
    f"lag {lag}, {correction or 'no correction'}": (lag, correction) for lag in (1, 2, 4) for correction in CORRECTIONS
}
"""Lag and correction of each row of the table."""

SETTINGS = {f"{name}, {task.title}": (task, *curve) for task in TASKS for name, curve in CURVES.items()}


def gold(prompts: list[Prompt], completions: list[str], **columns: Any) -> list[float]:
    """Return the known reward of each completion."""
    return [gold_of_conversation(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]


class Curve(pl.Callback):
    """Records the mean score of each rollout."""

    def __init__(self) -> None:
        self.scores: list[float] = []

    def on_rollout_end(self, trainer: Any, module: Any, rollout: Any, means: Any) -> None:
        """Record the score."""
        self.scores.append(round(means["score"], 4))


def imitated(out: Path) -> str:
    """Train the policy on demonstrations, unless its folder exists; return the folder."""
    if not (out / "world" / "world.json").exists():
        write_world(out / "world", demonstrations=4000, pairs_train=1, pairs_test=1)
    if not (out / "policy" / "config.json").exists():
        data = SFTDataModule(str(out / "world" / "demonstrations.jsonl"), batch_size=32, cache_dir=str(out / "cache"))
        module = SFTModule(
            init_from=str(out / "world" / "model"), from_scratch=True, learning_rate=4e-3, warmup=0.05, seed=0
        )
        quiet(max_epochs=2).fit(module, data)
        module.export(out / "policy")
    return str(out / "policy")


def quiet(**settings: Any) -> pl.Trainer:
    """Return a trainer without logs and files."""
    return pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0, limit_val_batches=0,
        **settings,
    )  # fmt: skip


def trained(name: str, seed: int, policy: str, out: Path) -> dict[str, Any]:
    """Train one setting; return its curve, and the mean gold reward of completions of the held-out prompts."""
    task, lag, correction = SETTINGS[name]
    started, curve = time.process_time(), Curve()
    data = PromptDataModule(
        str(out / "world" / "prompts_train.jsonl"), batch_size=PROMPTS * SAMPLES, samples_per_prompt=SAMPLES,
        rollouts=task.rollouts, seed=seed, cache_dir=str(out / "cache"),
    )  # fmt: skip
    module = GRPOModule(
        init_from=policy, scorer=gold, lag=lag, sampler_correction=correction, max_new_tokens=48,
        learning_rate=task.rate, lr_schedule="constant", kl_coef=0.0, mini_batch_size=32, seed=seed,
        self_check=False,
    )  # fmt: skip
    quiet(max_epochs=1, callbacks=[curve]).fit(module, data)
    lines = (out / "world" / "prompts_test.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines] * task.samples
    module.eval()
    with torch.no_grad():
        texts = module.answer(prompts, SamplingSettings(48, batch_size=128), seed=1234).texts
    scores, seconds = gold(prompts, texts), time.process_time() - started
    return {
        "setting": name, "seed": seed, "gold": sum(scores) / len(scores), "curve": curve.scores,
        "seconds": round(seconds, 1),
    }  # fmt: skip


def read(path: Path) -> list[dict[str, Any]]:
    """Return the finished runs."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    """Run the missing measurements, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/lag"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=40.0, help="start no run after this")
    parser.add_argument("--only", nargs="*", default=list(SETTINGS), help="settings to measure")
    parser.add_argument("--page", type=Path, default=HERE / "lag.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    out, begun = arguments.out, time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    policy, results = imitated(out), out / "runs.jsonl"
    for seed in range(arguments.seeds):
        for name in arguments.only:
            found = [(one["setting"], one["seed"]) for one in read(results)]
            if (name, seed) not in found and time.monotonic() - begun < 60 * arguments.minutes:
                row = trained(name, seed, policy, out)
                with results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print({**row, "curve": row["curve"][:: len(row["curve"]) // 6]}, flush=True)
    write_page(read(results), arguments.page)


# -- the page ---------------------------------------------------------------------------------------------------------


def write_page(rows: list[dict[str, Any]], page: Path) -> None:
    """Write the table and the curves; a setting enters with the seeds that lag 0 has too."""
    found = {title: {row["seed"]: row for row in rows if row["setting"] == title} for title in SETTINGS}
    lines = [[name, *(cell(found, name, task) for task in TASKS)] for name in CURVES]
    draw_curves(found, page.with_suffix(".png"))
    seconds = sum(row["seconds"] for row in rows)
    samples = ", ".join(str(task.samples) for task in TASKS)
    write_markdown(page, (
        "# Learning curves with lag\n\n"
        "`python experiments/engines/lag.py` writes this page. A policy with 0.3 M parameters of the assistant world, "
        "which has imitated demonstrations, is trained by GRPO on the known gold reward: rollouts of "
        f"{PROMPTS} prompts with {SAMPLES} completions, two updates for each rollout, no KL penalty. The first row "
        "shows the mean gold reward at lag 0 after training, over seeds, on 400 held-out prompts (completions of each "
        "prompt, by "
        f"column: {samples}). The other rows show the difference to lag 0 on the same seeds with its 95 % interval "
        f"(Student's t over seeds), and *equal* if the whole interval lies within {BOUND:g}. {len(rows)} runs, "
        f"{seconds / 60:.0f} minutes of CPU time.\n\n"
        f"{markdown_table(['', *(task.title for task in TASKS)], lines)}\n\n"
        f"![Learning curves]({page.with_suffix('.png').name})\n\n"
        f"The curves are means over seeds; each point is the mean of {LAST} rollouts.\n\n"
        "See also: [exact bias and variance of each correction](corrections.md), and [engines](../../docs/engines.md)."
        "\n"
    ))  # fmt: skip


def cell(found: dict[str, dict[int, dict[str, Any]]], name: str, task: Task) -> str:
    """Return the result of a setting: its gold reward at lag 0, otherwise its difference to lag 0."""
    base, own = ({seed: row["gold"] for seed, row in found[f"{one}, {task.title}"].items()} for one in ("lag 0", name))
    paired = {seed: gold for seed, gold in own.items() if seed in base}
    if len(paired) < 2:
        return ""
    if name == "lag 0":
        return f"{mean_interval(list(paired.values()))[0]:.3f}, {len(paired)} seeds"
    gap = seed_difference(base, paired)
    equal = ", equal" if gap.low >= -BOUND and gap.high <= BOUND else ""
    return f"{gap.mean:+.3f} ({gap.low:+.3f} to {gap.high:+.3f}), {len(paired)} seeds{equal}"


def draw_curves(found: dict[str, dict[int, dict[str, Any]]], file: Path) -> None:
    """Plot the mean gold reward of training rollouts: a row for each column of the table."""
    size = (9.0, 2.6 * len(TASKS))
    figure, grid = pyplot().subplots(len(TASKS), len(CORRECTIONS), figsize=size, sharey=True, squeeze=False)
    for task, panels in zip(TASKS, grid, strict=True):
        for panel, shown in zip(panels, CORRECTIONS, strict=True):
            for name, (lag, correction) in CURVES.items():
                runs = found[f"{name}, {task.title}"].values()
                if len(runs) > 1 and (lag == 0 or correction == shown):
                    curve = torch.tensor([row["curve"] for row in runs]).mean(0).unflatten(0, (-1, LAST)).mean(1)
                    panel.plot(range(LAST, task.rollouts + 1, LAST), curve, label=f"lag {lag}", color=f"C{lag}")
            panel.set_title(f"{task.title}, {shown or 'no correction'}", fontsize=8)
            panel.legend(fontsize=7)
        panels[0].set_ylabel("gold reward")
    for panel in grid[-1]:
        panel.set_xlabel("rollout")
    figure.tight_layout()
    save_figure(figure, file)


if __name__ == "__main__":
    main()
