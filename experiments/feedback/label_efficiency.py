"""Compare four ways of selecting pairs to label, in the assistant world, where the gold reward is known.

    rlhf quickstart --out runs/quickstart
    python experiments/feedback/label_efficiency.py [--seeds 0 1 2 3 4] [--budgets 25 50 100 200 400]

For each seed a pool of pairs is sampled from the quickstart's SFT policy. Simulated annotators label the selected pairs
through the HTTP routes of the annotation page. At each budget an ensemble of reward models is trained on the labels so
far, and selects the next pairs. Finished cells are skipped, and several processes may run different seeds in parallel.
The page shows the finished cells.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from rlhf_lightning.commands.generate import SamplingArguments
from rlhf_lightning.data.feedback.database import items_of
from rlhf_lightning.evaluation.policies import ScoredSamples, sample_and_score
from rlhf_lightning.evaluation.report import interval, markdown_table, write_json, write_markdown
from rlhf_lightning.people.handing_out import Policy
from rlhf_lightning.people.labeller import SimulatedAnnotators
from rlhf_lightning.people.loop import seed_of
from rlhf_lightning.people.loop_steps import (
    LabelPoint,
    draw_label_curves,
    ensemble_of,
    evaluate,
    sample_pairs,
    train_stage,
)
from rlhf_lightning.people.selectors import load_selector, selector_class
from rlhf_lightning.people.store import FeedbackStore
from rlhf_lightning.quiet import silence_libraries
from rlhf_lightning.scoring import load_scorer
from rlhf_lightning.worlds.assistant import gold_of_conversation

HERE = Path(__file__).resolve().parent
SELECTORS = ("random", "uncertainty", "disagreement", "diversity")
GOLD = "rlhf_lightning.worlds.assistant.gold_of_conversation"
SAMPLING = SamplingArguments(max_new_tokens=48, batch_size=64)
MERITS = {"accuracy": "reward models' accuracy", "gold_reward": "gold reward of the DPO policy"}
HELD_OUT_SEED = 77


def main() -> None:
    """Run the missing cells, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--budgets", type=int, nargs="+", default=[25, 50, 100, 200, 400])
    parser.add_argument("--selectors", nargs="+", default=list(SELECTORS))
    parser.add_argument("--pool", type=int, default=1000, help="pairs to choose from")
    parser.add_argument("--members", type=int, default=3, help="reward models of an ensemble")
    parser.add_argument("--start", type=Path, default=Path("runs/quickstart"), help="folder of a finished quickstart")
    parser.add_argument("--out", type=Path, default=Path("runs/label_efficiency"))
    parser.add_argument("--page", type=Path, default=HERE / "label_efficiency.md")
    arguments = parser.parse_args()
    silence_libraries()
    for seed in arguments.seeds:
        for selector in arguments.selectors:
            chain(selector, seed, arguments)
    cells = [json.loads(file.read_text()) for file in sorted(arguments.out.glob("*/seed_*/labels_*/cell.json"))]
    write_page(cells, arguments.page)
    print(f"wrote {arguments.page}")


def sft_model(start: Path) -> str:
    """Return the quickstart's SFT policy.

    Raises:
        FileNotFoundError: the quickstart has not finished.
    """
    folder = start / "sft" / "version_0" / "model"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing: run `rlhf quickstart --out {start}` first")
    return str(folder)


def fill(store: FeedbackStore, seed: int, arguments: argparse.Namespace) -> None:
    """Fill a store with a seed's pairs. They are sampled once and are the same for every selector."""
    path = arguments.out / "pools" / f"seed_{seed}.db"
    with FeedbackStore(path) as pool:
        if pool.waiting() < arguments.pool:
            prompts = str(arguments.start / "world" / "prompts_train.jsonl")
            model = sft_model(arguments.start)
            there = sample_pairs(pool, model, prompts, arguments.pool, SAMPLING, seed_of(seed, "pool"))
            if there < arguments.pool:
                raise ValueError(f"{model} gave {there} pairs of different answers, and --pool is {arguments.pool}")
        with pool.reading() as connection:
            store.add(list(items_of(connection))[: arguments.pool])


