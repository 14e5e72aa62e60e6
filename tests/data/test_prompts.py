"""Test rollout prompts: which prompts, how often, their numbering, and their rank."""

import pytest
from conftest import ASSISTANT, END, EOS, SYSTEM, USER, make_tiny_tokenizer, refused, spell

from rlhf_lightning.data import PromptDataModule
from rlhf_lightning.types import PromptBatch


def rows(count):
    return [{"prompt": f"p{i}", "answer": str(i)} for i in range(count)]


def rollouts(data, epoch=0):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return [step.micro_batches[0] for step in loader]


def episodes(batch):
    return dict(zip(batch.episodes.tolist(), batch.texts, strict=True))


def test_rollout_batch_has_the_expected_ids(ready, write_rows):
    rows = [
        {"prompt": [{"role": "user", "content": "q"}], "answer": "4", "level": 2},
        {"prompt": "p:", "answer": "5", "completions": ["not", "handed", "on"]},
    ]
    data = ready(PromptDataModule(write_rows(rows), batch_size=4, samples_per_prompt=2, shuffle=False))
    (step,) = data.train_dataloader()
    (batch,) = step.micro_batches
    chat, plain = spell(USER, "\nq", END, "\n", ASSISTANT, "\n"), spell("p:")
    assert [ids.tolist() for ids in batch.prompts] == [chat, chat, plain, plain]
    assert batch.texts == (rows[0]["prompt"],) * 2 + ("p:",) * 2
    assert batch.columns == {"answer": ["4", "4", "5", "5"], "level": [2, 2, None, None]}
    assert (batch.episodes.tolist(), batch.group.tolist()) == ([0, 1, 2, 3], [0, 0, 1, 1])
    assert (step.rows, step.tokens, batch.pretraining) == (4, 0, None)


def test_episode_numbers_do_not_depend_on_the_ranks(ready, write_rows):
    source = write_rows(rows(10))
    settings = {"batch_size": 8, "samples_per_prompt": 2, "rollouts": 3}
    alone = ready(PromptDataModule(source, **settings))
    both = [ready(PromptDataModule(source, **settings), rank, 2) for rank in (0, 1)]
    assert alone.steps_per_epoch == 3
    numbers = []
    for epoch in (0, 1):
        for one, *shares in zip(rollouts(alone, epoch), *(rollouts(data, epoch) for data in both), strict=True):
            assert [len(share.prompts) for share in shares] == [4, 4]
            assert episodes(shares[0]) | episodes(shares[1]) == episodes(one)
            numbers += sorted(episodes(one))
            for share in shares:
                assert all(share.texts[i] == share.texts[i + 1] for i in range(0, 4, 2)), "a group is split"
    assert numbers == list(range(2 * 3 * 8))


def test_every_pass_takes_every_prompt_once(ready, write_rows):
    data = ready(PromptDataModule(write_rows(rows(5)), batch_size=3))
    assert data.steps_per_epoch == 2, "one pass, and full rollouts"
    taken = [text for epoch in range(5) for batch in rollouts(data, epoch) for text in batch.texts]
    assert len(taken) == 30
    passes = [taken[start : start + 5] for start in range(0, 30, 5)]
    assert all(sorted(one) == [f"p{i}" for i in range(5)] for one in passes)
    assert len({tuple(one) for one in passes}) > 3, "each pass has an order of its own"


def test_prompts_are_taken_from_pairs_and_conversations(ready, write_rows):
    rows = [
        {"prompt": "a", "chosen": "x", "rejected": "y"},
        {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "v"}]},
    ]
    data = ready(PromptDataModule(write_rows(rows), batch_size=2, shuffle=False))
    (batch,) = rollouts(data)
    assert batch.texts == ("a", [{"role": "user", "content": "u"}])
    assert batch.columns == {"chosen": ["x", None], "rejected": ["y", None]}


def test_long_prompts_are_truncated_at_the_start(ready, write_rows):
    data = ready(PromptDataModule(write_rows([{"prompt": "uvwxyz"}]), batch_size=1, max_prompt_length=4))
    assert rollouts(data)[0].prompts[0].tolist() == spell("wxyz")
    assert data.report.truncated == {"prompt": 1}


def test_held_out_prompts_are_sampled_once(ready, write_rows):
    data = ready(
        PromptDataModule(write_rows(rows(9)), batch_size=4, samples_per_prompt=4, eval_rows=3, eval_batch_size=2)
    )
    held = [step.micro_batches[0] for step in data.val_dataloader()]
    assert [len(batch.prompts) for batch in held] == [2, 1]
    assert [n for batch in held for n in batch.episodes.tolist()] == [0, 1, 2]
    trained = {text for batch in rollouts(data) for text in batch.texts}
    assert len(trained) == 6 and not trained & {text for batch in held for text in batch.texts}
    share = ready(PromptDataModule(write_rows(rows(9)), batch_size=4, eval_rows=3, eval_batch_size=2), 1, 2)
    assert [len(step.micro_batches[0].prompts) for step in share.val_dataloader()] == [1, 0]
    assert isinstance(list(share.val_dataloader())[1].micro_batches[0], PromptBatch)


