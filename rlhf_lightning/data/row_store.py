"""Encoded rows as a few flat arrays: written once, cached by content, and memory-mapped by every rank.

Row ``r`` owns the sequences ``first[r] .. first[r + 1] - 1``: its prompt, then its completions. Sequence ``s`` owns the
ids ``bounds[s] .. bounds[s + 1] - 1``. ``tokens`` counts the supervised tokens of each row. ``slots`` holds the numbers
of each row, row by row. There is no padding. A folder holds one ``.npy`` file per array, and the `Report`. It is
written under a temporary name and then renamed, so it is complete or absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from inspect import isfunction
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.data.canonical import Report, Row, no_rows
from rlhf_lightning.data.feedback.database import is_store
from rlhf_lightning.data.files import Unreadable
from rlhf_lightning.data.sources import Source, read_rows, source_fingerprint
from rlhf_lightning.data.tokenizing import EncodedRow, Encoder
from rlhf_lightning.loading import cache_folder
from rlhf_lightning.tokenization import all_cores
from rlhf_lightning.workers import in_forks

ARRAYS = {
    "ids": np.int32, "supervised": np.bool_, "bounds": np.int64, "first": np.int64, "ranks": np.int32,
    "target": np.float32, "margin": np.float32, "weight": np.float32, "source": np.int32, "group": np.int64,
    "tokens": np.int32, "records": np.uint8, "record_bounds": np.int64, "slots": np.float32,
}  # fmt: skip
OF_A_ROW = ("target", "margin", "weight", "source", "group")
BOUNDS = {"bounds": "ids", "first": "ranks", "record_bounds": "records"}
"""Arrays of bounds, each with the array that it divides."""


class RowStore:
    """Rows of token ids.

    Args:
        arrays: the arrays by name, see the module's docstring.
        report: counts of the rows read.
        slots: names of each row's numbers for the objective.
    """

    def __init__(self, arrays: dict[str, np.ndarray], report: Report, slots: Sequence[str] = ()) -> None:
        self.arrays, self.report, self.slots = arrays, report, tuple(slots)
        self.first, self.bounds = arrays["first"], arrays["bounds"]
        sizes = np.diff(self.bounds)
        prompts = self.first[:-1]
        counts = np.diff(self.first) - 1
        answers = sizes.copy()
        answers[prompts] = 0
        longest = np.maximum.reduceat(answers, prompts) if len(prompts) else np.zeros(0, np.int64)
        self.prompt_lengths = sizes[prompts]
        self.row_lengths = self.prompt_lengths + longest
        """Tokens of each row's prompt plus its longest completion."""
        self.has_completions = counts > 0
        self.lengths = np.maximum(counts, 1) * (self.prompt_lengths + longest)
        self.shared_lengths = self.prompt_lengths + (np.add.reduceat(answers, prompts) if len(prompts) else 0)
        self.tokens = arrays["tokens"]  # stored, so that a start from the cache reads no ids

    def __len__(self) -> int:
        return len(self.first) - 1

    @classmethod
    def build(cls, rows: Iterable[EncodedRow], report: Report) -> RowStore:
        """Build a store from encoded rows."""
        ids, supervised, records = array("i"), bytearray(), bytearray()
        values: dict[str, list[Any]] = {name: [] for name in ("ranks", "slots", "tokens", *OF_A_ROW)}
        values |= {"bounds": [0], "record_bounds": [0], "first": [0]}
        slots = tuple[str, ...]()
        for row in rows:
            slots = tuple(row.slots)
            values["slots"] += row.slots.values()
            values["ranks"] += (-1, *row.ranks)
            values["tokens"].append(sum(map(sum, row.supervised)))
            for tokens, flags in zip([row.prompt, *row.completions], [None, *row.supervised], strict=True):
                ids.fromlist(tokens)
                supervised += bytes(len(tokens)) if flags is None else bytes(flags)
                values["bounds"].append(len(ids))
            values["first"].append(len(values["ranks"]))
            records += row.record.encode("utf-8")
            values["record_bounds"].append(len(records))
            for name in OF_A_ROW:
                values[name].append(getattr(row, name))
        arrays: dict[str, np.ndarray] = {name: np.asarray(given, dtype=ARRAYS[name]) for name, given in values.items()}
        for name, buffer in (("ids", ids), ("supervised", supervised), ("records", records)):
            arrays[name] = np.frombuffer(buffer, dtype=ARRAYS[name])
        return cls(arrays, report, slots)

    @classmethod
    def joined(cls, stores: Iterable[RowStore], report: Report) -> RowStore:
        """Join stores of successive rows, and add their counts to ``report``."""
        sizes = {name: np.dtype(kind).itemsize for name, kind in ARRAYS.items()}
        joined = {name: bytearray(size if name in BOUNDS else 0) for name, size in sizes.items()}  # bounds begin with 0
        slots = tuple[str, ...]()
        for store in stores:
            slots = store.slots or slots
            counts = {name: len(joined[of]) // sizes[of] for name, of in BOUNDS.items()}
            for name, values in store.arrays.items():
                joined[name] += (values[1:] + counts[name] if name in BOUNDS else values).tobytes()
            report.restore((report + store.report).to_dict())
        arrays: dict[str, np.ndarray] = {
            name: np.frombuffer(buffer, dtype=ARRAYS[name]) for name, buffer in joined.items()
        }
        return cls(arrays, report, slots)

    def save(self, folder: Path) -> None:
        """Write the arrays to ``folder`` atomically; an existing complete folder is kept."""
        temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
        temporary.mkdir(parents=True)
        try:
            for name, array in self.arrays.items():
                np.save(temporary / f"{name}.npy", array, allow_pickle=False)
            sizes = {name: len(array) for name, array in self.arrays.items()}
            text = json.dumps({"report": self.report.to_dict(), "sizes": sizes, "slots": self.slots})
            (temporary / "meta.json").write_text(text, encoding="utf-8")
            try:
                os.rename(temporary, folder)
            except OSError:
                if RowStore.load(folder) is None:  # if it is not damaged, another process wrote it first
                    shutil.rmtree(folder)
                    os.rename(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    @classmethod
    def load(cls, folder: Path) -> RowStore | None:
        """Memory-map a folder; None if it is missing or damaged."""
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            arrays = {}
            for name, kind in ARRAYS.items():
                size = meta["sizes"][name]  # an empty file cannot be memory-mapped
                array = np.load(folder / f"{name}.npy", mmap_mode="r" if size else None, allow_pickle=False)
                if array.shape != (size,) or array.dtype != kind:
                    return None
                arrays[name] = np.asarray(array)  # shares the memory; slicing a memmap is slow
            return cls(arrays, Report(**meta["report"]), meta["slots"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def sequence(self, index: int) -> Tensor:
        """Return the token ids of one sequence, int64."""
        return torch.from_numpy(self.arrays["ids"][self.bounds[index] : self.bounds[index + 1]].astype(np.int64))

    def prompt(self, row: int) -> Tensor:
        """Return the token ids of a row's prompt."""
        return self.sequence(int(self.first[row]))

    def completions(self, row: int) -> list[tuple[Tensor, Tensor, int]]:
        """Return ids, supervised mask and rank of each completion of a row."""
        found = []
        for index in range(int(self.first[row]) + 1, int(self.first[row + 1])):
            mask = self.arrays["supervised"][self.bounds[index] : self.bounds[index + 1]].copy()
            found.append((self.sequence(index), torch.from_numpy(mask), int(self.arrays["ranks"][index])))
        return found

    def column(self, name: str, rows: Iterable[int]) -> Tensor:
        """Return ``target``, ``margin`` or ``weight`` of some rows, float32."""
        return torch.from_numpy(np.asarray(self.arrays[name][list(rows)], dtype=np.float32).copy())

    def extras(self, rows: Iterable[int]) -> dict[str, Tensor]:
        """Return the slots of some rows, each float32, shape (rows,)."""
        table = self.arrays["slots"].reshape(-1, max(len(self.slots), 1))
        chosen = torch.from_numpy(table[list(rows)].copy()) if self.slots else torch.zeros(0)
        return {name: chosen[:, place].contiguous() for place, name in enumerate(self.slots)}

    def record(self, row: int) -> dict[str, Any]:
        """Return ``prompt`` and ``columns`` of a row, as in the data."""
        start, stop = self.arrays["record_bounds"][row : row + 2]
        return json.loads(self.arrays["records"][start:stop].tobytes().decode("utf-8"))


# ---- the cache ------------------------------------------------------------------------------------------------------

FORMAT = 5
"""Increment this whenever the encoding of the same rows and settings, or their report, changes: old caches are then not
used."""


class Part(NamedTuple):
    """Rows that are read and encoded together.

    Attributes:
        sources: the sources of the rows.
        rows: number of rows to read; None reads all.
        encoder: reads and encodes the rows.
    """

    sources: tuple[Source, ...]
    rows: int | None
    encoder: Encoder

    def __str__(self) -> str:
        return ", ".join(map(str, self.sources))

    def fingerprint(self, tokenizer: str, content: Callable[[Source], str] = source_fingerprint) -> str:
        """Hash everything that determines the encoded rows.

        Args:
            tokenizer: hash of the tokenizer, see `tokenizer_fingerprint`.
            content: returns the hash of a source.
        """
        encoder = self.encoder
        limits = [encoder.max_length, encoder.max_prompt_length]
        settings = [encoder.read.__name__, encoder.pairwise, encoder.apart, encoder.as_chat, encoder.rendered, *limits]
        settings += [encoder.turnwise, encoder.last_turn_only]
        if encoder.separator is not None:
            settings.append(encoder.separator)
        if encoder.slots:
            settings += ["slots", *encoder.slots]
        if encoder.prefix is not None:
            settings += ["prefix", encoder.prefix]
        renames = [encoder.columns if source.columns is None else source.columns for source in self.sources]
        contents = [[content(s), s.rows, columns] for s, columns in zip(self.sources, renames, strict=True)]
        return hash_of(FORMAT, tokenizer, settings, contents, self.rows)

    def blocks(self, tokenizer: PreTrainedTokenizerBase, report: Report) -> Iterator[RowStore]:
        """Read the rows and encode them in forks; yield a store of each chunk.

        Args:
            tokenizer: the policy's tokenizer.
            report: the counts of the blocks that were already taken.
        """
        for number, source in enumerate(self.sources):
            encoder = self.encoder if source.columns is None else replace(self.encoder, columns=source.columns)
            if is_store(source.path):  # its further columns are a record of the item, which the user did not write
                encoder = replace(encoder, hands_on=True)
            left = None if self.rows is None else max(self.rows - report.read, 0)
            chunks = encoder.chunks(islice(read_rows(source), left), str(source))
            # An environment that reads rows may hold connections, which forks cannot share.
            forks = None if isfunction(encoder.read) else 1
            yield from in_forks(partial(_block, tokenizer, encoder, number), chunks, forks)

    def store(self, tokenizer: PreTrainedTokenizerBase, hashed: str, cache_dir: str | None) -> RowStore:
        """Return the encoded rows from the cache, or encode and cache them.

        Args:
            tokenizer: the policy's tokenizer.
            hashed: its hash, see `tokenizer_fingerprint`; for a large vocabulary it takes a second.
            cache_dir: folder of the cache; None takes the default.

        Raises:
            DataError: no row can be used.
        """
        folder = cache_folder(cache_dir) / "rows" / self.fingerprint(hashed)
        store = RowStore.load(folder)
        if store is None:
            report = Report()
            with all_cores():
                store = RowStore.joined(self.blocks(tokenizer, report), report)
            if len(store) == 0:
                raise no_rows(report, str(self))
            try:
                store.save(folder)
            except OSError as error:
                rank_zero_warn(f"The encoded rows are not cached ({error}): every process encodes them again.")
        return store


def _block(
    tokenizer: PreTrainedTokenizerBase, encoder: Encoder, source: int, chunk: Sequence[Row | Unreadable]
) -> RowStore:
    report = Report()
    rows = [row for outcome in encoder.counted(tokenizer, chunk, report) for row in outcome.encoded]
    for row in rows:
        row.source = source
    return RowStore.build(rows, report)


def hash_of(*values: Any) -> str:
    """Hash plain values."""
    return hashlib.blake2b(json.dumps(values, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
