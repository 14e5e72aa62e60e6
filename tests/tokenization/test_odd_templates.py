"""Test unusual chat templates: assistant turns are trained on as rendered, or the row is dropped."""

from collections.abc import Sequence
from typing import Any

import pytest
from conftest import make_tiny_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_lightning.data.canonical import REASONS, Report
from rlhf_lightning.data.tokenizing import encoder_for
from rlhf_lightning.tokenization import TurnsRefused, encode_prompt, render_turns
from rlhf_lightning.tokenization.templates import apply_template

HEADERS = (
    "'<|im_start|>' + m.role + '\n'", "'[' + m.role + '] '", "m.role + ': '", "''", "'<' + loop.index | string + '>'",
    "'<|im_start|>' + (m.role if loop.last else m.role | upper) + '\n'",
)  # fmt: skip
CONTENTS = (
    "m.content", "m.content | trim", "m.content | upper", "m.content + m.content", "m.content.replace('a', 'b')",
    "m.content[:3]", "(m.content if m.role == 'assistant' else m.content | replace('\n', ' '))",
    "('' if m.role == 'system' else m.content)", "(m.content.split('.')[-1] if not loop.last else m.content)",
    "('<think>\n\n</think>\n\n' if m.role == 'assistant' and loop.last else '') + m.content",
)  # fmt: skip
ENDS = (
    "'<|im_end|>\n'", "eos_token", "'\n\n'", "''", "(eos_token if m.role == 'assistant' else '\n')",
    "('<|im_end|>' if loop.last else '')", "'<|im_end|>' + eos_token + '\n'",
)  # fmt: skip
ORDERS = (
    "messages", "messages[-2:]", "messages | reverse", "messages[1:] + messages[:1]", "messages[:1] + messages",
    "messages | selectattr('role', 'ne', 'system')", "messages | rejectattr('content', 'equalto', 'a.')",
)  # fmt: skip
ASKS = (
    "'<|im_start|>assistant\n'",
    "'[assistant] '",
    "'assistant: '",
    "''",
    "'<think>\n'",
    "'<|im_start|>assistant\n<think>\n'",
)


def template_of(header: str, content: str, end: str, order: str, ask: str, before: str) -> str:
    return (
        f"{before}{{% for m in {order} %}}{{{{ {header} }}}}{{{{ {content} }}}}{{{{ {end} }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {ask} }}}}{{% endif %}}"
    )


TEMPLATES = st.builds(
    template_of, st.sampled_from(HEADERS), st.sampled_from(CONTENTS), st.sampled_from(ENDS), st.sampled_from(ORDERS),
    st.sampled_from(ASKS), st.sampled_from(["", "{{ bos_token }}", "Be kind.\n", "{{ messages | length }} turns\n"]),
)  # fmt: skip
WORDS = st.sampled_from(
    ["a.", "bc", "  pad ", "a\nb", "x.y", "<think>t</think>ok", "<|im_end|>", "user: ", "\u00e9\u6f22"]
)


@st.composite
def conversations(draw: Any) -> list[dict[str, Any]]:
    """Return turns that each contain a unique word."""
    roles = draw(st.sampled_from(["ua", "uaua", "sua", "suaua", "uaa", "uua", "saua", "uauaua"]))
    names = {"u": "user", "a": "assistant", "s": "system"}
    return [
        {"role": names[role], "content": f"{draw(WORDS)}{names[role][0]}{place}q{draw(WORDS)}"}
        for place, role in enumerate(roles)
    ]


def marks(turns: Sequence[dict[str, Any]], role: str | None = None) -> list[str]:
    return [f"{t['role'][0]}{i}q" for i, t in enumerate(turns) if role in (None, t["role"])]


def tokenizer_with(template: str) -> Any:
    tokenizer = make_tiny_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(TEMPLATES, conversations())
def test_exactly_the_assistants_words_are_supervised(template: str, turns: list[dict[str, Any]]) -> None:
    tokenizer, counts = tokenizer_with(template), Report()
    (outcome,) = encoder_for("sft").counted(tokenizer, [{"messages": turns}], counts)
    if outcome.reason is not None:
        assert outcome.reason in REASONS and not outcome.encoded and counts.dropped == {outcome.reason: 1}
        return
    said = []
    for row in outcome.encoded:
        for ids, flags in zip(row.completions, row.supervised, strict=True):
            said.append(tokenizer.decode([index for index, flag in zip(ids, flags, strict=True) if flag]))
    text = "".join(said)
    asked = [turn["role"] for turn in turns].index("user")
    answers = [mark for mark in marks(turns, "assistant") if mark in marks(turns)[asked:]]
    assert not any(mark in text for mark in marks(turns) if mark not in answers), text
    assert all(mark in text for mark in answers), text
    places = [text.index(mark) for mark in answers]
    assert places == sorted(places)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(TEMPLATES, conversations())
def test_prompt_plus_completion_equals_the_rendered_text(template: str, turns: list[dict[str, Any]]) -> None:
    tokenizer = tokenizer_with(template)
    try:
        rendered = render_turns(tokenizer, turns)
    except TurnsRefused:
        return
    plain = {mark: mark for mark in marks(turns)}
    for turn in rendered:
        facts_text = "".join(span.text for span in turn.prompt.spans)
        # A prompt that ends with an assistant turn is continued at inference, while data may train the turn after it.
        learned_after = turn.context[-1]["role"] == "assistant"
        asked = facts_text if learned_after else tokenizer.decode(encode_prompt(tokenizer, turn.context))
        try:
            expected = apply_template(tokenizer, turn.context, True)
        except TurnsRefused:
            continue
        if "\ue000" not in facts_text and "<think>" not in template + expected:
            assert asked == expected and plain


def test_most_odd_templates_are_accepted() -> None:
    kept = 0
    turns = [{"role": "user", "content": "u0q"}, {"role": "assistant", "content": "a1q"}]
    for header in HEADERS:
        for content in CONTENTS:
            tokenizer = tokenizer_with(template_of(header, content, ENDS[0], ORDERS[0], ASKS[0], ""))
            (outcome,) = encoder_for("sft").counted(tokenizer, [{"messages": turns}], Report())
            kept += outcome.reason is None
    assert kept >= 12


@pytest.mark.parametrize("order", ["messages | reverse", "messages[1:] + messages[:1]"])
def test_a_template_that_reorders_turns_is_refused(order: str) -> None:
    tokenizer = tokenizer_with(template_of(HEADERS[0], CONTENTS[0], ENDS[0], order, ASKS[0], ""))
    turns = [{"role": role, "content": f"{role} {n}"} for n in range(2) for role in ("user", "assistant")]
    (outcome,) = encoder_for("sft").counted(tokenizer, [{"messages": turns}], Report())
    assert outcome.reason == "turn_after_answer"


def test_a_template_that_merges_assistant_turns_is_refused() -> None:
    tokenizer = tokenizer_with(
        "{% set last = namespace(role='') %}{% for m in messages %}{% if m.role != last.role %}"
        "{{ ('<|end|>\n' if last.role else '') + '<|' + m.role + '|>\n' }}{% set last.role = m.role %}"
        "{% else %}{{ '\n' }}{% endif %}{{ m.content }}{% endfor %}<|end|>\n"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    said = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "since"}]
    (outcome,) = encoder_for("sft").counted(tokenizer, [{"messages": [*said, {**said[1], "content": "so"}]}], Report())
    assert outcome.reason == "turns_merged"
    (outcome,) = encoder_for("sft").counted(tokenizer, [{"messages": [*said, *said]}], Report())
    assert outcome.reason is None
