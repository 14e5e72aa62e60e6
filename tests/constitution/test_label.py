"""Test `rlhf label`: rows train unchanged and record their origin, killed runs continue, errors have one line."""

import json
import math
from pathlib import Path

import pytest
from tiny_run import rows_of

from rlhf_lightning.cli import main as rlhf
from rlhf_lightning.constitution.principles import load_constitution
from rlhf_lightning.data import PreferenceDataModule
from rlhf_lightning.tokenization import load_tokenizer
from rlhf_lightning.types import PreferenceBatch

JUDGE = """
class Judge:
    name = "letters"
    asked = 0

    def __init__(self, letter="e", most=10**9):
        self.letter, self.most = letter, most

    def __call__(self, questions):
        from rlhf_lightning.scoring.judges.judge import JudgeAnswer, no_answer
        Judge.asked += len(questions)
        if Judge.asked > self.most:
            raise RuntimeError("killed")
        found = []
        for q in questions:
            gap = q.first.count(self.letter) - q.second.count(self.letter)
            odds = gap + 0.5
            p = 1 / (1 + 2.718281828459045 ** -odds)
            import math
            silent = "silent" in q.first + q.second
            found.append(no_answer("other_words") if silent else JudgeAnswer(math.log(p), math.log(1 - p)))
        return found
"""
PAIRS = [
    {"prompt": "p one", "chosen": "bee", "rejected": "ant", "topic": "insects"},
    {"prompt": [{"role": "user", "content": "p two"}], "chosen": [{"role": "assistant", "content": "ant"}],
     "rejected": [{"role": "assistant", "content": "eel"}]},
    {"prompt": "p three", "completion_1": "tea", "completion_2": "net", "label": "tie"},
    {"prompt": "p four", "chosen": "silent", "rejected": "x"},
    {"prompt": "p five", "completions": ["eee", "ee", "e"]},
    {"prompt": "p six", "chosen": "same", "rejected": "same"},
]  # fmt: skip


@pytest.fixture
def given():
    Path("my_judge.py").write_text(JUDGE)
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return ["label", "--judge", "my_judge.Judge", "--pairs", "pairs.jsonl", "--average", "logit"]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_given_pairs_are_labelled(given, capsys):
    assert rlhf([*given, "--out", "out/labels.jsonl"]) == 0
    rows, report = rows_of(Path("out/labels.jsonl")), json.loads(Path("out/labels.report.json").read_text())
    rules = load_constitution("harmless")
    assert [row["chosen"] for row in rows] == ["bee", PAIRS[1]["rejected"], "tea", "eee", "eee", "ee"]
    assert [row["preference"] for row in rows] == pytest.approx([sigmoid(2), sigmoid(2), 0.5, *map(sigmoid, (1, 2, 1))])
    assert [row["human_preference"] for row in rows] == [1.0, 0.0, 0.5, 1.0, 1.0, 1.0]
    assert rows[0]["topic"] == "insects" and rows[0]["judge"] == "letters" == report["judge"]
    assert rows[0]["constitution"] == rules.fingerprint == report["constitution"]
    assert rows[0]["probabilities"] == pytest.approx([sigmoid(2.5)])
    assert rows[0]["swapped_probabilities"] == pytest.approx([sigmoid(1.5)])
    assert {row["principles"][0] for row in rows} <= {one.id for one in rules.comparing}
    assert (report["pairs"], report["labelled"], report["rows"]) == (7, 6, 6)
    assert report["parse_fail"] == 2 / 14 and report["parse_failures"] == {"other_words": 2}
    assert report["agreement"]["mean"] == pytest.approx(4 / 5) and report["agreement"]["pairs"] == 5
    assert report["average"] == "logit"
    told = capsys.readouterr()
    assert "left out 1 rows: chosen equals rejected" in told.err
    assert "judge/consistency" in told.out and "judge/agreement" in told.out and "0.800 [" in told.out
    assert "6 of 7 pairs labelled by letters under harmless v1" in told.out
    assert not list(Path("out").glob("*.partial"))


def test_ties_drop_leaves_ties_out(given):
    assert rlhf([*given, "--out", "labels.jsonl", "--ties", "drop"]) == 0
    rows = rows_of(Path("labels.jsonl"))
    assert len(rows) == 5 and not any(row["tie"] for row in rows)


