"""Unchecked rows pass from file to model without any row being lost or affecting another row."""

import sys
from pathlib import Path

import pytest

from rlhf_lightning.data.canonical import REASONS, RowRefused
from rlhf_lightning.data.formats import demonstration, preference, read_row, unpaired
from rlhf_lightning.tokenization import encoding

sys.path.append(str(Path(__file__).resolve().parents[2] / "experiments" / "reliability"))
from fuzz import fuzz
from small_tokenizers import TOKENIZERS

SMALL = {name: make() for name, make in TOKENIZERS.items()}


@pytest.mark.parametrize("seed", [2, 3])
def test_every_fuzzed_row_is_kept_or_counted_as_dropped(tmp_path, seed):
    found = fuzz(400, seed, SMALL, tmp_path, long=0.0)
    assert found["wrong"] == []
    for count in found["counts"].values():
        assert count["lost"] == 0 and count["kept"] + count["dropped"] == count["written"] > 0 < count["kept"]
    assert set(found["reasons"]) <= set(REASONS)


def test_the_fuzzer_detects_content_encoded_as_control_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "_as_written", lambda *_: True)
    assert any("a content speaks for another" in line for line in fuzz(200, 2, SMALL, tmp_path, long=0.0)["wrong"])


def nested(levels):
    value = "x"
    for _ in range(levels):
        value = [value]
    return value


PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}


@pytest.mark.parametrize(
    ("read", "row", "reason"),
    [
        (preference, {**PAIR, "margin": 10**400}, "bad_number"),
        (preference, {**PAIR, "margin": 1e300}, "bad_number"),
        (preference, {**PAIR, "weight": 1e30}, "bad_number"),
        (preference, {"prompt": "p", "completions": ["a", "b"], "ranks": [float("nan"), 1]}, "bad_number"),
        (preference, {"prompt": "p", "completions": [str(i) for i in range(257)]}, "too_many_completions"),
        (preference, {"prompt": "p", "completion_1": "a", "completion_2": "b", "labels": [[1]]}, "bad_vote"),
        (unpaired, {"prompt": "p", "completion": "c", "label": nested(60)}, "bad_label"),
        (demonstration, {"prompt": "p", "completion": "c", "meta": nested(64)}, "too_deep"),
        (demonstration, {"prompt": "p", "completion": "\ud800"}, "broken_text"),
        (demonstration, {"prompt": "p", "completion": "c", "meta": {"\udfff": 1}}, "broken_text"),
        (demonstration, {"prompt": b"p", "completion": "c"}, "empty_prompt"),
    ],
)
def test_refused_rows_have_a_reason(read, row, reason):
    with pytest.raises(RowRefused) as refusal:
        read_row(row, read)
    assert refusal.value.code == reason


def test_ranks_may_be_arbitrarily_large_integers():
    found = read_row({"prompt": "p", "completions": ["a", "b"], "ranks": [10**400, -(10**400)]}, preference)
    assert (found.completions, found.ranks) == (["b", "a"], [0, 1])
