"""What a loop has brought: a table, learning curves and TensorBoard's scalars against the labels spent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from torch.utils.tensorboard import SummaryWriter

from rlhf_lightning.evaluation.report import interval, markdown_table, write_markdown
from rlhf_lightning.runs.run_records import EVENTS

matplotlib.use("Agg")
import matplotlib.pyplot as plt


class LabelPoint(NamedTuple):
    """One measurement.

    Attributes:
        labels: labels spent.
        value: figure of merit.
        low: lower end of its interval.
        high: upper end.
    """

    labels: int
    value: float
    low: float
    high: float


def draw_label_curves(
    panels: Mapping[str, Mapping[str, Sequence[LabelPoint]]], path: str | Path, title: str = ""
) -> Path:
    """Draw a panel for each figure of merit, by its name, with a line for each method; returns the path."""
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5.5 * len(panels), 4.2), constrained_layout=True, squeeze=False
    )
    for axis, (merit, methods) in zip(axes[0], panels.items(), strict=True):
        for method, points in methods.items():
            line = sorted(points)
            labels, values = [point.labels for point in line], [point.value for point in line]
            axis.plot(labels, values, marker="o", markersize=4, label=method)
            axis.fill_between(labels, [point.low for point in line], [point.high for point in line], alpha=0.15)
        axis.set_xlabel("labels")
        axis.set_ylabel(merit)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, loc="lower right")
    if title:
        figure.suptitle(title)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)
    return Path(path)


REPORT, PICTURE = "loop.md", "loop.png"
FIGURES = ("gold_reward", "win_rate", "score", "kl", "length", "finished")


def write_report(folder: Path, name: str, points: Sequence[Mapping[str, Any]]) -> str:
    """Write loop.md, loop.png and the event file anew; return the table.

    Args:
        folder: of the loop.
        name: its name.
        points: figures of the first policy and of each round's, with the labels spent.
    """
    shown = [figure for figure in FIGURES if any(figure in point for point in points)]
    merit = "gold_reward" if "gold_reward" in shown else "win_rate"
    curve = [LabelPoint(point["labels"], point[merit], *point[f"{merit}_ci"]) for point in points if merit in point]
    draw_label_curves({merit.replace("_", " "): {name: curve}}, folder / PICTURE)
    table = _table(points, shown)
    write_markdown(folder / REPORT, _page(name, table))
    _write_scalars(folder, points, shown)
    return table


def _table(points: Sequence[Mapping[str, Any]], shown: Sequence[str]) -> str:
    header, rows = ["labels"], [[point["labels"]] for point in points]
    for figure in shown:
        has_interval = any(f"{figure}_ci" in point for point in points)
        header += [figure.replace("_", " "), "95 % interval"] if has_interval else [figure]
        for row, point in zip(rows, points, strict=True):
            row.append(point.get(figure))
            if has_interval:
                row.append(interval(point[f"{figure}_ci"]) if f"{figure}_ci" in point else "")
    return markdown_table(header, rows)


def _page(name: str, table: str) -> str:
    return (
        f"# The loop {name}\n\n"
        "Each row is a policy that was trained on so many labels, on held-out prompts; 0 labels is the policy that "
        "everything started from. Gold reward is the world's own and was never trained on; win rate is against the "
        "first policy, prompt by prompt, a tie counted half; score is the reward model's of that round, so that scores "
        "of different rounds do not compare; KL is from the first policy, in nats per completion.\n\n"
        f"{table}\n\n![curve]({PICTURE})\n"
    )


def _write_scalars(folder: Path, points: Sequence[Mapping[str, Any]], shown: Sequence[str]) -> None:
    """Write an event file in place of the one before: the state has everything that was in it."""
    earlier = list(folder.glob(EVENTS))
    with SummaryWriter(str(folder)) as writer:
        for point in points:
            for figure in shown:
                if figure in point:
                    writer.add_scalar(f"loop/{figure}", point[figure], point["labels"])
    for file in earlier:
        file.unlink()
