"""Measure learning curves at lag 0, 1, 2 and 4, with and without a correction for the old policy, and at lag 0 and 1
with lower learning rates.

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
ROLLOUTS, PROMPTS, SAMPLES, LAST = 48, 8, 8, 8
CORRECTIONS = (None, "sequence_truncate")
BOUND = 0.03
"""Difference of gold rewards that counts as equal."""


class Setting(NamedTuple):
    """Settings of a run.

    Attributes:
        lag: ``model.lag``.
        correction: ``model.sampler_correction``.
        rate: learning rate.
        rollouts: number of rollouts; more at lower learning rates, so that lag 0 reaches a similar gold reward.
        kl_coef: KL penalty coefficient.
        samples: completions of each held-out prompt after training.
    """

    lag: int
    correction: str | None
    rate: float = 1e-3
    rollouts: int = ROLLOUTS
    kl_coef: float = 0.0
    samples: int = 1


CURVES = {"lag 0": Setting(0, None)} | {
    f"lag {lag}, {correction or 'no correction'}": Setting(lag, correction)
    for lag in (1, 2, 4)
    for correction in CORRECTIONS
}
"""Settings of the learning curves."""

SMALL = ("lag 0", "lag 1, no correction", "lag 1, sequence_truncate")
RATES = {"learning rate 1e-3": {}} | {
    "learning rate 3e-4": {"rate": 3e-4, "rollouts": 3 * ROLLOUTS // 2},
    "learning rate 3e-4, KL penalty 0.04": {"rate": 3e-4, "rollouts": 3 * ROLLOUTS // 2, "kl_coef": 0.04},
    "learning rate 1e-4": {"rate": 1e-4, "rollouts": 4 * ROLLOUTS},
}  # fmt: skip
"""What the settings at lag 0 and 1 are repeated with."""

SETTINGS = CURVES | {
    f"{name}, {title}": CURVES[name]._replace(samples=4, **changes)
    for title, changes in RATES.items()
    if changes
    for name in SMALL
}


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
    """Train one setting; return its curve, and the gold reward of one sample of each held-out prompt."""
    setting = SETTINGS[name]
    started, curve = time.process_time(), Curve()
    data = PromptDataModule(
        str(out / "world" / "prompts_train.jsonl"), batch_size=PROMPTS * SAMPLES, samples_per_prompt=SAMPLES,
        rollouts=setting.rollouts, seed=seed, cache_dir=str(out / "cache"),
    )  # fmt: skip
    module = GRPOModule(
        init_from=policy, scorer=gold, lag=setting.lag, sampler_correction=setting.correction, max_new_tokens=48,
        learning_rate=setting.rate, lr_schedule="constant", kl_coef=setting.kl_coef, mini_batch_size=32, seed=seed,
        self_check=False,
    )  # fmt: skip
    quiet(max_epochs=1, callbacks=[curve]).fit(module, data)
    lines = (out / "world" / "prompts_test.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines] * setting.samples
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
    own = {name: {row["seed"]: row for row in rows if row["setting"] == name} for name in CURVES}
    base, lines = {seed: row["gold"] for seed, row in own["lag 0"].items()}, []
    figure, panels = pyplot().subplots(1, len(CORRECTIONS), figsize=(9.0, 3.6), sharey=True)
    for name, runs in own.items():
        paired = {seed: row["gold"] for seed, row in runs.items() if seed in base}
        if len(paired) < 2:
            continue
        early, late = (
            mean_interval([sum(row["curve"][part]) / len(row["curve"][part]) for row in runs.values()])[0]
            for part in (slice(ROLLOUTS // 3 - LAST, ROLLOUTS // 3), slice(-LAST, None))
        )
        mean, *_ = mean_interval(list(paired.values()))
        gap = seed_difference(base, paired)
        shown = "" if name == "lag 0" else f"{gap.mean:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})"
        lines.append([name, len(paired), f"{early:.3f}", f"{late:.3f}", f"{mean:.3f}", shown])
        curve = torch.tensor([row["curve"] for row in runs.values()]).mean(0)
        lag, correction, *_ = CURVES[name]
        for panel, other in zip(panels, CORRECTIONS, strict=True):
            if name == "lag 0" or other == correction:
                panel.plot(curve, label=f"lag {lag}", color=f"C{lag}")
    for panel, correction in zip(panels, CORRECTIONS, strict=True):
        panel.set_title(correction or "no correction")
        panel.set_xlabel("rollout")
        panel.legend(fontsize=7)
    panels[0].set_ylabel("mean gold reward of a rollout")
    figure.tight_layout()
    save_figure(figure, page.with_suffix(".png"))
    header = [
        "setting", "seeds", f"rollouts {ROLLOUTS // 3 - LAST + 1} to {ROLLOUTS // 3}", f"last {LAST} rollouts",
        "held-out prompts", "difference to lag 0 (95 % interval)",
    ]  # fmt: skip
    seconds = sum(row["seconds"] for row in rows)
    write_markdown(page, (
        "# Learning curves with lag\n\n"
        "`python experiments/engines/lag.py` writes this page. A policy with 0.3 M parameters of the assistant world, "
        "which has imitated demonstrations, is trained by GRPO on the known gold reward: "
        f"{ROLLOUTS} rollouts of {PROMPTS} prompts with {SAMPLES} completions, two updates for each rollout, learning "
        "rate 1e-3, no KL penalty. The table shows mean gold rewards over seeds: of training rollouts, and after "
        "training of one completion for each of 400 held-out prompts. The last column compares the latter with lag 0 "
        f"on the same seeds (Student's t over seeds). {len(rows)} runs in all, {seconds / 60:.0f} minutes of CPU time."
        f"\n\n{markdown_table(header, lines)}\n\n![Learning curves]({page.with_suffix('.png').name})\n\n"
        "## Lower learning rates\n\n"
        "The same at lower learning rates, with more rollouts and four completions for each held-out prompt. *Moved*: "
        "mean change of the gold reward of training rollouts from the first 8 to the last 8 at lag 0. Two means count "
        f"as equal if the 95 % interval of their difference lies within {BOUND:g}.\n\n"
        f"{rates_table(rows)}\n\n"
        "See also: [exact bias and variance of each correction](corrections.md), and [engines](../../docs/engines.md)."
        "\n"
    ))  # fmt: skip


def rates_table(rows: list[dict[str, Any]]) -> str:
    """Return the table of lag 1 by learning rate; a setting enters with the seeds that lag 0 has too."""
    lines = []
    for title, changes in RATES.items():
        names = [f"{name}, {title}" if changes else name for name in SMALL]
        lag0, *others = ({row["seed"]: row for row in rows if row["setting"] == name} for name in names)
        if len(lag0) < 2:
            continue
        mean, *_ = mean_interval([row["gold"] for row in lag0.values()])
        moved = [sum(row["curve"][-LAST:]) / LAST - sum(row["curve"][:LAST]) / LAST for row in lag0.values()]
        line = [title, SETTINGS[names[0]].rollouts, len(lag0), f"{mean:.3f}", f"{sum(moved) / len(moved):+.3f}"]
        for runs in others:
            paired = {seed: row["gold"] for seed, row in runs.items() if seed in lag0}
            if len(paired) < 2:
                line += ["", ""]
                continue
            gap = seed_difference({seed: row["gold"] for seed, row in lag0.items()}, paired)
            equal = gap.low >= -BOUND and gap.high <= BOUND
            line += [f"{gap.mean:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})", "yes" if equal else "no"]
        lines.append(line)
    header = [
        "", "rollouts", "seeds", "lag 0", "moved", "lag 1, no correction, to lag 0", "equal",
        "lag 1, sequence_truncate, to lag 0", "equal",
    ]  # fmt: skip
    return markdown_table(header, lines)


if __name__ == "__main__":
    main()
