"""IFEval's 25 kinds by value: completions that follow an instruction, near misses, and invalid rows."""

import json
import os
from pathlib import Path

import pytest
from conftest import refused

from rlhf_lightning.scoring import IFEvalScorer
from rlhf_lightning.scoring.instructions import INSTRUCTIONS, follows

DATA = Path(os.environ.get("RLHF_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
NTH = {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "tea"}

CASES = {
    "keywords:existence": ({"keywords": ["Tea", "milk"]}, ["teapot and MILK"], ["tea alone", ""]),
    "keywords:frequency": (
        {"keyword": "tea", "relation": "at least", "frequency": 2}, ["Tea, teapot"], ["tea"],
    ),
    "keywords:forbidden_words": ({"forbidden_words": ["tea", "cup"]}, ["teapot"], ["Tea!", "a cup", " "]),
    "keywords:letter_frequency": (
        {"letter": "E", "let_relation": "less than", "let_frequency": 3}, ["Eel"], ["eel, eel"],
    ),
    "length_constraints:number_sentences": (
        {"relation": "less than", "num_sentences": 3}, ["One. Two!"], ["One. Two? Three."],
    ),
    "length_constraints:number_paragraphs": (
        {"num_paragraphs": 2}, ["a\n***\nb", "***\na\n***\nb\n***"], ["a\n\nb", "a\n***\n***\nb", "a***b***c"],
    ),
    "length_constraints:number_words": (
        {"relation": "at least", "num_words": 3}, ["one two three"], ["one two"],
    ),
    "length_constraints:nth_paragraph_first_word": (
        NTH, ["a\n\nTea is", 'a\n\n"tea," b'], ["a\n\nteapot", "tea\n\na", "a\n\ntea\n\nc"],
    ),
    "detectable_content:number_placeholders": (
        {"num_placeholders": 2}, ["[name] at [address]"], ["[name]", "[na\nme] [x]"],
    ),
    "detectable_content:postscript": (
        {"postscript_marker": "P.P.S"}, ["Bye. P.P.S. more", "p. p. s: more"], ["P.S. more", "P.P.S."],
    ),
    "detectable_format:number_bullet_lists": (
        {"num_bullets": 2}, ["* a\n* b", "- a\n  - b"], ["* a", "*a*\n*b*", "* a\n* b\n* c"],
    ),
    "detectable_format:constrained_response": (
        {}, ["My answer is no.", "Well: My answer is maybe."], ["My answer is No.", "no"],
    ),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 2}, ["*a* and *b*", "**a** and *b c*"], ["**a**", "* * and *a*", "*a\nb* *c*"],
    ),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Part", "num_sections": 2}, ["Part 1\na\nPart 2\nb"], ["Part 1\na", "Part one, Part two"],
    ),
    "detectable_format:json_format": (
        {}, ['{"a": 1}', '```json\n{"a": 1}\n```', "```\n[]\n```"], ["{a: 1}", "Sure: {}"],
    ),
    "detectable_format:title": ({}, ["<<A title>>\ntext"], ["<<  >>", "<a>"]),
    "combination:two_responses": (
        {}, ["one\n******\ntwo"], ["one\n******\none", "one", "a******b******c", "a************b"],
    ),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say it. "}, ["say it. It"], ["It. Say it."]),
    "startend:end_checker": ({"end_phrase": "The end."}, ["It is the END. ", '"the end."'], ["the end. No"]),
    "startend:quotation": ({}, ['"all of it"'], ['"half', '""']),
    "change_case:capital_word_frequency": (
        {"capital_relation": "at least", "capital_frequency": 2}, ["A BIG dog"], ["Big BIG Dog"],
    ),
    "change_case:english_capital": ({}, ["ALL OF IT 1"], ["ALL of it", "1"]),
    "change_case:english_lowercase": ({}, ["all of it 1"], ["All", "1"]),
    "punctuation:no_comma": ({}, ["none"], ["one, two", "\n"]),
}  # fmt: skip


def test_every_kind_has_test_cases_and_response_language_is_unchecked():
    assert set(CASES) == set(INSTRUCTIONS) and len(CASES) == 24
    assert follows("bonjour", "language:response_language", {"language": "fr"}) is None


@pytest.mark.parametrize("kind", CASES)
def test_each_check_accepts_right_and_rejects_wrong_texts(kind):
    arguments, right, wrong = CASES[kind]
    assert [text for text in right if follows(text, kind, arguments) is not True] == []
    assert [text for text in wrong if follows(text, kind, arguments) is not False] == []


def columns(*rows):
    return {
        "instruction_id_list": [[kind for kind, _ in row] for row in rows],
        "kwargs": [[given for _, given in row] for row in rows],
    }


ROW = [("punctuation:no_comma", {"keywords": None}), ("keywords:existence", {"keywords": ["tea"]})]
FRENCH = ("language:response_language", {"language": "fr"})


def test_the_score_is_the_fraction_of_checkable_instructions():
    scorer, texts = IFEvalScorer(), ["tea", "coffee", "no, coffee", "tea", "tea"]
    rows = columns(ROW, ROW, ROW, [FRENCH], [FRENCH, *ROW])
    assert scorer(["p"] * 5, texts, **rows) == [1.0, 0.5, 0.0, None, 1.0]
    assert scorer.take_metrics()["unchecked_instructions"].tolist() == [0, 0, 0, 1, 1]
    assert scorer.take_metrics()["unchecked_instructions"].tolist() == []
    assert IFEvalScorer(strict=True)(["p"] * 5, texts, **rows) == [1.0, 0.0, 0.0, None, 1.0]


def test_columns_may_be_json_text():
    rows = {name: [json.dumps(value) for value in values] for name, values in columns(ROW).items()}
    assert IFEvalScorer()(["p"], ["tea, please"], **rows) == [0.5]


def test_a_row_without_instructions_has_no_score():
    assert IFEvalScorer()(["p"], ["tea"], instruction_id_list=[None], kwargs=[None]) == [None]


def test_an_unknown_kind_gives_no_score():
    assert IFEvalScorer()(["p"], ["tea"], **columns([("startend:rhyme", {})])) == [None]


def test_invalid_rows_are_refused():
    with refused("missing-data-column", "IFEvalScorer needs the data column kwargs"):
        IFEvalScorer()(["p"], ["tea"], instruction_id_list=[["punctuation:no_comma"]])
    with refused("wrong-arguments", "the arguments of punctuation:no_comma do not fit"):
        follows("tea", "punctuation:no_comma", {"commas": 1})
    with refused("unknown-choice", "there is no relation 'around'"):
        follows("tea", "length_constraints:number_words", {"relation": "around", "num_words": 3})
    with pytest.raises(ValueError, match="shorter|longer"):
        IFEvalScorer()(["p"], ["tea"], instruction_id_list=[["punctuation:no_comma"]], kwargs=[[]])


def test_every_row_of_the_benchmark_is_read():
    path = DATA / "ifeval_prompts.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not there: name the folder of the human data in RLHF_DATA")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    given = {name: [row[name] for row in rows] for name in ("instruction_id_list", "kwargs")}
    assert {kind for kinds in given["instruction_id_list"] for kind in kinds} - set(INSTRUCTIONS) == {FRENCH[0]}
    scorer = IFEvalScorer()
    scores = scorer(["p"] * len(rows), ["A plain answer, of one sentence."] * len(rows), **given)
    alone = sum(set(kinds) == {FRENCH[0]} for kinds in given["instruction_id_list"])
    assert scores.count(None) == alone > 0
    assert int(scorer.take_metrics()["unchecked_instructions"].sum()) == 19
