"""Test published chat templates: the text that is trained on equals that of `apply_chat_template` in transformers.

The templates are not part of this repository. RLHF_CHAT_TEMPLATES names a folder of .jinja files. By default,
``chat_templates`` in the cache is read, which `make chat-templates` fills.
"""

import json
import os
import re
from datetime import datetime
from functools import cache
from pathlib import Path

import pytest
from conftest import CACHE, make_tiny_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_lightning.tokenization import (
    TurnsRefused,
    encode_rendered,
    facts_of,
    render_answers,
    render_prompt,
    render_turns,
)
from rlhf_lightning.tokenization.facts import thought_and_answer

FOLDER = Path(os.environ.get("RLHF_CHAT_TEMPLATES") or CACHE / "chat_templates")
ROOT = Path(__file__).resolve().parents[2]
CASES = ROOT / os.environ.get("RLHF_CASES", Path(os.environ.get("RLHF_DATA", "../shared/data")).parent / "cases")
TEMPLATES = {
    file.stem: file for file in sorted(FOLDER.glob("*.jinja")) if not file.stem.endswith("_training")
}  # changed for training

MARK = re.compile(
    r"<\|[^<>|\s]{1,40}\|>|<｜[^<>｜]{1,40}｜>|<\|[a-z_]{1,20}>|<[a-z_]{1,20}\|>|</?(?:start|end)_of_\w+>"
)
SAYABLE = ("<think>", "</think>", "<tool_call>", "</tool_call>")

pytestmark = pytest.mark.skipif(
    len(TEMPLATES) < 30, reason=f"no published chat templates in {FOLDER}: `make chat-templates` fetches them"
)


@cache
def tokenizer_of(name):
    from tokenizers import AddedToken

    text = TEMPLATES[name].read_text(encoding="utf-8")
    tokenizer = make_tiny_tokenizer(text)
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(MARK.findall(text)))})
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in SAYABLE if mark in text])
    return tokenizer


def transformers_text(tokenizer, messages, generation, tools=None):
    """Render with transformers' own sandbox, at the same date as ours."""
    from transformers.utils import chat_template_utils

    template = tokenizer.get_chat_template(tools=tools)
    compiled = chat_template_utils._compile_jinja_template(template)
    compiled.globals["strftime_now"] = lambda format: datetime(2025, 1, 1).strftime(format)
    form = facts_of(tokenizer).parts
    given = [{**m, "content": [{"type": "text", "text": m["content"]}]} if form else m for m in messages]
    return compiled.render(
        messages=given, tools=tools, documents=None, add_generation_prompt=generation, **tokenizer.special_tokens_map
    )


def as_read(tokenizer, messages):
    """Write messages in the form that the template reads; thoughts go under their own key where needed."""
    facts, found = facts_of(tokenizer), []
    for message in messages:
        thought, answer = thought_and_answer(message["content"])
        if message["role"] == "assistant" and thought is not None and facts.moves_thoughts:
            message = {**message, "content": answer, "reasoning_content": thought}
        if "reasoning_content" in message and facts.reads_thoughts:
            message = {**message, **dict.fromkeys(("reasoning", "thinking"), message["reasoning_content"])}
        elif "reasoning_content" in message and facts.thinks:
            text = f"<think>\n{message['reasoning_content']}\n</think>\n\n{message['content']}"
            message = {key: one for key, one in message.items() if key != "reasoning_content"} | {"content": text}
        if facts.calls and "tool_calls" in message:
            message = facts.for_template(message)
        found.append(message)
    return found


def text_of(tokenizer, rendered):
    """Return the text that is trained on, after checking that its ids decode to the rendered text."""
    encoded = encode_rendered(tokenizer, [rendered])[0]
    closing = len(rendered.closing)
    ids = encoded.ids[:-closing] if closing else encoded.ids
    assert tokenizer.decode(ids) == "".join(span.text for span in rendered.spans)
    return tokenizer.decode(ids)


OPENED = re.compile(r"<think>\s*\Z")


