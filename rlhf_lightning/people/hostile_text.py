"""Render untrusted text as safe HTML that shows every character that a model is trained on.

Markdown is rendered only if no text is lost. Links, images, tags, entities and link definitions are shown as source
text, and hidden characters are shown by their code.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from html import escape
from typing import TYPE_CHECKING, Any

from rlhf_lightning.types import Message, Prompt

if TYPE_CHECKING:
    from markdown_it import MarkdownIt

LONGEST_MARKDOWN = 50_000
"""Maximum characters of rendered Markdown; rendering longer text would block other requests."""

DEEPEST_MARKDOWN = 20
"""Maximum nesting depth of rendered Markdown."""

MOST_GROWTH = 12
"""Maximum ratio of HTML characters to text characters of rendered Markdown."""

MARKUP = frozenset("\\`*_#>-+|~:=")
"""Characters that Markdown may consume as markup."""

HIDDEN_CATEGORIES = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories: controls, direction overrides, tags, soft hyphens, lone surrogates, line and paragraph
separators."""

FILLERS = (
    (0x034F, 0x034F), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x2060, 0x206F), (0x2800, 0x2800),
    (0x3164, 0x3164), (0xFE00, 0xFE0F), (0xFFA0, 0xFFA0), (0xFFF0, 0xFFFB), (0xE0000, 0xE0FFF),
)  # fmt: skip
"""Ranges of further invisible or blank characters: joiners, fillers, variation selectors."""

JOINERS = "\u200c\u200d"
"""Joiners that several scripts and emoji need."""

SELECTORS = "\ufe0e\ufe0f"
"""Variation selectors that choose between text and emoji style."""


def shown_text(text: str) -> str:
    """Replace every hidden character by its code, as in ``[U+202E]``."""
    plain = text.replace("\r\n", "\n").replace("\r", "\n")
    if plain.isascii() and plain.isprintable():
        return plain
    return "".join(
        f"[U+{ord(one):04X}]" if _is_hidden(one) and not _is_needed(plain, place) else one
        for place, one in enumerate(plain)
    )


def _is_hidden(character: str) -> bool:
    if character in "\n\t" or "\x20" <= character < "\x7f":
        return False
    code = ord(character)
    return unicodedata.category(character) in HIDDEN_CATEGORIES or any(low <= code <= high for low, high in FILLERS)


def _is_needed(text: str, place: int) -> bool:
    """Whether a joiner or a variation selector is needed by a script or an emoji."""
    before = text[place - 1] if place else " "
    if text[place] in JOINERS:
        after = text[place + 1 : place + 2] or " "
        return (_is_emoji(before) and _is_emoji(after)) or (_is_joined(before) and _is_joined(after))
    return text[place] in SELECTORS and (before in "0123456789#*" or _is_emoji(before))


def _is_emoji(character: str) -> bool:
    return character in SELECTORS or (not character.isascii() and unicodedata.category(character)[0] == "S")


def _is_joined(character: str) -> bool:
    """Whether a character belongs to a script that uses joiners: Arabic to Myanmar, Khmer, Mongolian."""
    return 0x0600 <= ord(character) <= 0x10FF or 0x1780 <= ord(character) <= 0x18AF


@lru_cache(maxsize=256)
def to_html(text: str) -> str:
    """Render Markdown as HTML; return the raw text if rendering would lose a part of it."""
    plain = shown_text(text)
    if len(plain) <= LONGEST_MARKDOWN:
        tokens = _renderer().parse(plain)
        if _content(plain) == _content("".join(_texts(tokens))):
            html = str(_renderer().renderer.render(tokens, _renderer().options, {}))
            if len(html) <= MOST_GROWTH * (len(plain) + 100):
                return html
    return f"<pre class='plain'>{escape(plain)}</pre>"


def _content(text: str) -> str:
    """Return the characters that rendering must keep."""
    return "".join(one for one in text if one not in MARKUP and not one.isspace())


def _texts(tokens: Iterable[Any]) -> Iterator[str]:
    """Yield everything that rendering shows: text, code, info strings, list numbers."""
    for token in tokens:
        if token.type == "inline":
            yield from _texts(token.children or ())
        elif token.type == "fence":
            yield token.info + token.content
        elif token.type == "list_item_open":
            yield token.info + (token.markup if token.info else "")
        else:
            yield token.content


@lru_cache(maxsize=1)
def _renderer() -> MarkdownIt:
    from markdown_it import MarkdownIt

    options = {"html": False, "linkify": False, "breaks": True, "maxNesting": DEEPEST_MARKDOWN}
    renderer = MarkdownIt("commonmark", options).enable(["table", "strikethrough"])
    renderer.disable(["image", "link", "autolink", "reference", "entity", "html_block", "html_inline"])
    renderer.add_render_rule("fence", _code)
    renderer.add_render_rule("list_item_open", _list_item)
    return renderer


def _code(self: Any, tokens: Sequence[Any], place: int, options: Any, env: Any) -> str:
    """Render a code block and show its info string, which would otherwise become a hidden CSS class."""
    info = tokens[place].info.strip()
    shown = f"<span class='info'>{escape(info)}</span>\n" if info else ""
    return f"<pre>{shown}<code>{escape(tokens[place].content)}</code></pre>\n"


def _list_item(self: Any, tokens: Sequence[Any], place: int, options: Any, env: Any) -> str:
    """Render a list item with the number written in the text; browsers would count on from the first item."""
    number = tokens[place].info
    return f"<li value='{int(number)}'>" if number else "<li>"


def turns_of(prompt: Prompt) -> list[dict[str, str]]:
    """Return the turns of a prompt with role, HTML and text; plain text is one turn without a role."""
    turns = [("", prompt)] if isinstance(prompt, str) else [(turn["role"], turn["content"]) for turn in prompt]
    return [{"role": role, "html": to_html(text), "text": shown_text(text)} for role, text in turns]


def completion_shown(completion: str | list[Message]) -> dict[str, str]:
    """Return HTML and text of a completion; if it has several turns, each is headed by its role."""
    turns = turns_of(completion)
    if len(turns) == 1 and turns[0]["role"] in ("", "assistant"):
        return {"html": turns[0]["html"], "text": turns[0]["text"]}
    return {
        "html": "".join(f"<h2 class='role'>{escape(turn['role'])}</h2>{turn['html']}" for turn in turns),
        "text": "\n\n".join(f"[{turn['role']}]\n{turn['text']}" for turn in turns),
    }
