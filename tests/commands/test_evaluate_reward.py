"""Test `rlhf evaluate-reward`: baselines that expose a length-only model, ranked lists, ties and implicit rewards."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from conftest import refused
from tiny_models import save_reward_model

from rlhf_lightning.commands.evaluate_reward import main
from rlhf_lightning.commands.known_rewards import read_pairs, read_samples
from rlhf_lightning.evaluation import reward_models as room
from rlhf_lightning.evaluation.reward_benchmarks import list_scores
from rlhf_lightning.scoring import load_scorer
from rlhf_lightning.scoring.scorer import ask_scorer


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
        "def silent(prompts, completions, **c):\n    return [None] * len(completions)\n"
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
    with refused("no-scores", "lengths.silent"):
        main(["lengths.silent", "--pairs", pairs])
    assert set(model["subsets"]) == {"a", "b"} and "Subsets" in capsys.readouterr().out
    assert 'src="data:' in Path("reward_evaluation/report.html").read_text()


def test_ranked_lists_report_best_of_list_and_resample_pairs_by_row(tmp_path):
    rows = [{"prompt": "p", "completions": ["aaa", "aa", "a", ""][:3] + ["b"], "ranks": [0, 1, 2, 3]}] * 4
    Path("l.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs, lists = read_pairs("l.jsonl")
    gaps = room.margins(lambda prompts, texts: [len(text) for text in texts], pairs)
    assert len(pairs) == 24 and [one.size for one in lists.values()] == [4] * 4
    assert list_scores(gaps, None, pairs, [], lists)["lists"]["accuracy"] == 1.0
    assert list_scores(-gaps, None, pairs, [], lists)["lists"]["accuracy"] == 0.0
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
    assert won == [("aaa", "a"), ("aaa", "aa"), ("aaa", "b")] and [one.size for one in lists.values()] == [4, 4]
    assert sum(not pair.tied for pair in pairs if pair.subset == "Ties") == 4
    assert [pair[2:4] for pair in pairs if pair.tied] == [("aaa", "bb")], "two wrong ones are not equally bad"
    assert all(np.isnan(pair.position) for pair in pairs), "the form always names the right ones first"
    seen = []
    gaps = room.margins(lambda prompts, texts: seen.extend(texts) or [len(text) for text in texts], pairs)
    assert len(seen) == 8, "a completion is scored once, not once for each of its pairs"
    won = [pair for pair in pairs if not pair.tied]
    gaps = np.array([gap for gap, pair in zip(gaps, pairs, strict=True) if not pair.tied])
    assert list_scores(gaps, None, won, [], lists)["lists"]["lists"] == 1


def write(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_lists_with_a_completion_of_each_style_give_easy_normal_and_hard_accuracy(pairs, capsys):
    """Worked by hand from lengths; in the second row two styles have the same text."""
    rows = [
        {"prompt": "p", "chosen": ["a" * 3, "a" * 5, "a" * 7], "rejected": ["b" * 2, "b" * 5, "b" * 8], "domain": "x"},
        {"prompt": "q", "chosen": ["a" * 4, "a" * 4, "b" * 4], "rejected": ["c", "d" * 9, "e" * 4], "domain": "y"},
    ]  # won of row 1: [1 0 0], [1 .5 0], [1 1 0]; of row 2: [1 0 .5] three times
    write("s.jsonl", rows)
    assert main(["lengths.length", "--pairs", "s.jsonl", "--subset", "domain"]) == 0
    report = json.loads(Path("reward_evaluation/report.json").read_text())
    styles = report["models"]["lengths.length"]["styles"]
    assert styles["all"]["matrix"] == [[1, 0, 0.25], [1, 0.25, 0.25], [1, 0.5, 0.25]]
    levels = {part: [one[name]["accuracy"] for name in ("easy", "normal", "hard")] for part, one in styles.items()}
    assert levels["all"] == pytest.approx([5 / 6, 0.5, 1 / 6]) and styles["all"]["average"] == pytest.approx(0.5)
    assert levels["x"] == pytest.approx([1, 0.5, 0]) and levels["y"] == pytest.approx([2 / 3, 0.5, 1 / 3])
    hard = styles["all"]["hard"]
    assert hard["pairs"] == 6 and hard["ci"] == pytest.approx([0, 1 / 3]), "intervals resample rows, not pairs"
    assert report["baselines"]["longer completion"]["styles"] == styles
    assert "Accuracy by pair of styles" in capsys.readouterr().out
    write("s.jsonl", [*rows, {"prompt": "r", "chosen": ["aaa", "aa"], "rejected": ["a"]}])
    assert main(["lengths.length", "--pairs", "s.jsonl"]) == 0
    assert "by style" not in capsys.readouterr().out, "a row without a completion of each style"


def rounded_report():
    """Return the report; its fits differ by rounding between runs."""
    text = Path("reward_evaluation/report.json").read_text()
    return json.loads(text, parse_float=lambda value: round(float(value), 9))


def test_a_known_gold_reward_gives_best_of_n_by_each_model(pairs, capsys):
    """Scores 1, 2, 3 and gold rewards .3, .6, 0, as worked by hand for `best_of_n_points`."""
    gold = {"a": 0.3, "bb": 0.6, "ccc": 0.0}
    write("lists.jsonl", [{"prompt": f"ask {n}", "completions": list(gold), "truth": list(gold.values())}
                          for n in range(4)])  # fmt: skip
    write("drawn.jsonl", [{"prompt": f"ask {n}", "completion": text} for n in range(4) for text in gold])
    Path("truth.py").write_text(f"def of(prompt, text):\n    return {gold}[text]\n")
    argv = ["lengths.length", "lengths.nothing", "--pairs"]
    assert main([*argv, "lists.jsonl", "--gold", "truth"]) == 0
    report = rounded_report()
    curves = {name: [point["gold"]["mean"] for point in one["points"]]
              for name, one in report["best_of_n"]["curves"].items()}  # fmt: skip
    assert curves["lengths.length"] == pytest.approx([0.3, 0.2, 0.0]) == curves["baseline: longer completion"]
    assert curves["lengths.nothing"] == pytest.approx([0.3] * 3), "a tie is a random choice"
    assert curves["gold reward itself"] == pytest.approx([0.3, 0.5, 0.6])
    assert "Best of n by score" in capsys.readouterr().out
    assert Path("reward_evaluation/report.html").read_text().count("data:image/png") == 2
    assert main([*argv, pairs, "--completions", "drawn.jsonl", "--gold", "truth.of"]) == 0
    again = rounded_report()["best_of_n"]
    assert again["curves"] == report["best_of_n"]["curves"] and again["completions"] == "drawn.jsonl"
    alone = [*argv[:2], "--completions", "drawn.jsonl"]
    assert main([*alone, "--gold", "truth.of"]) == 0
    assert rounded_report() == {"best_of_n": again}, "without pairs"
    for flags, code in (
        ([*argv, pairs, "--completions", "drawn.jsonl"], "missing-setting"), (alone, "missing-setting"),
        ([*argv, pairs, "--gold", "truth"], "no-usable-rows"),
        ([*argv, pairs, "--gold", "truth.none"], "not-importable"),
        ([*argv[:2], "--gold", "truth"], "missing-setting"), (argv[:2], "missing-setting"),
        ([*alone, "--gold", "truth.of", "--subset", "kind"], "missing-setting"),
    ):  # fmt: skip
        with refused(code):
            main(flags)


def test_a_judge_ranks_completions_by_all_comparisons_of_a_prompt(pairs):
    """A judge that prefers length takes the same completions as a scorer of length, also if it prefers a position."""
    write("lists.jsonl", [{"prompt": f"ask {n}", "completions": ["a", "bb", "ccc", "bb"], "truth": [n, 6, 0, 6]}
                          for n in range(3)])  # fmt: skip
    Path("gold.py").write_text("def length(prompt, text):\n    return len(text) / 10\n")
    judge = ["--judges", "SimulatedJudge", "--judge_args.gold_reward", "gold.length", "--judge_args.scale", "1"]
    assert main(["lengths.length", *judge, "--judge_args.position_bias", "3",
                 "--completions", "lists.jsonl", "--gold", "truth"]) == 0  # fmt: skip
    curves = json.loads(Path("reward_evaluation/report.json").read_text())["best_of_n"]["curves"]
    model, judged = (
        [(point["n"], point["gold"]) for point in curves[name]["points"]]
        for name in ("lengths.length", "SimulatedJudge")
    )
    assert judged == model and judged[-1][1]["mean"] == 0
    found = room.scores_by_comparison(
        lambda asked: np.array([{"ab": 1.0, "ac": np.nan, "bc": -0.5}[pair.chosen + pair.rejected] for pair in asked]),
        [("p", ["a", "b", "c"]), ("q", ["a", "a"])],
    )
    assert found == [1.0, -0.75, 0.5, 0.0, 0.0], "a missing answer is left out of the mean"


def test_episodes_are_scored_in_their_context(pairs):
    """The scorer gets the last turn after the earlier turns; the gold reward gets the whole episode."""
    asked = [{"role": "user", "content": "ask"}]
    episodes = [
        [
            {"role": "assistant", "content": "x" * n},
            {"role": "user", "content": "go on"},
            {"role": "assistant", "content": "y"},
        ]
        for n in (1, 2, 3)
    ]
    rows = [{"prompt": asked, "completion": "y", "turns": turns} for turns in episodes]
    write("episodes.jsonl", [*rows, {**rows[0], "completion": "z"}, {**rows[0], "turns": []}])
    Path("talk.py").write_text(
        "def context(prompts, completions, **c):\n    return [len(p[1]['content']) + len(p) for p in prompts]\n"
        "def gold(prompt, text):\n    return text.count('x') * len(prompt)\n"
    )
    (group,) = read_samples("episodes.jsonl", "talk.gold")
    assert [row["asked"] for row in group] == [asked + turns[:-1] for turns in episodes]
    assert [row["gold"] for row in group] == [1, 2, 3]
    assert main(["talk.context", "--completions", "episodes.jsonl", "--gold", "talk.gold"]) == 0
    curve = json.loads(Path("reward_evaluation/report.json").read_text())["best_of_n"]["curves"]["talk.context"]
    assert curve["points"][-1]["score"] == 6 and curve["points"][-1]["gold"]["mean"] == 3


def test_gold_samples_are_read_as_rows_and_as_lists_with_a_column_or_a_function(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("truth.py").write_text("def length(prompt, text):\n    return len(text) + len(prompt[0]['content'])\n")
    chat = [{"role": "user", "content": "ask"}]
    drawn = [{"prompt": chat, "completion": "x" * n, "truth": n} for n in (1, 2, 3)]
    write("drawn.jsonl", [*drawn, {"prompt": "alone", "completion": "x", "truth": 1}])
    write("lists.jsonl", [{"prompt": chat, "completions": ["x", "xx", "xxx"], "truth": [1, 2, 3]}])
    expected = [[{"prompt": chat, "asked": chat, "completion": "x" * n, "gold": n} for n in (1, 2, 3)]]
    assert read_samples("drawn.jsonl", "truth") == read_samples("lists.jsonl", "truth") == expected
    assert [row["gold"] for row in read_samples("lists.jsonl", "truth.length")[0]] == [4, 5, 6]
    wrong = [
        {**drawn[0], "truth": "good"}, {**drawn[0], "truth": True}, {**drawn[0], "truth": None},
        {"prompt": chat, "completions": ["x", "xx"], "truth": [1]}, {**drawn[0], "turns": chat},
        {"prompt": chat, "completion": None, "truth": 1}, {"prompt": chat, "chosen": "x", "rejected": "y"},
    ]  # fmt: skip
    write("wrong.jsonl", [*drawn, *wrong])
    assert read_samples("wrong.jsonl", "truth") == expected
    said = capsys.readouterr().err
    assert "4 rows: truth is not a finite number" in said and "2 rows: its completions" in said
    write("wrong.jsonl", wrong)
    with refused("no-usable-rows", "no completions with a gold reward"):
        read_samples("wrong.jsonl", "truth")
    assert read_samples("lists.jsonl", "truth", as_chat=True) == expected
    write("few.jsonl", drawn[:2])
    with refused("no-usable-rows", "3 completions"):
        read_samples("few.jsonl", "truth")


def test_ties_are_marked_and_soft_labels_below_half_swap_the_pair(tmp_path):
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b", "preference": p} for p in (0.5, 0.2, 1.0)]
    Path("t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs, _ = read_pairs("t.jsonl")
    assert [pair.tied for pair in pairs] == [True, False, False] and pairs[1].chosen == "b"
    with refused("no-file"):
        read_pairs("none.jsonl")


def test_a_policy_equal_to_its_reference_has_margin_zero(pairs, policy_folder, reward_folder, capsys):
    assert main([policy_folder, "--pairs", pairs, "--reference", policy_folder]) == 0
    found = json.loads(Path("reward_evaluation/report.json").read_text())["models"][policy_folder]
    assert found["margin"] == pytest.approx(0.0, abs=1e-4)
    assert main([reward_folder, "--pairs", pairs]) == 0
    assert "--as_chat" in capsys.readouterr().err, "the tokenizer has a chat template, and the prompts are plain text"
    assert main([reward_folder, "--pairs", pairs, "--as_chat"]) == 0
    assert "--as_chat" not in capsys.readouterr().err
    (asked, *_), _ = read_pairs(pairs, as_chat=True)
    assert asked.prompt == [{"role": "user", "content": "ask 0"}]


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


def test_transcripts_and_a_feedback_store_are_pairs(pairs, monkeypatch):
    """Transcripts of HH share their first turns; of three judgements in a store one is a tie."""
    from rlhf_lightning.cli import main as rlhf

    asked = "\n\nHuman: how are you?\n\nAssistant:"
    write("hh.jsonl", [{"chosen": f"{asked} well, and you?", "rejected": f"{asked} well."}] * 3)
    fields = {"prompt": "q", "completion_1": "long answer", "completion_2": "answer"}
    judged = [{"fields": {**fields, "prompt": f"q{n}"}, "responses": {"better": [{"value": value, "user_id": "ann"}]}}
              for n, value in enumerate(("completion_1", "completion_2", "tie"))]  # fmt: skip
    Path("records.json").write_text(json.dumps(judged))
    assert rlhf(["annotate", "import", "--store", "f.db", "--records", "records.json", "--tool", "argilla"]) == 0
    for source, count, ties, accuracy in (("hh.jsonl", 3, 0, 1.0), ("f.db", 2, 1, 0.5)):
        assert main(["lengths.length", "--pairs", source]) == 0
        report = json.loads(Path("reward_evaluation/report.json").read_text())
        model = report["models"]["lengths.length"]
        assert (model["pairs"], report["tied"], model["accuracy"]) == (count, ties, accuracy), source


def test_a_multi_label_model_scores_by_its_first_output(tmp_path):
    folder = save_reward_model(tmp_path / "five", num_labels=5)
    write("one.jsonl", [{"prompt": "w20 w21", "chosen": "w30", "rejected": "w31 w32"}])
    assert main([folder, "--pairs", "one.jsonl"]) == 0
    model = json.loads(Path("reward_evaluation/report.json").read_text())["models"][folder]
    parts = ask_scorer(load_scorer(folder), ["w20 w21"] * 2, ["w30", "w31 w32"], {}, "x").parts
    first = parts["LABEL_0"].tolist()
    assert len(parts) == 5 and model["margin"] == pytest.approx(first[0] - first[1], abs=1e-6) and model["margin"] != 0


def test_an_adapter_brings_its_head_and_no_new_one_is_announced(policy_folder, pairs, caplog):
    from rlhf_lightning.commands.train import run

    flags = ["--data.source", pairs, "--data.rows", "8", "--trainer.max_steps", "1", "--model.lora.r", "2"]
    argv = ["fit", "--model", "RewardModule", "--data", "PreferenceDataModule", *flags, "--model.init_from"]
    with caplog.at_level("INFO"):
        first = run([*argv, policy_folder]).folder / "model"
        announced = [record for record in caplog.records if "no score head" in record.message]
        assert len(announced) == 1, "training starts with a new head"
        run([*argv, str(first)])
        assert main([str(first), "--pairs", pairs]) == 0
    assert [record for record in caplog.records if "no score head" in record.message] == announced


def test_a_process_reward_model_scores_pairs_by_its_steps(policy_folder, pairs):
    from rlhf_lightning.commands.train import run

    steps = [{"prompt": f"q{n}", "completions": ["good end", "x x"], "labels": [True, n % 2 == 0]} for n in range(8)]
    Path("steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    folder = run(["fit", "--model", "ProcessRewardModule", "--model.init_from", policy_folder, "--data",
                  "ProcessDataModule", "--data.source", "steps.jsonl", "--trainer.max_steps", "1"]).folder  # fmt: skip
    assert main([str(folder / "model"), "--pairs", pairs]) == 0
    (model,) = json.loads(Path("reward_evaluation/report.json").read_text())["models"].values()
    assert model["pairs"] == 100 and model["missing"] == 0 and 0 < abs(model["margin"]) < 1
