"""The base class of the DataModules: arguments, held-out rows, the plan of every epoch, and the loaders."""

from __future__ import annotations

import json
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from rlhf_lightning.data import collation
from rlhf_lightning.data.attached import AttachedDataModule
from rlhf_lightning.data.batching import BatchPlan, held_out_rows, weighted_rows
from rlhf_lightning.data.canonical import Report
from rlhf_lightning.data.feedback.database import is_store
from rlhf_lightning.data.feedback.rows import RowKind
from rlhf_lightning.data.formats import Form, Reader
from rlhf_lightning.data.loader import Collate, EpochSteps, PlannedSteps, PromptSteps, StepLoader
from rlhf_lightning.data.row_store import Part, RowStore, hash_of
from rlhf_lightning.data.sources import (
    Source,
    as_file,
    parse_sources,
    refuse_objects,
    snapshots_of,
    source_fingerprint,
    source_stamp,
)
from rlhf_lightning.data.streaming import RowStream, StreamLoader
from rlhf_lightning.data.tokenizing import EncodedRow, Encoder
from rlhf_lightning.errors import SettingError, StateError
from rlhf_lightning.loading import cache_folder
from rlhf_lightning.tokenization import PINNED_DATE, facts_of, template_args_of, tokenizer_fingerprint
from rlhf_lightning.types import MicroBatchLimits, Prompt, RankedBatch, Step

MOST_WORKERS = 1024
"""Maximum number of processes that collate ahead."""


