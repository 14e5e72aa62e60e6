"""The comparison with another library detects differences."""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf_lightning.types import DemonstrationBatch, Sequences, Step

sys.path.append(str(Path(__file__).resolve().parents[1] / "experiments" / "benchmarks"))
import parity
import peer_batches

ROWS = [{"ids": [5, 6, 2], "supervised": [False, True, True]}, {"ids": [7, 2], "supervised": [False, True]}]


def test_rows_may_be_reordered_within_but_not_across_steps():
    assert parity.same_tokens([ROWS[::-1]], [ROWS])
    assert parity.same_tokens([ROWS[:1], ROWS[1:]], [ROWS[:1], ROWS[1:]])
    assert not parity.same_tokens([ROWS[1:], ROWS[:1]], [ROWS[:1], ROWS[1:]])
    assert not parity.same_tokens([ROWS], [ROWS, ROWS])


@pytest.mark.parametrize("changed", [{"ids": [7, 3]}, {"ids": [7, 2, 2]}, {"supervised": [True, True]}])
def test_a_different_token_or_mask_is_detected(changed):
    assert not parity.same_tokens([[ROWS[0], {**ROWS[1], **changed}]], [ROWS])


def test_without_a_peer_mask_only_ids_are_compared():
    unmasked = [{**row, "supervised": None} for row in ROWS]
    assert parity.same_tokens([ROWS], [unmasked])
    assert not parity.same_tokens([[ROWS[0], {**ROWS[1], "ids": [7, 3]}]], [unmasked])


def test_rows_are_recovered_from_a_padded_batch():
    batch = {
        "input_ids": torch.tensor([[5, 6, 2], [7, 2, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "labels": torch.tensor([[-100, 6, 2], [-100, 2, -100]]),
    }
    assert peer_batches.rows_of(batch) == ROWS
    completion_mask = batch.pop("labels") != -100
    assert peer_batches.rows_of({**batch, "completion_mask": completion_mask}) == ROWS
    assert [row["supervised"] for row in peer_batches.rows_of(batch)] == [None, None]


def test_the_recorder_writes_steps_in_the_peers_format(tmp_path):
    ids = torch.tensor
    sequences = Sequences(
        (ids([5]), ids([7])), (ids([6, 2]), ids([2])), (0, 1), (ids([True, True]), ids([True]))
    )  # fmt: skip
    step = Step((DemonstrationBatch(sequences, torch.ones(2)),), rows=2, tokens=3)
    recorder = parity.StepRecorder(str(tmp_path / "ours.json"))
    trainer = SimpleNamespace(callback_metrics={"train/loss": torch.tensor(0.25)})
    recorder.on_train_batch_start(trainer, None, step, 0)
    recorder.on_train_batch_end(trainer)
    recorder.on_fit_end(trainer, None)
    assert json.loads((tmp_path / "ours.json").read_text()) == {"loss": [0.25], "steps": [ROWS]}


def verdict(ours: list[float], peers: list[float], steps: int = 2) -> bool:
    sides = ({"loss": ours, "steps": [ROWS] * len(ours)}, {"loss": peers, "steps": [ROWS] * len(peers)})
    return parity.report({"sft": sides}, argparse.Namespace(steps=steps))[1]


def test_losses_agree_within_a_relative_tolerance_of_1e_3():
    assert verdict([3.0, 2.0], [3.0009, 2.0])
    assert not verdict([3.0, 2.0], [3.0, 2.0011])
    assert not verdict([3.0, 2.0], [3.0])
    assert not verdict([3.0], [3.0])
    assert not verdict([3.0, float("nan")], [3.0, 2.0])
