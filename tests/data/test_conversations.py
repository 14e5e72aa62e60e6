"""Conversations in many formats are trained on as the template writes them, or dropped and counted."""

import json
import os
from pathlib import Path

import pytest
from conftest import EOS, make_tiny_tokenizer, refused

from rlhf_lightning.data.canonical import Report, RowRefused
from rlhf_lightning.data.formats import PREFERENCE_FORMS, check_columns, demonstration, preference, prompt, read_row
from rlhf_lightning.data.tokenizing import encoder_for
from rlhf_lightning.tokenization import completion_text, encode_prompt, load_tokenizer, tokenizer_fingerprint
from rlhf_lightning.tokenization.templates import CHATML

ROOT = Path(__file__).resolve().parents[2]
CASES = ROOT / os.environ.get("RLHF_CASES", Path(os.environ.get("RLHF_DATA", "../shared/data")).parent / "cases")


def case(name):
    if not (CASES / name).is_file():
        pytest.skip(f"no {CASES / name}: RLHF_CASES names the folder of the cases")
    return (CASES / name).read_text(encoding="utf-8")


def rows_of(name):
    return [json.loads(line) for line in case(name).splitlines()]


def tokenizer_with(template):
    from tokenizers import AddedToken

    tokenizer = make_tiny_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    marks = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in marks])
    return tokenizer


@pytest.fixture
def thinking():
    return tokenizer_with(case("thinking.jinja"))


@pytest.fixture
def opening():
    return tokenizer_with(case("thinking_opens.jinja"))


NESTED = json.loads("[" * 600 + "]" * 600)


def learned(tokenizer, row, kind="sft", **settings):
    """Return the prompt, completions and trained parts of each resulting row, as texts."""
    report = Report()
    found = []
    for outcome in encoder_for(kind, **settings).counted(tokenizer, [row], report):
        for one in outcome.encoded:
            flagged = zip(one.completions, one.supervised, strict=True)
            said = [[i for i, flag in zip(ids, flags, strict=True) if flag] for ids, flags in flagged]
            found.append((tokenizer.decode(one.prompt), *map(tokenizer.decode, [*one.completions, *said])))
    return found, report


def user(content):
    return f"<|im_start|>user\n{content}<|im_end|>\n"


ASKED = user("hi") + "<|im_start|>assistant\n"
ONE, NONE = "<think>\nLet me see.\n</think>\n\nYo.<|im_end|>", "<think>\n\n</think>\n\nYo.<|im_end|>"


def test_a_thought_is_supervised_once_in_every_input_form(thinking, opening):
    inside, without, _, named, _ = rows_of("thoughts.jsonl")
    for row in (inside, named):
        assert learned(thinking, row)[0] == [(ASKED, ONE, ONE)]
        rest = ONE.removeprefix("<think>\n")
        assert learned(opening, row)[0] == [(ASKED + "<think>\n", rest, rest)]
    assert learned(thinking, without)[0] == [(ASKED, NONE, NONE)]
    closed = NONE.removeprefix("<think>\n")
    assert learned(opening, without)[0] == [(ASKED + "<think>\n", closed, closed)]


def test_each_turn_is_trained_with_its_inference_time_context(thinking):
    row = rows_of("thoughts.jsonl")[2]
    first, second = "<think>\nA.\n</think>\n\nYo.<|im_end|>", "<think>\nB.\n</think>\n\nYa.<|im_end|>"
    again = ASKED + "Yo.<|im_end|>\n" + user("and?") + "<|im_start|>assistant\n"
    found, report = learned(thinking, row)
    assert found == [(ASKED, first, first), (again, second, second)]
    assert (report.read, report.kept, report.split) == (1, 1, 1)
    assert "1 became one row for each trained turn" in report.describe("rows")
    assert learned(thinking, row, last_turn_only=True)[0] == [(again, second, second)]


