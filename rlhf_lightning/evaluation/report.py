"""Reports: tables and JSON files, and the plot of reward against KL."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


def write_json(path: str | Path, report: Mapping[str, Any]) -> Path:
    """Write a report atomically and return its path."""
    return write_markdown(path, json.dumps(report, indent=2) + "\n")


def write_markdown(path: str | Path, text: str) -> Path:
    """Write a report atomically and return its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
    return path


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table with padded columns, readable in a terminal."""
    cells = [[cell(value) for value in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    padded = [[text.ljust(width) for text, width in zip(row, widths, strict=True)] for row in cells]
    lines = [f"| {' | '.join(row)} |" for row in padded]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


class Section(NamedTuple):
    """A table of a report with its heading and a note."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""

    def markdown(self) -> str:
        """Return the section as Markdown."""
        note = f"\n\n{self.note}" if self.note else ""
        return f"## {self.title}\n\n{markdown_table(self.header, self.rows)}{note}"


def cell(value: Any) -> str:
    """Return a value as a table cell: three decimals, without line breaks and bars."""
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value)
    if isinstance(value, float):
        return f"{value:.3f}"
    return str(value).replace("\n", " ").replace("|", "\\|")


def p_value(p: float) -> str:
    """Return a p-value as text."""
    return "<0.001" if p < 0.001 else cell(float(p))


def interval(ci: Sequence[float], digits: int = 3) -> str:
    """Return an interval as text."""
    return f"[{ci[0]:.{digits}f}, {ci[1]:.{digits}f}]"


class FrontierPoint(NamedTuple):
    """A policy in the plot of reward against KL."""

    method: str  # name of the curve it lies on
    kl: float  # KL to the reference, nats per completion
    gold_reward: float  # mean gold reward
    score: float  # mean proxy score
    label: str = ""  # text next to the point; empty for none


COLOURS = {"ppo": "#c44e52", "dpo": "#4c72b0", "best of n": "#555555", "sft": "#55a868"}


def draw_frontier(points: Sequence[FrontierPoint], path: str | Path, title: str = "") -> Path:
    """Draw gold reward and proxy score against KL, one line per method in the order of KL. Returns the path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

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
