"""Stream data that does not fit on disk or in memory: an endless, shuffled stream of rows that resumes exactly.

Every pass has its own order of files (or of shards of a Hub dataset), and rows are shuffled in blocks. The position of
the stream is a few integers. For each source they are the pass, the shard and the row at which the current block began.
In addition, the number of rows taken from the block is stored. On resume, the block is read again and the rows taken
are skipped.

Every rank reads the whole stream and keeps its share of each step. So ranks need no communication, and steps are the
same for any number of ranks.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate, islice
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.data.batching import shuffled
from rlhf_lightning.data.canonical import Report, no_rows
from rlhf_lightning.data.files import RawRow, read_file
from rlhf_lightning.data.finding import files_of
from rlhf_lightning.data.loader import StepLoader
from rlhf_lightning.data.sources import Source, load_hub
from rlhf_lightning.data.tokenizing import CHUNK, PEEK, EncodedRow, Encoder
from rlhf_lightning.errors import DataError
from rlhf_lightning.types import Step


class ShardedSource:
    """Rows of one source in an endless sequence of passes, each with its own order of shards.

    Args:
        source: the source.
        seed: seed of the order of shards.
        shuffle: whether shards are shuffled.
    """

    def __init__(self, source: Source, seed: int, shuffle: bool) -> None:
        self.source, self.seed, self.shuffle = source, seed, shuffle
        self.files = files_of(source.path, source.split)
        self.dataset: Any = None
        if self.files is None:
            self.dataset = load_hub(source, streaming=True)
        self.shards: int = self.dataset.num_shards if self.files is None else len(self.files)
        self.cursor = [0, 0, 0]  # pass, index in the order of shards, rows read from that shard
        self._rows: Iterator[RawRow] | None = None
        self._found = True

    def seek(self, cursor: list[int]) -> None:
        """Continue from a cursor."""
        self.cursor, self._rows, self._found = list(cursor), None, True

    def next(self) -> RawRow:
        """Return the next row.

        Raises:
            DataError: a whole pass has no row.
        """
        while True:
            if self._rows is None:
                self._rows = self._open()
            row = next(self._rows, None)
            if row is not None:
                self.cursor[2] += 1
                self._found = True
                return row
            self._next_shard()

    def _next_shard(self) -> None:
        self._rows = None
        self.cursor[1:] = [self.cursor[1] + 1, 0]
        if self.cursor[1] == self.shards:
            if not self._found:
                raise DataError("no-rows", f"{self.source} is empty: it holds no row")
            self._found = False
            self.cursor = [self.cursor[0] + 1, 0, 0]

    def _open(self) -> Iterator[RawRow]:
        number, place, spent = self.cursor
        shard = int(shuffled(self.shards, self.seed, number)[place]) if self.shuffle else place
        if self.files is not None:
            return islice(read_file(self.files[shard], self.source.max_row_bytes), spent, None)
        one = self.dataset.shard(num_shards=self.shards, index=shard) if self.shards > 1 else self.dataset
        return iter(one.skip(spent) if spent else one)


class RowStream:
    """Encoded rows of weighted sources, in shuffled blocks.

    Args:
        tokenizer: the module's tokenizer.
        encoder: reads and encodes rows.
        sources: sources of the rows, drawn from in proportion to their weights.
        seed: seed of all orders.
        shuffle: whether shards and blocks are shuffled.
        block: rows per block.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, encoder: Encoder, sources: tuple[Source, ...], seed: int = 0,
        shuffle: bool = True, block: int = 4096,
    ) -> None:  # fmt: skip
        self.tokenizer = tokenizer
        self.encoders = [encoder if s.columns is None else replace(encoder, columns=s.columns) for s in sources]
        self.sources = [ShardedSource(s, seed + i, shuffle) for i, s in enumerate(sources)]
        self.bounds = list(accumulate(s.weight for s in sources))
        self.seed, self.shuffle, self.block = seed, shuffle, block
        self.report = Report()
        self.drawn = 0
        self.blocks = 0
        self.spent = 0
        self._rows: list[EncodedRow] | None = None
        self._begin = self._cursor()

    def peek(self) -> list[EncodedRow]:
        """Return some encoded rows from the start of each source, without moving the stream.

        Raises:
            DataError: the columns match no form, or none of the rows can be used.
        """
        rows = []
        for encoder, source in zip(self.encoders, self.sources, strict=True):
            report, first = Report(), ShardedSource(source.source, source.seed, source.shuffle)
            rows += list(encoder.rows(self.tokenizer, (first.next() for _ in range(PEEK)), report, str(source.source)))
            if not report.kept:
                raise no_rows(report, f"The beginning of {source.source}")
        return rows

    def take(self, count: int) -> list[EncodedRow]:
        """Return the next rows."""
        taken: list[EncodedRow] = []
        while len(taken) < count:
            if self._rows is None:
                self._rows = self._read_block()
            part = self._rows[self.spent : self.spent + count - len(taken)]
            taken += part
            self.spent += len(part)
            if self.spent == len(self._rows):
                self._rows, self.spent, self.blocks, self._begin = None, 0, self.blocks + 1, self._cursor()
        return taken

    def _read_block(self) -> list[EncodedRow]:
        rows: list[EncodedRow] = []
        fruitless = 0
        while len(rows) < self.block:
            wanted = min(CHUNK, self.block - len(rows))
            before = len(rows)
            for number, raw in self._draw(wanted):
                for outcome in self.encoders[number].counted(self.tokenizer, raw, self.report):
                    for row in outcome.encoded:
                        row.source = number
                        rows.append(row)
            fruitless = fruitless + wanted if len(rows) == before else 0
            if fruitless > 100_000:
                raise no_rows(self.report, "The stream")
        if not self.shuffle:
            return rows
        return [rows[i] for i in shuffled(len(rows), self.seed, self.blocks).tolist()]

    def _draw(self, count: int) -> list[tuple[int, list[RawRow]]]:
        """Return the next raw rows, grouped by source."""
        key = np.array([self.seed % 2**64, self.drawn], dtype=np.uint64)
        places = np.random.Philox(key=key).random_raw(count) / 2.0**64 * self.bounds[-1]
        self.drawn += count
        picks: list[list[RawRow]] = [[] for _ in self.sources]
        for place in places.tolist():
            number = min(bisect.bisect_right(self.bounds, place), len(self.sources) - 1)
            picks[number].append(self.sources[number].next())
        return [(number, raw) for number, raw in enumerate(picks) if raw]

    def _cursor(self) -> dict[str, Any]:
        return {
            "drawn": self.drawn,
            "sources": [list(source.cursor) for source in self.sources],
            "report": self.report.to_dict(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the stream, in plain values."""
        return {**self._begin, "blocks": self.blocks, "spent": self.spent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self.drawn, self.blocks, self.spent = state["drawn"], state["blocks"], state["spent"]
        for source, cursor in zip(self.sources, state["sources"], strict=True):
            source.seek(cursor)
        self.report.restore(state["report"])
        self._rows, self._begin = None, self._cursor()


class StreamLoader(StepLoader):
    """A `StepLoader` over a stream: an epoch is a number of steps, and the next epoch continues where it ended.

    Args:
        stream: the rows.
        rows: rows of a step over all ranks.
        build: builds this rank's share of a step from the step's rows and its number in the run.
        length: steps of an epoch.
        fingerprint: hash of everything that determines the order of rows.
    """

    def __init__(
        self, stream: RowStream, rows: int, build: Callable[[list[EncodedRow], int], Step[Any]], length: int,
        fingerprint: str,
    ) -> None:  # fmt: skip
        super().__init__(lambda epoch: (), length, fingerprint)
        self.stream, self.rows, self.build = stream, rows, build

    def steps_from(self, epoch: int, start: int) -> Iterator[Step[Any]]:
        """Build the steps of an epoch from ``start`` on; the stream must already be at that step."""
        for index in range(start, self.length):
            yield self.build(self.stream.take(self.rows), epoch * self.length + index)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "stream": self.stream.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.stream.load_state_dict(state["stream"])
