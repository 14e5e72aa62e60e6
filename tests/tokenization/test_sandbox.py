"""Chat templates with endless loops, gigabytes of output or unsafe access are refused in one plain line."""

import threading
import time

import pytest
from conftest import TEMPLATE, make_tiny_tokenizer, spell

from rlhf_lightning.tokenization import ChatTemplateError, TurnsRefused, encode_prompt, sandbox

USER = [{"role": "user", "content": "hi"}]
DOUBLING = (
    "{{% set ns = namespace(x={start}) %}}{{% for i in range(99) %}}{{% set ns.x = {more} %}}{{% endfor %}}"
    "{{{{ ns.x }}}}"
)


def refusal(template, turns=USER):
    with pytest.raises(ChatTemplateError) as refused:
        encode_prompt(make_tiny_tokenizer(template), turns)
    return refused


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 'x' * 10 ** 12 }}", "it generates too much text"),
        ("{{ 9 ** 9 ** 9 }}", "it computes too large a number"),
        (DOUBLING.format(start="'ab'", more="ns.x ~ ns.x"), "it generates too much text"),
        (DOUBLING.format(start="'ab'", more="ns.x + ns.x"), "it generates too much text"),
        (DOUBLING.format(start="[1]", more="ns.x + ns.x"), "too "),
        (DOUBLING.format(start="3", more="ns.x * ns.x"), "it computes too large a number"),
        ("{{ '{:1000000000}'.format(1) }}", "unreasonable width"),
        ("{{ '{:{}}'.format(1, 10 ** 9) }}", "unreasonable width"),
        ("{{ '%1000000000d' % 1 }}", "unreasonable width"),
        ("{{ ('a' * 100000).replace('a', 'b' * 100000) }}", "it generates too much text"),
        ("{{ ('b' * 100000).join('a' * 100000) }}", "it generates too much text"),
        ("{{ ('a' * 100000) | join('b' * 100000) }}", "it generates too much text"),
        (
            "{% set x = 'a' * 99999 %}{% set y %}{% for i in range(9999) %}{{ x }}{% endfor %}{% endset %}",
            "too much text",
        ),
        ("{% set x %}aaaaaaaa{% endset %}" + "{% set x %}{{ x * 8 }}{% endset %}" * 12, "it generates too much text"),
        ("{{ 'x' | center(10 ** 10) }}", "No filter named 'center'"),
        ("{{ 'x'.center(10 ** 10) }}", "access to attribute 'center'"),
        ("{{ (1).to_bytes(10 ** 10, 'big') }}", "access to attribute 'to_bytes'"),
        ("{{ 'a'.encode() }}", "access to attribute 'encode'"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__'"),
        ("{{ raise_exception.__globals__.os }}", "access to attribute '__globals__'"),
        ("{% set ns = namespace(__class__=1) %}", "no attribute '__class__'"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "no attribute '__class__'"),
        ("{% include '/etc/passwd' %}", "it asks for another file"),
        ("{% import 'x' as y %}", "it asks for another file"),
        ("{% for %}", "Expected an expression"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("x" * (1 << 21), "it is too long"),
    ],
)
def test_unsafe_templates_are_refused(template, reason):
    refused = refusal(template)
    assert reason in str(refused.value) and str(refused.value).count("\n") == 0
    assert refused.type is ChatTemplateError, "it is the template that is refused, not one row"


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n - 1) if n else '' }}{{ f(n - 1) if n else '' }}{% endmacro %}{{ f(90) }}",
        "{% set b = 'a' * 2000000 %}{% for i in range(100000) %}{% if 'ab' in b %}{% endif %}{% endfor %}",
    ],
)
def test_an_endless_template_is_stopped(template, monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 0.1)
    before, threads = time.process_time(), threading.active_count()
    assert "it runs for too long" in str(refusal(template).value)
    assert time.process_time() - before < 2 and threading.active_count() == threads


def test_a_timeout_on_a_long_conversation_refuses_only_its_row(monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", -1000.0)
    template = TEMPLATE + "{# refused for good #}"
    assert refusal(template, USER * 2000).type is TurnsRefused
    assert refusal(template, USER * 100).type is ChatTemplateError


LOOP = "{% for a in range(99999) %}{% endfor %}"


@pytest.mark.parametrize("loops", [LOOP * 4, "{% for b in range(99999) %}" + LOOP + "{% endfor %}"])
def test_the_time_limit_covers_the_whole_template_analysis(loops, monkeypatch):
    """Analysing a template renders it a dozen times before it is used; the time limit covers all of this."""
    monkeypatch.setattr(sandbox, "SECONDS", 0.3)
    template = loops + TEMPLATE
    before = time.process_time()
    for _ in range(3):
        assert "runs for too long" in str(refusal(template).value)
    assert time.process_time() - before < 1.5


def test_features_that_chat_templates_use_are_available():
    template = (
        "{%- set ns = namespace(found=false, texts=[]) -%}{%- macro said(m) -%}{{ m.content | trim }}{%- endmacro -%}"
        "{%- for m in messages -%}{%- if not ns.found and m['role'] in ['user', 'tool'] -%}{%- set ns.found = true -%}"
        "{%- endif -%}{%- set ns.texts = ns.texts + [said(m)] -%}"
        "{%- generation -%}{{ m.role.upper() ~ ':' ~ loop.index0 ~ loop.last }}{%- endgeneration -%}"
        "{%- if m.get('x') is none and m.content is string -%}{{ m.content.split('b')[-1].lstrip('\\n') }}{%- endif -%}"
        "{%- if loop.index0 == 1 -%}{%- break -%}{%- endif -%}{%- endfor -%}"
        "{{ ns.texts | join('-') }}{{ {'a': [1, 'é']} | tojson }}{{ messages[0:1] | length }}"
        "{{ dict(a=1).items() | list }}"
        "{{ '%02d' % 7 }}{{ '{}!'.format('y') }}{{ 'a\\nb' | indent(2) }}{{ ' ' * 3 }}{{ tools is none }}"
    )
    said = (("user", " abc "), ("assistant", "d"), ("user", "e"))
    turns = [{"role": role, "content": content} for role, content in said]
    wanted = 'USER:0Falsec ASSISTANT:1Falsedabc-d{"a": [1, "é"]}1[(\'a\', 1)]07y!a\n  b   True'
    tokenizer = make_tiny_tokenizer(template)
    assert sandbox.render(template, turns) == wanted
    assert tokenizer.apply_chat_template(turns, tokenize=False) == wanted


def test_each_thread_has_its_own_time_budget():
    found = []

    def render():
        for _ in range(20):
            found.append(encode_prompt(tokenizer, USER))

    tokenizer = make_tiny_tokenizer()
    others = [threading.Thread(target=render) for _ in range(2)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert len(found) == 40 and all(ids == found[0] for ids in found)


def test_a_continued_turn_ends_where_its_text_ends():
    """The template writes the closing word of the turn again after the turn's end."""
    turns = [*USER, {"role": "assistant", "content": "the end"}]
    ids = encode_prompt(make_tiny_tokenizer(), turns)
    assert ids[-7:] == spell("the end")
