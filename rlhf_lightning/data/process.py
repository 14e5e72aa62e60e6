"""Completions whose steps were judged one by one, for process reward models."""

from __future__ import annotations

from typing import Any

from rlhf_lightning.data import collation, formats
from rlhf_lightning.data.datamodule import AlignmentDataModule
from rlhf_lightning.data.loader import Collate, StepLoader
from rlhf_lightning.data.tokenizing import Encoder
from rlhf_lightning.types import ProcessBatch


class ProcessDataModule(AlignmentDataModule):
    """Stepwise judgements: ``prompt`` + ``completions`` (the steps of one completion, in order) + ``labels`` (for each
    step true or false, the probability that it is right, or null where nobody judged it).

    Each step is encoded by itself, followed by the module's ``step_separator``, the last one by the end token instead,
    and judged at its last token. The tokens of a step that the counts speak of (``progress/tokens``, the mean of the
    loss) are these: the judged steps. Truncation takes the steps that it cuts out of the loss.

    Args:
        source: where the rows come from; see `AlignmentDataModule` for this and all other arguments.
    """

    batch_types = (ProcessBatch,)

    def __init__(self, source: str | list[str | dict[str, Any]], **kwargs: Any) -> None:
        super().__init__(source, **kwargs)

    def encoder(self) -> Encoder:
        """Reads judged steps."""
        return Encoder(
            formats.process, formats.PROCESS_FORMS, self.columns, self.max_length, self.max_prompt_length,
            self.as_chat, separator=self.needs.step_separator, rendered=self.rendered,
        )  # fmt: skip

    def collator(self) -> Collate:
        """One completion for each prompt, with its steps' labels."""
        return collation.judged_steps

    def predict_dataloader(self) -> StepLoader:
        """Held-out rows, else the training rows, with their completions."""
        return self._in_order(*self._shown(), self.collator())
