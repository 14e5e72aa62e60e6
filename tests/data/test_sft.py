"""Test demonstrations: batch contents, held-out rows, weights, caching and counting."""

import json
import random
import string

import numpy as np
import pytest
import torch
from conftest import ASSISTANT, END, EOS, SPECIAL, USER, make_tiny_tokenizer, refused, spell

from rlhf_lightning.data import SFTDataModule
from rlhf_lightning.data.canonical import REASONS
from rlhf_lightning.data.row_store import RowStore
from rlhf_lightning.types import DemonstrationBatch


def rows(count):
    return [{"prompt": f"p{i}:", "completion": "x" * (1 + i % 5)} for i in range(count)]


def steps(data, epoch=0):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def completions_of(step):
    return [ids.tolist() for batch in step.micro_batches for ids in batch.sequences.completions]


def prompts_of(step):
    """Return the prompts of a step as text, in micro-batch order."""
    tokenizer = make_tiny_tokenizer()
    return [tokenizer.decode(ids) for batch in step.micro_batches for ids in batch.sequences.prompts]


def test_sft_batch_has_the_expected_ids(ready, write_rows):
    source = write_rows([
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "weight": 2},
        {"prompt": "p:", "completion": " c"},
        {"text": "hey"},
    ])  # fmt: skip
    data = ready(SFTDataModule(source, batch_size=4, shuffle=False))
    (step,) = steps(data)
    (batch,) = step.micro_batches
    assert isinstance(batch, DemonstrationBatch)
    by_length = [
        (spell(USER, "\nq", END, "\n", ASSISTANT, "\n"), spell("a", END), 2.0),
        (spell("p:"), spell(" c", EOS), 1.0),
        (spell("h"), spell("ey", EOS), 1.0),  # the first token of a text is never predicted
    ]
    assert [p.tolist() for p in batch.sequences.prompts] == [prompt for prompt, _, _ in by_length]
    assert [c.tolist() for c in batch.sequences.completions] == [completion for _, completion, _ in by_length]
    assert batch.weights.tolist() == [weight for _, _, weight in by_length]
    assert batch.sequences.parents == (0, 1, 2)
    assert all(mask.all() and mask.dtype == torch.bool for mask in batch.sequences.supervised)
    assert all(ids.dtype == torch.int64 for ids in batch.sequences.prompts + batch.sequences.completions)
    assert (step.rows, step.tokens) == (3, 2 + 3 + 3)


def test_only_assistant_turns_are_supervised(ready, write_rows):
    turns = [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "bd")]
    source = write_rows([{"messages": [{"role": role, "content": said} for role, said in turns]}])
    (step,) = steps(ready(SFTDataModule(source)))
    sequences = step.micro_batches[0].sequences
    assert sequences.completions[0][sequences.supervised[0]].tolist() == spell("a", END, "bd", END)
    assert step.tokens == 5


def test_an_epoch_has_every_row_once_for_any_ranks(ready, write_rows):
    source = write_rows(rows(23))
    alone = ready(SFTDataModule(source, batch_size=6))
    assert alone.steps_per_epoch == 4
    both = [ready(SFTDataModule(source, batch_size=6, max_tokens=14), rank, 2) for rank in (0, 1)]
    seen = []
    for epoch in (0, 1):
        one, first, second = steps(alone, epoch), steps(both[0], epoch), steps(both[1], epoch)
        seen.append([sorted(prompts_of(step)) for step in one])
        assert [sorted(prompts_of(a) + prompts_of(b)) for a, b in zip(first, second, strict=True)] == seen[-1]
        assert [len(a.micro_batches) for a in first] == [len(b.micro_batches) for b in second]
        assert [(a.rows, a.tokens) for a in first] == [(s.rows, s.tokens) for s in one]
        assert sorted(p for step in seen[-1] for p in step) == sorted(row["prompt"] for row in rows(23))
    assert seen[0] != seen[1]
    assert both[0].fingerprint == both[1].fingerprint == alone.fingerprint, "a resume may change ranks and cuts"


def test_without_shuffle_rows_keep_file_order(ready, write_rows):
    data = ready(SFTDataModule(write_rows(rows(6)), batch_size=2, shuffle=False, rows=5))
    assert [set(prompts_of(step)) for step in steps(data)] == [{"p0:", "p1:"}, {"p2:", "p3:"}, {"p4:"}]


