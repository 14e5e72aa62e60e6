"""Judgements that cannot all be right: a pair judged both ways, and preferences that run in a circle."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

WHOLE_LISTS = 32
"""Completions of a ranked list up to which all its pairs are compared; of longer ones those of neighbouring ranks."""


class Preferences:
    """Preferences between completions, as a directed graph: 32 bytes for each pair, whatever its texts are."""

    def __init__(self) -> None:
        self.prompts, self.better, self.worse, self.rows = array("q"), array("q"), array("q"), array("q")

    def add(self, row: int, prompt: int, completions: Sequence[int], ranks: Sequence[int]) -> None:
        """Take in a row's preferences.

        Args:
            row: its number.
            prompt: hash of the prompt.
            completions: hash of each completion.
            ranks: rank of each completion, 0 is best.
        """
        near = len(completions) > WHOLE_LISTS
        for one, rank in zip(completions, ranks, strict=True):
            for other, lower in zip(completions, ranks, strict=True):
                if rank < lower and one != other and (not near or lower == rank + 1):
                    for column, value in zip(
                        (self.prompts, self.better, self.worse, self.rows), (prompt, one, other, row), strict=True
                    ):
                        column.append(value)

    def contradictions(self) -> tuple[list[int], list[int]]:
        """Rows with a pair that another row judges the other way round, and rows on a longer circle."""
        if not self.rows:
            return [], []
        prompts, better, worse, rows = (
            np.frombuffer(column, dtype=np.int64) for column in (self.prompts, self.better, self.worse, self.rows)
        )
        ends = np.concatenate([np.stack([prompts, better], 1), np.stack([prompts, worse], 1)])
        nodes = np.unique(ends, axis=0, return_inverse=True)[1].reshape(-1)
        count = int(nodes.max()) + 1
        start, stop = nodes[: len(rows)], nodes[len(rows) :]
        both = np.isin(start * count + stop, stop * count + start)
        graph = coo_array((np.ones(len(rows), dtype=np.int8), (start, stop)), shape=(count, count))
        _, component = connected_components(graph.tocsr(), directed=True, connection="strong")
        circle = (component[start] == component[stop]) & ~both
        return np.unique(rows[both]).tolist(), np.unique(rows[circle]).tolist()
