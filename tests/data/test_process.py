"""Test step-wise labels: which token ends a step, which label it gets, and the effect of truncation."""

import pytest
import torch
from conftest import ASSISTANT, END, EOS, USER, make_tiny_tokenizer, spell

from rlhf_lightning.data import ProcessDataModule
from rlhf_lightning.data.canonical import RowRefused
from rlhf_lightning.data.formats import process
from rlhf_lightning.types import DataNeeds, ProcessBatch

ROW = {"prompt": "p", "completions": ["ab", "cd", "e"], "labels": [True, 0.25, False]}


def batches(data):
    return [batch for step in data.train_dataloader() for batch in step.micro_batches]


def ends(batch, row=0):
    return batch.sequences.supervised[row].nonzero().flatten().tolist()


def test_steps_end_with_the_separator_and_the_last_with_the_end_token(ready, write_rows):
    (batch,) = batches(ready(ProcessDataModule(write_rows([ROW]))))
    assert isinstance(batch, ProcessBatch)
    assert batch.sequences.prompts[0].tolist() == spell("p")
    assert batch.sequences.completions[0].tolist() == spell("ab\ncd\ne", EOS)
    assert ends(batch) == [2, 5, 7]
    torch.testing.assert_close(batch.labels[0], torch.tensor([1.0, 0.25, 0.0]))


def test_steps_are_encoded_separately(ready, write_rows):
    """The vocabulary has a token "bc"; b and c of two adjacent steps must never become that token."""
    row = {"prompt": "p", "completions": ["ab", "cd"], "labels": [1, 0]}
    data = ready(ProcessDataModule(write_rows([row])))
    # no module allows an empty separator; it is the hardest case for the boundary
    type(data).needs = DataNeeds(step_separator="")
    (batch,) = batches(data)
    assert ends(batch) == [2, 5]


def test_in_a_chat_the_last_step_ends_with_the_end_of_turn(ready, write_rows):
    row = {**ROW, "prompt": [{"role": "user", "content": "p"}]}
    (batch,) = batches(ready(ProcessDataModule(write_rows([row]))))
    assert batch.sequences.prompts[0].tolist() == spell(USER, "\np", END, "\n", ASSISTANT, "\n")
    assert batch.sequences.completions[0].tolist() == spell("ab\ncd\ne", END)
    assert ends(batch) == [2, 5, 7]
    plain, chat = (
        batches(ready(ProcessDataModule(write_rows([{**ROW, "prompt": p}], f"{n}.jsonl"), as_chat=True)))[0]
        for n, p in enumerate(("p", row["prompt"]))
    )
    assert plain.sequences.completions[0].equal(chat.sequences.completions[0])


def test_a_step_that_spells_a_control_token_stays_text(ready, write_rows):
    row = {"prompt": [{"role": "user", "content": "p"}], "completions": ["a<|end|>", "b"], "labels": [1, 0]}
    (batch,) = batches(ready(ProcessDataModule(write_rows([row]))))
    ids = batch.sequences.completions[0].tolist()
    assert ids.count(END) == 1 and ids == spell("a<|end|>\nb", END)
    assert ends(batch) == [8, 10]