def test_pretraining_text_is_added_to_the_batch(ready, write_rows):
    more = write_rows([{"text": f"t{i}"} for i in range(6)], "more.jsonl")
    settings = {"batch_size": 2, "pretraining_source": more, "pretraining_batch_size": 4, "rollouts": 3}
    source = write_rows(rows(4))
    both = [ready(PromptDataModule(source, **settings), rank, 2) for rank in (0, 1)]
    seen = []
    tokenizer = make_tiny_tokenizer()
    for first, second in zip(*(rollouts(data) for data in both), strict=True):
        shares = [b.pretraining.sequences.completions for b in (first, second)]
        assert [len(share) for share in shares] == [2, 2]
        seen += [tokenizer.decode(ids[:-1]) for share in shares for ids in share]
        assert all(ids[-1] == EOS for share in shares for ids in share)
    assert sorted(seen) == sorted("012345" * 2), "two whole passes in three rollouts"


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        (
            {"batch_size": 6, "samples_per_prompt": 4},
            "uneven-split",
            "samples_per_prompt 4: batch_size counts episodes",
        ),
        ({"samples_per_prompt": 0}, "uneven-split", "samples_per_prompt 0: batch_size counts episodes"),
        ({"rollouts": 0}, "setting-out-of-range", "rollouts is 0: it must be at least 1, or null for one pass"),
        ({"pretraining_batch_size": 0}, "setting-out-of-range", "pretraining_batch_size is 0: it must be at least 1"),
    ],
)
def test_invalid_sizes_are_refused(changes, code, message):
    with refused(code, message):
        PromptDataModule("x.jsonl", **changes)


def test_a_rollout_that_ranks_cannot_split_is_refused(ready, write_rows):
    with refused("uneven-split", "3 ranks cannot share the 4 prompts of a rollout evenly", "a multiple of 3"):
        ready(PromptDataModule(write_rows(rows(4)), batch_size=8, samples_per_prompt=2), 0, 3)


class Chosen(PromptDataModule):
    """Rollout n uses the rows named by the state."""

    named = [1, 3]
    asked = ()

    def choose_rows(self, rollout, count):
        self.asked = (*self.asked, (rollout, count))
        return self.named


def test_rows_are_chosen_at_the_start_of_a_rollout(ready, write_rows):
    source = write_rows(rows(6))
    settings = {"batch_size": 4, "samples_per_prompt": 2, "rollouts": 3}
    data = ready(Chosen(source, **settings))
    loader = data.train_dataloader()
    loader.sampler.set_epoch(2)
    steps = iter(loader)
    first = next(steps)
    data.named = [5, 5]
    second = next(steps)
    data.named = None
    third = next(steps)
    plain = ready(PromptDataModule(source, **settings))
    in_turn = rollouts(plain, 2)
    assert [step.micro_batches[0].texts for step in (first, second, third)] == [
        ("p1", "p1", "p3", "p3"), ("p5",) * 4, in_turn[2].texts
    ]  # fmt: skip
    assert [step.row_ids for step in (first, second)] == [(1, 3), (5, 5)]
    assert data.asked == ((6, 2), (7, 2), (8, 2))
    assert [step.micro_batches[0].episodes.tolist() for step in (first, second, third)] == [
        batch.episodes.tolist() for batch in in_turn
    ]
    shares = [ready(Chosen(source, **settings), rank, 2) for rank in (0, 1)]
    assert [rollouts(share)[0].texts for share in shares] == [("p1", "p1"), ("p3", "p3")]


@pytest.mark.parametrize("named", [[1], [1, 6], [-1, 1], [0.5, 1.0], [[1, 3]]])
def test_invalid_row_choices_are_refused(ready, write_rows, named):
    data = ready(Chosen(write_rows(rows(6)), batch_size=2))
    data.named = named
    with refused("chosen-rows", "2 row numbers"):
        rollouts(data)


def test_held_out_rows_cannot_be_chosen(ready, write_rows):
    data = ready(Chosen(write_rows(rows(6)), batch_size=2, eval_rows=2))
    data.named = data.held_out
    with refused("chosen-rows", "train_rows"):
        rollouts(data)


@pytest.mark.parametrize("changes", [{"num_workers": 1}, {"streaming": True, "rollouts": 2}])
def test_choosing_rows_with_worker_processes_is_refused(ready, write_rows, changes):
    with refused("rows-chosen-ahead", "num_workers"):
        ready(Chosen(write_rows(rows(6)), batch_size=2, **changes)).train_dataloader()


def test_train_prefix_is_added_only_to_training_prompts(ready, write_rows, tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "q"}]}, {"prompt": "p:"},
            {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "r"}]}]  # fmt: skip
    file = write_rows(rows)
    data = ready(PromptDataModule(file, eval_source=file, train_prefix="be", batch_size=3, shuffle=False))
    (batch,) = rollouts(data)
    assert [ids.tolist() for ids in batch.prompts] == [
        spell(SYSTEM, "\nbe", END, "\n", USER, "\nq", END, "\n", ASSISTANT, "\n"), spell("be\n\np:"),
        spell(SYSTEM, "\nbe\n\ns", END, "\n", USER, "\nr", END, "\n", ASSISTANT, "\n")]  # fmt: skip
    assert batch.texts[1] == "be\n\np:" and batch.texts[0][0] == {"role": "system", "content": "be"}
    (held_out,) = (step.micro_batches[0] for step in data.val_dataloader())
    assert list(held_out.texts) == [row["prompt"] for row in rows]
    assert [prompt for prompt, _ in data.examples(3)] == [row["prompt"] for row in rows]
    plain = ready(PromptDataModule(file, eval_source=file, batch_size=3, shuffle=False))
    assert plain.fingerprint != data.fingerprint
    with refused("missing-setting", "eval_source"):
        PromptDataModule(file, train_prefix="be", eval_rows=1)
