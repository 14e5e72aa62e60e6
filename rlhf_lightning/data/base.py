"""What the DataModules share: reading and caching, held-out rows, the plan of every epoch, and the loaders."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.data import collation
from rlhf_lightning.data.batching import BatchPlan, shuffled
from rlhf_lightning.data.encoding import EncodedRow, Encoder, no_rows
from rlhf_lightning.data.loader import EpochSteps, StepLoader
from rlhf_lightning.data.report import Report
from rlhf_lightning.data.sources import Source, parse_sources, read_rows, source_fingerprint
from rlhf_lightning.data.store import RowStore
from rlhf_lightning.tokenization import tokenizer_fingerprint
from rlhf_lightning.types import Prompt, PromptBatch, RankedBatch, Step

FORMAT = 1
"""Raised whenever the same rows and settings would be encoded otherwise, so that old caches are not read."""


class PlannedSteps:
    """One epoch's steps of one rank, built from a plan when they are asked for.

    Args:
        plan: the plan, over positions in ``rows``.
        rows: row of the store at each position.
        rank: this rank.
        collate: makes a batch of rows of the store.
    """

    def __init__(self, plan: BatchPlan, rows: np.ndarray, rank: int, collate: Any) -> None:
        self.plan, self.rows, self.rank, self.collate = plan, rows, rank, collate

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> Step[Any]:
        planned = self.plan.step(index, self.rank)
        batches = tuple(self.collate(self.rows[list(group)].tolist()) for group in planned.micro_batches)
        return Step(batches, planned.rows, planned.tokens)


class PromptSteps:
    """Steps of prompts alone, one micro-batch each, dealt to the ranks in turn.

    Args:
        store: the rows.
        rows: rows of each step, over all ranks.
        first: number of the first step's first episode.
        rank, ranks: this rank, of how many.
        samples: samples of each prompt.
    """

    def __init__(
        self, store: RowStore, rows: Sequence[np.ndarray], first: int, rank: int, ranks: int, samples: int = 1
    ) -> None:
        self.store, self.rows, self.rank, self.ranks, self.samples = store, rows, rank, ranks, samples
        self.begins = first + samples * np.cumsum([0, *(len(step) for step in rows)])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Step[PromptBatch]:
        rows = self.rows[index]
        places = np.arange(self.rank, len(rows), self.ranks)
        episodes = torch.from_numpy(self.begins[index] + places * self.samples)
        batch = collation.prompts(self.store, rows[places].tolist(), episodes, self.samples)
        return Step((batch,), len(rows) * self.samples, 0)


class AlignmentDataModule(L.LightningDataModule, ABC):
    """Base of the DataModules: rows of text in, one `types.Step` for each optimizer step out.

    Args:
        source: where the rows come from: a name on the Hugging Face Hub, a .jsonl, .json, .parquet or .csv file, a glob,
            a folder written by ``save_to_disk``; or a list of those, each a path or a mapping with ``path`` and any of
            ``weight`` (how often its rows are seen in an epoch), ``rows``, ``split``, ``name`` and ``columns``.
        eval_source: where the rows of validation and test come from, in the same forms.
        eval_rows: hold out so many rows of ``source`` instead, chosen by ``seed``; rows of one prompt stay together.
        rows: read only the first so many rows.
        columns: new names of columns, as {name in the data: name expected here}.
        as_chat: make plain text a user's turn and an assistant's turn of the chat template.
        batch_size: rows of an optimizer step, over all ranks.
        micro_batch_size: most rows of one forward pass on one rank; None for no bound.
        max_tokens: most tokens of one forward pass on one rank, pads included; None for no bound.
        max_length: most tokens of prompt and completion; longer rows are truncated, see `tokenization.truncate`.
        max_prompt_length: most tokens of the prompt; None leaves it to ``max_length``.
        shuffle: whether each epoch has an order of its own; otherwise rows come as the source has them.
        drop_last: leave out a last step of fewer rows than ``batch_size``.
        seed: seed of the order and of the rows held out.
        cache_dir: folder of the encoded rows; None takes $RLHF_CACHE or ~/.cache/rlhf_lightning.
        num_workers: processes that collate ahead; 0 is fastest unless sequences are very long.
        eval_batch_size: rows of a validation step over all ranks; None takes ``batch_size``.

    Raises:
        ValueError: if the arguments contradict each other.
    """

    batch_types: ClassVar[tuple[type, ...]]
    """Batches this DataModule can give; the first unless the module takes another."""

    def __init__(
        self,
        source: str | list[str | dict[str, Any]],
        eval_source: str | list[str | dict[str, Any]] | None = None,
        eval_rows: int = 0,
        rows: int | None = None,
        columns: dict[str, str] | None = None,
        as_chat: bool = False,
        batch_size: int = 64,
        micro_batch_size: int | None = None,
        max_tokens: int | None = None,
        max_length: int | None = 1024,
        max_prompt_length: int | None = None,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int = 0,
        cache_dir: str | None = None,
        num_workers: int = 0,
        eval_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.sources = parse_sources(source)
        self.eval_sources = parse_sources(eval_source) if eval_source is not None else ()
        self.eval_rows = eval_rows
        self.rows = rows
        self.columns = columns or {}
        self.as_chat = as_chat
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.max_tokens = max_tokens
        self.max_length = max_length
        self.max_prompt_length = max_prompt_length
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.seed = seed
        self.cache_dir = cache_dir
        self.num_workers = num_workers
        self.eval_batch_size = eval_batch_size or batch_size
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._batch_type: type | None = None
        self._check_arguments()

    def _check_arguments(self) -> None:
        if self.eval_rows and self.eval_sources:
            raise ValueError("Give either eval_source or eval_rows, not both.")
        for name in ("batch_size", "eval_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")
        for name in ("rows", "micro_batch_size", "max_tokens", "max_prompt_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, or null for no bound; found {getattr(self, name)}.")
        if self.eval_rows < 0:
            raise ValueError(f"eval_rows must not be negative, found {self.eval_rows}.")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length {self.max_length} leaves no room for a prompt and a completion.")

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The module's tokenizer, or the one set by hand for use without a Trainer."""
        if self._tokenizer is not None:
            return self._tokenizer
        if self.trainer is None:
            raise RuntimeError("Set the attribute tokenizer to use a DataModule without a Trainer.")
        return self.trainer.lightning_module.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    @property
    def batch_type(self) -> type:
        """The batch of this DataModule's training steps: the one the module takes."""
        if self._batch_type is not None:
            return self._batch_type
        wanted = getattr(self.trainer.lightning_module, "batch_type", None) if self.trainer is not None else None
        if wanted is None:
            return self.batch_types[0]
        if wanted not in self.batch_types:
            given = " or ".join(kind.__name__ for kind in self.batch_types)
            raise ValueError(
                f"{type(self.trainer.lightning_module).__name__} takes a {wanted.__name__}, but {type(self).__name__} "
                f"gives a {given}: use {_GIVERS.get(wanted.__name__, 'the DataModule that gives it')}."
            )
        return wanted

    @batch_type.setter
    def batch_type(self, kind: type) -> None:
        if kind not in self.batch_types:
            raise ValueError(f"{type(self).__name__} gives no {kind.__name__}.")
        self._batch_type = kind

    @property
    def ranks(self) -> tuple[int, int]:
        """This data-parallel rank, and how many there are."""
        if self.trainer is None:
            return 0, 1
        given = getattr(self.trainer.strategy, "distributed_sampler_kwargs", None)
        if given:  # differs from the world size where a strategy splits the model too
            return given["rank"], given["num_replicas"]
        return self.trainer.global_rank, self.trainer.world_size

    @abstractmethod
    def encoder(self) -> Encoder:
        """How rows are read and encoded."""

    @abstractmethod
    def collate(self, store: RowStore, rows: Sequence[int]) -> Any:
        """A batch of some rows of the store."""

    # ------------------------------------------------------------------------------------------------ reading

    def prepare_data(self) -> None:
        """Encode what is not in the cache yet. Runs on one process of each node, and assigns nothing."""
        for sources, rows in self._needed():
            self._stored(sources, rows)

    def setup(self, stage: str) -> None:
        """Map the encoded rows into memory and say what became of the data."""
        kind = self.batch_type
        stores = [self._stored(sources, rows) for sources, rows in self._needed()]
        self.store = stores[0]
        self.eval_store = stores[-1]
        held_out = np.zeros(0, np.int64)
        self.train_rows = np.arange(len(self.store))
        if self.eval_sources:
            held_out = np.arange(len(self.eval_store))
        elif self.eval_rows:
            held_out = held_out_rows(self.store.arrays["group"], self.eval_rows, self.seed)
            self.train_rows = np.setdiff1d(self.train_rows, held_out)
            if len(self.train_rows) == 0:
                raise ValueError(f"eval_rows {self.eval_rows} leaves no row to train on: {len(self.store)} were kept.")
        self.held_out = held_out
        self.report = self.store.report
        self.fingerprint = _hash(
            self._key(self.sources, self.rows), kind.__name__, self.batch_size, self.shuffle, self.drop_last, self.seed,
            self.eval_rows, [source.weight for source in self.sources],
        )  # fmt: skip
        if stage == "fit":
            self.steps_per_epoch = len(self.train_dataloader())
            self._announce()

    def _announce(self) -> None:
        where = ", ".join(map(str, self.sources))
        rank_zero_info(self.report.describe(where))
        if self.eval_sources:
            rank_zero_info(self.eval_store.report.describe(", ".join(map(str, self.eval_sources))))
        elif self.eval_rows:
            rank_zero_info(f"{where}: {len(self.held_out):,} of the rows kept are held out for evaluation.")

    def _needed(self) -> list[tuple[tuple[Source, ...], int | None]]:
        needed: list[tuple[tuple[Source, ...], int | None]] = [(self.sources, self.rows)]
        return [*needed, (self.eval_sources, None)] if self.eval_sources else needed

    def _key(self, sources: tuple[Source, ...], rows: int | None) -> str:
        encoder = self.encoder()
        settings = [encoder.read.__name__, encoder.pairwise, encoder.as_chat, encoder.max_length, encoder.max_prompt_length]
        contents = [[source_fingerprint(s), s.rows, s.columns, encoder.columns] for s in sources]
        return _hash(FORMAT, tokenizer_fingerprint(self.tokenizer), settings, contents, rows)

    def _stored(self, sources: tuple[Source, ...], rows: int | None) -> RowStore:
        folder = cache_folder(self.cache_dir) / "rows" / self._key(sources, rows)
        store = RowStore.load(folder)
        if store is None:
            report = Report()
            store = RowStore.build(self._encoded(sources, rows, report), report)
            if len(store) == 0:
                raise no_rows(report, ", ".join(map(str, sources)))
            store.save(folder)
        return store

    def _encoded(self, sources: tuple[Source, ...], rows: int | None, report: Report) -> Iterator[EncodedRow]:
        for number, source in enumerate(sources):
            left = None if rows is None else rows - report.read
            encoder = self.encoder()
            if source.columns is not None:
                encoder = replace(encoder, columns=source.columns)
            for row in encoder.rows(self.tokenizer, islice(read_rows(source), left), report, str(source)):
                row.source = number
                yield row

    # ------------------------------------------------------------------------------------------------ loaders

    def epoch_rows(self, epoch: int) -> np.ndarray:
        """Rows of the store that are seen in an epoch: each as often as the weight of its source says."""
        weights = [source.weight for source in self.sources]
        if all(weight == 1 for weight in weights):
            return self.train_rows
        chosen = []
        for number, weight in enumerate(weights):
            mine = self.train_rows[self.store.arrays["source"][self.train_rows] == number]
            part = round(len(mine) * (weight % 1))
            chosen += [mine] * int(weight)
            chosen.append(np.sort(mine[shuffled(len(mine), self.seed + 1 + number, epoch)[:part]]))
        rows = np.concatenate(chosen)
        if len(rows) == 0:
            raise ValueError("The weights of the sources leave no row in an epoch.")
        return rows

    def _plan(self, store: RowStore, rows: np.ndarray, epoch: int, **changes: Any) -> BatchPlan:
        settings: dict[str, Any] = {"batch_size": self.batch_size, "shuffle": self.shuffle, "drop_last": self.drop_last}
        return BatchPlan(
            store.lengths[rows], store.tokens[rows], micro_batch_size=self.micro_batch_size, max_tokens=self.max_tokens,
            ranks=self.ranks[1], seed=self.seed, epoch=epoch, **{**settings, **changes},
        )  # fmt: skip

    def _train_steps(self, epoch: int) -> EpochSteps:
        rows = self.epoch_rows(epoch)
        plan = self._plan(self.store, rows, epoch)
        return PlannedSteps(plan, rows, self.ranks[0], lambda group: self.collate(self.store, group))

    def train_dataloader(self) -> StepLoader:
        """Steps of the training rows, in an order of its own each epoch."""
        length = len(self._plan(self.store, self.epoch_rows(0), 0, shuffle=False))
        return StepLoader(self._train_steps, length, self.fingerprint, self.num_workers)

    def _eval_loader(self, collate: Any = None) -> StepLoader | list[StepLoader]:
        if len(self.held_out) == 0:
            return []
        return self._steps_in_order(self.eval_store, self.held_out, collate or self.collate)

    def _steps_in_order(self, store: RowStore, rows: np.ndarray, collate: Any) -> StepLoader:
        plan = self._plan(store, rows, 0, batch_size=self.eval_batch_size, shuffle=False, drop_last=False)
        steps = PlannedSteps(plan, rows, self.ranks[0], lambda group: collate(store, group))
        return StepLoader(lambda _: steps, len(plan), self.fingerprint)

    def _prompts_in_order(self, store: RowStore, rows: np.ndarray) -> StepLoader:
        cuts = [rows[start : start + self.eval_batch_size] for start in range(0, len(rows), self.eval_batch_size)]
        steps = PromptSteps(store, cuts, 0, *self.ranks)
        return StepLoader(lambda _: steps, len(cuts), self.fingerprint)

    def val_dataloader(self) -> StepLoader | list[StepLoader]:
        """Steps of the held-out rows, in their order; none without such rows."""
        return self._eval_loader()

    def test_dataloader(self) -> StepLoader | list[StepLoader]:
        """The same steps as for validation."""
        return self._eval_loader()

    def predict_dataloader(self) -> StepLoader:
        """Prompts of the held-out rows (else of the training rows) for a policy; their completions for other modules."""
        store, rows = (self.eval_store, self.held_out) if len(self.held_out) else (self.store, self.train_rows)
        module = self.trainer.lightning_module if self.trainer is not None else None
        if getattr(module, "has_policy", True) or RankedBatch not in self.batch_types:
            return self._prompts_in_order(store, rows)
        return self._steps_in_order(store, rows, collation.groups)

    def example_prompts(self, count: int) -> list[Prompt]:
        """Some prompts as the data gave them: of the held-out rows, else of the training rows."""
        store, rows = (self.eval_store, self.held_out) if len(self.held_out) else (self.store, self.train_rows)
        found: dict[str, Prompt] = {}
        for row in rows.tolist():
            if len(found) == count:
                break
            prompt = store.record(row)["prompt"]
            found.setdefault(json.dumps(prompt), prompt)
        return list(found.values())


