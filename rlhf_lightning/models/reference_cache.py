"""Log-probabilities of a frozen reference, kept on disk: fixed data is forwarded through it once, not once an epoch.

An entry is addressed by what it depends on: the weights' content and precision name the file, the token ids of prompt
and completion name the row. Tokenizer, template and data set need no key of their own, since all they do is in the ids.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from rlhf_lightning.types import Sequences

DTYPES = {torch.float32: b"4", torch.float64: b"8"}
"""Precisions that log-probabilities come in, and how a key names them."""


class ReferenceCache:
    """Rows of log-probabilities in one SQLite file, which several processes may share.

    A cache never fails a run: what cannot be read is computed, what cannot be written is said once.

    Args:
        file: where they are kept.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._connection: sqlite3.Connection | None = None
        self._broken = False

    def read(self, sequences: Sequences, mask: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Return the log-probabilities of all completions, shape (completions, length); None if one is not there.

        Args:
            sequences: prompts and completions.
            mask: bool, True on supervised tokens, shape (completions, length).
            dtype: precision that the reference answers in.
        """
        keys = row_keys(sequences, dtype)
        found: dict[bytes, bytes] = {}
        for start in range(0, len(keys), 500):  # SQLite takes a limited number of values at once
            part = keys[start : start + 500]
            marks = ",".join("?" * len(part))
            found |= dict(self._execute(f"SELECT key, row FROM logprobs WHERE key IN ({marks})", part))
        grid = torch.zeros(mask.shape, dtype=dtype)
        for index, (key, completion) in enumerate(zip(keys, sequences.completions, strict=True)):
            row = found.get(key)
            if row is None or len(row) != len(completion) * dtype.itemsize:
                return None
            grid[index, : len(completion)] = torch.frombuffer(bytearray(row), dtype=dtype)
        return grid

    def write(self, sequences: Sequences, logprobs: Tensor) -> None:
        """Keep the log-probabilities of completions, shape (completions, length)."""
        rows = logprobs.detach().cpu()
        values = [
            (key, row[: len(completion)].numpy().tobytes())
            for key, row, completion in zip(
                row_keys(sequences, rows.dtype), rows.contiguous(), sequences.completions, strict=True
            )
        ]
        self._execute("INSERT OR IGNORE INTO logprobs VALUES (?, ?)", many=values)

    def _execute(
        self, statement: str, values: Sequence[bytes] = (), many: list[tuple[bytes, bytes]] | None = None
    ) -> list[tuple[bytes, bytes]]:
        if self._broken:
            return []
        try:
            if self._connection is None:
                self._connection = self._connected()
            if many is not None:
                with self._connection:
                    self._connection.executemany(statement, many)
                return []
            return self._connection.execute(statement, values).fetchall()
        except (sqlite3.Error, OSError) as error:
            self._broken = True
            rank_zero_warn(f"reference log-probabilities are not kept: {self.file} cannot be used ({error})")
            return []

    def _connected(self) -> sqlite3.Connection:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self.file, timeout=60)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")  # a row lost to a power cut is computed again
        connection.execute("CREATE TABLE IF NOT EXISTS logprobs (key BLOB PRIMARY KEY, row BLOB) WITHOUT ROWID")
        return connection


def row_keys(sequences: Sequences, dtype: torch.dtype) -> list[bytes]:
    """Return what names each completion: a hash of its prompt, its ids, which of them count, and the precision."""
    keys = []
    prompts = [prompt.numpy().tobytes() for prompt in sequences.prompts]
    for parent, ids, supervised in zip(sequences.parents, sequences.completions, sequences.supervised, strict=True):
        digest = hashlib.blake2b(digest_size=16)
        for part in (DTYPES[dtype], prompts[parent], b"|", ids.numpy().tobytes(), b"|", supervised.numpy().tobytes()):
            digest.update(part)
        keys.append(digest.digest())
    return keys
