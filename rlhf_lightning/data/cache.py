"""Encoded rows are made once and kept: a folder named by the content of data, tokenizer and settings."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.data.reading import Report
from rlhf_lightning.data.row_store import RowStore
from rlhf_lightning.data.sources import Source, read_rows, source_fingerprint
from rlhf_lightning.data.tokenizing import EncodedRow, Encoder, no_rows
from rlhf_lightning.tokenization import tokenizer_fingerprint

FORMAT = 3
"""Raised whenever the same rows and settings would be encoded otherwise, so that old caches are not read."""


class Part(NamedTuple):
    """Rows that are read and encoded together.

    Attributes:
        sources: where they come from.
        rows: read only the first so many.
        encoder: how they are read and encoded.
    """

    sources: tuple[Source, ...]
    rows: int | None
    encoder: Encoder

    def __str__(self) -> str:
        return ", ".join(map(str, self.sources))

    def fingerprint(
        self, tokenizer: PreTrainedTokenizerBase, content: Callable[[Source], str] = source_fingerprint
    ) -> str:
        """Hash of everything that decides the encoded rows."""
        encoder = self.encoder
        limits = [encoder.max_length, encoder.max_prompt_length]
        settings = [encoder.read.__name__, encoder.pairwise, encoder.apart, encoder.as_chat, encoder.rendered, *limits]
        if encoder.separator is not None:
            settings.append(encoder.separator)
        if encoder.slots:
            settings += ["slots", *encoder.slots]
        renames = [encoder.columns if source.columns is None else source.columns for source in self.sources]
        contents = [[content(s), s.rows, columns] for s, columns in zip(self.sources, renames, strict=True)]
        return hash_of(FORMAT, tokenizer_fingerprint(tokenizer), settings, contents, self.rows)

    def encoded(self, tokenizer: PreTrainedTokenizerBase, report: Report) -> Iterator[EncodedRow]:
        """Read and encode the rows, counting in ``report``."""
        for number, source in enumerate(self.sources):
            encoder = self.encoder if source.columns is None else replace(self.encoder, columns=source.columns)
            left = None if self.rows is None else max(self.rows - report.read, 0)
            for row in encoder.rows(tokenizer, islice(read_rows(source), left), report, str(source)):
                row.source = number
                yield row

    def store(self, tokenizer: PreTrainedTokenizerBase, cache_dir: str | None) -> RowStore:
        """The encoded rows: from the cache, or encoded now and put there.

        Raises:
            ValueError: if no row can be used.
        """
        folder = cache_folder(cache_dir) / "rows" / self.fingerprint(tokenizer)
        store = RowStore.load(folder)
        if store is None:
            report = Report()
            store = RowStore.build(self.encoded(tokenizer, report), report)
            if len(store) == 0:
                raise no_rows(report, str(self))
            try:
                store.save(folder)
            except OSError as error:
                rank_zero_warn(f"The encoded rows are not cached ({error}): every process encodes them by itself.")
        return store


def cache_folder(cache_dir: str | None = None) -> Path:
    """Folder of everything that can be made again: the argument, else $RLHF_CACHE, else ~/.cache/rlhf_lightning."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlhf_lightning"
    return Path(cache_dir or os.environ.get("RLHF_CACHE") or default).expanduser()


def hash_of(*values: Any) -> str:
    """Hash of plain values."""
    return hashlib.blake2b(json.dumps(values, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
