"""Test `rlhf generate`: every prompt is answered, in order, with the models' own log-probabilities and scores."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from tiny_run import rows_of
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_lightning.cli import main as rlhf
from rlhf_lightning.commands.generate import ONE_TURN, SamplingArguments
from rlhf_lightning.sampling import slot_engine
from rlhf_lightning.tokenization import encode_completion, encode_prompt, load_tokenizer

PROMPTS = [
    {"prompt": "ab", "category": "short"},
    {"prompt": [{"role": "user", "content": "hello"}], "category": "chat"},
    {"prompt": "a longer prompt than the others", "category": "long"},
]


@pytest.fixture
def prompts():
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return "prompts.jsonl"


def generate(*flags):
    assert rlhf(["generate", *flags]) == 0
    return rows_of(Path("answers.jsonl"))


def test_output_rows_keep_order_and_columns(policy_folder, prompts):
    rows = generate("--model", policy_folder, "--prompts", prompts, "--out", "answers.jsonl", "--samples", "2",
                    "--max-new-tokens", "12")  # fmt: skip
    assert [(row["prompt"], row["sample"]) for row in rows] == [(p["prompt"], s) for p in PROMPTS for s in (0, 1)]
    assert [row["category"] for row in rows] == ["short", "short", "chat", "chat", "long", "long"]
    assert len({row["completion"] for row in rows}) == 6, "samples of one prompt are other episodes"
    assert "score" not in rows[0]


@pytest.mark.parametrize(("flags", "told"), [((), True), (("--as_chat", "true"), False)])
def test_plain_prompts_for_a_chat_model_warn(policy_folder, prompts, capsys, flags, told):
    generate("--model", policy_folder, "--prompts", prompts, "--out", "answers.jsonl", "--max-new-tokens", "2", *flags)
    assert ("--as_chat true puts each into a user turn" in capsys.readouterr().err) is told


def test_logprobs_equal_the_policys_at_the_temperature(policy_folder, prompts, monkeypatch):
    drawn = []

    def kept(*args, **kwargs):
        drawn.append(sampling_of(*args, **kwargs))
        return drawn[-1]

    sampling_of = slot_engine.SlotEngine.sample
    monkeypatch.setattr(slot_engine.SlotEngine, "sample", kept)
    rows = generate("--model", policy_folder, "--prompts", prompts, "--out", "answers.jsonl", "--samples", "2",
                    "--max-new-tokens", "12", "--temperature", "0.8")  # fmt: skip
    tokenizer, model = load_tokenizer(policy_folder), AutoModelForCausalLM.from_pretrained(policy_folder).eval()
    for row, completion in zip(rows, [ids for batch in drawn for ids in batch.ids], strict=True):
        prompt = torch.tensor(encode_prompt(tokenizer, row["prompt"]))
        with torch.no_grad():
            logits = model(torch.cat([prompt, completion]).unsqueeze(0)).logits[0] / 0.8
        logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(-1, completion.unsqueeze(-1))
        assert row["logprob"] == pytest.approx(float(logprobs.sum()), abs=1e-3)
        assert row["length"] == len(completion) and row["finished"] == (int(completion[-1]) in (2, 5))


def test_samples_depend_on_the_seed_and_not_on_the_batch_size(policy_folder, prompts):
    base = ("--model", policy_folder, "--prompts", prompts, "--out", "answers.jsonl", "--max_new_tokens", "8")
    first, small, other = (
        generate(*base, "--samples", "3", *flags)
        for flags in (["--batch-size", "16"], ["--batch-size", "2"], ["--seed", "1"])
    )
    assert [row["completion"] for row in small] == [row["completion"] for row in first]
    assert [row["logprob"] for row in small] == pytest.approx([row["logprob"] for row in first], abs=1e-3)
    assert [row["completion"] for row in other] != [row["completion"] for row in first]


def test_temperature_zero_is_greedy(policy_folder, prompts):
    rows = generate("--model", policy_folder, "--prompts", prompts, "--out", "answers.jsonl", "--temperature", "0",
                    "--max-new-tokens", "6", "--samples", "2")  # fmt: skip
    assert [row["completion"] for row in rows[::2]] == [row["completion"] for row in rows[1::2]]
    tokenizer, model = load_tokenizer(policy_folder), AutoModelForCausalLM.from_pretrained(policy_folder)
    ids = encode_prompt(tokenizer, "ab")
    start = len(ids)
    for _ in range(6):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert rows[0]["completion"] == tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_scores_equal_those_of_the_reward_model(policy_folder, reward_folder, prompts):
    rows = generate("--model", policy_folder, "--prompts", prompts, "--out", "answers.jsonl", "--scorer", reward_folder,
                    "--max-new-tokens", "4")  # fmt: skip
    tokenizer = load_tokenizer(reward_folder)
    model = AutoModelForSequenceClassification.from_pretrained(reward_folder).eval()
    for row in rows:
        completion, _ = encode_completion(tokenizer, row["completion"], row["prompt"])
        ids = torch.tensor([encode_prompt(tokenizer, row["prompt"]) + completion])
        with torch.no_grad():
            assert row["score"] == pytest.approx(float(model(ids).logits), abs=1e-4)


def test_a_user_scorer_gets_the_row_columns(policy_folder, prompts):
    Path("my_scores.py").write_text(
        "def categories(prompts, completions, category):\n    return [float(len(name)) for name in category]\n"
    )
    rows = generate("--model", policy_folder, "--prompts", prompts, "--out", "answers.jsonl", "--scorer",
                    "my_scores.categories", "--max-new-tokens", "2")  # fmt: skip
    assert [row["score"] for row in rows] == [5.0, 4.0, 4.0]


def test_a_none_score_is_written_as_null(policy_folder, prompts):
    Path("some_scores.py").write_text("def some(prompts, completions, **columns):\n    return [1.0, None, 0.0]\n")
    rows = generate("--model", policy_folder, "--prompts", prompts, "--out", "answers.jsonl", "--scorer",
                    "some_scores.some", "--max-new-tokens", "2")  # fmt: skip
    assert [row["score"] for row in rows] == [1.0, None, 0.0]


def test_a_wrong_number_of_scores_is_refused_and_leaves_no_file(policy_folder, prompts, capsys):
    Path("bad_scores.py").write_text("def few(prompts, completions, **columns):\n    return [1.0]\n")
    assert rlhf(["generate", "--model", policy_folder, "--prompts", prompts, "--out", "answers.jsonl", "--scorer",
                 "bad_scores.few", "--max-new-tokens", "2"]) == 1  # fmt: skip
    assert "scorer 'bad_scores.few' returned 1 scores for 3 completions" in capsys.readouterr().err
    assert not list(Path().glob("*answers*")) and not list(Path().glob(".*answers*"))


def test_rows_without_a_prompt_are_counted_and_named(policy_folder, capsys):
    Path("prompts.jsonl").write_text('{"prompt": "ab"}\n{"prompt": ""}\nnonsense\n{"prompt": null}\n')
    rows = generate(
        "--model", policy_folder, "--prompts", "prompts.jsonl", "--out", "answers.jsonl", "--max-new-tokens", "2"
    )
    assert len(rows) == 1
    told = capsys.readouterr().err
    assert "2 rows: the prompt is empty, or not text" in told and "1 rows: the line is not a JSON object" in told


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            '{"question": "ab"}\n',
            "has no usable prompt (1 rows: a required column is missing); its columns are question",
        ),
        ("", "prompts.jsonl has no usable prompt (it is empty); its columns are none"),
        (None, "there is no file prompts.jsonl"),
    ],
)
def test_files_without_prompts_are_refused(policy_folder, text, sentence, capsys):
    if text is not None:
        Path("prompts.jsonl").write_text(text)
    assert rlhf(["generate", "--model", policy_folder, "--prompts", "prompts.jsonl", "--out", "answers.jsonl"]) == 1
    assert sentence in capsys.readouterr().err


def test_folders_that_are_not_policies_are_refused(policy_folder, reward_folder, prompts, capsys):
    Path("empty").mkdir()
    Path("bare").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        Path("bare", name).write_bytes(Path(policy_folder, name).read_bytes())
    for model, sentence in (
        ("empty", "empty is not a model folder: it has no config.json"),
        ("./absent", "there is no model folder ./absent"),
        ("bare", "bare has no weights"),
        (reward_folder, "is a reward model: it scores completions and cannot generate them"),
    ):
        assert rlhf(["generate", "--model", model, "--prompts", prompts, "--out", "answers.jsonl"]) == 1
        told = capsys.readouterr().err
        assert sentence in told and "Traceback" not in told


@pytest.mark.parametrize(
    ("flags", "status", "sentence"),
    [
        (["--max-new-tokens", "0"], 1, "max_new_tokens is 0"),
        (["--temperature", "-1"], 1, "temperature is -1"),
        (["--samples", "0"], 1, "samples is 0"),
        (["--temprature", "1"], 2, "there is no setting --temprature; the nearest is --temperature"),
        (["--samples", "many"], 2, "samples must be a whole number, not many"),
    ],
)
def test_invalid_settings_are_refused(policy_folder, prompts, flags, status, sentence, capsys):
    given = ["generate", "--model", policy_folder, "--prompts", prompts, "--out", "answers.jsonl", *flags]
    try:
        found = rlhf(given)
    except SystemExit as exit_status:
        found = exit_status.code
    assert found == status and sentence in capsys.readouterr().err


def test_missing_settings_are_named(capsys):
    with pytest.raises(SystemExit) as exit_status:
        rlhf(["generate", "--model", "x"])
    assert exit_status.value.code == 2
    assert "missing: --prompts, --out" in capsys.readouterr().err


def test_the_summary_counts_completions_and_tokens(policy_folder, prompts, capsys):
    rows = generate("--model", policy_folder, "--prompts", prompts, "--out", "answers.jsonl", "--max-new-tokens", "5")
    tokens = sum(row["length"] for row in rows)
    assert f"answers.jsonl: 3 completions, {tokens} tokens," in capsys.readouterr().out


ENGINE = '{"class_path": "GenerateEngine"}'


@pytest.mark.parametrize("engine", ["GenerateEngine", ENGINE])
def test_another_engine_gives_the_same_greedy_completions(policy_folder, prompts, engine):
    base = ("--model", policy_folder, "--prompts", prompts, "--out", "answers.jsonl", "--max-new-tokens", "6",
            "--temperature", "0")  # fmt: skip
    own, other = generate(*base), generate(*base, "--engine", engine)
    assert [row["completion"] for row in own] == [row["completion"] for row in other]


@pytest.mark.parametrize("command", ["generate", "best-of-n", "critique", "label", "annotate", "chat"])
def test_every_sampling_command_shares_the_sampling_arguments(command, capsys):
    with pytest.raises(SystemExit):
        rlhf([command, "--help"])
    said = capsys.readouterr().out
    names = {field.name for field in fields(SamplingArguments)} - ({"batch_size"} if command == "chat" else set())
    names -= set(ONE_TURN) if command in ("critique", "label", "annotate") else set()
    assert {name for name in names if f"--{name} " in said} == names


def test_an_unknown_engine_is_refused_before_any_file_is_written(policy_folder, prompts, capsys):
    assert rlhf(
        ["generate", "--model", policy_folder, "--prompts", prompts, "--out", "a.jsonl", "--engine", "SlotEngin"]
    )
    assert "did you mean SlotEngine?" in capsys.readouterr().err and not Path("a.jsonl").exists()
