"""Rows that forks encode, chunk by chunk, make the same store as rows that one process encodes."""

import json
import os

import numpy as np
import pytest

from rlhf_lightning.data import SFTDataModule, datamodule
from rlhf_lightning.data.canonical import Report
from rlhf_lightning.data.prompts import FirstPrompt
from rlhf_lightning.data.row_store import ARRAYS, Part, RowStore
from rlhf_lightning.data.sources import parse_sources
from rlhf_lightning.data.tokenizing import encoder_for

PAIRS = [
    {"prompt": f"p{n % 7}", "chosen": "a" * (n % 5 + 1), "rejected": "b", "margin": n, "id": n} for n in range(150)
]
PAIRS[20] = {"prompt": "p", "chosen": "same", "rejected": "same"}
CHATS = [
    {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a b"}]} for n in range(150)
]
CHATS[140]["messages"][1]["content"] = "<eos>"
TEXTS = [{"text": "word " * (n % 9)} for n in range(90)]


@pytest.fixture
def encoded(tiny_tokenizer, monkeypatch):
    """Return a function that encodes a part with a number of cores, and returns the store and the process ids."""
    monkeypatch.setattr("rlhf_lightning.data.tokenizing.CHUNK", 8)

    def encode(part: Part, cores: int) -> RowStore:
        monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
        report = Report()
        store = RowStore.joined(part.blocks(tiny_tokenizer, report), report)
        assert store.report is report
        return store

    return encode


@pytest.mark.parametrize(
    ("kind", "files", "rows", "settings"),
    [
        ("preference", [PAIRS], None, {"max_length": 6, "pairwise": True, "columns": {}}),
        ("preference", [PAIRS, PAIRS[::-1]], 200, {"slots": ("id",)}),
        ("sft", [CHATS, TEXTS, CHATS], None, {}),
        ("prompt", [PAIRS], None, {}),
    ],
)
def test_forks_encode_the_same_rows(kind, files, rows, settings, write_rows, encoded):
    sources = parse_sources([write_rows(one, f"{number}.jsonl") for number, one in enumerate(files)])
    part = Part(sources, rows, encoder_for(kind, **settings))
    alone, forked = encoded(part, 1), encoded(part, 3)
    assert json.dumps(forked.report.to_dict()) == json.dumps(alone.report.to_dict())
    assert forked.report.read == (rows or sum(map(len, files))) and forked.slots == alone.slots
    for name, kind_of_array in ARRAYS.items():
        assert forked.arrays[name].dtype == kind_of_array
        np.testing.assert_array_equal(forked.arrays[name], alone.arrays[name])
    assert {forked.record(row)["prompt"] is None for row in range(len(forked))} == {False}
    np.testing.assert_array_equal(forked.lengths, alone.lengths)


def test_an_environment_reads_rows_in_this_process(write_rows, encoded):
    class Asks:
        def reset(self, row):
            return f"{os.getpid()}: {row['prompt']}"

        def reply(self, *args):
            raise NotImplementedError

    encoder = encoder_for("prompt")
    part = Part(parse_sources(write_rows(PAIRS)), None, type(encoder)(FirstPrompt(Asks()), encoder.forms))
    store = encoded(part, 3)
    assert {store.record(row)["prompt"].partition(":")[0] for row in range(len(store))} == {str(os.getpid())}


def test_a_store_of_no_rows_is_empty():
    store = RowStore.joined([], Report())
    assert len(store) == 0 and store.arrays["first"].tolist() == store.arrays["bounds"].tolist() == [0]


# ---- a start from the cache -----------------------------------------------------------------------------------------


def data_of(tokenizer, write_rows, folder):
    held_out = write_rows(CHATS[:9], "eval.jsonl")
    made = SFTDataModule(write_rows(CHATS), eval_source=held_out, cache_dir=str(folder))
    made.tokenizer = tokenizer
    return made


def test_a_start_hashes_the_tokenizer_once_per_hook(tiny_tokenizer, write_rows, tmp_path, monkeypatch):
    """Hashing takes a second for a large vocabulary; a start with evaluation rows needs the hash five times."""
    hashed = []
    original = datamodule.tokenizer_fingerprint
    monkeypatch.setattr(datamodule, "tokenizer_fingerprint", lambda one: hashed.append(one) or original(one))
    data = data_of(tiny_tokenizer, write_rows, tmp_path)
    data.prepare_data()
    data.setup("fit")
    assert len(hashed) == 2


def test_a_start_from_the_cache_reads_no_ids(tiny_tokenizer, write_rows, tmp_path):
    """Token counts are stored: rows of zeros of the same size give the same plan."""
    first = data_of(tiny_tokenizer, write_rows, tmp_path)
    first.prepare_data()
    first.setup("fit")
    assert first.store.tokens.tolist() == [
        int(sum(mask.sum() for _, mask, _ in first.store.completions(row))) for row in range(len(first.store))
    ]
    for file in tmp_path.rglob("*/supervised.npy"):
        np.save(file, np.zeros_like(np.load(file)))
    again = data_of(tiny_tokenizer, write_rows, tmp_path)
    again.setup("fit")
    assert again.store.tokens.tolist() == first.store.tokens.tolist() and again.fingerprint == first.fingerprint


def test_a_folder_without_token_counts_is_written_again(tiny_tokenizer, write_rows, tmp_path):
    first = data_of(tiny_tokenizer, write_rows, tmp_path)
    first.prepare_data()
    removed = [file.unlink() for file in tmp_path.rglob("*/tokens.npy")]
    data_of(tiny_tokenizer, write_rows, tmp_path).prepare_data()
    assert len(removed) == len(list(tmp_path.rglob("*/tokens.npy"))) == 2