def test_only_the_last_turn_of_a_multi_turn_completion_is_supervised(thinking):
    turns = rows_of("thoughts.jsonl")[2]["messages"]
    other = [*turns[1:3], {"role": "assistant", "content": "No."}]
    ((_, chosen, rejected, said, unsaid),), report = learned(
        thinking, {"prompt": turns[:1], "chosen": turns[1:], "rejected": other}, "preference"
    )
    assert chosen.startswith("Yo.<|im_end|>\n" + user("and?")) and chosen.endswith(said)
    assert said == "<think>\nB.\n</think>\n\nYa.<|im_end|>" and unsaid == "<think>\n\n</think>\n\nNo.<|im_end|>"
    assert report.last_turn == 1 and "only the last turn is trained on" in report.describe("rows")


def test_both_sides_of_a_pair_have_the_inference_time_prompt(thinking):
    row = rows_of("thoughts.jsonl")[4]
    ((asked, chosen, rejected, *_),), _ = learned(thinking, row, "preference")
    assert asked == ASKED + "Yo.<|im_end|>\n" + user("and?") + "<|im_start|>assistant\n"
    assert chosen == "<think>\nB.\n</think>\n\nYa.<|im_end|>"
    assert rejected == "<think>\n\n</think>\n\nNo.<|im_end|>"


def test_a_sampled_thought_is_not_rendered_twice_for_the_scorer(thinking, opening):
    for tokenizer, sampled in ((thinking, ONE), (opening, ONE.removeprefix("<think>\n"))):
        said = completion_text(tokenizer, tokenizer(sampled, add_special_tokens=False)["input_ids"])
        row = {"prompt": [{"role": "user", "content": "hi"}], "completion": said}
        ((_, completion, _),), _ = learned(tokenizer, row)
        assert completion == sampled


def test_tool_calls_are_supervised_and_tools_are_in_the_prompt(thinking):
    for row in rows_of("tools.jsonl"):
        ((asked, _, said),), report = learned(thinking, row)
        assert asked.startswith("<|im_start|>system\nTools: [") and '"name": "add"' in asked
        call = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 1}}</tool_call><|im_end|>'
        assert call in said and said.endswith("2.<|im_end|>") and "tool_response" not in said
        assert report.unused == {}


@pytest.mark.parametrize(
    "call",
    [
        {"name": "add", "arguments": {"a": 1, "b": 1}},
        {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 1}'}},
    ],
)
def test_a_tool_call_is_read_in_every_format(thinking, call):
    asked = {"role": "user", "content": "1+1?"}
    told = [{"role": "assistant", "tool_calls": [call]}]
    by_sharegpt = {"from": "function_call", "value": json.dumps({"name": "add", "arguments": {"a": 1, "b": 1}})}
    for turns in (told, [by_sharegpt], [{"role": "assistant", "content": None, "function_call": call}]):
        ((_, completion, _),), _ = learned(thinking, {"messages": [asked, *turns]})
        assert '{"name": "add", "arguments": {"a": 1, "b": 1}}' in completion


def test_turn_weights_and_train_flags_select_supervised_turns(thinking):
    for row in rows_of("turn_flags.jsonl"):
        ((_, _, said),), _ = learned(thinking, row)
        assert "GOOD" in said and "BAD" not in said
    half = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a", "weight": 0.5}]}
    (outcome,) = encoder_for("sft").outcomes(thinking, [half])
    assert [one.weight for one in outcome.encoded] == [0.5]
    for flag, reason in (({"train": False}, "no_learned_turn"), ({"weight": -1}, "bad_turn_weight")):
        row = {"messages": [half["messages"][0], {"role": "assistant", "content": "a", **flag}]}
        assert learned(thinking, row)[1].dropped == {reason: 1}
    row = {"messages": [{"role": "user", "content": "hi", "train": True}, {"role": "assistant", "content": "a"}]}
    assert learned(thinking, row)[1].dropped == {"trained_turn": 1}


def test_further_columns_are_used_or_the_row_is_dropped(thinking):
    system, history, shared, image = rows_of("further_columns.jsonl")
    brief = "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert learned(thinking, system)[0][0][0] == brief + ASKED
    ((asked, _, said),), _ = learned(thinking, history)
    earlier = user("2+1") + "<|im_start|>assistant\n3<|im_end|>\n"
    assert asked == brief + earlier + user("and now?") + "<|im_start|>assistant\n"
    assert said == "<think>\n\n</think>\n\n4<|im_end|>", "earlier answers are context"
    assert learned(thinking, shared)[0][0][0] == ASKED
    assert learned(thinking, image)[1].dropped == {"media": 1}


