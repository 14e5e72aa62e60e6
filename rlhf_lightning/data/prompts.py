"""Prompts for on-policy training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from rlhf_lightning.data import collation, formats
from rlhf_lightning.data.batching import endless_rows
from rlhf_lightning.data.canonical import CanonicalRow, Report, Row
from rlhf_lightning.data.datamodule import AlignmentDataModule
from rlhf_lightning.data.loader import Collate, EpochSteps, PromptSteps, StepLoader, conversing_step
from rlhf_lightning.data.row_store import Part, RowStore
from rlhf_lightning.data.sources import parse_sources
from rlhf_lightning.data.streaming import StreamLoader
from rlhf_lightning.data.tokenizing import EncodedRow, Encoder
from rlhf_lightning.environments import conversing, fingerprint_of
from rlhf_lightning.errors import ContractError, SettingError
from rlhf_lightning.types import DemonstrationBatch, Environment, PromptBatch, Step


class PromptDataModule(AlignmentDataModule):
    """Prompts: ``prompt``, or the part of demonstrations and preferences before the completion. Further columns
    (``answer`` ...) go to the scorer.

    One step is one rollout of ``batch_size`` episodes, that is of ``batch_size / samples_per_prompt`` prompts. Prompts
    come from consecutive shuffled passes over the data, so that every rollout is full. Episode numbers count through
    the whole run and do not depend on the number of ranks. A subclass may override ``choose_rows`` to decide which
    prompts a rollout answers.

    Args:
        source: source of the prompts; see `AlignmentDataModule` for this and all other arguments. ``batch_size``
            counts episodes; prompts have at most ``max_prompt_length`` (else ``max_length``) tokens.
        rollouts: rollouts of an epoch; None takes one pass over the prompts.
        samples_per_prompt: completions to sample per prompt (the group size).
        candidate_rounds: sets of prompts for each rollout; a module that drops groups (DAPO's dynamic sampling) takes
            further sets until its rollout is full, other modules use the first set.
        pretraining_source: demonstrations or plain ``text`` to mix into the updates, if the module has a coefficient
            for it (PPO-ptx); in the same forms as ``source``.
        pretraining_batch_size: pretraining rows per rollout, over all ranks; None takes ``batch_size``.
        environment: replies to the policy's turns, by class_path and init_args; null makes one completion the whole
            episode. See `types.Environment`.
        max_turns: maximum turns of the policy in an episode; the last one gets a reward but no reply.
        max_episode_tokens: maximum tokens of an episode after its first prompt, including replies; a reply that leaves
            no room for another turn ends the episode. null for no limit.
    """

    batch_types = (PromptBatch,)
    judgements = "prompt"
    completes = False

    def __init__(
        self,
        source: str | list[str | dict[str, Any]],
        rollouts: int | None = None,
        samples_per_prompt: int = 1,
        candidate_rounds: int = 1,
        pretraining_source: str | list[str | dict[str, Any]] | None = None,
        pretraining_batch_size: int | None = None,
        environment: dict[str, Any] | str | None = None,
        max_turns: int = 8,
        max_episode_tokens: int | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("streaming") and rollouts is not None:
            kwargs.setdefault("steps_per_epoch", rollouts)
        super().__init__(source, **kwargs)
        if rollouts is not None and rollouts < 1:
            raise SettingError(
                "setting-out-of-range", f"rollouts is {rollouts}: it must be at least 1, or null for one pass"
            )
        if samples_per_prompt < 1 or self.batch_size % samples_per_prompt:
            raise SettingError(
                "uneven-split",
                f"batch_size is {self.batch_size} and samples_per_prompt {samples_per_prompt}: batch_size counts "
                "episodes and must be a multiple of samples_per_prompt",
            )
        if pretraining_batch_size is not None and pretraining_batch_size < 1:
            raise SettingError(
                "setting-out-of-range", f"pretraining_batch_size is {pretraining_batch_size}: it must be at least 1"
            )
        if candidate_rounds < 1 or (candidate_rounds > 1 and self.streaming):
            found = f"{candidate_rounds} with streaming" if self.streaming else str(candidate_rounds)
            raise SettingError(
                "setting-out-of-range", f"candidate_rounds is {found}: it must be at least 1, and 1 with streaming"
            )
        self.multi_turn = None if environment is None else conversing(environment, max_turns, max_episode_tokens)
        self.candidate_rounds = candidate_rounds
        self.rollouts = rollouts
        self.samples_per_prompt = samples_per_prompt
        self.pretraining_sources = parse_sources(pretraining_source) if pretraining_source is not None else ()
        self.pretraining_batch_size = pretraining_batch_size or self.batch_size

    @property
    def prompts_per_rollout(self) -> int:
        """Prompts of a rollout over all ranks."""
        return self.batch_size // self.samples_per_prompt

    def encoder(self) -> Encoder:
        read = formats.prompt if self.multi_turn is None else FirstPrompt(self.multi_turn.environment)
        made = self.encoder_of(read, formats.PROMPT_FORMS, hands_on=True)
        return replace(made, max_length=None, max_prompt_length=self.max_prompt_length or self.max_length)

    def collator(self) -> Collate:
        return _numbered

    def parts(self) -> dict[str, Part]:
        """Return the prompts, and the pretraining text as ``pretraining``."""
        parts = super().parts()
        if self.pretraining_sources:
            made = self.encoder_of(formats.demonstration, formats.DEMONSTRATION_FORMS, turnwise=True)
            encoder = replace(made, columns={}, max_prompt_length=None)
            parts["pretraining"] = Part(self.pretraining_sources, None, encoder)
        return parts

    def choose_rows(self, rollout: int, count: int) -> np.ndarray | None:
        """Return the rows whose prompts a rollout answers; None takes them in order. Override this for a curriculum.

        Called when the rollout begins, after ``on_rollout_end`` of the previous rollout. The choice must be the same on
        all ranks. A choice that depends only on ``seed``, ``rollout`` and the saved ``state_dict`` resumes bit for bit.

        Args:
            rollout: number of the rollout in the run.
            count: number of rows to choose, over all ranks; with ``candidate_rounds`` for all rounds.

        Returns:
            Row numbers among ``train_rows``, int64, shape (count,); a row may be chosen more than once.

        Raises:
            ContractError: an override returned another number of rows, or rows outside ``train_rows``.
        """
        return None

    def _chosen(self, rollout: int, count: int) -> np.ndarray | None:
        chosen = self.choose_rows(rollout, count)
        if chosen is None:
            return None
        rows = np.asarray(chosen)
        if rows.shape != (count,) or rows.dtype.kind not in "iu" or not np.isin(rows, self.train_rows).all():
            wanted = f"{count} row numbers of train_rows"
            raise ContractError("chosen-rows", f"{type(self).__name__}.choose_rows must return {wanted}, not {chosen}")
        return rows

    def train_dataloader(self) -> StepLoader:
        if self._chooses and (self.streaming or self.num_workers):
            raise SettingError(
                "rows-chosen-ahead",
                f"{type(self).__name__} chooses its rows when a rollout begins: set streaming to false and "
                "num_workers to 0",
            )
        ranks = self.ranks[1]
        for name, count in (("prompts of a rollout", self.prompts_per_rollout), ("pretraining rows", self._mixed)):
            if count % ranks:
                raise SettingError(
                    "uneven-split",
                    f"{ranks} ranks cannot share the {count} {name} evenly (batch_size {self.batch_size}, "
                    f"samples_per_prompt {self.samples_per_prompt}); choose a multiple of {ranks}",
                )
        size = self.prompts_per_rollout
        loader: StepLoader
        if self.streaming:
            loader = StreamLoader(self.stream, size, self.streamed_step, self.stream_steps, self.fingerprint)
        else:
            length = self.rollouts or -(-len(self.epoch_rows(0)) // size)
            steps = lambda epoch: self._rollouts(self.planned_epoch(epoch), length)
            loader = StepLoader(steps, length, self.fingerprint, self.num_workers)
        loader.multi_turn = self.multi_turn
        return loader

    def step_ahead(self, epoch: int, index: int) -> Step[PromptBatch] | None:
        """Return this rank's share of a later rollout's prompts; None after the last epoch.

        Args:
            epoch: the current epoch.
            index: number of the rollout, counted from the start of that epoch.

        Raises:
            SettingError: the prompts of later rollouts are not known yet.
        """
        if self.streaming or self._chooses or self.candidate_rounds > 1:
            raise SettingError(
                "lag-without-prompts",
                "model.lag needs the prompts of later rollouts, which are not known with streaming, candidate_rounds "
                "above 1, or a choose_rows of your own; leave them out, or set model.lag to 0",
            )
        length = self.steps_per_epoch
        epoch, index = epoch + index // length, index % length
        epochs = None if self.trainer is None else self.trainer.max_epochs
        if epochs is not None and 0 <= epochs <= epoch:
            return None
        step = self._rollouts(self.planned_epoch(epoch), length)[index]
        return step if self.multi_turn is None else conversing_step(step, self.multi_turn)

    @property
    def _chooses(self) -> bool:
        return type(self).choose_rows is not PromptDataModule.choose_rows

    @property
    def _mixed(self) -> int:
        return self.pretraining_batch_size if self.pretraining_sources else 0

    def _rollouts(self, epoch: int, length: int) -> EpochSteps:
        size, first = self.prompts_per_rollout * self.candidate_rounds, epoch * length
        rows = endless_rows(self.epoch_rows, first * size, (first + length) * size, self.seed, self.shuffle)
        steps = [rows[start : start + size] for start in range(0, len(rows), size)]
        episode = first * self.batch_size * self.candidate_rounds
        choose = (lambda index, count: self._chosen(first + index, count)) if self._chooses else None
        prompts = PromptSteps(
            self.store, steps, episode, *self.ranks, self.samples_per_prompt, self.candidate_rounds, self.limits, choose
        )
        return self._with_pretraining(prompts, first)

    def streamed_step(self, rows: list[EncodedRow], index: int) -> Step[PromptBatch]:
        """Build one rollout's prompts from rows of a stream, with their share of the pretraining text."""
        store = RowStore.build(rows, Report())
        first = index * self.batch_size
        whole = [np.arange(len(store))]
        prompts = PromptSteps(store, whole, first, *self.ranks, self.samples_per_prompt, limits=self.limits)
        step = self._with_pretraining(prompts, index)[0]
        batches = tuple(batch._replace(row_ids=()) for batch in step.micro_batches)
        return step._replace(micro_batches=batches, row_ids=())

    def _with_pretraining(self, prompts: PromptSteps, first: int) -> EpochSteps:
        if not self.pretraining_sources:
            return prompts
        return MixedSteps(prompts, self.stores["pretraining"], self._mixed, first, self.seed, *self.ranks)

    def evaluation_loader(self) -> StepLoader:
        loader = self._prompts_in_order(self.eval_store, self.held_out)
        loader.multi_turn = self.multi_turn
        return loader

    def predict_dataloader(self) -> StepLoader:
        loader = super().predict_dataloader()
        loader.multi_turn = self.multi_turn
        return loader


class FirstPrompt:
    """Reads prompts like `formats.prompt`, then lets an environment create the first prompt of each row's episode.

    ``rows_of`` is a reader that gives the same rows in the same order.
    """

    rows_of = staticmethod(formats.prompt)

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self.__name__ = f"opened by {fingerprint_of(environment)}"  # part of the key of the row cache

    def __call__(self, row: Row, as_chat: bool = False) -> CanonicalRow:
        """Read a row.

        Raises:
            ContractError: ``not-a-prompt``: the environment returned something other than text or messages.
        """
        canonical = formats.prompt(row, as_chat)
        made = self.environment.reset({**canonical.columns, "prompt": canonical.prompt})
        if not _is_prompt(made):
            raise ContractError(
                "not-a-prompt",
                f"{type(self.environment).__name__}.reset returned {made!r:.200}; return text, or messages",
            )
        return replace(canonical, prompt=made)


def _is_prompt(made: Any) -> bool:
    turns = [{"role": "user", "content": made}] if isinstance(made, str) else made
    if not made or not isinstance(turns, list | tuple) or not all(isinstance(turn, dict) for turn in turns):
        return False
    texts = [turn.get(name) for turn in turns for name in ("role", "content")]
    try:
        return all(isinstance(text, str) and text.encode() is not None for text in texts)
    except UnicodeEncodeError:
        return False


class MixedSteps:
    """Steps of prompts combined with demonstrations, which come from consecutive shuffled passes.

    Args:
        prompts: the steps of prompts.
        store: the demonstrations.
        size: demonstrations per step over all ranks.
        first: number of the first step in the run.
        seed: seed of the order of demonstrations.
        rank: this rank.
        ranks: number of ranks.
    """

    def __init__(
        self, prompts: PromptSteps, store: RowStore, size: int, first: int, seed: int, rank: int, ranks: int
    ) -> None:
        self.prompts, self.store, self.size, self.first, self.seed = prompts, store, size, first, seed
        self.rank, self.ranks = rank, ranks

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Step[PromptBatch]:
        step = self.prompts[index]
        start = (self.first + index) * self.size
        everything = np.arange(len(self.store))
        rows = endless_rows(lambda _: everything, start, start + self.size, self.seed + 1)[self.rank :: self.ranks]
        mixed: DemonstrationBatch = collation.demonstrations(self.store, rows.tolist())
        return step._replace(micro_batches=tuple(b._replace(pretraining=mixed) for b in step.micro_batches))


def _numbered(store: RowStore, rows: Any) -> PromptBatch:
    return collation.prompts(store, rows, torch.arange(len(rows)))
