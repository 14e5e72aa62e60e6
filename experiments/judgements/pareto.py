"""Compare trade-offs of satisfaction and harm in the hazard world: fixed weights, a Lagrangian at three limits, and
GDPO.

    python experiments/judgements/pareto.py [--out runs/judgements] [--seeds 5] [--minutes 90]

A small policy first imitates mostly reckless answers. RLOO then trains it against the world's two known rewards, once
for each setting and seed. Every finished run is one line of ``runs.jsonl``, and a second call continues after the last
line. The page and the plot in this folder are written from the finished runs.
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
from rlhf_lightning.modules import RLOOModule, SFTModule
from rlhf_lightning.sampling.engines import SamplingSettings
from rlhf_lightning.worlds.hazards import URGE, is_risky, satisfaction_and_harm, write_hazards

HERE = Path(__file__).resolve().parent
ROLLOUTS, PROMPTS, SAMPLES = 40, 16, 8
SETTINGS: dict[str, dict[str, Any]] = {
    **{f"weights 1 : {w}": {"parts": {"weights": {"satisfied": 1.0, "harmless": w}}} for w in (0.3, 0.5, 0.7)},
    **{
        f"harm <= {limit}": {"constraints": {"harm": {"limit": limit, "multiplier": 0.5, "learning_rate": 0.3}}}
        for limit in (0.05, 0.15, 0.25)
    },
    "GDPO 1 : 1": {
        "parts": {"weights": {"satisfied": 1.0, "harmless": 1.0}, "normalize": "group_then_sum"},
    },
}


def main() -> None:
    """Run the missing measurements, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/judgements"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=90.0, help="start no run after this")
    parser.add_argument("--page-only", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    out, begun = arguments.out, time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    results = out / "runs.jsonl"
    if not arguments.page_only:
        policy = imitated(out)
        if not results.exists():
            keep(results, {"setting": "start", "seed": 0, "seconds": 0.0, **measured(start_module(policy), out)})
        for seed in range(arguments.seeds):
            for name in SETTINGS:
                found = [(one["setting"], one["seed"]) for one in read(results)]
                if (name, seed) not in found and time.monotonic() - begun < 60 * arguments.minutes:
                    keep(results, trained(name, seed, policy, out))
    write_page(read(results))


def imitated(out: Path) -> str:
    """Train the policy on demonstrations and return its folder."""
    if not (out / "world" / "world.json").exists():
        write_hazards(out / "world", demonstrations=3000, risky=2000, dialogues=0, pairs_train=1, pairs_test=1)
    if not (out / "policy" / "config.json").exists():
        data = SFTDataModule(
            [str(out / "world" / f"{name}.jsonl") for name in ("demonstrations", "risky_demonstrations")],
            batch_size=32, cache_dir=str(out / "cache"),
        )  # fmt: skip
        module = SFTModule(
            init_from=str(out / "world" / "model"), from_scratch=True, learning_rate=5e-3, warmup=0.05, seed=0
        )
        quiet(max_epochs=3).fit(module, data)
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
    """Train one setting and return its measurements."""
    started = time.process_time()
    world = out / "world"
    data = PromptDataModule(
        [str(world / "prompts_train.jsonl"), {"path": str(world / "risky_train.jsonl"), "weight": 2.5}],
        batch_size=PROMPTS * SAMPLES, samples_per_prompt=SAMPLES, rollouts=ROLLOUTS, seed=seed,
        cache_dir=str(out / "cache"),
    )  # fmt: skip
    module = RLOOModule(
        init_from=policy, scorer=satisfaction_and_harm, max_new_tokens=24, learning_rate=2e-3, lr_schedule="linear",
        kl_coef=0.1, mini_batch_size=64, seed=seed, self_check=False, **SETTINGS[name],
    )  # fmt: skip
    quiet(max_epochs=1).fit(module, data)
    multipliers = module.score_rule.metrics()
    row = {"setting": name, "seed": seed, **measured(module, out), **multipliers}
    return row | {"seconds": round(time.process_time() - started, 1)}


def start_module(policy: str) -> Any:
    """Return a module that holds the policy before RL."""
    module = RLOOModule(init_from=policy, scorer=satisfaction_and_harm, self_check=False)
    module.configure_model()
    return module


def measured(module: Any, out: Path) -> dict[str, float]:
    """Return means over two samples of each held-out prompt: 96 risky prompts and as many ordinary ones."""
    prompts = []
    for name in ("risky_test", "prompts_test"):
        lines = (out / "world" / f"{name}.jsonl").read_text().splitlines()[:96]
        prompts += [json.loads(line)["prompt"] for line in lines for _ in range(2)]
    module.eval()
    with torch.no_grad():
        texts = module.answer(prompts, SamplingSettings(24, batch_size=128), seed=1234).texts
    judged = satisfaction_and_harm(prompts, texts)
    risky = [is_risky(prompt) for prompt in prompts]

    def mean(part: str, kind: bool | None = None) -> float:
        values = [one.parts[part] for one, other in zip(judged, risky, strict=True) if kind in (None, other)]
        return sum(values) / len(values)

    return {
        "satisfied": mean("satisfied"), "harm": mean("harm"), "satisfied_ordinary": mean("satisfied", False),
        "satisfied_risky": mean("satisfied", True), "harm_risky": mean("harm", True),
    }  # fmt: skip


def keep(path: Path, row: dict[str, Any]) -> None:
    """Append a row to the file."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(row, flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """Return the finished rows."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# -- the page ---------------------------------------------------------------------------------------------------------


def front() -> list[tuple[float, float]]:
    """Return the Pareto front on risky requests as (harm, satisfaction) points, fulfilling the largest urges first."""
    points, satisfied = [(0.0, 0.0)], 0.0
    for place, urge in enumerate(sorted(URGE.values(), reverse=True)):
        satisfied += urge / len(URGE)
        points.append(((place + 1) / len(URGE), satisfied))
    return points


def interval(values: list[float]) -> tuple[float, float]:
    """Return the mean over seeds and the half-width of its 95 % interval; the half-width is 0 for one seed."""
    count, mean = len(values), sum(values) / len(values)
    deviation = (sum((value - mean) ** 2 for value in values) / max(count - 1, 1)) ** 0.5
    return mean, STUDENT_T.get(count, 2.0) * deviation / count**0.5


def write_page(rows: list[dict[str, Any]]) -> None:
    """Write the table and the plot in this folder."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.4))
    axes.plot(*zip(*front(), strict=True), color="grey", linestyle="--", label="Pareto front")
    lines = []
    for name in ["start", *SETTINGS]:
        own = [row for row in rows if row["setting"] == name]
        if not own:
            continue
        cells = [interval([row[part] for row in own]) for part in COLUMNS]
        multipliers = [row["multiplier_harm"] for row in own if "multiplier_harm" in row]
        last = "{:.2f} ± {:.2f}".format(*interval(multipliers)) if multipliers else ""
        last = last.removesuffix(" ± 0.00")
        shown = [f"{mean:.3f} ± {half:.3f}" if len(own) > 1 else f"{mean:.3f}" for mean, half in cells]
        lines.append(f"| {name} | {len(own)} | " + " | ".join(shown) + f" | {last} |")
        (y, dy), (x, dx) = cells[list(COLUMNS).index("satisfied_risky")], cells[list(COLUMNS).index("harm_risky")]
        marker = {"w": "o", "h": "s", "G": "^"}.get(name[0], "*")
        axes.errorbar(x, y, xerr=dx, yerr=dy, marker=marker, linestyle="none", capsize=2, label=name)
    axes.set_xlabel("harm on held-out risky requests")
    axes.set_ylabel("satisfaction on held-out risky requests")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(HERE / "pareto.png", dpi=110)
    head = f"| setting | seeds | {' | '.join(COLUMNS.values())} | last multiplier |\n|---|---|{'---|' * 6}\n"
    seconds = [row["seconds"] for row in rows if row["seconds"]]
    table = head + "\n".join(lines) + f"\n\n{len(seconds)} runs, {sum(seconds) / 60:.0f} minutes of CPU time.\n"
    text = (HERE / "results.md").read_text() if (HERE / "results.md").exists() else MARK + MARK
    before, _, after = text.partition(MARK)
    (HERE / "results.md").write_text(f"{before}{MARK}\n{table}{MARK}{after.partition(MARK)[2]}")


COLUMNS = {
    "satisfied": "satisfaction, all", "harm": "harm, all", "satisfied_ordinary": "satisfaction, ordinary",
    "satisfied_risky": "satisfaction, risky", "harm_risky": "harm, risky",
}  # fmt: skip
STUDENT_T = {1: 0.0, 2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""97.5 % quantile of Student's t, by number of values (degrees of freedom + 1)."""

MARK = "<!-- measured -->\n"


if __name__ == "__main__":
    main()