def test_unused_columns_and_keys_are_counted(thinking):
    row = {"messages": [{"role": "user", "content": "hi", "id": 3}, {"role": "assistant", "content": "a"}], "source": 1}
    _, report = learned(thinking, row)
    assert report.unused == {"column 'source'": 1, "key 'id' of turns": 1}
    assert "not used: column 'source' (1 rows), key 'id' of turns (1 rows)" in report.describe("rows")
    _, report = learned(thinking, {"prompt": "p", "answer": "4"}, "prompt")
    assert report.unused == {}, "a scorer gets the other columns of prompts"


def test_keys_and_columns_of_other_projects_are_read_or_counted(thinking, tiny_tokenizer):
    asked, said = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
    tool = {"name": "add", "description": "d", "parameters": {"type": "object", "properties": {}}}
    for first in (
        {"role": "system", "content": "", "tools": [tool]},
        {"role": "system", "content": "s", "tools": [tool]},
    ):
        assert '"name": "add"' in learned(thinking, {"messages": [first, asked, said]})[0][0][0]
    assert '"name": "add"' in learned(thinking, {"messages": [asked, said], "functions": [tool]})[0][0][0]
    (outcome,) = encoder_for("sft", prefix="be kind").outcomes(thinking, [{"messages": [asked, said], "tools": [tool]}])
    assert "be kind" in (text := thinking.decode(outcome.encoded[0].prompt)) and '"name": "add"' in text
    part = {"type": "reasoning", "text": "Let me see."}
    row = {"messages": [asked, {"role": "assistant", "content": [part, {"type": "output_text", "text": "Yo."}]}]}
    assert learned(thinking, row)[0] == [(ASKED, ONE, ONE)]
    _, report = learned(thinking, {"messages": [{**asked, "reasoning": "why"}, said], "source": None, "id": ""})
    assert report.unused == {"column 'id'": 1, "key 'reasoning' of turns": 1}
    earlier = {"prompt": "two?", "completion": "2", "system": [{"type": "text", "text": "be kind"}]}
    for history in ("", "[]", '[["one?", "1"]]'):
        ((text, *_),), _ = learned(tiny_tokenizer, {**earlier, "history": history})
        assert text.startswith("<|system|>\nbe kind<|end|>\n") and ("one?" in text) == ("one?" in history)


def test_null_columns_of_another_format_are_ignored(tiny_tokenizer):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    row = {"messages": None, "prompt": "hi", "completion": "yo"}
    assert demonstration(row).completions == ["yo"]
    assert demonstration({"messages": turns, "prompt": None, "completion": None}).prompt == turns[:1]
    assert demonstration({"messages": None, "conversations": turns}).prompt == turns[:1]
    with pytest.raises(RowRefused):  # an incomplete format does not fall back to another format
        demonstration({"prompt": "hi", "completion": None, "text": "hi yo"})
    assert learned(tiny_tokenizer, {**row, "source": None})[1].unused == {}


