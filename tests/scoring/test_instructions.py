"""Instructions by value: texts that follow them, near misses, and invalid rows."""

import contextlib
import inspect
import json
import time

import pytest
from conftest import refused

from rlhf_lightning.environments.calls import READERS, CallError
from rlhf_lightning.scoring.instructions import (
    CHECKS,
    INSTRUCTIONS,
    InstructionScorer,
    follows,
    kept,
    with_instruction,
)

CASES = {
    "at_most_words": ({"count": 3}, ["one two", "don't stop now"], ["one two three four", ""]),
    "at_least_words": ({"count": 2}, ["one two"], ["one", "- - -"]),
    "sentences": ({"count": 2}, ["A b. C d!", "Yes? no"], ["A b. C d. E f.", "only one"]),
    "paragraphs": ({"count": 2}, ["a\n\nb", "a\n \nb\n"], ["a\nb", "a\n\nb\n\nc"]),
    "keyword": ({"word": "Tea"}, ["I like tea.", "TEA"], ["steam", "teapot"]),
    "keyword_times": ({"word": "tea", "count": 2}, ["tea, tea"], ["tea and teapot"]),
    "forbidden": ({"word": "tea"}, ["coffee", "teapot"], ["Tea!", "", "..."]),
    "lowercase": ({}, ["all small, 3 of them"], ["One", "", "123"]),
    "uppercase": ({}, ["ALL CAPS!"], ["ALL CAPs"]),
    "no_commas": ({}, ["none here"], ["one, here", "   "]),
    "starts_with": ({"phrase": "Well"}, [" well then"], ["Oh well"]),
    "ends_with": ({"phrase": "the end."}, ["this is THE END", "the end!"], ["the end of it"]),
    "bullets": ({"count": 2}, ["- a\n- b", "* a\n  - b"], ["- a", "-a\n-b", "- a\n- b\n- c"]),
    "json": ({}, ['{"a": [1, 2]}', "3"], ["{a: 1}", "Here: {}", "[" * 100_000]),
    "quoted": ({}, ['"said"'], ['"said', '""', "said"]),
    "title": ({}, ["<<A title>> text"], ["<< >>", "<A title>", "<<a\nb>>"]),
    "postscript": ({}, ["Bye. P.S. more"], ["Bye. PS more", "P.S."]),
    "digits": ({}, ["in 1999"], ["in nineteen"]),
    "no_digits": ({}, ["in nineteen"], ["in 1999", ""]),
    "question": ({}, ["Is it?"], ["It is.", "Is it? Yes"]),
}


def test_every_instruction_has_test_cases():
    assert set(CASES) == set(CHECKS)
    assert len(CHECKS) >= 15


@pytest.mark.parametrize("name", CASES)
def test_each_check_accepts_right_and_rejects_wrong_texts(name):
    arguments, right, wrong = CASES[name]
    assert [text for text in right if not kept(text, name, arguments)] == []
    assert [text for text in wrong if kept(text, name, arguments)] == []


def test_instructions_are_added_to_prompts_and_scored():
    row = with_instruction("Name a fruit. ", "at_most_words", count=2)
    assert row["prompt"][0]["content"] == "Name a fruit.\n\nAnswer in at most 2 words."
    assert json.loads(row["arguments"]) == {"count": 2}
    columns = {"instruction": [row["instruction"]] * 2 + [None], "arguments": [row["arguments"], {"count": 1}, None]}
    assert InstructionScorer()(["p"] * 3, ["an apple"] * 3, **columns) == [1.0, 0.0, None]


def test_invalid_rows_are_refused():
    with refused("missing-data-column", "needs the data column arguments, which is missing"):
        InstructionScorer()(["p"], ["c"], instruction=["json"])
    with refused("unknown-instruction", "there is no instruction 'jsn'"):
        kept("x", "jsn", {})
    with refused("wrong-arguments", "do not fit"):
        kept("x", "keyword", {"count": 1})


@pytest.mark.parametrize("fenced", ["```json\n[1]\n```", "``` [1]", "  ```\n[1]", "[1]", " [1] "])
def test_json_is_accepted_inside_a_code_fence(fenced):
    assert follows(fenced, "detectable_format:json_format", {})


FILLERS = [" ", "\n", "\n ", "*", "*a", "a", "a ", "a-", "<<", "<<a", "```", "[", "{", "(", '"', ".", "P.", "- ", "1",
           "<tool_call>", "[TOOL_CALLS]", "call: a", "}", "};", "name[ARGS]", "Human", "SECTION "]  # fmt: skip


def an_argument(name):
    if name in ("keywords", "forbidden_words"):
        return ["tea"]
    if name == "relation" or name.endswith("_relation"):
        return "at least"
    return 2 if name.startswith(("num_", "nth_")) or name.endswith("frequency") else "x"


@pytest.mark.parametrize("filler", FILLERS)
def test_long_repetitive_texts_are_checked_in_linear_time(filler):
    """A policy may write only spaces; each check reads them once."""
    began, run = time.monotonic(), filler * (200_000 // len(filler))
    for text in (run, f"```{run}x", f"<<{run}", f"x{run}x", f"- {run}", f'{{"name": {run}', f"[TOOL_CALLS]{run}"):
        for name, (arguments, *_) in CASES.items():
            kept(text, name, arguments)
        for name, check in INSTRUCTIONS.items():
            follows(text, name, {one: an_argument(one) for one in list(inspect.signature(check).parameters)[1:]})
        for read in READERS.values():
            with contextlib.suppress(CallError):
                read(text)
    assert time.monotonic() - began < 60