class AlignmentDataModule(AttachedDataModule, ABC):
    """Base of the DataModules: read rows of text, and yield one `types.Step` per optimizer step.

    Args:
        source: source of the rows: a Hub name, a file (.jsonl, .json, .parquet, .arrow, .csv, .tsv, .txt, compressed or
            not), a glob, a folder, or a store of `rlhf annotate` (``feedback.db``, or ``feedback.db@1200`` for its
            first 1200 rows). Several sources are given as a list. Each entry is a path, or a mapping with ``path`` and
            any of ``weight`` (how often its rows are used in an epoch), ``rows``, ``split`` (also a slice:
            ``train[:10%]``), ``name`` and ``columns``. For a store also ``labels`` (``mean`` or ``reliability``) and
            ``annotators`` (whose judgements count).
        eval_source: source of the rows of validation and test, in the same forms.
        eval_rows: hold out this many rows of ``source`` instead, chosen by ``seed``; rows of one prompt stay together.
        rows: read only this many rows.
        columns: new names of columns, as {name in the data: name expected here}.
        as_chat: make plain text a user turn and an assistant turn of the chat template.
        rendered: plain text was written by a chat template and may contain control tokens. Otherwise their spellings
            are encoded as plain characters, as they always are in messages.
        last_turn_only: learn only the assistant's last turn of a conversation.
        batch_size: rows of an optimizer step, over all ranks.
        micro_batch_size: maximum rows of one forward pass on one rank (for prompts: episodes); None for no limit.
        max_tokens: token budget of one forward pass on one rank, including padding if the module does not pack rows;
            None for no limit.
        max_length: maximum tokens of prompt and completion; longer rows are truncated, see `tokenization.truncate`.
        max_prompt_length: maximum tokens of the prompt; None leaves the limit to ``max_length``.
        shuffle: shuffle the rows anew each epoch; otherwise they keep the order of the source.
        drop_last: drop a last step with fewer rows than ``batch_size``.
        seed: seed of the order and of the held-out rows; null takes ``seed_everything``'s, or 0 without it.
        cache_dir: folder of the encoded rows; None takes $RLHF_CACHE or ~/.cache/rlhf_lightning.
        num_workers: processes that collate ahead; 0 is fastest unless sequences are very long.
        eval_batch_size: rows of a validation step over all ranks; None takes ``batch_size``.
        streaming: read and encode rows during training, for data that does not fit on disk or in memory; rows are
            drawn endlessly from the sources, in proportion to their weights.
        steps_per_epoch: steps of an epoch of a stream, whose length is unknown; required with ``streaming``.
        train_prefix: instruction added to every training prompt, in the system turn or before plain text. It requires
            ``eval_source``, whose rows do not get it (inoculation prompting, arXiv 2510.04340).

    Raises:
        SettingError: the arguments contradict each other.
    """

    completes: ClassVar[bool] = True
    """Whether the rows have completions."""

    judgements: ClassVar[RowKind] = "preference"
    """The kind of rows that judgements of a feedback store become."""

    def __init__(
        self,
        source: str | list[str | dict[str, Any]],
        eval_source: str | list[str | dict[str, Any]] | None = None,
        eval_rows: int = 0,
        rows: int | None = None,
        columns: dict[str, str] | None = None,
        as_chat: bool = False,
        rendered: bool = False,
        last_turn_only: bool = False,
        batch_size: int = 64,
        micro_batch_size: int | None = None,
        max_tokens: int | None = None,
        max_length: int | None = 1024,
        max_prompt_length: int | None = None,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int | None = None,
        cache_dir: str | None = None,
        num_workers: int = 0,
        eval_batch_size: int | None = None,
        streaming: bool = False,
        steps_per_epoch: int | None = None,
        train_prefix: str | None = None,
    ) -> None:
        super().__init__()
        for given in (source, eval_source):
            refuse_objects(given)
        # A seed in the hyperparameters of both module and DataModule would be an error if both went to the logger.
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        self.save_hyperparameters(logger=False)
        self.hparams["seed"] = seed
        source, eval_source = (as_file(given, cache_folder(cache_dir)) for given in (source, eval_source))
        self.hparams.update(source=source, eval_source=eval_source)
        self.sources = parse_sources(source, self.judgements)
        self.eval_sources = parse_sources(eval_source, self.judgements) if eval_source is not None else ()
        self.eval_rows = eval_rows
        self.rows = rows
        self.columns = columns or {}
        self.as_chat = as_chat
        self.rendered = rendered
        self.last_turn_only = last_turn_only
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
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.streaming = streaming
        self.stream_steps = steps_per_epoch or 0
        self.train_prefix = train_prefix
        self._check_arguments()

    def _check_arguments(self) -> None:
        if self.eval_rows and self.eval_sources:
            raise SettingError(
                "conflicting-settings",
                "eval_source and eval_rows are both set, one perhaps by a recipe: set eval_source null, or eval_rows 0",
            )
        if self.train_prefix is not None and not self.eval_sources:
            raise SettingError(
                "missing-setting",
                "train_prefix applies only to training prompts: give the prompts without it as data.eval_source",
            )
        free = ("rows", "micro_batch_size", "max_tokens", "max_prompt_length")
        least = {"eval_rows": 0, "batch_size": 1, "eval_batch_size": 1, "max_length": 2, **dict.fromkeys(free, 1)}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                rest = ", or null for no limit" if name in free else ""
                raise SettingError("setting-out-of-range", f"{name} is {value}: it must be at least {bound}{rest}")
        if not 0 <= self.num_workers <= MOST_WORKERS:
            raise SettingError(
                "setting-out-of-range",
                f"num_workers is {self.num_workers}: it must be between 0 and {MOST_WORKERS}, processes",
            )
        if self.completes and (self.max_prompt_length or 0) >= (self.max_length or np.inf):
            raise SettingError(
                "no-room-for-completion",
                f"max_prompt_length {self.max_prompt_length} leaves no room for a completion within "
                f"max_length {self.max_length}; choose a smaller max_prompt_length",
            )
        if self.streaming:
            self._check_streaming()
        elif self.stream_steps:
            raise SettingError(
                "needs-streaming",
                f"steps_per_epoch is {self.stream_steps} without streaming, where an epoch is every row once; set "
                "streaming to true, or leave steps_per_epoch out",
            )

    def _check_streaming(self) -> None:
        if self.stream_steps < 1:
            raise SettingError(
                "stream-without-end",
                "streaming needs steps_per_epoch, because the length of a stream is unknown; set it to at least 1",
            )
        stored = any(is_store(source.path) for source in self.sources)
        sliced = any("[" in source.split for source in self.sources)
        bounded = self.rows is not None or any(source.rows is not None for source in self.sources)
        for refused, sentence in (
            (self.eval_rows, f"eval_rows is {self.eval_rows}, but a stream cannot hold out rows; name an eval_source"),
            (stored, "a feedback store cannot be streamed; set streaming to false"),
            (sliced, "a slice of a split cannot be streamed; leave the slice out"),
            (bounded, "rows cannot be set with streaming; bound a stream by steps_per_epoch and max_epochs"),
        ):
            if refused:
                raise SettingError("not-with-streaming", sentence)

    @property
    def limits(self) -> MicroBatchLimits:
        """Limits of a micro-batch."""
        return MicroBatchLimits(self.micro_batch_size, self.max_tokens)

    @abstractmethod
    def encoder(self) -> Encoder:
        """Return the encoder of the rows."""

    def encoder_of(self, read: Reader, forms: tuple[Form, ...], **settings: Any) -> Encoder:
        """Return an encoder with this DataModule's settings."""
        return Encoder(
            read, forms, self.columns, self.max_length, self.max_prompt_length, self.as_chat,
            rendered=self.rendered, last_turn_only=self.last_turn_only, **settings,
        )  # fmt: skip

    def _encoder(self, prefix: str | None = None) -> Encoder:
        return replace(self.encoder(), slots=self.data_columns, prefix=prefix)

    @abstractmethod
    def collator(self) -> Collate:
        """Return the function that collates rows of a store into a batch."""

    def prepare_data(self) -> None:
        """Encode and cache the rows. Runs in one process per node, and sets no attributes."""
        hashed = tokenizer_fingerprint(self.tokenizer)
        for part in self.parts().values():
            part.store(self.tokenizer, hashed, self.cache_dir)

    def setup(self, stage: str) -> None:
        """Memory-map the encoded rows, and print the counts of the data."""
        self._agree_on_snapshots()
        parts, hashed = self.parts(), tokenizer_fingerprint(self.tokenizer)
        self.stores = {name: part.store(self.tokenizer, hashed, self.cache_dir) for name, part in parts.items()}
        self.store = self.stores.get("train") or RowStore.build([], Report())
        self.eval_store = self.stores.get("eval", self.store)
        self.train_rows = np.arange(len(self.store))
        self.held_out = np.arange(len(self.eval_store) if "eval" in parts else 0)
        if self.eval_rows:
            self.held_out = held_out_rows(self.store.arrays["group"], self.eval_rows, self.seed)
            self.train_rows = np.setdiff1d(self.train_rows, self.held_out)
        self.fingerprint = self._fingerprint(hashed)
        if self.streaming:
            encoder = self._encoder(self.train_prefix)
            self.stream = RowStream(self.tokenizer, encoder, self.sources, self.seed, self.shuffle)
            self.report = self.stream.report
        else:
            self.report = next(iter(self.stores.values())).report
        if stage == "fit":
            self.steps_per_epoch = len(self.train_dataloader())
            self._announce(parts)

    def _agree_on_snapshots(self) -> None:
        """Use rank zero's row numbers of feedback stores: labels may arrive between the starts of two ranks."""

        def agreed(sources: tuple[Source, ...]) -> tuple[Source, ...]:
            paths = [source.path for source in sources]
            if self.trainer is not None and self.trainer.world_size > 1 and any(map(is_store, paths)):
                paths = self.trainer.strategy.broadcast(paths)
            return tuple(replace(source, path=path) for source, path in zip(sources, paths, strict=True))

        self.sources, self.eval_sources = agreed(self.sources), agreed(self.eval_sources)
        self.snapshots = snapshots_of([*self.sources, *self.eval_sources])

    def _announce(self, parts: dict[str, Part]) -> None:
        if self.tokenizer.chat_template and facts_of(self.tokenizer).dated:
            date = template_args_of(self.tokenizer).get("now", PINNED_DATE)
            rank_zero_info(f"The chat template writes a date, which is {date}; template_args.now sets another.")
        if self.streaming:
            self.stream.peek()
            rank_zero_info(f"{', '.join(map(str, self.sources))}: streamed; rows are counted as they are read.")
        for name, part in parts.items():
            rank_zero_info(self.stores[name].report.describe(str(part)))
        if hint := self._chat_hint():
            rank_zero_info(hint)
        if self.eval_rows:
            rank_zero_info(f"{len(self.held_out):,} of the rows kept are held out for evaluation.")

    def _chat_hint(self) -> str | None:
        """Suggest ``as_chat`` if the tokenizer has a chat template but the prompts are plain text."""
        plain = len(self.store) and isinstance(self.store.record(0)["prompt"], str)
        if not plain or self.rendered or self.as_chat or not self.tokenizer.chat_template:
            return None
        return (
            "The prompts are plain text, and no chat template is applied although the tokenizer has one: "
            "--data.as_chat true puts each into a user turn, as an instruction-tuned model expects."
        )

    def _fingerprint(self, tokenizer: str) -> str:
        encoder = self._encoder(self.train_prefix)
        # An environment, like a scorer, may be fixed during a run; it does not determine the order of rows.
        encoder = replace(encoder, read=getattr(encoder.read, "rows_of", encoder.read))
        weights = [source.weight for source in self.sources]
        order = [self.batch_size, self.shuffle, self.drop_last, self.seed, self.eval_rows, self.stream_steps, weights]
        content = source_stamp if self.streaming else source_fingerprint
        return hash_of(Part(self.sources, self.rows, encoder).fingerprint(tokenizer, content), order)

    def parts(self) -> dict[str, Part]:
        """Return the parts to encode before training, by name: ``train``, ``eval``, and those that a subclass adds."""
        self.batch_type  # noqa: B018 - refuse a DataModule of the wrong kind before reading gigabytes
        fitting = self.trainer is None or self.trainer.state.fn in (None, TrainerFn.FITTING)
        parts = {}
        if not self.streaming and (fitting or not self.eval_sources):
            parts["train"] = Part(self.sources, self.rows, self._encoder(self.train_prefix))
        if self.eval_sources:
            parts["eval"] = Part(self.eval_sources, None, self._encoder())
        return parts

    # ---- loaders ----------------------------------------------------------------------------------------------------

    def epoch_rows(self, epoch: int) -> np.ndarray:
        """Return the rows of the store for an epoch, each repeated by the weight of its source."""
        weights = [source.weight for source in self.sources]
        sources = self.store.arrays["source"][self.train_rows]
        return weighted_rows(self.train_rows, sources, weights, self.seed, epoch)

    def _plan(self, store: RowStore, rows: np.ndarray, epoch: int = 0, **changes: Any) -> BatchPlan:
        settings: dict[str, Any] = {"batch_size": self.batch_size, "shuffle": self.shuffle, "drop_last": self.drop_last}
        packed = self.needs.packed
        lengths = store.shared_lengths if packed else store.lengths
        return BatchPlan(
            lengths[rows], store.tokens[rows], limits=self.limits, ranks=self.ranks[1], seed=self.seed, epoch=epoch,
            packed=packed, **{**settings, **changes},
        )  # fmt: skip

    def train_dataloader(self) -> StepLoader:
        """Return the loader of the training steps; each epoch has its own order.

        Raises:
            StateError: ``not-set-up``.
        """
        if "store" not in vars(self):
            raise StateError(
                "not-set-up",
                f"{type(self).__name__} has read no rows yet: give it to trainer.fit(module, datamodule), or call "
                "prepare_data() and setup('fit') first; an overridden setup must call super().setup(stage)",
            )
        if self.streaming:
            return StreamLoader(self.stream, self.batch_size, self.streamed_step, self.stream_steps, self.fingerprint)
        length = len(self._plan(self.store, self.epoch_rows(0), shuffle=False))
        steps = lambda epoch: self._train_steps(self.planned_epoch(epoch))
        return StepLoader(steps, length, self.fingerprint, self.num_workers)

    def planned_epoch(self, epoch: int) -> int:
        """Return the epoch whose steps to use: the given one, or always the first with ``overfit_batches``."""
        overfits = self.trainer is not None and getattr(self.trainer, "overfit_batches", False)
        return 0 if overfits else epoch

    def _train_steps(self, epoch: int) -> EpochSteps:
        rows = self.epoch_rows(epoch)
        return PlannedSteps(self._plan(self.store, rows, epoch), self.store, rows, self.ranks[0], self.collator())

    def streamed_step(self, rows: list[EncodedRow], index: int) -> Step[Any]:
        """Build this rank's share of the run's step ``index`` from its rows over all ranks, for a stream."""
        store = RowStore.build(rows, Report())
        places = np.arange(len(store))
        plan = self._plan(store, places, shuffle=False, drop_last=False)
        return PlannedSteps(plan, store, places, self.ranks[0], self.collator())[0]._replace(row_ids=())

    def _in_order(self, store: RowStore, rows: np.ndarray, collate: Collate) -> StepLoader:
        plan = self._plan(store, rows, batch_size=self.eval_batch_size, shuffle=False, drop_last=False)
        steps = PlannedSteps(plan, store, rows, self.ranks[0], collate)
        return StepLoader(lambda _: steps, len(plan), self.fingerprint)

    def _prompts_in_order(self, store: RowStore, rows: np.ndarray) -> StepLoader:
        cuts = [rows[start : start + self.eval_batch_size] for start in range(0, len(rows), self.eval_batch_size)]
        steps = PromptSteps(store, cuts, 0, *self.ranks, limits=self.limits)
        return StepLoader(lambda _: steps, len(cuts), self.fingerprint)

    def val_dataloader(self) -> StepLoader | list[StepLoader]:
        """Return the loader of the held-out rows, in order; an empty list if there are none."""
        if not len(self.held_out):
            if self.trainer is not None and self.trainer.state.fn in (TrainerFn.VALIDATING, TrainerFn.TESTING):
                raise SettingError(
                    "no-held-out-rows",
                    "there are no held-out rows to evaluate: give them with data.eval_source, or hold out some of the "
                    "source with data.eval_rows",
                )
            warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")  # as intended
            return []
        return self.evaluation_loader()

    def evaluation_loader(self) -> StepLoader:
        """Return the loader of the held-out rows, in order."""
        return self._in_order(self.eval_store, self.held_out, self.collator())

    def test_dataloader(self) -> StepLoader | list[StepLoader]:
        """Return the same loader as for validation."""
        return self.val_dataloader()

    def predict_dataloader(self) -> StepLoader:
        """Return a loader of the held-out rows (else the training rows): prompts for a policy, else completions."""
        store, rows = self._shown()
        if self.needs.predicts_prompts or RankedBatch not in self.batch_types:
            if self.completes:  # answer a prompt with several completions only once
                _, firsts = np.unique(store.arrays["group"][rows], return_index=True)
                rows = rows[np.sort(firsts)]
            return self._prompts_in_order(store, rows)
        return self._in_order(store, rows, collation.groups)

    def _shown(self) -> tuple[RowStore, np.ndarray]:
        """Return the held-out rows, else the training rows."""
        if len(self.held_out):
            return self.eval_store, self.held_out
        if not len(self.train_rows):
            raise SettingError("not-with-streaming", "a stream has no rows to predict on; name an eval_source")
        return self.store, self.train_rows

    def examples(self, count: int) -> list[tuple[Prompt, dict[str, Any]]]:
        """Return some prompts with their further columns, from the held-out rows, else from the training rows."""
        if self.streaming and not len(self.held_out):
            rows: Iterator[tuple[Prompt, dict[str, Any]]] = (
                (row.text, dict(row.columns)) for row in self.stream.peek()
            )
        else:
            store, places = self._shown()
            records = (store.record(row) for row in places.tolist())
            rows = ((record["prompt"], record["columns"]) for record in records)
        found: dict[str, tuple[Prompt, dict[str, Any]]] = {}
        for prompt, columns in rows:
            if len(found) == count:
                break
            found.setdefault(json.dumps(prompt), (prompt, columns))
        return list(found.values())