def test_a_prompt_must_match_its_whole_conversations():
    brief, asked = {"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}
    chosen, rejected = ({"role": "assistant", "content": said} for said in "ab")

    def prompt_with(given, *before):
        return preference({"prompt": given, "chosen": [*before, chosen], "rejected": [*before, rejected]}).prompt

    for given in ("hi", None, "Human: hi", [asked]):
        assert prompt_with(given, asked) == [asked]
        assert prompt_with(given, brief, asked) == [brief, asked]
    assert prompt_with([brief, asked], asked) == [brief, asked]
    for given in ("another", [brief], [asked, chosen]):
        with pytest.raises(RowRefused) as refusal:
            prompt_with(given, asked)
        assert refusal.value.code == "prompts_differ"


def test_turn_weights_in_pairs_must_be_0_or_1(tiny_tokenizer):
    row = {"prompt": [{"role": "user", "content": "hi"}], "rejected": [{"role": "assistant", "content": "b"}]}
    for weight, dropped in ((1, {}), (0.5, {"bad_turn_weight": 1})):
        chosen = [{"role": "assistant", "content": "a", "weight": weight}]
        assert learned(tiny_tokenizer, {**row, "chosen": chosen}, "preference")[1].dropped == dropped


def test_turns_that_a_template_drops_are_detected(tiny_tokenizer):
    silent = tokenizer_with(
        "{% for m in messages if m.role in ('user', 'assistant') %}{{ m.role + ': ' + m.content + '<|im_end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    asked, said = {"role": "user", "content": "sum?"}, {"role": "assistant", "content": "sum is 7"}
    brief, told = {"role": "system", "content": "s"}, {"role": "tool", "content": "7"}
    for turns in ([brief, asked, said], [asked, told, said]):
        assert learned(silent, {"messages": turns})[1].dropped == {"turn_left_out": 1}
        assert learned(tiny_tokenizer, {"messages": turns})[1].kept == 1


def test_json_text_is_parsed_only_if_the_whole_row_is_json_text(thinking):
    (row,) = rows_of("json_text.jsonl")
    ((asked, chosen, *_),), _ = learned(thinking, row, "preference")
    assert asked == ASKED and chosen == NONE.replace("Yo", "yo").replace("yo.", "yo")
    for broken in ({**row, "chosen": "plain"}, {**row, "prompt": row["prompt"][:-1]}, {**row, "prompt": "[{'role': "}):
        assert learned(thinking, broken, "preference")[1].dropped == {"json_text": 1}
    assert learned(thinking, {"prompt": row["prompt"]}, "prompt")[1].dropped == {"json_text": 1}, (
        "it may be a quotation"
    )
    assert learned(thinking, {"messages": row["prompt"][:-1] + ', {"role": "assistant", "content": "yo"}]'})[0]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [{"role": "user", "content": "hi"}], "system": 3}, "no_assistant_turn"),
        ({"prompt": "p", "completion": "c", "tools": [{"name": "f"}]}, "tools_without_messages"),
        ({"prompt": "p", "completion": "c", "tools": "nonsense"}, "bad_tool_call"),
        ({"prompt": "p", "completion": "c", "tools": [{"function": "f"}]}, "bad_tool_call"),
        ({"prompt": "p", "completion": "c", "tools": [{"name": "f", "parameters": NESTED}]}, "too_deep"),
        ({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": 5}]}, "bad_tool_call"),
        ({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": "5"}]}, "bad_tool_call"),
        ({"messages": [{"role": "user", "content": "hi"}, {"from": "function_call", "value": "5"}]}, "bad_tool_call"),
        ({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [
            {"name": "f", "arguments": {"a": NESTED}}]}]}, "too_deep"),
        ({"prompt": "p", "completion": "c", "history": "before"}, "bad_history"),
        ({"prompt": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], "completion": "c",
          "system": "d"}, "two_systems"),
        ({"messages": [{"role": "user", "content": "hi", "tool_calls": [{"name": "f"}]}]}, "bad_tool_call"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "media"),
        ({"messages": [{"role": "user", "content": "hi", "images": ["a.png"]}]}, "media"),
        ({"messages": [{"role": "user", "content": [{"type": "document", "text": "a"}]}]}, "malformed_messages"),
        ({"messages": [{"role": "user", "content": "hi"}], "system": {"role": "system"}}, "no_assistant_turn"),
        ({"prompt": "p", "completion": "c", "system": {"content": "be brief"}}, "malformed_messages"),
        ({"prompt": "p", "completion": "c", "history": "[1]"}, "bad_history"),
        ({"prompt": [{"role": "user", "content": "hi", "tools": [{"name": "f"}]}], "completion": "c",
          "tools": [{"name": "g"}]}, "bad_tool_call"),
        ({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a",
          "tools": [{"name": "f"}]}]}, "bad_tool_call"),
        ({"prompt": "p", "completion": [{"role": "assistant", "content": "a", "tools": [{"name": "f"}]}]},
         "bad_tool_call"),
    ],
)  # fmt: skip
def test_ambiguous_rows_are_refused(row, reason):
    with pytest.raises(RowRefused) as refusal:
        read_row(row, demonstration)
    assert refusal.value.code == reason