def chain(selector: str, seed: int, arguments: argparse.Namespace) -> None:
    """Spend the budgets one after the other; the reward models of one budget select the pairs of the next."""
    folder, models = arguments.out / selector / f"seed_{seed}", list[str]()
    for budget in sorted(arguments.budgets):
        cell = folder / f"labels_{budget}" / "cell.json"
        if not cell.is_file():
            print(f"\n{selector}, seed {seed}, {budget} labels", flush=True)
            snapshot = spend(folder / "feedback.db", selector, models, seed, budget, arguments)
            write_json(
                cell,
                {
                    "selector": selector,
                    "seed": seed,
                    "labels": budget,
                    **learned(cell.parent, snapshot, seed, arguments),
                },
            )
        models = json.loads(cell.read_text())["models"]


def spend(
    path: Path, selector: str, models: Sequence[str], seed: int, budget: int, arguments: argparse.Namespace
) -> str:
    """Label pairs until the budget is spent; return the snapshot's name."""
    chooses = selector if models or selector_class(selector).members == 0 else "random"
    people = SimulatedAnnotators(GOLD, annotators=4, seed=seed)
    with FeedbackStore(path, Policy(repeats=0.0, lease=people.lease, seed=seed, salt=people.salt)) as store:
        fill(store, seed, arguments)
        store.rank(load_selector(chooses, list(models) if selector_class(chooses).members else [], seed))
        people.label(store, budget, lambda: False)
        return f"{path}@{store.snapshot().upto}"


