"""Completions as HTML that cannot do anything: Markdown is laid out, everything else is shown as what it is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from html import escape
from typing import TYPE_CHECKING, Any

from rlhf_lightning.types import Prompt

if TYPE_CHECKING:
    from markdown_it import MarkdownIt

LONGEST_MARKDOWN = 50_000
"""Characters beyond which a text is shown as it is: laying it out would keep others waiting."""

HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")
"""Characters that are not seen and change what is: controls, direction overrides, zero-width spaces and joiners."""

JOINERS = "\u200c\u200d"
"""Needed by several scripts and by emoji, so left as they are."""


def shown_text(text: str) -> str:
    """The text with every character that would hide or turn others written out, as in ``[U+202E]``."""
    plain = text.replace("\r\n", "\n").replace("\r", "\n")
    return HIDDEN.sub(lambda found: found[0] if found[0] in JOINERS else f"[U+{ord(found[0]):04X}]", plain)


def to_html(text: str) -> str:
    """Markdown as HTML: no tag, link or image of the text's own becomes one of the page.

    An annotator has no need to follow a model's links, so a link is its words and its address, to be read.
    """
    plain = shown_text(text)
    if len(plain) > LONGEST_MARKDOWN:
        return f"<pre class='plain'>{escape(plain)}</pre>"
    return str(_renderer().render(plain))


@lru_cache(maxsize=1)
def _renderer() -> MarkdownIt:
    from markdown_it import MarkdownIt

    renderer = MarkdownIt("commonmark", {"html": False, "linkify": False, "breaks": True, "maxNesting": 20})
    renderer.enable(["table", "strikethrough"]).disable(["image", "html_block", "html_inline"])
    # What a text calls a language becomes a class of the page otherwise.
    renderer.add_render_rule("fence", _code)
    renderer.add_render_rule("link_open", _link_open)
    renderer.add_render_rule("link_close", _link_close)
    return renderer


def _code(self: Any, tokens: Sequence[Any], place: int, options: Any, env: Any) -> str:
    return f"<pre><code>{escape(tokens[place].content)}</code></pre>\n"


def _link_open(self: Any, tokens: Sequence[Any], place: int, options: Any, env: dict[str, Any]) -> str:
    env.setdefault("addresses", []).append(str(tokens[place].attrGet("href") or ""))
    return "<span class='link'>"


def _link_close(self: Any, tokens: Sequence[Any], place: int, options: Any, env: dict[str, Any]) -> str:
    return f"</span> <span class='address'>({escape(env['addresses'].pop())})</span>"


def turns_of(prompt: Prompt) -> list[dict[str, str]]:
    """The turns of a prompt, each with its role and its text as HTML; plain text is one turn without a role."""
    if isinstance(prompt, str):
        return [{"role": "", "html": to_html(prompt), "text": shown_text(prompt)}]
    return [
        {"role": turn["role"], "html": to_html(turn["content"]), "text": shown_text(turn["content"])} for turn in prompt
    ]
