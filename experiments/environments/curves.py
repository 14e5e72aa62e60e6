"""Train in multi-turn environments: the shop with GRPO and PPO, and a quiz with per-turn or final rewards.

    python experiments/environments/curves.py [--out runs/environments] [--seeds 5] [--minutes 60]

In the shop, a policy with 111 thousand parameters first imitates demonstrations. Few demonstrations use both tools. The
policy is then trained by RL. In the quiz it first imitates random prices; the same rewards are given in each turn, or
in the last turn. Every finished run is one line of ``runs.jsonl``, and a second call continues after the last line. The
page and the plot in this folder are written from the finished runs.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from rlhf_lightning.data import PromptDataModule, SFTDataModule
from rlhf_lightning.functional.statistics import wilson_interval
from rlhf_lightning.modules import CriticFreeModule, GRPOModule, PPOModule, SFTModule
from rlhf_lightning.sampling.engines import SamplingSettings
from rlhf_lightning.types import MultiTurn
from rlhf_lightning.worlds import tools as world

HERE = Path(__file__).resolve().parent
SHOP: dict[str, Any] = {
    "scorer": "rlhf_lightning.worlds.tools.gold", "max_new_tokens": 16, "kl_coef": 0.0, "learning_rate": 1e-3,
    "lr_schedule": "constant", "mini_batch_size": 64,
}  # fmt: skip
QUIZ: dict[str, Any] = {
    "scorer": "ZeroScorer", "max_new_tokens": 2, "kl_coef": 0.0, "learning_rate": 1e-3, "lr_schedule": "constant",
    "mini_batch_size": 64,
}  # fmt: skip
SETTINGS: dict[str, tuple[str, Any, dict[str, Any], int]] = {
    "shop, GRPO": ("shop", GRPOModule, SHOP, 8),
    "shop, PPO": ("shop", PPOModule, {**SHOP, "ppo_epochs": 2, "value_coef": 0.5, "missing_eos_score": None}, 1),
    "quiz, rewards of turns": ("turn", CriticFreeModule, {**QUIZ, "credit": "turn", "gamma": 0.0}, 8),
    "quiz, one final reward": ("final", CriticFreeModule, QUIZ, 8),
}
"""World or timing of the reward, class, settings, and samples per prompt."""

ROLLOUTS = {"shop": 40, "turn": 40, "final": 40}


def main() -> None:
    """Run the missing measurements, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/environments"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=60.0, help="start no run after this")
    parser.add_argument("--page-only", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    out, begun = arguments.out, time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    results = out / "runs.jsonl"
    for seed in range(0 if arguments.page_only else arguments.seeds):
        for name in SETTINGS:
            found = [(one["setting"], one["seed"]) for one in read(results)]
            if (name, seed) not in found and time.monotonic() - begun < 60 * arguments.minutes:
                row = trained(name, seed, out)
                with results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print({**row, "curve": len(row["curve"])}, flush=True)
    write_page(read(results))


def read(path: Path) -> list[dict[str, Any]]:
    """Return the finished rows."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def imitated(out: Path, name: str, file: str, epochs: int) -> str:
    """Train a policy on demonstrations and return its folder."""
    folder = out / name
    if not (out / "world" / "model").exists():
        world.write_world(out / "world")
    if not (folder / "config.json").exists():
        module = SFTModule(
            init_from=str(out / "world" / "model"), from_scratch=True, learning_rate=4e-3, warmup=0.05, seed=0
        )
        data = SFTDataModule(str(out / "world" / file), batch_size=64, cache_dir=str(out / "cache"))
        quiet(max_epochs=epochs).fit(module, data)
        module.export(folder)
    return str(folder)


def quiet(**settings: Any) -> pl.Trainer:
    """Return a trainer without logs and files."""
    return pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0, limit_val_batches=0,
        **settings,
    )  # fmt: skip


class Curve(pl.Callback):
    """Records the mean score of each rollout."""

    def __init__(self) -> None:
        self.scores: list[float] = []

    def on_rollout_end(self, trainer: Any, module: Any, rollout: Any, means: Any) -> None:
        """Record the score."""
        self.scores.append(round(means["score"], 4))


def trained(name: str, seed: int, out: Path) -> dict[str, Any]:
    """Train one setting and return its measurements."""
    where, kind, settings, samples = SETTINGS[name]
    shop = where == "shop"
    taught = ("writer", "demonstrations.jsonl", 10) if shop else ("guesser", "quiz_sft.jsonl", 2)
    start = imitated(out, *taught)
    environment: Any = world.ShopEnvironment() if shop else world.PriceQuiz(where)  # type: ignore[arg-type]
    turns = 4 if shop else world.QUIZ_TURNS
    started, curve = time.process_time(), Curve()
    data = PromptDataModule(
        str(out / "world" / ("prompts_train.jsonl" if shop else "quiz_train.jsonl")), batch_size=128,
        samples_per_prompt=samples, rollouts=ROLLOUTS[where], seed=seed, environment=environment, max_turns=turns,
        cache_dir=str(out / "cache"),
    )  # fmt: skip
    module = kind(init_from=start, seed=seed, self_check=False, **settings)
    trainer = quiet(max_epochs=1, callbacks=[curve])
    trainer.fit(module, data)
    seconds = round(time.process_time() - started, 1)
    right, count = answered(module, environment, turns, out, shop)
    return {"setting": name, "seed": seed, "right": right, "of": count, "seconds": seconds, "curve": curve.scores}


def answered(module: Any, environment: Any, turns: int, out: Path, shop: bool) -> tuple[int, int]:
    """Answer the held-out episodes at temperature 1; return the number of right answers, and the number of answers."""
    rows = read(out / "world" / ("prompts_test.jsonl" if shop else "quiz_test.jsonl"))
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    prompts = [environment.reset(row) for row in rows]
    module.eval()
    with torch.no_grad():
        found = module.answer(
            prompts, SamplingSettings(16, batch_size=128), seed=1234, multi_turn=MultiTurn(environment, turns),
            columns=columns,
        )  # fmt: skip
    if shop:
        return int(sum(world.gold(prompts, found.texts, **columns))), len(rows)
    right = [world.right_prices(row["items"], one.messages) for row, one in zip(rows, found.transcripts, strict=True)]
    return sum(map(sum, right)), sum(map(len, right))


# -- the page ---------------------------------------------------------------------------------------------------------

STUDENT_T = {1: 0.0, 2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""97.5 % quantile of Student's t, by number of values (degrees of freedom + 1)."""

MARK = "<!-- measured -->\n"


def over_seeds(values: list[float]) -> str:
    """Return the mean and the half-width of its 95 % interval over seeds."""
    count, mean = len(values), sum(values) / len(values)
    deviation = (sum((value - mean) ** 2 for value in values) / max(count - 1, 1)) ** 0.5
    half = STUDENT_T.get(count, 2.0) * deviation / count**0.5
    return f"{mean:.3f} ± {half:.3f}" if count > 1 else f"{mean:.3f}"


def write_page(rows: list[dict[str, Any]]) -> None:
    """Write the table and the plot in this folder."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.0, 3.6))
    lines = []
    for name in SETTINGS:
        own = [row for row in rows if row["setting"] == name]
        if not own:
            continue
        axes = left if name.startswith("shop") else right
        curves = torch.tensor([row["curve"] for row in own])
        (line,) = axes.plot(curves.mean(0), label=name)
        for curve in curves:
            axes.plot(curve, color=line.get_color(), alpha=0.25, linewidth=0.8)
        shares = [row["right"] / row["of"] for row in own]
        whole = wilson_interval(sum(row["right"] for row in own) / sum(row["of"] for row in own), own[0]["of"])
        cells = [
            str(len(own)), over_seeds([row["curve"][0] for row in own]),
            over_seeds([sum(row["curve"][10:15]) / 5 for row in own]),
            over_seeds([sum(row["curve"][-5:]) / 5 for row in own]), over_seeds(shares),
            f"{float(whole[0]):.2f} to {float(whole[1]):.2f}", f"{sum(row['seconds'] for row in own) / len(own):.0f}",
        ]  # fmt: skip
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for axes, title in ((left, "the shop"), (right, "the quiz")):
        axes.set_xlabel("rollout")
        axes.set_ylabel("mean score of a rollout")
        axes.set_title(title)
        axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(HERE / "curves.png", dpi=110)
    head = (
        "| setting | seeds | score, rollout 1 | score, rollouts 11 to 15 | score, last 5 | held-out answers right | "
        "interval of one run | CPU seconds |\n|---|---|---|---|---|---|---|---|\n"
    )
    text = (HERE / "results.md").read_text() if (HERE / "results.md").exists() else MARK + MARK
    before, _, after = text.partition(MARK)
    table = head + "\n".join(lines)
    (HERE / "results.md").write_text(f"{before}{MARK}\n{table}\n\n{MARK}{after.partition(MARK)[2]}")


if __name__ == "__main__":
    main()
