"""Test rows with one judged completion: reading, encoding, and pairing with another prompt's completion."""

import numpy as np
import pytest
from conftest import EOS, refused, spell
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.data import UnpairedDataModule
from rlhf_lightning.data.formats import unpaired
from rlhf_lightning.data.offline import mismatched_rows
from rlhf_lightning.types import DataNeeds, UnpairedBatch

ROWS = [
    {"prompt": "p:", "completion": " good", "label": True},
    {"prompt": "q:", "completion": " b", "label": 0, "weight": 0.5},
    {"prompt": "r:", "chosen": " yes", "rejected": " n"},
]


class Wants(UnpairedDataModule):
    needs = DataNeeds(mismatched=True)


def batches(data):
    return [batch for step in data.train_dataloader() for batch in step.micro_batches]


def test_unpaired_batch_has_the_expected_ids(ready, write_rows):
    (batch,) = batches(ready(UnpairedDataModule(write_rows(ROWS), shuffle=False)))
    assert isinstance(batch, UnpairedBatch) and batch.mismatched is None
    found = {
        bytes(i - 7 for i in ids.tolist() if i != EOS).decode().strip(): (bool(good), float(weight))
        for ids, good, weight in zip(batch.sequences.completions, batch.desirable, batch.weights, strict=True)
    }
    assert found == {"good": (True, 1.0), "b": (False, 0.5), "yes": (True, 1.0), "n": (False, 1.0)}
    assert batch.sequences.parents == (0, 1, 2, 3)


def test_mismatched_completions_belong_to_other_prompts_and_fit_max_length(ready, write_rows):
    (batch,) = batches(ready(Wants(write_rows(ROWS), shuffle=False, max_length=6)))
    own = {tuple(p.tolist()): set() for p in batch.sequences.prompts}
    for parent, ids in zip(batch.sequences.parents, batch.sequences.completions, strict=True):
        own[tuple(batch.sequences.prompts[parent].tolist())].add(tuple(ids.tolist()))
    assert batch.mismatched.prompts == batch.sequences.prompts
    everything = set().union(*own.values())
    for prompt, ids in zip(batch.mismatched.prompts, batch.mismatched.completions, strict=True):
        assert len(prompt) + len(ids) <= 6
        # Truncated to the available room, but still another prompt's completion.
        assert any(tuple(ids.tolist()) == full[: len(ids)] for full in everything - own[tuple(prompt.tolist())])


def test_mismatched_pairs_do_not_depend_on_batching(ready, write_rows):
    rows = [{"prompt": f"{i}:", "completion": f" {i}", "label": i % 2} for i in range(12)]

    def pairs(**changes):
        found = {}
        for rank in range(changes.get("ranks", 1)):
            data = ready(
                Wants(write_rows(rows), batch_size=4, **changes.get("data", {})), rank, changes.get("ranks", 1)
            )
            for batch in batches(data):
                for prompt, ids in zip(batch.mismatched.prompts, batch.mismatched.completions, strict=True):
                    found[tuple(prompt.tolist())] = tuple(ids.tolist())
        return found

    whole = pairs()
    assert len(whole) == 12
    assert pairs(ranks=2) == whole
    assert pairs(data={"micro_batch_size": 1}) == whole
    assert pairs(data={"seed": 1}) != whole


@given(st.lists(st.integers(0, 5), min_size=2, max_size=40), st.integers(0, 9))
def test_every_row_gets_a_completion_of_another_prompt(groups, seed):
    prompts = np.array(groups)
    rows = np.arange(len(groups))
    if len(set(groups)) == 1:
        with refused("one-prompt", "have the same prompt"):
            mismatched_rows(prompts, rows, seed)
        return
    pairs = mismatched_rows(prompts, rows, seed)
    assert sorted(pairs) == rows.tolist()
    assert all(prompts[row] != prompts[other] for row, other in pairs.items())


@given(st.integers(2, 40), st.integers(0, 9))
def test_with_distinct_prompts_every_completion_is_used_once(count, seed):
    pairs = mismatched_rows(np.arange(count), np.arange(count), seed)
    assert sorted(pairs.values()) == list(range(count))


@pytest.mark.parametrize(
    ("label", "good"),
    [(True, True), (1, True), (1.0, True), ("1", True), ("True", True), (False, False), (0, False), (-1, False)],
)
def test_good_and_bad_labels_are_read(label, good):
    row = unpaired({"prompt": "p", "completion": "c", "label": label})
    assert row.ranks == [0 if good else 1]


@pytest.mark.parametrize("label", [None, 2, 0.5, "good", "", float("nan")])
def test_invalid_labels_are_refused(label):
    with refused("bad_label"):
        unpaired({"prompt": "p", "completion": "c", "label": label})


def test_labelled_conversations_are_read(ready, write_rows):
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    row = unpaired({"messages": turns, "label": -1})
    assert (row.prompt, row.completions, row.ranks) == (turns[:1], [turns[1:]], [1])
    (batch,) = batches(ready(UnpairedDataModule(write_rows([{"messages": turns, "label": 0}]))))
    assert batch.desirable.tolist() == [False]


def test_plain_text_is_encoded_with_eos(ready, write_rows):
    (batch,) = batches(ready(UnpairedDataModule(write_rows(ROWS[:1]))))
    assert batch.sequences.completions[0].tolist() == spell(" good", EOS)
