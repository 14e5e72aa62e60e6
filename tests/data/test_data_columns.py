"""Columns needed by an objective stay with their rows when rows are split, sharded, shuffled, streamed, resumed,
cached.
"""

import json

import pytest
from conftest import refused

from rlhf_lightning.data import (
    PreferenceDataModule,
    ProcessDataModule,
    PromptDataModule,
    SFTDataModule,
    UnpairedDataModule,
)
from rlhf_lightning.types import RankedBatch

ROWS = [{"prompt": f"p{n}", "completion": "x" * (1 + n % 5), "helpful": n, "brief": -n / 2} for n in range(11)]


def asking(data, *names):
    data.data_columns = names
    return data


def seen(loader, tokenizer, field="sequences"):
    """Return the columns of each row, keyed by the text of its prompt."""
    found = {}
    for step in loader:
        for batch in step.micro_batches:
            prompts = batch.prompts if hasattr(batch, "prompts") else batch.sequences.prompts
            for row, prompt in enumerate(prompts):
                numbers = {name: float(values[row]) for name, values in batch.extras.items()}
                found.setdefault(tokenizer.decode(prompt).strip(": "), []).append(numbers)
    return found


@pytest.mark.parametrize(
    "changes", [{}, {"micro_batch_size": 1}, {"max_tokens": 12}, {"shuffle": False}, {"eval_rows": 3}]
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_data_columns_stay_with_their_rows_for_any_batching(ready, write_rows, tiny_tokenizer, changes, ranks):
    source, found = write_rows(ROWS), {}
    for rank in range(ranks):
        data = asking(SFTDataModule(source, batch_size=4, **changes), "helpful", "brief")
        found |= seen(ready(data, rank, ranks).train_dataloader(), tiny_tokenizer)
    assert len(found) == len(ROWS) - changes.get("eval_rows", 0)
    for prompt, slots in found.items():
        n = int(prompt.removeprefix("p"))
        assert slots == [{"helpful": n, "brief": -n / 2}]


def test_every_batch_type_has_data_columns(ready, write_rows, tiny_tokenizer):
    pair = [{"prompt": f"p{n}", "chosen": "a", "rejected": "b", "gap": n} for n in range(4)]
    lists = [{"prompt": f"p{n}", "completions": ["a", "b", "c"], "gap": n} for n in range(4)]
    steps = [{"prompt": f"p{n}", "completions": ["a", "b"], "labels": [1, 0], "gap": n} for n in range(4)]
    judged = [{"prompt": f"p{n}", "completion": "a", "label": n % 2, "gap": n} for n in range(4)]
    expected = {f"p{n}": [{"gap": n}] for n in range(4)}
    for number, (kind, rows, batch) in enumerate(
        [
            (PreferenceDataModule, pair, None),
            (PreferenceDataModule, lists, RankedBatch),
            (ProcessDataModule, steps, None),
            (UnpairedDataModule, judged, None),
        ]
    ):
        data = ready(asking(kind(write_rows(rows, f"{number}.jsonl"), batch_size=3), "gap"), batch_type=batch)
        assert seen(data.train_dataloader(), tiny_tokenizer) == expected
    data = ready(asking(PreferenceDataModule(write_rows(lists, "pairs.jsonl"), batch_size=3), "gap"))
    assert seen(data.train_dataloader(), tiny_tokenizer) == {name: 3 * slots for name, slots in expected.items()}
    data = ready(asking(UnpairedDataModule(write_rows(pair, "two.jsonl"), batch_size=3), "gap"))
    assert seen(data.train_dataloader(), tiny_tokenizer) == {name: 2 * slots for name, slots in expected.items()}


def test_each_sample_of_a_prompt_has_its_data_columns(ready, write_rows, tiny_tokenizer):
    rows = [{"prompt": f"p{n}", "budget": n} for n in range(4)]
    data = ready(asking(PromptDataModule(write_rows(rows), batch_size=4, samples_per_prompt=2), "budget"))
    assert seen(data.train_dataloader(), tiny_tokenizer) == {f"p{n}": 2 * [{"budget": n}] for n in range(4)}
    for step in data.train_dataloader():
        (batch,) = step.micro_batches
        assert batch.columns["budget"] == batch.extras["budget"].tolist()


def test_rows_with_a_non_numeric_data_column_are_dropped_and_counted(ready, write_rows):
    spoilt = [{**ROWS[0], "helpful": value} for value in (None, "much", "", [1], float("inf"), "2.5", True)]
    data = ready(asking(SFTDataModule(write_rows(spoilt), batch_size=1), "helpful"))
    assert data.report.dropped == {"bad_data_column": 5}
    assert sorted(data.store.extras(range(2))["helpful"].tolist()) == [1.0, 2.5]


def test_a_missing_data_column_is_refused(ready, write_rows):
    with refused("missing-data-column", "'kind'"):
        ready(asking(SFTDataModule(write_rows(ROWS)), "kind"))
    renamed = asking(SFTDataModule(write_rows(ROWS), columns={"helpful": "kind"}), "kind")
    assert ready(renamed).store.extras([3])["kind"].tolist() == [3.0]


def test_the_row_cache_depends_on_the_data_columns(ready, write_rows, tiny_tokenizer):
    source = write_rows(ROWS)
    for names in (("helpful",), ("brief", "helpful"), ()):
        for _ in range(2):  # first written, then read
            data = ready(asking(SFTDataModule(source, batch_size=4, shuffle=False), *names))
            assert data.store.slots == names
            (first, *_) = data.train_dataloader()
            (batch,) = first.micro_batches
            assert set(batch.extras) == set(names)


def test_streams_have_data_columns_and_resume(ready, tmp_path, tiny_tokenizer):
    for shard in range(2):
        rows = ROWS[shard::2]
        (tmp_path / f"{shard}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"batch_size": 4, "streaming": True, "steps_per_epoch": 6}

    def made(rank=0, ranks=1):
        return ready(asking(SFTDataModule(str(tmp_path / "*.jsonl"), **settings), "helpful"), rank, ranks)

    whole = list(loader := made().train_dataloader())
    for prompt, slots in seen(whole, tiny_tokenizer).items():
        assert {slot["helpful"] for slot in slots} == {int(prompt.removeprefix("p"))}
    loader = made().train_dataloader()
    steps = iter(loader)
    for _ in range(3):
        next(steps)
    state = json.loads(json.dumps(loader.state_dict()))
    again = made().train_dataloader()
    again.load_state_dict(state)
    assert seen(again, tiny_tokenizer) == seen(whole[3:], tiny_tokenizer)
    shares = [seen(made(rank, 2).train_dataloader(), tiny_tokenizer) for rank in (0, 1)]
    everything = {}
    for share in shares:
        for prompt, slots in share.items():
            everything[prompt] = everything.get(prompt, []) + slots
    assert everything == seen(whole, tiny_tokenizer)
