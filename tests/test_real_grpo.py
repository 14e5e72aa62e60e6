"""Test the rows, arithmetic and command line of the GRPO run; `make real-grpo` does the training."""

import json
import sys
from pathlib import Path

import pytest
import yaml

HERE = Path(__file__).resolve().parents[1] / "experiments" / "smollm2"
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

import grpo  # noqa: E402
import grpo_report  # noqa: E402


def prompts_file(folder, count=90):
    rows = [{"prompt": [{"role": "user", "content": f"Question {n}?"}], "source": grpo.SOURCE} for n in range(count)]
    rows[3:3] = [
        {"prompt": [{"role": "user", "content": "Elsewhere?"}], "source": "another"},
        {"prompt": [{"role": "user", "content": "x" * (grpo.LONGEST + 1)}], "source": grpo.SOURCE},
        {"prompt": rows[0]["prompt"], "source": grpo.SOURCE},
        {"prompt": [{"role": "user", "content": "Two turns?"}] * 3, "source": grpo.SOURCE},
    ]
    (folder / grpo.FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_short_questions_are_split_by_position_and_combined_with_every_instruction(tmp_path):
    prompts_file(tmp_path)
    paths = grpo.write_prompts(tmp_path / "data", tmp_path)
    train, held_out = (lines(paths[name]) for name in ("train", "held_out"))
    assert list(dict.fromkeys(row["question"] for row in train)) == [f"Question {n}?" for n in range(80)]
    assert {row["question"] for row in held_out} == {f"Question {n}?" for n in range(80, 90)}
    assert len(train) == 80 * 4 and [row["instruction"] for row in held_out[:4]] == list(grpo.INSTRUCTIONS)
    assert held_out[0]["prompt"][0]["content"] == "Question 80?\n\nAnswer in at most 10 words."


def test_too_few_questions_are_refused(tmp_path):
    prompts_file(tmp_path, 70)
    with pytest.raises(ValueError, match="70 short questions are too few"):
        grpo.write_prompts(tmp_path / "data", tmp_path)


def test_without_the_data_the_run_is_skipped(tmp_path, capsys):
    assert grpo.main(["--data", str(tmp_path)]) == 0
    assert "skipped: this needs prompts.jsonl" in capsys.readouterr().out


def test_slope_intervals_of_a_line_and_of_noise():
    line = grpo.slope([0.1 + 0.02 * n for n in range(30)])
    assert line["mean"] == pytest.approx(0.02) and line["ci"] == pytest.approx([0.02, 0.02])
    noise = grpo.slope([0.5 + 0.2 * (-1.0) ** n for n in range(30)])
    assert noise["ci"][0] < 0 < noise["ci"][1]


def test_held_out_metrics_are_paired_and_resample_questions(tmp_path, monkeypatch):
    prompts_file(tmp_path)
    rows = lines(grpo.write_prompts(tmp_path / "data", tmp_path)["held_out"])
    monkeypatch.setattr(
        "rlhf_lightning.tokenization.encode_prompt", lambda _, prompt: list(map(ord, prompt[0]["content"]))
    )
    prompts = [tuple(map(ord, row["prompt"][0]["content"])) for row in rows]

    def one_pass(score):
        return {
            "prompt": prompts, "score": [score(row) for row in rows], "finished": [1.0] * len(rows),
            "length": [5.0] * len(rows), "kl": [0.0] * len(rows), "completion": ["text"] * len(rows),
        }  # fmt: skip

    first = rows[0]["question"]
    before = one_pass(lambda row: 0.0)
    after = one_pass(lambda row: float(row["question"] == first))
    found = grpo.held_out_figures([before, after], rows, None, seed=0)
    assert found["change"]["score_after"] == pytest.approx(0.1) and found["eval_questions"] == 10
    # One question of ten changed, in all its rows: about 0.1 +- 0.19. Resampling rows would halve the interval.
    assert found["change"]["score_ci"] == pytest.approx([0.0, 0.3], abs=0.01)
    assert found["kept"]["digits"] == [0.0, pytest.approx(0.1)]
    with pytest.raises(ValueError, match="came in another order"):
        grpo.held_out_figures([before, {**after, "prompt": prompts[::-1]}], rows, None, seed=0)
    report = {
        "smoke": False, "seed": 0, "seconds": 60.0, "threads": 2, "batch_size": 16, "samples_per_prompt": 4,
        "max_new_tokens": 24, "learning_rate": 1e-3, "kl_coef": 0.02, "peak_memory_gib": 1.0,
        "rollout_scores": [0.1] * 30, "slope": grpo.slope([0.1] * 30), **found,
    }  # fmt: skip
    said = grpo_report.write(report, tmp_path / "out", tmp_path / "page.md")
    assert said in (tmp_path / "page.md").read_text() == (tmp_path / "out" / "report.md").read_text()
    assert "| 21 to 30 | 0.100" in (tmp_path / "page.md").read_text()


@pytest.mark.parametrize("smoke", [False, True])
def test_the_training_command_parses(smoke, capsys, tmp_path):
    from rlhf_lightning.commands import train

    paths = {"train": Path("train.jsonl"), "held_out": Path("held_out.jsonl")}
    with pytest.raises(SystemExit) as stopped:
        train.run([*grpo.command(paths, "start/model", tmp_path, 7, smoke), "--print_config"])
    said = capsys.readouterr()
    assert stopped.value.code == 0, said.err
    config = yaml.safe_load(said.out)
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    assert (model["init_from"], model["seed"], model["scorer"]) == ("start/model", 7, "InstructionScorer")
    assert (data["source"], data["eval_source"]) == ("train.jsonl", "held_out.jsonl")
    assert data["rollouts"] == (2 if smoke else 30)
