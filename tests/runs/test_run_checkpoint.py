"""Test which checkpoints are kept, when they are written, and that a checkpoint name always refers to a
complete file.
"""

import os
import resource
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import refused
from lightning.pytorch import Callback, Trainer
from tiny_run import BASIC, UPDATES, NumbersDataModule, RolloutModule, SlopeModule

from rlhf_lightning.atomic_files import write_text
from rlhf_lightning.commands.train import run
from rlhf_lightning.runs import RunCheckpoint
from rlhf_lightning.runs.checkpoint_files import CheckpointFailedError, last_checkpoint, replace_checkpoint
from rlhf_lightning.runs.run import RunFolder


def fit(
    callback: RunCheckpoint, module: SlopeModule | None = None, epochs: int = 1, callbacks: Sequence[Callback] = ()
) -> list[str]:
    """Train and return the names in the checkpoint folder, except links."""
    module = module or SlopeModule(learning_rate=0.1)
    trainer = Trainer(
        max_epochs=epochs, logger=False, callbacks=[callback, *callbacks], enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, accelerator="cpu",
    )  # fmt: skip
    RunFolder(".").attach(trainer)
    trainer.fit(module, datamodule=NumbersDataModule())
    return sorted(path.name for path in Path("checkpoints").iterdir() if path.name.startswith("update"))


def updates_in(name: str) -> int:
    return torch.load(Path("checkpoints") / name, weights_only=True)["progress"]["updates"]


def test_checkpoints_every_n_updates_and_after_validation():
    names = fit(RunCheckpoint(every_n_updates=3, keep_last=None))
    assert names == ["update_000003.ckpt", "update_000006.ckpt", "update_000008.ckpt"]
    assert [updates_in(name) for name in names] == [3, 6, 8]


def test_checkpoints_are_saved_only_at_the_end_of_a_rollout():
    """With three updates per step, periods end inside rollouts, but checkpoints are saved at the ends of rollouts."""
    names = fit(
        RunCheckpoint(every_n_updates=4, keep_last=None, after_validation=False), RolloutModule(learning_rate=0.1)
    )
    assert [updates_in(name) for name in names] == [6, 9, 12, 18, 21, 24]
    assert all(updates_in(name) % 3 == 0 for name in names)


def test_checkpoints_every_n_rollouts():
    names = fit(RunCheckpoint(every_n_rollouts=3, keep_last=None), RolloutModule(learning_rate=0.1))
    states = [torch.load(Path("checkpoints") / name, weights_only=True)["progress"] for name in names]
    assert [state["rollouts"] for state in states] == [3, 6, 8]
    assert [state["updates"] for state in states] == [9, 18, 24]


def test_no_warning_on_manual_optimization():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(RunCheckpoint(every_n_updates=2))
    assert not [str(w.message) for w in caught if "manual optimization" in str(w.message)]


def test_the_newest_checkpoints_are_kept_and_last_is_linked():
    assert fit(RunCheckpoint(every_n_updates=2, keep_last=2, keep_best=0)) == [
        "update_000006.ckpt",
        "update_000008.ckpt",
    ]
    assert os.path.samefile("checkpoints/last.ckpt", "checkpoints/update_000008.ckpt")
    assert not list(Path("checkpoints").glob(".*"))


def test_the_best_checkpoint_is_kept_besides_the_newest():
    """The second epoch is the best and would be deleted by age."""
    losses = [0.9, 0.2, 0.7, 0.8]
    callback = RunCheckpoint(keep_last=1, keep_best=1)

    class Scripted(SlopeModule):
        def evaluation_metrics(self):
            return {"loss": losses[self.trainer.current_epoch]}

    assert fit(callback, Scripted(learning_rate=0.1), epochs=4) == ["update_000016.ckpt", "update_000032.ckpt"]
    assert os.path.samefile("checkpoints/best.ckpt", "checkpoints/update_000016.ckpt")
    assert Path(callback.best_model_path).name == "update_000016.ckpt"
    assert Path(callback.last_model_path).name == "update_000032.ckpt"
    assert callback.kept.scores == {"update_000016.ckpt": pytest.approx(0.2), "update_000032.ckpt": pytest.approx(0.8)}


