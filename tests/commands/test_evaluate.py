"""Test `rlhf evaluate` on tiny models: table, JSON, completions and page."""

import json
import re
from pathlib import Path

import pytest
from conftest import refused

from rlhf_lightning.commands.evaluate import main


@pytest.fixture
def prompts():
    Path("p.jsonl").write_text("".join(json.dumps({"prompt": f"say <b>{n}</b>"}) + "\n" for n in range(4)))
    Path("judges.py").write_text("def longer(prompt, text):\n    return float(len(text))\n")
    Path("scores.py").write_text(
        "def length(prompts, completions, **c):\n    return [len(t) % 7 for t in completions]\n"
    )
    return "p.jsonl"


def test_models_are_compared_on_the_same_prompts(policy_folder, plain_folder, prompts, capsys, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(tmp_path))
    argv = [policy_folder, plain_folder, "--prompts", prompts, "--scorer", "scores.length", "--samples", "2"]
    argv += ["--max_new_tokens", "6", "--correct", "3", "--judge", "SimulatedJudge"]
    assert main([*argv, "--judge_args.gold_reward", "judges.longer"]) == 0
    report = json.loads(Path("evaluation/report.json").read_text())
    first, second = report["models"].values()
    assert first["kl"]["mean"] == pytest.approx(0.0, abs=1e-5) and "pass@2" in first and first["completions"] == 8
    assert report["comparisons"][plain_folder]["judge"]["comparisons"] == 8
    assert len(Path("evaluation/completions.jsonl").read_text().splitlines()) == 16
    page = Path("evaluation/report.html").read_text()
    assert "say &lt;b&gt;0" in page and not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "Reliability of the judge" in capsys.readouterr().out


def test_a_gold_reward_gives_best_of_n_and_its_fit(policy_folder, prompts, capsys, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(tmp_path))
    argv = [policy_folder, "--prompts", prompts, "--scorer", "scores.length", "--gold", "judges.longer"]
    assert main([*argv, "--samples", "4", "--max_new_tokens", "6"]) == 0
    report = json.loads(Path("evaluation/report.json").read_text())
    curve = report["overoptimization"]["best_of_n"][policy_folder]
    assert [point["n"] for point in curve["points"]] == [1, 2, 4] and report["overoptimization"]["models"] is None
    assert curve["points"][0]["gold"]["mean"] == pytest.approx(report["models"][policy_folder]["gold"]["mean"])
    rows = [json.loads(line) for line in Path("evaluation/completions.jsonl").read_text().splitlines()]
    best = [max(rows[start : start + 4], key=lambda row: row["score"])["score"] for start in range(0, 16, 4)]
    assert curve["points"][-1]["score"] == pytest.approx(sum(best) / 4)
    assert "Best of n by score" in capsys.readouterr().out
    assert Path("evaluation/report.html").read_text().count("data:image/png") == 1


def test_one_model_alone_has_no_win_rate(policy_folder, prompts, capsys):
    assert main([policy_folder, "--prompts", prompts, "--max_new_tokens", "4"]) == 0
    assert "Win rate" not in capsys.readouterr().out


def test_every_model_is_checked_before_the_first_samples(policy_folder, reward_folder, prompts, capsys):
    for further in ([reward_folder], ["--reference", reward_folder]):
        with refused("reward-model"):
            main([policy_folder, *further, "--prompts", prompts])
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "code"),
    [(["--samples", "0"], "setting-out-of-range"), (["--correct", "1"], "missing-setting"),
     (["--judge", "SimulatedJudge"], "missing-setting")],
)  # fmt: skip
def test_invalid_flags_are_refused(policy_folder, prompts, flags, code):
    with refused(code):
        main([policy_folder, "--prompts", prompts, *flags])


def test_a_judge_and_the_page_get_all_turns_of_an_episode(policy_folder, plain_folder, monkeypatch, tmp_path):
    Path("g.jsonl").write_text("".join(json.dumps({"prompt": "guess:", "secret": n}) + "\n" for n in (3, 7)))
    Path("judges.py").write_text(
        "seen = []\n\n\ndef turns(prompt, text):\n    seen.append(text)\n    return float(text.count('user: '))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    argv = [policy_folder, plain_folder, "--prompts", "g.jsonl", "--max_new_tokens", "8", "--max_turns", "3"]
    argv += ["--environment", "GuessTheNumber", "--engine", "many_ends.ManyEnds", "--judge", "SimulatedJudge"]
    assert main([*argv, "--judge_args.gold_reward", "judges.turns"]) == 0
    rows = [json.loads(line) for line in Path("evaluation/completions.jsonl").read_text().splitlines()]
    assert max(len(row["turns"]) for row in rows) > 1
    import judges

    assert "user: answer with a number from 1 to 16" in Path("evaluation/report.html").read_text()
    for row in rows:
        assert "\n".join(f"{turn['role']}: {turn['content']}" for turn in row["turns"]) in judges.seen
        said = [turn for turn in row["turns"] if turn["role"] == "assistant"]
        assert row["length"] <= 8 * len(said), "replies do not count"


def test_an_environment_gives_turns_and_scores(policy_folder):
    Path("g.jsonl").write_text("".join(json.dumps({"prompt": "guess:", "secret": n}) + "\n" for n in (3, 7)))
    argv = [policy_folder, "--prompts", "g.jsonl", "--max_new_tokens", "4", "--max_turns", "2"]
    assert main([*argv, "--environment", "GuessTheNumber"]) == 0
    rows = [json.loads(line) for line in Path("evaluation/completions.jsonl").read_text().splitlines()]
    assert all(len(row["turns"]) >= 1 and row["score"] == row["reward"] for row in rows)
    report = json.loads(Path("evaluation/report.json").read_text())
    assert report["settings"]["environment"] == "GuessTheNumber" and "score" in report["models"][policy_folder]
