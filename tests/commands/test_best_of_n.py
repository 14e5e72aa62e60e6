"""Test `rlhf best-of-n`: which worked samples it keeps, and a whole round up to supervised fine-tuning."""

import json
import math
from pathlib import Path

import pytest
from tiny_run import rows_of

from rlhf_lightning.cli import main as rlhf
from rlhf_lightning.commands.best_of_n import demonstration, report_of, selected, why_none
from rlhf_lightning.data import SFTDataModule
from rlhf_lightning.tokenization import load_tokenizer


def sample(prompt, completion, score, finished=True, length=None):
    length = len(completion) + 1 if length is None else length
    return {"prompt": prompt, "completion": completion, "score": score, "finished": finished, "length": length}


GROUPS = [
    [sample("p", "a", 1.0), sample("p", "bb", 3.0, finished=False), sample("p", "cc", 2.0), sample("p", "a", 1.0)],
    [sample("q", "x", 5.0), sample("q", "yyyy", 4.0), sample("q", " ", 9.0), sample("q", "zzz", -1.0)],
    [sample("r", "m", 0.5, finished=False)] * 4,
]


def kept(keep, top=None, threshold=None, softness=None, keep_unfinished=False, seed=0, groups=GROUPS):
    found = selected(groups, keep, top, threshold, softness, keep_unfinished, seed)
    assert all(row in groups[place] for place, row in found)
    return [(row["prompt"], row["completion"]) for _, row in found]


def test_best_keeps_the_highest_score_of_each_prompt():
    assert kept("best") == [("p", "cc"), ("q", "x")]
    assert kept("best", keep_unfinished=True) == [("p", "bb"), ("q", "x"), ("r", "m")]


def test_top_k_ranks_all_prompts_and_keeps_no_duplicate():
    assert kept("top-k", top=2) == [("q", "x"), ("q", "yyyy")]
    assert kept("top-k", top=5) == [("p", "cc"), ("p", "a"), ("q", "x"), ("q", "yyyy"), ("q", "zzz")]
    assert kept("top-k", top=9) == kept("top-k", top=5)


def test_a_threshold_keeps_zero_or_more_completions_of_a_prompt():
    assert kept("threshold", threshold=2.0) == [("p", "cc"), ("q", "x"), ("q", "yyyy")]
    assert kept("threshold", threshold=6.0) == []


def test_random_keeps_completions_in_proportion_to_their_samples():
    drawn = [kept("random", seed=seed) for seed in range(300)]
    assert all([prompt for prompt, _ in found] == ["p", "q"] for found in drawn)
    twice = sum(found[0] == ("p", "a") for found in drawn) / 300
    assert abs(twice - 2 / 3) < 0.1, "a was sampled twice and cc once"
    assert kept("random", seed=3) == kept("random", seed=3)


def test_soft_draws_completions_by_the_softmax_of_their_scores():
    drawn = [kept("soft", softness=2.0, seed=seed) for seed in range(600)]
    chance = math.exp(2 / 2) / (math.exp(2 / 2) + 2 * math.exp(1 / 2))  # cc scores 2, a twice 1
    assert abs(sum(found[0] == ("p", "cc") for found in drawn) / 600 - chance) < 0.06
    assert kept("soft", softness=1e-3) == kept("best")


def test_equal_scores_are_broken_at_random():
    equals = [[sample("p", letter, 1.0) for letter in "abcd"]]
    found = {kept("best", seed=seed, groups=equals)[0][1] for seed in range(40)}
    assert found == set("abcd")


def test_a_repeated_prompt_gives_no_duplicate_row():
    assert kept("best", groups=[GROUPS[1], GROUPS[1]]) == [("q", "x")]


def test_completions_without_a_score_are_left_out():
    groups = [[sample("p", "a", None), sample("p", "b", 1.0)], [sample("q", "c", None), sample("q", "d", None)]]
    for keep, further in (("best", {}), ("random", {}), ("threshold", {"threshold": 0.0}), ("top-k", {"top": 9})):
        assert kept(keep, groups=groups, **further) == [("p", "b")]
    found = report_of(groups, [groups[0][1]])
    assert found.mean_score == found.best_score == found.kept_score == 1.0
    assert "1: no sample has a score" in why_none(groups[1:], "best", None, False)


def test_episodes_with_equal_last_turns_differ():
    turns = [[{"role": "assistant", "content": said}, {"role": "assistant", "content": "4"}] for said in ("2+2", "3+1")]
    groups = [[{**sample("p", "4", 1.0), "turns": one} for one in turns]]
    assert kept("threshold", threshold=1.0, groups=groups) == [("p", "4")] * 2
    assert report_of(groups, groups[0]).unique == 1.0


