"""Test modules under a plain Trainer, without the command line: supported and refused Lightning features."""

import csv
import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import refused
from lightning.pytorch import callbacks as lightning
from lightning.pytorch.loggers import CSVLogger
from tiny_models import (
    assert_same,
    demonstration_step,
    preference_step,
    prompt_step,
    quiet_trainer,
    random_pairs,
    random_rows,
    weights_of,
)
from torch.utils.data import DataLoader

from rlhf_lightning.data import PromptDataModule, SFTDataModule
from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.modules.sft import SFTModule
from rlhf_lightning.runs import RunCheckpoint
from training.test_module_checkpoints import ResumableData, Snapshot, low_words

FAMILIES = ("sft", "dpo", "ppo")
STEPS, UPDATES = 4, {"sft": 1, "dpo": 1, "ppo": 2}
"""Training steps of an epoch, and the updates that each of them takes."""


def made(family: str, folder: str, **settings: Any) -> Any:
    settings = {"init_from": folder, "learning_rate": 5e-3, "warmup": 0.0, **settings}
    if family == "ppo":
        settings |= {"scorer": low_words, "max_new_tokens": 3, "ppo_epochs": 2, "critic": "shared"}
    return {"sft": SFTModule, "dpo": DPOModule, "ppo": PPOModule}[family](**settings)


def steps_of(family: str, count: int = STEPS) -> list[Any]:
    make: dict[str, Callable[[int], Any]] = {
        "sft": lambda n: demonstration_step(random_rows(2, seed=n)),
        "dpo": lambda n: preference_step(random_pairs(2, seed=n)),
        "ppo": lambda n: prompt_step([prompt for prompt, _ in random_rows(2, seed=n)], first_episode=2 * n),
    }
    return [make[family](n) for n in range(count)]


def loader(family: str, count: int = STEPS) -> DataLoader:
    return DataLoader(steps_of(family, count), batch_size=None)


class Data(ResumableData):
    """Yields different steps in each epoch, and held-out steps."""

    def __init__(self, family: str) -> None:
        super().__init__(steps_of(family), steps_of(family, 1))


def trained(family: str, folder: str, ckpt_path: Path | None = None, **trainer: Any) -> Any:
    module = made(family, folder)
    path = None if ckpt_path is None else str(ckpt_path)
    quiet_trainer(**trainer).fit(module, Data(family), ckpt_path=path, weights_only=True)
    return module


def assert_resumes(
    family: str, folder: str, tmp_path: Path, callbacks: Callable[[], list[Any]] = list, **trainer: Any
) -> Any:
    """Compare a run that was interrupted in its second epoch and resumed with an uninterrupted run."""
    settings = {"max_epochs": 2, **trainer}
    path = tmp_path / "middle.ckpt"
    whole = trained(family, folder, callbacks=[*callbacks(), Snapshot(STEPS + 1, path)], **settings)
    resumed = trained(family, folder, path, callbacks=callbacks(), **settings)
    assert_same(weights_of(resumed), weights_of(whole), rtol=0, atol=0)
    assert resumed.updates == whole.updates == 2 * STEPS * UPDATES[family]
    return whole


# -- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_fit_accepts_a_loader_of_steps(policy_folder: str, family: str) -> None:
    module = made(family, policy_folder, lr_schedule="linear")
    trainer = quiet_trainer()
    trainer.fit(module, train_dataloaders=loader(family), val_dataloaders=loader(family, 1))
    assert module.updates == trainer.global_step == STEPS * UPDATES[family]
    assert module.optimizers().param_groups[0]["lr"] == 0.0  # the schedule ends with the run
    assert {"val/loss", "val/score"} & set(trainer.callback_metrics)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_with_a_stateful_loader_resumes(policy_folder: str, family: str, tmp_path: Path) -> None:
    assert_resumes(family, policy_folder, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["validate", "test", "predict"])
