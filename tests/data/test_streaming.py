"""Test streams: every row once per pass, the same steps on any number of ranks, and exact continuation
after a resume.
"""

import copy
import json

import pytest
from conftest import make_tiny_tokenizer, refused

from rlhf_lightning.data import PreferenceDataModule, PromptDataModule, SFTDataModule, streaming
from rlhf_lightning.types import PreferenceBatch


@pytest.fixture
def shards(tmp_path):
    """Return four files of six rows; every fifth row is unusable."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(4):
        rows = [{"prompt": f"s{shard}r{i}", "completion": "" if (6 * shard + i) % 5 == 4 else "x"} for i in range(6)]
        (folder / f"{shard}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "*.jsonl")


USABLE = {f"s{n // 6}r{n % 6}" for n in range(24) if n % 5 != 4}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Use blocks of seven rows, so that steps span blocks."""
    init = streaming.RowStream.__init__
    monkeypatch.setattr(streaming.RowStream, "__init__", lambda *a, **k: init(*a, **{**k, "block": 7}))


def stream(ready, source, rank=0, ranks=1, **changes):
    settings = {"batch_size": 4, "steps_per_epoch": 10, "streaming": True, **changes}
    return ready(SFTDataModule(source, **settings), rank, ranks)


def prompts_of(step):
    tokenizer = make_tiny_tokenizer()
    return [tokenizer.decode(ids) for batch in step.micro_batches for ids in batch.sequences.prompts]


def test_each_pass_sees_every_row_once(ready, shards):
    data = stream(ready, shards, steps_per_epoch=70, batch_size=2)
    loader = data.train_dataloader()
    assert len(loader) == data.steps_per_epoch == 70
    seen = [prompt for step in loader for prompt in prompts_of(step)]
    assert [seen.count(prompt) for prompt in USABLE] == [7] * 20, (
        "seven passes of twenty rows are twenty blocks of seven"
    )
    assert len({tuple(seen[start : start + 20]) for start in range(0, 140, 20)}) == 7


def test_an_unshuffled_stream_keeps_file_order(ready, shards):
    data = stream(ready, shards, batch_size=1, shuffle=False)
    assert [prompts_of(step)[0] for step in data.train_dataloader()] == sorted(USABLE)[:10]


def test_streamed_steps_are_the_same_for_any_ranks(ready, shards):
    alone = list(stream(ready, shards).train_dataloader())
    first, second = (list(stream(ready, shards, rank, 2).train_dataloader()) for rank in (0, 1))
    for one, a, b in zip(alone, first, second, strict=True):
        assert sorted(prompts_of(one)) == sorted(prompts_of(a) + prompts_of(b))
        assert len(a.micro_batches) == len(b.micro_batches)
        assert one.rows == a.rows == b.rows == 4 and one.tokens == a.tokens == 8


@pytest.mark.parametrize("stop", range(1, 10))
def test_a_stream_resumes_at_the_next_step(ready, shards, stop):
    whole = [prompts_of(step) for step in stream(ready, shards).train_dataloader()]
    loader = stream(ready, shards).train_dataloader()
    steps = iter(loader)
    for _ in range(stop):
        next(steps)
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = stream(ready, shards)
    loader = resumed.train_dataloader()
    loader.load_state_dict(copy.deepcopy(state))
    assert [prompts_of(step) for step in loader] == whole[stop:]
    assert resumed.report.read == resumed.report.kept + sum(resumed.report.dropped.values()) > 0


def test_the_next_epoch_continues_the_stream(ready, shards):
    long = [prompts_of(step) for step in stream(ready, shards, steps_per_epoch=10).train_dataloader()]
    loader = stream(ready, shards, steps_per_epoch=5).train_dataloader()
    found = []
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        found += [prompts_of(step) for step in loader]
    assert found == long


def test_sources_are_sampled_by_weight(ready, write_rows):
    first = write_rows([{"prompt": f"a{i}", "completion": "x"} for i in range(9)], "a.jsonl")
    second = write_rows([{"question": f"b{i}", "completion": "x"} for i in range(9)], "b.jsonl")
    mixed = [{"path": first, "weight": 3}, {"path": second, "columns": {"question": "prompt"}}]
    data = stream(ready, mixed, batch_size=100, steps_per_epoch=8)
    seen = [prompt for step in data.train_dataloader() for prompt in prompts_of(step)]
    assert abs(sum(prompt[0] == "a" for prompt in seen) - 600) < 5 * (800 * 0.75 * 0.25) ** 0.5
    assert len(set(seen)) == 18


def test_a_hub_dataset_is_streamed_by_shard(ready, monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": f"p{i}", "completion": "x"} for i in range(12)]
    asked = []

    def load(*arguments, **options):
        asked.append(options)
        return datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=3)

    monkeypatch.setattr(datasets, "load_dataset", load)
    whole = [prompts_of(step) for step in stream(ready, "owner/set", steps_per_epoch=21).train_dataloader()]
    seen = [prompt for step in whole for prompt in step]
    assert [seen.count(row["prompt"]) for row in rows] == [7] * 12
    assert all(options == {"split": "train", "streaming": True} for options in asked)
    loader = stream(ready, "owner/set", steps_per_epoch=21).train_dataloader()
    steps = iter(loader)
    next(steps), next(steps)
    resumed = stream(ready, "owner/set", steps_per_epoch=21).train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    assert [prompts_of(step) for step in resumed] == whole[2:]


def test_pairs_and_prompts_can_be_streamed(ready, write_rows):
    source = write_rows([{"prompt": "p", "completions": ["a", "b", "c"]}])
    pairs = ready(PreferenceDataModule(source, batch_size=3, streaming=True, steps_per_epoch=2))
    for step in pairs.train_dataloader():
        (batch,) = step.micro_batches
        assert isinstance(batch, PreferenceBatch) and step.rows == 3
    prompts = ready(PromptDataModule(source, batch_size=4, samples_per_prompt=2, streaming=True, rollouts=3))
    loader = prompts.train_dataloader()
    numbers = [step.micro_batches[0].episodes.tolist() for step in loader]
    loader.sampler.set_epoch(1)
    numbers += [step.micro_batches[0].episodes.tolist() for step in loader]
    assert numbers == [list(range(first, first + 4)) for first in range(0, 24, 4)]
    assert prompts.steps_per_epoch == 3 and prompts.examples(1)[0][0] == "p"


def test_resuming_another_stream_is_refused(ready, shards, write_rows):
    state = stream(ready, shards).train_dataloader().state_dict()
    other = stream(ready, write_rows([{"prompt": "p", "completion": "c"}])).train_dataloader()
    with refused("other-data", "written with other data"):
        other.load_state_dict(state)


def test_invalid_streams_are_refused_at_setup(ready, write_rows):
    with refused("no-accepted-form", "Did you mean 'prompt' by 'promt'"):
        stream(ready, write_rows([{"promt": "p", "completion": "c"}]))
    with refused("no-rows", "is empty: it holds no row"):
        stream(ready, write_rows([]))
    with refused("no-usable-rows", "The beginning of ", "empty_prompt"):
        stream(ready, write_rows([{"prompt": "", "completion": "c"}]))


def test_predicting_from_a_stream_is_refused(ready, shards):
    with refused("not-with-streaming", "name an eval_source"):
        stream(ready, shards).predict_dataloader()
