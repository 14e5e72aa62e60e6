"""Collate rows of a `RowStore` into the batches of `types`: ragged, without padding. Zero rows are allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.data.row_store import RowStore
from rlhf_lightning.types import (
    DemonstrationBatch,
    PreferenceBatch,
    ProcessBatch,
    PromptBatch,
    RankedBatch,
    Sequences,
    UnpairedBatch,
)


def demonstrations(store: RowStore, rows: Sequence[int]) -> DemonstrationBatch:
    """Collate rows with one completion per prompt."""
    sequences, _ = _sequences(store, rows)
    return DemonstrationBatch(sequences, store.column("weight", rows), store.extras(rows))


def pairs(store: RowStore, rows: Sequence[int]) -> PreferenceBatch:
    """Collate pairs: all chosen completions, followed by the rejected ones in the same order."""
    found = [store.completions(row) for row in rows]
    stacked = [pair[0] for pair in found] + [pair[1] for pair in found]
    sequences = Sequences(
        prompts=tuple(store.prompt(row) for row in rows),
        completions=tuple(ids for ids, _, _ in stacked),
        parents=tuple(range(len(rows))) * 2,
        supervised=tuple(mask for _, mask, _ in stacked),
    )
    target, margin, weight = (store.column(name, rows) for name in ("target", "margin", "weight"))
    return PreferenceBatch(sequences, target, margin, weight, store.extras(rows))


def unpaired(
    store: RowStore, rows: Sequence[int], partners: Mapping[int, int] | None = None, max_length: int | None = None
) -> UnpairedBatch:
    """Collate rows with one judged completion per prompt.

    ``partners`` maps each row to another row. With it, each prompt also gets the mismatched completion of that row,
    truncated to ``max_length``.
    """
    sequences, ranks = _sequences(store, rows)
    mismatched = None
    if partners is not None:
        others = [store.completions(partners[row])[0] for row in rows]
        room = [None if max_length is None else max(max_length - len(prompt), 1) for prompt in sequences.prompts]
        mismatched = sequences._replace(
            completions=tuple(ids[:most] for (ids, _, _), most in zip(others, room, strict=True)),
            supervised=tuple(mask[:most] for (_, mask, _), most in zip(others, room, strict=True)),
        )
    desirable = torch.tensor([rank == 0 for rank in ranks], dtype=torch.bool)
    return UnpairedBatch(sequences, mismatched, desirable, store.column("weight", rows), store.extras(rows))


def judged_steps(store: RowStore, rows: Sequence[int]) -> ProcessBatch:
    """Collate rows with one completion per prompt, and the labels of its steps that remain after truncation."""
    sequences, _ = _sequences(store, rows)
    labels = []
    for row, ends in zip(rows, sequences.supervised, strict=True):
        judged = [label for label in store.record(row)["columns"]["labels"] if label is not None]
        labels.append(torch.tensor(judged[: int(ends.sum())]))
    return ProcessBatch(sequences, tuple(labels), store.column("weight", rows), store.extras(rows))


def groups(store: RowStore, rows: Sequence[int]) -> RankedBatch:
    """Collate each prompt's completions consecutively, with their ranks."""
    sequences, ranks = _sequences(store, rows)
    target, margin, weight = (store.column(name, rows) for name in ("target", "margin", "weight"))
    return RankedBatch(sequences, torch.tensor(ranks, dtype=torch.int64), target, margin, weight, store.extras(rows))


def prompts(store: RowStore, rows: Sequence[int], episodes: Tensor, samples: int = 1) -> PromptBatch:
    """Collate prompts, each repeated ``samples`` times consecutively.

    ``episodes`` is the number of each prompt's first sample in the run, int64, shape (rows,).
    """
    records = [store.record(row) for row in rows]
    names = dict.fromkeys(name for record in records for name in record["columns"])
    columns: dict[str, list[Any]] = {
        name: [record["columns"].get(name) for record in records for _ in range(samples)] for name in names
    }
    return PromptBatch(
        prompts=tuple(ids for row in rows for ids in [store.prompt(row)] * samples),
        texts=tuple(record["prompt"] for record in records for _ in range(samples)),
        columns=columns,
        episodes=(episodes[:, None] + torch.arange(samples)).flatten(),
        group=torch.arange(len(rows)).repeat_interleave(samples),
        extras={name: values.repeat_interleave(samples) for name, values in store.extras(rows).items()},
        row_ids=tuple(int(row) for row in rows for _ in range(samples)),
    )


def _sequences(store: RowStore, rows: Sequence[int]) -> tuple[Sequences, list[int]]:
    """Return the sequences of the rows, with all completions of each prompt, and the ranks of the completions."""
    found = [(parent, *one) for parent, row in enumerate(rows) for one in store.completions(row)]
    parents, completions, supervised, ranks = zip(*found, strict=True) if found else ((), (), (), ())
    return Sequences(tuple(store.prompt(row) for row in rows), completions, parents, supervised), list(ranks)