def test_validate_and_test_run_without_fit(policy_folder: str, family: str, method: str) -> None:
    trainer, module = quiet_trainer(), made(family, policy_folder)
    if method == "predict":
        found = trainer.predict(module, loader("ppo", 1))
        assert set(found[0][0]) == {"prompt", "completion", "logprob", "finished"}
    else:
        found = getattr(trainer, method)(module, loader(family, 1), verbose=False)
        assert any(name.startswith({"validate": "val/", "test": "test/"}[method]) for name in found[0])


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_model_checkpoint_names_the_update_that_it_holds(policy_folder: str, family: str, tmp_path: Path) -> None:
    def keep() -> list[Any]:
        return [
            lightning.ModelCheckpoint(
                tmp_path / "kept", "{step}", every_n_train_steps=2, save_top_k=-1, save_on_train_epoch_end=False
            )
        ]

    whole = trained(family, policy_folder, callbacks=keep(), max_epochs=2, enable_checkpointing=True)
    files = {int(re.findall(r"step=(\d+)", path.name)[0]): path for path in (tmp_path / "kept").glob("*.ckpt")}
    assert sorted(files) == list(range(2, whole.updates + 1, 2))
    for update, path in files.items():
        assert torch.load(path, weights_only=True)["progress"]["updates"] == update
    for update in (2, STEPS * UPDATES[family], whole.updates - 2):  # within an epoch, at its end, in the second
        resumed = trained(family, policy_folder, files[update], max_epochs=2)
        assert resumed.updates == whole.updates
        assert_same(weights_of(resumed), weights_of(whole), rtol=0, atol=0)


