"""Test ``rlhf audit`` on a terminal: it prints numbers, never texts."""

import json

import pytest

from rlhf_lightning.cli import main

ROWS = [
    {"prompt": "SECRET one", "chosen": "SECRET yes", "rejected": "SECRET no"},
    {"prompt": "SECRET one", "chosen": "SECRET yes", "rejected": "SECRET no"},
    {"prompt": "SECRET two", "chosen": "SECRET", "rejected": "SECRET"},
]


def run(capsys, *arguments):
    status = main(["audit", *arguments])
    told = capsys.readouterr()
    assert "SECRET" not in told.out + told.err
    return status, " ".join(told.out.split()), told.err


def test_findings_are_counted_and_numbered(write_rows, capsys, tmp_path):
    source, other = write_rows(ROWS), write_rows(ROWS[:1], "eval.jsonl")
    report = tmp_path / "report.json"
    status, told, _ = run(capsys, source, "--eval", other, "--json", str(report))
    assert status == 0
    assert "preference data, 3 rows, 2 of them usable" in told
    assert "1 33.3% identical_completions: chosen equals rejected, as text or as tokens [3]" in told
    assert "1 33.3% duplicate: repeats an earlier row [2]" in told
    assert "1 100.0% leaked_row: the whole row is in the training data [1]" in told
    train, held_out = json.loads(report.read_text())
    assert (train["read"], train["usable"], held_out["findings"][0]["rows"]) == (3, 2, [1])
    assert {"check": "duplicate", "meaning": "repeats an earlier row", "count": 1, "rows": [2], "first": [1]} in train[
        "findings"
    ]


def test_strict_makes_findings_an_exit_status_of_1(write_rows, capsys):
    assert run(capsys, write_rows(ROWS), "--strict")[0] == 1
    status, told, _ = run(capsys, write_rows(ROWS[:1]), "--strict")
    assert status == 0 and "nothing found" in told


def test_only_the_first_ten_row_numbers_of_a_finding_are_listed(write_rows, capsys):
    _, told, _ = run(capsys, write_rows(ROWS[:1] * 14))
    assert "[2, 3, 4, 5, 6, 7, 8, 9, 10, 11" in told and "11 ...]" in told and "12" not in told.rpartition("[")[2]


@pytest.mark.parametrize(
    ("content", "arguments", "said"),
    [
        ("", [], "has no rows"),
        ("nonsense\n", [], "none of its first 1 rows can be read"),
        ('{"promt": 1, "choosen": 2}\n', [], "Did you mean 'prompt' by 'promt'?"),
        ('{"prompt": "x"}\n', ["--columns", "{question: prompt}"], "columns renames 'question'"),
        ('{"prompt": "x"}\n', ["--kind", "preference"], "none of the accepted forms"),
        ('{"prompt": "x"}\n', ["--max-length", "9"], "need a --tokenizer"),
    ],
)
def test_invalid_arguments_are_refused_in_one_line(tmp_path, capsys, content, arguments, said):
    (tmp_path / "rows.jsonl").write_text(content)
    status, _, told = run(capsys, str(tmp_path / "rows.jsonl"), *arguments)
    assert status == 1 and said in told and told.count("\n") == 1


def test_a_missing_file_is_named(capsys):
    assert "there is no file 'nowhere.jsonl'" in run(capsys, "nowhere.jsonl")[2]


@pytest.mark.real
def test_findings_of_pandalm_match_the_known_counts(shared_data, capsys, tmp_path):
    run(capsys, str(shared_data("pandalm_pref_standard.jsonl")), "--json", str(tmp_path / "report.json"))
    (report,) = json.loads((tmp_path / "report.json").read_text())
    counts = {one["check"]: one["count"] for one in report["findings"]}
    assert counts == {"duplicate": 57, "circle": 3, "longer_wins": 0}


def test_similar_and_overlap_flags_enable_their_checks(write_rows, capsys):
    train = write_rows([{"text": " ".join(f"a{i}" for i in range(40))}], "train.jsonl")
    test = write_rows([{"text": " ".join(f"a{i}" for i in range(38)) + " b c"}, {"text": "else"}], "test.jsonl")
    status, said, _ = run(capsys, train, "--eval", test, "--similar", "0.7", "--overlap", "13")
    assert status == 0 and "leaked_similar" in said and "overlap" in said
    for flags, words in ((["--similar", "2"], "similar is 2.0"), (["--overlap", "13"], "overlap compares")):
        status, _, error = run(capsys, train, *flags)
        assert status == 1 and words in error