def test_the_output_is_read_as_soft_preferences(given, policy_folder, cache):
    assert rlhf([*given, "--out", "labels.jsonl"]) == 0
    data = PreferenceDataModule("labels.jsonl", shuffle=False, batch_size=6)
    data.tokenizer = load_tokenizer(policy_folder)
    data.batch_type = PreferenceBatch
    data.prepare_data()
    data.setup("fit")
    assert data.report.read == data.report.kept == 6
    (step,) = list(data.train_dataloader())
    target = sorted(value for batch in step.micro_batches for value in batch.target.tolist())
    assert target == pytest.approx(sorted([sigmoid(2), sigmoid(2), 0.5, sigmoid(1), sigmoid(2), sigmoid(1)]))


def test_a_killed_run_resumes_where_it_stopped(given, monkeypatch, capsys):
    rows = [{"prompt": f"p {n}", "chosen": "e" * (1 + n % 3), "rejected": "x"} for n in range(150)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert rlhf([*given, "--out", "whole.jsonl"]) == 0
    import my_judge

    my_judge.Judge.asked = 0
    monkeypatch.setattr(my_judge.Judge, "most", 200, raising=False)
    monkeypatch.setattr(my_judge.Judge, "__init__", lambda self: None)
    monkeypatch.setattr(my_judge.Judge, "letter", "e", raising=False)
    with pytest.raises(RuntimeError, match="killed"):
        rlhf([*given, "--out", "parts.jsonl"])
    with Path("parts.jsonl.partial").open("a") as file:
        file.write('{"done": 128, "records": [{"torn')
    assert not Path("parts.jsonl").exists()
    monkeypatch.setattr(my_judge.Judge, "most", 10**9, raising=False)
    my_judge.Judge.asked = 0
    assert rlhf([*given, "--out", "parts.jsonl", "--seed", "1"]) == 1
    assert "belongs to an interrupted run with another seed" in capsys.readouterr().err
    assert rlhf([*given, "--out", "parts.jsonl"]) == 0
    assert my_judge.Judge.asked == 2 * (150 - 64)
    assert "parts.jsonl.partial: resuming after 64 of 150" in capsys.readouterr().out
    assert Path("parts.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()


def test_pairs_can_be_sampled_from_a_model(given, policy_folder):
    Path("prompts.jsonl").write_text(json.dumps({"prompt": "ab", "topic": "t"}) + "\n" + json.dumps({"prompt": "cd"}))
    sampled = ["label", "--judge", "my_judge.Judge", "--prompts", "prompts.jsonl", "--model", policy_folder]
    assert rlhf([*sampled, "--out", "labels.jsonl", "--max-new-tokens", "6", "--judge_args.letter", "a"]) == 0
    rows, report = rows_of(Path("labels.jsonl")), json.loads(Path("labels.report.json").read_text())
    assert [row["prompt"] for row in rows] == ["ab", "cd"] and rows[0]["topic"] == "t"
    assert all(row["chosen"] != row["rejected"] and "human_preference" not in row for row in rows)
    assert report["model"] == policy_folder and report["agreement"] is None
    assert report["sampling"]["max_new_tokens"] == 6


def test_a_model_folder_can_be_the_judge(given, policy_folder):
    flags = ["--judge", policy_folder, "--judge_args.max_length", "4096", "--least-mass", "0", "--principles", "2"]
    assert rlhf(["label", "--pairs", "pairs.jsonl", *flags, "--out", "labels.jsonl"]) == 0
    report = json.loads(Path("labels.report.json").read_text())
    assert report["judge"] == policy_folder and report["labelled"] == 7 and report["questions"] == 28
    assert 0 <= report["letter_mass"] <= 1 and -0.5 <= report["position_bias"] <= 0.5


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--prompts", "p.jsonl"], "give either --pairs, or --prompts with the --model that answers them"),
        (["--constitution", "harmles"], "there is no constitution 'harmles', and no such file: did you mean harmless?"),
        (["--principles", "17"], "has 16 principles to compare by"),
        (["--pairs", "nothing.jsonl"], "there is no file nothing.jsonl"),
        (["--judge", "os.system"], "judge 'os.system' has no name"),
        (["--judge_args.api_key", "sk-1234"], "judge_args.api_key is not the name of an environment variable"),
        (["--least-mass", "1"], "least_mass is 1.0"),
    ],
)
def test_invalid_settings_are_refused_and_leave_no_file(given, flags, sentence, capsys):
    assert rlhf([*given, "--out", "labels.jsonl", *flags]) == 1
    told = capsys.readouterr().err
    assert sentence in told and "sk-1234" not in told
    assert not list(Path().glob("labels*"))