def test_a_thought_after_a_closed_thinking_block_is_refused():
    tokenizer = tokenizer_with(case("thinking.jinja"))
    tokenizer.init_kwargs["template_args"] = {"enable_thinking": False}
    inside, without, *_ = rows_of("thoughts.jsonl")
    assert learned(tokenizer, inside)[1].dropped == {"thought_closed": 1}
    assert learned(tokenizer, without)[0] == [(ASKED + "<think>\n\n</think>\n\n", "Yo.<|im_end|>", "Yo.<|im_end|>")]


def test_a_template_that_ignores_thoughts_or_tools_drops_the_row(tiny_tokenizer):
    named, tools = rows_of("thoughts.jsonl")[3], rows_of("tools.jsonl")[0]
    assert learned(tiny_tokenizer, named)[1].dropped == {"thought_left_out": 1}
    assert learned(tiny_tokenizer, tools)[1].dropped == {"tool_calls_left_out": 1}
    described = {**tools, "messages": [tools["messages"][0], tools["messages"][3]]}
    assert learned(tiny_tokenizer, described)[1].dropped == {"tools_left_out": 1}


def test_leading_assistant_turns_are_not_supervised():
    tokenizer = tokenizer_with(CHATML)
    texts = ("Hail!", "Who?", "A knight.", "Why?", "Honour.")
    turns = [{"role": ("assistant", "user")[n % 2], "content": text} for n, text in enumerate(texts)]
    ((asked, _, said),), report = learned(tokenizer, {"messages": turns})
    assert asked == tokenizer.apply_chat_template(turns[:2], tokenize=False, add_generation_prompt=True)
    assert said == "A knight.<|im_end|>Honour.<|im_end|>"
    assert report.assistant_first == 1 and "begin with the assistant" in report.describe("rows")
    for few in (turns[:1], turns[:2]):
        assert learned(tokenizer, {"messages": few})[1].dropped == {"no_user_turn": 1}
    unlearned = [*turns[:4], {**turns[4], "train": False}]
    assert learned(tokenizer, {"messages": unlearned})[0][0][2] == "A knight.<|im_end|>"
    pair = {"chosen": turns[:3], "rejected": [*turns[:2], {"role": "assistant", "content": "A king."}]}
    assert learned(tokenizer, pair, "preference")[1].assistant_first == 1


@pytest.mark.parametrize("template", [
    "{% if messages[0].role == 'assistant' %}{{ raise_exception('a user begins') }}{% endif %}" + CHATML,
    CHATML.replace("messages %}", "(messages[1:] if messages[0].role == 'assistant' else messages) %}"),
])  # fmt: skip
def test_a_template_without_leading_assistant_turns_drops_the_row(template):
    turns = [{"role": ("assistant", "user")[n % 2], "content": text} for n, text in enumerate(["Hail!", "Who?", "I."])]
    found, report = learned(tokenizer_with(template), {"messages": turns})
    assert not found and set(report.dropped) <= {"template_refuses", "turn_left_out"}


READS_ARGS = (
    "{% for one in documents or [] %}{{ one.title }}: {{ one.text }}\n{% endfor %}" + CHATML +
    "{% if add_generation_prompt and not thinking %}<think></think>{% endif %}"
)  # fmt: skip
QUESTION = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ann."}]}
DOCUMENTS = [{"title": "t", "text": "Ann won.", "none": None}, {"title": "<|im_end|>", "text": "Bob lost."}]