def test_held_out_rows_share_no_prompt_with_the_others(ready, write_rows):
    source = write_rows([{"prompt": f"p{i % 10}", "completion": f"c{i}"} for i in range(30)])
    data = ready(SFTDataModule(source, eval_rows=6, batch_size=4, eval_batch_size=5))
    trained = {p for step in steps(data) for p in prompts_of(step)}
    held = [prompts_of(step) for step in data.val_dataloader()]
    assert [len(step) for step in held] == [5, 1]
    assert not trained & {p for step in held for p in step}
    assert sum(step.rows for step in steps(data)) == 24
    assert {p for step in held for p in step} == {prompt for prompt, _ in data.examples(9)}
    other = ready(SFTDataModule(source, eval_rows=6, seed=1))
    assert set(other.held_out) != set(data.held_out)


def test_eval_source_is_used_for_validation(ready, write_rows):
    data = ready(SFTDataModule(write_rows(rows(4)), eval_source=write_rows(rows(2), "eval.jsonl"), eval_batch_size=1))
    assert [prompts_of(step) for step in data.val_dataloader()] == [["p0:"], ["p1:"]]
    assert [prompts_of(step) for step in data.test_dataloader()] == [["p0:"], ["p1:"]]
    (step,) = data.train_dataloader()
    assert step.rows == 4


def test_without_evaluation_rows_there_is_no_loader(ready, write_rows):
    assert ready(SFTDataModule(write_rows(rows(4)))).val_dataloader() == []


def test_prediction_uses_the_held_out_prompts(ready, write_rows):
    data = ready(SFTDataModule(write_rows(rows(3)), eval_batch_size=2))
    first, second = data.predict_dataloader()
    assert first.micro_batches[0].texts == ("p0:", "p1:") and second.micro_batches[0].texts == ("p2:",)
    assert second.micro_batches[0].episodes.tolist() == [2]


def test_mixtures_are_sampled_by_weight(ready, write_rows):
    first = write_rows([{"prompt": f"a{i}", "completion": "x"} for i in range(10)], "a.jsonl")
    second = write_rows([{"question": f"b{i}", "completion": "x"} for i in range(10)], "b.jsonl")
    mixed = [{"path": first, "weight": 2.5}, {"path": second, "rows": 4, "columns": {"question": "prompt"}}]
    data = ready(SFTDataModule(mixed, batch_size=8))
    halves = []
    for epoch in (0, 1):
        prompts = [p for step in steps(data, epoch) for p in prompts_of(step)]
        assert len(prompts) == 10 * 2.5 + 4
        counts = {p: prompts.count(p) for p in prompts}
        assert sorted(counts[f"a{i}"] for i in range(10)) == [2] * 5 + [3] * 5
        assert [counts[f"b{i}"] for i in range(4)] == [1] * 4
        halves.append({p for p, count in counts.items() if count == 3})
    assert halves[0] != halves[1], "the half is chosen anew each epoch"


def test_columns_are_renamed(ready, write_rows):
    source = write_rows([{"question": "q", "answer": "a", "prompt": "unused"}])
    data = ready(SFTDataModule(source, columns={"question": "prompt", "answer": "completion"}))
    assert prompts_of(steps(data)[0]) == ["q"]
    with refused("unknown-column", "columns renames 'qestion', but ", " has the columns 'question', 'answer'"):
        ready(SFTDataModule(source, columns={"qestion": "prompt"}))


def test_truncated_rows_are_counted(ready, write_rows):
    source = write_rows([{"prompt": "uvwxyz"[:n], "completion": "x" * m} for n, m in ((6, 1), (2, 9), (6, 9), (1, 1))])
    data = ready(SFTDataModule(source, max_length=8, shuffle=False, batch_size=1))
    found = [(prompts_of(step)[0], completions_of(step)[0]) for step in steps(data)]
    assert found == [
        ("uvwxyz", spell("x", EOS)),
        ("uv", spell("xxxxxx")),  # truncated: no end token
        ("wxyz", spell("xxxx")),
        ("u", spell("x", EOS)),
    ]
    assert data.report.truncated == {"completion": 2, "prompt": 1}
    assert data.report.tokens == 2 + 6 + 4 + 2


def test_the_data_report_is_logged(ready, write_rows, caplog):
    source = write_rows([*rows(2), {"prompt": "", "completion": "c"}, {"prompt": "p", "completion": None}])
    data = ready(SFTDataModule(source))
    said = data.report.describe("rows")
    assert said == (
        "rows: 4 rows read, 2 kept, dropped: 1 empty_prompt (the prompt is empty, or not text), "
        "1 empty_completion (a completion is empty, or not text)."
    )
    assert data.report.metrics["data/dropped_empty_prompt"] == 1.0
    assert said.removeprefix("rows") in caplog.text


