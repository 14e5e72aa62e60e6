"""Reports: tables, JSON files, HTML pages that work offline, and the plot of reward against KL."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_lightning.atomic_files import write_text


def write_json(path: str | Path, report: Mapping[str, Any]) -> Path:
    """Write a report atomically and return its path."""
    return write_markdown(path, json.dumps(report, indent=2) + "\n")


def write_markdown(path: str | Path, text: str) -> Path:
    """Write a report atomically and return its path."""
    return write_text(Path(path), text)


MARK = "<!-- measured -->\n"
"""What stands below this line of a generated page is written by hand."""


def rewrite_markdown(path: str | Path, text: str) -> Path:
    """Write a generated page atomically, keep what stands below `MARK` on the old one, and return its path."""
    path = Path(path)
    kept = path.read_text(encoding="utf-8").partition(MARK)[2] if path.is_file() else ""
    return write_markdown(path, f"{text}\n{MARK}{kept}")


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
    """Return a p-value as text; empty for NaN."""
    if math.isnan(p):
        return ""
    return "<0.001" if p < 0.001 else cell(float(p))


def interval(ci: Sequence[float], digits: int = 3) -> str:
    """Return an interval as text; empty for an undefined interval, such as that of a single seed."""
    return "" if math.isnan(ci[0]) else f"[{ci[0]:.{digits}f}, {ci[1]:.{digits}f}]"


# -- pages ------------------------------------------------------------------------------------------------------------

PAGES = Path(__file__).parent / "pages"
"""Templates of pages; a rendered page is one file without external resources."""


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Render a template of this room into one file; every text is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    pages = Environment(loader=FileSystemLoader(PAGES), autoescape=True, undefined=StrictUndefined)
    pages.filters |= {"cell": cell, "breakable": breakable}
    return write_markdown(path, pages.get_template(template).render(**values))


def write_report(
    folder: Path,
    template: str,
    title: str,
    notes: Sequence[str],
    sections: Sequence[Section],
    report: Mapping[str, Any],
    pictures: Mapping[str, Path] | None = None,
    **page: Any,
) -> str:
    """Write report.json, report.md and report.html; return notes and tables as text, with the paths of the files.

    Args:
        folder: folder of the report.
        template: template of the page.
        title: title of the report.
        notes: sentences before the tables.
        sections: the tables.
        report: content of report.json.
        pictures: PNG files in the folder by title; they are embedded in the page.
        page: further values for the template.
    """
    pictures = pictures or {}
    text = "\n\n".join([*notes, *(section.markdown() for section in sections)])
    shown = "".join(f"\n![{name}]({picture.name})\n" for name, picture in pictures.items())
    write_json(folder / "report.json", report)
    write_markdown(folder / "report.md", f"# {title}\n\n{text}\n{shown}")
    held = [(name, _embedded(picture)) for name, picture in pictures.items()]
    found = write_page(
        folder / "report.html", template, title=title, notes=notes, sections=sections, pictures=held, **page
    )
    return f"{text}\n\nreport: {folder / 'report.md'}   page: {found}"


def breakable(text: str) -> Any:
    """Return a text as HTML that narrow columns may break after slashes, underscores and dots."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"([/_.])", r"\1<wbr>", str(escape(text))))


def _embedded(picture: Path) -> str:
    """Return a PNG file as a data URL."""
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()


# -- plots ------------------------------------------------------------------------------------------------------------


def pyplot() -> Any:
    """Return matplotlib.pyplot with a backend that needs no screen; slow to import."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def plot_text(text: str) -> str:
    """Escape a text so that matplotlib does not parse it as a formula, and shorten it."""
    return text[:80].replace("$", "\\$")


def save_figure(figure: Any, path: str | Path, **settings: Any) -> Path:
    """Write a figure, close it, and return the path."""
    figure.savefig(path, **{"dpi": 130, **settings})
    pyplot().close(figure)
    return Path(path)


class FrontierPoint(NamedTuple):
    """A policy in the plot of reward against KL."""

    method: str  # name of the curve that the point belongs to
    kl: float  # KL to the reference, nats per completion
    gold_reward: float  # mean gold reward
    score: float  # mean proxy score
    gold_reward_ci: Sequence[float]  # 95 % interval of the gold reward
    score_ci: Sequence[float]  # 95 % interval of the score
    label: str = ""  # text next to the point; empty for none
    final: bool = False  # the policy that a run ends with, drawn as a star
    update: int = 0  # optimizer updates of the checkpoint


COLOURS = {"ppo": "#c44e52", "ppo without KL penalty": "#dd8452", "dpo": "#4c72b0", "best of n": "#555555"}


def draw_frontier(
    points: Sequence[FrontierPoint], path: str | Path, title: str = "", levels: Mapping[str, float] | None = None
) -> Path:
    """Draw gold reward and proxy score against KL, and return the path.

    Args:
        points: the points of each method, in the order in which a line connects them.
        path: file of the figure.
        title: title of the figure.
        levels: named gold rewards for comparison, drawn as horizontal lines.
    """
    figure, axes = pyplot().subplots(1, 2, figsize=(11, 4.4), constrained_layout=True)
    fields = ("gold_reward", "gold reward"), ("score", "proxy score (of the run's own reward model)")
    for axis, (field, label) in zip(axes, fields, strict=True):
        for method in dict.fromkeys(point.method for point in points):
            _draw_curve(axis, [point for point in points if point.method == method], field)
        axis.set_xlabel("KL(policy || SFT policy), nats per completion, square-root scale")
        axis.set_xscale("function", functions=(_root, _square))
        axis.set_xticks([root**2 for root in range(math.ceil(max(point.kl for point in points) ** 0.5) + 1)])
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    for name, level in (levels or {}).items():
        axes[0].axhline(level, color="#888888", linewidth=1, linestyle=":")
        place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "xytext": (-4, 2)}
        axes[0].annotate(name, (1, level), ha="right", va="bottom", fontsize=8, color="#555555", **place)
    axes[0].set_ylim(0, 1.08)
    axes[1].legend(frameon=False, loc="lower right")
    if title:
        figure.suptitle(title)
    return save_figure(figure, path)


def _root(values: Any) -> Any:
    """Return square roots: Gao et al. (2210.10760) find that rewards are simple functions of the root of the KL."""
    import numpy as np

    return np.sqrt(np.clip(values, 0, None))


def _square(values: Any) -> Any:
    return values**2


def _draw_curve(axis: Any, line: Sequence[FrontierPoint], field: str) -> None:
    """Draw the points of one method with their intervals; the final policy is a star."""
    method, heights = line[0].method, [getattr(point, field) for point in line]
    dashed, colour = method == "best of n", COLOURS.get(method)
    style = {"marker": "s" if dashed else "o", "linestyle": "--" if dashed else "-", "markersize": 4}
    axis.plot([point.kl for point in line], heights, color=colour, label=method, **style)
    for point, height in zip(line, heights, strict=True):
        axis.vlines(point.kl, *getattr(point, f"{field}_ci"), color=colour, linewidth=1)
        if point.final:
            axis.plot(point.kl, height, marker="*", markersize=14, color=colour)
        if point.label:
            axis.annotate(point.label, (point.kl, height), textcoords="offset points", xytext=(7, -11), fontsize=8)
