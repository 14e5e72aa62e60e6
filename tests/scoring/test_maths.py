"""Test final answers: extraction, parsing, and text that tries to trick or hang the parser."""

import json
import os
import time
from fractions import Fraction
from pathlib import Path

import pytest
from conftest import refused

from rlhf_lightning.scoring import MathAnswerScorer, MathVerifyScorer
from rlhf_lightning.scoring.answers import final_answer, number, same_answer

DATA = Path(os.environ.get("RLHF_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So \\boxed{42}.", "42"),
        ("\\boxed{\\frac{1}{2}} apples", "\\frac{1}{2}"),
        ("\\boxed{1}, no: \\boxed{2}", "2"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("a = <<3*4=12>>12\n#### 12", "12"),
        ("#### $1,000 ", "$1,000"),
        ("The answer is 7. It was easy.", "7"),
        ("the answer is: **3.5**.", "3.5"),
        ("Answer: Paris", "Paris"),
        ("The answer is 3.\nThe answer is 4.", "4"),
        ("\\boxed{3}\n#### 4", "4"),
        ("#### 4\nso \\boxed{3}", "3"),
        ("#### Step two: add\n\\boxed{3}", "3"),
        ("\\boxed{3}\n#### Step two: add", "3"),
        ("\\boxed{}", None),
        ("#### 4\n\\boxed{ }", None),
        ("\\boxed{3", None),
        ("I think it is 5", None),
        ("", None),
    ],
)
def test_the_final_answer_is_extracted(text, answer):
    assert final_answer(text) == answer


def test_last_number_is_used_only_if_requested():
    assert final_answer("3 and 4 are 7.", last_number=True) == "7"
    assert final_answer("it is -$1,234.50 in all", last_number=True) == "-$1,234.50"
    assert final_answer("no number", last_number=True) is None
    assert final_answer("#### 4\nthat was question 9", last_number=True) == "4"
    assert final_answer("\\boxed{} 9", last_number=True) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", 18), ("+5", 5), ("-5", -5), ("−5", -5), ("1,234,567", 1234567), ("$18.50", "18.5"), ("\\$5", 5),
        ("€ 5", 5), ("50%", 50), ("50\\%", 50), (".5", "0.5"), ("5.", 5), ("5.0", 5), ("3/4", "3/4"), ("-3/4", "-3/4"),
        ("1 1/2", "3/2"), ("\\frac{3}{4}", "3/4"), ("\\dfrac34", "3/4"), ("-\\frac{1}{2}", "-1/2"),
        ("\\text{18 apples}", 18), ("18 dollars", 18), ("5 km/h", 5), ("10 square-feet", 10), ("90^\\circ", 90),
        ("$x = 5$", 5), ("\\( 5 \\)", 5), ("{5}", 5), ("1{,}000", 1000), ("2 million", 2_000_000), ("3e8", 3 * 10**8),
        ("3 \\times 10^{5}", 300_000), ("1e-3", "1/1000"), ("**7**", 7), ("0.1", "1/10"),
        ("3 or 4", None), ("3, 4", None), ("18 dollars and 50 cents", None), ("1,23", None), ("1/0", None), ("", None),
        ("nan", None), ("inf", None), ("-infinity", None), ("1e9999", None), ("1e999999999999", None), ("5x", None),
        ("10**10**10", None), ("7!", None), ("2^{10}", None), ("\\sqrt{2}", None), ("2\\pi", None), ("5-7", None),
        ("not 5", None), ("3(4)", None), ("3{4}", None), ("(4)3", None), ("(3)(4)", None),
        ("12:30", None), ("9" * 61, None), ("__import__('os')", None),
    ],
)  # fmt: skip
def test_answers_are_parsed_as_exact_fractions(text, value):
    assert number(text) == (None if value is None else Fraction(value))


def test_numbers_are_compared_exactly():
    assert same_answer("0.1", "1/10")
    assert not same_answer("0.3333333333333333", "1/3")
    assert not same_answer("9007199254740993", "9007199254740992")  # equal as floats
    assert not same_answer("100000000000000000000.1", "100000000000000000000")


def test_non_numeric_answers_are_compared_as_text():
    assert same_answer("\\dfrac{\\sqrt{3}}{2}", "\\frac{ \\sqrt{3} }{2}")
    assert same_answer("\\text{Paris}", "paris") and not same_answer("London", "Paris")
    assert not same_answer("nan", "5") and not same_answer("", "")


def test_scores_are_1_for_equal_answers():
    scorer = MathAnswerScorer()
    texts = ["#### 5", "#### 6", "five", "#### 5 or 6", "#### 5"]
    assert scorer(["p"] * 5, texts, answer=["5", 5, "5", 5.0, None]) == [1.0, 0.0, 0.0, 0.0, None]
    assert scorer(["p"], ["\\boxed{1000}"], answer=["so <<10*100=1000>>\n#### 1,000"]) == [1.0]
    assert MathAnswerScorer("target", last_number=True)(["p"], ["it is 5"], target=["5"]) == [1.0]
    with refused("missing-data-column", "MathAnswerScorer needs the data column answer"):
        scorer(["p"], ["#### 5"], solution=["5"])