def test_report_values_by_hand():
    chosen = [row for _, row in selected(GROUPS, "best", None, None, None, False, 0)]
    found = report_of(GROUPS, chosen)
    assert (found.kept, found.acceptance, found.answered) == (2, 2 / 12, 2 / 3)
    assert found.unique == pytest.approx((3 / 4 + 1 + 1 / 4) / 3) and found.finished == pytest.approx(7 / 12)
    assert found.mean_score == pytest.approx((7 + 17 + 2) / 12) and found.kept_score == 3.5
    assert found.best_score == pytest.approx((3 + 9 + 0.5) / 3)
    lengths = [2, 3, 3, 2, 2, 5, 2, 4, 2, 2, 2, 2]
    assert found.length_shift == pytest.approx((3 + 2) / 2 - sum(lengths) / 12)
    assert demonstration(chosen[0], GROUPS[0]) == {
        "prompt": "p", "completion": "cc", "score": 2.0, "n": 4, "unique": 3 / 4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("keep", "threshold", "words"),
    [
        ("best", None, "1: all samples were truncated (raise max_new_tokens"),
        ("threshold", 6.0, "2: scores are too low (lower the threshold"),
    ],
)
def test_the_report_says_why_prompts_have_no_demonstration(keep, threshold, words):
    places = {place for place, _ in selected(GROUPS, keep, None, threshold, None, False, 0)}
    left = [group for place, group in enumerate(GROUPS) if place not in places]
    told = why_none(left, keep, threshold, False)
    assert f"prompts without a demonstration: {len(left)} (" in told and words in told


# -- the command ------------------------------------------------------------------------------------------------------

PROMPTS = [{"prompt": "ab", "messages": "no part of the form"}, {"prompt": [{"role": "user", "content": "hello"}]}]


@pytest.fixture
def given(policy_folder):
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    Path("my_scores.py").write_text(
        "def lengths(prompts, completions, **columns):\n    return [float(len(text)) for text in completions]\n"
    )
    return ["--model", policy_folder, "--prompts", "prompts.jsonl", "--scorer", "my_scores.lengths",
            "--max-new-tokens", "6", "--keep-unfinished"]  # fmt: skip


def test_samples_equal_those_of_rlhf_generate(given, policy_folder, capsys):
    assert rlhf(["generate", *given[:-1], "--out", "all.jsonl", "--samples", "5"]) == 0
    assert rlhf(["best-of-n", *given, "--out", "out/demos.jsonl", "--n", "5"]) == 0
    samples, found = rows_of(Path("all.jsonl")), rows_of(Path("out/demos.jsonl"))
    groups = [samples[:5], samples[5:]]
    assert [row["prompt"] for row in found] == [row["prompt"] for row in PROMPTS]
    for row, group in zip(found, groups, strict=True):
        assert row["score"] == max(one["score"] for one in group if one["completion"].strip())
        assert row["completion"] in [one["completion"] for one in group]
        assert set(row) == {"prompt", "completion", "score", "n", "unique"} and row["n"] == 5
    told = capsys.readouterr().out
    assert "kept 2 completions: 20.0% of the samples, for 100.0% of the prompts" in told
    assert f"{sum(row['score'] for row in samples) / 10:.4g} of all samples" in told


def test_a_cautious_scorer_selects(given, policy_folder):
    Path("my_scores.py").write_text(
        "def sure(prompts, completions, **columns):\n    return [float(len(text)) for text in completions]\n\n\n"
        "def unsure(prompts, completions, **columns):\n    return [10.0 * len(text) for text in completions]\n"
    )
    members = ["my_scores.sure", "my_scores.unsure"]
    cautious = {"class_path": "Ensemble", "init_args": {"scorers": members, "penalty": 2}}
    given[given.index("--scorer") + 1] = json.dumps(cautious)
    assert rlhf(["generate", *given[:-1], "--out", "all.jsonl", "--samples", "5"]) == 0
    assert rlhf(["best-of-n", *given, "--out", "demos.jsonl", "--n", "5"]) == 0
    samples = [row for row in rows_of(Path("all.jsonl")) if row["completion"].strip()]
    for row in rows_of(Path("demos.jsonl")):
        mine = [one for one in samples if one["prompt"] == row["prompt"]]
        assert len(row["completion"]) == min(len(one["completion"]) for one in mine), "the mean prefers the longest"
        assert row["score"] == pytest.approx(5.5 * len(row["completion"]) - 2 * 4.5 * len(row["completion"]))


def test_the_output_trains_sft(given, policy_folder, cache):
    assert rlhf(["best-of-n", *given, "--out", "demos.jsonl", "--n", "3", "--keep", "random"]) == 0
    data = SFTDataModule("demos.jsonl")
    data.tokenizer = load_tokenizer(policy_folder)
    data.prepare_data()
    data.setup("fit")
    assert data.report.read == data.report.kept == 2
    config = ["--model", "SFTModule", "--model.init_from", policy_folder, "--data", "SFTDataModule", "--data.source",
              "demos.jsonl", "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"]  # fmt: skip
    assert rlhf(["fit", *config]) == 0


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--keep", "top-k"], "keep=top-k needs top"),
        (["--keep", "threshold"], "keep=threshold needs threshold"),
        (["--top", "3"], "top applies only to keep=top-k, not to keep=best"),
        (["--keep", "top-k", "--top", "0"], "top is 0: it must be at least 1"),
        (["--n", "0"], "n is 0: it must be at least 1"),
        (["--keep", "threshold", "--threshold", "1e9"], "completions is kept"),
    ],
)
def test_invalid_settings_are_refused_and_leave_no_file(given, flags, sentence, capsys):
    assert rlhf(["best-of-n", *given, "--out", "demos.jsonl", *flags]) == 1
    assert sentence in capsys.readouterr().err
    assert not list(Path().glob("*demos*"))


def test_an_unknown_keep_rule_is_a_usage_error(given):
    with pytest.raises(SystemExit) as ended:
        rlhf(["best-of-n", *given, "--out", "demos.jsonl", "--keep", "worst"])
    assert ended.value.code == 2
