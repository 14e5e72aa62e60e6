"""Test pairs and ranked groups by value, and prompts for a policy to answer."""

import json

import pytest
import torch
from conftest import EOS, refused, spell

from rlhf_lightning.data import PreferenceDataModule
from rlhf_lightning.types import PreferenceBatch, PromptBatch, RankedBatch

PAIRS = [
    {"prompt": "p:", "chosen": " good", "rejected": " bad", "preference": 0.8, "margin": 2.0},
    {"prompt": "q:", "chosen": " a", "rejected": " ba", "weight": 0.5},
]
LIST = {"prompt": "l:", "completions": ["1", "22", "333"], "ranks": [0, 1, 1], "margin": 3.0}


def only_batch(data):
    (step,) = data.train_dataloader()
    (batch,) = step.micro_batches
    return step, batch


def ids(tensors):
    return [tensor.tolist() for tensor in tensors]


def test_pair_batch_has_the_expected_ids(ready, write_rows):
    step, batch = only_batch(ready(PreferenceDataModule(write_rows(PAIRS))))
    assert isinstance(batch, PreferenceBatch)
    assert ids(batch.sequences.prompts) == [spell("p:"), spell("q:")]  # longest pair first
    assert ids(batch.sequences.completions) == [
        spell(" good", EOS), spell(" a", EOS), spell(" bad", EOS), spell(" ba", EOS),
    ]  # fmt: skip
    assert batch.sequences.parents == (0, 1, 0, 1)
    assert all(mask.all() for mask in batch.sequences.supervised)
    for found, wanted in ((batch.target, [0.8, 1.0]), (batch.margin, [2.0, 0.0]), (batch.weights, [1.0, 0.5])):
        assert torch.equal(found, torch.tensor(wanted))
    assert (step.rows, step.tokens) == (2, 6 + 3 + 5 + 4)


def test_a_pair_becomes_a_group_of_two(ready, write_rows):
    step, batch = only_batch(ready(PreferenceDataModule(write_rows(PAIRS)), batch_type=RankedBatch))
    assert isinstance(batch, RankedBatch)
    assert ids(batch.sequences.completions) == [
        spell(" good", EOS), spell(" bad", EOS), spell(" a", EOS), spell(" ba", EOS),
    ]  # fmt: skip
    assert batch.sequences.parents == (0, 0, 1, 1)
    assert batch.ranks.tolist() == [0, 1, 0, 1] and batch.ranks.dtype == torch.int64
    assert torch.equal(batch.target, torch.tensor([0.8, 1.0]))
    assert (step.rows, step.tokens) == (2, 18)


def test_a_ranked_list_becomes_one_group(ready, write_rows):
    step, batch = only_batch(ready(PreferenceDataModule(write_rows([LIST])), batch_type=RankedBatch))
    assert ids(batch.sequences.completions) == [spell("1", EOS), spell("22", EOS), spell("333", EOS)]
    assert (batch.sequences.parents, batch.ranks.tolist()) == ((0, 0, 0), [0, 1, 1])
    assert (batch.target.tolist(), batch.margin.tolist()) == ([1.0], [3.0])
    assert (step.rows, step.tokens) == (1, 2 + 3 + 4)


def test_a_ranked_list_becomes_its_untied_pairs(ready, write_rows):
    rows = [LIST, {"prompt": "m:", "completions": ["a", "b", "c", "d"]}]
    data = ready(PreferenceDataModule(write_rows(rows), shuffle=False, batch_size=1))
    found = []
    for step in data.train_dataloader():
        (batch,) = step.micro_batches
        chosen, rejected = batch.sequences.completions
        found.append((batch.sequences.prompts[0].tolist(), chosen.tolist(), rejected.tolist()))
    wanted = [("l:", "1", "22"), ("l:", "1", "333")]  # the other two completions are tied
    wanted += [("m:", better, worse) for better, worse in ("ab", "ac", "ad", "bc", "bd", "cd")]
    assert found == [(spell(p), spell(better, EOS), spell(worse, EOS)) for p, better, worse in wanted]
    assert (data.report.read, data.report.kept, data.steps_per_epoch) == (2, 2, 8)


