"""Demonstrations for supervised fine-tuning."""

from __future__ import annotations

from typing import Any

from rlhf_lightning.data import collation, formats
from rlhf_lightning.data.datamodule import AlignmentDataModule
from rlhf_lightning.data.loader import Collate
from rlhf_lightning.data.tokenizing import Encoder
from rlhf_lightning.types import DemonstrationBatch


class SFTDataModule(AlignmentDataModule):
    """Demonstrations: ``messages``, ``prompt`` + ``completion``, ``input`` + ``output``, ``instruction`` (+ ``input``)
    + ``output``, or ``text`` alone (every token after the first is learned).

    In a conversation of several turns every turn of the assistant is learned, with its end token, and no other.

    Args:
        source: where the demonstrations come from; see `AlignmentDataModule` for this and all other arguments.
    """

    batch_types = (DemonstrationBatch,)
    judgements = "demonstration"

    def __init__(self, source: str | list[str | dict[str, Any]], **kwargs: Any) -> None:
        super().__init__(source, **kwargs)

    def encoder(self) -> Encoder:
        """Reads demonstrations."""
        return Encoder(
            formats.demonstration, formats.DEMONSTRATION_FORMS, self.columns, self.max_length, self.max_prompt_length,
            self.as_chat, rendered=self.rendered,
        )  # fmt: skip

    def collator(self) -> Collate:
        """One completion for each prompt."""
        return collation.demonstrations
