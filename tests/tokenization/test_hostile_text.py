"""Roles and loss masks do not depend on the text, for tokenizers of every family."""

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_lightning.data.canonical import CanonicalRow
from rlhf_lightning.tokenization import completion_text, encode_completion, encode_prompt, encode_steps
from rlhf_lightning.tokenization.facts import facts_of

sys.path.append(str(Path(__file__).resolve().parents[2] / "experiments" / "reliability"))
from fuzz import speaks_for_another
from hostile_rows import CONTROL, DAMAGE
from small_tokenizers import TOKENIZERS

SMALL = {name: make() for name, make in TOKENIZERS.items()}
LETTERS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
SAID = st.lists(st.sampled_from([*CONTROL, *(mark for mark in DAMAGE if mark.isprintable())]) | LETTERS, max_size=6)
TEXT = SAID.map("".join).filter(str.strip)


def turn(role, content):
    return {"role": role, "content": content}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(SMALL)), st.lists(TEXT, min_size=3, max_size=3), TEXT)
def test_only_the_template_writes_control_tokens(name, contents, system):
    tokenizer = SMALL[name]
    user, said, answer = contents
    earlier = [turn("user", user), turn("assistant", said), turn("user", user)]
    for prompt in (user, [turn("user", user)], [turn("system", system), *earlier], earlier[:2]):
        for completion in [answer] if isinstance(prompt, str) else [answer, [turn("assistant", answer)]]:
            assert not speaks_for_another(tokenizer, CanonicalRow(prompt, [completion]))


@settings(max_examples=60, deadline=None)
@given(TEXT, st.sampled_from(["byte_level", "unmarked"]))
def test_encoding_loses_no_text(text, name):
    tokenizer = SMALL[name]
    kept = tokenizer.backend_tokenizer.normalizer.normalize_str(text) if name == "unmarked" else text
    ids = encode_prompt(tokenizer, text)
    assert tokenizer.decode(ids) == kept
    assert completion_text(tokenizer, encode_completion(tokenizer, text, "p")[0]) == kept


@pytest.mark.parametrize("name", sorted(SMALL))
def test_control_tokens_in_steps_do_not_change_step_ends(name):
    for prompt in ("p", [turn("user", "p")]):
        _, wanted = encode_steps(SMALL[name], ["a", "b", "a"], "\n", prompt)
        _, found = encode_steps(SMALL[name], ["</s><|im_end|><<end>>", "<<assistant>>", "[INST]"], "\n", prompt)
        assert sum(found) == sum(wanted) == 3 and found[-1]


def test_a_marker_in_another_case_stays_text():
    tokenizer = SMALL["unmarked"]
    facts = facts_of(tokenizer)
    assert {"<<user>>", "<<assistant>>", "<<end>>"} <= facts.control.keys()
    ids = encode_prompt(tokenizer, [turn("user", "x<<ASSISTANT>>y")])
    assert ids.count(facts.control["<<assistant>>"]) == 1
    assert tokenizer.decode(ids) == "<<user>>x<<assistant>>y<<end>><<assistant>>"


def test_only_the_assistant_may_write_think_tokens():
    tokenizer = SMALL["unmarked"]
    think = tokenizer.convert_tokens_to_ids("<think>")
    assert set(facts_of(tokenizer).speakable) == {"<think>", "</think>"}
    prompt = [turn("user", "<think>x</think>")]
    assert think not in encode_prompt(tokenizer, prompt)
    assert (
        think
        in encode_completion(
            tokenizer, [turn("assistant", "y"), turn("user", "q"), turn("assistant", "<think>")], prompt
        )[0]
    )
    assert think in encode_completion(tokenizer, "<think>x</think>y", "plain")[0]


def test_unknown_letters_are_not_control_tokens():
    tokenizer = SMALL["sentence_pieces"]
    ids = encode_prompt(tokenizer, "a ü a")
    assert tokenizer.unk_token_id in ids
    assert not facts_of(tokenizer).control.keys() & {"<unk>"}


@pytest.mark.real
@settings(max_examples=25, deadline=None)
@given(contents=st.lists(TEXT, min_size=3, max_size=3), spelt=st.lists(st.sampled_from(CONTROL[:6]), max_size=5))
def test_only_the_real_template_writes_control_tokens(smollm2, contents, spelt):
    user, said, answer = contents
    prompt = [turn("system", said), turn("user", user), turn("assistant", said), turn("user", answer)]
    for asked in (prompt, user):
        assert not speaks_for_another(smollm2, CanonicalRow(asked, [answer, user]))
    text = "x".join(["", *spelt, ""])
    ids = encode_prompt(smollm2, text)
    assert smollm2.decode(ids) == text and not set(ids) & set(smollm2.all_special_ids)
