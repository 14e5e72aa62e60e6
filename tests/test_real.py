"""Test the arithmetic, data and command lines of the real run; `make real` does the training."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
import yaml

from rlhf_lightning.recipes import FOLDER

HERE = Path(__file__).resolve().parents[1] / "experiments" / "smollm2"
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

import bag_of_words  # noqa: E402
import real  # noqa: E402
import real_figures  # noqa: E402
import real_report  # noqa: E402
import real_stages  # noqa: E402

STAGES = ("sft", "reward", "dpo", "ppo")
RECIPES = ("sft", "reward", "dpo", "ppo", "dpo_classic", "ppo_classic", "grpo_instructions", "grpo_maths")
YAMLS = [FOLDER / f"{name}.yaml" for name in RECIPES]


def pair(question, chosen, rejected, category="Science"):
    turn = {"role": "assistant"}
    return {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{**turn, "content": chosen}],
        "rejected": [{**turn, "content": rejected}],
        "category": category,
    }


# -- the baseline -----------------------------------------------------------------------------------------------------


def test_word_weights_of_one_pair_by_hand():
    """One pair with words a and b: by symmetry the weights are (w, -w), and w solves w = sigmoid(-2 w)."""
    weights = bag_of_words.fit_word_weights([("A", "b")])
    assert weights["a"] == pytest.approx(-weights["b"])
    assert weights["a"] == pytest.approx(1 / (1 + math.exp(2 * weights["a"])), abs=1e-7)
    assert bag_of_words.score_words(weights, "A a, c!") == pytest.approx(2 * weights["a"])


def test_a_word_on_both_sides_has_weight_zero():
    weights = bag_of_words.fit_word_weights([("no such thing", "yes thing"), ("no thing", "yes, every thing")])
    assert weights["thing"] == pytest.approx(0.0, abs=1e-9)
    assert weights["no"] > 0 > weights["yes"]


def test_unseen_pairs_are_classified_by_words_and_ties_count_as_wrong():
    weights = bag_of_words.fit_word_weights([("no cats", "yes cats"), ("no dogs", "yes dogs")])
    unseen = [("no birds", "yes birds"), ("yes birds", "no birds"), ("birds", "fish")]
    assert bag_of_words.is_right(weights, unseen).tolist() == [True, False, False]


def test_word_weights_equal_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    pairs = [("no cats fly", "yes cats fly high"), ("it is no one", "it is a king"), ("yes it is", "no it is not")]
    ours = bag_of_words.fit_word_weights(pairs, strength=0.7)
    words = sorted(ours)
    counts = [
        [bag_of_words.word_counts(chosen)[w] - bag_of_words.word_counts(rejected)[w] for w in words]
        for chosen, rejected in pairs
    ]
    both_ways = counts + [[-count for count in row] for row in counts]
    # Each pair appears twice, once per side, so half the data weight gives the same objective.
    theirs = linear_model.LogisticRegression(C=0.35, fit_intercept=False, tol=1e-10, max_iter=1000)
    theirs.fit(both_ways, [1] * len(pairs) + [0] * len(pairs))
    assert [ours[word] for word in words] == pytest.approx(theirs.coef_[0].tolist(), abs=1e-5)


# -- figures ----------------------------------------------------------------------------------------------------------


def test_changes_are_computed_from_paired_rows():
    """A shift by 1 of very different rows has an interval of width zero; an unpaired interval would be wide."""
    before = [-100.0, 0.0, 3.0, 50.0]
    part = real_figures.change(before, [value + 1 for value in before])
    assert part["before"] == pytest.approx(-11.75) and part["after"] == pytest.approx(-10.75)
    assert part["change"] == pytest.approx(1.0) and part["change_ci"] == pytest.approx([1.0, 1.0])


def test_the_interval_of_a_change_has_normal_width():
    """Differences -1 and 1 in equal parts, 400 rows: the standard error is 1/20, so the 95 % interval is about 0 +-
    0.098.
    """
    part = real_figures.change([0.0] * 400, [(-1.0) ** row for row in range(400)])
    assert part["change"] == 0.0
    assert part["change_ci"] == pytest.approx([-0.098, 0.098], abs=0.008)


def test_a_change_over_different_rows_is_refused():
    with pytest.raises(ValueError, match="3 rows before and 2 after"):
        real_figures.change([1.0, 2.0, 3.0], [1.0, 2.0])


def test_token_means_weight_rows_by_length():
    part = real_figures.token_mean(torch.tensor([2.0, 12.0]), torch.tensor([1, 3]))
    assert part["mean"] == pytest.approx(14 / 4)
    assert part["ci"] == pytest.approx([2.0, 4.0]), "whole rows are drawn: only the first, both, or only the second"


def test_dpo_metrics_by_hand():
    rows = {"chosen_reward": [0.5, -0.25, 0.0], "rejected_reward": [0.25, -0.5, 0.25], "loss": [0.5, 0.6, 0.7]}
    figures = real_figures.dpo(rows, seed=0)
    assert figures["reward_margin"] == pytest.approx(0.25 / 3)
    assert figures["reward_accuracy"] == pytest.approx(2 / 3)
    assert figures["loss_before"] == pytest.approx(0.6931471805599453) and figures["loss_after"] == pytest.approx(0.6)


def test_ppo_metrics_refuse_answers_to_other_prompts():
    one = {"prompt": [(1, 2), (3,)]}
    with pytest.raises(ValueError, match="another order"):
        real_figures.ppo([one, {"prompt": [(3,), (1, 2)]}], seed=0)


def test_ppo_metrics_use_the_scorers_own_score():
    """The penalty for unfinished answers must not be reported as a better score."""

    def rows(score, ruled, finished, length, kl):
        return {
            "prompt": [(1,), (2,)],
            "score": score,
            "ruled_score": ruled,
            "finished": finished,
            "length": length,
            "kl": kl,
        }

    before = rows([-1.0, -2.0], [-2.0, -3.0], [0.0, 0.0], [32.0, 32.0], [0.0, 0.0])
    after = rows([-1.0, -2.0], [-1.0, -2.0], [1.0, 1.0], [8.0, 12.0], [3.0, 5.0])
    figures = real_figures.ppo([before, after], seed=0)
    assert figures["score_change"] == 0.0 and figures["trained_score_change"] == pytest.approx(1.0)
    assert (figures["eos_rate_before"], figures["eos_rate_after"]) == (0.0, 1.0)
    assert figures["completion_length_after"] == 10.0 and figures["kl"] == 4.0


def test_checks_use_the_lower_interval_bounds():
    report = {
        "reward_model": {"lead": 0.01},
        "dpo": {"reward_margin": 0.2, "reward_margin_ci": [-0.01, 0.4]},
        "ppo": {"score_change": 0.5, "score_change_ci": [0.1, 0.9]},
    }
    assert list(real_report.checks(report).values()) == [True, False, True]


# -- data -------------------------------------------------------------------------------------------------------------


def test_train_and_held_out_prompts_do_not_overlap():
    rows = [pair(f"q{number}", "no", "yes") for number in range(5)]
    train, held_out = real_stages.split_pairs(rows, 2, 2)
    assert [row["prompt"][0]["content"] for row in train + held_out] == ["q0", "q1", "q3", "q4"]
    with pytest.raises(ValueError, match="3 training rows and 3 held-out rows overlap: the file has 5"):
        real_stages.split_pairs(rows, 3, 3)
    with pytest.raises(ValueError, match="1 prompts are in the training and in the held-out part"):
        real_stages.split_pairs([rows[0], rows[1], rows[0]], 2, 1)


def test_the_first_rows_under_the_length_limit_are_taken():
    rows = [{"messages": [{"role": "user", "content": "x" * size}]} for size in (5, 11, 10, 1, 2)]
    assert real_stages.first_short(rows, 3, 10) == [rows[0], rows[2], rows[3]]
    assert real_stages.first_short(iter(rows), 9, 1) == [rows[3]]


def test_pair_length_is_prompt_plus_longer_answer():
    assert real_stages.characters_of(pair("four", "no", "never")) == 4 + 5
    two_turns = {
        "messages": [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "de"}],
        "source": "x",
    }
    assert real_stages.characters_of(two_turns) == 5


def test_questions_alternate_between_categories():
    rows = [pair("a", "", "", "Law"), pair("b", "", "", "Food"), pair("c", "", "", "Food"), pair("d", "", "", "Art")]
    assert real_figures.shown_questions(rows, ("Food", "Art"), 3) == ["b", "d", "c"]


def test_the_report_shows_no_row_of_the_harmless_files(human_data):
    """Only questions of the TruthfulQA part are answered and shown."""
    questions = {row["prompt"][-1]["content"] for row in real_stages.read_rows(human_data / "truthfulqa_pref.jsonl")}
    rows = real_stages.read_rows(human_data / "truthfulqa_pref.jsonl")[-real_stages.FULL.reward_eval_rows :]
    shown = real_figures.shown_questions(rows, real.SAMPLE_CATEGORIES, real_stages.FULL.shown)
    assert len(shown) == real_stages.FULL.shown and set(shown) <= questions


@pytest.mark.parametrize("budget", [real_stages.FULL, real_stages.SMOKE], ids=["full", "smoke"])
def test_budgets_fit_the_data_files(budget, human_data, tmp_path):
    paths = real_stages.write_data(tmp_path / "data", tmp_path / "private", human_data, budget)
    counts = {name: len(real_stages.read_rows(Path(path))) for name, path in paths.items()}
    assert (counts["sft"], counts["sft_test"]) == (budget.sft_rows, budget.sft_eval_rows)
    assert (counts["truthful"], counts["truthful_test"]) == (budget.reward_rows, budget.reward_eval_rows)
    assert (counts["harmless"], counts["harmless_test"]) == (budget.dpo_rows, budget.dpo_eval_rows)
    assert {Path(path).parent.name for name, path in paths.items() if "harmless" in name} == {"private"}
    assert counts["truthful_test"] >= max(budget.ppo_eval_rows, budget.dpo_prompts)
    assert budget.episodes % budget.mini_batch_size == 0


@pytest.fixture
def human_data():
    data = real.parser().get_default("data")
    if not (data / "truthfulqa_pref.jsonl").is_file():
        pytest.skip(f"the human data is absent: {data} (RLHF_DATA)")
    return data


# -- command lines ----------------------------------------------------------------------------------------------------


def test_without_the_data_the_run_is_skipped(tmp_path, capsys):
    assert real.main(["--data", str(tmp_path), "--smoke", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert said.startswith("skipped: ") and "sft_instruct_train.jsonl" in said and "--data" in said
    assert not (tmp_path / "out").exists()


def test_every_argument_has_a_default(monkeypatch):
    monkeypatch.setenv("RLHF_DATA", "elsewhere")
    arguments = real.parser().parse_args(["--seed", "3"])
    assert arguments.model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert arguments.data == Path("elsewhere") and arguments.out == Path("runs/real")
    assert arguments.seed == 3 and not arguments.smoke


def parsed(arguments, capsys):
    """Return the YAML that `rlhf` would write for a command line."""
    from rlhf_lightning.commands import train

    with pytest.raises(SystemExit) as stopped:
        train.run([*arguments, "--print_config"])
    said = capsys.readouterr()
    assert stopped.value.code == 0, said.err
    return yaml.safe_load(said.out)


def holds(found, written):
    """Return whether the parsed setting equals the written one, except for filled-in defaults."""
    if isinstance(written, dict):
        return all(name in found and holds(found[name], value) for name, value in written.items())
    return found == written


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.name)
def test_every_yaml_is_short_and_parses_with_user_data(path, capsys):
    assert len(path.read_text().splitlines()) < 40
    config = parsed(["fit", "--config", str(path), "--data.source", "my_pairs.jsonl"], capsys)
    written = yaml.safe_load(path.read_text())
    assert config["data"]["init_args"]["source"] == "my_pairs.jsonl"
    for part in ("model", "data"):
        for name, value in written[part]["init_args"].items():
            if name != "source":
                assert holds(config[part]["init_args"][name], value), name


def test_the_classic_recipes_have_the_usual_settings(capsys):
    ppo = parsed(["fit", "--config", "recipe:ppo_classic"], capsys)
    dpo = parsed(["fit", "--config", "recipe:dpo_classic"], capsys)
    for config in (ppo, dpo):
        assert config["model"]["init_args"]["learning_rate"] == 1.41e-5
        assert config["model"]["init_args"]["max_grad_norm"] == 0.5
        assert config["data"]["init_args"]["batch_size"] == 64
    assert ppo["model"]["init_args"]["ppo_epochs"] == 4 and ppo["model"]["init_args"]["mini_batch_size"] == 64
    assert dpo["model"]["init_args"]["beta"] == 0.1
    micro_batches = (ppo["data"]["init_args"], dpo["data"]["init_args"])
    assert [(part["micro_batch_size"], part["max_tokens"]) for part in micro_batches] == [(64, None)] * 2


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("budget", [real_stages.FULL, real_stages.SMOKE], ids=["full", "smoke"])
def test_every_stage_parses_with_its_budget(stage, budget, capsys, tmp_path):
    names = ("sft", "sft_test", "truthful", "truthful_test", "harmless", "harmless_test")
    paths = {name: f"{name}.jsonl" for name in names}
    scorer = "reward/model" if stage == "ppo" else None
    config = parsed(real_stages.command(stage, budget, paths, "start/model", tmp_path, 7, scorer), capsys)
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    assert (config["run_name"], model["init_from"], model["seed"], data["seed"]) == (stage, "start/model", 7, 7)
    assert data["eval_rows"] == 0 and data["eval_source"]
    trains_on = json.dumps(data["source"])
    assert "test" not in trains_on
    if stage == "dpo":
        assert config["samples"]["prompts"] == 0, "harmful prompts must not reach samples.jsonl or TensorBoard"
        assert data["source"] == "harmless.jsonl" and data["eval_source"] == "harmless_test.jsonl"
    if stage == "ppo":
        assert model["scorer"] == "reward/model" and data["rollouts"] == budget.rollouts
        assert data["source"] == "truthful.jsonl" and data["eval_source"][0]["path"] == "truthful_test.jsonl"
