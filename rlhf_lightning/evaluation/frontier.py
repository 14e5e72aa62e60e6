"""The reward-KL frontier: what each step away from the reference bought, with best-of-n as the curve to beat."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


class FrontierPoint(NamedTuple):
    """One policy on the frontier.

    Attributes:
        method: name of the curve it lies on.
        kl: KL to the reference, nats per completion.
        gold_reward: mean gold reward.
        score: mean proxy score.
        label: text beside the point; empty for none.
    """

    method: str
    kl: float
    gold_reward: float
    score: float
    label: str = ""


COLOURS = {"ppo": "#c44e52", "dpo": "#4c72b0", "best of n": "#555555", "sft": "#55a868"}


def draw_frontier(points: Sequence[FrontierPoint], path: str | Path, title: str = "") -> Path:
    """Draw gold reward and proxy score against KL, one line per method in the order of KL. Returns the path."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), constrained_layout=True)
    for axis, (field, label) in zip(axes, (("gold_reward", "gold reward"), ("score", "proxy score")), strict=True):
        for method in dict.fromkeys(point.method for point in points):
            line = sorted((point for point in points if point.method == method), key=lambda point: point.kl)
            heights = [getattr(point, field) for point in line]
            dashed = method == "best of n"
            axis.plot(
                [point.kl for point in line],
                heights,
                marker="s" if dashed else "o",
                linestyle="--" if dashed else "-",
                color=COLOURS.get(method),
                label=method,
                markersize=5,
            )
            for point, height in zip(line, heights, strict=True):
                if point.label:
                    axis.annotate(
                        point.label, (point.kl, height), textcoords="offset points", xytext=(6, -10), fontsize=8
                    )
        axis.set_xlabel("KL(policy || reference), nats per completion")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    axes[0].set_ylim(0, 1)
    if title:
        figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return Path(path)
