"""Annotators see the whole text with hidden characters written out, and nothing in the text is active."""

import random
import sys
import time
import unicodedata
from html.parser import HTMLParser

import pytest

from rlhf_lightning.people.hostile_text import completion_shown, shown_text, to_html


class Seen(HTMLParser):
    """Text of a page as a browser renders it, with list numbers."""

    def __init__(self):
        super().__init__()
        self.parts = []

    def handle_starttag(self, tag, attributes):
        self.parts += [value for name, value in attributes if tag == "li" and name == "value"]

    def handle_data(self, data):
        self.parts.append(data)


def seen(html):
    parser = Seen()
    parser.feed(html)
    parser.close()
    return "".join(parser.parts)


def core(text):
    """Everything except white space and Markdown markup."""
    return "".join(one for one in text if not one.isspace() and one not in "\\`*_#>-+|~:=.)")


IGNORABLE = [
    0xAD, 0x34F, 0x61C, 0x115F, 0x1160, 0x17B4, 0x17B5, *range(0x180B, 0x1810), *range(0x200B, 0x2010),
    *range(0x2028, 0x202F), *range(0x2060, 0x2070), 0x2800, 0x3164, *range(0xFE00, 0xFE10), 0xFEFF, 0xFFA0,
    *range(0xFFF0, 0xFFFC), *range(0x1BCA0, 0x1BCA4), *range(0x1D173, 0x1D17B), *range(0xE0000, 0xE1000),
]  # fmt: skip
"""Code points that may be rendered as nothing, the braille blank, and direction controls."""


def test_every_invisible_character_is_escaped():
    formats = [
        code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) in ("Cf", "Cc", "Zl", "Zp")
    ]
    codes = sorted({*IGNORABLE, *formats} - {0x09, 0x0A, 0x0D})
    for code in codes:
        assert shown_text(f"a{chr(code)}b") == f"a[U+{code:04X}]b"
    for code in codes[::50]:
        for text in (f"a {chr(code)} b", f"```{chr(code)}\nx\n```"):
            assert f"[U+{code:04X}]" in to_html(text)


def test_joiners_are_kept_in_scripts_and_emoji_that_need_them():
    for text in ("👩\u200d💻", "👩\u200d❤️\u200d👨", "می\u200cخواهم", "क\u094d\u200dष", "❤\ufe0f", "1\ufe0f\u20e3"):
        assert shown_text(text) == text
    for text in (
        "a\u200db",
        "\u8a9e\u200c\u8a9e",
        "a\ufe0f",
        "\u0627\u200c\u200d\u200c\u0627",
        "\u200d",
        "😀\u200d\u200d😀",
    ):
        assert "[U+" in shown_text(text)


@pytest.mark.parametrize("name", ["#x202E", "#8238", "rlm", "lrm", "shy", "zwj", "#xE0041", "#x3164", "NoBreak", "ic"])
def test_html_entities_are_escaped(name):
    for text in (f"a &{name}; b", f"[a](http://b/&{name};)", f"```&{name};\nx\n```", f"| &{name}; |\n|---|\n| x |"):
        html = to_html(text)
        assert f"&amp;{name};" in html and all(one.isascii() for one in html)


LOSSES = {
    "link definition": "before\n\n[x]: http://a.example/secret 'title'\n\nafter [x] [y][x]",
    "info string": '```python secret="yes" title\ncode\n```\n\n~~~ `other` info\nmore\n~~~',
    "titles": "[a](http://b.example \"secret title\") ![c](http://d.example 'hidden') <http://e.example>",
    "table cells": "| a | b |\n|---|---|\n| 1 | 2 | secret | 4 |",
    "nested quotes": ">" * 60 + " secret",
    "nested lists": "\n".join("  " * level + f"- level {level}" for level in range(60)),
    "nested emphasis": "*a " * 300 + "secret" + "*" * 300,
    "numbers of lists": "1. a\n99. b\n3) c\n\n7. d",
    "comments": "<!-- secret --> <b title='hidden'>x</b> <?php secret ?> <![CDATA[secret]]>",
    "escapes": r"\[a\]: b \<b\> \&amp; \1 \a",
    "hard breaks": "a  \nb\\\nc",
    "code": "`` a`b `` and\n\n    indented  code\n\ttab",
    "headings": "# a # b ##\n\nSetext\n===\n\n####### seven",
    "tables without rows": "| a | b\n|---|:-:\ntail | x | y\n\nend",
    "footnotes": "a[^1]\n\n[^1]: secret",
    "task lists": "- [x] done\n- [ ] open",
    "front matter": "---\nsecret: 1\n---\n",
}


@pytest.mark.parametrize("text", LOSSES.values(), ids=LOSSES)
def test_rendered_html_contains_the_whole_text(text):
    assert core(seen(to_html(text))) == core(shown_text(text))


PIECES = [
    "[x]: http://a/", "[x]", "```", "~~~ info", "> ", ">>>> ", "- ", "12. ", "3) ", "| a | b |", "|---|---|",
    "| c | d | e |", "# ", "***", "__b__", "`c`", "\n", "\n\n", "    ", "  ", "&shy;", "<b>", '](y "t")', "![", "\\",
    "word", "\u00e9", "7", "\t", "\u202e", "===", "---", "<http://u>", "*", "_", "~~",
]  # fmt: skip


def test_rendered_random_markdown_contains_the_whole_text():
    draw = random.Random(0)
    for _ in range(1500):
        text = "".join(draw.choice(PIECES) for _ in range(draw.randrange(1, 40)))
        assert core(seen(to_html(text))) == core(shown_text(text)), ascii(text)


SIZES = {
    "reference bomb": "[a]: http://" + "x" * 25_000 + "\n\n" + "[a]" * 8_000,
    "entities": "&nGtv;" * 8_000,
    "quotes": '"' * 50_000,
    "hidden": "\u202e" * 50_000,
    "lists": "1) a\n" * 10_000,
    "deep": ("> - 1. " * 8 + "a\n") * 800,
    "wide table": "|a" * 5_000 + "|\n" + "|-" * 5_000 + "|\n" + "|x\n" * 9_000,
    "tables": "|a|\n|-|\n|b|\n\n" * 3_500,
    "stars": "*a_ " * 12_500,
    "brackets": "![[" * 16_000,
    "backticks": "".join("`" * length + "x" for length in range(310)),
}


@pytest.mark.parametrize("text", SIZES.values(), ids=SIZES)
def test_html_size_is_linear_in_the_text(text):
    start = time.monotonic()
    html = to_html(text)
    assert len(html) < 15 * len(text) + 2_000 and time.monotonic() - start < 20
    assert core(seen(html)) == core(shown_text(text))


def test_turns_of_a_completion_are_shown_with_roles():
    turns = [{"role": "assistant", "content": "first"}, {"role": "user", "content": "more"},
             {"role": "assistant", "content": "second"}]  # fmt: skip
    shown = completion_shown(turns)
    assert shown["text"] == "[assistant]\nfirst\n\n[user]\nmore\n\n[assistant]\nsecond"
    assert "<h2 class='role'>user</h2><p>more</p>" in shown["html"]
    assert completion_shown(turns[:1]) == {"html": "<p>first</p>\n", "text": "first"}
    assert "&lt;b&gt;" in completion_shown([{"role": "<b>", "content": "x"}])["html"]