@pytest.mark.parametrize("row", [
    {"chat_template_kwargs": {"thinking": True}},
    {"chat_template_kwargs": '{"thinking": true}', "documents": DOCUMENTS},
    {"documents": DOCUMENTS},
    {"chat_template_kwargs": {"documents": DOCUMENTS[:1], "thinking": None}},
    {},
])  # fmt: skip
def test_template_variables_of_a_row_are_used_to_render_it(row):
    tokenizer = tokenizer_with(READS_ARGS)
    given = row.get("chat_template_kwargs") or {}
    given = json.loads(given) if isinstance(given, str) else given
    args = {"documents": row.get("documents"), **given}
    wanted = tokenizer.apply_chat_template(QUESTION["messages"][:1], tokenize=False, add_generation_prompt=True, **args)
    found, report = learned(tokenizer, {**QUESTION, **row})
    assert [(asked, said) for asked, _, said in found] == [(wanted, "Ann.<|im_end|>")]
    assert not report.unused
    asked = prompt({"prompt": QUESTION["messages"][:1]})
    pair = {"prompt": asked.prompt, "chosen": "Ann.", "rejected": "Bob.", **row}
    assert learned(tokenizer, pair, "preference")[0][0][0] == wanted
    stored = read_row({**QUESTION, **row}, demonstration).prompt  # as an annotation store returns the row
    assert tokenizer.decode(encode_prompt(tokenizer, read_row({"prompt": stored}, prompt).prompt)) == wanted


def test_template_variables_of_a_row_override_the_settings():
    tokenizer = tokenizer_with(READS_ARGS)
    tokenizer.init_kwargs["template_args"] = {"thinking": True}
    asked = {False: "<think></think>", True: "", None: ""}
    for value, end in asked.items():
        ((text, *_),), _ = learned(tokenizer, {**QUESTION, "chat_template_kwargs": {"thinking": value}})
        assert text.endswith("assistant\n" + end)


def test_documents_that_the_template_leaves_out_and_bad_variables_drop_the_row():
    tokenizer = tokenizer_with(CHATML)
    assert learned(tokenizer, {**QUESTION, "documents": DOCUMENTS})[1].dropped == {"documents_left_out": 1}
    for bad in ([1], "{", {"tools": []}, {"chat_template": "x"}, {"documents": "text"}, {"messages": []}):
        report = learned(tokenizer, {**QUESTION, "chat_template_kwargs": bad})[1]
        assert report.dropped == {"bad_template_args": 1}, bad
    both = {"chat_template_kwargs": {"documents": DOCUMENTS}, "documents": DOCUMENTS[:1]}
    assert learned(tokenizer, {**QUESTION, **both})[1].dropped == {"bad_template_args": 1}
    for row in ({**QUESTION, "documents": ["a.pdf"]}, {"prompt": "p", "completion": "c", "documents": DOCUMENTS}):
        assert learned(tokenizer, row)[1].unused == {"column 'documents'": 1}


def test_preference_formats_of_other_projects_are_read():
    wanted = ([{"role": "user", "content": "p"}], [[{"role": "assistant", "content": one}] for one in "cr"])
    shared = {"conversations": [{"from": "human", "value": "p"}], "chosen": {"from": "gpt", "value": "c"},
              "rejected": {"from": "gpt", "value": "r"}}  # fmt: skip
    found = preference(shared)
    assert (found.prompt, found.completions) == wanted
    found = preference({"instruction": "i", "input": "x", "chosen": "The c", "rejected": "The r"})
    assert (found.prompt, found.completions) == ("i\n\nx", ["The c", "The r"])
    assert prompt({"conversations": shared["conversations"]}).prompt == wanted[0]
    with refused("no-accepted-form", "Did you mean 'prompt' by 'question'?"):
        check_columns(["question", "chosen", "rejected"], PREFERENCE_FORMS, "pairs.jsonl")
    with pytest.raises(ValueError) as error:
        check_columns(["conversations"], PREFERENCE_FORMS, "pairs.jsonl")
    assert "Did you mean" not in str(error.value)


# ---- template_args --------------------------------------------------------------------------------------------------

DATED = (
    "{{ strftime_now('%d %b %Y') + ' ' }}{% if x %}{{ x }}{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
)