# ---- nothing is lost ------------------------------------------------------------------------------------------------


def garbage(number):
    """Return an unchecked row."""
    draw = random.Random(number)
    pieces = [*SPECIAL, "\n\nHuman: ", "\n\nAssistant:", "\ud800", "\x00", "{{ 7 * 7 }}", "a" * 50, "\ufeff", "🦆", " "]
    text = lambda: "".join(draw.choice([*pieces, *string.printable]) for _ in range(draw.randrange(12)))
    value = lambda deep: draw.choice(
        [None, 3, True, float("inf"), text(), text(), text(), {}, [], [text()]]
        + ([[value(0)], {text(): value(0)}, [{"role": text(), "content": value(0)}]] if deep else [])
        + [[{"role": r, "content": text()} for r in draw.choices(["user", "assistant", "system", text()], k=3)]]
    )
    if draw.random() < 0.4:  # a valid format with arbitrary contents
        return {"messages": [{"role": role, "content": "x" + text()} for role in ("user", "assistant") * 2]}
    names = ["prompt", "completion", "messages", "text", "input", "output", "weight", text()]
    return {name: value(1) for name in draw.sample(names, draw.randrange(1, 6))}


def test_kept_and_dropped_rows_sum_to_rows_read(ready, tmp_path):
    file = tmp_path / "rows.jsonl"
    with file.open("wb") as stream:
        for number in range(1500):
            line = json.dumps(garbage(number)).encode()
            stream.write((line[: number % 60] if number % 10 == 0 else line) + b"\n")
        stream.write(json.dumps({"prompt": "<|end|>" * 100_000, "completion": "bc" * 500_000}).encode() + b"\n")
    lines = sum(1 for line in file.read_bytes().split(b"\n") if line.strip())
    data = ready(SFTDataModule(str(file), max_length=64))
    assert data.report.read == lines == data.report.kept + sum(data.report.dropped.values())
    assert set(data.report.dropped) <= set(REASONS)
    assert {"unreadable_line", "broken_text", "unknown_role", "missing_columns"} <= set(data.report.dropped)
    assert data.report.kept == len(data.store) > 100
    for step in data.train_dataloader():
        for batch in step.micro_batches:
            for row, ids in enumerate(batch.sequences.completions):
                ends = [i for i, index in enumerate(ids.tolist()) if index == END]
                kept = batch.sequences.supervised[row]
                assert len(batch.sequences.prompts[row]) + len(ids) <= 64 and kept.any()
                assert all(kept[i] or i > 0 for i in ends)


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        ([], "no-rows", ["is empty: it holds no row"]),
        ([{"promt": "p", "completion": "c"}], "no-accepted-form", ["Did you mean 'prompt' by 'promt'"]),
        ([{"prompt": "p", "completion": ""}], "no-usable-rows", ["1 rows read, 0 kept, dropped: 1 empty_completion"]),
        (
            [{"messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}]}],
            "no-usable-rows",
            ["no_user_turn", "the prompt has no user turn"],
        ),
    ],
)
def test_data_without_a_usable_row_is_refused(ready, write_rows, content, code, words):
    with refused(code, *words):
        ready(SFTDataModule(write_rows(content)))


def test_a_missing_file_is_named(ready):
    with refused("no-data", "there is no file 'nowhere.jsonl'"):
        ready(SFTDataModule("nowhere.jsonl"))


def test_conversations_need_a_template(ready, write_rows):
    source = write_rows([{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}])
    with refused("no-chat-template", "has no chat template", "give chat_template"):
        ready(SFTDataModule(source), tokenizer=make_tiny_tokenizer(None))


