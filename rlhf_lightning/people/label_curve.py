"""What labels buy: a figure of merit against the number of labels spent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

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