_GIVERS = {
    "DemonstrationBatch": "SFTDataModule",
    "PreferenceBatch": "PreferenceDataModule",
    "RankedBatch": "PreferenceDataModule",
    "PromptBatch": "PromptDataModule",
}


def held_out_rows(groups: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Rows to hold out, by seed, so that no prompt is on both sides.

    Args:
        groups: number of each row's prompt, shape (rows,).
        count: rows to hold out.
        seed: seed of the choice.

    Returns:
        the rows in rising order; more than ``count`` only where the prompts' rows do not add up to it.

    Raises:
        ValueError: if that many cannot be held out.
    """
    if count >= len(groups):
        raise ValueError(f"eval_rows {count} leaves no row to train on: {len(groups)} were kept.")
    members: dict[int, list[int]] = {}
    for row, group in enumerate(np.asarray(groups).tolist()):
        members.setdefault(group, []).append(row)
    prompts = list(members.values())
    chosen: list[int] = []
    for index in shuffled(len(prompts), seed, 2**63).tolist():
        if len(chosen) + len(prompts[index]) <= count:
            chosen += prompts[index]
    if not chosen:
        chosen = min(prompts, key=len)
    return np.sort(np.asarray(chosen, dtype=np.int64))


def cache_folder(cache_dir: str | None = None) -> Path:
    """Folder of everything that can be made again: the argument, else $RLHF_CACHE, else ~/.cache/rlhf_lightning."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlhf_lightning"
    return Path(cache_dir or os.environ.get("RLHF_CACHE") or default).expanduser()


def _hash(*values: Any) -> str:
    return hashlib.blake2b(json.dumps(values, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
