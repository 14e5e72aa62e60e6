"""Settings that a DataModule takes from its module and Trainer: tokenizer, batch type, columns, ranks."""

from __future__ import annotations

from typing import ClassVar

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.errors import SettingError, StateError
from rlhf_lightning.types import DataNeeds, TakesData

GIVERS = {
    "DemonstrationBatch": "SFTDataModule",
    "PreferenceBatch": "PreferenceDataModule",
    "RankedBatch": "PreferenceDataModule",
    "ProcessBatch": "ProcessDataModule",
    "UnpairedBatch": "UnpairedDataModule",
    "PromptBatch": "PromptDataModule",
}


class AttachedDataModule(L.LightningDataModule):
    """Base of `AlignmentDataModule`. Without a Trainer, set tokenizer, batch type and columns as attributes."""

    batch_types: ClassVar[tuple[type, ...]]
    """Batch types that this DataModule can produce; the first is used unless the module requires another."""

    _tokenizer: PreTrainedTokenizerBase | None = None
    _batch_type: type | None = None
    _data_columns: tuple[str, ...] = ()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The module's tokenizer, or the tokenizer that was set for use without a Trainer."""
        if self._tokenizer is not None:
            return self._tokenizer
        if self.trainer is None:
            raise StateError(
                "no-tokenizer-set", "the DataModule has neither a tokenizer nor a Trainer; set its attribute tokenizer"
            )
        return self.trainer.lightning_module.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    @property
    def needs(self) -> DataNeeds:
        """The module's requirements; defaults without a Trainer."""
        module = None if self.trainer is None else self.trainer.lightning_module
        return module.data_needs if isinstance(module, TakesData) else DataNeeds()

    @property
    def batch_type(self) -> type:
        """The batch type of this DataModule's training steps, as the module requires.

        Raises:
            SettingError: the module requires a batch type that this DataModule cannot produce.
        """
        if self._batch_type is not None or self.trainer is None:
            return self._batch_type or self.batch_types[0]
        wanted = self.needs.batch_type or self.batch_types[0]
        if wanted in self.batch_types:
            return wanted
        if self.trainer.state.fn == TrainerFn.PREDICTING:  # any prompts can be answered, and any completions scored
            return self.batch_types[0]
        given = " or ".join(kind.__name__ for kind in self.batch_types)
        raise SettingError(
            "wrong-datamodule",
            f"{type(self.trainer.lightning_module).__name__} takes a {wanted.__name__}, but {type(self).__name__} "
            f"gives a {given}; use {GIVERS.get(wanted.__name__, 'the DataModule that gives it')}",
        )

    @batch_type.setter
    def batch_type(self, kind: type) -> None:
        if kind not in self.batch_types:
            given = " or ".join(one.__name__ for one in self.batch_types)
            raise SettingError("wrong-datamodule", f"{type(self).__name__} gives a {given}, not a {kind.__name__}")
        self._batch_type = kind

    @property
    def data_columns(self) -> tuple[str, ...]:
        """Numeric columns that the module asks for, or that were set for use without a Trainer.

        They are passed on in ``extras`` of each batch. Prediction needs none.
        """
        if self._data_columns or self.trainer is None or self.trainer.state.fn == TrainerFn.PREDICTING:
            return self._data_columns
        return self.needs.columns

    @data_columns.setter
    def data_columns(self, names: tuple[str, ...]) -> None:
        self._data_columns = tuple(names)

    @property
    def ranks(self) -> tuple[int, int]:
        """This data-parallel rank, and the number of data-parallel ranks."""
        if self.trainer is None:
            return 0, 1
        given = getattr(self.trainer.strategy, "distributed_sampler_kwargs", None)
        if given:  # differs from the world size if a strategy also splits the model
            return given["rank"], given["num_replicas"]
        return self.trainer.global_rank, self.trainer.world_size
