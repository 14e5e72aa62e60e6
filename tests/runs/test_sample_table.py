"""Test sample tables: which prompts are sampled when, samples.jsonl, and TensorBoard's text tab."""

import pytest
import tiny_run
from conftest import refused
from tiny_run import BASIC, UPDATES, events_of, rows_of

from rlhf_lightning.commands.train import run
from rlhf_lightning.runs import SampleTable
from rlhf_lightning.runs.samples import LONGEST_CELL, as_table, cell
from rlhf_lightning.scoring import InstructionScorer


def texts_of(folder):
    return [
        (event.step, event.tensor_proto.string_val[0].decode())
        for event in events_of(folder).Tensors("samples/text_summary")
    ]


def test_samples_are_written_before_during_and_after_training():
    folder = run(["fit", *BASIC, "--samples.prompts", "2", "--samples.every_n_updates", "3"]).folder
    rows = rows_of(folder / "samples.jsonl")
    assert [row["update"] for row in rows] == [0, 0, 3, 3, 6, 6, 8, 8]
    assert set(rows[0]) == {"update", "prompt", "completion", "score", "finished", "length"}
    assert rows[0]["prompt"] == "prompt <0>\nsecond | line" and rows[1]["prompt"].startswith("prompt <1>")
    assert rows[0]["completion"].endswith("| 0.000") and not rows[-1]["completion"].endswith("| 0.000")
    assert (rows[0]["score"], rows[0]["finished"], rows[0]["length"]) == (None, True, 3)


def test_tensorboard_text_has_an_escaped_table_at_the_same_updates():
    folder = run(["fit", *BASIC, "--samples.prompts", "1"]).folder
    texts = texts_of(folder)
    assert [step for step, _ in texts] == [0, UPDATES]
    header, rule, row = texts[0][1].splitlines()
    assert header == "| prompt | completion | score | finished | length |" and set(rule) == {"|", "-"}
    assert (
        row == "| prompt &lt;0&gt;<br>second \\| line | prompt &lt;0&gt;<br>second \\| line \\| 0\\.000 |  | yes | 3 |"
    )


def test_scores_come_from_the_scorer_and_are_null_if_missing(monkeypatch):
    def scorer(prompts, completions, **columns):
        return [0.25, None, None][: len(prompts)]

    monkeypatch.setattr(
        tiny_run.SlopeModule, "load_models", lambda self: (_load(self), setattr(self, "scorer", scorer))
    )
    folder = run(["fit", *BASIC, "--samples.prompts", "3"]).folder
    assert [row["score"] for row in rows_of(folder / "samples.jsonl")][:3] == [0.25, None, None]
    assert "| 0.250 | yes |" in texts_of(folder)[0][1]


_load = tiny_run.SlopeModule.load_models


def needs_answer(prompts, completions, answer):
    return [1.0] * len(prompts)


@pytest.mark.parametrize("scorer", [needs_answer, InstructionScorer()])
def test_without_a_needed_column_scores_are_null(monkeypatch, scorer):
    monkeypatch.setattr(
        tiny_run.SlopeModule, "load_models", lambda self: (_load(self), setattr(self, "scorer", scorer))
    )
    rows = rows_of(run(["fit", *BASIC]).folder / "samples.jsonl")
    assert {row["score"] for row in rows} == {None}


def test_a_module_without_a_policy_writes_no_samples():
    folder = run(["fit", *BASIC, "--model", "tiny_run.ScoredSlopeModule"]).folder
    assert not (folder / "samples.jsonl").exists()


def test_zero_prompts_write_no_samples():
    assert not (run(["fit", *BASIC, "--samples.prompts", "0"]).folder / "samples.jsonl").exists()


def test_sample_settings_override_the_modules_sampling():
    from rlhf_lightning.sampling.engines import SamplingSettings

    own = SamplingSettings(max_new_tokens=48, temperature=0.7)
    assert SampleTable().settings(own) == own
    asked = SampleTable(max_new_tokens=8, temperature=0.0).settings(own)
    assert (asked.max_new_tokens, asked.temperature) == (8, 0.0)
    assert own.temperature == 0.7


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a|b", "a\\|b"),
        ("<script>&", "&lt;script&gt;&amp;"),
        ("**bold** _it_ `code`", "\\*\\*bold\\*\\* \\_it\\_ \\`code\\`"),
        ("a\r\nb\rc\nd", "a<br>b<br>c<br>d"),
        ("back\\slash", "back\\\\slash"),
        ("# heading", "\\# heading"),
        ("", "(empty)"),
    ],
)
def test_cells_escape_text_for_markdown_tables(text, shown):
    assert cell(text) == shown


def test_long_cells_are_truncated_before_escaping():
    assert cell("a" * (LONGEST_CELL + 1)) == "a" * (LONGEST_CELL - 1) + "…"
    assert cell("a" * LONGEST_CELL) == "a" * LONGEST_CELL


def test_a_conversation_is_shown_turn_by_turn():
    prompt = [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "Hi"}]
    row = {"prompt": prompt, "completion": "Hello", "score": -1.23456, "finished": False, "length": 2}
    assert as_table([row]).splitlines()[2] == "| system: Be kind<br>user: Hi | Hello | -1.235 | no | 2 |"


@pytest.mark.parametrize(
    "arguments", [{"prompts": -1}, {"every_n_updates": 0}, {"max_new_tokens": 10**21}, {"temperature": -0.1}]
)
def test_invalid_settings_are_refused(arguments):
    with refused("setting-out-of-range", f"samples.{next(iter(arguments))} is"):
        SampleTable(**arguments)
