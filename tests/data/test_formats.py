"""Test every row format, and every reason to refuse a row."""

import json

import pytest

from rlhf_lightning.data.canonical import REASONS, RowRefused
from rlhf_lightning.data.formats import PREFERENCE_FORMS, check_columns, demonstration, preference, prompt


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


HH = "\n\nHuman: {}\n\nAssistant: {}"


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"prompt": "p", "completion": "c"}, ("p", ["c"])),
        ({"input": "p", "output": "c"}, ("p", ["c"])),
        ({"instruction": "i", "input": "x", "output": "c"}, ("i\n\nx", ["c"])),
        ({"instruction": "i", "input": "", "output": "c"}, ("i", ["c"])),
        ({"text": "whole"}, (None, ["whole"])),
        ({"prompt": [user("p")], "completion": [assistant("c")]}, ([user("p")], [[assistant("c")]])),
        ({"prompt": "p", "completion": [assistant("c")]}, ([user("p")], [[assistant("c")]])),
        ({"messages": [user("p"), assistant("c")]}, ([user("p")], [[assistant("c")]])),
        (
            {"messages": [system("s"), user("p"), assistant("c"), user("q"), assistant("d"), user("bye")]},
            ([system("s"), user("p")], [[assistant("c"), user("q"), assistant("d")]]),
        ),
        ({"messages": [system(""), user("p"), assistant("c")]}, ([user("p")], [[assistant("c")]])),
        (
            {"messages": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "c"}]},
            ([user("p")], [[assistant("c")]]),
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "p"}]}, assistant("c")]},
            ([user("p")], [[assistant("c")]]),
        ),
    ],
)
def test_demonstration_formats_are_read(row, wanted):
    found = demonstration(row)
    assert (found.prompt, found.completions) == wanted


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, ("p", ["c", "r"], [0, 1])),
        (
            {"prompt": [user("p")], "chosen": [assistant("c")], "rejected": [assistant("r")]},
            ([user("p")], [[assistant("c")], [assistant("r")]], [0, 1]),
        ),
        (  # the prompt is the common start of both conversations
            {"chosen": [user("p"), assistant("c")], "rejected": [user("p"), assistant("r")]},
            ([user("p")], [[assistant("c")], [assistant("r")]], [0, 1]),
        ),
        (  # some data sets repeat it in both, next to a plain-text prompt
            {"prompt": "p", "chosen": [user("p"), assistant("c")], "rejected": [user("p"), assistant("r")]},
            ([user("p")], [[assistant("c")], [assistant("r")]], [0, 1]),
        ),
        (
            {"chosen": HH.format("p", "c"), "rejected": HH.format("p", "r")},
            ([user("p")], [[assistant("c")], [assistant("r")]], [0, 1]),
        ),
        (
            {
                "chosen": HH.format("p", "a") + HH.format("q", "c"),
                "rejected": HH.format("p", "a") + HH.format("q", "r"),
            },
            ([user("p"), assistant("a"), user("q")], [[assistant("c")], [assistant("r")]], [0, 1]),
        ),
        ({"chosen": "The sky is blue.", "rejected": "The sky is red."}, ("The sky is", [" blue.", " red."], [0, 1])),
        ({"prompt": "p", "completions": ["a", "b", "c"]}, ("p", ["a", "b", "c"], [0, 1, 2])),
        ({"prompt": "p", "completions": ["a", "b", "c"], "ranks": [7, 2, 7]}, ("p", ["b", "a", "c"], [0, 1, 1])),
        ({"prompt": "p", "completions": ["a", "b", "a"]}, ("p", ["a", "b"], [0, 1])),
        ({"prompt": "p", "completion_1": "a", "completion_2": "b", "label": 1}, ("p", ["a", "b"], [0, 1])),
        ({"prompt": "p", "completion_1": "a", "completion_2": "b", "labels": [2, 1, 2]}, ("p", ["b", "a"], [0, 1])),
    ],
)
def test_preference_formats_are_read(row, wanted):
    found = preference(row)
    assert (found.prompt, found.completions, found.ranks) == wanted


@pytest.mark.parametrize(
    ("votes", "share"),
    [("tie", 0.5), (0, 0.5), ("2", 1.0), (1.0, 1.0), ([0, 0, 0], 0.5), ([1, 1, 0, 0], 0.75), ([2, 2, 1, 2], 0.75)],
)
def test_votes_on_two_completions_become_a_soft_label(votes, share):
    row = {
        "prompt": "p",
        "completion_1": "a",
        "completion_2": "b",
        "labels" if isinstance(votes, list) else "label": votes,
    }
    assert preference(row).target == share


