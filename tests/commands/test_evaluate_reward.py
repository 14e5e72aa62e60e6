"""Test `rlhf evaluate-reward`: baselines that expose a length-only model, ranked lists, ties and implicit rewards."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from conftest import refused

from rlhf_lightning.commands.evaluate_reward import main, read_pairs
from rlhf_lightning.evaluation import reward_models as room


@pytest.fixture
def pairs(monkeypatch, tmp_path):
    """Return pairs in which the longer completion wins 8 times of 10, and a scorer that sees only the length."""
    lot, rows = random.Random(0), []
    for n in range(100):
        long, short = f"good {'x ' * lot.randint(5, 9)}end", "good end"
        chosen, rejected = (long, short) if n % 10 < 8 else (short, long)
        rows.append({"prompt": f"ask {n}", "chosen": chosen, "rejected": rejected, "kind": "ab"[n % 2]})
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = "def length(prompts, completions, **c):\n    return [float(len(t)) for t in completions]\n"
    Path("lengths.py").write_text(
        code + "def nothing(prompts, completions, **c):\n    return [0.0] * len(completions)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return "p.jsonl"


def test_baselines_detect_a_model_that_scores_only_length(pairs, capsys):
    assert main(["lengths.length", "lengths.nothing", "--pairs", pairs, "--subset", "kind"]) == 0
    report = json.loads(Path("reward_evaluation/report.json").read_text())
    model, blank = report["models"]["lengths.length"], report["models"]["lengths.nothing"]
    assert model["accuracy"] == pytest.approx(0.8) and model["length_correlation"] == pytest.approx(1.0)
    assert report["baselines"]["longer completion"]["accuracy"] == pytest.approx(0.8)
    assert report["baselines"]["lengths.length, prompt-blind"]["accuracy"] == pytest.approx(0.8)
    same = report["against_first"]["longer completion"]
    assert same["difference"] == 0 and same["p"] == 1 and same["test"] == "McNemar" and same["rows"] == 100
    assert blank["accuracy"] == 0.5 and blank["equal"] == 100
    assert report["against_first"]["lengths.nothing"]["ci"][1] < 0
    assert set(model["subsets"]) == {"a", "b"} and "Subsets" in capsys.readouterr().out
    assert 'src="data:' in Path("reward_evaluation/report.html").read_text()


def test_ranked_lists_report_best_of_list_and_resample_pairs_by_row(tmp_path):
    rows = [{"prompt": "p", "completions": ["aaa", "aa", "a", ""][:3] + ["b"], "ranks": [0, 1, 2, 3]}] * 4
    Path("l.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs, lists = read_pairs("l.jsonl")
    gaps = room.margins(lambda prompts, texts: [len(text) for text in texts], pairs)
    assert len(pairs) == 24 and lists == {0: 4, 1: 4, 2: 4, 3: 4}
    assert room.best_of_lists(gaps, pairs, lists)["accuracy"] == 1.0
    assert room.best_of_lists(-gaps, pairs, lists)["accuracy"] == 0.0
    found = room.accuracy(gaps, [pair.row for pair in pairs])
    assert found["accuracy"] == pytest.approx(5.5 / 6) and found["ci"][0] == pytest.approx(found["ci"][1])


def test_lists_of_right_and_wrong_completions_are_ranked_lists(tmp_path):
    rows = [
        {"prompt": "p", "chosen": ["aaa"], "rejected": ["a", "aa", "b"], "subset": "Focus"},
        {"prompt": "q", "chosen": ["aaa", "bb"], "rejected": ["a", "b"], "subset": "Ties"},
    ]
    Path("l.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs, lists = read_pairs("l.jsonl", "subset")
    won = [(pair.chosen, pair.rejected) for pair in pairs if not pair.tied and pair.subset == "Focus"]
    assert won == [("aaa", "a"), ("aaa", "aa"), ("aaa", "b")] and lists == {0: 4, 1: 4}
    assert sum(not pair.tied for pair in pairs if pair.subset == "Ties") == 4
    assert all(np.isnan(pair.position) for pair in pairs), "the form always names the right ones first"
    gaps = room.margins(lambda prompts, texts: [len(text) for text in texts], pairs)
    assert room.best_of_lists(gaps, pairs, lists)["lists"] == 1


def test_ties_are_marked_and_soft_labels_below_half_swap_the_pair(tmp_path):
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b", "preference": p} for p in (0.5, 0.2, 1.0)]
    Path("t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs, _ = read_pairs("t.jsonl")
    assert [pair.tied for pair in pairs] == [True, False, False] and pairs[1].chosen == "b"
    with refused("no-file"):
        read_pairs("none.jsonl")


def test_a_policy_equal_to_its_reference_has_margin_zero(pairs, policy_folder, reward_folder):
    assert main([policy_folder, "--pairs", pairs, "--reference", policy_folder]) == 0
    found = json.loads(Path("reward_evaluation/report.json").read_text())["models"][policy_folder]
    assert found["margin"] == pytest.approx(0.0, abs=1e-4)
    assert main([reward_folder, "--pairs", pairs]) == 0


def test_bag_of_words_baseline_is_cross_fitted():
    lot = random.Random(0)
    words = [" ".join(lot.choices("abcdefgh", k=4)) for _ in range(200)]
    pairs = [room.KnownPair(n, "p", words[n], words[n - 1], "all", False, 1.0) for n in range(200)]
    assert abs(room.accuracy(room.bag_of_words_margins(pairs), range(200))["accuracy"] - 0.5) < 0.15
    planted = [pair._replace(chosen=pair.chosen + " good") for pair in pairs]
    assert np.mean(room.bag_of_words_margins(planted) > 0) > 0.9


def test_generative_judges_and_reward_models_share_a_report(pairs, capsys):
    Path("gold.py").write_text("def length(prompt, text):\n    return len(text) / 10\n")
    argv = ["lengths.length", "--judges", "SimulatedJudge", "--pairs", pairs, "--judge_args.gold_reward", "gold.length"]
    assert main([*argv, "--judge_args.position_bias", "3", "--judge_args.scale", "1"]) == 0
    report = json.loads(Path("reward_evaluation/report.json").read_text())
    judge, scorer = report["models"]["SimulatedJudge"], report["models"]["lengths.length"]
    assert judge["accuracy"] == scorer["accuracy"] and judge["margin"] == pytest.approx(scorer["margin"] / 10)
    assert report["against_first"]["SimulatedJudge"]["difference"] == 0
    assert report["baselines"]["SimulatedJudge, prompt-blind"]["accuracy"] == judge["accuracy"]
    assert main(argv[1:]) == 0
    with refused("missing-setting", "--judges"):
        main(["--pairs", pairs])
    with refused("written-secret"):
        main([*argv, "--judge_args.api_key", "sk-secret-of-mine"])


def test_a_process_reward_model_scores_pairs_by_its_steps(policy_folder, pairs):
    from rlhf_lightning.commands.train import run

    steps = [{"prompt": f"q{n}", "completions": ["good end", "x x"], "labels": [True, n % 2 == 0]} for n in range(8)]
    Path("steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    folder = run(["fit", "--model", "ProcessRewardModule", "--model.init_from", policy_folder, "--data",
                  "ProcessDataModule", "--data.source", "steps.jsonl", "--trainer.max_steps", "1"]).folder  # fmt: skip
    assert main([str(folder / "model"), "--pairs", pairs]) == 0
    (model,) = json.loads(Path("reward_evaluation/report.json").read_text())["models"].values()
    assert model["pairs"] == 100 and model["missing"] == 0 and 0 < abs(model["margin"]) < 1