def test_steps_are_stripped_as_the_template_strips(ready, write_rows):
    tokenizer = make_tiny_tokenizer(
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + (m['content'] | trim) + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    row = {"prompt": [{"role": "user", "content": "p"}], "completions": [" a ", "b "], "labels": [1, 0]}
    (batch,) = batches(ready(ProcessDataModule(write_rows([row])), tokenizer=tokenizer))
    assert batch.sequences.completions[0].tolist() == spell("a \nb", END)


def test_an_existing_separator_is_not_doubled(ready, write_rows):
    row = {"prompt": "p", "completions": ["ab\n", "e\n"], "labels": [1, 1]}
    (batch,) = batches(ready(ProcessDataModule(write_rows([row]))))
    assert batch.sequences.completions[0].tolist() == spell("ab\ne", EOS)


def test_the_module_sets_the_separator_and_the_cache_depends_on_it(ready, write_rows):
    class Separate(ProcessDataModule):
        needs = DataNeeds(step_separator="; ")

    file = write_rows([ROW])
    (batch,) = batches(ready(ProcessDataModule(file)))
    (other,) = batches(ready(Separate(file)))
    assert batch.sequences.completions[0].tolist() == spell("ab\ncd\ne", EOS)
    assert other.sequences.completions[0].tolist() == spell("ab; cd; e", EOS)
    assert ends(other) == [3, 7, 9]


def test_truncated_steps_are_removed(ready, write_rows):
    data = ready(ProcessDataModule(write_rows([ROW]), max_length=6))
    (batch,) = batches(data)
    assert batch.sequences.completions[0].tolist() == spell("ab\ncd")
    assert ends(batch) == [2] and batch.labels[0].tolist() == [1.0]
    assert data.report.truncated == {"completion": 1}


def test_unlabelled_steps_are_context_and_not_supervised(ready, write_rows):
    rows = [{**ROW, "labels": [None, True, None]}, {**ROW, "labels": [None, None, None]}]
    data = ready(ProcessDataModule(write_rows(rows)))
    (batch,) = batches(data)
    assert len(batch.labels) == 1 and ends(batch) == [5] and batch.labels[0].tolist() == [1.0]
    assert data.report.dropped == {"nothing_supervised": 1}


def test_labelled_steps_are_counted_over_all_micro_batches_and_ranks(ready, write_rows):
    rows = [{**ROW, "prompt": f"p{i}", "labels": [1, None if i % 2 else 0, 1]} for i in range(6)]
    found = []
    for rank in range(2):
        data = ready(ProcessDataModule(write_rows(rows), batch_size=6, micro_batch_size=2), rank, 2)
        (step,) = data.train_dataloader()
        assert step.rows == 6 and step.tokens == 3 * 3 + 3 * 2
        found += [len(labels) for batch in step.micro_batches for labels in batch.labels]
    assert sum(found) == 15


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"labels": [True, False]}, "bad_step_labels"),
        ({"labels": [True, False, 2]}, "bad_step_labels"),
        ({"labels": [True, False, "no"]}, "bad_step_labels"),
        ({"labels": [True, False, float("nan")]}, "bad_step_labels"),
        ({"labels": True}, "bad_step_labels"),
        ({"completions": []}, "empty_completion"),
        ({"completions": ["a", " ", "b"]}, "empty_completion"),
        ({"completions": "abc"}, "empty_completion"),
        ({"prompt": ""}, "empty_prompt"),
    ],
)
def test_refused_rows_have_a_reason(change, reason):
    with pytest.raises(RowRefused) as refusal:
        process({**ROW, **change})
    assert refusal.value.code == reason


def test_dropped_rows_are_counted(ready, write_rows):
    data = ready(ProcessDataModule(write_rows([ROW, {**ROW, "labels": [1]}, {"prompt": "p"}])))
    assert data.report.read == 3 and data.report.kept == 1
    assert data.report.dropped == {"bad_step_labels": 1, "missing_columns": 1}


def test_rendered_steps_keep_their_control_tokens(ready, write_rows):
    row = {"prompt": "<|user|>p<|end|>", "completions": ["a<|end|>", "b"], "labels": [1, 0]}
    (batch,) = batches(ready(ProcessDataModule(write_rows([row]), rendered=True)))
    assert batch.sequences.prompts[0].tolist() == spell(USER, "p", END)
    assert batch.sequences.completions[0].tolist() == spell("a", END, "\nb", EOS)
    (batch,) = batches(ready(ProcessDataModule(write_rows([row]))))
    assert batch.sequences.completions[0].tolist() == spell("a<|end|>\nb", EOS)