def test_model_checkpoint_keeps_the_best_by_a_validation_metric(policy_folder: str, tmp_path: Path) -> None:
    best = lightning.ModelCheckpoint(tmp_path, "best-{step}", monitor="val/loss", save_top_k=1)
    whole = trained("sft", policy_folder, callbacks=[best], max_epochs=2, enable_checkpointing=True)
    assert Path(best.best_model_path).name in ("best-step=4.ckpt", "best-step=8.ckpt")
    resumed = trained("sft", policy_folder, Path(best.best_model_path), max_epochs=2)
    assert resumed.updates == whole.updates
    assert_same(weights_of(resumed), weights_of(whole), rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_run_checkpoint_and_run_callbacks_work_without_the_command_line(
    policy_folder: str, family: str, tmp_path: Path
) -> None:
    kept = RunCheckpoint(every_n_updates=2)
    trained(family, policy_folder, callbacks=[kept], default_root_dir=tmp_path, enable_checkpointing=True)
    assert Path(kept.last_model_path).is_file() and Path(kept.best_model_path).is_file()


# -- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_ema_weight_averaging_averages_and_resumes(policy_folder: str, family: str, tmp_path: Path) -> None:
    def ema() -> list[Any]:
        return [lightning.EMAWeightAveraging(decay=0.5)]

    averaged = assert_resumes(family, policy_folder, tmp_path, ema)
    plain = trained(family, policy_folder, max_epochs=2)
    found, without = weights_of(averaged), weights_of(plain)
    assert max(float((found[name] - weight).abs().max()) for name, weight in without.items()) > 1e-4


class Thaw(lightning.BaseFinetuning):
    """Train the second layer at first, and the first one from the second epoch on."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.policy.model.model.layers[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.policy.model.model.layers[0], optimizer, initial_denom_lr=2)


class FreezeLater(pl.Callback):
    """Freeze the first layer from the second epoch on."""

    def on_train_epoch_start(self, trainer: pl.Trainer, module: Any) -> None:
        module.policy.model.model.layers[0].requires_grad_(trainer.current_epoch < 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("callback", [Thaw, FreezeLater])
def test_freezing_in_a_callback_works_and_resumes(
    policy_folder: str, family: str, callback: type, tmp_path: Path
) -> None:
    whole = assert_resumes(family, policy_folder, tmp_path, lambda: [callback()])
    one = trained(family, policy_folder, callbacks=[callback()])
    name = "policy.model.model.layers.0.mlp.up_proj.weight"
    start = dict(made_weights(policy_folder))[name]
    moved = [bool((dict(module.named_parameters())[name] != start).any()) for module in (one, whole)]
    assert moved == ([False, True] if callback is Thaw else [True, True])
    if callback is FreezeLater:
        state = torch.load(tmp_path / "middle.ckpt", weights_only=True)["state_dict"]
        assert torch.equal(state[name], dict(whole.named_parameters())[name])  # frozen by then, and no longer as loaded


def made_weights(folder: str) -> Any:
    module = made("sft", folder)
    module.configure_model()
    return module.named_parameters()


# -- learning rate ----------------------------------------------------------------------------------------------------


NAME = "learning_rate/matrices"


@pytest.mark.parametrize("family", FAMILIES)
def test_learning_rate_monitor_logs_over_updates(policy_folder: str, family: str, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    module = made(family, policy_folder, lr_schedule="linear")
    monitor = lightning.LearningRateMonitor()
    quiet_trainer(logger=logger, log_every_n_steps=1, callbacks=[monitor]).fit(module, loader(family))
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    rates = {int(row["step"]): float(row[NAME]) for row in rows if row[NAME]}
    each, total = UPDATES[family], STEPS * UPDATES[family]
    expected = {step * each: 5e-3 * (1 - step * each / total) for step in range(STEPS)}
    assert rates == pytest.approx(expected)
    losses = [int(row["step"]) for row in rows if row["train/loss"]]
    assert losses == [each * (step + 1) for step in range(STEPS)]


# -- bounds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("settings", "steps", "validations"),
    [
        ({"fast_dev_run": True}, 1, 1),
        ({"limit_train_batches": 2, "limit_val_batches": 0}, 2, 0),
        ({"limit_train_batches": 0.5, "max_epochs": 2}, 4, 2),
        ({"overfit_batches": 1, "max_epochs": 3}, 3, 3),
        ({"val_check_interval": 2}, 4, 2),
        ({"max_epochs": 2, "check_val_every_n_epoch": 2}, 8, 1),
        ({"profiler": "simple"}, 4, 1),
        ({"barebones": True}, 4, 1),
        ({"detect_anomaly": True, "deterministic": True}, 4, 1),
    ],
    ids=str,
)
def test_trainer_limits_and_switches_work(
    policy_folder: str, family: str, settings: dict[str, Any], steps: int, validations: int, tmp_path: Path
) -> None:
    class Count(pl.Callback):
        seen = 0

        def on_validation_end(self, *_: Any) -> None:
            Count.seen += 1

    module = made(family, policy_folder)
    if "barebones" in settings:
        trainer, validations = pl.Trainer(barebones=True, max_epochs=1, accelerator="cpu", devices=1), 0
    else:
        trainer = quiet_trainer(callbacks=[Count()], default_root_dir=tmp_path, **settings)
    trainer.fit(module, Data(family))
    assert module.updates == steps * UPDATES[family] and Count.seen == validations


class Seen(pl.Callback):
    """Records the rows of each training step."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, ...]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.rows.append(tuple(batch.row_ids))


@pytest.mark.parametrize("family", ["sft", "ppo"])
def test_overfit_batches_takes_the_same_rows_in_every_epoch(
    policy_folder: str, family: str, write_rows: Callable[..., str]
) -> None:
    source = write_rows({"prompt": f"w{n}", "completion": f"w{n + 20}"} for n in range(20, 32))
    data = {"sft": SFTDataModule, "ppo": PromptDataModule}[family](source, batch_size=2)
    seen, free = Seen(), Seen()
    for callback, settings in ((seen, {"overfit_batches": 2}), (free, {"limit_train_batches": 2})):
        quiet_trainer(callbacks=[callback], max_epochs=3, **settings).fit(made(family, policy_folder), data)
    assert seen.rows[:2] == seen.rows[2:4] == seen.rows[4:] and seen.rows[0] != seen.rows[1]
    assert free.rows[:2] != free.rows[2:4]


@pytest.mark.parametrize("family", FAMILIES)
def test_max_steps_within_an_epoch_ends_with_a_validation(policy_folder: str, family: str, tmp_path: Path) -> None:
    steps = 3 * UPDATES[family]
    module = made(family, policy_folder)
    trainer = quiet_trainer(max_steps=steps, max_epochs=-1)
    trainer.fit(module, Data(family))
    assert module.updates == steps
    assert {"val/loss", "val/score"} & set(trainer.callback_metrics)


def test_max_steps_without_a_validation_says_so(policy_folder: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        trained("sft", policy_folder, max_steps=3, max_epochs=-1, check_val_every_n_epoch=2)
    assert "max_steps=3 ended the run after update 3, which was not validated" in caplog.text


# -- callbacks and loggers --------------------------------------------------------------------------------------------

CALLBACKS: dict[str, Callable[[], pl.Callback]] = {
    "EarlyStopping": lambda: lightning.EarlyStopping("val/kl", patience=9, strict=False),
    "Timer": lambda: lightning.Timer(timedelta(hours=1)),
    "ModelSummary": lightning.ModelSummary,
    "DeviceStatsMonitor": lambda: lightning.DeviceStatsMonitor(cpu_stats=False),
    "OnExceptionCheckpoint": lambda: lightning.OnExceptionCheckpoint("."),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CALLBACKS)
def test_callbacks_work_and_resume(policy_folder: str, family: str, name: str, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    assert_resumes(
        family, policy_folder, tmp_path, lambda: [CALLBACKS[name]()], logger=logger, enable_checkpointing=True
    )


def test_early_stopping_stops_and_a_timer_too(policy_folder: str) -> None:
    stops = lightning.EarlyStopping("val/loss", mode="max", patience=1)
    assert trained("sft", policy_folder, callbacks=[stops], max_epochs=9).updates < 9 * STEPS
    assert trained("sft", policy_folder, callbacks=[lightning.Timer(timedelta(0))], max_epochs=9).updates <= STEPS


# -- refused ----------------------------------------------------------------------------------------------------------


class TwoOptimizers(SFTModule):
    """Returns an optimizer for each layer."""

    def configure_optimizers(self) -> Any:
        layers = self.policy.model.model.layers
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in layers], []


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "gradient_clip_val": ("trainer-clips-gradients", {"gradient_clip_val": 1.0}),
    "accumulate_grad_batches": ("accumulated-batches", {"accumulate_grad_batches": 2}),
    "GradientAccumulationScheduler": (
        "accumulated-batches", {"callbacks": [lightning.GradientAccumulationScheduler({0: 2})]},
    ),
    "StochasticWeightAveraging": (
        "stochastic-weight-averaging", {"callbacks": [lightning.StochasticWeightAveraging(1e-3)]},
    ),
    "ModelCheckpoint by time": (
        "checkpoint-by-time", {"callbacks": [lightning.ModelCheckpoint(train_time_interval=timedelta(minutes=1))]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_trainer_settings_are_refused(family: str, name: str) -> None:
    code, settings = REFUSED[name]
    trainer = quiet_trainer(**settings, enable_checkpointing=True)
    with refused(code, "set " if "averaging" not in code and "finder" not in code and "time" not in code else ":"):
        trainer.fit(made(family, "unread"), Data(family))


def test_a_checkpoint_within_a_rollout_is_refused() -> None:
    keeps = lightning.ModelCheckpoint(every_n_train_steps=3)
    with refused("checkpoint-within-rollout", "multiple of 2", "RunCheckpoint"):
        quiet_trainer(callbacks=[keeps], enable_checkpointing=True).fit(made("ppo", "unread"), Data("ppo"))


def test_several_optimizers_are_refused(policy_folder: str) -> None:
    with refused("several-optimizers", "groups of one optimizer"):
        quiet_trainer().fit(TwoOptimizers(init_from=policy_folder), Data("sft"))


# -- errors inside properties -----------------------------------------------------------------------------------------


def test_an_error_inside_a_property_is_reported_as_what_it_is(policy_folder: str) -> None:
    class Wrong(SFTModule):
        @property
        def model(self) -> Any:
            return self.polizy

    with refused("failing-property", "Wrong.model", "no attribute 'polizy'", "not loaded yet"):
        Wrong(init_from=policy_folder).model  # noqa: B018
    with refused("undefined-method", "model"):
        from rlhf_lightning.training.module import AlignmentModule

        AlignmentModule(init_from="unread").model  # noqa: B018
    assert not hasattr(SFTModule(init_from="unread"), "nothing_of_the_kind")


# -- the page ---------------------------------------------------------------------------------------------------------


def test_each_row_of_the_page_names_a_test_of_this_file() -> None:
    page = (Path(__file__).parents[2] / "docs" / "lightning.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ") and "`test_" in line]
    named = {re.findall(r"`(test_\w+)` \|$", row)[0] for row in rows}
    assert len(rows) >= 20 and named <= set(globals())
