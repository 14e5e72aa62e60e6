"""A step identifies its rows over all ranks by their index among the kept rows."""

import pytest

from rlhf_lightning.data import PromptDataModule, SFTDataModule

ROWS = [{"prompt": f"question {n}", "completion": "" if n == 2 else f"answer {n}"} for n in range(11)]
KEPT = [row for row in ROWS if row["completion"]]


def steps_of(data, epoch=0):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


@pytest.mark.parametrize("ranks", [1, 2])
def test_row_ids_cover_every_row_and_agree_over_ranks(ready, write_rows, tiny_tokenizer, ranks):
    source = write_rows(ROWS)
    shares = [steps_of(ready(SFTDataModule(source, batch_size=4), rank, ranks)) for rank in range(ranks)]
    assert sorted(row for step in shares[0] for row in step.row_ids) == list(range(len(KEPT)))
    for of_all_ranks in zip(*shares, strict=True):
        assert len({step.row_ids for step in of_all_ranks}) == 1
        texts = [
            tiny_tokenizer.decode(prompt)
            for step in of_all_ranks
            for batch in step.micro_batches
            for prompt in batch.sequences.prompts
        ]
        named = [KEPT[row]["prompt"] for row in of_all_ranks[0].row_ids]
        assert sorted(named) == sorted(next(one for one in named if one in text) for text in texts)


def test_row_ids_name_a_prompt_once_for_all_its_samples(ready, write_rows):
    data = ready(PromptDataModule(write_rows(ROWS), batch_size=6, samples_per_prompt=3))
    for step in steps_of(data):
        (batch,) = step.micro_batches
        assert len(step.row_ids) == 2 and len(batch.texts) == 6
        assert [ROWS[row]["prompt"] for row in step.row_ids for _ in range(3)] == list(batch.texts)


def test_streams_have_no_row_ids(ready, write_rows):
    data = ready(SFTDataModule(write_rows(ROWS), batch_size=4, streaming=True, steps_per_epoch=2))
    assert [step.row_ids for step in steps_of(data)] == [(), ()]
