"""Static HTML pages that work offline: everything is inside the file."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from rlhf_lightning.evaluation.report import cell, write_markdown

PAGES = Path(__file__).parent / "pages"


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Render a template of this room into one file; every text is escaped."""
    pages = Environment(loader=FileSystemLoader(PAGES), autoescape=True, undefined=StrictUndefined)
    pages.filters |= {"cell": cell, "breakable": breakable}
    return write_markdown(path, pages.get_template(template).render(**values))


def breakable(text: str) -> Markup:
    """Return a text as HTML that narrow columns may break after slashes and underscores."""
    return Markup(re.sub(r"([/_])", r"\1<wbr>", str(escape(text))))


def embedded(picture: Path) -> str:
    """Return a PNG file as a data address."""
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