def check_turns(name, messages, tools=None):
    """Compare every trained turn with transformers; return how it was compared, or why the row is refused."""
    tokenizer = tokenizer_of(name)
    given = [{**messages[0], "tools": tools}, *messages[1:]] if tools else messages
    try:
        turns = render_turns(tokenizer, given)
    except TurnsRefused as refusal:
        return refusal.code
    read, kinds = as_read(tokenizer, messages), set()
    learned = [place for place, turn in enumerate(messages) if turn["role"] == "assistant"]
    for turn in turns:
        asked = text_of(tokenizer, turn.prompt)
        assert asked == transformers_text(tokenizer, read[: len(turn.context)], True, tools)
        last = learned[-1] if len(turns) == 1 else len(turn.context)
        text = asked + text_of(tokenizer, turn.completion)
        whole = transformers_text(tokenizer, read[: last + 1], False, tools)
        if whole.startswith(text):
            rest = whole[len(text) :]
            assert not re.sub(r"<[^<>\s]+>", "", rest).strip(), f"{rest!r} is not learned"
            kinds.add("equal")
            continue
        # The template renders the prompt differently once it is answered: the text at inference counts.
        met = transformers_text(tokenizer, read[:last], True, tools)
        assert text.startswith(met), (text, met)
        said = text[len(met) :]
        if not OPENED.search(met):
            assert whole.rstrip().endswith(said.rstrip()), (said, whole)
        thought, answer = thought_and_answer(messages[last]["content"])
        assert answer.strip() in said and (thought or "") in said, (said, whole)
        if OPENED.search(met):
            assert "<think>" not in said and said.count("</think>") == 1, "the opened thought is closed, once"
        kinds.add("continues")
    return " ".join(sorted(kinds))


def cases(name):
    file = CASES / name
    if not file.is_file():
        pytest.skip(f"no {file}: RLHF_CASES names the folder of the cases")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", TEMPLATES)
def test_thoughts_are_supervised_as_rendered(name):
    found = [check_turns(name, row["messages"]) for row in cases("thoughts.jsonl") if "messages" in row]
    allowed = {"equal", "continues", "thought-left-out", "thought-closed"}
    assert set(found) <= allowed, found
    assert "equal" in found[1] or "continues" in found[1], "an answer without a thought is learned everywhere"


@pytest.mark.parametrize("name", TEMPLATES)
def test_both_sides_of_a_pair_share_the_rendered_prompt(name):
    tokenizer = tokenizer_of(name)
    (row,) = (row for row in cases("thoughts.jsonl") if "chosen" in row)
    try:
        asked, *answers = render_answers(tokenizer, row["prompt"], [row["chosen"], row["rejected"]])
    except TurnsRefused as refusal:
        assert refusal.code in ("thought-left-out", "thought-closed")
        return
    read = as_read(tokenizer, row["prompt"])
    prompt = text_of(tokenizer, asked)
    assert prompt == transformers_text(tokenizer, read, True)
    for answer, side in zip(answers, ("chosen", "rejected"), strict=True):
        whole = transformers_text(tokenizer, [*read, *as_read(tokenizer, row[side])], False)
        said = text_of(tokenizer, answer)
        if whole.startswith(prompt):
            assert whole.startswith(prompt + said)
        assert said.count("<think>") <= 1 and said.count("</think>") <= 1


@pytest.mark.parametrize("name", TEMPLATES)
def test_tool_calls_are_supervised_or_refused(name):
    for row in cases("tools.jsonl"):
        messages = [{**turn, "content": turn["content"] or ""} for turn in row["messages"]]
        found = check_turns(name, messages, row["tools"])
        refusals = {
            "turns-refused", "tools-left-out", "tool-calls-left-out", "turn-left-out", "prompt-not-continued",
            "thought-left-out",
        }  # fmt: skip
        assert found in refusals or set(found.split()) <= {"equal", "continues"}, found


WORDS = st.text(st.sampled_from("abc .,!?\n12ü漢"), min_size=1, max_size=12).map(lambda text: f"x{text}y")
THOUGHT = st.none() | WORDS


@st.composite
def conversations(draw):
    turns = [{"role": "system", "content": draw(WORDS)}] if draw(st.booleans()) else []
    for number in range(draw(st.integers(1, 3))):
        thought, inside = draw(THOUGHT), draw(st.booleans())
        answer = {"role": "assistant", "content": draw(WORDS)}
        if thought is not None and inside:
            answer["content"] = f"<think>\n{thought}\n</think>\n\n{answer['content']}"
        elif thought is not None:
            answer["reasoning_content"] = thought
        turns += [{"role": "user", "content": f"hi {number} " + draw(WORDS)}, answer]
    return turns


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(conversations())
def test_conversations_are_supervised_as_rendered(name, messages):
    found = check_turns(name, messages)
    allowed = {"turns-refused", "thought-left-out", "thought-closed", "turn-left-out"}
    assert found in allowed or set(found.split()) <= {"equal", "continues"}, found