def test_template_args_apply_to_every_rendering_and_are_saved(tmp_path):
    make_tiny_tokenizer(DATED).save_pretrained(tmp_path)
    asked = [{"role": "user", "content": "hi"}]

    def text(tokenizer):
        return tokenizer.decode(encode_prompt(tokenizer, asked))

    plain = load_tokenizer(tmp_path)
    given = load_tokenizer(tmp_path, template_args={"x": "X ", "now": "2026-11-29"})
    assert text(plain) == "01 Jan 2025 hi" and text(given) == "29 Nov 2026 X hi"
    assert tokenizer_fingerprint(plain) != tokenizer_fingerprint(given)
    given.save_pretrained(tmp_path / "next")
    later = load_tokenizer(tmp_path / "next")
    assert text(later) == text(given) and tokenizer_fingerprint(later) == tokenizer_fingerprint(given)
    assert text(load_tokenizer(tmp_path / "next", template_args={"x": None})) == "29 Nov 2026 hi"
    with refused("reserved-template-arg", "'messages'"):
        load_tokenizer(tmp_path, template_args={"messages": []})
    with refused("bad-template-date", "'yesterday'"):
        load_tokenizer(tmp_path, template_args={"now": "yesterday"})


def test_no_space_is_added_before_an_answer():
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", "▁", "\n", *"abcdefghijklmnopqrstuvwxyz:.▁"]
    backend = Tokenizer(models.Unigram([(piece, -1.0) for piece in dict.fromkeys(pieces)], unk_id=0))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    template = "{% for m in messages %}{{ m.role + ':\n' + m.content + eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=template, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    for row in ({"messages": messages}, {"prompt": "a:\n", "completion": "yo"}):
        (outcome,) = encoder_for("sft").outcomes(tokenizer, [row])
        (one,) = outcome.encoded
        assert tokenizer.convert_ids_to_tokens(one.completions[0]) == ["y", "o", "</s>"]
        joint = tokenizer("a:\nyo", add_special_tokens=False)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(joint)[-2:] == ["y", "o"]
        assert not outcome.merged


def test_tokens_merged_across_the_prompt_boundary_are_counted(tiny_tokenizer):
    (outcome,) = encoder_for("sft").outcomes(tiny_tokenizer, [{"prompt": "ab", "completion": "c"}])
    assert outcome.merged, "the tokenizer has a token for 'bc'"
    found, report = learned(tiny_tokenizer, {"prompt": "a", "completion": "c"})
    assert report.merged == 0 and tiny_tokenizer.eos_token_id == EOS and found


def test_at_most_256_turns_of_a_conversation_are_supervised(thinking):
    turns = [{"role": ("user", "assistant")[place % 2], "content": "a"} for place in range(514)]
    found, report = learned(thinking, {"messages": turns})
    assert report.turns_cut == report.kept == 1 and not report.dropped
    assert "the later turns are left out" in report.describe("x") and report.metrics["data/turns_cut"] == 1
    assert found == learned(thinking, {"messages": turns[:512]})[0]
    assert learned(thinking, {"messages": turns}, last_turn_only=True, max_length=64)[1].turns_cut == 0


def test_both_sides_of_pairs_over_256_turns_are_truncated_alike(tiny_tokenizer, thinking):
    turns = [{"role": ("user", "assistant")[place % 2], "content": f"a{place}"} for place in range(514)]
    pair = {"prompt": turns[:1], "chosen": turns[1:], "rejected": turns[1:2]}
    found, report = learned(tiny_tokenizer, pair, kind="preference")
    assert report.turns_cut == report.kept == 1 and report.last_turn == 0
    assert found == learned(tiny_tokenizer, {**pair, "chosen": turns[1:512]}, kind="preference")[0]
    found, report = learned(thinking, pair, kind="preference")  # earlier turns are rendered differently
    assert report.last_turn == report.kept == 1 and report.turns_cut == 0
    assert found[0][3] == "<think>\n\n</think>\n\na513<|im_end|>"


def test_special_token_thought_tags_stay_in_the_text(thinking):
    tokenizer = tokenizer_with(case("thinking.jinja"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    ids = tokenizer(ONE, add_special_tokens=False)["input_ids"]
    assert completion_text(tokenizer, ids) == ONE.removesuffix("<|im_end|>")
    assert learned(tokenizer, rows_of("thoughts.jsonl")[0])[0] == [(ASKED, ONE, ONE)]