@pytest.mark.parametrize(
    ("monitor", "mode", "best"), [("val/score", None, 8), ("val/score", "max", 16), (None, None, 16)]
)
def test_default_and_given_monitor_and_mode(monitor, mode, best):
    """Without val/loss, the highest score is best; for a given metric, lower is better by default."""
    scores = [0.1, 0.9, 0.5]

    class Scored(SlopeModule):
        def evaluation_metrics(self):
            return {"score": scores[self.trainer.current_epoch]}

    fit(RunCheckpoint(monitor=monitor, mode=mode), Scored(learning_rate=0.1), epochs=3)
    assert updates_in("best.ckpt") == best


def test_a_metric_that_is_nan_is_never_the_best():
    losses = [float("nan"), 0.5]

    class Diverged(SlopeModule):
        def evaluation_metrics(self):
            return {"loss": losses[self.trainer.current_epoch]}

    fit(RunCheckpoint(), Diverged(learning_rate=0.1), epochs=2)
    assert updates_in("best.ckpt") == 2 * UPDATES


def test_a_metric_that_validation_does_not_log_is_an_error():
    with refused("unknown-metric", "checkpoint.monitor is 'val/los'", "it logs val/loss"):
        fit(RunCheckpoint(monitor="val/los"))


def test_the_list_of_kept_checkpoints_survives_a_resume():
    first = run(["fit", *BASIC, "--checkpoint.keep_last", "2"])
    kept = first.trainer.checkpoint_callback
    again = run(["fit", "--resume", str(first.folder), "--trainer.max_epochs", "4"]).trainer.checkpoint_callback
    assert kept.kept.saved == ["update_000008.ckpt"]
    names = {path.name for path in (first.folder / "checkpoints").glob("update*")}
    assert set(again.kept.saved) == names == {"update_000024.ckpt", "update_000032.ckpt"}
    assert again.kept.monitor == "val/loss"


def test_a_failed_save_keeps_the_earlier_checkpoint_and_leaves_no_partial_file():
    """No file may grow beyond the first checkpoint's size while the second is written."""
    callback = RunCheckpoint(every_n_updates=3)

    class Fills(Callback):
        def on_train_batch_start(self, trainer, module, *_):
            if module.updates == 5:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(CheckpointFailedError) as failure:
            fit(callback, callbacks=[Fills()])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert failure.value.code == "checkpoint-not-written"
    assert str(failure.value).replace(str(Path.cwd()), ".").replace("./", "") == (
        "the checkpoint checkpoints/update_000006.ckpt could not be written ([Errno 27] File too large); "
        "checkpoints/update_000003.ckpt is complete: free some space, and `rlhf fit --resume .` continues from it"
    )
    assert [path.name for path in sorted(Path("checkpoints").iterdir())] == ["last.ckpt", "update_000003.ckpt"]
    assert updates_in("last.ckpt") == 3 and last_checkpoint(Path()).name == "last.ckpt"
    assert callback.kept.saved == ["update_000003.ckpt"]


def test_weights_load_without_unpickling():
    fit(RunCheckpoint())
    state = torch.load("checkpoints/last.ckpt", weights_only=True)
    assert state["hyper_parameters"]["learning_rate"] == 0.1
    assert state["callbacks"]["RunCheckpoint"]["saved"] == ["update_000008.ckpt"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"keep_last": 0}, "keep_last is 0"),
        ({"every_n_updates": 0}, "every_n_updates is 0"),
        ({"every_n_rollouts": -1}, "is -1"),
    ],
)
def test_invalid_periods_are_refused(arguments, sentence):
    with refused("setting-out-of-range", sentence):
        RunCheckpoint(**arguments)


def test_files_are_replaced_atomically(monkeypatch):
    """A reader sees the old text during a write; a writer that dies leaves the old text."""
    path = Path("manifest.json")
    write_text(path, "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "new")
    assert path.read_text() == "old"


def test_a_sharded_checkpoint_replaces_the_previous_folder():
    for number in (1, 2):
        partial = Path(f"part{number}")
        partial.mkdir()
        (partial / "shard").write_text(str(number))
        replace_checkpoint(partial, Path("checkpoint"))
    assert (Path("checkpoint") / "shard").read_text() == "2"
    assert [path.name for path in Path().iterdir()] == ["checkpoint"]


def test_the_newest_checkpoint_is_found_by_number_without_the_link():
    Path("checkpoints").mkdir()
    for number in (9, 10, 100):
        torch.save({"updates": number}, Path("checkpoints") / f"update_{number:06d}.ckpt")
    (Path("checkpoints") / ".update_000200.ckpt.partial").touch()
    assert last_checkpoint(Path()).name == "update_000100.ckpt"