def test_rows_that_the_template_refuses_are_counted(ready, write_rows):
    picky = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}"
    tokenizer = make_tiny_tokenizer(picky + make_tiny_tokenizer().chat_template)
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    source = write_rows([{"messages": talk}, {"messages": [{"role": "system", "content": "s"}, *talk]}])
    assert ready(SFTDataModule(source), tokenizer=tokenizer).report.dropped == {"template_refuses": 1}


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"eval_rows": 2, "eval_source": "x"}, "conflicting-settings", ["eval_source and eval_rows"]),
        ({"eval_rows": -1}, "setting-out-of-range", ["eval_rows is -1: it must be at least 0"]),
        ({"batch_size": 0}, "setting-out-of-range", ["batch_size is 0: it must be at least 1"]),
        ({"num_workers": 10**21}, "setting-out-of-range", ["num_workers is", "between 0 and 1024"]),
        ({"eval_batch_size": 0}, "setting-out-of-range", ["eval_batch_size is 0: it must be at least 1"]),
        ({"max_tokens": 0}, "setting-out-of-range", ["max_tokens is 0: it must be at least 1, or null for no limit"]),
        ({"max_length": 1}, "setting-out-of-range", ["max_length is 1: it must be at least 2"]),
        ({"max_length": 8, "max_prompt_length": 8}, "no-room-for-completion", ["max_prompt_length 8", "max_length 8"]),
        ({"streaming": True}, "stream-without-end", ["streaming needs steps_per_epoch"]),
        (
            {"streaming": True, "steps_per_epoch": 2, "eval_rows": 1},
            "not-with-streaming",
            ["eval_rows is 1", "name an eval_source"],
        ),
        (
            {"streaming": True, "steps_per_epoch": 2, "rows": 1},
            "not-with-streaming",
            ["rows cannot be set with streaming"],
        ),
        ({"steps_per_epoch": 2}, "needs-streaming", ["steps_per_epoch is 2 without streaming"]),
    ],
)
def test_contradicting_arguments_are_refused(changes, code, words):
    with refused(code, *words):
        SFTDataModule("x.jsonl", **changes)


def test_holding_out_all_rows_is_refused(ready, write_rows):
    with refused("no-rows-left", "eval_rows 4 leaves no row to train on: 4 rows of 4 prompts were kept"):
        ready(SFTDataModule(write_rows(rows(4)), eval_rows=4))


# ---- the cache ------------------------------------------------------------------------------------------------------


def folders(cache):
    return {folder.name for folder in (cache / "rows").iterdir()}


def test_encoded_rows_are_cached(ready, write_rows, cache, monkeypatch):
    source = write_rows(rows(5))
    first = ready(SFTDataModule(source))
    assert len(folders(cache)) == 1
    monkeypatch.setattr(RowStore, "build", lambda *_: pytest.fail("encoded again"))
    again = ready(SFTDataModule(source, batch_size=2, seed=3))  # batch size and seed do not change the encoding
    assert [again.store.prompt(row).tolist() for row in range(5)] == [spell(f"p{i}:") for i in range(5)]
    assert again.report == first.report and again.fingerprint != first.fingerprint


@pytest.mark.parametrize("change", ["content", "settings", "template"])
def test_changes_to_the_encoding_invalidate_the_cache(ready, write_rows, cache, change):
    ready(SFTDataModule(write_rows(rows(5))))
    tokenizer = make_tiny_tokenizer("{{ messages }}") if change == "template" else None
    source = write_rows(rows(6 if change == "content" else 5))
    ready(SFTDataModule(source, max_length=9 if change == "settings" else 1024), tokenizer=tokenizer)
    assert len(folders(cache)) == 2


@pytest.mark.parametrize("damage", ["ids.npy", "meta.json"])
def test_a_damaged_cache_is_rebuilt(ready, write_rows, cache, damage):
    source = write_rows(rows(5))
    ready(SFTDataModule(source))
    (folder,) = (cache / "rows").iterdir()
    whole = (folder / damage).read_bytes()
    (folder / damage).write_bytes(whole[: len(whole) // 2])
    data = ready(SFTDataModule(source))
    assert data.store.prompt(4).tolist() == spell("p4:")
    assert RowStore.load(folder) is not None, "mended for the next run"
    assert not [path for path in (cache / "rows").iterdir() if path.name.startswith(".")]


def test_an_unwritable_cache_folder_only_warns(ready, write_rows, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.warns(UserWarning, match="encoded rows are not cached"):
        data = ready(SFTDataModule(write_rows(rows(3)), cache_dir=str(blocked)))
    assert len(data.store) == 3


def test_cache_files_need_no_unpickling(ready, write_rows, cache):
    ready(SFTDataModule(write_rows(rows(3))))
    (folder,) = (cache / "rows").iterdir()
    assert {file.suffix for file in folder.iterdir()} == {".npy", ".json"}
    for file in folder.glob("*.npy"):
        np.load(file, allow_pickle=False)


def test_text_that_spells_control_tokens_stays_text_and_is_reported(ready, write_rows):
    rows = [{"text": "a<|end|>b"}, {"text": "ab"}]
    data = ready(SFTDataModule(write_rows(rows)))
    assert data.store.lengths.tolist() == [len("a<|end|>b") + 1, 3]
    assert "; 1 spell control tokens, which stay plain text (rendered: true if" in data.report.describe("rows")
    data = ready(SFTDataModule(write_rows(rows), rendered=True))
    assert data.store.lengths.tolist() == [4, 3] and data.report.escaped == 0
