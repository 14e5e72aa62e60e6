"""The Hugging Face folder that the next stage starts from."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from rlhf_lightning.errors import SettingError
from rlhf_lightning.runs.run import EXPORTS_FOLDER, MODEL_FOLDER, is_rehearsal, run_folder, updates_of


class ModelExport(Callback):
    """Write ``model/`` when training ends, and on the way ``exports/update_<n>/`` where asked for.

    Args:
        enabled: false leaves the weights in the checkpoints alone; `rlhf export` turns those into a folder later.
        every_n_updates: also export once this many further updates are done; for curves over a run.
    """

    def __init__(self, enabled: bool = True, every_n_updates: int | None = None) -> None:
        super().__init__()
        if every_n_updates is not None and every_n_updates < 1:
            raise SettingError(
                "setting-out-of-range", f"export.every_n_updates is {every_n_updates}: give a positive number, or null"
            )
        self.enabled = enabled
        self.every_n_updates = every_n_updates
        self._exported_at = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from where training starts."""
        self._exported_at = updates_of(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Export when a multiple of the period was reached or passed."""
        updates, period = updates_of(pl_module), self.every_n_updates
        if self.enabled and period is not None and updates // period > self._exported_at // period:
            self._exported_at = updates
            self._export(trainer, pl_module, f"{EXPORTS_FOLDER}/update_{updates:06d}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export the final weights."""
        if self.enabled and not is_rehearsal(trainer):
            self._export(trainer, pl_module, MODEL_FOLDER)
            if trainer.is_global_zero:
                print(f"model: {run_folder(trainer).model}")

    def _export(self, trainer: Trainer, module: LightningModule, name: str) -> None:
        """Write one folder; the module's export puts it in place whole."""
        if is_rehearsal(trainer):
            return
        folder = run_folder(trainer)
        if trainer.is_global_zero or module.device_mesh is not None:  # all ranks gather sharded weights
            module.export(folder.path / name)  # type: ignore[operator]
        trainer.strategy.barrier("export")
