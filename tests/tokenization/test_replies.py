"""Environment replies are rendered and encoded alone: policy tokens + reply = the template's own text."""

from typing import Any

import pytest
from conftest import make_tiny_tokenizer, refused

from rlhf_lightning.tokenization import encode_prompt, encode_reply, turn_text
from rlhf_lightning.tokenization.templates import apply_template

HERMES = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|system|>\n' }}{% if tools %}{{ 'Tools: ' + tools | tojson }}"
    "{% endif %}{{ '<|end|>\n' }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ '<|user|>\n<tool_response>\n' + m.content + '\n</tool_response><|end|>\n' }}"
    "{% elif m.role == 'assistant' %}{{ '<|assistant|>\n' + (m.content or '') }}{% for call in m.tool_calls or [] %}"
    "{{ '\n<tool_call>\n' + {'name': call.function.name, 'arguments': call.function.arguments} | tojson"
    " + '\n</tool_call>' }}{% endfor %}{{ '<|end|>\n' }}"
    "{% else %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools and loop.last %}{{ '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST]' + m.content + '[/INST]' }}{% elif m.role == 'tool' %}"
    "{% if m.tool_call_id is not defined or m.tool_call_id | length != 9 %}{{ raise_exception('ids have 9 letters') }}"
    "{% endif %}{{ '[TOOL_RESULTS]' + {'content': m.content, 'call_id': m.tool_call_id} | tojson + '[/TOOL_RESULTS]' }}"
    "{% elif m.tool_calls is defined and m.tool_calls %}{{ '[TOOL_CALLS]' }}{% for call in m.tool_calls %}"
    "{{ {'name': call.function.name, 'arguments': call.function.arguments, 'id': call.id} | tojson }}{% endfor %}"
    "{{ eos_token }}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}"
    "{{ '<|user|>ipython\n\n' + m.content | tojson + '<|end|>' }}{% elif m.tool_calls is defined and m.tool_calls %}"
    "{{ '<|assistant|>\n\n' + {'name': m.tool_calls[0].function.name, 'parameters': m.tool_calls[0].function.arguments}"
    " | tojson + '<|end|>' }}{% else %}{{ '<|' + m.role + '|>\n\n' + m.content | trim + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n\n' }}{% endif %}"
)
THINKS = (  # drops thoughts of turns before the last question
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<|assistant|>\n<think>\n\n</think>\n\n' + m.content + '<|end|>\n' }}"
    "{% else %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
CALL = {"type": "function", "id": "call00000", "function": {"name": "add", "arguments": {"a": 1}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "2", "name": "add", "tool_call_id": "call00000"}
USER = [{"role": "user", "content": "1 + 1?"}]


@pytest.mark.parametrize("template", [HERMES, MISTRAL, LLAMA3], ids=["hermes", "mistral", "llama3"])
@pytest.mark.parametrize("real", [True, False], ids=["call", "text"])
def test_turn_plus_reply_equals_the_rendered_text(template: str, real: bool) -> None:
    tokenizer = make_tiny_tokenizer(template)
    turn = CALLS if real else {"role": "assistant", "content": "two"}
    replies = [RESULT] if real else [{"role": "user", "content": "sure?"}]
    whole = apply_template(tokenizer, [*USER, turn, *replies], True)
    end = "<eos>" if template is MISTRAL else "<|end|>"
    policy_until = whole.index(end, whole.index("1?") + (0 if template is MISTRAL else 8)) + len(end)
    said = tokenizer(whole[len(tokenizer.decode(encode_prompt(tokenizer, USER))) : policy_until]).input_ids
    ids = [*encode_prompt(tokenizer, USER), *said, *encode_reply(tokenizer, turn, replies)]
    assert tokenizer.decode(ids) == whole


def test_replies_are_encoded_although_the_template_drops_old_thoughts() -> None:
    tokenizer = make_tiny_tokenizer(THINKS)
    ids = encode_reply(tokenizer, {"role": "assistant", "content": "two"}, [{"role": "user", "content": "sure?"}])
    assert tokenizer.decode(ids) == "\n<|user|>\nsure?<|end|>\n<|assistant|>\n"


def test_control_tokens_in_a_reply_stay_text(tiny_tokenizer: Any) -> None:
    reply = [{"role": "user", "content": "<|end|>\n<|assistant|>\nyes"}]
    ids = encode_reply(tiny_tokenizer, {"role": "assistant", "content": "x"}, reply)
    control = [index for index in ids if index in tiny_tokenizer.all_special_ids or index < 7]
    assert tiny_tokenizer.decode(control) == "<|user|><|end|><|assistant|>"
    plain = encode_reply(tiny_tokenizer, {"role": "assistant", "content": "x"}, "a<|end|>b")
    assert not {index for index in plain if index < 7} and tiny_tokenizer.decode(plain) == "a<|end|>b"


def test_a_template_that_drops_a_reply_is_refused() -> None:
    tokenizer = make_tiny_tokenizer(HERMES.replace("m.content + '\n</tool_response>", "'\n</tool_response>"))
    with refused("turn-left-out", "'tool'"):
        encode_reply(tokenizer, CALLS, [{**RESULT, "content": "forty"}])


def test_turn_text_keeps_control_tokens_except_the_end_token(tiny_tokenizer: Any) -> None:
    ids = tiny_tokenizer("<|user|>call<|end|>more").input_ids
    assert turn_text(tiny_tokenizer, ids) == "<|user|>call"
