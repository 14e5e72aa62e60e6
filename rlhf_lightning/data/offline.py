"""DataModules for demonstrations, preferences, judged completions and judged steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_lightning.data import collation, formats
from rlhf_lightning.data.batching import shuffled
from rlhf_lightning.data.datamodule import AlignmentDataModule
from rlhf_lightning.data.loader import Collate, StepLoader
from rlhf_lightning.data.row_store import RowStore
from rlhf_lightning.data.tokenizing import Encoder
from rlhf_lightning.errors import DataError
from rlhf_lightning.types import DemonstrationBatch, PreferenceBatch, ProcessBatch, RankedBatch, UnpairedBatch


class SFTDataModule(AlignmentDataModule):
    """Demonstrations: ``messages`` or ``conversations``, ``prompt`` + ``completion``, ``input`` + ``output``,
    ``instruction`` (+ ``input``) + ``output``, or ``text`` alone (every token after the first is trained on).

    In a conversation every assistant turn is trained on, with its end token. If the chat template rewrites earlier
    turns, each trained turn becomes a row with its own prompt.

    Args:
        source: source of the demonstrations; see `AlignmentDataModule` for this and all other arguments.
    """

    batch_types = (DemonstrationBatch,)
    judgements = "demonstration"

    def __init__(self, source: str | list[str | dict[str, Any]], **kwargs: Any) -> None:
        super().__init__(source, **kwargs)

    def encoder(self) -> Encoder:
        return self.encoder_of(formats.demonstration, formats.DEMONSTRATION_FORMS, turnwise=True)

    def collator(self) -> Collate:
        return collation.demonstrations


class PreferenceDataModule(AlignmentDataModule):
    """Preferences: ``prompt`` + ``chosen`` + ``rejected``, ``chosen`` + ``rejected`` with the prompt in both (turns, or
    a transcript of Human and Assistant), or ``prompt`` + ``completions`` best first (+ ``ranks``, equal ones are ties).

    Two completions with a verdict are read too: ``prompt`` + ``completion_1`` + ``completion_2`` + ``label`` (1 or 2, 0
    or "tie" for neither), or ``labels``, a list of votes. The better completion becomes chosen, and the mean vote
    becomes ``preference``: 0.5 for a tie.

    ``preference`` is the probability that chosen is better, ``margin`` its rated strength. A module that takes pairs
    gets every pair of a ranked list with different ranks. A module that takes ranked groups gets a pair as a group of
    two.

    Args:
        source: source of the preferences; see `AlignmentDataModule` for this and all other arguments.
    """

    batch_types = (PreferenceBatch, RankedBatch)

    def __init__(self, source: str | list[str | dict[str, Any]], **kwargs: Any) -> None:
        super().__init__(source, **kwargs)

    def encoder(self) -> Encoder:
        read = formats.preference_with_ties if self.needs.ties else formats.preference
        return self.encoder_of(read, formats.PREFERENCE_FORMS, pairwise=self.batch_type is PreferenceBatch)

    def collator(self) -> Collate:
        """Return the function that collates pairs, or groups of ranked completions."""
        return collation.pairs if self.batch_type is PreferenceBatch else collation.groups


class UnpairedDataModule(AlignmentDataModule):
    """Completions judged individually: ``prompt`` + ``completion`` + ``label`` or ``messages`` + ``label``. The label
    is true or 1 for a good completion, false, 0 or -1 for a bad one. A preference (``chosen`` + ``rejected``) becomes
    two rows.

    If the module asks for it (KTO), every prompt also gets a mismatched completion of another row. The assignment
    depends only on the data and the seed, and the completion always belongs to another prompt.

    Args:
        source: source of the rows; see `AlignmentDataModule` for this and all other arguments.
    """

    batch_types = (UnpairedBatch,)
    judgements = "unpaired"

    def __init__(self, source: str | list[str | dict[str, Any]], **kwargs: Any) -> None:
        super().__init__(source, **kwargs)

    def encoder(self) -> Encoder:
        return self.encoder_of(formats.unpaired, formats.UNPAIRED_FORMS, apart=True)

    def setup(self, stage: str) -> None:
        """Memory-map the encoded rows, and assign mismatched completions, separately for held-out rows."""
        super().setup(stage)
        self.partners: dict[int, dict[int, int]] = {}
        if self.needs.mismatched and not self.streaming:
            for store, rows in ((self.store, self.train_rows), (self.eval_store, self.held_out)):
                if len(rows):
                    known = self.partners.setdefault(id(store), {})
                    known.update(mismatched_rows(store.arrays["group"], rows, self.seed))

    def collator(self) -> Collate:
        return self._collate

    def _collate(self, store: RowStore, rows: Sequence[int]) -> UnpairedBatch:
        if not self.needs.mismatched:
            return collation.unpaired(store, rows)
        partners = self.partners.get(id(store))
        if partners is None:  # a step of a stream can only use its own rows
            partners = mismatched_rows(store.arrays["group"], np.arange(len(store)), self.seed)
        return collation.unpaired(store, rows, partners, self.max_length)


def mismatched_rows(groups: np.ndarray, rows: np.ndarray, seed: int) -> dict[int, int]:
    """Return for each row a row of another prompt, which provides the mismatched completion.

    Rows form a shuffled ring. Each row takes the nearest earlier row in the ring that has another prompt. ``groups``
    numbers each stored row's prompt.

    Raises:
        DataError: all rows have the same prompt.
    """
    ring = rows[shuffled(len(rows), seed, 0)]
    prompts = groups[ring]
    if (prompts == prompts[0]).all():
        raise DataError(
            "one-prompt",
            f"all {len(rows)} rows have the same prompt, and mismatched completions (KTO) need "
            "at least two prompts; add rows of other prompts",
        )
    pairs = {}
    for place, row in enumerate(ring.tolist()):
        back = place - 1
        while prompts[back] == prompts[place]:
            back -= 1
        pairs[row] = int(ring[back])
    return pairs


class ProcessDataModule(AlignmentDataModule):
    """Stepwise judgements: ``prompt`` + ``completions`` (the steps of one completion, in order) + ``labels`` (for each
    step true or false, the probability that it is right, or null if it was not judged).

    Each step is encoded separately, followed by the module's ``step_separator`` (the last one by the end token), and
    judged at its last token. Token counts (``progress/tokens``, the mean of the loss) count judged steps. Steps lost by
    truncation do not enter the loss.

    Args:
        source: source of the rows; see `AlignmentDataModule` for this and all other arguments.
    """

    batch_types = (ProcessBatch,)

    def __init__(self, source: str | list[str | dict[str, Any]], **kwargs: Any) -> None:
        super().__init__(source, **kwargs)

    def encoder(self) -> Encoder:
        return self.encoder_of(formats.process, formats.PROCESS_FORMS, separator=self.needs.step_separator)

    def collator(self) -> Collate:
        return collation.judged_steps

    def predict_dataloader(self) -> StepLoader:
        """Return a loader of the held-out rows, else the training rows, with their completions."""
        return self._in_order(*self._shown(), self.collator())