def learned(folder: Path, snapshot: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train reward models and DPO on a snapshot, and evaluate both on held-out prompts."""
    sft, prompts = sft_model(arguments.start), str(arguments.start / "world" / "prompts_test.jsonl")

    def trained(stage: str, config: str) -> str:
        number = seed_of(seed, stage)
        flags = {"seed_everything": number, "model.seed": number, "data.seed": number, "model.init_from": sft}
        return str(train_stage(folder, stage, f"recipe:labels/{config}", {**flags, "data.source": snapshot})["model"])

    models = [trained(f"reward_{member}", "reward") for member in range(arguments.members)]
    policy = trained("dpo", "dpo")
    figures = evaluate(policy, sft, prompts, SAMPLING, HELD_OUT_SEED, None, gold_of_conversation, folder)
    return {"models": models, "accuracy": accuracy(models, sft, prompts), **figures}


def accuracy(models: Sequence[str], sft: str, prompts: str) -> float:
    """Return the fraction of held-out pairs of the SFT policy that the mean score orders as the gold reward does."""
    drawn, scorer = held_out(sft, prompts), load_scorer(ensemble_of(models))
    scores = torch.as_tensor(scorer(drawn.prompts, drawn.completions), dtype=torch.float64)
    assert drawn.gold is not None
    gold, score = (values.view(-1, 2).diff(dim=1).flatten() for values in (drawn.gold, scores))
    differ = gold != 0
    return float((gold[differ].sign() == score[differ].sign()).double().mean())


@lru_cache
def held_out(sft: str, prompts: str) -> ScoredSamples:
    """Sample two answers of the SFT policy to each held-out prompt, with their gold rewards."""
    asked = [json.loads(line)["prompt"] for line in Path(prompts).read_text().splitlines()]
    policy, tokenizer = SAMPLING.load(sft)
    return sample_and_score(
        policy, tokenizer, asked, SAMPLING.settings(), HELD_OUT_SEED, 2, gold_reward=gold_of_conversation
    )


# ---- the page --------------------------------------------------------------------------------------------------------


def t_interval(values: Sequence[float]) -> LabelPoint:
    """Return the mean over seeds with its 95 % Student's t interval, as a point with 0 labels."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return LabelPoint(0, mean, float("nan"), float("nan"))
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return LabelPoint(0, mean, mean - half, mean + half)


def write_page(cells: Sequence[dict[str, Any]], page: Path) -> None:
    """Write the page and its plot."""
    selectors = [name for name in SELECTORS if any(cell["selector"] == name for cell in cells)]
    selectors += sorted({cell["selector"] for cell in cells} - set(selectors))
    panels: dict[str, dict[str, list[LabelPoint]]] = {}
    parts = []
    for merit, title in MERITS.items():
        panels[title] = {name: curve(cells, name, merit) for name in selectors}
        parts += [f"## {title[0].upper()}{title[1:]}", table(panels[title]), differences(cells, selectors, merit)]
    picture = draw_label_curves(panels, page.with_suffix(".png"), "assistant world")
    seeds = sorted({cell["seed"] for cell in cells})
    text = (
        "# What a label buys\n\n"
        "`python experiments/feedback/label_efficiency.py` after `rlhf quickstart`. Pairs of the quickstart's SFT "
        "policy are labelled by four simulated annotators (Bradley-Terry in the gold reward, as the world's own) over "
        "the page's HTTP routes; the selectors choose from the same pool. Reward models: an ensemble, trained at each "
        "budget; its mean score orders held-out pairs of the SFT policy. DPO is trained on the same labels. All start "
        "from the SFT policy; settings are in recipe:labels/reward and recipe:labels/dpo. The first budget is spent at "
        "random where reward models are asked: there are none before. Means over "
        f"the seeds {', '.join(map(str, seeds))} with 95 % intervals by Student's t.\n\n"
        + "\n\n".join(parts)
        + f"\n\n![curves]({picture.name})\n"
    )
    write_markdown(page, text)


def curve(cells: Sequence[dict[str, Any]], selector: str, merit: str) -> list[LabelPoint]:
    """Return a selector's means by budget."""
    mine = [cell for cell in cells if cell["selector"] == selector]
    budgets = sorted({cell["labels"] for cell in mine})
    return [
        t_interval([cell[merit] for cell in mine if cell["labels"] == budget])._replace(labels=budget)
        for budget in budgets
    ]


def shown(point: LabelPoint, digits: int, sign: str = "") -> str:
    """Format a mean with its interval; a single seed has no interval."""
    ends = "" if np.isnan(point.low) else f" {interval([point.low, point.high], digits)}"
    return f"{point.value:{sign}.{digits}f}{ends}"


def table(curves: dict[str, list[LabelPoint]]) -> str:
    """Return a table with a row per selector and a column per budget."""
    budgets = sorted({point.labels for points in curves.values() for point in points})
    rows = []
    for name, points in curves.items():
        known = {point.labels: shown(point, 3) for point in points}
        rows.append([name, *(known.get(budget, "") for budget in budgets)])
    return markdown_table(["selector", *(f"{budget} labels" for budget in budgets)], rows)


def differences(cells: Sequence[dict[str, Any]], selectors: Sequence[str], merit: str) -> str:
    """Return each selector's gain over random selection, paired by seed on the same pool: the mean over all budgets but
    the first.
    """
    first = min(cell["labels"] for cell in cells)
    values = {(c["selector"], c["seed"], c["labels"]): c[merit] for c in cells if c["labels"] > first}
    lines = []
    for name in selectors:
        gains: dict[int, list[float]] = {}
        for (selector, seed, labels), value in values.items():
            if selector == name and ("random", seed, labels) in values:
                gains.setdefault(seed, []).append(value - values["random", seed, labels])
        if name == "random" or not gains:
            continue
        found = t_interval([float(np.mean(one)) for one in gains.values()])
        better, worse = found.low > 0, found.high < 0
        verdict = "better than chance" if better else "worse than chance" if worse else "no difference shown"
        lines.append(f"- {name}: {shown(found, 4, '+')}, {verdict}")
    said = "Gain over random, mean of the budgets above the first, paired by seed:\n\n"
    return said + "\n".join(lines) if lines else ""


if __name__ == "__main__":
    main()