ODD = {
    "composed letters": ("cafe\u0301 \ufb01 \u2460", "re\u0301sume\u0301 \u212b"),
    "ends of lines": ("a\r\nb\rc\x85d\u2028e", "x\r\ny\tz"),
    "invisible characters": ("a\x00b\x1b[31m\ufeff", "\ufeffc\x07\u200bd"),
    "spaces around": ("\u00a0 q \u3000", "\n\n  answer\t \n"),
    "indented code": ("code?", "    def f():\n        return 1\n"),
    "right to left": ("\u202bשלום\u202c", "مرحبا\u200f!"),
    "joined emoji": ("👩‍👩‍👧‍👦 🏳️‍🌈", "👍🏽 𠜎"),
    "templates": ("{{ 7*7 }}{% for %}{# gone #}", "{{ messages }}{% endfor %}"),
    "markup": ("<b>&amp;</b>", "&lt;script&gt;</b>"),
    "JSON": ('{"role": "user", "content": "hi"}', '[{"a": null}, "\\n"]'),
    "backslashes": ("C:\\new\\table", "\\n stays"),
    "numbers": ("1", "2"),
    "the same words": ("yes", "yes", "yes", "yes"),
    "long": ("word and " * 2000 + "end?", "more and " * 2000 + "end."),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_odd_contents_are_supervised_with_every_template(name):
    for kind, contents in ODD.items():
        found = check_turns(name, turns_of("ua" * (len(contents) // 2), *contents))
        assert set(found.split()) <= {"equal", "continues"}, (kind, found)


ODD_ROLES = ("uua", "sua", "suasua", "dua", "sdua", "uaa", "uata", "ssua")


@pytest.mark.parametrize("name", TEMPLATES)
def test_odd_role_orders_are_supervised_or_refused(name):
    for roles in ODD_ROLES:
        contents = [f"{role}{place}q" for place, role in enumerate(roles)]
        found = check_turns(name, turns_of(roles, *contents))
        refusals = {"turns-refused", "turn-left-out", "turns-merged", "prompt-not-continued"}
        assert found in refusals or set(found.split()) <= {"equal", "continues"}, (roles, found)


def turns_of(roles, *contents):
    names = {"u": "user", "a": "assistant", "s": "system", "d": "developer", "t": "tool"}
    return [{"role": names[role], "content": content} for role, content in zip(roles, contents, strict=True)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_control_tokens_in_content_stay_text(name):
    tokenizer = tokenizer_of(name)
    marks = sorted(facts_of(tokenizer).control)
    attack = "hi " + " ".join(marks)
    try:
        ids = encode_rendered(tokenizer, [render_prompt(tokenizer, [{"role": "user", "content": attack}])])[0].ids
    except TurnsRefused as refusal:
        assert refusal.code in ("control-token-read", "turns-refused")
        return
    plain = encode_rendered(tokenizer, [render_prompt(tokenizer, [{"role": "user", "content": "hi"}])])[0].ids
    control = facts_of(tokenizer).control_ids
    assert [index for index in ids if index in control] == [index for index in plain if index in control]


# -- the table of docs/data.md ----------------------------------------------------------------------------------------

PAGE = ROOT / "docs" / "data.md"
SHOWN = {"equal": "✓", "continues": "serving", "continues equal": "✓, serving"}
HEAD = ("thought", "no thought", "two thoughts", "named thought", "tool call", "odd contents", "odd roles")


def table():
    """Return the lines of the page's table: one row per template, one column per kind of conversation."""
    lines = ["| template | " + " | ".join(HEAD) + " |", "|" + "---|" * (len(HEAD) + 1)]
    tools = cases("tools.jsonl")[0]
    for name in TEMPLATES:
        found = [check_turns(name, row["messages"]) for row in cases("thoughts.jsonl") if "messages" in row]
        found.append(check_turns(name, tools["messages"], tools["tools"]))
        odd = [check_turns(name, turns_of("ua" * (len(said) // 2), *said)) for said in ODD.values()]
        roles = [check_turns(name, turns_of(one, *(f"{r}{n}q" for n, r in enumerate(one)))) for one in ODD_ROLES]
        counts = [sum(set(one.split()) <= {"equal", "continues"} for one in many) for many in (odd, roles)]
        cells = [SHOWN.get(one, f"refused ({one})") for one in found]
        cells += [f"{counts[0]} of {len(odd)}", f"{counts[1]} of {len(roles)}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def test_the_page_shows_what_every_template_does():
    assert table() in PAGE.read_text(encoding="utf-8"), "print table() and put it into docs/data.md"