HOSTILE = {
    "boxes that never close": "\\boxed{" * 100_000,
    "braces 10,000 deep": "\\boxed{" + "{" * 10_000 + "5" + "}" * 10_000 + "}",
    "digits": "9" * 1_000_000,
    "boxed digits": "\\boxed{" + "9" * 5_000 + "}",
    "answers": "the answer is " * 70_000,
    "hashes": "#" * 1_000_000,
    "empty hashes": "#### " * 200_000,
    "spaces": "answer" + " " * 1_000_000,
    "hyphens": "-" * 1_000_000,
    "commas": "1," * 500_000,
    "fractions": "1/" * 500_000,
    "wrappers": "#### " + "\\text{" * 40 + "6",
    "powers": "#### 10**10**10",
    "exponent": "\\boxed{1e99999999999}",
    "stars": "*" * 1_000_000 + "\n####" + "\t" * 100_000,
    "a megabyte of text": "so it goes, 12 of 13; " * 50_000,
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("last_number", [False, True])
def test_hostile_text_scores_0_without_hanging(name, last_number):
    started = time.monotonic()
    assert MathAnswerScorer(last_number=last_number)(["p"], [HOSTILE[name]], answer=["5"]) == [0.0]
    assert time.monotonic() - started < 10


def rows_of(name):
    path = DATA / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not there: name the folder of the human data in RLHF_DATA")
    with path.open(encoding="utf-8") as lines:  # some rows contain characters that splitlines treats as line ends
        return [json.loads(line) for line in lines]


@pytest.mark.parametrize("name", ["gsm8k_train", "gsm8k_test"])
def test_reference_solutions_score_1_and_off_by_one_answers_0(name):
    rows = rows_of(name)
    solutions = [row["solution"] for row in rows]
    answers = [row["answer"] for row in rows]
    more = [str(Fraction(answer) + 1) for answer in answers]
    assert MathAnswerScorer()(solutions, solutions, answer=answers) == [1.0] * len(rows)
    assert MathAnswerScorer()(solutions, solutions, answer=more) == [0.0] * len(rows)


def test_right_and_wrong_solutions_are_distinguished():
    rows = rows_of("gsm8k_solution_pref")
    answers = [row["answer"] for row in rows]
    for side, score in (("chosen", 1.0), ("rejected", 0.0)):
        texts = [row[side][-1]["content"] for row in rows]
        assert MathAnswerScorer()(texts, texts, answer=answers) == [score] * len(rows)


@pytest.fixture
def verifying():
    """Return a function that creates a scorer with a time limit, in one process, since each imports SymPy."""
    pytest.importorskip("math_verify", reason="math-verify is not installed: pip install 'rlhf-lightning[math]'")
    made = []

    def make(seconds):
        made.append(MathVerifyScorer(seconds=seconds, workers=1))
        return lambda given, answer: made[-1]([""] * len(given), given, answer=answer)

    yield make
    for scorer in made:
        scorer._pool.close()


def test_math_verify_compares_symbolic_answers(verifying):
    verified = verifying(60.0)
    equal = [("2x+1", "1+2x"), ("\\frac{\\pi}{2}", "\\pi/2"), ("\\sqrt{8}", "2\\sqrt{2}"), ("(1,2)", "(1, 2)"),
             ("\\{1,2\\}", "\\{2,1\\}"), ("18", "18.0"), ("x^2-1", "(x-1)(x+1)")]  # fmt: skip
    other = [("2x+1", "2x+2"), ("\\pi", "3.14"), ("(1,2)", "(2,1)"), ("18", "19"), ("\\{1\\}", "\\{2\\}")]
    pairs = [*equal, *other]
    found = verified([f"So \\boxed{{{given}}}." for given, _ in pairs], [answer for _, answer in pairs])
    assert found == [1.0] * len(equal) + [0.0] * len(other)
    assert verified(["no answer", "\\boxed{3}"], ["x+1", None]) == [0.0, None]


@pytest.mark.slow
def test_answers_that_hang_or_run_code_score_0(verifying, tmp_path):
    verified, target = verifying(3.0), tmp_path / "made"
    hostile = ["9^{9^{9^{9}}}", f"__import__('pathlib').Path('{target}').touch()", "\\int_{0}^{1} x^{x^{x^{x}}} dx",
               "(" * 140, "\\sum_{n=1}^{10^{9}} \\frac{1}{n^{2}+n+1}"]  # fmt: skip
    start = time.monotonic()
    found = verified([f"\\boxed{{{one}}}" for one in hostile], ["x+1"] * len(hostile))
    assert found == [0.0] * len(hostile) and not target.exists() and time.monotonic() - start < 300
    assert verified(["\\boxed{1+x}"], ["x+1"]) == [1.0], "a new process takes the place of a killed one"


def test_a_missing_math_verify_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with refused("missing-package", "rlhf-lightning[math]"):
        MathVerifyScorer()