def test_both_sides_share_the_truncated_prompt(ready, write_rows):
    rows = [{"prompt": "uvwxyz", "chosen": "s", "rejected": "ttttttttt"}]
    _, batch = only_batch(ready(PreferenceDataModule(write_rows(rows), max_length=8)))
    assert ids(batch.sequences.prompts) == [spell("wxyz")]
    assert ids(batch.sequences.completions) == [spell("s", EOS), spell("tttt")]


def test_pairs_made_equal_by_truncation_are_dropped(ready, write_rows):
    rows = [{"prompt": "uv", "chosen": "s" * 20, "rejected": "s" * 30}, *PAIRS]
    data = ready(PreferenceDataModule(write_rows(rows), max_length=8))
    assert data.report.dropped == {"identical_after_truncation": 1} and data.report.kept == 2


def test_data_of_only_equal_pairs_is_refused(ready, write_rows):
    with refused("no-usable-rows", "1 identical_completions", "chosen equals rejected"):
        ready(PreferenceDataModule(write_rows([{"prompt": "p", "chosen": "c", "rejected": "c"}])))


def test_the_token_budget_counts_both_sides(ready, write_rows):
    rows = [{"prompt": "p:", "chosen": "x" * n, "rejected": "y"} for n in (7, 3, 3, 1)]
    data = ready(PreferenceDataModule(write_rows(rows), max_tokens=24, batch_size=4))
    (step,) = data.train_dataloader()
    sizes = [[len(c) for c in batch.sequences.completions] for batch in step.micro_batches]
    # A pair of 7 + 1 tokens with a prompt of 2 takes 2 x 10 cells, the others 2 x 6 and 2 x 4.
    assert sorted(sizes, reverse=True) == [[8, 2], [4, 4, 2, 2], [2, 2]]


def test_a_policy_predicts_the_held_out_prompts(ready, write_rows):
    data = ready(PreferenceDataModule(write_rows(PAIRS), eval_source=write_rows([LIST], "eval.jsonl")))
    (step,) = data.predict_dataloader()
    (batch,) = step.micro_batches
    assert isinstance(batch, PromptBatch) and batch.texts == ("l:",)


@pytest.mark.real
@pytest.mark.parametrize("name", ["oasst_pref_train", "hh_harmless_test", "truthfulqa_pref", "gsm8k_solution_pref"])
def test_real_pairs_are_not_truncated(ready, shared_data, smollm2, name):
    file = shared_data(f"{name}.jsonl")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    data = ready(PreferenceDataModule(str(file), max_length=None, batch_size=32, shuffle=False), tokenizer=smollm2)
    assert (data.report.read, data.report.kept, data.report.dropped) == (len(rows), len(rows), {})
    seen = {}
    for step in data.train_dataloader():
        (batch,) = step.micro_batches
        pairs = len(batch.target)
        for row in range(pairs):
            sides = [smollm2.decode(batch.sequences.completions[row + half * pairs]) for half in (0, 1)]
            seen[smollm2.decode(batch.sequences.prompts[row]), *sides] = True
    for row in rows:
        rendered = smollm2.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        assert (rendered, *(row[side][0]["content"] + "<|im_end|>" for side in ("chosen", "rejected"))) in seen


@pytest.mark.real
def test_real_standard_pairs_encode_as_their_strings(ready, shared_data, smollm2):
    file = shared_data("hh_harmless_train_standard.jsonl")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:16]]
    data = ready(PreferenceDataModule(str(file), rows=16, batch_size=1, shuffle=False), tokenizer=smollm2)
    for row, step in zip(rows, data.train_dataloader(), strict=True):
        (batch,) = step.micro_batches
        assert ids(batch.sequences.prompts) == [smollm2(row["prompt"]).input_ids]
        assert ids(batch.sequences.completions) == [
            smollm2(row[side] + "<|im_end|>").input_ids for side in ("chosen", "rejected")
        ]
