"""Private API of other packages that this one cannot do without, each with the version it was read from.

Nothing else in the package reaches for a private name of another package. tests/test_compat.py holds one test for each
function here: it says in one sentence what has changed.
"""

from __future__ import annotations

from typing import Any

# -- Lightning 2.6.6 --------------------------------------------------------------------------------------------------


def attached_trainer(module: Any) -> Any | None:
    """Return a module's trainer, None where it has none; ``module.trainer`` raises there."""
    return module._trainer


def restore_loader_position(trainer: Any) -> None:
    """Put the data where the checkpoint had it, if the trainer has thrown that away.

    It does so where its loaders were made before the checkpoint is loaded, as ``trainer.estimated_stepping_batches``
    makes them: what the checkpoint says is then never given to them.
    """
    loop = trainer.fit_loop
    if loop._combined_loader_states_to_load and loop._data_fetcher is not None:
        loop._load_combined_loader_states()
        iter(loop._data_fetcher)


def set_logged_step(trainer: Any, step: int) -> None:
    """Have whatever logs from now on log at x = step; Lightning's own count is of batches."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def checkpoint_period(callback: Any) -> tuple[int, Any]:
    """Return ``every_n_train_steps`` (0 for never) and ``train_time_interval`` of a ModelCheckpoint."""
    return callback._every_n_train_steps, callback._train_time_interval
