"""Test the quickstart's report and plot on made-up figures."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lightning.commands.quickstart import FREE, POLICIES, WEAK, Run, headline, markdown_report, summary_table
from rlhf_lightning.evaluation.policies import ScoredSamples
from rlhf_lightning.evaluation.report import FrontierPoint, draw_frontier

GOLD = {"sft": 0.5, "dpo": 0.8, "ppo": 0.9, FREE: 0.3}


def policy(gold: float) -> dict[str, Any]:
    figures = {"gold_reward": gold, "gold_reward_ci": [gold - 0.02, gold + 0.02], "score": 1.0, "score_ci": [0.9, 1.1]}
    return {**figures, "kl": 4.0, "completion_length": 20.0, "eos_rate": 1.0}


def made_up(*path: tuple[int, float, float]) -> dict[str, Any]:
    """Return a report; ``path`` has update, score and gold reward of the run without KL penalty."""
    world = {"bayes_accuracy": 0.87, "demonstrations_gold": 0.5, "demonstrations_gold_ci": [0.49, 0.51]}
    for n in (4, 16):
        world |= {f"best_of_{n}_gold": 0.7, f"best_of_{n}_gold_ci": [0.69, 0.71], f"best_of_{n}_score": 0.1}
    return {
        "seed": 0,
        "seconds": 100.0,
        "world": world,
        **{name: policy(GOLD[name]) for name in POLICIES},
        "reward_model": {"accuracy": 0.84, "accuracy_ci": [0.81, 0.86], "ece": 0.05},
        "weak_reward_model": {"pairs": 1000, "accuracy": 0.62},
        "over_optimisation": [
            {"update": update, "kl": 1.0, "score": score, **named(gold)} for update, score, gold in path
        ],
    }


def named(gold: float) -> dict[str, Any]:
    return {"gold_reward": gold, "gold_reward_ci": [gold - 0.02, gold + 0.02]}


def samples() -> ScoredSamples:
    values = torch.zeros(2)
    return ScoredSamples(["q1", "q2"], ["a1", "a2"], values, values, values, values, values.bool())


@pytest.mark.parametrize(
    ("path", "seen"),
    [
        (((0, -1.0, 0.5), (40, 0.1, 0.52), (80, 0.9, 0.3)), True),
        (((0, -1.0, 0.5), (40, 0.1, 0.7), (80, 0.9, 0.69)), False),
        (((0, -1.0, 0.5), (40, 0.1, 0.2), (80, -2.0, 0.1)), False),
    ],
    ids=["score up, gold down", "no difference", "score down"],
)
def test_over_optimisation_is_reported_only_if_measured(path: Any, seen: bool) -> None:
    told = headline(made_up(*path))
    assert "from 0.50 (SFT) to 0.90" in told and ("over-optimises" in told) is seen
    assert not seen or "from update 40 to 80 the score rises from 0.1 to 0.9" in told


def test_every_row_has_an_interval_that_the_report_explains(tmp_path: Path) -> None:
    report = made_up((0, -1.0, 0.5), (80, 0.9, 0.3))
    rows = [line for line in summary_table(report).splitlines() if line.startswith("| ") and "gold reward" not in line]
    assert len(rows) == 7 and all("[0." in row for row in rows)
    folders = {
        name: tmp_path / "quickstart" / name / "version_0" for name in ("sft", "reward", "ppo", "dpo", WEAK, FREE)
    }
    runs = {name: Run(folder, {}, 240, 3840, 70_000, 12.3) for name, folder in folders.items()}
    page = markdown_report(report, "TABLE", {name: samples() for name in POLICIES}, runs)
    for words in (
        "How to read this",
        "0.870 is the best possible accuracy",
        "| 80     |",
        "(ppo/version_0)",
        "rlhf chat",
    ):
        assert words in page, words
    assert "12.3" not in page, "the same seed gives the same report"


def test_the_figure_connects_points_in_training_order(tmp_path: Path) -> None:
    points = [
        FrontierPoint("ppo", kl, 0.5, 1.0, [0.4, 0.6], [0.9, 1.1], update=n) for n, kl in enumerate((0.0, 6.0, 4.0))
    ]
    points[-1] = points[-1]._replace(final=True)
    path = draw_frontier(points, tmp_path / "frontier.png", "title", {"best possible": 1.0})
    assert path.stat().st_size > 10_000