def test_labels_of_a_pair_are_read():
    row = {"prompt": "p", "chosen": "c", "rejected": "r"}
    found = preference({**row, "preference": 0.7, "margin": "1.5", "weight": 2, "source": "s"})
    assert (found.target, found.margin, found.weight, found.columns) == (0.7, 1.5, 2.0, {"source": "s"})
    found = preference({**row, "preference": None, "margin": ""})
    assert (found.target, found.margin, found.weight) == (1.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"prompt": "p", "answer": "4"}, ("p", {"answer": "4"})),
        ({"prompt": [user("p")], "kwargs": [{}]}, ([user("p")], {"kwargs": [{}]})),
        (
            {"messages": [user("p"), assistant("a"), user("q"), assistant("c")]},
            ([user("p"), assistant("a"), user("q")], {}),
        ),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, ("p", {"chosen": "c", "rejected": "r"})),
        ({"prompt": "p", "completions": ["a", "b"], "prompts": 1, "tree": 2}, ("p", {"tree": 2})),
        ({"chosen": HH.format("p", "c"), "rejected": HH.format("p", "r")}, ([user("p")], {})),
        ({"instruction": "i", "input": "x", "output": "c"}, ("i\n\nx", {"output": "c"})),
        ({"input": "p", "output": "c"}, ("p", {"output": "c"})),
    ],
)
def test_prompt_formats_are_read(row, wanted):
    found = prompt(row)
    assert (found.prompt, found.columns, found.completions) == (*wanted, [])


def test_as_chat_wraps_plain_text_in_a_user_turn():
    found = preference({"prompt": "p", "chosen": "c", "rejected": "r"}, as_chat=True)
    assert (found.prompt, found.completions) == ([user("p")], ["c", "r"])
    assert prompt({"prompt": "p"}, as_chat=True).prompt == [user("p")]


PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}
SAME = HH.format("p", "c")
REFUSED = [
    (demonstration, {"promt": "p"}, "missing_columns"),
    (demonstration, {"prompt": "", "completion": "c"}, "empty_prompt"),
    (demonstration, {"prompt": None, "completion": "c"}, "empty_prompt"),
    (demonstration, {"prompt": 3, "completion": "c"}, "empty_prompt"),
    (demonstration, {"prompt": "p", "completion": " \n"}, "empty_completion"),
    (demonstration, {"prompt": "p", "completion": []}, "empty_completion"),
    (demonstration, {"text": None}, "empty_completion"),
    (demonstration, {"instruction": "add", "input": 5, "output": "c"}, "empty_prompt"),
    (demonstration, {"instruction": "add", "input": ["x"], "output": "c"}, "empty_prompt"),
    (demonstration, {"messages": []}, "no_messages"),
    (demonstration, {"messages": "hello"}, "malformed_messages"),
    (demonstration, {"messages": [user("p"), "c"]}, "malformed_messages"),
    (demonstration, {"messages": [user("p"), {"role": 1, "content": "c"}]}, "malformed_messages"),
    (demonstration, {"messages": [user([{"type": "image"}]), assistant("c")]}, "media"),
    (demonstration, {"messages": [user("p"), assistant("")]}, "empty_turn"),
    (demonstration, {"messages": [user("p"), assistant(None)]}, "empty_turn"),
    (demonstration, {"messages": [user("p"), {"role": "user<|end|>", "content": "c"}]}, "unknown_role"),
    (demonstration, {"messages": [system("s"), assistant("c")]}, "no_user_turn"),
    (demonstration, {"messages": [user("p")]}, "no_assistant_turn"),
    (demonstration, {"prompt": "p", "completion": "c", "weight": -1}, "bad_number"),
    (prompt, {"prompt": [system("s")]}, "no_user_turn"),
    (prompt, {"messages": [assistant("a")]}, "no_user_turn"),
    (preference, {**PAIR, "rejected": "c"}, "identical_completions"),
    (preference, {**PAIR, "chosen": None}, "empty_completion"),
    (preference, {"chosen": [], "rejected": [user("p")]}, "no_messages"),
    (preference, {**PAIR, "preference": 1.2}, "bad_number"),
    (preference, {**PAIR, "preference": "yes"}, "bad_number"),
    (preference, {**PAIR, "margin": float("nan")}, "bad_number"),
    (preference, {"chosen": SAME, "rejected": SAME}, "identical_completions"),
    (preference, {"chosen": [user("p"), assistant("c")], "rejected": [user("q"), assistant("r")]}, "prompts_differ"),
    (preference, {"chosen": [user("p"), assistant("c")], "rejected": [user("p")]}, "prompts_differ"),
    (preference, {"chosen": [assistant("c")], "rejected": [assistant("r")]}, "no_user_turn"),
    (preference, {"chosen": SAME, "rejected": HH.format("q", "r")}, "prompts_differ"),
    (preference, {"chosen": SAME, "rejected": HH.format("p", " ")}, "empty_turn"),
    (preference, {"chosen": SAME, "rejected": HH.format("p", "x Human: y")}, "inline_role_marker"),
    (
        preference,
        {"chosen": SAME + "\n\nAssistant: a", "rejected": SAME + "\n\nAssistant: b"},
        "turns_do_not_alternate",
    ),
    (preference, {"chosen": "Note\n\nHuman: p\n\nAssistant: c", "rejected": SAME}, "no_user_turn"),
    (preference, {"chosen": "abc", "rejected": "xyz"}, "empty_prompt"),
    (preference, {"chosen": "abc", "rejected": "abcd"}, "empty_completion"),
    (preference, {"prompt": "p", "completions": ["a"]}, "single_completion"),
    (preference, {"prompt": "p", "completion_1": "a", "completion_2": "b", "label": 3}, "bad_vote"),
    (preference, {"prompt": "p", "completion_1": "a", "completion_2": "b", "label": True}, "bad_vote"),
    (preference, {"prompt": "p", "completion_1": "a", "completion_2": "b", "labels": []}, "bad_vote"),
    (preference, {"prompt": "p", "completion_1": "a", "completion_2": "a", "label": 0}, "identical_completions"),
    (preference, {"prompt": "p", "completions": "ab"}, "single_completion"),
    (preference, {"prompt": "p", "completions": ["a", "a"]}, "identical_completions"),
    (preference, {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 1]}, "all_tied"),
    (preference, {"prompt": "p", "completions": ["a", "b"], "ranks": [1]}, "bad_number"),
    (preference, {"prompt": "p", "completions": ["a", "b"], "ranks": [1, "x"]}, "bad_number"),
]


@pytest.mark.parametrize(("read", "row", "reason"), REFUSED)
def test_refused_rows_have_a_reason(read, row, reason):
    with pytest.raises(RowRefused) as refusal:
        read(row)
    assert refusal.value.code == reason
    assert reason in REASONS


def test_misnamed_columns_are_refused_with_the_nearest_name():
    with pytest.raises(ValueError) as error:
        check_columns(["promt", "choosen", "rejected", "id"], PREFERENCE_FORMS, "pairs.jsonl")
    said = str(error.value)
    assert said.startswith("pairs.jsonl has the columns 'promt', 'choosen', 'rejected', 'id'")
    assert "prompt + chosen + rejected; conversations + chosen + rejected; " in said
    assert "Did you mean 'prompt' by 'promt'?" in said and "Did you mean 'chosen' by 'choosen'?" in said
    assert "columns: {question: prompt}" in said


@pytest.mark.real
def test_real_transcripts_are_parsed_or_refused(shared_data):
    """The parsed rows equal the rows of the parsed files; ten rows are refused for known reasons."""
    parsed = set()
    for name in ("hh_harmless_train.jsonl", "hh_harmless_test.jsonl"):
        parsed |= {line.strip() for line in shared_data(name).read_text(encoding="utf-8").splitlines()}
    parsed = {json.dumps(json.loads(line), sort_keys=True) for line in parsed}
    known, reasons = 0, []
    for line in shared_data("hh_harmless_raw50.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            found = preference(json.loads(line))
        except RowRefused as refusal:
            reasons.append(refusal.code)
            continue
        chosen, rejected = found.completions
        row = {"prompt": found.prompt, "chosen": chosen, "rejected": rejected}
        known += json.dumps(row, sort_keys=True) in parsed
    assert {reason: reasons.count(reason) for reason in set(reasons)} == {
        "empty_turn": 3, "inline_role_marker": 3, "prompts_differ": 1, "turns_do_not_alternate": 3,
    }  # fmt: skip
    assert known >= 38, known
