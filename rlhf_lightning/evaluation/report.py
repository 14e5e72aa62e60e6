"""Reports: the same figures as JSON for machines and as Markdown for people."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_json(path: str | Path, report: Mapping[str, Any]) -> Path:
    """Write a report, whole or not at all. Returns its path."""
    return _write(Path(path), json.dumps(report, indent=2) + "\n")


def write_markdown(path: str | Path, text: str) -> Path:
    """Write a report, whole or not at all. Returns its path."""
    return _write(Path(path), text)


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
    return path


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table; columns are padded so that it also reads well in a terminal."""
    cells = [[cell(value) for value in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    padded = [[text.ljust(width) for text, width in zip(row, widths, strict=True)] for row in cells]
    lines = [f"| {' | '.join(row)} |" for row in padded]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def cell(value: Any) -> str:
    """Return a value as a table cell: three decimals, line breaks and bars escaped."""
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value)
    if isinstance(value, float):
        return f"{value:.3f}"
    return str(value).replace("\n", " ").replace("|", "\\|")


def interval(ci: Sequence[float], digits: int = 3) -> str:
    """Return an interval as text."""
    return f"[{ci[0]:.{digits}f}, {ci[1]:.{digits}f}]"
