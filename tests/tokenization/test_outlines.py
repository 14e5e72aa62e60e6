"""Filling in an outline gives the text that the template renders."""

import pytest

from rlhf_lightning.tokenization import CHAT_TEMPLATES, outlines, sandbox
from rlhf_lightning.tokenization.sandbox import OutOfBounds
from rlhf_lightning.types import Message

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CONTENTS = ("yes", " y\n", "</think> a {{ b }}", "a\0b", "é " * 40, "0", "\ue000user\ue001")


def turns(*contents: str) -> list[Message]:
    roles = ("system", "user", "assistant")
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


def filled(template: str, messages: list[Message], **variables: object) -> str:
    """Return the rendering that may use an outline."""
    return outlines.render(template, messages, True, {**TOKENS, **variables})


def by_sandbox(template: str, messages: list[Message], **variables: object) -> str:
    """Return the rendering of these contents."""
    return sandbox.render(template, messages, add_generation_prompt=True, **{**TOKENS, **variables})


COPIES = {
    **CHAT_TEMPLATES,
    "trims": "{% for m in messages %}{{ '[' ~ m.content | trim + ']' }}{% endfor %}",
    "sets": "{% set a = messages[0].content %}{% set b %}<{{ a }}>{% endset %}{{ b + messages[1]['content'] ~ 1 }}",
    "macro": "{% macro say(m, end='!') %}{{ m.role }}: {{ m.content }}{{ end }}{% endmacro %}"
    "{% for m in messages if m.content is string and m.content %}{{ say(m) ~ say(m, end='?') }}{% endfor %}",
    "namespace": "{% set ns = namespace(all='', n=messages | length) %}"
    "{% for m in messages | selectattr('role', 'ne', 'system') %}{% set ns.all = ns.all + m.content %}{% endfor %}"
    "{{ ns.all }}{{ ns.n }}{{ messages | map(attribute='role') | join(',') }}",
    "kinds": "{% for m in messages %}{{ m.content is defined and m.content is not none and m.content is not mapping "
    "and m.content is iterable and m.content is sequence }}{{ m.get('content', '') }}{% endfor %}",
    "tests": "{{ messages[0].tool_calls is defined }}{{ messages[0] == messages[1] }}{{ messages[0].content or 'no' }}",
}


@pytest.mark.parametrize("template", COPIES.values(), ids=COPIES)
def test_templates_that_copy_contents_are_rendered_once(template, monkeypatch):
    conversations = [turns(one, "q", other) for one in CONTENTS for other in CONTENTS]
    wanted = [by_sandbox(template, messages) for messages in conversations]
    monkeypatch.setattr(sandbox, "render", None)
    assert [filled(template, messages) for messages in conversations] == wanted


READS = [
    "c == 'yes'", "c != 'yes'", "'yes' == c", "c < 'z'", "c in ['yes']", "c in 'yes or no'", "'think' in c",
    "c.startswith('y')", "c | length > 3", "c[0] == 'y'", "c[:1] == 'y'", "c | upper == 'YES'", "c is lower",
    "c is eq 'yes'", "c is in ['yes']", "c.split('</think>')[0] == 'yes'", "c | int == 1", "c | trim == 'yes'",
    "(c + 'x') == 'yesx'", "(c ~ 'x').endswith('sx')", "(c | trim | length) == 1", "'%s' % c == 'yes'",
    "'{}'.format(c) == 'yes'", "'-'.join([c, c]) == 'yes-yes'", "[c, c] | join('-') == 'yes-yes'",
    "'xyes'.replace(c, '') == 'x'", "messages | tojson == '1'", "messages | string == '1'", "c | tojson == '\"yes\"'",
    "{c: 1}.yes", "{'yes': 1}[c]", "{('yes',): 1}[(c,)]", "[1][c]", "{'yes': 1}.get(c)",
    "messages | map(attribute='content') | join == 'yes'",
    "messages | selectattr('content', 'equalto', 'yes') | list | length > 0", "dict(yes=1)[c]", "c * 2 == 'yesyes'",
    "messages | map(attribute='content') | unique | list | length > 1", "[c, 'yes'] | max == 'yes'",
    "messages | sort(attribute='content') | map(attribute='role') | first == 'user'", "c | default('x') == 'yes'",
    "messages[0] == messages[2]", "messages | groupby('content') | length > 2", "c is divisibleby 2", "c | abs",
    "messages | map('string') | join == 'x'", "['yes', 'no'].index(c) == 0", "raise_exception(c)", "range(c | int)",
    "namespace(x=c).x == 'yes'", "(c | list)[0] == 'y'", "c | first == 'y'", "c | replace('y', 'n') == 'nes'",
]  # fmt: skip


@pytest.mark.parametrize("read", READS)
def test_templates_that_read_contents_are_rendered_each_time(read):
    template = "{% set c = messages[0].content %}{{ 'A' if " + read + " else 'B' }}{{ c }}"
    for one in CONTENTS:
        said: list[object] = []
        for render in (filled, by_sandbox):
            try:
                said.append(render(template, turns(one, "no", "yes")))
            except Exception as error:
                said.append((type(error), str(error)))
        assert said[0] == said[1]


def test_an_outline_depends_on_roles_and_variables():
    template = "{% if flag %}{{ flag }}{% endif %}{% for m in messages %}{{ m.role ~ m.content }}{% endfor %}"
    flags: list[object] = [1, True, 1.0, [1], {"a": 1}]
    for variables in ({}, *({"flag": flag} for flag in flags)):
        for messages in (turns("a"), turns("a", "b"), turns("a", "b")[1:]):
            assert filled(template, messages, **variables) == by_sandbox(template, messages, **variables)
    for blank in ("", "  "):
        assert filled("{{ 'full' if messages[0].content | trim else 'blank' }}", turns(blank)) == "blank"
    assert filled("{{ messages[0].name }}", [{"role": "user", "content": "a", "name": "n"}]) == "n"
    both = "{% for key, value in messages[0].items() %}{{ key ~ value }}{% endfor %}"
    assert filled(both, [{"content": "a", "role": "user"}]) == "contentaroleuser"


def test_outlines_keep_the_limits_of_a_rendering():
    endless = "{% for a in range(90000) %}{% for b in range(90000) %}x{% endfor %}{% endfor %}"
    with pytest.raises(OutOfBounds):
        filled(endless, turns("a"))
    many = "{% for a in range(900) %}{{ messages[0].content }}{% endfor %}"
    assert len(filled(many, turns("a" * 100))) == 90_000
    with pytest.raises(OutOfBounds):
        filled(many, turns("a" * 100_000))
