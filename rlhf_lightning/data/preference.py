"""Preference pairs and ranked lists, for reward models and for direct preference objectives."""

from __future__ import annotations

from typing import Any

from rlhf_lightning.data import collation, formats
from rlhf_lightning.data.datamodule import AlignmentDataModule
from rlhf_lightning.data.loader import Collate
from rlhf_lightning.data.tokenizing import Encoder
from rlhf_lightning.types import PreferenceBatch, RankedBatch


class PreferenceDataModule(AlignmentDataModule):
    """Preferences: ``prompt`` + ``chosen`` + ``rejected``, ``chosen`` + ``rejected`` with the prompt in both (turns, or
    a transcript of Human and Assistant), or ``prompt`` + ``completions`` best first (+ ``ranks``, equal ones are ties).

    Two completions with a verdict are read too: ``prompt`` + ``completion_1`` + ``completion_2`` + ``label`` (1 or 2, 0
    or "tie" for neither), or ``labels``, the votes of several. The better one is chosen, and the mean vote is its
    ``preference``: 0.5 for a tie.

    ``preference`` is the probability that chosen is the better one, ``margin`` its rated strength. A module that takes
    pairs gets every pair of different rank of a ranked list; one that takes ranked groups gets a pair as a group of
    two.

    Args:
        source: where the preferences come from; see `AlignmentDataModule` for this and all other arguments.
    """

    batch_types = (PreferenceBatch, RankedBatch)

    def __init__(self, source: str | list[str | dict[str, Any]], **kwargs: Any) -> None:
        super().__init__(source, **kwargs)

    def encoder(self) -> Encoder:
        """Reads preferences."""
        read = formats.preference_with_ties if self.needs.ties else formats.preference
        return Encoder(
            read, formats.PREFERENCE_FORMS, self.columns, self.max_length, self.max_prompt_length,
            self.as_chat, pairwise=self.batch_type is PreferenceBatch, rendered=self.rendered,
        )  # fmt: skip

    def collator(self) -> Collate:
        """Pairs, or groups of ranked completions."""
        return collation.pairs if self.batch_type is PreferenceBatch else collation.groups
